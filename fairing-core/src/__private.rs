//! What the output of the attribute calls; no part of the public interface.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::DistributedTraining;
use crate::exit::ExitCode;

pub use crate::config::{Attribute, AttributeCpu};
pub use inventory;

/// A value that can be sent to another process.
///
/// A trait of its own, so that a type without serde's derives gets one readable message.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot travel to the replicas",
    label = "not both of serde's `Serialize` and `Deserialize`",
    note = "add `#[derive(Serialize, Deserialize)]` to `{Self}`; its fields must have them too"
)]
pub trait Travels: Serialize + DeserializeOwned {}

// Without it the compiler would complain about the two bounds in serde's words, and twice.
#[diagnostic::do_not_recommend]
impl<T: Serialize + DeserializeOwned> Travels for T {}

/// One annotated type of the program, by which a replica finds what to train.
#[derive(Debug)]
pub struct Registration {
    /// `module_path::Type`.
    pub name: &'static str,
    /// Source file of the attribute.
    pub file: &'static str,
    /// Its line.
    pub line: u32,
    /// Trains in this process, which is a replica, with the value that the launcher sent.
    pub dispatch: fn(&[u8]) -> ExitCode,
}

inventory::collect!(Registration);

impl Registration {
    /// The registration of `T`.
    pub const fn new<T: DistributedTraining>(name: &'static str, file: &'static str, line: u32) -> Self {
        Self { name, file, line, dispatch: crate::run::dispatch::<T> }
    }
}
