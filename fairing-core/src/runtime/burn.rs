//! The adapter for burn's modules, the only file that knows burn: every [`Module`] is a [`Model`].
//!
//! A tensor's class follows from how burn treats it. A float parameter that requires a gradient is *trained*; one that does
//! not, as after `no_grad()`, and every integer and bool parameter is *frozen*; what refuses to require one, burn's
//! `RunningState`, is *state*.

use std::mem;
use std::path::Path;
use std::sync::OnceLock;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::store::ModuleRecord;
use burn::tensor::kind::Basic;
use burn::tensor::{Bool, DType, Device, Gradients, Int, Tensor, TensorData};

use super::layout::{Class, Layout, LayoutError, TensorSpec};
use super::model::Model;
use super::worker::Worker;

/// The device on which models are trained by default: burn's CPU backend `flex`, with gradients.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device::flex().autodiff())
}

/// Makes the calling thread, with `threads` - 1 others, the one that burn computes in.
///
/// burn hands loops to rayon. Called from a thread that is not rayon's own, each of them would be given to another thread and
/// waited for: about forty changes of thread per step of a small network.
///
/// The pool is this thread's alone. In rayon's global one, a job from another thread, say one that prefetches batches, would
/// wait for this thread, which may just be waiting for that other one.
pub(crate) fn compute_in_this_thread(threads: usize) {
    let pool = rayon_core::ThreadPoolBuilder::new().num_threads(threads).use_current_thread();
    // It fails if this thread is in a pool already: then burn computes as well. The pool is needed as long as the thread is,
    // which ends with the process.
    if let Ok(pool) = pool.build() {
        mem::forget(pool);
    }
}

impl Worker {
    /// The device to create model and data on: the processor, with gradients.
    pub fn device(&self) -> &'static Device {
        device()
    }
}

/// burn's modules. Their parameters stay on the device on which the module was created.
///
/// Clones of a module share its running state, as in burn: [`Model::write_state`] and [`Model::load`] on one act on all.
impl<M: Module + 'static> Model for M {
    type Gradients = Gradients;

    /// burnpack, as of `Module::save_file`.
    const EXTENSION: &'static str = "bpk";

    fn layout(&self) -> Result<Layout, LayoutError> {
        let mut specs = Specs { path: Vec::new(), classes: classes(self).into_iter(), tensors: Vec::new() };
        self.visit(&mut specs);
        Layout::new(specs.tensors).map_err(|error| match error {
            LayoutError::NothingToTrain => without_autodiff(self).unwrap_or(error),
            other => other,
        })
    }

    fn read_trained(&self, out: &mut [f32]) {
        let mut read = ReadTrained { out };
        self.visit(&mut read);
        assert!(read.out.is_empty(), "{} elements more than the model has", read.out.len());
    }

    fn write_trained(self, values: &[f32]) -> Self {
        let mut write = WriteTrained { values };
        let model = self.map(&mut write);
        assert!(write.values.is_empty(), "{} elements more than the model has", write.values.len());
        model
    }

    fn read_frozen(&self) -> Vec<u8> {
        let mut read = ReadFrozen { classes: classes(self).into_iter(), bytes: Vec::new() };
        self.visit(&mut read);
        read.bytes
    }

    fn write_frozen(self, bytes: &[u8]) -> Self {
        let mut write = WriteFrozen { classes: classes(&self).into_iter(), bytes };
        let model = self.map(&mut write);
        assert!(write.bytes.is_empty(), "{} bytes more than the model has", write.bytes.len());
        model
    }

    fn read_state(&self, out: &mut [f32]) {
        flush(self);
        let mut read = ReadState { classes: classes(self).into_iter(), out };
        self.visit(&mut read);
        assert!(read.out.is_empty(), "{} elements more than the model has", read.out.len());
    }

    fn write_state(self, values: &[f32]) -> Self {
        flush(&self);
        let mut write = WriteState { classes: classes(&self).into_iter(), values };
        let model = self.map(&mut write);
        assert!(write.values.is_empty(), "{} elements more than the model has", write.values.len());
        model
    }

    fn read_gradients(&self, gradients: Gradients, out: &mut [f32], present: &mut [bool]) {
        let mut read = ReadGradients { gradients, out, present };
        self.visit(&mut read);
        assert!(read.out.is_empty(), "{} elements more than the model has", read.out.len());
        assert!(read.present.is_empty(), "{} tensors more than the model has", read.present.len());
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        flush(self);
        let bytes = self.clone().into_record().into_bytes().map_err(|error| error.to_string())?;
        Ok(bytes.to_vec())
    }

    fn load(self, path: &Path) -> Result<Self, String> {
        flush(&self);
        let record = ModuleRecord::load(path).map_err(|error| error.to_string())?;
        let expecting = self.map(&mut ExpectStored);
        expecting.try_load_record(record.cast_to_module_dtype()).map_err(|error| error.to_string())
    }

    /// Dropout and initialisers of all threads draw from this one generator.
    fn seed(seed: u64) {
        device().seed(seed);
    }
}

/// Adds the pending updates of running statistics, which burn keeps per thread, to their value.
///
/// Without it a read misses the last update, and a write is undone by it. `valid()` is the only public way.
fn flush<M: Module>(model: &M) {
    drop(model.valid());
}

/// The class of every tensor in visiting order; materialises what is lazy.
fn classes<M: Module>(model: &M) -> Vec<Class> {
    // Materialised first: an uninitialised parameter shares the setting that `ForceGrad` changes with its clones.
    let mut wanted = Requires::default();
    model.visit(&mut wanted);
    // Of `valid()`, because a plain clone shares its running state with the model.
    let mut forced = Requires::default();
    model.valid().map(&mut ForceGrad).visit(&mut forced);
    let class = |(wanted, forced)| match (wanted, forced) {
        (Some(true), _) => Class::Trained,
        (Some(false), Some(false)) => Class::State,
        _ => Class::Frozen,
    };
    wanted.of.into_iter().zip(forced.of).map(class).collect()
}

/// The error for a model that has parameters to train, but on a device without gradients.
fn without_autodiff<M: Module>(model: &M) -> Option<LayoutError> {
    let mut specs = Specs { path: Vec::new(), classes: Vec::new().into_iter(), tensors: Vec::new() };
    let model = model.clone().train();
    specs.classes = classes(&model).into_iter();
    model.visit(&mut specs);
    let path = specs.tensors.into_iter().find(|tensor| tensor.class == Class::Trained)?.path;
    Some(LayoutError::NoAutodiff { path })
}

/// Whether each tensor requires a gradient; `None` for a type that cannot.
#[derive(Default)]
struct Requires {
    of: Vec<Option<bool>>,
}

impl ModuleVisitor for Requires {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.of.push(param.dtype().is_float().then(|| param.is_require_grad()));
    }

    fn visit_int<const D: usize>(&mut self, _: &Param<Tensor<D, Int>>) {
        self.of.push(None);
    }

    fn visit_bool<const D: usize>(&mut self, _: &Param<Tensor<D, Bool>>) {
        self.of.push(None);
    }
}

/// Asks every tensor to require a gradient: parameters obey, running state does not.
struct ForceGrad;

impl ModuleMapper for ForceGrad {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.dtype().is_float() {
            return param;
        }
        param.map(|tensor| tensor.autodiff().set_require_grad(true))
    }
}

struct Specs {
    path: Vec<String>,
    classes: std::vec::IntoIter<Class>,
    tensors: Vec<TensorSpec>,
}

impl Specs {
    fn push<const D: usize, K: Basic>(&mut self, tensor: &Tensor<D, K>) {
        self.tensors.push(TensorSpec {
            path: self.path.join("."),
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype().name().to_owned(),
            class: next(&mut self.classes),
        });
    }
}

impl ModuleVisitor for Specs {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.push(&**param);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.push(&**param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.push(&**param);
    }
}

struct ReadTrained<'a> {
    out: &'a mut [f32],
}

impl ModuleVisitor for ReadTrained<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            read(param.base(), &mut self.out);
        }
    }
}

struct WriteTrained<'a> {
    values: &'a [f32],
}

impl ModuleMapper for WriteTrained<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        param.map(|old| write(&old, &mut self.values).set_require_grad(true))
    }
}

struct ReadFrozen {
    classes: std::vec::IntoIter<Class>,
    bytes: Vec<u8>,
}

impl ReadFrozen {
    fn read<const D: usize, K: Basic>(&mut self, tensor: Tensor<D, K>) {
        if next(&mut self.classes) == Class::Frozen {
            self.bytes.extend_from_slice(tensor.into_data().as_bytes());
        }
    }
}

impl ModuleVisitor for ReadFrozen {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.read(param.base());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.read(param.base());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.read(param.base());
    }
}

struct WriteFrozen<'a> {
    classes: std::vec::IntoIter<Class>,
    bytes: &'a [u8],
}

impl WriteFrozen<'_> {
    fn write<const D: usize, K: Basic>(&mut self, old: Tensor<D, K>) -> Tensor<D, K> {
        if next(&mut self.classes) != Class::Frozen {
            return old;
        }
        let device = old.device();
        // Its length, since the size of packed quantised values does not follow from their shape.
        let old = old.into_data();
        let (bytes, rest) = self.bytes.split_at(old.as_bytes().len());
        self.bytes = rest;
        let data = TensorData::from_bytes_vec(bytes.to_vec(), old.shape().clone(), old.dtype());
        Tensor::from_data(data, (&device, old.dtype()))
    }
}

impl ModuleMapper for WriteFrozen<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|old| self.write(old))
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        param.map(|old| self.write(old))
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        param.map(|old| self.write(old))
    }
}

struct ReadState<'a> {
    classes: std::vec::IntoIter<Class>,
    out: &'a mut [f32],
}

impl ModuleVisitor for ReadState<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if next(&mut self.classes) == Class::State {
            read(param.base(), &mut self.out);
        }
    }

    fn visit_int<const D: usize>(&mut self, _: &Param<Tensor<D, Int>>) {
        next(&mut self.classes);
    }

    fn visit_bool<const D: usize>(&mut self, _: &Param<Tensor<D, Bool>>) {
        next(&mut self.classes);
    }
}

struct WriteState<'a> {
    classes: std::vec::IntoIter<Class>,
    values: &'a [f32],
}

impl ModuleMapper for WriteState<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if next(&mut self.classes) != Class::State {
            return param;
        }
        param.map(|old| write(&old, &mut self.values))
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        next(&mut self.classes);
        param
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        next(&mut self.classes);
        param
    }
}

struct ReadGradients<'a> {
    gradients: Gradients,
    out: &'a mut [f32],
    present: &'a mut [bool],
}

impl ModuleVisitor for ReadGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        let (present, rest) = mem::take(&mut self.present).split_first_mut().expect("one bit per trained tensor");
        self.present = rest;
        let gradient = param.grad_remove(&mut self.gradients);
        *present = gradient.is_some();
        match gradient {
            Some(gradient) => read(gradient, &mut self.out),
            None => take(&mut self.out, param.shape().num_elements()).fill(0.0),
        }
    }
}

/// Lets initialised parameters expect the shape in which they are stored.
///
/// burn 0.22.1 compares a file with their shape in memory, which differs in a `Linear` of layout `Col`, and so refuses
/// the very file that the module wrote; only uninitialised parameters know the stored shape.
struct ExpectStored;

impl ModuleMapper for ExpectStored {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let stored = param.transform_for_save().shape();
        if stored == param.shape() {
            return param;
        }
        let device = param.device();
        let require_grad = param.clone().train().is_require_grad();
        let (id, tensor, mapper) = param.consume();
        let (load, save) = (mapper.clone(), mapper);
        Param::uninitialized(id, move |_, _| tensor, device, require_grad, stored)
            .load_mapper(move |tensor| load.on_load(tensor))
            .save_mapper(move |tensor| save.on_save(tensor))
    }
}

fn next(classes: &mut std::vec::IntoIter<Class>) -> Class {
    classes.next().expect("a module visits and maps the same tensors in the same order")
}

/// Copies an `f32` tensor to the front of `out` and moves `out` behind it.
fn read<const D: usize>(tensor: Tensor<D>, out: &mut &mut [f32]) {
    let data = tensor.into_data();
    let values = data.as_slice::<f32>().expect("the layout has only `f32` here");
    take(out, values.len()).copy_from_slice(values);
}

/// A tensor like `old` with the values at the front of `values`, which moves behind them.
fn write<const D: usize>(old: &Tensor<D>, values: &mut &[f32]) -> Tensor<D> {
    let shape = old.shape();
    let (front, rest) = values.split_at(shape.num_elements());
    *values = rest;
    // With its type, since a device can have another default than `f32`.
    Tensor::from_data(TensorData::new(front.to_vec(), shape), (&old.device(), DType::F32))
}

fn take<'a>(out: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = mem::take(out).split_at_mut(len);
    *out = rest;
    front
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use burn::grad_clipping::GradientClippingConfig;
    use burn::module::ParamId;
    use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, LinearLayout};
    use burn::optim::decay::WeightDecayConfig;
    use burn::optim::momentum::MomentumConfig;
    use burn::optim::{
        AdaGradConfig, AdamConfig, AdamWConfig, GradientsParams, ModuleOptimizer, RmsPropConfig, SgdConfig,
    };
    use expect_test::expect;

    use super::*;
    use crate::runtime::optimizer::{AdaGrad, Adam, AdamW, Cells, Clipping, Optimizer, RmsProp, Sgd, ShardOptimizer};

    /// One tensor of every class and kind, among them a layer whose stored form differs from its form in memory.
    #[derive(Module, Debug)]
    struct Zoo {
        fc: Linear,
        norm: BatchNorm,
        frozen: Linear,
        table: Param<Tensor<1, Int>>,
        mask: Param<Tensor<1, Bool>>,
        layers: Vec<Linear>,
    }

    impl Zoo {
        fn new(device: &Device) -> Self {
            Self {
                fc: LinearConfig::new(4, 3).init(device),
                norm: BatchNormConfig::new(3).init(device),
                frozen: LinearConfig::new(3, 2).init(device).no_grad(),
                table: Param::initialized(ParamId::new(), Tensor::from_data([1, 2, 3], device)),
                mask: Param::initialized(ParamId::new(), Tensor::from_data([true, false], device)),
                layers: vec![LinearConfig::new(3, 2).with_layout(LinearLayout::Col).init(device)],
            }
        }

        fn forward(&self, input: Tensor<2>) -> Tensor<2> {
            let hidden = self.norm.forward(self.fc.forward(input));
            self.frozen.forward(hidden.clone()) + self.layers[0].forward(hidden)
        }
    }

    fn input(rows: usize, columns: usize) -> Tensor<2> {
        let values = (0..rows * columns).map(|i| ((i * 37 + 11) % 23) as f32 / 11.0 - 1.0).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), device())
    }

    fn trained(model: &impl Model) -> Vec<f32> {
        let mut values = vec![f32::NAN; model.layout().unwrap().trained_len()];
        model.read_trained(&mut values);
        values
    }

    fn state(model: &impl Model) -> Vec<f32> {
        let mut values = vec![f32::NAN; model.layout().unwrap().state_len()];
        model.read_state(&mut values);
        values
    }

    fn output(model: &Zoo) -> Vec<f32> {
        model.valid().forward(input(5, 4).inner()).into_data().as_slice().unwrap().to_vec()
    }

    #[test]
    fn classes_follow_from_how_burn_treats_a_tensor() {
        let layout = Zoo::new(device()).layout().unwrap();
        let lines: Vec<_> = layout.tensors().iter().map(|tensor| format!("{tensor}\n")).collect();
        expect![[r#"
            `fc.weight` [4, 3] f32 trained
            `fc.bias` [3] f32 trained
            `norm.gamma` [3] f32 trained
            `norm.beta` [3] f32 trained
            `norm.running_mean` [3] f32 state
            `norm.running_var` [3] f32 state
            `frozen.weight` [3, 2] f32 frozen
            `frozen.bias` [2] f32 frozen
            `table` [3] i32 frozen
            `mask` [2] bool frozen
            `layers.0.weight` [3, 2] f32 trained
            `layers.0.bias` [2] f32 trained
        "#]]
        .assert_eq(&lines.concat());
    }

    #[test]
    fn a_safetensors_file_holds_every_tensor() {
        let model = Zoo::new(device());
        let layout = model.layout().unwrap();
        let bytes = crate::runtime::safetensors::to_bytes(&model).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), layout.tensors().len());
        let of = |class| -> Vec<u8> {
            let tensors = layout.of(class).map(|spec| file.tensor(&spec.path).unwrap());
            tensors.flat_map(|tensor| tensor.data().to_vec()).collect()
        };
        let (mut trained, mut state) = (vec![0.0; layout.trained_len()], vec![0.0; layout.state_len()]);
        model.read_trained(&mut trained);
        model.read_state(&mut state);
        assert_eq!(of(Class::Trained), bytemuck::cast_slice::<f32, u8>(&trained));
        assert_eq!(of(Class::State), bytemuck::cast_slice::<f32, u8>(&state));
        assert_eq!(of(Class::Frozen), model.read_frozen());
    }

    #[test]
    fn what_is_written_is_read_to_the_bit() {
        let model = Zoo::new(device());
        let layout = model.layout().unwrap();
        let values: Vec<f32> = (0..layout.trained_len()).map(|i| (i as f32).sin() * f32::MIN_POSITIVE * 3.0).collect();
        let statistics: Vec<f32> = (0..layout.state_len()).map(|i| i as f32 + 0.1).collect();
        let mut frozen = Zoo::new(device()).read_frozen();
        let last = frozen.len() - 1;
        frozen[last] = 1; // both entries of the mask are true now

        let model = model.write_trained(&values).write_frozen(&frozen).write_state(&statistics);
        assert_eq!(trained(&model), values);
        assert_eq!(model.read_frozen(), frozen);
        assert_eq!(state(&model), statistics);
        assert_eq!(model.layout().unwrap(), layout);
        assert_eq!(model.mask.val().into_data(), TensorData::from([true, true]));
    }

    #[test]
    fn a_written_model_still_trains() {
        let model = Zoo::new(device());
        let layout = model.layout().unwrap();
        let frozen = model.read_frozen();
        let values = trained(&model);
        let model = model.write_trained(&values).write_frozen(&frozen);
        let mut out = vec![f32::NAN; layout.trained_len()];
        let mut present = vec![false; layout.trained().count()];
        let loss = model.forward(input(5, 4)).powi_scalar(2).mean();
        model.read_gradients(loss.backward(), &mut out, &mut present);
        assert_eq!(present, vec![true; present.len()]);
        assert!(out.iter().all(|value| value.is_finite()) && out.iter().any(|&value| value != 0.0));
        assert!(!model.frozen.weight.is_require_grad());
        assert!(model.frozen.weight.is_autodiff() && model.fc.weight.is_autodiff());
    }

    #[test]
    fn a_tensor_without_gradient_is_absent_and_zero() {
        let model = Zoo::new(device());
        let layout = model.layout().unwrap();
        let mut out = vec![f32::NAN; layout.trained_len()];
        let mut present = vec![true; layout.trained().count()];
        model.read_gradients(model.fc.forward(input(2, 4)).sum().backward(), &mut out, &mut present);
        assert_eq!(present, [true, true, false, false, false, false]);
        assert!(out[15..].iter().all(|&value| value == 0.0));
        assert_eq!(out[12..15], [2.0; 3]); // the bias of two examples
    }

    #[test]
    fn pending_statistics_are_read_and_do_not_undo_a_write() {
        let model = Zoo::new(device());
        let before = state(&model);
        model.forward(input(5, 4));
        let after = state(&model);
        assert_ne!(before, after);

        model.forward(input(7, 4));
        let written: Vec<f32> = (0..6).map(|i| i as f32 + 0.5).collect();
        let model = model.write_state(&written);
        drop(model.valid());
        assert_eq!(state(&model), written);
        // The next update starts from what was written: momentum 0.1 of the batch's statistics.
        model.forward(input(7, 4));
        let moved = state(&model);
        assert!(moved[1..].iter().zip(&written[1..]).all(|(new, old)| (new - old).abs() < 0.2 * old + 0.2));
        assert!((moved[5] - written[5]).abs() > 0.05);
    }

    #[test]
    fn lazy_parameters_are_initialised_once() {
        #[derive(Module, Debug)]
        struct Lazy {
            weight: Param<Tensor<1>>,
            frozen: Param<Tensor<1>>,
        }
        let count = Arc::new(AtomicUsize::new(0));
        let lazy = |require_grad: bool| {
            let count = count.clone();
            let init = move |device: &Device, require_grad: bool| {
                let value = count.fetch_add(1, Ordering::Relaxed) as f32;
                Tensor::<1>::full([2], value, device).set_require_grad(require_grad)
            };
            Param::uninitialized(ParamId::new(), init, device().clone(), require_grad, [2].into())
        };
        let model = Lazy { weight: lazy(true), frozen: lazy(false) };
        let clone = model.clone();
        assert_eq!(model.layout().unwrap().trained_len(), 2);
        assert_eq!(trained(&model), [0.0; 2]);
        let model = model.write_trained(&[5.0, 6.0]);
        assert_eq!((trained(&model), trained(&clone)), (vec![5.0, 6.0], vec![0.0; 2]));
        assert_eq!(count.load(Ordering::Relaxed), 2);
        assert!(!clone.frozen.is_require_grad() && !model.frozen.is_require_grad());
    }

    #[test]
    fn what_cannot_be_trained_is_named() {
        #[derive(Module, Debug)]
        struct Half {
            head: Param<Tensor<1>>,
        }
        let half = Half { head: Param::from_tensor(Tensor::ones([3], (device(), DType::F16))) };
        let expected = LayoutError::NotF32 { path: "head".into(), dtype: "f16".into() };
        assert_eq!(half.layout().unwrap_err(), expected);
        // Frozen, it is fine beside something that learns.
        let pair = (half.no_grad(), LinearConfig::new(1, 1).init(device()));
        assert_eq!(pair.layout().unwrap().trained_len(), 2);

        let frozen = Zoo::new(device()).no_grad();
        assert_eq!(frozen.layout().unwrap_err(), LayoutError::NothingToTrain);
        let plain = Zoo::new(&Device::flex());
        assert_eq!(plain.layout().unwrap_err(), LayoutError::NoAutodiff { path: "fc.weight".into() });
        let plain_and_frozen = Zoo::new(&Device::flex()).no_grad();
        assert_eq!(plain_and_frozen.layout().unwrap_err(), LayoutError::NothingToTrain);
    }

    #[test]
    fn the_file_is_the_one_that_burn_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("model.{}", Zoo::EXTENSION));
        let model = Zoo::new(device());
        model.forward(input(5, 4));
        std::fs::write(&path, model.to_bytes().unwrap()).unwrap();

        let by_burn = folder.path().join("burn.bpk");
        model.clone().save_file(&by_burn).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&by_burn).unwrap());
        assert_eq!(output(&Zoo::new(device()).load_file(&path)), output(&model));

        let other = Zoo::new(device());
        other.forward(input(9, 4)); // a pending update, which must not undo the load
        let loaded = other.load(&path).unwrap();
        assert_eq!(output(&loaded), output(&model));
        assert_eq!((trained(&loaded), state(&loaded)), (trained(&model), state(&model)));
        assert_eq!(loaded.read_frozen(), model.read_frozen());
        assert_eq!(loaded.layout().unwrap(), model.layout().unwrap());
    }

    #[test]
    fn a_file_that_is_missing_damaged_or_of_another_model_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.bpk");
        let load = || Model::load(Zoo::new(device()), &path).map(|_| ()).unwrap_err();
        assert!(load().contains("model.bpk"), "{}", load());
        std::fs::write(&path, b"not a model").unwrap();
        load();
        let bytes = Zoo::new(device()).to_bytes().unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 8]).unwrap();
        load();
        std::fs::write(&path, LinearConfig::new(2, 2).init(device()).to_bytes().unwrap()).unwrap();
        assert!(load().contains("fc.weight"), "{}", load());
    }

    /// Two branches of which a step may use either, and a tensor that no step uses.
    #[derive(Module, Debug)]
    struct Branches {
        shared: Linear,
        left: Linear,
        right: Linear,
        unused: Param<Tensor<2>>,
    }

    impl Branches {
        fn new(device: &Device) -> Self {
            Self {
                shared: LinearConfig::new(5, 33).init(device),
                left: LinearConfig::new(33, 3).init(device),
                right: LinearConfig::new(33, 3).init(device),
                unused: Param::from_tensor(Tensor::ones([2, 3], device)),
            }
        }

        fn gradients(&self, step: usize) -> Gradients {
            let hidden = self.shared.forward(input(6 + step % 5, 5)).tanh();
            let output = match step % 4 {
                0 => self.left.forward(hidden),
                1 => self.right.forward(hidden),
                _ => self.left.forward(hidden.clone()) * self.right.forward(hidden),
            };
            (output - 0.5).powi_scalar(2).mean().backward()
        }
    }

    /// Gives burn's optimizer and ours the same gradients, and compares all parameters after every step.
    #[track_caller]
    fn agrees(theirs: ModuleOptimizer, ours: impl Into<Optimizer>) {
        let (largest, _) = compare(theirs, ours.into(), 1e-3);
        assert!(largest <= 1e-6, "largest relative difference {largest:e}");
    }

    /// The same, where clipping must have had an effect in many of the 100 steps.
    #[track_caller]
    fn agrees_clipped(theirs: ModuleOptimizer, ours: impl Into<Optimizer>, size: f32, tolerance: f32) {
        let (largest, clipped) = compare(theirs, ours.into(), size);
        assert!(largest <= tolerance, "largest relative difference {largest:e}");
        assert!(clipped >= 10, "{clipped} of 100 steps clipped, which tests too little");
    }

    /// The largest difference relative to the parameter, or to `size` if it is smaller, and the number of steps in which
    /// some tensor's gradient was clipped by its norm, or an element by its value.
    fn compare(mut theirs: ModuleOptimizer, ours: Optimizer, size: f32) -> (f32, usize) {
        let mut expected = Branches::new(device());
        let layout = expected.layout().unwrap();
        let mut parameters = trained(&expected);
        let mut gradient = vec![0.0; parameters.len()];
        let mut present = vec![false; layout.trained().count()];
        let mut end = 0;
        let tensors = layout.trained().map(|tensor| {
            end += tensor.len();
            end - tensor.len()..end
        });
        let lengths: Vec<usize> = layout.trained().map(TensorSpec::len).collect();
        let cells = Cells::new(&lengths, 0..parameters.len());
        let mut squares = vec![0.0; cells.len()];
        let mut optimizer = ShardOptimizer::new(ours, tensors.collect());
        let (mut largest, mut clipped): (f32, usize) = (0.0, 0);
        for step in 0..100 {
            let learning_rate = 0.02 / (1.0 + step as f64 * 0.01);
            expected.read_gradients(expected.gradients(step), &mut gradient, &mut present);
            let gradients = GradientsParams::from_grads(expected.gradients(step), &expected);
            expected = theirs.step(learning_rate, expected, gradients);

            let mut round = optimizer.begin_round(&present, learning_rate);
            match ours.clipping() {
                Some(clipping) if ours.needs_norms() => {
                    cells.squares(0..parameters.len(), &gradient, &mut squares);
                    let scales = clipping.scales(&cells, &squares, &present);
                    clipped += usize::from(scales.iter().any(|scale| *scale < 1.0));
                    round.scale(scales);
                }
                Some(Clipping::Value(value)) => {
                    clipped += usize::from(gradient.iter().any(|gradient| gradient.abs() > value));
                }
                _ => (),
            }
            optimizer.apply(&round, 0..parameters.len(), &mut parameters, &gradient);
            for (ours, theirs) in parameters.iter().zip(trained(&expected)) {
                let difference = (ours - theirs).abs() / theirs.abs().max(size);
                assert!(difference.is_finite(), "{ours} beside {theirs}");
                largest = largest.max(difference);
            }
        }
        (largest, clipped)
    }

    #[test]
    fn sgd_agrees_with_burns() {
        agrees(SgdConfig::new().init(), Sgd::new());
        let decay = SgdConfig::new().with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        agrees(decay.init(), Sgd::new().weight_decay(1e-2));
    }

    #[test]
    fn momentum_agrees_with_burns() {
        let momentum = SgdConfig::new().with_momentum(Some(MomentumConfig::new()));
        agrees(momentum.init(), Sgd::new().momentum(0.9));
        let dampened = MomentumConfig::new().with_momentum(0.8).with_dampening(0.3);
        let decay = SgdConfig::new().with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        let ours = Sgd::new().momentum(0.8).dampening(0.3).weight_decay(1e-2);
        agrees(decay.with_momentum(Some(dampened)).init(), ours);
    }

    #[test]
    fn adam_agrees_with_burns() {
        agrees(AdamConfig::new().init(), Adam::new());
        let config = AdamConfig::new().with_beta_1(0.8).with_beta_2(0.99).with_epsilon(1e-7);
        let config = config.with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        agrees(config.init(), Adam::new().betas(0.8, 0.99).epsilon(1e-7).weight_decay(1e-2));
    }

    #[test]
    fn adam_w_agrees_with_burns() {
        agrees(AdamWConfig::new().init(), AdamW::new());
        let config = AdamWConfig::new().with_beta_1(0.8).with_beta_2(0.99).with_epsilon(1e-7).with_weight_decay(0.1);
        agrees(config.init(), AdamW::new().betas(0.8, 0.99).epsilon(1e-7).weight_decay(0.1));
    }

    #[test]
    fn nesterovs_momentum_agrees_with_burns() {
        let momentum = MomentumConfig::new().with_nesterov(true);
        agrees(SgdConfig::new().with_momentum(Some(momentum)).init(), Sgd::new().momentum(0.9).nesterov(true));
        let momentum = MomentumConfig::new().with_momentum(0.8).with_dampening(0.0).with_nesterov(true);
        let decay = SgdConfig::new().with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        let ours = Sgd::new().momentum(0.8).dampening(0.0).nesterov(true).weight_decay(1e-2);
        agrees(decay.with_momentum(Some(momentum)).init(), ours);
    }

    #[test]
    fn amsgrad_agrees_with_burns() {
        agrees(AdamConfig::new().with_amsgrad(true).init(), Adam::new().amsgrad(true));
        // With a short memory, so that the last second moment is mostly not the largest.
        let config = AdamConfig::new().with_beta_2(0.9).with_amsgrad(true);
        agrees(config.init(), Adam::new().betas(0.9, 0.9).amsgrad(true));
        let config = AdamWConfig::new().with_beta_2(0.9).with_amsgrad(true).with_weight_decay(0.1);
        agrees(config.init(), AdamW::new().betas(0.9, 0.9).amsgrad(true).weight_decay(0.1));
    }

    #[test]
    fn rms_prop_agrees_with_burns() {
        agrees(RmsPropConfig::new().init(), RmsProp::new());
        agrees(RmsPropConfig::new().with_momentum(0.0).init(), RmsProp::new().momentum(0.0));
        let config = RmsPropConfig::new().with_alpha(0.8).with_momentum(0.5).with_epsilon(1e-3);
        let config = config.with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        agrees(config.init(), RmsProp::new().alpha(0.8).momentum(0.5).epsilon(1e-3).weight_decay(1e-2));
    }

    #[test]
    fn centred_rms_prop_agrees_with_burns() {
        let (theirs, ours) = (RmsPropConfig::new().with_centered(true), RmsProp::new().centered(true));
        agrees(theirs.init(), ours);
        agrees(theirs.with_momentum(0.0).init(), ours.momentum(0.0));
    }

    #[test]
    fn ada_grad_agrees_with_burns() {
        agrees(AdaGradConfig::new().init(), AdaGrad::new());
        let config = AdaGradConfig::new().with_lr_decay(0.1).with_epsilon(1e-7);
        let config = config.with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        agrees(config.init(), AdaGrad::new().lr_decay(0.1).epsilon(1e-7).weight_decay(1e-2));
    }

    #[test]
    fn clipping_by_value_agrees_with_burns() {
        let clip = || Some(GradientClippingConfig::Value(0.1));
        agrees_clipped(SgdConfig::new().with_gradient_clipping(clip()).init(), Sgd::new().clip_value(0.1), 1e-3, 1e-6);
        let config = AdamConfig::new().with_weight_decay(Some(WeightDecayConfig::new(1e-2)));
        let ours = Adam::new().weight_decay(1e-2).clip_value(0.1);
        agrees_clipped(config.with_grad_clipping(clip()).init(), ours, 1e-3, 1e-6);
    }

    #[test]
    fn clipping_by_norm_agrees_with_burns() {
        /// burn adds the squares in `f32`. So each update differs by 1e-7 of itself, which is more of a parameter near 0,
        /// and RMSprop's updates of a parameter sum up to several times its size.
        const SIZE: f32 = 1.0;
        const TOLERANCE: f32 = 1e-5;
        let clip = || Some(GradientClippingConfig::Norm(0.2));
        let (sgd, adam) = (SgdConfig::new(), AdamConfig::new());
        agrees_clipped(
            sgd.with_gradient_clipping(clip()).init(),
            Sgd::new().clip_norm_per_tensor(0.2),
            SIZE,
            TOLERANCE,
        );
        agrees_clipped(adam.with_grad_clipping(clip()).init(), Adam::new().clip_norm_per_tensor(0.2), SIZE, TOLERANCE);
        let theirs = AdamWConfig::new().with_grad_clipping(clip());
        agrees_clipped(theirs.init(), AdamW::new().clip_norm_per_tensor(0.2), SIZE, TOLERANCE);
        let theirs = RmsPropConfig::new().with_grad_clipping(clip());
        agrees_clipped(theirs.init(), RmsProp::new().clip_norm_per_tensor(0.2), SIZE, TOLERANCE);
        let theirs = AdaGradConfig::new().with_grad_clipping(clip());
        agrees_clipped(theirs.init(), AdaGrad::new().clip_norm_per_tensor(0.2), SIZE, TOLERANCE);
    }
}
