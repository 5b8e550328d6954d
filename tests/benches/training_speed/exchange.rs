//! Push and pull of a vector, without a framework that computes anything. The group `exchange`.

use std::path::Path;
use std::time::Instant;

use fairing_core::Model;
use fairing_core::prelude::*;
use fairing_core::runtime::layout::{Class, Layout, LayoutError, TensorSpec};
use fairing_core::runtime::optimizer::Optimizer;

use crate::floor::{ms, wire};
use crate::table::{Table, fact, goal, median};
use crate::{LARGE, SMALL, options};

/// A model of one tensor that never computes: what remains is the exchange.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Floats(usize);

/// Every element of every gradient.
const GRADIENT: f32 = 1e-3;

impl Model for Floats {
    type Gradients = ();

    const EXTENSION: &'static str = "none";

    fn layout(&self) -> Result<Layout, LayoutError> {
        let spec =
            TensorSpec { path: "floats".into(), shape: vec![self.0], dtype: "f32".into(), class: Class::Trained };
        Layout::new(vec![spec])
    }

    fn read_trained(&self, out: &mut [f32]) {
        out.fill(0.0);
    }

    fn write_trained(self, _values: &[f32]) -> Self {
        self
    }

    fn read_frozen(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_frozen(self, _bytes: &[u8]) -> Self {
        self
    }

    fn read_state(&self, _out: &mut [f32]) {}

    fn write_state(self, _values: &[f32]) -> Self {
        self
    }

    fn read_gradients(&self, (): (), out: &mut [f32], present: &mut [bool]) {
        present.fill(true);
        // Once per buffer of the runtime's: filling it is no part of an exchange.
        if out.last() != Some(&GRADIENT) {
            out.fill(GRADIENT);
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }

    fn load(self, _path: &Path) -> Result<Self, String> {
        Ok(self)
    }

    fn seed(_seed: u64) {}
}

#[distributed_training(workers = 1, ps = 1)]
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Exchange {
    /// Numbers that are pushed and pulled.
    pub(crate) len: usize,
    pub(crate) warm_up: usize,
    pub(crate) steps: usize,
    /// Adam; otherwise plain gradient descent, which is as good as no mathematics.
    pub(crate) adam: bool,
}

impl Train for Exchange {
    type Model = Floats;

    fn train(&self, worker: &Worker) -> anyhow::Result<Floats> {
        let optimizer: Optimizer = if self.adam { Adam::new().into() } else { Sgd::new().into() };
        let mut model = worker.join(Floats(self.len), optimizer)?;
        let mut steps = Vec::with_capacity(self.warm_up + self.steps);
        for _ in 0..self.warm_up + self.steps {
            let start = Instant::now();
            model = worker.step(model, Gradient::mean((), 1), 1e-3)?;
            steps.push(ms(start.elapsed()));
        }
        worker.metric("exchange_ms", median(steps.split_off(self.warm_up)));
        Ok(model)
    }
}

impl Exchange {
    const SMALL: Self = Self { len: SMALL, warm_up: 1_000, steps: 20_000, adam: true };
    const LARGE: Self = Self { len: LARGE, warm_up: 3, steps: 15, adam: true };

    /// Median time of a push and pull, mean over the workers.
    fn measure(self, workers: u32, ps: u32) -> anyhow::Result<f64> {
        let runs = tempfile::tempdir()?;
        Ok(self.launch_with(options(workers, ps, &runs))?.metric("exchange_ms")?)
    }
}

pub(crate) fn exchange(repetitions: usize) -> anyhow::Result<Table> {
    let mut table = Table::new("exchange alone: push and pull, no forward or backward");
    for _ in 0..repetitions {
        small(&mut table)?;
        large(&mut table)?;
    }
    Ok(table)
}

fn small(table: &mut Table) -> anyhow::Result<()> {
    let floor = wire(SMALL * size_of::<f32>(), 20_000, 1)?;
    table.record(fact("54 KB there and back over a Unix socket, ms", 4), floor.wall_ms);
    for (workers, ps, figure) in [
        (1, 1, goal("54 KB push + pull, 1 server + 1 worker, ms", 4, "0.15 / 0.06")),
        (2, 1, fact("54 KB push + pull, 1 server + 2 workers, ms", 4)),
        (2, 0, fact("54 KB push + pull, ps = 0, 2 workers, ms", 4)),
    ] {
        match Exchange::SMALL.measure(workers, ps) {
            Ok(exchange_ms) => table.record(figure, exchange_ms),
            Err(error) => table.fail(figure, &error),
        }
    }
    Ok(())
}

fn large(table: &mut Table) -> anyhow::Result<()> {
    let bytes = LARGE * size_of::<f32>();
    let speed = |workers: u32, exchange_ms: f64| (2 * bytes) as f64 * f64::from(workers) / exchange_ms / 1e6;
    for (workers, floor, floor_speed, time, time_speed, ratio) in [
        (
            1,
            fact("80 MB there and back over a Unix socket, ms", 1),
            fact("  both directions' bytes, GB/s", 2),
            fact("80 MB push + Adam + pull, 1 server + 1 worker, ms", 1),
            fact("  both directions' bytes, 1 worker, GB/s", 2),
            goal("  1 server + 1 worker : Unix socket", 3, "0.60 / 0.85"),
        ),
        (
            2,
            fact("80 MB there and back over two Unix sockets at once, ms", 1),
            fact("  both directions' bytes of both, GB/s", 2),
            fact("80 MB push + Adam + pull, 1 server + 2 workers, ms", 1),
            fact("  both directions' bytes, 2 workers, GB/s", 2),
            goal("  1 server + 2 workers : two Unix sockets", 3, "0.60 / 0.85"),
        ),
    ] {
        let floor_ms = wire(bytes, 15, workers as usize)?.wall_ms;
        table.record(floor, floor_ms);
        table.record(floor_speed, speed(workers, floor_ms));
        match Exchange::LARGE.measure(workers, 1) {
            Err(error) => table.fail(time, &error),
            Ok(exchange_ms) => {
                table.record(time, exchange_ms);
                table.record(time_speed, speed(workers, exchange_ms));
                table.record(ratio, floor_ms / exchange_ms);
            }
        }
    }
    for (adam, figure) in [
        (false, goal("80 MB gradients, ps = 0, 2 workers, Sgd, ms", 1, "76 / 40")),
        (true, fact("80 MB gradients, ps = 0, 2 workers, Adam, ms", 1)),
    ] {
        match (Exchange { adam, ..Exchange::LARGE }).measure(2, 0) {
            Ok(exchange_ms) => table.record(figure, exchange_ms),
            Err(error) => table.fail(figure, &error),
        }
    }
    Ok(())
}
