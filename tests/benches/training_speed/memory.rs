//! Peak resident memory. The group `memory`.

use std::collections::BTreeMap;

use fairing_core::DistributedTraining;

use crate::exchange::Exchange;
use crate::floor::{self, Floor};
use crate::processes::Peaks;
use crate::table::{Table, fact, goal};
use crate::training::{CnnTraining, Load};
use crate::{LARGE, options};

pub(crate) fn memory(repetitions: usize) -> anyhow::Result<Table> {
    let mut table = Table::new("peak resident memory");
    for _ in 0..repetitions {
        let idle = floor::measure(Floor::Idle, 1)?[0].peak_mib;
        let alone = floor::measure(Floor::TrainCnn, 1)?[0].peak_mib;
        table.record(fact("this program, idle, MiB", 1), idle);
        table.record(fact("burn alone trains the small CNN with 2,048 images, MiB", 1), alone);

        for (ps, worker, server) in [
            (1, goal("small CNN, worker, MiB", 1, "150 / 100"), Some(goal("small CNN, server, MiB", 1, "20 / 10"))),
            (0, goal("small CNN, ps = 0, worker, MiB", 1, "150 / 100"), None),
        ] {
            match peaks(&CnnTraining(Load::LITTLE_DATA), 2, ps) {
                Err(error) => table.fail(worker, &error),
                Ok(peaks) => {
                    table.record(worker, peak(&peaks, "worker"));
                    if let Some(server) = server {
                        table.record(server, peak(&peaks, "ps"));
                    }
                }
            }
        }

        let server = goal("20 M parameters, Adam, 8 workers: server : parameters", 2, "4.2 / 3.5");
        match peaks(&Exchange { len: LARGE, warm_up: 1, steps: 4, adam: true }, 8, 1) {
            Err(error) => table.fail(server, &error),
            Ok(peaks) => {
                let parameters_mib = (LARGE * size_of::<f32>()) as f64 / f64::from(1 << 20);
                table.record(server, peak(&peaks, "ps") / parameters_mib);
                let worker = fact("20 M parameters, 8 workers: worker : parameters", 2);
                table.record(worker, peak(&peaks, "worker") / parameters_mib);
            }
        }
    }
    Ok(table)
}

fn peaks(job: &impl DistributedTraining, workers: u32, ps: u32) -> anyhow::Result<BTreeMap<String, f64>> {
    let runs = tempfile::tempdir()?;
    let peaks = Peaks::watch();
    let launched = job.launch_with(options(workers, ps, &runs));
    let peaks = peaks.end();
    launched?;
    Ok(peaks)
}

/// The largest peak of a role.
fn peak(peaks: &BTreeMap<String, f64>, role: &str) -> f64 {
    peaks.iter().filter(|(name, _)| name.starts_with(role)).map(|(_, peak)| *peak).fold(0.0, f64::max)
}
