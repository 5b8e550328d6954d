//! What the output of the attribute calls; no part of the public interface.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::DistributedTraining;
use crate::exit::ExitCode;
use crate::secure::Identity;

pub use crate::config::{Attribute, AttributeCpu};
pub use inventory;

/// A value that can be sent to another process.
///
/// CBOR keeps every float, NaN included, and maps with any key, which JSON does not.
///
/// A trait of its own without serde's as supertraits, and that is not recommended: so a type without the derives gets one
/// readable message, not serde's words about each of its traits.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot travel to the replicas",
    label = "`Serialize` or `Deserialize` is missing",
    note = "add `#[derive(Serialize, Deserialize)]` to `{Self}`; its fields must have them too"
)]
pub trait Travels: Sized {
    /// The value as CBOR.
    ///
    /// # Errors
    ///
    /// Serde's own, as text.
    fn to_bytes(&self) -> Result<Vec<u8>, String>;

    /// The inverse of [`Travels::to_bytes`].
    ///
    /// # Errors
    ///
    /// Serde's own, as text.
    fn from_bytes(bytes: &[u8]) -> Result<Self, String>;

    /// The value for a person to read; null if JSON cannot hold it.
    fn to_json(&self) -> serde_json::Value;
}

#[diagnostic::do_not_recommend]
impl<T: Serialize + DeserializeOwned> Travels for T {
    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        ciborium::into_writer(self, &mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        ciborium::from_reader(bytes).map_err(|error| error.to_string())
    }

    fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

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
    pub dispatch: fn(&[u8], Option<Identity>) -> ExitCode,
}

inventory::collect!(Registration);

impl Registration {
    /// The registration of `T`.
    pub const fn new<T: DistributedTraining>(name: &'static str, file: &'static str, line: u32) -> Self {
        Self { name, file, line, dispatch: crate::run::dispatch::<T> }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_travels_bit_by_bit() {
        let value = (f64::from_bits(0x3ff0_0000_0000_0001), u64::MAX, Some("text".to_owned()));
        let bytes = value.to_bytes().unwrap();
        assert_eq!(Travels::from_bytes(&bytes), Ok(value));
        assert!(<(u8, u8)>::from_bytes(&bytes[..bytes.len() - 1]).is_err());
    }
}
