//! The model as a `.safetensors` file, which programs in other languages read.

use std::collections::HashMap;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::layout::{Class, TensorSpec};
use super::model::Model;

/// The bytes of a file with every tensor of the model under its path.
///
/// The metadata holds `format` (`fairing`), `fairing` (its version) and, if something had to be left out, `left_out`: the
/// paths of frozen tensors of types that the format does not have, such as quantised ones.
///
/// # Errors
///
/// What is wrong, in words: the model has no layout, or two tensors have one path.
pub(crate) fn to_bytes<M: Model>(model: &M) -> Result<Vec<u8>, String> {
    if cfg!(target_endian = "big") {
        return Err("the format is little-endian, and this machine is not".to_owned());
    }
    let layout = model.layout().map_err(|error| error.to_string())?;
    let mut trained = vec![0.0; layout.trained_len()];
    model.read_trained(&mut trained);
    let mut state = vec![0.0; layout.state_len()];
    model.read_state(&mut state);
    let frozen = model.read_frozen();

    let mut trained: &[u8] = bytemuck::cast_slice(&trained);
    let mut state: &[u8] = bytemuck::cast_slice(&state);
    let mut frozen: &[u8] = &frozen;
    // What lies behind a tensor of unknown size cannot be found either, except what does not lie in `frozen`.
    let mut lost = false;
    let mut left_out: Vec<&str> = Vec::new();
    let mut tensors = Vec::new();
    for spec in layout.tensors() {
        let rest = match spec.class {
            Class::Trained => &mut trained,
            Class::State => &mut state,
            Class::Frozen => &mut frozen,
        };
        let Some(dtype) = dtype(&spec.dtype).filter(|_| !(lost && spec.class == Class::Frozen)) else {
            lost |= !skip(spec, rest);
            left_out.push(&spec.path);
            continue;
        };
        let length = spec.len() * (dtype.bitsize() / 8);
        let bytes;
        (bytes, *rest) = rest.split_at_checked(length).ok_or_else(|| format!("{spec} is not whole"))?;
        let view = TensorView::new(dtype, spec.shape.clone(), bytes).map_err(|error| error.to_string())?;
        tensors.push((spec.path.as_str(), view));
    }
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two tensors are called `{}`", pair[0]));
    }
    let mut metadata: HashMap<String, String> = [("format", "fairing"), ("fairing", env!("CARGO_PKG_VERSION"))]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    if !left_out.is_empty() {
        metadata.insert("left_out".to_owned(), left_out.join(", "));
    }
    safetensors::serialize(tensors, Some(metadata)).map_err(|error| error.to_string())
}

/// burn's name of an element type as the format's.
fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "f64" => Dtype::F64,
        "f32" | "flex32" => Dtype::F32,
        "f16" => Dtype::F16,
        "bf16" => Dtype::BF16,
        "i64" => Dtype::I64,
        "i32" => Dtype::I32,
        "i16" => Dtype::I16,
        "i8" => Dtype::I8,
        "u64" => Dtype::U64,
        "u32" => Dtype::U32,
        "u16" => Dtype::U16,
        "u8" => Dtype::U8,
        "bool" | "bool(u8)" => Dtype::BOOL,
        _ => return None,
    })
}

/// Steps over a tensor of a type that the format does not have; whether its size was known.
fn skip(spec: &TensorSpec, rest: &mut &[u8]) -> bool {
    let size = if spec.dtype == "bool(u32)" { Some(4) } else { None };
    let after = size.and_then(|size| rest.get(spec.len() * size..));
    *rest = after.unwrap_or_default();
    after.is_some()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;
    use crate::runtime::layout::{Layout, LayoutError};

    /// Tensors with known numbers.
    #[derive(Clone)]
    struct Known {
        tensors: Vec<TensorSpec>,
        trained: Vec<f32>,
        state: Vec<f32>,
        frozen: Vec<u8>,
    }

    impl Model for Known {
        type Gradients = ();
        const EXTENSION: &'static str = "known";

        fn layout(&self) -> Result<Layout, LayoutError> {
            Layout::new(self.tensors.clone())
        }

        fn read_trained(&self, out: &mut [f32]) {
            out.copy_from_slice(&self.trained);
        }

        fn write_trained(self, _values: &[f32]) -> Self {
            unreachable!("only read")
        }

        fn read_frozen(&self) -> Vec<u8> {
            self.frozen.clone()
        }

        fn write_frozen(self, _bytes: &[u8]) -> Self {
            unreachable!("only read")
        }

        fn read_state(&self, out: &mut [f32]) {
            out.copy_from_slice(&self.state);
        }

        fn write_state(self, _values: &[f32]) -> Self {
            unreachable!("only read")
        }

        fn read_gradients(&self, (): (), _out: &mut [f32], _present: &mut [bool]) {
            unreachable!("only read")
        }

        fn to_bytes(&self) -> Result<Vec<u8>, String> {
            unreachable!("only read")
        }

        fn load(self, _path: &Path) -> Result<Self, String> {
            unreachable!("only read")
        }

        fn seed(_seed: u64) {}
    }

    fn known(tensors: &[(&str, &[usize], &str, Class)], frozen: &[u8]) -> Known {
        let spec = |(path, shape, dtype, class): &(&str, &[usize], &str, Class)| TensorSpec {
            path: (*path).into(),
            shape: (*shape).into(),
            dtype: (*dtype).into(),
            class: *class,
        };
        let tensors: Vec<_> = tensors.iter().map(spec).collect();
        let numbers = |class| {
            let len: usize = tensors.iter().filter(|tensor| tensor.class == class).map(TensorSpec::len).sum();
            (0..len).map(|i| i as f32 + 0.5).collect()
        };
        Known { trained: numbers(Class::Trained), state: numbers(Class::State), tensors, frozen: frozen.into() }
    }

    fn metadata(bytes: &[u8]) -> HashMap<String, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
        header.metadata().clone().unwrap()
    }

    #[test]
    fn every_class_is_read_back() {
        let model = known(
            &[
                ("fc.weight", &[2, 3], "f32", Class::Trained),
                ("table", &[2], "i32", Class::Frozen),
                ("norm.mean", &[2], "f32", Class::State),
                ("fc.scale", &[], "f32", Class::Trained),
                ("mask", &[3], "bool", Class::Frozen),
                ("half", &[1], "bf16", Class::Frozen),
            ],
            &[1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 1, 0x80, 0x3f],
        );
        let bytes = to_bytes(&model).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let found = |name: &str| {
            let tensor = file.tensor(name).unwrap();
            (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())
        };
        let floats = |numbers: &[f32]| bytemuck::cast_slice(numbers).to_vec();
        assert_eq!(found("fc.weight"), (Dtype::F32, vec![2, 3], floats(&[0.5, 1.5, 2.5, 3.5, 4.5, 5.5])));
        assert_eq!(found("fc.scale"), (Dtype::F32, vec![], floats(&[6.5])));
        assert_eq!(found("norm.mean"), (Dtype::F32, vec![2], floats(&[0.5, 1.5])));
        assert_eq!(found("table"), (Dtype::I32, vec![2], vec![1, 0, 0, 0, 2, 0, 0, 0]));
        assert_eq!(found("mask"), (Dtype::BOOL, vec![3], vec![1, 0, 1]));
        assert_eq!(found("half"), (Dtype::BF16, vec![1], vec![0x80, 0x3f]));
        assert_eq!(file.len(), 6);
        let metadata = metadata(&bytes);
        assert_eq!(metadata["fairing"], env!("CARGO_PKG_VERSION"));
        assert!(!metadata.contains_key("left_out"), "{metadata:?}");
    }

    #[test]
    fn what_the_format_lacks_is_left_out_by_name() {
        let model = known(
            &[
                ("wide", &[1], "bool(u32)", Class::Frozen),
                ("before", &[1], "u8", Class::Frozen),
                ("packed", &[4], "qfloat", Class::Frozen),
                ("behind", &[1], "u8", Class::Frozen),
                ("fc", &[1], "f32", Class::Trained),
            ],
            &[1, 0, 0, 0, 7, 9, 9, 8],
        );
        let bytes = to_bytes(&model).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut names = file.names();
        names.sort_unstable();
        assert_eq!(names, ["before", "fc"]);
        assert_eq!(file.tensor("before").unwrap().data(), [7]);
        assert_eq!(metadata(&bytes)["left_out"], "wide, packed, behind");
    }

    #[test]
    fn a_broken_model_is_an_error() {
        let one: &[usize] = &[1];
        let twice = [("a", one, "f32", Class::Trained); 2];
        assert_eq!(to_bytes(&known(&twice, &[])).unwrap_err(), "two tensors are called `a`");
        let short = [("a", one, "f32", Class::Trained), ("b", &[2], "i64", Class::Frozen)];
        assert_eq!(to_bytes(&known(&short, &[1])).unwrap_err(), "`b` [2] i64 frozen is not whole");
    }
}
