//! A replica's way from `launch()` to its exit code: with what the launcher sent, or, in a TFJob that somebody else wrote,
//! with the value that `main` has.

use std::io::Write;
use std::sync::Arc;

use super::{Payload, RunError, find_registration};
use crate::__private::Travels;
use crate::config::{Env, LaunchOptions, ProcessEnv, Resolved};
use crate::exit::ExitCode;
use crate::lifeline;
use crate::protocol::deadline::{self, FAREWELL, LEASE};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::message::Position;
use crate::protocol::tcp::{Plaintext, Tls};
use crate::protocol::transport::{Transport, Unix};
use crate::runtime::Model;
use crate::runtime::replica::{Context, remember_panics, serve, work};
use crate::runtime::status::RunStatus;
use crate::secure::Identity;
use crate::topology::tf_config::{ANYONE, IDENTITY_FILE, IDENTITY_FOLDER, PLAINTEXT, TF_CONFIG, TfConfig};
use crate::topology::{JOIN, Member, Placement, Replica, Role};
use crate::training::DistributedTraining;

/// Takes this process's part in the run that it was started for, and ends the process.
pub(super) fn take_part() -> ! {
    lifeline::reached_launch();
    let code = match received() {
        Ok((payload, identity)) => match find(&payload.name) {
            Ok(dispatch) => dispatch(&payload.value, identity),
            Err(reason) => refuse(&reason),
        },
        Err(reason) => refuse(&reason),
    };
    end(code)
}

fn end(code: ExitCode) -> ! {
    // The buffer of standard output is the user's; `exit` runs no destructor.
    let _ = std::io::stdout().flush();
    lifeline::end_children();
    code.exit()
}

/// Whether this process has its part from `TF_CONFIG` and not from a launcher of fairing's.
pub(super) fn is_of_a_tfjob() -> bool {
    ProcessEnv.get(TF_CONFIG).is_some() && !Placement::is_in(&ProcessEnv)
}

/// Takes the part that `TF_CONFIG` gives this process, with `value`, and ends the process.
///
/// Configured is what is in the attribute and in `FAIRING_*` variables of the TFJob; how many take part is the TFJob's. Nobody
/// fetches the model: `train` saves what is to be kept.
pub(super) fn take_part_in_a_tfjob<T: DistributedTraining>(value: &T) -> ! {
    end(match part_in_a_tfjob::<T>(&ProcessEnv) {
        Ok((placement, transport)) => train(value, placement, transport),
        Err(reason) => refuse(&reason),
    })
}

fn part_in_a_tfjob<T: DistributedTraining>(env: &impl Env) -> Result<(Placement, Arc<dyn Transport>), String> {
    let text = env.get(TF_CONFIG).unwrap_or_default();
    let TfConfig { replica, topology, servers } =
        TfConfig::parse(&text).map_err(|error| super::watch::chain(&error))?;
    let options = LaunchOptions::new().workers(topology.workers.get()).ps(topology.ps);
    let (Resolved { config, .. }, _) = super::resolve::<T>(&options).map_err(|error| error.to_string())?;
    if let Some(path) = config.data_dir.as_ref().filter(|path| !path.is_dir()) {
        return Err(RunError::DataFolder { path: path.clone() }.to_string());
    }
    let transport = transport_in_a_tfjob(env, replica)?;
    let placement = Placement {
        // The same for all, and no other TFJob's.
        run: format!("TF_CONFIG of {}", servers[0]),
        replica,
        topology,
        seed: config.seed,
        // Every process has its own cores.
        threads: super::threads(super::target::cores().saturating_mul(topology.workers.get()), &config),
        servers,
        data_dir: config.data_dir,
        mode: config.mode,
        rejoin: config.rejoin,
        join: JOIN,
        // Nobody comes for it.
        keep_result: deadline::LEAST_KEEP_RESULT,
        first_stays: false,
    };
    Ok((placement, transport))
}

fn transport_in_a_tfjob(env: &impl Env, replica: Replica) -> Result<Arc<dyn Transport>, String> {
    let plaintext = env.get(PLAINTEXT);
    match (env.get(IDENTITY_FOLDER), plaintext.as_deref()) {
        (Some(folder), None) => {
            let path = lifeline::start_directory().join(folder).join(IDENTITY_FILE);
            let bytes = lifeline::read_identity(&path).map_err(|error| error.to_string())?;
            let identity = Identity::from_bytes(&bytes);
            transport(&identity.map_err(|error| format!("`{}`: {error}", path.display()))?, replica)
        }
        (None, Some(ANYONE)) => Ok(Arc::new(Plaintext)),
        (Some(_), Some(_)) => Err(format!("both `{IDENTITY_FOLDER}` and `{PLAINTEXT}` are set; unset one")),
        (None, Some(other)) => Err(format!("`{PLAINTEXT}` is `{other}`; its one value is `{ANYONE}`")),
        (None, None) => Err(format!(
            "this process has its part from `{TF_CONFIG}` and nothing to prove with that it is {replica} (mount a Secret \
             with its `{IDENTITY_FILE}` and name the folder in `{IDENTITY_FOLDER}`; `{PLAINTEXT}={ANYONE}` gives encryption \
             and identities up)"
        )),
    }
}

/// The way of the owner of `identity`, who must be this replica.
fn transport(identity: &Identity, replica: Replica) -> Result<Arc<dyn Transport>, String> {
    if identity.member() != Member::Replica(replica) {
        return Err(format!("the identity that {replica} was given is that of {}", identity.member()));
    }
    Ok(Arc::new(Tls::new(identity).map_err(|error| error.to_string())?))
}

/// Ends a process that should be a replica and cannot be one, since it would begin a run of its own.
#[cfg(feature = "image")]
pub(super) fn refuse_cut_off() -> ! {
    let code = refuse(
        "the program is not attached to its launcher, as the first process of the container that takes its standard input \
         (end the image's entry script with `exec PROGRAM \"$@\"`, and read nothing from standard input in it)",
    );
    std::process::exit(i32::from(code.code()))
}

fn refuse(reason: &str) -> ExitCode {
    lifeline::last_words(reason);
    ExitCode::Configuration
}

fn received() -> Result<(Payload, Option<Identity>), String> {
    // The launcher writes the payload before it does anything else.
    let sent = lifeline::payload(LEASE).map_err(|error| error.to_string())?;
    let payload =
        Payload::from_bytes(&sent.value).map_err(|error| format!("cannot read what the launcher sent: {error}"))?;
    let identity = (!sent.identity.is_empty()).then(|| Identity::from_bytes(&sent.identity)).transpose();
    Ok((payload, identity.map_err(|error| error.to_string())?))
}

type Dispatch = fn(&[u8], Option<Identity>) -> ExitCode;

fn find(name: &str) -> Result<Dispatch, String> {
    let known = inventory::iter::<crate::__private::Registration>().find(|registration| registration.name == name);
    let known = known.ok_or_else(|| format!("this program has no annotated type `{name}`"))?;
    find_registration(known.name).map(|registration| registration.dispatch).map_err(|error| error.to_string())
}

/// Trains `T` as the placement in the environment says.
pub(crate) fn dispatch<T: DistributedTraining>(value: &[u8], identity: Option<Identity>) -> ExitCode {
    let placement = match Placement::from_env(&ProcessEnv) {
        Ok(placement) => placement,
        Err(error) => return refuse(&error.to_string()),
    };
    if let Err(reason) = deadline::check(&placement) {
        return refuse(&format!("the placement cannot be used: {reason}"));
    }
    let value: T = match T::from_bytes(value) {
        Ok(value) => value,
        Err(error) => return refuse(&format!("cannot read the value of `{}`: {error}", T::NAME)),
    };
    let transport: Arc<dyn Transport> = match identity.map(|identity| transport(&identity, placement.replica)) {
        None => Arc::new(Unix),
        Some(Ok(transport)) => transport,
        Some(Err(reason)) => return refuse(&reason),
    };
    train(&value, placement, transport)
}

/// Takes the part of `placement` in training `value`.
fn train<T: DistributedTraining>(value: &T, placement: Placement, transport: Arc<dyn Transport>) -> ExitCode {
    remember_panics();
    let replica = placement.replica;
    let status = Arc::new(RunStatus::default());
    let context = Context { placement, transport, status: status.clone(), start: Position::default() };
    let leaving = context.clone();
    lifeline::at_termination(move || {
        leaving.leave(|| {
            lifeline::last_words(&Failure::told_to_end(replica, None).to_string());
            ExitCode::Terminated.exit()
        });
    });
    let ended = match replica.role {
        Role::Ps => serve(&context),
        Role::Worker => {
            // The user's code may compute for long before it looks at the run again; an ended run must not wait for it.
            let watched = status.clone();
            status.on_change(move || {
                if watched.failure().is_none() {
                    return;
                }
                let code = if watched.is_leaving() { ExitCode::Terminated } else { ExitCode::LostPeer };
                std::thread::spawn(move || {
                    std::thread::sleep(FAREWELL);
                    lifeline::end_children();
                    code.exit()
                });
            });
            #[cfg(feature = "burn")]
            crate::runtime::burn::compute_in_this_thread(context.placement.threads as usize);
            T::Model::seed(context.placement.seed);
            work(&context, |worker| value.train(worker)).map(drop)
        }
    };
    match ended {
        Ok(()) => ExitCode::Success,
        Err(failure) if failure.replica != replica => {
            lifeline::echo(&failure.to_string());
            ExitCode::LostPeer
        }
        Err(failure) => {
            lifeline::last_words(&failure.to_string());
            if status.is_leaving() { ExitCode::Terminated } else { exit_code(&failure) }
        }
    }
}

/// The exit code that tells a replica's own failure.
fn exit_code(failure: &Failure) -> ExitCode {
    match failure.kind {
        FailureKind::User => ExitCode::UserError,
        FailureKind::Panicked => ExitCode::Panic,
        FailureKind::NotFinite => ExitCode::NotFinite,
        FailureKind::Layout | FailureKind::Diverged => ExitCode::Layout,
        FailureKind::Configuration => ExitCode::Configuration,
        FailureKind::NeverLaunched | FailureKind::NeverStarted => ExitCode::NeverLaunched,
        FailureKind::Timeout => ExitCode::Timeout,
        FailureKind::Lost | FailureKind::Condemned | FailureKind::Protocol => ExitCode::Protocol,
    }
}
