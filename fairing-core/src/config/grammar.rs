//! What both crates must read alike: sizes, cores, durations, variable names, targets, modes, and what a misspelt word may
//! have meant.
//!
//! `fairing-macros` cannot depend on `fairing-core`, so its file of this name is a link to this one (`cargo package`
//! copies what a link points to). Every function that can fail gives back what would have been right, to be put behind
//! "expected".

use std::time::Duration;

/// Units of memory and their bytes: a decimal or binary prefix, the `B` optional.
const MEMORY_UNITS: [(&str, u64); 17] = [
    ("B", 1),
    ("k", 1_000),
    ("kB", 1_000),
    ("M", 1_000_000),
    ("MB", 1_000_000),
    ("G", 1_000_000_000),
    ("GB", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("Ki", 1 << 10),
    ("KiB", 1 << 10),
    ("Mi", 1 << 20),
    ("MiB", 1 << 20),
    ("Gi", 1 << 30),
    ("GiB", 1 << 30),
    ("Ti", 1 << 40),
    ("TiB", 1 << 40),
];

/// Units of a duration and their milliseconds.
const TIME_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

/// Longer than any scheduler takes to replace a process, shorter than a person leaves a run that stands still.
const REJOIN_MAX: Duration = Duration::from_secs(3600);

/// Thousandths of a core: `2`, `1.5` or `500m`.
pub(crate) fn millicores(text: &str) -> Result<u64, String> {
    let read = || {
        if let Some(count) = text.strip_suffix('m') {
            return whole(count);
        }
        scaled(text, 1_000).filter(|_| text.split_once('.').is_none_or(|(_, fraction)| fraction.len() <= 3))
    };
    read().filter(|count| *count > 0).ok_or_else(|| "a number of cores such as 2, \"1.5\" or \"500m\"".to_owned())
}

/// Bytes: `512Mi`, `1GB`, `1.5Gi`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let expected = "a size such as \"512Mi\" or \"2GB\"";
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    if scaled(number, 1).is_none_or(|_| number.bytes().all(|c| c == b'0' || c == b'.')) {
        return Err(expected.to_owned());
    }
    match MEMORY_UNITS.iter().find(|(name, _)| *name == unit) {
        Some((_, size)) => scaled(number, *size).filter(|count| *count > 0).ok_or_else(|| expected.to_owned()),
        None if unit.is_empty() => Err(format!("{expected} (a unit is missing)")),
        None => Err(match nearest(unit.trim(), MEMORY_UNITS.iter().map(|(name, _)| *name)) {
            Some(unit) => format!("{expected}; did you mean \"{number}{unit}\"?"),
            None => format!("{expected}; the units are k, M, G, T and Ki, Mi, Gi, Ti, with or without B"),
        }),
    }
}

/// A span of time, the sum of its parts: `30s`, `2m`, `1m 30s`, `0s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "a duration such as \"30s\" or \"2m\"".to_owned();
    let (mut rest, mut total_ms) = (text, 0_u64);
    while !rest.is_empty() {
        let (number, behind) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
        let (unit, behind) = behind.split_at(behind.find(|c: char| !c.is_alphabetic()).unwrap_or(behind.len()));
        let count = whole(number).filter(|_| !number.is_empty()).ok_or_else(expected)?;
        let Some((_, unit_ms)) = TIME_UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(match unit {
                "" if behind.is_empty() => format!("{} (a unit is missing)", expected()),
                "" => expected(),
                _ => format!("{}; the units are ms, s, m and h", expected()),
            });
        };
        let part_ms = count.checked_mul(*unit_ms).ok_or_else(expected)?;
        total_ms = total_ms.checked_add(part_ms).ok_or_else(expected)?;
        rest = behind.trim_start();
    }
    if text.is_empty() { Err(expected()) } else { Ok(Duration::from_millis(total_ms)) }
}

/// Whether a run may be held for that long for a lost worker.
pub(crate) fn rejoin(duration: Duration) -> Result<(), String> {
    if duration <= REJOIN_MAX { Ok(()) } else { Err("at most \"1h\"".to_owned()) }
}

/// The two words that `mode` takes.
pub(crate) fn mode(text: &str) -> Result<(), String> {
    match text {
        "sync" | "async" => Ok(()),
        _ => {
            let remedy = match nearest(text, ["sync", "async"]) {
                Some(near) => format!("; did you mean \"{near}\"?"),
                None => " (bounded asynchrony is `staleness = 4`)".to_owned(),
            };
            Err(format!("\"sync\" or \"async\"{remedy}"))
        }
    }
}

/// Why `staleness` cannot stand beside "sync".
pub(crate) const STALENESS_IN_SYNC: &str = "`staleness` has no meaning with `mode = \"sync\"`";

/// Why `setting`, a mode or a staleness, cannot stand beside `ps = 0`: workers exchange their shares in a step that all of
/// them make together.
pub(crate) fn needs_server(setting: &str) -> String {
    format!("`{setting}` needs a parameter server; set `ps = 1`")
}

/// Why `rejoin` cannot stand beside `ps = 0`.
pub(crate) const REJOIN_WITHOUT_SERVER: &str = "`rejoin` needs a parameter server, since a lost worker would take its \
                                                share of the parameters with it; set `ps = 1`";

/// Whether `text` can name a variable that is handed on to the replicas.
pub(crate) fn variable_name(text: &str) -> Result<(), String> {
    let word = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_')
            && !text.starts_with(|c: char| c.is_ascii_digit())
    };
    if text.starts_with("FAIRING_") {
        return Err("a variable of your own (those that start with `FAIRING_` are fairing's)".to_owned());
    }
    match text.split_once('=') {
        _ if word(text) => Ok(()),
        Some((name, _)) if word(name) => Err(format!("the name alone, \"{name}\"; the value is that of the launcher")),
        _ => Err("the name of a variable, such as \"HF_HOME\" (letters, digits and `_`)".to_owned()),
    }
}

/// Whether `text` names a target that this version has.
pub(crate) fn target(text: &str) -> Result<(), String> {
    match text {
        "local" => Ok(()),
        "docker" | "kubernetes" => Err(format!("\"local\" (`{text}` comes with a later version)")),
        _ => Err("\"local\", the only target of this version".to_owned()),
    }
}

/// The candidate that a misspelt `word` most likely meant.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    // A third of the letters: "wrokers" has a neighbour, "gpu" and "ps" are strangers.
    let limit = |candidate: &str| (word.len().max(candidate.len()) / 3).max(1);
    let rank = |candidate: &'a str| {
        let lower = candidate.to_lowercase();
        // Among equals the one that begins alike: "Gbb" is nearer to "GB" than to "GiB".
        let alike = word.bytes().zip(lower.bytes()).take_while(|(a, b)| a == b).count();
        (distance(&word, &lower), std::cmp::Reverse(alike), candidate)
    };
    let ranked = candidates.into_iter().map(rank);
    let near = ranked.filter(|(distance, _, name)| *distance <= limit(name) && *distance < name.len());
    near.min_by_key(|(distance, alike, _)| (*distance, *alike)).map(|(_, _, candidate)| candidate)
}

/// Levenshtein's distance: insertions, deletions and replacements between two words.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

/// A number in digits only, without a sign.
fn whole(text: &str) -> Option<u64> {
    text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse().ok())?
}

/// `number`, which may have decimals, times `size`, rounded down.
fn scaled(number: &str, size: u64) -> Option<u64> {
    let Some((integer, fraction)) = number.split_once('.') else {
        return whole(number)?.checked_mul(size);
    };
    let parts = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let rest = u128::from(whole(fraction)?).checked_mul(size.into())? / parts;
    whole(integer)?.checked_mul(size)?.checked_add(u64::try_from(rest).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_counts_decimals_or_millicores() {
        for (text, expected) in [("2", 2000), ("1.5", 1500), ("500m", 500), ("0.001", 1), ("12.25", 12_250)] {
            assert_eq!(millicores(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0m", "0.0", "-1", "+1", "1.", ".5", "1.2345", "1.5m", "2 cores", "1e3", "m", "NaN"] {
            assert!(millicores(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_decimal_or_binary_units() {
        let units =
            [("1k", 1_000), ("1kB", 1_000), ("1Ki", 1024), ("1KiB", 1024), ("3M", 3_000_000), ("2MB", 2_000_000)];
        let more = [
            ("512Mi", 512 << 20),
            ("1GB", 1_000_000_000),
            ("1Gi", 1 << 30),
            ("1.5Gi", 3 << 29),
            ("2T", 2 * 10u64.pow(12)),
        ];
        for (text, expected) in units.into_iter().chain(more).chain([("1TiB", 1 << 40), ("17B", 17)]) {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in
            ["", "0Gi", "0.0Gi", "-1Gi", "1Gbb", "1 Gi", "Gi", "1GiGi", "1e3k", "99999999999T", "1..5G", "0.1B", "1024"]
        {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_misspelt_unit_is_set_right() {
        for (text, right) in
            [("1Gbb", "1GB"), ("1gb", "1GB"), ("2mib", "2MiB"), ("1KB", "1kB"), ("1.5gi", "1.5Gi"), ("1 Gi", "1Gi")]
        {
            let message = bytes(text).unwrap_err();
            assert!(message.ends_with(&format!("did you mean \"{right}\"?")), "{text}: {message}");
        }
        assert!(bytes("1024").unwrap_err().ends_with("(a unit is missing)"));
    }

    #[test]
    fn durations_are_sums_of_whole_units() {
        let cases = [("0s", 0), ("1ms", 1), ("30s", 30_000), ("2m", 120_000), ("1h", 3_600_000), ("1m 30s", 90_000)];
        for (text, expected_ms) in cases.into_iter().chain([("1m30s", 90_000), ("0h", 0)]) {
            assert_eq!(duration(text), Ok(Duration::from_millis(expected_ms)), "{text}");
        }
        for text in ["", " ", "-1s", "1.5s", "s", "1 s", " 1s", "1s,", "1s m", "30 s", "99999999999999999999s", "1e3s"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(duration("18446744073709551615h").is_err() && duration("18446744073709551615ms 1ms").is_err());
        assert!(duration("30").unwrap_err().ends_with("(a unit is missing)"));
        assert!(duration("30sec").unwrap_err().ends_with("the units are ms, s, m and h"));
        assert!(rejoin(REJOIN_MAX).is_ok() && rejoin(REJOIN_MAX + Duration::from_millis(1)).is_err());
    }

    #[test]
    fn a_mode_is_one_of_two_words() {
        assert_eq!((mode("sync"), mode("async")), (Ok(()), Ok(())));
        for (text, end) in
            [("asinc", "did you mean \"async\"?"), ("Sync", "\"sync\"?"), ("bounded", "`staleness = 4`)")]
        {
            assert!(mode(text).unwrap_err().ends_with(end), "{text}: {:?}", mode(text));
        }
    }

    #[test]
    fn variables_are_named_without_value_and_not_fairings_own() {
        for name in ["HF_HOME", "_x", "a1"] {
            assert_eq!(variable_name(name), Ok(()), "{name}");
        }
        for (name, part) in
            [("A=b", "\"A\""), ("FAIRING_SEED", "FAIRING_"), ("", "such as"), ("1a", "such as"), ("A B", "such as")]
        {
            assert!(variable_name(name).unwrap_err().contains(part), "{name}");
        }
    }

    #[test]
    fn words_have_a_neighbour_or_none() {
        let keys = ["workers", "ps", "seed", "env", "data", "target", "runs"];
        let neighbours =
            [("wrokers", "workers"), ("worker", "workers"), ("Seed", "seed"), ("targets", "target"), ("run", "runs")];
        for (word, key) in neighbours {
            assert_eq!(nearest(word, keys), Some(key), "{word}");
        }
        for word in ["gpu", "image", "x", ""] {
            assert_eq!(nearest(word, keys), None, "{word}");
        }
    }
}
