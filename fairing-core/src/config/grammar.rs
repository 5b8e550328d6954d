//! What both crates must read alike: sizes, cores, durations, variable names, words such as modes and targets, names of
//! images and registries, and what a misspelt word may have meant.
//!
//! `fairing-macros` cannot depend on `fairing-core`, so its file of this name is a link to this one (`cargo package`
//! copies what a link points to). Every function that can fail gives back what would have been right, to be put behind
//! "expected".

use std::path::{Component, Path};
use std::time::Duration;

/// What a text must be: the error is what would have been right.
pub(crate) type Rule = fn(&str) -> Result<(), String>;

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

/// The words that `target` takes.
pub(crate) fn target(text: &str) -> Result<(), String> {
    one_of(&["local", "docker", "kubernetes"], text)
}

/// The two words that `builder` takes.
pub(crate) fn builder(text: &str) -> Result<(), String> {
    one_of(&["append", "docker"], text)
}

/// The two words that `link` takes.
pub(crate) fn link(text: &str) -> Result<(), String> {
    one_of(&["dynamic", "static"], text)
}

/// The two words that `on_disconnect` takes.
pub(crate) fn on_disconnect(text: &str) -> Result<(), String> {
    one_of(&["stop", "continue"], text)
}

/// The words that `architectures` lists, which are those of container images.
pub(crate) fn architecture(text: &str) -> Result<(), String> {
    match text {
        "x86_64" | "x86-64" => Err("\"amd64\", as images call it".to_owned()),
        "aarch64" => Err("\"arm64\", as images call it".to_owned()),
        _ => one_of(&["amd64", "arm64"], text),
    }
}

/// Whether `text` is one of a setting's `words`.
pub(crate) fn one_of(words: &[&'static str], text: &str) -> Result<(), String> {
    if words.contains(&text) {
        return Ok(());
    }
    let quoted: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
    let (last, first) = quoted.split_last().expect("a setting has words");
    let remedy = nearest(text, words.iter().copied()).map(|near| format!("; did you mean \"{near}\"?"));
    Err(format!("{} or {last}{}", first.join(", "), remedy.unwrap_or_default()))
}

/// Why `setting`, which is about building, cannot stand beside `image`.
pub(crate) fn no_meaning_with_image(setting: &str) -> String {
    format!("`{setting}` has no meaning with `image`, which is used as it is; leave one of them out")
}

/// Why `base` cannot stand beside `dockerfile`.
pub(crate) const BASE_WITH_DOCKERFILE: &str =
    "`base` has no meaning with `dockerfile`, which names its base itself; leave one of them out";

/// Why `builder = "append"` cannot stand beside `dockerfile`.
pub(crate) const APPEND_WITH_DOCKERFILE: &str =
    "`builder = \"append\"` reads no `dockerfile`; leave it out or set `builder = \"docker\"`";

/// Why several architectures cannot stand beside the builder `docker`.
pub(crate) const ARCHITECTURES_WITH_DOCKER: &str =
    "several `architectures` need `builder = \"append\"`, since an engine builds for one at a time";

/// Why `on_disconnect = "continue"` cannot stand beside `target`.
pub(crate) fn continue_needs_kubernetes(target: &str) -> String {
    format!(
        "`on_disconnect = \"continue\"` needs `target = \"kubernetes\"`; with `target = \"{target}\"` a run ends with its \
         launcher"
    )
}

/// Whether `text` may name a repository that an image is pushed to: a host, and a path without tag and digest.
///
/// This is what can be said at once; the whole grammar is the registry client's.
pub(crate) fn repository(text: &str) -> Result<(), String> {
    let expected = || "a host and a path, such as \"registry.example/team/name\"".to_owned();
    spelling(text, &expected())?;
    let host = text.split_once('/').map(|(host, _)| host).ok_or_else(expected)?;
    if text.split('/').any(str::is_empty) {
        return Err(expected());
    }
    if !host.contains(['.', ':']) && host != "localhost" {
        return Err(format!("the host of the registry in front, such as \"docker.io/{text}\""));
    }
    match name(text) {
        name if name == text => Ok(()),
        name => Err(format!("the name alone, \"{name}\" (what is pushed has a tag and a digest of its own)")),
    }
}

/// Whether `text` may name an image: a repository, and a tag or digest behind it.
pub(crate) fn image(text: &str) -> Result<(), String> {
    let expected = "the name of an image, such as \"debian:12\"";
    spelling(text, expected)?;
    if name(text).split('/').any(str::is_empty) { Err(expected.to_owned()) } else { Ok(()) }
}

/// Whether `text` may be the host of a registry, with or without a port.
pub(crate) fn registry_host(text: &str) -> Result<(), String> {
    let expected = || "the host of a registry, such as \"registry.example:5000\"".to_owned();
    spelling(text, &expected())?;
    if let Some((host, _)) = text.split_once('/') {
        return Err(if host.is_empty() { expected() } else { format!("the host alone, \"{host}\"") });
    }
    // The colons of an address of the sixth version stand in brackets.
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_port = |port: &str| whole(port).is_some_and(|port| (1..=u16::MAX.into()).contains(&port));
    let is_host = !host.is_empty() && !host.contains('@') && (!host.contains(':') || host.starts_with('['));
    if is_host && port.is_none_or(is_port) { Ok(()) } else { Err(expected()) }
}

/// What names of repositories, images and hosts have in common: lower case, and neither white space, scheme nor user.
fn spelling(text: &str, expected: &str) -> Result<(), String> {
    if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(expected.to_owned());
    }
    if has_user(text) {
        return Err(format!("{expected}, without a user or a password (`docker login` keeps them)"));
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(format!("{expected}, without `{scheme}://`"));
    }
    let name = name(text);
    if name.contains(|c: char| c.is_uppercase()) {
        return Err(format!("lower case, \"{}{}\"", name.to_lowercase(), &text[name.len()..]));
    }
    Ok(())
}

/// The name of an image without its tag and digest: a colon before the last `/` is that of a port.
fn name(reference: &str) -> &str {
    let name = reference.split_once('@').map_or(reference, |(name, _)| name);
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    name[last..].find(':').map_or(name, |colon| &name[..last + colon])
}

/// Whether a user, and perhaps a password, stands in front of a host.
fn has_user(text: &str) -> bool {
    without_digest(text).contains('@')
}

fn without_digest(text: &str) -> &str {
    let is_digest = |text: &str| text.starts_with("sha256:") || text.starts_with("sha512:");
    text.rsplit_once('@').filter(|(_, digest)| is_digest(digest)).map_or(text, |(name, _)| name)
}

/// `text` as a message may show it: without the password of an address.
pub(crate) fn shown(text: &str) -> String {
    let name = without_digest(text);
    match name.rsplit_once('@') {
        Some((user, host)) if user.contains(':') => format!("...@{host}{}", &text[name.len()..]),
        _ => text.to_owned(),
    }
}

/// Whether a file of this path can be put beside the program: it must have the same place in the image.
pub(crate) fn extra_file(path: &Path) -> Result<(), String> {
    let is_below = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if is_below && path.file_name().is_some() {
        return Ok(());
    }
    Err("a relative path without `..`, such as \"labels.txt\"".to_owned())
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
    fn settings_of_two_words_name_both_and_the_nearer_one() {
        let cases: [(Rule, [&str; 2], &str); 4] = [
            (builder, ["append", "docker"], "apend"),
            (link, ["dynamic", "static"], "statik"),
            (on_disconnect, ["stop", "continue"], "Stop"),
            (architecture, ["amd64", "arm64"], "amd-64"),
        ];
        for (check, [first, second], misspelt) in cases {
            assert_eq!((check(first), check(second)), (Ok(()), Ok(())));
            let both = format!("\"{first}\" or \"{second}\"");
            assert_eq!(check("moon"), Err(both.clone()));
            assert!(check(misspelt).unwrap_err().starts_with(&format!("{both}; did you mean ")), "{misspelt}");
        }
        assert_eq!(target("kubernetes"), Ok(()));
        let expected = "\"local\", \"docker\" or \"kubernetes\"; did you mean \"docker\"?";
        assert_eq!(target("dokcer"), Err(expected.to_owned()));
        assert!(architecture("x86_64").unwrap_err().starts_with("\"amd64\""));
        assert!(architecture("aarch64").unwrap_err().starts_with("\"arm64\""));
    }

    #[test]
    fn a_repository_has_a_host_and_neither_tag_nor_digest() {
        for text in ["registry.example/team/name", "localhost/a", "localhost:5000/a/b", "[::1]:5000/a", "docker.io/a/b"]
        {
            assert_eq!(repository(text), Ok(()), "{text}");
        }
        for (text, part) in [
            ("", "such as"),
            ("registry.example/a b", "such as"),
            ("registry.example", "a host and a path"),
            ("localhost:5000", "a host and a path"),
            ("registry.example/", "a host and a path"),
            ("registry.example//a", "a host and a path"),
            ("/a", "a host and a path"),
            ("team/name", "\"docker.io/team/name\""),
            ("https://registry.example/a", "without `https://`"),
            ("registry.example/Team/name", "lower case, \"registry.example/team/name\""),
            ("registry.example:5000/a:1", "the name alone, \"registry.example:5000/a\""),
            ("registry.example/a:1@sha256:00", "the name alone, \"registry.example/a\""),
        ] {
            assert!(repository(text).unwrap_err().contains(part), "{text}: {:?}", repository(text));
        }
    }

    #[test]
    fn an_image_may_have_a_tag_and_a_digest() {
        for text in ["debian", "debian:12", "a.b:5000/c/d:Tag_1", "a.b/c:1@sha256:00", "debian@sha512:00"] {
            assert_eq!(image(text), Ok(()), "{text}");
        }
        for (text, part) in [
            ("", "such as"),
            ("debian 12", "such as"),
            (":12", "such as"),
            ("a.b/", "such as"),
            ("docker://debian:12", "without `docker://`"),
            ("Debian:Twelve", "lower case, \"debian:Twelve\""),
        ] {
            assert!(image(text).unwrap_err().contains(part), "{text}: {:?}", image(text));
        }
    }

    #[test]
    fn the_host_of_a_registry_may_have_a_port() {
        for text in ["registry.example", "localhost:5000", "10.0.0.1:80", "[::1]", "[::1]:5000"] {
            assert_eq!(registry_host(text), Ok(()), "{text}");
        }
        for (text, part) in [
            ("", "such as"),
            ("a b", "such as"),
            (":5000", "such as"),
            ("a:", "such as"),
            ("a:0", "such as"),
            ("a:65536", "such as"),
            ("::1", "such as"),
            ("/a", "such as"),
            ("a@sha256:00", "such as"),
            ("http://a:5000", "without `http://`"),
            ("a:5000/team", "the host alone, \"a:5000\""),
            ("Registry.example", "lower case, \"registry.example\""),
        ] {
            assert!(registry_host(text).unwrap_err().contains(part), "{text}: {:?}", registry_host(text));
        }
    }

    #[test]
    fn a_password_is_neither_taken_nor_shown() {
        for text in ["me:hunter2@a.b/c", "https://me:hunter2@a.b/c", "me:hunter2@a.b/c@sha256:00", "me:hunter2@a.b"] {
            for check in [repository, image, registry_host] {
                let message = check(text).unwrap_err();
                assert!(message.contains("`docker login`") && !message.contains("hunter2"), "{text}: {message}");
            }
            assert!(!shown(text).contains("hunter2"), "{text}");
        }
        for text in ["debian:12@sha256:00", "me@host", "a:b", ""] {
            assert_eq!(shown(text), text);
        }
    }

    #[test]
    fn a_file_beside_the_program_stays_below_its_folder() {
        for path in ["labels.txt", "a/b.json", "./a", "..a"] {
            assert_eq!(extra_file(Path::new(path)), Ok(()), "{path}");
        }
        for path in ["", ".", "/etc/passwd", "../a", "a/../b", "a/.."] {
            assert!(extra_file(Path::new(path)).is_err(), "{path}");
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
