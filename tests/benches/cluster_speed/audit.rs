//! Who asked the API server what, and when: its audit log.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use anyhow::Context as _;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

/// The log, and how much of it is known.
pub(crate) struct Audit {
    path: PathBuf,
}

/// A request, whose lines in the log are one: a stream has two, of its beginning and of its end.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) user: String,
    /// As Kubernetes names it, such as `deletecollection`.
    pub(crate) verb: String,
    /// Such as `pods/log`.
    pub(crate) resource: String,
    /// The object, if it is about one.
    pub(crate) name: String,
    /// When it came, in ms.
    pub(crate) received: f64,
    /// When it was answered; a stream when its first byte was sent.
    pub(crate) answered: f64,
    /// When it was over, the stream too.
    pub(crate) ended: f64,
    /// The status of the answer, as in HTTP.
    pub(crate) status: u64,
    pub(crate) is_stream: bool,
}

impl Audit {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where the log ends now.
    pub(crate) fn end(&self) -> anyhow::Result<u64> {
        Ok(std::fs::metadata(&self.path).with_context(|| format!("no {}", self.path.display()))?.len())
    }

    /// All requests that were logged behind `begin`, in the order in which they came.
    pub(crate) fn since(&self, begin: u64) -> anyhow::Result<Vec<Request>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(begin))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let mut requests: BTreeMap<String, Request> = BTreeMap::new();
        // The last line may be in the making.
        for line in text.lines() {
            let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
            let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let time = |name: &str| word(&line[name]).parse::<Timestamp>().map(ms);
            let (received, at) = (time("requestReceivedTimestamp")?, time("stageTimestamp")?);
            let object = &line["objectRef"];
            let resource = match object["subresource"].as_str() {
                Some(subresource) => format!("{}/{subresource}", word(&object["resource"])),
                None => word(&object["resource"]),
            };
            let verb = word(&line["verb"]);
            let is_stream = verb == "watch" || ["pods/log", "pods/portforward"].contains(&resource.as_str());
            let request = requests.entry(word(&line["auditID"])).or_insert(Request {
                user: word(&line["user"]["username"]),
                verb,
                resource,
                name: word(&object["name"]),
                received,
                answered: at,
                ended: at,
                status: 0,
                is_stream,
            });
            request.answered = request.answered.min(at);
            request.ended = request.ended.max(at);
            request.status = line["responseStatus"]["code"].as_u64().unwrap_or(request.status);
        }
        let mut requests: Vec<Request> = requests.into_values().collect();
        requests.sort_by(|one, other| one.received.total_cmp(&other.received));
        Ok(requests)
    }
}

fn ms(time: Timestamp) -> f64 {
    time.as_nanosecond() as f64 / 1e6
}

/// How often what was asked, the most frequent first.
pub(crate) fn by_kind<'a>(requests: impl IntoIterator<Item = &'a Request>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for request in requests {
        *counts.entry(format!("{} {}", request.verb, request.resource)).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
}
