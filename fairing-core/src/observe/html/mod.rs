//! A run as one page: `report.html`, which needs nothing but a browser, no network and no script.
//!
//! [`page`] is a pure function of the [`Summary`] and the [`Metrics`]; the look is in `style.css`, the curves are drawn in
//! `chart`. Links are relative, so that the run's folder can be moved or sent.

mod chart;
mod series;

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use self::chart::{Chart, Line, Size};
use self::series::{Point, decimate, drawable, trend};
use super::events::Metric;
use super::metrics::Metrics;
use super::report::{Phase, Status, Summary, WorkerFacts};
use super::{clean, words};
use crate::topology::{Replica, Role};

/// Points of a merged curve: twice as many as a chart has pixels.
const MOST_POINTS: usize = 1_000;

/// Points of all the workers' curves of one chart together, and of the least detailed of them: a page of a large run is to
/// stay small enough to be sent.
const MOST_RANK_POINTS: usize = 3_200;
const LEAST_RANK_POINTS: usize = 100;

/// Curves of more workers than this are a wash of colour.
const MOST_RANKS: usize = 64;

/// Colours of the workers' curves in `style.css`; with more workers all have one.
const COLOURS: usize = 8;

/// Colours of phases in `style.css`.
const PHASE_COLOURS: usize = 5;

/// Metrics among the large figures at the top; a table further down has all.
const FIGURES: usize = 4;

/// Replicas of one role that are drawn; of more, the first and the last.
const MOST_DRAWN: usize = 6;

/// The page of a run that has ended, however it ended.
pub fn page(summary: &Summary, metrics: &Metrics) -> String {
    let mut page = Page(String::with_capacity(64 << 10));
    let title = text(&summary.type_name);
    page.put(&format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"generator\" content=\"fairing {version}\">\n<title>{title}: {run}</title>\n\
         <style>\n{style}</style>\n</head>\n<body>\n<main>\n",
        version = text(&summary.versions.fairing),
        run = text(&summary.run),
        style = include_str!("style.css"),
    ));
    page.head(summary);
    page.figures(summary);
    page.curves(metrics);
    page.put("<div class=\"two\">\n");
    page.phases(summary);
    page.topology(summary);
    page.put("</div>\n");
    page.metrics(metrics);
    page.workers(&summary.workers);
    page.put("<div class=\"two\">\n");
    page.hyperparameters(&summary.hyperparameters);
    page.files(summary);
    page.put("</div>\n");
    page.origin(summary);
    page.put(&format!(
        "<footer>Written by fairing {} when the run ended.</footer>\n</main>\n</body>\n</html>\n",
        text(&summary.versions.fairing)
    ));
    page.0
}

/// The page in the making.
struct Page(String);

impl Page {
    fn put(&mut self, html: &str) {
        self.0.push_str(html);
    }

    fn head(&mut self, summary: &Summary) {
        let (class, state) = match &summary.status {
            Status::Succeeded => ("succeeded", "succeeded"),
            Status::Stopped => ("stopped", "stopped by the caller"),
            Status::Incomplete { .. } => ("stopped", "incomplete"),
            Status::Failed { .. } => ("failed", "failed"),
        };
        let mode = summary.mode.as_deref().map(|mode| format!(" · {}", text(mode))).unwrap_or_default();
        self.put(&format!(
            "<header>\n<h1>{}</h1><span class=\"status {class}\">{state}</span>\n<p>{}{mode} · seed {} · {}</p>\n",
            text(&summary.type_name),
            text(&summary.topology.to_string()),
            summary.seed,
            started(summary),
        ));
        if let Status::Failed { cause } | Status::Incomplete { lost: cause } = &summary.status {
            self.put(&format!("<div class=\"cause\"><h2>Cause</h2>\n<pre>{}</pre></div>\n", lines(cause)));
        }
        self.put("</header>\n");
    }

    fn figures(&mut self, summary: &Summary) {
        let mut figures: Vec<(String, String)> = summary
            .metrics
            .iter()
            .take(FIGURES)
            .map(|(name, value)| (text(name), with_small_exponent(&words::number(*value))))
            .collect();
        figures.push(("time".to_owned(), text(&time(summary.seconds))));
        if let Some(rate) = summary.examples_per_second.filter(|rate| rate.is_finite()) {
            figures.push(("examples/s".to_owned(), words::thousands(rate.round() as u64)));
        }
        if summary.examples > 0 {
            figures.push(("examples".to_owned(), words::thousands(summary.examples)));
        }
        self.put("<dl class=\"figures\">\n");
        for (name, value) in figures {
            self.put(&format!("<div><dt>{name}</dt><dd>{value}</dd></div>\n"));
        }
        self.put("</dl>\n");
    }

    fn curves(&mut self, metrics: &Metrics) {
        let names = metrics.names();
        let mut figures = Vec::new();
        let (mut most_ranks, mut any_trend, mut any_epoch) = (0, false, false);
        for name in &names {
            let all: Vec<&Metric> = metrics.series(name).collect();
            let last = all.last().map_or(f64::NAN, |metric| metric.value);
            let label = format!("{} over {} rounds, at last {}", text(name), all.len(), words::number(last));
            let column = Curves::new(&all, Size::Column);
            let (ranks, has_trend, has_epochs) = (column.ranks, column.has_trend, !column.chart.epochs.is_empty());
            let Some(drawn) = column.chart.draw(Size::Column, &label) else { continue };
            most_ranks = most_ranks.max(ranks);
            any_trend |= has_trend;
            any_epoch |= has_epochs;
            let scale = if drawn.logarithmic { "logarithmic · " } else { "" };
            let head = format!(
                "<figcaption><span>{}</span><span>{scale}last {}</span></figcaption>\n",
                text(name),
                words::number(last)
            );
            let mut note = String::new();
            let not_drawn = all.iter().filter(|metric| drawable(metric.value).is_nan()).count();
            if not_drawn > 0 {
                let values = if not_drawn == 1 { "value is" } else { "values are" };
                note = format!("<p>{} {values} no number and not drawn.</p>\n", words::thousands(not_drawn as u64));
            }
            figures.push(Figure { all, label, head, column: drawn.svg, note });
        }
        if figures.is_empty() {
            return;
        }
        // In two columns an odd number leaves a hole, so the first one, most often the loss, gets the whole width.
        let wide = figures.len() % 2;
        let mut charts = String::new();
        for (number, Figure { all, label, head, column, note }) in figures.into_iter().enumerate() {
            let page = if number < wide { Curves::new(&all, Size::Page).chart.draw(Size::Page, &label) } else { None };
            let (class, page) = page.map_or(("", String::new()), |drawn| (" class=\"wide\"", drawn.svg));
            write!(charts, "<figure{class}>\n{head}{page}{column}{note}</figure>\n").expect("a string can be written");
        }
        let swatch = |class: &str, what: &str| {
            format!(
                "<li><svg viewBox=\"0 0 26 10\" aria-hidden=\"true\"><path class=\"{class}\" d=\"M1 5H25\"/></svg>{what}</li>\n"
            )
        };
        self.put("<section>\n<h2>Curves <small>by round</small></h2>\n<ul class=\"legend\">\n");
        self.put(&swatch("line mean", if most_ranks > 0 { "mean over the workers" } else { "value by round" }));
        if any_trend {
            self.put(&swatch("line trend", "trend of the mean"));
        }
        match most_ranks {
            0 => {}
            ranks if ranks <= COLOURS => {
                for rank in 0..ranks {
                    self.put(&swatch(
                        &format!("line {}", rank_class(rank, ranks)),
                        &Replica::worker(rank as u32).to_string(),
                    ));
                }
            }
            ranks => self.put(&swatch(&format!("line {}", rank_class(0, ranks)), "each worker")),
        }
        if any_epoch {
            self.put(&swatch("epoch-begin", "an epoch begins"));
        }
        self.put(&format!("</ul>\n<div class=\"charts\">\n{charts}</div>\n</section>\n"));
    }

    fn phases(&mut self, summary: &Summary) {
        let total: f64 = summary.phases.iter().map(|phase| phase.seconds).sum();
        if total <= 0.0 || !total.is_finite() {
            return;
        }
        self.put("<section>\n<h2>Time</h2>\n<div class=\"card\">\n<div class=\"bar\" aria-hidden=\"true\">");
        for (number, Phase { seconds, .. }) in summary.phases.iter().enumerate() {
            let class = number % PHASE_COLOURS;
            self.put(&format!("<i class=\"phase{class}\" style=\"flex:{:.4} 0 0\"></i>", 100.0 * seconds / total));
        }
        self.put("</div>\n<table>\n<tbody>\n");
        for (number, Phase { name, seconds }) in summary.phases.iter().enumerate() {
            self.put(&format!(
                "<tr><th scope=\"row\"><span class=\"key phase{}\"></span>{}</th><td class=\"number\">{}</td>\
                 <td class=\"number\">{:.0} %</td></tr>\n",
                number % PHASE_COLOURS,
                text(name),
                time(*seconds),
                100.0 * seconds / total,
            ));
        }
        self.put("</tbody>\n</table>\n</div>\n</section>\n");
    }

    fn topology(&mut self, summary: &Summary) {
        let of =
            |role| -> Vec<Replica> { summary.topology.replicas().filter(|replica| replica.role == role).collect() };
        let (servers, workers) = (row(&of(Role::Ps)), row(&of(Role::Worker)));
        let coordinator = summary.topology.coordinator();
        self.put("<section>\n<h2>Topology</h2>\n<div class=\"card\">\n");
        self.put(&format!(
            "<svg class=\"topology\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 460 170\">\n",
            text(&summary.topology.to_string())
        ));
        const SERVERS_AT: f64 = 40.0;
        const WORKERS_AT: f64 = 132.0;
        for (worker, x) in workers.iter().filter(|(replica, _)| replica.is_some()) {
            for (_, server_x) in servers.iter().filter(|(replica, _)| replica.is_some()) {
                self.put(&format!(
                    "<path class=\"wire\" d=\"M{server_x:.1} {SERVERS_AT}C{server_x:.1} 90 {x:.1} 82 {x:.1} {WORKERS_AT}\"/>\n"
                ));
            }
            if servers.is_empty() && worker.is_some() {
                self.put(&format!(
                    "<path class=\"wire\" d=\"M230 {SERVERS_AT}C230 90 {x:.1} 82 {x:.1} {WORKERS_AT}\"/>\n"
                ));
            }
        }
        for (replicas, y) in [(&servers, SERVERS_AT), (&workers, WORKERS_AT)] {
            let width = (440.0 / replicas.len().max(1) as f64 - 10.0).min(92.0);
            let short = width < 66.0;
            if short {
                let (y, what) = if y == SERVERS_AT { (y - 24.0, "parameter servers") } else { (y + 32.0, "workers") };
                self.put(&format!("<text class=\"note\" x=\"230\" y=\"{y:.1}\">{what}</text>\n"));
            }
            for (replica, x) in replicas {
                let Some(replica) = replica else {
                    self.put(&format!("<text class=\"name\" x=\"{x:.1}\" y=\"{:.1}\">…</text>\n", y + 4.5));
                    continue;
                };
                let class = if replica.role == Role::Ps { "node server" } else { "node" };
                // Seven boxes in a row have no room for the word.
                let name = if short { replica.rank.to_string() } else { replica.to_string() };
                self.put(&format!(
                    "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"32\" rx=\"7\"/>\n\
                     <text class=\"name\" x=\"{x:.1}\" y=\"{:.1}\">{name}</text>\n",
                    x - width / 2.0,
                    y - 16.0,
                    y + 4.5,
                ));
                if *replica == coordinator && !short {
                    let y = if replica.role == Role::Ps { y - 24.0 } else { y + 31.0 };
                    self.put(&format!("<text class=\"note\" x=\"{x:.1}\" y=\"{y:.1}\">coordinator</text>\n"));
                }
            }
        }
        self.put("</svg>\n</div>\n</section>\n");
    }

    fn metrics(&mut self, metrics: &Metrics) {
        let names = metrics.names();
        if names.is_empty() {
            return;
        }
        self.put(
            "<section>\n<h2>Metrics</h2>\n<div class=\"card scroll\">\n<table>\n<thead><tr><th scope=\"col\">name</th>\
             <th class=\"number\" scope=\"col\">last</th><th class=\"number\" scope=\"col\">least</th>\
             <th class=\"number\" scope=\"col\">greatest</th><th class=\"number\" scope=\"col\">values</th></tr></thead>\n<tbody>\n",
        );
        for name in names {
            let (mut count, mut last, mut least, mut greatest) = (0, f64::NAN, f64::NAN, f64::NAN);
            for metric in metrics.series(name) {
                count += 1;
                last = metric.value;
                // Both leave out what is NaN.
                least = metric.value.min(least);
                greatest = metric.value.max(greatest);
            }
            self.put(&format!("<tr><th scope=\"row\">{}</th>", text(name)));
            for number in [words::number(last), words::number(least), words::number(greatest), words::thousands(count)]
            {
                self.put(&format!("<td class=\"number\">{number}</td>"));
            }
            self.put("</tr>\n");
        }
        self.put("</tbody>\n</table>\n</div>\n</section>\n");
    }

    fn workers(&mut self, workers: &[WorkerFacts]) {
        if workers.is_empty() {
            return;
        }
        type Column = (&'static str, fn(&WorkerFacts) -> String, fn(&WorkerFacts) -> bool);
        // The third says whether there is anything to see; a column of zeros is left out.
        let columns: [Column; 10] = [
            ("steps", |facts| words::thousands(facts.steps), |_| true),
            ("examples", |facts| words::thousands(facts.examples), |_| true),
            ("median step", |facts| words::short_time(facts.step_seconds_median), |_| true),
            ("95th percentile", |facts| words::short_time(facts.step_seconds_p95), |_| true),
            ("waited", |facts| time(facts.wait_seconds), |_| true),
            ("mean staleness", |facts| format!("{:.2}", facts.staleness_mean), |facts| facts.staleness_max > 0),
            ("most", |facts| words::thousands(facts.staleness_max), |facts| facts.staleness_max > 0),
            ("dropped", |facts| words::thousands(facts.dropped_examples), |facts| facts.dropped_examples > 0),
            ("repeated", |facts| words::thousands(facts.repeated_examples), |facts| facts.repeated_examples > 0),
            ("restarts", |facts| facts.restarts.to_string(), |facts| facts.restarts > 0),
        ];
        let columns: Vec<_> = columns.into_iter().filter(|(_, _, seen)| workers.iter().any(seen)).collect();
        self.put("<section>\n<h2>Workers</h2>\n<div class=\"card scroll\">\n<table>\n<thead><tr><th scope=\"col\">worker</th>");
        for (name, _, _) in &columns {
            self.put(&format!("<th class=\"number\" scope=\"col\">{name}</th>"));
        }
        self.put("</tr></thead>\n<tbody>\n");
        for facts in workers {
            self.put(&format!("<tr><th scope=\"row\">{}</th>", facts.rank));
            for (_, show, _) in &columns {
                self.put(&format!("<td class=\"number\">{}</td>", text(&show(facts))));
            }
            self.put("</tr>\n");
        }
        self.put("</tbody>\n</table>\n</div>\n</section>\n");
    }

    fn hyperparameters(&mut self, value: &serde_json::Value) {
        let show = |value: &serde_json::Value| match value {
            serde_json::Value::String(value) => text(value),
            value => text(&value.to_string()),
        };
        let fields: Vec<(String, String)> = match value {
            serde_json::Value::Object(fields) => fields.iter().map(|(name, value)| (text(name), show(value))).collect(),
            serde_json::Value::Null => Vec::new(),
            value => vec![("value".to_owned(), show(value))],
        };
        if fields.is_empty() {
            return;
        }
        self.put("<section>\n<h2>Hyperparameters</h2>\n<div class=\"card\">\n");
        self.facts("facts", fields.into_iter().map(|(name, value)| (name, format!("<code>{value}</code>"))));
        self.put("</div>\n</section>\n");
    }

    fn files(&mut self, summary: &Summary) {
        let files = &summary.files;
        let named = [
            (&files.model, "the trained model"),
            (&files.safetensors, "the same for programs in other languages"),
            (&files.metrics, "every value of every round"),
            (&files.tensorboard, "event files for TensorBoard"),
        ];
        self.put("<section>\n<h2>Files</h2>\n<div class=\"card\">\n<ul class=\"files\">\n");
        for (path, what) in named {
            if let Some(path) = path {
                self.put(&format!("<li>{}<span>{what}</span></li>\n", link(path)));
            }
        }
        self.put(&format!("<li>{}<span>what this page is made of</span></li>\n", link(Path::new("summary.json"))));
        if !files.logs.is_empty() {
            let logs: Vec<String> = files.logs.iter().map(|log| link(log)).collect();
            self.put(&format!("<li>{}</li>\n", logs.join(", ")));
        }
        self.put("</ul>\n</div>\n</section>\n");
    }

    /// What would be needed to get the same again.
    fn origin(&mut self, summary: &Summary) {
        let mut facts = vec![("run", text(&summary.run)), ("started", started(summary))];
        let host = &summary.host;
        let cpus = if host.cpus == 1 { "processor" } else { "processors" };
        facts.push(("host", format!("{} {}, {} {cpus}", text(&host.os), text(&host.arch), host.cpus)));
        let versions = &summary.versions;
        let mut made_of = vec![format!("fairing {}", text(&versions.fairing))];
        made_of.extend(versions.burn.as_ref().map(|version| format!("burn {}", text(version))));
        made_of.extend(versions.rustc.as_ref().map(|version| {
            let version = text(version);
            if version.starts_with("rustc") { version } else { format!("rustc {version}") }
        }));
        facts.push(("versions", made_of.join("<br>")));
        facts.extend(summary.opt_level.as_ref().map(|level| ("optimisation", format!("level {}", text(level)))));
        if let Some(commit) = &summary.git {
            let state = match commit.dirty {
                Some(true) => " with changes that are not committed",
                Some(false) => "",
                None => ", perhaps with changes that are not committed",
            };
            facts.push(("git commit", format!("<code>{}</code>{state}", text(&commit.id))));
        }
        let hashes = [("program", &summary.hashes.program), ("data", &summary.hashes.data)];
        facts.extend(
            hashes
                .into_iter()
                .filter_map(|(what, hash)| Some((what, format!("<code>sha256:{}</code>", text(hash.as_deref()?))))),
        );
        self.put("<section>\n<h2>Origin</h2>\n<div class=\"card\">\n");
        self.facts("facts origin", facts.into_iter().map(|(name, value)| (name.to_owned(), value)));
        self.put("</div>\n</section>\n");
    }

    /// Names and values, both of them HTML.
    fn facts(&mut self, class: &str, facts: impl Iterator<Item = (String, String)>) {
        self.put(&format!("<dl class=\"{class}\">\n"));
        for (name, value) in facts {
            self.put(&format!("<dt>{name}</dt><dd>{value}</dd>\n"));
        }
        self.put("</dl>\n");
    }
}

/// What becomes one figure of the page.
struct Figure<'a> {
    all: Vec<&'a Metric>,
    label: String,
    head: String,
    column: String,
    note: String,
}

/// The curves of one metric.
struct Curves {
    chart: Chart,
    /// Workers with a curve of their own.
    ranks: usize,
    has_trend: bool,
}

impl Curves {
    fn new(all: &[&Metric], size: Size) -> Self {
        let merged: Vec<Point> = all.iter().map(|metric| (metric.round as f64, drawable(metric.value))).collect();
        let trend = trend(&merged, size.stretches());
        let has_trend = !trend.is_empty();
        // What a trend is drawn over steps back.
        let busy = if has_trend { " busy" } else { "" };
        let ranks = all.iter().map(|metric| metric.ranks.len()).max().unwrap_or(0);
        // One worker's curve is the merged one.
        let ranks = if (2..=MOST_RANKS).contains(&ranks) { ranks } else { 0 };
        let most = (MOST_RANK_POINTS / ranks.max(1)).clamp(LEAST_RANK_POINTS, MOST_POINTS);
        let mut lines = Vec::new();
        for rank in 0..ranks {
            let value = |metric: &Metric| metric.ranks.get(rank).copied().flatten().map_or(f64::NAN, drawable);
            let points: Vec<Point> = all.iter().map(|metric| (metric.round as f64, value(metric))).collect();
            lines.push(Line { class: format!("{}{busy}", rank_class(rank, ranks)), points: decimate(&points, most) });
        }
        lines.push(Line { class: format!("mean{busy}"), points: decimate(&merged, MOST_POINTS) });
        if has_trend {
            lines.push(Line { class: "trend".to_owned(), points: trend });
        }
        let begins = all.windows(2).filter(|pair| pair[0].epoch != pair[1].epoch).map(|pair| pair[1].round as f64);
        let epochs: Vec<f64> = begins.collect();
        // A value per epoch, or hundreds of epochs, would be a hatching.
        let epochs = if epochs.len() <= 20 && 3 * epochs.len() < all.len() { epochs } else { Vec::new() };
        Self { chart: Chart { lines, epochs }, ranks, has_trend }
    }
}

fn rank_class(rank: usize, ranks: usize) -> String {
    let colour = if ranks <= COLOURS { rank } else { COLOURS - 1 };
    format!("rank rank{colour}")
}

/// Replicas with their places in a row 460 wide; `None` stands for those that are not drawn.
fn row(replicas: &[Replica]) -> Vec<(Option<Replica>, f64)> {
    let drawn: Vec<Option<Replica>> = match replicas {
        [first @ .., last] if replicas.len() > MOST_DRAWN => {
            let first = first.iter().take(MOST_DRAWN - 2).copied().map(Some);
            first.chain([None, Some(*last)]).collect()
        }
        all => all.iter().copied().map(Some).collect(),
    };
    let width = 440.0 / drawn.len().max(1) as f64;
    drawn.into_iter().enumerate().map(|(i, replica)| (replica, 10.0 + width * (i as f64 + 0.5))).collect()
}

/// One line of text from elsewhere: without control characters, and without meaning for HTML.
fn text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in clean::plain(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Overrides of the direction of text could make it read as something else.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            c => escaped.push(c),
        }
    }
    escaped
}

/// Several lines of text from elsewhere.
fn lines(several: &str) -> String {
    several.trim_end().split('\n').map(text).collect::<Vec<_>>().join("\n")
}

/// A link to a file of the run's folder.
fn link(path: &Path) -> String {
    // `./` keeps a name with a colon from being a scheme.
    let mut address = String::from("./");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'/' => address.push(char::from(*byte)),
            byte => write!(address, "%{byte:02X}").expect("a string can be written"),
        }
    }
    format!("<a href=\"{address}\">{}</a>", text(&path.display().to_string()))
}

/// `1.250e-5` with a quieter exponent.
fn with_small_exponent(number: &str) -> String {
    match number.split_once('e') {
        Some((digits, exponent)) => format!("{}<small>e{}</small>", text(digits), text(exponent)),
        None => text(number),
    }
}

fn time(seconds: f64) -> String {
    words::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

/// `2026-01-02 03:04:05 UTC`.
fn started(summary: &Summary) -> String {
    let stamp = humantime::format_rfc3339_seconds(summary.started).to_string();
    stamp.replace('T', " ").replace('Z', " UTC")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::observe::git::Commit;
    use crate::observe::hashes::Hashes;
    use crate::observe::report::{Files, Host, Versions};
    use crate::topology::{Rank, Topology};

    fn summary() -> Summary {
        let phases = [("start", 0.1), ("join", 0.1), ("train", 9.0)];
        Summary {
            run: "FashionMnist-20260102-030405-a1b2".into(),
            type_name: "FashionMnist".into(),
            status: Status::Succeeded,
            topology: Topology::new(2, 1),
            mode: Some("sync".into()),
            seed: 7,
            hyperparameters: serde_json::json!({"epochs": 5, "name": "plain", "nested": {"a": [1, 2]}}),
            started: UNIX_EPOCH + Duration::from_secs(1_767_323_045),
            seconds: 9.2,
            phases: phases.map(|(name, seconds)| Phase { name: name.into(), seconds }).into(),
            examples: 300_000,
            examples_per_second: Some(32_967.03),
            metrics: [("loss".to_owned(), 0.31214)].into(),
            workers: Vec::new(),
            versions: Versions::default(),
            opt_level: None,
            git: Some(Commit { id: "0123456789abcdef".into(), dirty: Some(true) }),
            hashes: Hashes { program: Some("ab".repeat(32)), data: None },
            host: Host { os: "linux".into(), arch: "x86_64".into(), cpus: 2 },
            files: Files { model: Some("model.bpk".into()), ..Files::default() },
        }
    }

    fn metrics(name: &str, rounds: u64, ranks: usize) -> Metrics {
        let mut metrics = Metrics::default();
        for round in 0..rounds {
            let value = 1.0 / (1.0 + round as f64);
            metrics.push(Metric {
                name: name.into(),
                epoch: round / 10,
                round,
                value,
                ranks: vec![Some(value); ranks],
            });
        }
        metrics
    }

    fn count(page: &str, part: &str) -> usize {
        page.matches(part).count()
    }

    /// What is no element without content has to be closed, in the right order.
    #[track_caller]
    fn is_well_formed(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        let body = page.split_once("</style>").expect("there is a style sheet").1;
        let body = body.strip_prefix("\n</head>").expect("the head ends with it");
        for tag in body.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("every `<` opens a tag, since text is escaped");
            let name = tag.trim_end_matches('/').split([' ', '\n']).next().unwrap();
            match name.strip_prefix('/') {
                Some("html") => {}
                Some(closed) => assert_eq!(open.pop(), Some(closed), "closed out of order"),
                None if tag.ends_with('/') || name == "br" => {}
                None => open.push(name),
            }
        }
        assert!(open.is_empty(), "{open:?} stay open");
    }

    #[test]
    fn every_page_is_well_formed_and_needs_nothing_else() {
        let facts = WorkerFacts {
            rank: Rank(1),
            steps: 100,
            examples: 3_200,
            dropped_examples: 0,
            repeated_examples: 32,
            step_seconds_median: 0.0123,
            step_seconds_p95: 0.02,
            wait_seconds: 1.5,
            staleness_mean: 0.0,
            staleness_max: 0,
            restarts: 1,
        };
        let pages = [
            page(&summary(), &Metrics::default()),
            page(&Summary { workers: vec![facts], ..summary() }, &metrics("loss", 100, 2)),
            page(&Summary { status: Status::Stopped, phases: vec![], ..summary() }, &metrics("loss", 1, 1)),
            page(
                &Summary {
                    topology: Topology::new(40, 9),
                    status: Status::Failed { cause: "a\nb".into() },
                    ..summary()
                },
                &metrics("loss", 30, 40),
            ),
        ];
        for page in pages {
            is_well_formed(&page);
            for outside in ["http:", "https:", "<script", "<link", "@import", "url(", " src="] {
                assert!(!page.contains(outside), "{outside}");
            }
        }
    }

    #[test]
    fn text_from_elsewhere_stays_text() {
        let evil = "</pre><script>alert('x')</script>\x1b[2J & \"y\"";
        let mut summary = summary();
        summary.type_name = evil.into();
        summary.run = evil.into();
        summary.mode = Some(evil.into());
        summary.status = Status::Failed { cause: format!("{evil}\n{evil}") };
        summary.metrics = [(evil.to_owned(), 1.0)].into();
        summary.hyperparameters = serde_json::json!({ evil: evil });
        summary.phases[0].name = evil.into();
        summary.host.os = evil.into();
        summary.versions.rustc = Some(evil.into());
        summary.hashes.data = Some(evil.into());
        summary.files.logs = vec![PathBuf::from(format!("logs/{evil}"))];
        let page = page(&summary, &metrics(evil, 40, 2));
        is_well_formed(&page);
        assert!(!page.contains("<script") && !page.contains('\x1b'));
        assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;y&quot;"));
    }

    #[test]
    fn curves_are_of_every_worker_and_of_the_mean() {
        let page = page(&summary(), &metrics("loss", 40, 3));
        assert_eq!(count(&page, "class=\"line rank rank2\""), 3, "a curve in two sizes and its legend");
        assert_eq!(count(&page, "class=\"line mean\""), 3);
        assert_eq!(count(&page, "class=\"epoch-begin\""), 2 * 3 + 1);
        assert!(!page.contains("class=\"line trend\""), "40 values need none");
    }

    #[test]
    fn one_worker_has_one_curve() {
        let page = page(&summary(), &metrics("loss", 5, 1));
        assert_eq!(count(&page, "class=\"line mean\""), 3);
        assert!(!page.contains("class=\"line rank"));
    }

    #[test]
    fn many_noisy_values_have_a_trend() {
        let smooth = metrics("loss", 1_000, 2);
        let mut noisy = Metrics::default();
        for (number, metric) in (0..).zip(smooth.all()) {
            noisy.push(Metric { value: metric.value + f64::from(number % 2), ..metric.clone() });
        }
        assert!(!page(&summary(), &smooth).contains("class=\"line trend\""));
        let page = page(&summary(), &noisy);
        assert_eq!(count(&page, "class=\"line trend\""), 3);
        assert_eq!(count(&page, "class=\"line mean busy\""), 2);
    }

    #[test]
    fn an_even_number_of_charts_has_no_wide_one() {
        let mut two = metrics("loss", 5, 1);
        assert_eq!(count(&page(&summary(), &two), "class=\"wide\""), 1);
        metrics("accuracy", 5, 1).all().iter().for_each(|metric| two.push(metric.clone()));
        assert_eq!(count(&page(&summary(), &two), "class=\"wide\""), 0);
    }

    #[test]
    fn a_long_run_has_a_small_page() {
        let page = page(&summary(), &metrics("loss", 50_000, 8));
        assert!(page.len() < 250_000, "{} bytes", page.len());
    }

    #[test]
    fn values_that_cannot_be_drawn_are_counted() {
        let mut metrics = metrics("loss", 20, 2);
        for value in [f64::NAN, f64::INFINITY] {
            metrics.push(Metric { name: "loss".into(), epoch: 2, round: 20, value, ranks: vec![None, None] });
        }
        assert!(page(&summary(), &metrics).contains("2 values are no number and not drawn."));
    }

    #[test]
    fn links_stay_in_the_folder() {
        assert_eq!(link(Path::new("logs/ps-0.log")), "<a href=\"./logs/ps-0.log\">logs/ps-0.log</a>");
        assert_eq!(link(Path::new("data:a b?.log")), "<a href=\"./data%3Aa%20b%3F.log\">data:a b?.log</a>");
    }

    #[test]
    fn many_replicas_are_drawn_as_a_few() {
        let workers: Vec<Replica> = (0..40).map(Replica::worker).collect();
        let drawn: Vec<Option<u32>> = row(&workers).into_iter().map(|(replica, _)| Some(replica?.rank.0)).collect();
        assert_eq!(drawn, [Some(0), Some(1), Some(2), Some(3), None, Some(39)]);
        assert_eq!(row(&workers[..6]).len(), 6);
    }
}
