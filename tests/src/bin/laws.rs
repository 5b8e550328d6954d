//! The program that the tests of laws, bad input, terminal and outcome start.
//!
//! ```text
//! laws law LAW [WORKERS PS SEED]   trains the `Law` given as JSON and prints a `Report` as JSON
//! laws bad MISTAKE                 launches a training with one mistake in it
//! laws images                      loads Fashion-MNIST from the data folder, as the demo does
//! laws absent                      has a data folder in its attribute that does not exist
//! ```

use std::io::Write as _;

use anyhow::Context as _;
use burn::module::{ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::DType;
use fairing_core::prelude::*;
use fairing_examples::fashion_mnist;
use fairing_tests::law::{Kind, Law};
use fairing_tests::plain;
use fairing_tests::report::Report;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["law", law] => law_and_report(law, LaunchOptions::new().workers(2)),
        ["law", law, workers, ps, seed] => {
            let options = LaunchOptions::new().workers(workers.parse()?).ps(ps.parse()?).seed(seed.parse()?);
            law_and_report(law, options)
        }
        ["bad", mistake] => {
            let mistake = serde_json::from_value(mistake.to_string().into()).context("no such mistake")?;
            Bad { mistake, learning_rate: f64::NAN }.launch()?;
            Ok(())
        }
        ["images"] => {
            Images {}.launch()?;
            Ok(())
        }
        ["absent"] => {
            Absent {}.launch()?;
            Ok(())
        }
        _ => anyhow::bail!("unknown arguments {arguments:?}"),
    }
}

fn law_and_report(law: &str, options: LaunchOptions) -> anyhow::Result<()> {
    let law: Law = serde_json::from_str(law)?;
    let outcome = law.launch_with(options)?;
    let loaded = outcome.load(law.kind.model(u64::MAX, &Device::flex().autodiff()))?;
    let other_kind = if law.kind == Kind::Odd { Kind::Cnn } else { Kind::Odd };
    let refused = outcome.load(other_kind.model(0, &Device::flex().autodiff())).err();
    let report = Report {
        folder: outcome.folder().to_owned(),
        model: outcome.model().to_owned(),
        loaded: plain::flat(&loaded).into_iter().map(f32::to_bits).collect(),
        loss: outcome.metric("loss")?,
        unknown_metric: outcome.metric("los").expect_err("nothing is called so").to_string(),
        other_model: refused.context("another model was loaded")?.to_string(),
    };
    // A reader that has gone is no failure of the run's.
    let _ = writeln!(std::io::stdout(), "{}", serde_json::to_string(&report)?);
    Ok(())
}

/// A training in which one thing is wrong.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Bad {
    mistake: Mistake,
    /// NaN, which no JSON number is: the summary must survive it.
    learning_rate: f64,
}

#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mistake {
    MoreWorkersThanExamples,
    NoTensor,
    NothingToTrain,
    HalfPrecision,
    DoublePrecision,
    NoAutodiff,
    LearningRateNan,
    LearningRateDiffers,
    EmptyBatch,
    StepBeforeJoin,
    JoinTwice,
    ModelDiffers,
    OptimizerDiffers,
    OptimizerImpossible,
    /// None: NaN is among the hyperparameters, and nobody uses it.
    None,
}

impl Train for Bad {
    type Model = Vec<Linear>;

    fn train(&self, worker: &Worker) -> anyhow::Result<Vec<Linear>> {
        let layer = |outputs| LinearConfig::new(2, outputs).init(worker.device());
        let first = worker.rank() == 0;
        let model = match self.mistake {
            Mistake::NoTensor => Vec::new(),
            Mistake::NothingToTrain => vec![layer(1).no_grad()],
            Mistake::HalfPrecision => vec![layer(1).map(&mut Cast(DType::F16))],
            Mistake::DoublePrecision => vec![layer(1).map(&mut Cast(DType::F64))],
            Mistake::NoAutodiff => vec![LinearConfig::new(2, 1).init(&Device::flex())],
            Mistake::ModelDiffers => vec![layer(if first { 1 } else { 2 })],
            _ => vec![layer(1)],
        };
        let optimizer = match self.mistake {
            Mistake::OptimizerDiffers if !first => Sgd::new().momentum(0.5),
            Mistake::OptimizerImpossible => Sgd::new().weight_decay(f32::NAN),
            _ => Sgd::new(),
        };
        let learning_rate = match self.mistake {
            Mistake::LearningRateNan => self.learning_rate,
            Mistake::LearningRateDiffers if !first => 0.25,
            _ => 0.5,
        };
        let batch_size = if self.mistake == Mistake::EmptyBatch { 0 } else { 2 };
        let examples = if self.mistake == Mistake::MoreWorkersThanExamples { 1 } else { 8 };

        let mut model = match self.mistake {
            Mistake::StepBeforeJoin => model,
            _ => worker.join(model, optimizer)?,
        };
        if self.mistake == Mistake::JoinTwice {
            model = worker.join(model, optimizer)?;
        }
        for epoch in worker.epochs(1) {
            for batch in epoch.batches(&vec![1.0_f32; examples], batch_size) {
                let inputs = Tensor::<2>::ones([batch.iter().count(), 2], worker.device());
                let gradient = Gradient::mean(model[0].forward(inputs).mean().backward(), batch.len());
                model = worker.step(model, gradient, learning_rate)?;
            }
        }
        worker.metric("not a number", f64::NAN);
        Ok(model)
    }
}

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|tensor| tensor.detach().cast(self.0).detach().require_grad())
    }
}

/// The demo's way to its data.
#[distributed_training(workers = 2, ps = 1, data = "../fairing-examples/data/fashion-mnist")]
#[derive(Serialize, Deserialize)]
struct Images {}

impl Train for Images {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let data = fashion_mnist::load(worker.data_dir(), worker.device())?;
        anyhow::bail!("{} images were loaded", data.train.labels().len())
    }
}

#[distributed_training(workers = 2, ps = 1, data = "no-such-folder")]
#[derive(Serialize, Deserialize)]
struct Absent {}

impl Train for Absent {
    type Model = Linear;

    fn train(&self, _worker: &Worker) -> anyhow::Result<Linear> {
        anyhow::bail!("never reached")
    }
}
