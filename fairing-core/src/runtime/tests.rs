//! The runtime's laws with a model that needs no framework, over every transport.

mod faults;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::layout::{Class, Layout, LayoutError, TensorSpec};
use super::model::{Gradient, Model};
use super::optimizer::{Adam, Optimizer, Sgd};
use super::replica::{Context, serve, work};
use super::status::RunStatus;
use super::worker::Worker;
use crate::protocol::connection::{Connection, at_most};
use crate::protocol::deadline::{HEARTBEAT, HELLO, LEASE};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::Kind;
use crate::protocol::message::{
    FromCoordinator, Hello, Incarnation, Numbered, Position, Purpose, Speaker, ToCoordinator,
};
use crate::protocol::tcp::testing::{Meeting, loopback};
use crate::protocol::transport::{Memory, Transport, Unix};
use crate::topology::{Address, JOIN, KEEP_RESULT, Member, Mode, Placement, Replica, Role, Topology};

/// Some trained tensors, one frozen and one state tensor.
#[derive(Debug, Clone, PartialEq)]
struct Flat {
    trained: Vec<Vec<f32>>,
    frozen: Vec<u8>,
    state: Vec<f32>,
}

impl Model for Flat {
    /// Per trained tensor its gradient, or none.
    type Gradients = Vec<Option<Vec<f32>>>;

    const EXTENSION: &'static str = "flat";

    fn layout(&self) -> Result<Layout, LayoutError> {
        let tensor = |path: String, len, class| TensorSpec { path, shape: vec![len], dtype: "f32".into(), class };
        let trained = self.trained.iter().enumerate();
        let mut tensors: Vec<_> = trained.map(|(i, t)| tensor(format!("t{i}"), t.len(), Class::Trained)).collect();
        tensors.push(tensor("frozen".into(), self.frozen.len(), Class::Frozen));
        tensors.push(tensor("state".into(), self.state.len(), Class::State));
        Layout::new(tensors)
    }

    fn read_trained(&self, out: &mut [f32]) {
        out.copy_from_slice(&self.trained.concat());
    }

    fn write_trained(mut self, mut values: &[f32]) -> Self {
        for tensor in &mut self.trained {
            let (head, tail) = values.split_at(tensor.len());
            tensor.copy_from_slice(head);
            values = tail;
        }
        self
    }

    fn read_frozen(&self) -> Vec<u8> {
        self.frozen.clone()
    }

    fn write_frozen(self, bytes: &[u8]) -> Self {
        Self { frozen: bytes.to_vec(), ..self }
    }

    fn read_state(&self, out: &mut [f32]) {
        out.copy_from_slice(&self.state);
    }

    fn write_state(self, values: &[f32]) -> Self {
        Self { state: values.to_vec(), ..self }
    }

    fn read_gradients(&self, gradients: Self::Gradients, out: &mut [f32], present: &mut [bool]) {
        let mut start = 0;
        for ((gradient, tensor), present) in gradients.iter().zip(&self.trained).zip(present) {
            let out = &mut out[start..start + tensor.len()];
            *present = gradient.is_some();
            match gradient {
                Some(gradient) => out.copy_from_slice(gradient),
                None => out.fill(0.0),
            }
            start += tensor.len();
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        Ok(bytemuck::cast_slice(&self.trained.concat()).to_vec())
    }

    fn load(self, _: &Path) -> Result<Self, String> {
        Err("a test model has no file".into())
    }

    fn seed(_: u64) {}
}

impl Flat {
    fn new(sizes: &[usize], start: f32) -> Self {
        let trained = sizes.iter().map(|size| (0..*size).map(|i| start + (i % 17) as f32 * 0.01).collect()).collect();
        Self { trained, frozen: vec![start as u8; 3], state: vec![start; 2] }
    }

    /// The gradient of the mean of `(parameter - example)^2 / 2` over `examples`; tensor 1 only learns from even ones.
    fn gradient(&self, examples: &[f32]) -> Vec<Option<Vec<f32>>> {
        let mean = examples.iter().sum::<f32>() / examples.len() as f32;
        let gradient = |tensor: &Vec<f32>| Some(tensor.iter().map(|value| value - mean).collect());
        let mut gradients: Vec<_> = self.trained.iter().map(gradient).collect();
        if gradients.len() > 1 && examples[0] as i64 % 2 != 0 {
            gradients[1] = None;
        }
        gradients
    }
}

/// Ends of all workers and of all servers.
struct Ends {
    workers: Vec<Result<Flat, Failure>>,
    servers: Vec<Result<(), Failure>>,
    caller: Vec<FromCoordinator>,
}

type TrainFn<'a> = &'a (dyn Fn(&Worker) -> anyhow::Result<Flat> + Sync);

fn run_over(transport: &Arc<dyn Transport>, servers: &[Address], topology: Topology, train: TrainFn<'_>) -> Ends {
    run_watched(transport, servers, topology, train, &|_, _| {}, Position::default())
}

/// Runs a whole topology in threads; `watch` sees what the caller hears and may speak.
fn run_watched(
    transport: &Arc<dyn Transport>,
    servers: &[Address],
    topology: Topology,
    train: TrainFn<'_>,
    watch: &(dyn Fn(&FromCoordinator, &mut Connection) + Sync),
    start: Position,
) -> Ends {
    run_in_mode(transport, servers, topology, Mode::Sync, train, watch, start)
}

fn run_in_mode(
    transport: &Arc<dyn Transport>,
    servers: &[Address],
    topology: Topology,
    mode: Mode,
    train: TrainFn<'_>,
    watch: &(dyn Fn(&FromCoordinator, &mut Connection) + Sync),
    start: Position,
) -> Ends {
    let transports = |_| transport.clone();
    run_as(&transports, servers, topology, mode, train, watch, start)
}

/// As [`run_in_mode`], where each member has a transport of its own.
fn run_as(
    transports: &(dyn Fn(Member) -> Arc<dyn Transport> + Sync),
    servers: &[Address],
    topology: Topology,
    mode: Mode,
    train: TrainFn<'_>,
    watch: &(dyn Fn(&FromCoordinator, &mut Connection) + Sync),
    start: Position,
) -> Ends {
    run_met(transports, servers, topology, mode, train, watch, start, &|_| {})
}

/// As [`run_as`]; `meet` is called with what each replica has before it starts.
#[expect(clippy::too_many_arguments, reason = "everything that a run is made of, for tests only")]
fn run_met(
    transports: &(dyn Fn(Member) -> Arc<dyn Transport> + Sync),
    servers: &[Address],
    topology: Topology,
    mode: Mode,
    train: TrainFn<'_>,
    watch: &(dyn Fn(&FromCoordinator, &mut Connection) + Sync),
    start: Position,
    meet: &dyn Fn(&Context),
) -> Ends {
    let context = |replica| Context {
        placement: Placement {
            run: "test".into(),
            replica,
            topology,
            seed: 3,
            threads: 1,
            servers: servers.to_vec(),
            data_dir: None,
            mode,
            rejoin: Duration::ZERO,
            join: JOIN,
            keep_result: KEEP_RESULT,
            first_stays: false,
        },
        transport: transports(Member::Replica(replica)),
        status: Arc::new(RunStatus::default()),
        start,
    };
    std::thread::scope(|scope| {
        let mut serving = Vec::new();
        let mut working = Vec::new();
        for replica in topology.replicas() {
            let context = context(replica);
            meet(&context);
            match replica.role {
                Role::Ps => serving.push(scope.spawn(move || serve(&context))),
                Role::Worker => working.push(scope.spawn(move || work(&context, train))),
            }
        }
        let caller = scope.spawn(|| {
            let deadline = std::time::Instant::now() + HELLO;
            let transport = transports(Member::Caller);
            let stream =
                crate::protocol::transport::connect_patiently(transport.as_ref(), &servers[0], deadline, &|| Ok(()));
            let mut connection = Connection::new(stream.unwrap());
            let hello = Hello {
                run: "test".into(),
                speaker: Speaker::Caller,
                incarnation: Incarnation::fresh(),
                purpose: Purpose::Follow { heard: 0 },
            };
            connection.send(&hello).unwrap();
            let mut heard = Vec::new();
            while let Ok(message) = connection.receive::<FromCoordinator>(&at_most(HELLO)) {
                let message = message.untold();
                watch(&message, &mut connection);
                heard.push(message);
                match heard.last() {
                    Some(FromCoordinator::Complete { .. }) => {
                        for kind in [Kind::Model, Kind::Tensors] {
                            connection.receive_frame(kind, &at_most(HELLO)).unwrap();
                        }
                        connection.send(&Numbered::from(ToCoordinator::Acknowledged)).unwrap();
                        break;
                    }
                    Some(FromCoordinator::RunFailed(_)) => {
                        connection.send(&Numbered::from(ToCoordinator::Acknowledged)).unwrap();
                        break;
                    }
                    _ => {}
                }
            }
            heard
        });
        Ends {
            workers: working.into_iter().map(|worker| worker.join().unwrap()).collect(),
            servers: serving.into_iter().map(|server| server.join().unwrap()).collect(),
            caller: caller.join().unwrap(),
        }
    })
}

fn in_memory(topology: Topology, train: TrainFn<'_>) -> Ends {
    let servers: Vec<_> = topology.servers().map(|server| Address::Memory(server.file_name())).collect();
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    run_over(&transport, &servers, topology, train)
}

fn in_memory_async(topology: Topology, mode: Mode, train: TrainFn<'_>) -> Ends {
    let servers: Vec<_> = topology.servers().map(|server| Address::Memory(server.file_name())).collect();
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    run_in_mode(&transport, &servers, topology, mode, train, &|_, _| {}, Position::default())
}

fn over_sockets(topology: Topology, train: TrainFn<'_>) -> Ends {
    let folder = tempfile::tempdir().unwrap();
    let servers: Vec<_> =
        topology.servers().map(|server| Address::Unix(folder.path().join(server.file_name()))).collect();
    let transport: Arc<dyn Transport> = Arc::new(Unix);
    run_over(&transport, &servers, topology, train)
}

/// Over TCP with TLS, each member with its own certificate.
fn over_tls(topology: Topology, train: TrainFn<'_>) -> Ends {
    let run = Meeting::new("test");
    let servers: Vec<_> = topology.servers().map(loopback).collect();
    let transports = |member| Arc::new(run.transport(member)) as Arc<dyn Transport>;
    run_as(&transports, &servers, topology, Mode::Sync, train, &|_, _| {}, Position::default())
}

impl Ends {
    /// The model that all workers agree on.
    fn model(self) -> Flat {
        for server in self.servers {
            server.unwrap();
        }
        let models: Vec<Flat> = self.workers.into_iter().map(Result::unwrap).collect();
        assert!(models.iter().all(|model| model == &models[0]), "workers end with different models");
        models.into_iter().next().unwrap()
    }

    /// The failure that the caller is told; it has ended every replica.
    fn failure(self) -> Failure {
        let told = self.caller.into_iter().find_map(|message| match message {
            FromCoordinator::RunFailed(failure) => Some(failure),
            _ => None,
        });
        let failure = told.expect("the caller is told");
        // A replica may have met the failure by another way and put it into other words.
        assert!(self.workers.iter().all(Result::is_err));
        assert!(self.servers.iter().all(Result::is_err));
        failure
    }
}

/// Larger than a chunk, so that chunks of several tensors and servers meet.
const SIZES: [usize; 4] = [70_001, 3, 130_000, 1];

fn train_epochs(optimizer: impl Into<Optimizer> + Clone + Sync) -> impl Fn(&Worker) -> anyhow::Result<Flat> + Sync {
    move |worker| {
        let data: Vec<f32> = (0..23).map(|i| i as f32).collect();
        let mut model = worker.join(Flat::new(&SIZES, worker.rank() as f32), optimizer.clone())?;
        for epoch in worker.epochs(2) {
            for batch in epoch.batches(&data, 12 / worker.workers()) {
                let gradient = model.gradient(&batch);
                worker.metric("loss", f64::from(batch[0]));
                model = worker.step(model, Gradient::mean(gradient, batch.len()), 0.1)?;
            }
        }
        Ok(model)
    }
}

/// The same by hand: no worker, no server. Every tensor that some rank's part has a gradient for is updated.
fn by_hand(workers: usize) -> Flat {
    let mut model = Flat::new(&SIZES, 0.0);
    let data: Vec<f32> = (0..23).map(|i| i as f32).collect();
    for epoch in 0..2 {
        let order = super::data::permutation(3, epoch, data.len());
        for batch in order.chunks(12) {
            let parts = (0..workers).map(|rank| super::shard::split(batch.len(), rank, workers));
            let mut mean: Vec<Option<Vec<f32>>> = vec![None; SIZES.len()];
            for part in parts.filter(|part| !part.is_empty()) {
                let examples: Vec<f32> = batch[part.clone()].iter().map(|index| data[*index]).collect();
                let weight = (part.len() as f64 / batch.len() as f64) as f32;
                for (mean, gradient) in mean.iter_mut().zip(model.gradient(&examples)) {
                    let Some(gradient) = gradient else { continue };
                    let mean = mean.get_or_insert_with(|| vec![0.0; gradient.len()]);
                    mean.iter_mut().zip(gradient).for_each(|(mean, value)| *mean += weight * value);
                }
            }
            for (tensor, mean) in model.trained.iter_mut().zip(mean) {
                let Some(mean) = mean else { continue };
                tensor.iter_mut().zip(mean).for_each(|(value, mean)| *value -= 0.1 * mean);
            }
        }
    }
    model
}

#[test]
fn sync_training_is_the_rank_order_mean_to_the_bit() {
    for workers in 1..=4 {
        let trained = in_memory(Topology::new(workers, 1), &train_epochs(Sgd::new())).model();
        let expected = by_hand(workers as usize);
        assert!(trained.trained == expected.trained, "{workers} workers");
        // Everyone has rank 0's frozen parameters.
        assert_eq!(trained.frozen, [0; 3]);
    }
}

#[test]
fn the_answer_does_not_depend_on_servers_or_transport() {
    let one = in_memory(Topology::new(3, 1), &train_epochs(Adam::new())).model();
    for ps in [0, 2, 3, 5] {
        assert!(in_memory(Topology::new(3, ps), &train_epochs(Adam::new())).model() == one, "{ps} servers");
    }
    for ps in [0, 2] {
        assert!(over_sockets(Topology::new(3, ps), &train_epochs(Adam::new())).model() == one, "{ps} over sockets");
        assert!(over_tls(Topology::new(3, ps), &train_epochs(Adam::new())).model() == one, "{ps} over TLS");
    }
}

#[test]
fn accumulated_gradients_are_one_large_batch() {
    let train = |pieces: &'static [usize]| {
        move |worker: &Worker| {
            let mut model = worker.join(Flat::new(&[5, 3], 0.0), Sgd::new())?;
            for step in 0..3 {
                let examples: Vec<f32> = (0..8).map(|i| (2 * i + step) as f32 * 0.5).collect();
                let mut rest = &examples[..];
                for (at, len) in pieces.iter().enumerate() {
                    let (piece, behind) = rest.split_at(*len);
                    rest = behind;
                    let mean = piece.iter().sum::<f32>() / piece.len() as f32;
                    let of = |tensor: &Vec<f32>| Some(tensor.iter().map(|value| value - mean).collect());
                    let gradient = Gradient::mean(model.trained.iter().map(of).collect(), piece.len());
                    if at + 1 < pieces.len() {
                        worker.accumulate(&model, gradient)?;
                    } else {
                        model = worker.step(model, gradient, 0.25)?;
                    }
                }
            }
            Ok(model)
        }
    };
    let whole = in_memory(Topology::new(2, 1), &train(&[8])).model();
    for pieces in [&[4, 4][..], &[2, 4, 2], &[1; 8]] {
        let parts = in_memory(Topology::new(2, 1), &train(pieces)).model();
        for (one, other) in whole.trained.concat().iter().zip(parts.trained.concat()) {
            assert!((one - other).abs() < 1e-5, "{one} against {other}");
        }
    }
}

#[test]
fn clipping_by_norm_does_not_depend_on_servers_or_mode() {
    let optimizers: [Optimizer; 2] =
        [Adam::new().clip_global_norm(0.5).into(), Sgd::new().clip_norm_per_tensor(0.5).into()];
    for optimizer in optimizers {
        let train = train_without_state(optimizer);
        let one = in_memory(Topology::new(3, 1), &train).model();
        let unclipped = in_memory(Topology::new(3, 1), &train_without_state(Adam::new())).model();
        assert!(one.trained != unclipped.trained);
        for ps in [0, 2, 3] {
            assert!(in_memory(Topology::new(3, ps), &train).model() == one, "{ps} servers, {optimizer:?}");
        }
        let alone = in_memory(Topology::new(1, 2), &train).model();
        let asynchronous = in_memory_async(Topology::new(1, 2), Mode::Async, &train).model();
        assert!(alone == asynchronous, "{optimizer:?}");
    }
}

#[test]
fn more_servers_than_parameters_train_all_the_same() {
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[2], 1.0), Sgd::new())?;
        for _ in 0..3 {
            model = worker.step(model, Gradient::mean(vec![Some(vec![1.0, 2.0])], 1), 0.5)?;
        }
        Ok(model)
    };
    assert_eq!(in_memory(Topology::new(2, 5), &train).model().trained, [[-0.5, 1.01 - 3.0]]);
}

#[test]
fn k_pushes_are_exactly_k_updates() {
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[5], 0.0), Sgd::new())?;
        for _ in 0..64 {
            model = worker.step(model, Gradient::sum(vec![Some(vec![4.0; 5])], 4), 0.25)?;
        }
        Ok(model)
    };
    let model = in_memory(Topology::new(2, 1), &train).model();
    assert_eq!(model.trained[0][0], -16.0);
}

#[test]
fn a_rank_without_examples_weighs_nothing_and_its_nan_is_no_failure() {
    let train = |worker: &Worker| {
        // One example in the last batch: rank 1's part is empty.
        let data = vec![2.0f32; 5];
        let mut model = worker.join(Flat::new(&[3], 0.0), Sgd::new())?;
        for epoch in worker.epochs(1) {
            for batch in epoch.batches(&data, 2) {
                let examples = batch.len();
                let empty = examples == 0;
                assert_eq!(empty, worker.rank() == 1 && worker.round() == 1);
                let value = if empty { f32::NAN } else { -1.0 };
                worker.metric("loss", if empty { f64::NAN } else { 1.0 });
                model = worker.step(model, Gradient::mean(vec![Some(vec![value; 3])], batch.len()), 1.0)?;
            }
        }
        Ok(model)
    };
    let ends = in_memory(Topology::new(2, 1), &train);
    let losses: Vec<f64> = ends
        .caller
        .iter()
        .filter_map(|message| match message {
            FromCoordinator::Metric(metric) => Some(metric.value),
            _ => None,
        })
        .collect();
    assert_eq!(losses, [1.0, 1.0]);
    assert_eq!(ends.model().trained, [[2.0, 2.01, 2.02]]);
}

#[test]
fn state_is_averaged_by_examples_when_an_epoch_closes() {
    let train = |worker: &Worker| {
        let data = vec![1.0f32; 6];
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        for epoch in worker.epochs(2) {
            // 4 + 2 examples: rank 0 and 1 see 3 each; then the state is moved apart again.
            for batch in epoch.batches(&data, 2) {
                model.state = vec![worker.rank() as f32, 7.0];
                model = worker.step(model, Gradient::mean(vec![Some(vec![0.0])], batch.len()), 1.0)?;
            }
        }
        Ok(model)
    };
    assert_eq!(in_memory(Topology::new(2, 1), &train).model().state, [0.5, 7.0]);
}

#[test]
fn evaluation_and_sums_give_everyone_the_same_bits_for_any_number_of_workers() {
    let train = |worker: &Worker| {
        let data: Vec<f32> = (0..1000).map(|i| 1.0 / (i as f32 + 1.0)).collect();
        let mean =
            worker.evaluate(&data, |part| part.iter().map(|x| f64::from(*x)).sum::<f64>() / part.len() as f64)?;
        let sum = worker.sum(&[worker.rank() as f64, 1.0])?;
        assert_eq!(sum[1], worker.workers() as f64);
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        model.state = vec![mean as f32, (mean * 1e6).fract() as f32];
        Ok(model)
    };
    let alone = in_memory(Topology::new(1, 1), &train).model().state;
    // More than the chunks that are measured at once, too.
    for workers in 2..=6 {
        assert_eq!(in_memory(Topology::new(workers, 2), &train).model().state, alone);
    }
}

#[test]
fn a_stop_ends_all_workers_in_the_same_round_and_the_model_comes_home() {
    let stopped = AtomicBool::new(false);
    let train = |worker: &Worker| {
        let data = vec![1.0f32; 4];
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        for epoch in worker.epochs(1_000_000) {
            for batch in epoch.batches(&data, 1) {
                model = worker.step(model, Gradient::mean(vec![Some(vec![1.0])], batch.len()), 1e-3)?;
            }
        }
        assert!(worker.is_stopping());
        model.state = vec![worker.round() as f32; 2];
        Ok(model)
    };
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    let ends = run_watched(
        &transport,
        &[Address::Memory("ps".into())],
        Topology::new(3, 1),
        &train,
        &|message, caller| {
            if matches!(message, FromCoordinator::Training) && !stopped.swap(true, Ordering::SeqCst) {
                caller.send(&Numbered::from(ToCoordinator::Stop)).unwrap();
            }
        },
        Position::default(),
    );
    let told = ends.caller.last().cloned();
    // Equal states, and so equal round numbers, or the models would differ.
    let rounds = ends.model().state[0] as u64;
    assert_eq!(told, Some(FromCoordinator::Complete { rounds, stopped: true }));
}

#[test]
fn the_first_failure_is_the_cause_everywhere() {
    let cases: [(&str, FailureKind, TrainFn<'_>); 4] = [
        ("a wrong turn", FailureKind::User, &|_| anyhow::bail!("a wrong turn")),
        ("boom", FailureKind::Panicked, &|_| panic!("boom")),
        ("examples cannot be shared", FailureKind::Configuration, &|worker| {
            let model = worker.join(Flat::new(&[2], 0.0), Sgd::new())?;
            // The error must not be lost although `train` looks at no result.
            for epoch in worker.epochs(1) {
                assert_eq!(epoch.batches(&[1.0f32][..], 2).count(), 0);
            }
            Ok(model)
        }),
        ("is not finite", FailureKind::NotFinite, &|worker| {
            let model = worker.join(Flat::new(&[2, 2], 0.0), Sgd::new())?;
            let gradient = vec![Some(vec![0.0; 2]), Some(vec![1.0, f32::NAN])];
            Ok(worker.step(model, Gradient::mean(gradient, 1), 0.1)?)
        }),
    ];
    for (words, kind, fail) in cases {
        let train = |worker: &Worker| match worker.rank() {
            1 => fail(worker),
            _ => {
                let sizes: &[usize] = if kind == FailureKind::NotFinite { &[2, 2] } else { &[2] };
                let model = worker.join(Flat::new(sizes, 0.0), Sgd::new())?;
                let gradient = sizes.iter().map(|size| Some(vec![0.0; *size])).collect();
                Ok(worker.step(model, Gradient::mean(gradient, 1), 0.1)?)
            }
        };
        let failure = in_memory(Topology::new(2, 2), &train).failure();
        assert_eq!((failure.replica, failure.kind), (Replica::worker(1), kind), "{failure}");
        assert!(failure.to_string().contains(words), "{failure}");
    }
}

#[test]
fn replicas_that_do_not_fit_together_are_refused_by_name() {
    let join = |sizes: [usize; 2], optimizers: [Optimizer; 2]| {
        let train = move |worker: &Worker| {
            let rank = worker.rank();
            Ok(worker.join(Flat::new(&[sizes[rank]], 0.0), optimizers[rank])?)
        };
        in_memory(Topology::new(2, 2), &train).failure().to_string()
    };
    let message = join([2, 3], [Sgd::new().into(), Sgd::new().into()]);
    assert!(message.contains("differs from that of worker") && message.contains("[3] f32 trained"), "{message}");
    let message = join([2, 2], [Sgd::new().into(), Adam::new().into()]);
    assert!(message.contains("Adam"), "{message}");
    let message = join([0, 0], [Sgd::new().into(), Sgd::new().into()]);
    assert!(message.contains("no trained parameter"), "{message}");
}

#[test]
fn workers_that_disagree_about_a_step_fail_the_run() {
    let rates = |worker: &Worker| {
        let model = worker.join(Flat::new(&[2], 0.0), Sgd::new())?;
        Ok(worker.step(model, Gradient::mean(vec![Some(vec![0.0; 2])], 1), 0.1 + worker.rank() as f64)?)
    };
    let message = in_memory(Topology::new(2, 1), &rates).failure().to_string();
    assert!(message.contains("learning rate"), "{message}");
    let steps = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[2], 0.0), Sgd::new())?;
        for _ in 0..=worker.rank() {
            model = worker.step(model, Gradient::mean(vec![Some(vec![0.0; 2])], 1), 0.1)?;
        }
        Ok(model)
    };
    let message = in_memory(Topology::new(2, 1), &steps).failure().to_string();
    assert!(message.contains("worker 0") && message.contains("equally often"), "{message}");
    let models = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[2], 0.0), Sgd::new())?;
        model.trained[0][0] += worker.rank() as f32;
        Ok(model)
    };
    let message = in_memory(Topology::new(2, 1), &models).failure().to_string();
    assert!(message.contains("its model differs from worker 0's"), "{message}");
}

#[test]
fn connections_that_break_come_back_and_no_step_is_lost_or_repeated() {
    let train = |breaks: bool| {
        move |worker: &Worker| {
            let mut model = worker.join(Flat::new(&SIZES, 0.0), Adam::new())?;
            for step in 0..20 {
                if breaks && step % 3 == worker.rank() {
                    worker.break_connections();
                }
                let gradient = model.gradient(&[worker.rank() as f32, step as f32]);
                model = worker.step(model, Gradient::mean(gradient, 1), 0.1)?;
                if step % 5 == 0 {
                    assert_eq!(worker.sum(&[1.0])?, [worker.workers() as f64]);
                }
            }
            Ok(model)
        }
    };
    for topology in [Topology::new(2, 1), Topology::new(3, 2), Topology::new(3, 0)] {
        let whole = over_sockets(topology, &train(false)).model();
        assert!(over_sockets(topology, &train(true)).model() == whole, "{topology} over sockets");
        assert!(over_tls(topology, &train(true)).model() == whole, "{topology} over TLS");
        assert!(in_memory(topology, &train(true)).model() == whole, "{topology} in memory");
    }
}

#[test]
fn async_with_one_worker_is_sync_to_the_bit() {
    let sync = in_memory(Topology::new(1, 2), &train_epochs(Adam::new())).model();
    for mode in [Mode::Async, Mode::Bounded { staleness: 0 }] {
        let train = train_without_state(Adam::new());
        let alone = in_memory_async(Topology::new(1, 2), mode, &train).model();
        assert!(alone.trained == sync.trained, "{mode}");
    }
}

/// As [`train_epochs`], with a model that can be trained without rounds.
fn train_without_state(
    optimizer: impl Into<Optimizer> + Clone + Sync,
) -> impl Fn(&Worker) -> anyhow::Result<Flat> + Sync {
    move |worker| {
        let data: Vec<f32> = (0..23).map(|i| i as f32).collect();
        let start = Flat { state: vec![], ..Flat::new(&SIZES, worker.rank() as f32) };
        let mut model = worker.join(start, optimizer.clone())?;
        for epoch in worker.epochs(2) {
            for batch in epoch.batches(&data, 12 / worker.workers()) {
                let gradient = model.gradient(&batch);
                model = worker.step(model, Gradient::mean(gradient, batch.len()), 0.1)?;
            }
        }
        Ok(model)
    }
}

#[test]
fn async_pushes_are_each_applied_once() {
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat { state: vec![], ..Flat::new(&[70_000, 3], 0.0) }, Sgd::new())?;
        for step in 0..32 {
            if step % 7 == worker.rank() {
                worker.break_connections();
            }
            let gradient = vec![Some(vec![1.0; 70_000]), (step % 2 == 0).then(|| vec![1.0; 3])];
            model = worker.step(model, Gradient::mean(gradient, 1), 0.5)?;
        }
        Ok(model)
    };
    for topology in [Topology::new(1, 1), Topology::new(3, 1), Topology::new(3, 2)] {
        let ends = in_memory_async(topology, Mode::Async, &train);
        // The model that is brought home is the servers'.
        let model = ends.workers.into_iter().next().unwrap().unwrap();
        let workers = topology.worker_count() as f32;
        let (first, second) = (model.trained[0][0], model.trained[1][0]);
        assert_eq!((first, second), (-16.0 * workers, -8.0 * workers), "{topology}");
    }
}

#[test]
fn bounded_staleness_holds_the_fast_worker_back() {
    use std::sync::atomic::AtomicU64;
    for staleness in [0, 2] {
        let steps = [AtomicU64::new(0), AtomicU64::new(0)];
        let train = |worker: &Worker| {
            let mut model = worker.join(Flat { state: vec![], ..Flat::new(&[3], 0.0) }, Sgd::new())?;
            for _ in 0..30 {
                if worker.rank() == 1 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                model = worker.step(model, Gradient::mean(vec![Some(vec![1.0; 3])], 1), 0.5)?;
                let mine = steps[worker.rank()].fetch_add(1, Ordering::SeqCst) + 1;
                let other = steps[1 - worker.rank()].load(Ordering::SeqCst);
                // The other one's last step may be complete without being counted here yet.
                assert!(mine <= other + staleness + 1, "{mine} steps against {other}");
            }
            Ok(model)
        };
        let mode = Mode::Bounded { staleness: staleness as u32 };
        let ends = in_memory_async(Topology::new(2, 1), mode, &train);
        assert_eq!(ends.workers[0].as_ref().unwrap().trained[0][0], -30.0);
    }
}

/// Shards of two chunks and of one: whoever completes the smaller one still owes a chunk to the larger.
#[test]
fn a_norm_over_workers_that_host_unequal_shards_is_waited_for_by_nobody_who_owes_a_chunk() {
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[8_200], worker.rank() as f32), Sgd::new().clip_global_norm(0.5))?;
        for step in 0..20 {
            let gradient = model.gradient(&[worker.rank() as f32, step as f32]);
            model = worker.step(model, Gradient::mean(gradient, 1), 0.1)?;
        }
        Ok(model)
    };
    let with_server = in_memory(Topology::new(2, 1), &train).model();
    assert!(in_memory(Topology::new(2, 0), &train).model() == with_server);
    assert!(over_sockets(Topology::new(2, 0), &train).model() == with_server);
}

#[test]
fn a_stop_without_rounds_ends_workers_that_wait_in_different_evaluations() {
    let train = |worker: &Worker| {
        let data = vec![1.0f32; 40];
        let mut model = worker.join(Flat { state: vec![], ..Flat::new(&[1], 0.0) }, Sgd::new())?;
        for epoch in worker.epochs(1_000_000) {
            for batch in epoch.batches(&data, 1) {
                if worker.rank() == 1 {
                    std::thread::sleep(Duration::from_micros(300));
                }
                model = worker.step(model, Gradient::mean(vec![Some(vec![1.0])], batch.len()), 1e-6)?;
            }
            if epoch.index() % 2 == 1 {
                worker.evaluate(&data, |part| f64::from(part[0]))?;
            }
        }
        worker.sum(&[1.0])?;
        Ok(model)
    };
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    let steps = std::sync::atomic::AtomicUsize::new(0);
    let stop = |message: &FromCoordinator, caller: &mut Connection| {
        if matches!(message, FromCoordinator::Progress(_)) && steps.fetch_add(1, Ordering::SeqCst) == 3 {
            caller.send(&Numbered::from(ToCoordinator::Stop)).unwrap();
        }
    };
    let (servers, topology) = ([Address::Memory("ps".into())], Topology::new(2, 1));
    let ends = run_in_mode(&transport, &servers, topology, Mode::Async, &train, &stop, Position::default());
    assert!(
        matches!(ends.caller.last(), Some(FromCoordinator::Complete { stopped: true, .. })),
        "{:?}",
        ends.caller.last()
    );
    ends.workers.into_iter().for_each(|worker| drop(worker.unwrap()));
}

#[test]
fn a_collective_between_batches_needs_rounds() {
    let train = |worker: &Worker| {
        let data = vec![1.0f32; 4];
        let model = worker.join(Flat { state: vec![], ..Flat::new(&[1], 0.0) }, Sgd::new())?;
        for epoch in worker.epochs(1) {
            for _ in epoch.batches(&data, 1) {
                worker.sum(&[1.0])?;
            }
        }
        Ok(model)
    };
    let failure = in_memory_async(Topology::new(2, 1), Mode::Async, &train).failure();
    assert!(failure.to_string().contains("outside of the loop over `batches`"), "{failure}");
}

#[test]
fn a_model_with_state_cannot_be_trained_without_rounds() {
    let failure = in_memory_async(Topology::new(2, 1), Mode::Async, &train_epochs(Sgd::new())).failure();
    assert_eq!(failure.kind, FailureKind::Configuration);
    assert!(failure.to_string().contains("`state` changes without a gradient"), "{failure}");
}

#[test]
fn a_run_goes_on_at_its_position() {
    let train = |worker: &Worker| {
        let data: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        let mut seen = Vec::new();
        for epoch in worker.epochs(3) {
            for batch in epoch.batches(&data, 2) {
                seen.push((epoch.index(), batch[0]));
                model = worker.step(model, Gradient::mean(vec![Some(vec![0.0])], batch.len()), 1.0)?;
            }
        }
        let order = |epoch| super::data::permutation(3, epoch, 10);
        let rest = (2..5).map(|batch| (1, order(1)[batch * 2] as f32));
        let last = (0..5).map(|batch| (2, order(2)[batch * 2] as f32));
        assert_eq!(seen, rest.chain(last).collect::<Vec<_>>());
        assert_eq!(worker.round(), 15);
        Ok(model)
    };
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    let start = Position { epoch: 1, batch: 2, round: 7 };
    run_watched(&transport, &[Address::Memory("ps".into())], Topology::new(1, 1), &train, &|_, _| {}, start).model();
}

#[test]
fn workers_that_call_different_collectives_are_told_so() {
    let train = |worker: &Worker| {
        match worker.rank() {
            0 => worker.evaluate(&vec![1.0f32; 7], |_| 1.0).map(drop)?,
            _ => worker.sum(&[1.0]).map(drop)?,
        }
        Ok(Flat::new(&[1], 0.0))
    };
    let message = in_memory(Topology::new(2, 1), &train).failure().to_string();
    let either = ["`evaluate` on 7 examples", "`sum` of 1 numbers"];
    assert!(either.iter().any(|words| message.contains(words)) && message.contains("together"), "{message}");
}

#[test]
fn everyone_starts_with_the_state_and_frozen_parameters_of_rank_0() {
    let train = |worker: &Worker| {
        let model = worker.join(Flat::new(&[4], 1.0 + worker.rank() as f32), Sgd::new())?;
        assert_eq!((&model.state[..], &model.frozen[..]), (&[1.0, 1.0][..], &[1, 1, 1][..]));
        Ok(model)
    };
    in_memory(Topology::new(3, 2), &train).model();
}

#[test]
fn a_refused_connection_harms_nobody() {
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    let address = Address::Memory("ps".into());
    let call = |hello: &Hello| {
        let mut connection = Connection::new(transport.connect(&address).unwrap());
        connection.send(hello).unwrap();
        let answer = connection.receive::<FromCoordinator>(&at_most(HELLO)).unwrap();
        assert!(matches!(answer, FromCoordinator::Refused { .. }), "{answer:?}");
        // What a refused one says is not obeyed, and that it goes is no loss.
        let _ = connection.send(&Numbered::from(ToCoordinator::Stop));
    };
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        if worker.rank() == 0 {
            let hello = |run: &str, speaker| Hello {
                run: run.into(),
                speaker,
                incarnation: Incarnation::fresh(),
                purpose: Purpose::Control,
            };
            call(&hello("test", Speaker::Replica(Replica::worker(1))));
            call(&hello("test", Speaker::Replica(Replica::worker(9))));
            call(&hello("another", Speaker::Replica(Replica::worker(1))));
        }
        for _ in 0..20 {
            model = worker.step(model, Gradient::mean(vec![Some(vec![1.0])], 1), 0.5)?;
        }
        assert!(!worker.is_stopping());
        Ok(model)
    };
    let ends = run_over(&transport, std::slice::from_ref(&address), Topology::new(2, 1), &train);
    assert_eq!(ends.model().trained, [[-10.0]]);
}

/// Calls as the process `incarnation`, which has heard up to `heard`, and gives the connection behind the answer.
fn follow(transport: &Memory, incarnation: Incarnation, heard: u64) -> (Connection, FromCoordinator) {
    let mut connection = Connection::new(transport.connect(&Address::Memory("ps-0".into())).unwrap());
    let purpose = Purpose::Follow { heard };
    connection.send(&Hello { run: "test".into(), speaker: Speaker::Caller, incarnation, purpose }).unwrap();
    let answer = connection.receive(&at_most(HELLO)).unwrap();
    (connection, answer)
}

/// The next message that has a number, or the first one that is for no caller's history.
fn next_told(connection: &mut Connection) -> (u64, FromCoordinator) {
    loop {
        match connection.receive(&at_most(HELLO)).unwrap() {
            FromCoordinator::Told { number, message } => return (number, *message),
            FromCoordinator::Heard { .. } => {}
            other => return (0, other),
        }
    }
}

/// A run of one worker that records its rounds and ends while nobody follows it; then calls `then` with the network and the
/// server. The server's end is given.
fn run_unseen(keep_result: Duration, then: impl FnOnce(&Memory, &Context)) -> Result<(), Failure> {
    let (topology, memory) = (Topology::new(1, 1), Memory::default());
    let context = |replica| Context {
        placement: Placement {
            run: "test".into(),
            replica,
            topology,
            seed: 3,
            threads: 1,
            servers: vec![Address::Memory("ps-0".into())],
            data_dir: None,
            mode: Mode::Sync,
            rejoin: Duration::ZERO,
            join: JOIN,
            keep_result,
            first_stays: false,
        },
        transport: Arc::new(memory.clone()),
        status: Arc::new(RunStatus::default()),
        start: Position::default(),
    };
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        for round in 0..20 {
            worker.metric("round", f64::from(round));
            model = worker.step(model, Gradient::mean(vec![Some(vec![1.0])], 1), 0.5)?;
        }
        Ok(model)
    };
    std::thread::scope(|scope| {
        let keeper = context(Replica::ps(0));
        let served = keeper.clone();
        let server = scope.spawn(move || serve(&served));
        work(&context(Replica::worker(0)), train).unwrap();
        then(&memory, &keeper);
        server.join().unwrap()
    })
}

#[test]
fn callers_come_and_go_and_each_hears_all_of_it_once() {
    let served = run_unseen(JOIN, |memory, _| {
        let (first, second) = (Incarnation::fresh(), Incarnation::fresh());
        // One whose connection breaks behind every message.
        let (mut all, mut heard) = (Vec::new(), 0);
        loop {
            let (mut connection, answer) = follow(memory, first, heard);
            assert!(matches!(answer, FromCoordinator::Welcome { .. }), "{answer:?}");
            let (number, message) = next_told(&mut connection);
            if number == 0 {
                assert!(matches!(message, FromCoordinator::Complete { rounds: 20, stopped: false }), "{message:?}");
                break;
            }
            assert!(number > heard);
            heard = number;
            all.push((number, message));
        }
        let rounds = all.iter().filter_map(|(_, message)| match message {
            FromCoordinator::Metric(metric) => Some(metric.value),
            _ => None,
        });
        assert_eq!(rounds.collect::<Vec<_>>(), (0..20).map(f64::from).collect::<Vec<_>>());
        assert!(matches!(all.last(), Some((_, FromCoordinator::Workers(_)))));
        // One that stays, without thanks, and is replaced by another process.
        let (mut stays, _) = follow(memory, first, heard);
        let (mut connection, answer) = follow(memory, second, 0);
        assert!(matches!(answer, FromCoordinator::Welcome { .. }), "{answer:?}");
        let again: Vec<_> = all.iter().map(|_| next_told(&mut connection)).collect();
        assert_eq!(again, all);
        let until_replaced = std::iter::from_fn(|| match stays.read_header(&at_most(HELLO)).ok()? {
            header if header.kind == Kind::Message => Some(stays.read_message::<FromCoordinator>(header).unwrap()),
            header => {
                stays.read_exact(&mut vec![0; header.length_bytes as usize], &at_most(HELLO)).unwrap();
                Some(FromCoordinator::Heard { number: 0 })
            }
        });
        assert_eq!(until_replaced.last(), Some(FromCoordinator::Replaced));
        // It cannot take the run back.
        assert_eq!(follow(memory, first, heard).1, FromCoordinator::Replaced);
        assert!(matches!(next_told(&mut connection), (0, FromCoordinator::Complete { .. })));
        for kind in [Kind::Model, Kind::Tensors] {
            connection.receive_frame(kind, &at_most(HELLO)).unwrap();
        }
        connection.send(&Numbered::from(ToCoordinator::Acknowledged)).unwrap();
    });
    served.unwrap();
}

#[test]
fn a_server_that_is_told_to_end_does_not_go_on_keeping_a_result() {
    let started = Instant::now();
    let served = run_unseen(KEEP_RESULT, |_, keeper| keeper.status.leave(&keeper.placement));
    assert_eq!(served, Err(Failure::told_to_end(Replica::ps(0), None)), "the result is lost, and that is no success");
    assert!(started.elapsed() < LEASE, "{:?}", started.elapsed());
}

#[test]
fn a_result_that_nobody_comes_for_is_kept_for_its_time_only() {
    let keep_result = Duration::from_millis(300);
    let mut done = None;
    run_unseen(keep_result, |_, _| done = Some(Instant::now())).unwrap();
    let kept = done.unwrap().elapsed();
    assert!(kept + HEARTBEAT > keep_result && kept < LEASE, "{kept:?}");
}

/// When worker 1 is told to end.
#[derive(Debug, Clone, Copy)]
enum Told {
    Never,
    /// In the middle of this round.
    InRound(u64),
    /// At any moment, from a thread of its own as a signal comes.
    After(Duration),
}

/// A run of three workers and two servers, where worker 1 is told to end, and is started again if the coordinator holds its
/// place. Gives the model or the failure of the others, and how the first life of worker 1 ended.
fn run_with_a_leaving_worker(told: Told, rejoin: Duration) -> (Result<Flat, Failure>, Result<Flat, Failure>) {
    let (topology, memory) = (Topology::new(3, 2), Memory::default());
    let context = |replica| Context {
        placement: Placement {
            run: "test".into(),
            replica,
            topology,
            seed: 3,
            threads: 1,
            servers: topology.servers().map(|server| Address::Memory(server.file_name())).collect(),
            data_dir: None,
            mode: Mode::Sync,
            rejoin,
            join: JOIN,
            keep_result: HEARTBEAT,
            first_stays: false,
        },
        transport: Arc::new(memory.clone()),
        status: Arc::new(RunStatus::default()),
        start: Position::default(),
    };
    let examples: Vec<f32> = (0..90).map(|i| i as f32 / 10.0).collect();
    let train = |context: &Context, told: Told| {
        work(context, |worker| {
            let mut model = worker.join(Flat::new(&SIZES, 0.5), Adam::new().clip_global_norm(10.0))?;
            for epoch in worker.epochs(3) {
                for batch in epoch.batches(&examples[..], 6) {
                    if matches!(told, Told::InRound(round) if round == worker.round()) {
                        context.status.leave(&context.placement);
                    }
                    let gradient = model.gradient(&batch);
                    model = worker.step(model, Gradient::mean(gradient, batch.len()), 0.1)?;
                }
                worker.sum(&[1.0])?;
            }
            Ok(model)
        })
    };
    std::thread::scope(|scope| {
        let servers = [0, 1].map(|rank| scope.spawn(move || serve(&context(Replica::ps(rank)))));
        let train = &train;
        let others = [0, 2].map(|rank| scope.spawn(move || train(&context(Replica::worker(rank)), Told::Never)));
        let first = context(Replica::worker(1));
        if let Told::After(time) = told {
            let Context { status, placement, .. } = first.clone();
            scope.spawn(move || {
                std::thread::sleep(time);
                status.leave(&placement);
            });
        }
        let left = train(&first, told);
        if left.is_err() && !rejoin.is_zero() {
            // Nobody but the coordinator has told anyone, and it holds the place already.
            train(&context(Replica::worker(1)), Told::Never).unwrap();
        }
        let [ended, other] = others.map(|other| other.join().unwrap());
        assert!(
            ended.is_ok() == other.is_ok()
                && servers.into_iter().all(|end| end.join().unwrap().is_ok() == ended.is_ok())
        );
        (ended, left)
    })
}

#[test]
fn a_worker_that_is_told_to_end_leaves_between_rounds_and_its_next_life_ends_with_the_same_bits() {
    let whole = run_with_a_leaving_worker(Told::Never, LEASE).0.unwrap();
    // In and between the epochs of five rounds, and in the last round of all.
    for round in [0, 3, 4, 5, 14] {
        let (ended, left) = run_with_a_leaving_worker(Told::InRound(round), LEASE);
        assert!(ended.unwrap() == whole, "left in round {round}");
        let expected = Failure::told_to_end(Replica::worker(1), Some(round + 1));
        assert_eq!(left.err(), Some(expected), "the round in hand is finished");
    }
}

#[test]
fn it_does_not_matter_when_a_worker_is_told_to_end() {
    let whole = run_with_a_leaving_worker(Told::Never, LEASE).0.unwrap();
    let mut left = 0;
    for microseconds in (0..16).map(|step| step * step * 200) {
        let told = Told::After(Duration::from_micros(microseconds));
        let (ended, first) = run_with_a_leaving_worker(told, LEASE);
        assert!(ended.unwrap() == whole, "{told:?}");
        left += usize::from(first.is_err());
    }
    assert!(left > 0, "some of them come while it trains");
}

#[test]
fn without_a_place_to_come_back_to_a_worker_that_is_told_to_end_is_the_cause() {
    let started = Instant::now();
    let (ended, left) = run_with_a_leaving_worker(Told::InRound(7), Duration::ZERO);
    let failure = ended.unwrap_err();
    assert_eq!((failure.replica, failure.kind), (Replica::worker(1), FailureKind::Lost));
    assert_eq!(failure.message, "it was told to end (SIGTERM)");
    assert_eq!(left.unwrap_err().replica, Replica::worker(1));
    // Not found out by a lease that ran out; the coordinator keeps the cause for its caller for a moment.
    assert!(started.elapsed() < LEASE, "{:?}", started.elapsed());
}

#[test]
fn a_server_that_is_told_to_end_is_the_cause_and_everyone_hears_it() {
    for (topology, told) in [
        (Topology::new(2, 1), Replica::ps(0)),
        (Topology::new(2, 2), Replica::ps(1)),
        (Topology::new(2, 0), Replica::worker(0)),
        (Topology::new(2, 0), Replica::worker(1)),
    ] {
        let contexts: Mutex<BTreeMap<Replica, Context>> = Mutex::default();
        let train = |worker: &Worker| {
            let mut model = worker.join(Flat::new(&SIZES, 0.0), Sgd::new())?;
            loop {
                if worker.rank() == 0 && worker.round() == 5 {
                    let contexts = contexts.lock().unwrap();
                    let context = &contexts[&told];
                    context.status.leave(&context.placement);
                }
                let gradient = model.gradient(&[1.0]);
                model = worker.step(model, Gradient::mean(gradient, 1), 0.1)?;
            }
        };
        let servers: Vec<_> = topology.servers().map(|server| Address::Memory(server.file_name())).collect();
        let transport: Arc<dyn Transport> = Arc::new(Memory::default());
        let transports = |_| transport.clone();
        let meet = |context: &Context| {
            contexts.lock().unwrap().insert(context.placement.replica, context.clone());
        };
        let ends = run_met(&transports, &servers, topology, Mode::Sync, &train, &|_, _| {}, Position::default(), &meet);
        let failure = ends.failure();
        assert_eq!((failure.replica, failure.message.as_str()), (told, "it was told to end (SIGTERM)"), "{topology}");
    }
}

#[test]
fn a_certificate_speaks_for_its_owner_only() {
    let run = Meeting::new("test");
    let address = loopback(Replica::ps(0));
    let call = |identity: Member, speaker| {
        let mut connection = Connection::new(run.transport(identity).connect(&address).unwrap());
        let (incarnation, purpose) = (Incarnation::fresh(), Purpose::Control);
        connection.send(&Hello { run: "test".into(), speaker, incarnation, purpose }).unwrap();
        match connection.receive::<FromCoordinator>(&at_most(HELLO)) {
            Ok(FromCoordinator::Refused { reason }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let worker = |rank| Member::Replica(Replica::worker(rank));
    let train = |this: &Worker| {
        let mut model = this.join(Flat::new(&[1], 0.0), Sgd::new())?;
        if this.rank() == 0 {
            let reason = call(worker(0), Speaker::Replica(Replica::worker(1)));
            assert_eq!(reason, "a hello of worker 1 came with the certificate of worker 0");
            let reason = call(Member::Caller, Speaker::Replica(Replica::worker(1)));
            assert_eq!(reason, "a hello of worker 1 came with the certificate of the caller");
            let reason = call(worker(1), Speaker::Caller);
            assert_eq!(reason, "a hello of the caller came with the certificate of worker 1");
            // The run's own authority has named one too many.
            let reason = call(worker(9), Speaker::Replica(Replica::worker(1)));
            assert_eq!(reason, "a hello of worker 1 came with the certificate of nobody in this run");
        }
        for _ in 0..20 {
            model = this.step(model, Gradient::mean(vec![Some(vec![1.0])], 1), 0.5)?;
        }
        Ok(model)
    };
    let transports = |member| Arc::new(run.transport(member)) as Arc<dyn Transport>;
    let servers = std::slice::from_ref(&address);
    let ends = run_as(&transports, servers, Topology::new(2, 1), Mode::Sync, &train, &|_, _| {}, Position::default());
    assert_eq!(ends.model().trained, [[-10.0]]);
}

#[test]
fn strangers_at_the_port_harm_nobody() {
    use std::io::Write as _;
    let [run, other] = ["test", "test"].map(Meeting::new);
    let address = loopback(Replica::ps(0));
    let Address::Tls { port, .. } = address else { unreachable!() };
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[1], 0.0), Sgd::new())?;
        let mut strangers = Vec::new();
        if worker.rank() == 0 {
            // Silence, another protocol, half a record; they stay for the whole run.
            for words in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 2, 0, 1, 0]] {
                let mut stranger = std::net::TcpStream::connect(("127.0.0.1", port))?;
                stranger.write_all(words)?;
                strangers.push(stranger);
            }
            // Of another run, and says that it speaks for this one.
            let stranger = other.transport(Replica::worker(1).into()).connect(&address)?;
            let hello = Hello {
                run: "test".into(),
                speaker: Speaker::Replica(Replica::worker(1)),
                incarnation: Incarnation::fresh(),
                purpose: Purpose::Control,
            };
            assert!(Connection::new(stranger).send(&hello).is_err());
        }
        for _ in 0..20 {
            model = worker.step(model, Gradient::mean(vec![Some(vec![1.0])], 1), 0.5)?;
        }
        Ok(model)
    };
    let transports = |member| Arc::new(run.transport(member)) as Arc<dyn Transport>;
    let servers = std::slice::from_ref(&address);
    let ends = run_as(&transports, servers, Topology::new(2, 1), Mode::Sync, &train, &|_, _| {}, Position::default());
    assert_eq!(ends.model().trained, [[-10.0]]);
}

#[test]
fn a_model_that_is_not_finite_at_the_end_is_no_success() {
    let train = |worker: &Worker| {
        let mut model = worker.join(Flat::new(&[2], 0.0), Sgd::new())?;
        model.trained[0][1] = f32::INFINITY;
        Ok(model)
    };
    let failure = in_memory(Topology::new(1, 1), &train).failure();
    assert_eq!(failure.kind, FailureKind::NotFinite);
}
