//! Floats in JSON: numbers where JSON has them, else the strings `"NaN"`, `"inf"` and `"-inf"`.
//!
//! `serde_json` writes `null` for these three and cannot read it back, and a loss that became NaN is exactly what
//! somebody will look for in the file. Formats that are not for people to read keep every bit.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() || !serializer.is_human_readable() {
        serializer.serialize_f64(*value)
    } else if value.is_nan() {
        serializer.serialize_str("NaN")
    } else {
        serializer.serialize_str(if *value > 0.0 { "inf" } else { "-inf" })
    }
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    if deserializer.is_human_readable() {
        deserializer.deserialize_any(AnyFloat)
    } else {
        f64::deserialize(deserializer)
    }
}

struct AnyFloat;

impl Visitor<'_> for AnyFloat {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, \"NaN\", \"inf\" or \"-inf\"")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<f64, E> {
        Ok(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<f64, E> {
        match text {
            "NaN" => Ok(f64::NAN),
            "inf" => Ok(f64::INFINITY),
            "-inf" => Ok(f64::NEG_INFINITY),
            _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }
}

/// One float as a value of its own, for the containers below.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Float(#[serde(with = "super::float")] f64);

/// For `Vec<Option<f64>>`: an absent value is `null`.
pub(super) mod options {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(values: &[Option<f64>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| value.map(Float)))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Option<f64>>, D::Error> {
        let values = Vec::<Option<Float>>::deserialize(deserializer)?;
        Ok(values.into_iter().map(|value| value.map(|Float(value)| value)).collect())
    }
}

/// For `BTreeMap<String, f64>`.
pub(super) mod map {
    use std::collections::BTreeMap;

    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        values: &BTreeMap<String, f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(values.iter().map(|(name, value)| (name, Float(*value))))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let values = BTreeMap::<String, Float>::deserialize(deserializer)?;
        Ok(values.into_iter().map(|(name, Float(value))| (name, value)).collect())
    }
}
