//! How settings of a run on Kubernetes are spelt: Kubernetes' own grammars of names, and the short forms of fairing's lists.
//!
//! Beside `grammar`, and like it read by `fairing-macros` through a link. Every function that can fail gives back what would
//! have been right, to be put behind "expected".
//!
//! The grammars are those of `k8s.io/apimachinery/pkg/util/validation`.

use std::time::Duration;

use super::grammar;

/// Longest DNS label, label value, and name of a label without its prefix.
const LABEL_LENGTH: usize = 63;

/// Longest DNS subdomain: the name of most objects, and the prefix of a label.
const SUBDOMAIN_LENGTH: usize = 253;

/// Longer than any training, short enough for every counter of seconds on the way.
const SPAN_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// Where fairing keeps its own files in a pod.
const OWN_FOLDER: &str = "/run/fairing";

/// What tolerations may be about.
const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// The resource that a plain number of GPUs means.
const DEFAULT_GPU: &str = "nvidia.com/gpu";

/// A toleration's key, value and effect.
pub(crate) type TolerationParts<'a> = (Option<&'a str>, Option<&'a str>, Option<&'a str>);

/// A volume's kind (`pvc`, `secret`, `configmap` or `empty`), its claim, object or size, the path at which it is mounted, and
/// whether it may only be read.
pub(crate) type VolumeParts<'a> = (&'a str, &'a str, &'a str, bool);

/// Whether a run's deadline may be that long.
pub(crate) fn deadline(duration: Duration) -> Result<(), String> {
    if duration < Duration::from_secs(1) { Err("at least \"1s\"".to_owned()) } else { span(duration) }
}

/// Whether something may be kept that long: Kubernetes counts whole seconds.
pub(crate) fn span(duration: Duration) -> Result<(), String> {
    if duration.subsec_nanos() > 0 {
        Err("whole seconds".to_owned())
    } else if duration > SPAN_MAX {
        Err("at most \"8784h\", a year".to_owned())
    } else {
        Ok(())
    }
}

/// The words that `launcher` takes.
pub(crate) fn launcher(text: &str) -> Result<(), String> {
    grammar::one_of(&["jobs", "jobset", "tfjob", "auto"], text)
}

/// Whether `text` may name a namespace: a DNS label.
pub(crate) fn namespace(text: &str) -> Result<(), String> {
    if text.len() <= LABEL_LENGTH && is_dns_label(text) {
        return Ok(());
    }
    Err("the name of a namespace, such as \"team-a\" (at most 63 of `a-z`, `0-9` and `-`)".to_owned())
}

/// Whether `text` may name an object such as a claim or a service account: a DNS subdomain.
pub(crate) fn object(text: &str) -> Result<(), String> {
    if is_subdomain(text) {
        return Ok(());
    }
    Err("the name of an object in the cluster, such as \"data-1\" (at most 253 of `a-z`, `0-9`, `-` and `.`)"
        .to_owned())
}

/// A label that nodes have, `key=value`.
pub(crate) fn selector(text: &str) -> Result<(&str, &str), String> {
    let (key, value) = pair(text, "a label of nodes, such as \"disk=ssd\"")?;
    qualified(key)?;
    label_value(value)?;
    Ok((key, value))
}

/// A label of the user's own for all objects, `key=value`.
pub(crate) fn label(text: &str) -> Result<(&str, &str), String> {
    let (key, value) = pair(text, "a label, such as \"team=vision\"")?;
    qualified(key)?;
    own_key(key)?;
    label_value(value)?;
    Ok((key, value))
}

/// An annotation of the user's own for all pods, `key=value`.
pub(crate) fn annotation(text: &str) -> Result<(&str, &str), String> {
    let (key, value) = pair(text, "an annotation, such as \"example.org/note=text\"")?;
    // Of annotations alone the case of the prefix does not matter.
    qualified(&key.to_lowercase())?;
    own_key(key)?;
    Ok((key, value))
}

/// A taint that the pods bear: `key=value:Effect`, `key:Effect`, `key=value`, `key`, `:Effect`, or `*` for any.
pub(crate) fn toleration(text: &str) -> Result<TolerationParts<'_>, String> {
    if text == "*" {
        return Ok((None, None, None));
    }
    let (taint, effect) = match text.split_once(':') {
        Some((taint, effect)) => (taint, Some(effect)),
        None => (text, None),
    };
    if let Some(effect) = effect {
        grammar::one_of(&EFFECTS, effect).map_err(|expected| format!("as its effect {expected}"))?;
    }
    if taint.is_empty() {
        let expected = "a taint, such as \"dedicated=training:NoSchedule\", or \"*\" for any".to_owned();
        return effect.map(|effect| (None, None, Some(effect))).ok_or(expected);
    }
    let (key, value) = match taint.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (taint, None),
    };
    qualified(key)?;
    value.map_or(Ok(()), label_value)?;
    Ok((Some(key), value, effect))
}

/// A volume and where it is mounted: `pvc:CLAIM:/path`, `secret:NAME:/path`, `configmap:NAME:/path`, `empty:SIZE:/path`; of a
/// claim `:ro` behind the path.
pub(crate) fn volume(text: &str) -> Result<VolumeParts<'_>, String> {
    let form = "such as \"pvc:datasets:/data:ro\", \"secret:token:/etc/token\", \"configmap:words:/etc/words\" or \
                \"empty:10Gi:/scratch\"";
    let (kind, rest) = text.split_once(':').ok_or_else(|| format!("a volume, {form}"))?;
    grammar::one_of(&["pvc", "secret", "configmap", "empty"], kind)
        .map_err(|expected| format!("as its kind {expected}"))?;
    let (source, place) = rest.split_once(':').ok_or_else(|| format!("its source and path too, {form}"))?;
    match kind {
        "empty" => grammar::bytes(source).map(drop)?,
        _ => object(source)?,
    }
    let (path, is_read_only) = match place.split_once(':') {
        // Secrets and ConfigMaps can be read only anyway, and nobody fills an empty folder that nobody may write.
        Some((path, "ro")) if kind == "pvc" => (path, true),
        Some((_, "ro")) => return Err(format!("no `:ro` behind `{kind}` (that is for `pvc`)")),
        Some((_, "rw")) => return Err("no `:rw` (that is the default)".to_owned()),
        Some(_) => return Err(format!("one path, {form}")),
        None => (place, false),
    };
    mount_path(path)?;
    Ok((kind, source, path, is_read_only))
}

/// GPUs of a replica: a number, or `vendor.com/name=number`. None with a number of 0.
pub(crate) fn gpu(text: &str) -> Result<(&str, u32), String> {
    let expected = || "a number of GPUs such as 1, or with the resource's name \"amd.com/gpu=1\"".to_owned();
    let (name, count) = text.rsplit_once('=').unwrap_or((DEFAULT_GPU, text));
    let is_number = !count.is_empty() && count.bytes().all(|c| c.is_ascii_digit());
    let count = count.parse().ok().filter(|_| is_number).ok_or_else(expected)?;
    // Names without a prefix, and with this one, are Kubernetes' own: `cpu`, `memory`.
    let is_extended = name
        .split_once('/')
        .is_some_and(|(prefix, _)| prefix != "kubernetes.io" && !prefix.ends_with(".kubernetes.io"));
    if is_extended && qualified(name).is_ok() { Ok((name, count)) } else { Err(expected()) }
}

/// Why `on_disconnect = "stop"` cannot stand beside a cluster.
pub(crate) const STOP_ON_CLUSTER: &str = "`on_disconnect = \"stop\"` has no meaning with `target = \"kubernetes\"`, where a \
                                          run goes on without its launcher; leave it out";

fn pair<'a>(text: &'a str, expected: &str) -> Result<(&'a str, &'a str), String> {
    text.split_once('=').ok_or_else(|| expected.to_owned())
}

/// Whether `key` is a qualified name: a name, with or without a DNS subdomain and `/` in front.
fn qualified(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if prefix.is_none_or(is_subdomain) && !name.is_empty() && is_label_text(name) {
        return Ok(());
    }
    Err("as its key at most 63 letters, digits, `-`, `_` and `.` between letters or digits, such as \"team\" or \
         \"example.org/team\""
        .to_owned())
}

fn label_value(value: &str) -> Result<(), String> {
    if is_label_text(value) {
        return Ok(());
    }
    Err("as its value at most 63 letters, digits, `-`, `_` and `.` between letters or digits".to_owned())
}

/// What fairing finds its objects by is not the user's.
fn own_key(key: &str) -> Result<(), String> {
    let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
    if prefix.eq_ignore_ascii_case("fairing.dev") || key == "app.kubernetes.io/managed-by" {
        return Err("a key of your own (`fairing.dev/` and `app.kubernetes.io/managed-by` are fairing's)".to_owned());
    }
    Ok(())
}

fn mount_path(path: &str) -> Result<(), String> {
    let is_plain = path.split('/').skip(1).all(|part| !["", ".", ".."].contains(&part));
    if !path.starts_with('/') || !is_plain || path.contains(|c: char| c.is_control() || c == '$') {
        return Err("as its path an absolute one without `..`, such as \"/data\"".to_owned());
    }
    if path == OWN_FOLDER || path.starts_with(&format!("{OWN_FOLDER}/")) {
        return Err(format!("another path (`{OWN_FOLDER}` is fairing's)"));
    }
    if path == "/tmp" {
        return Err("another path (`/tmp` is there already; `tmp_size` is its size)".to_owned());
    }
    Ok(())
}

/// RFC 1123: lower case, digits, and `-` between them.
fn is_dns_label(text: &str) -> bool {
    let is_end = |c: Option<u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let is_inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    is_end(text.bytes().next()) && is_end(text.bytes().last()) && text.bytes().all(is_inner)
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= SUBDOMAIN_LENGTH && text.split('.').all(is_dns_label)
}

/// The value of a label, or its name, which is not empty.
fn is_label_text(text: &str) -> bool {
    let is_end = |c: Option<u8>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    let is_inner = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    text.len() <= LABEL_LENGTH
        && is_end(text.bytes().next())
        && is_end(text.bytes().last())
        && text.bytes().all(is_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_a_cluster_takes() {
        let long = |length: usize| "a".repeat(length);
        for text in ["a", "team-a", "0", &long(63)] {
            assert_eq!(namespace(text), Ok(()), "{text}");
        }
        for text in ["", "Team", "-a", "a-", "a.b", "a_b", "ä", &long(64)] {
            assert!(namespace(text).is_err(), "{text}");
        }
        for text in ["data-1", "a.b", &long(253), "0.0"] {
            assert_eq!(object(text), Ok(()), "{text}");
        }
        for text in ["", "a..b", ".a", "A", "a/b", &long(254)] {
            assert!(object(text).is_err(), "{text}");
        }
    }

    #[test]
    fn labels_have_a_key_and_a_value() {
        for (text, expected) in [("a=b", ("a", "b")), ("a.b/C_d=", ("a.b/C_d", "")), ("a=1.0_x", ("a", "1.0_x"))] {
            assert_eq!(selector(text), Ok(expected), "{text}");
            assert_eq!(label(text), Ok(expected), "{text}");
        }
        for (text, part) in [
            ("a", "such as"),
            ("=b", "as its key"),
            ("a b=c", "as its key"),
            ("a/b/c=d", "as its key"),
            ("A/b=c", "as its key"),
            ("a=-b", "as its value"),
            ("a=b=c", "as its value"),
        ] {
            assert!(label(text).unwrap_err().contains(part), "{text}: {:?}", label(text));
        }
        assert!(label(&format!("{}=a", "k".repeat(64))).is_err() && label(&format!("a={}", "v".repeat(64))).is_err());
        for text in ["fairing.dev/run=a", "app.kubernetes.io/managed-by=me"] {
            assert!(label(text).unwrap_err().contains("of your own"), "{text}");
        }
        assert_eq!(annotation("Example.org/x=any = text: ä"), Ok(("Example.org/x", "any = text: ä")));
        assert!(annotation("fairing.dev/plan={}").is_err() && annotation("no").is_err());
    }

    #[test]
    fn tolerations_say_as_much_of_a_taint_as_they_want() {
        let cases = [
            ("a=b:NoSchedule", (Some("a"), Some("b"), Some("NoSchedule"))),
            ("a.b/c:NoExecute", (Some("a.b/c"), None, Some("NoExecute"))),
            ("a=b", (Some("a"), Some("b"), None)),
            ("a", (Some("a"), None, None)),
            (":PreferNoSchedule", (None, None, Some("PreferNoSchedule"))),
            ("*", (None, None, None)),
        ];
        for (text, expected) in cases {
            assert_eq!(toleration(text), Ok(expected), "{text}");
        }
        for (text, part) in [
            ("", "\"*\" for any"),
            ("a:", "as its effect"),
            ("a:noschedule", "did you mean \"NoSchedule\"?"),
            ("=b:NoExecute", "as its key"),
            ("a=b c", "as its value"),
        ] {
            assert!(toleration(text).unwrap_err().contains(part), "{text}: {:?}", toleration(text));
        }
    }

    #[test]
    fn volumes_have_a_kind_a_source_and_a_path() {
        for text in
            ["pvc:data:/data", "pvc:data:/data/x:ro", "secret:a.b:/etc/a", "configmap:a:/a", "empty:10Gi:/scratch"]
        {
            assert!(volume(text).is_ok(), "{text}");
        }
        for (text, part) in [
            ("data", "such as"),
            ("nfs:a:/b", "as its kind"),
            ("secrets:a:/b", "did you mean \"secret\"?"),
            ("pvc:data", "its source and path"),
            ("pvc:Data:/data", "name of an object"),
            ("empty:big:/a", "a size"),
            ("pvc:a:data", "absolute"),
            ("pvc:a:/data/../b", "without `..`"),
            ("pvc:a:/", "absolute"),
            ("secret:a:/b:ro", "that is for `pvc`"),
            ("pvc:a:/b:rw", "the default"),
            ("pvc:a:/b:/c", "one path"),
            ("empty:1Gi:/run/fairing/x", "fairing's"),
            ("empty:1Gi:/tmp", "tmp_size"),
        ] {
            let error = volume(text).err().unwrap();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn gpus_have_a_number_and_perhaps_a_name() {
        for (text, expected) in
            [("1", (DEFAULT_GPU, 1)), ("0", (DEFAULT_GPU, 0)), ("amd.com/gpu=8", ("amd.com/gpu", 8))]
        {
            assert_eq!(gpu(text), Ok(expected), "{text}");
        }
        for text in
            ["", "-1", "+1", "1.5", "gpu=1", "cpu=1", "kubernetes.io/gpu=1", "amd.com/gpu", "amd.com/gpu=", "a b/c=1"]
        {
            assert!(gpu(text).is_err(), "{text}");
        }
    }

    #[test]
    fn spans_are_whole_seconds() {
        assert!(span(Duration::ZERO).is_ok() && deadline(Duration::ZERO).is_err());
        assert!(span(Duration::from_millis(1500)).is_err() && span(SPAN_MAX).is_ok());
        assert!(deadline(SPAN_MAX + Duration::from_secs(1)).is_err());
    }
}
