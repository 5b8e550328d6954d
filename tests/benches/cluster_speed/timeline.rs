//! What happened when in one run, as everybody saw it.

use crate::audit::Request;
use crate::place::USER;
use crate::processes::load;
use crate::run::Measured;

/// Longest text of a line.
const WIDTH: usize = 150;

/// Prints one line for each thing that happened, with the ms since the launcher was started.
pub(crate) fn print(run: &Measured) {
    let mut lines: Vec<(f64, String)> = Vec::new();
    for request in &run.requests {
        if let Some(who) = who(request) {
            let Request { verb, resource, name, received, answered, ended, status, is_stream, .. } = request;
            let took = answered - received;
            lines.push((*received, format!("{who:<11} {verb} {resource} {name} -> {status} after {took:.1} ms")));
            if *is_stream && *ended <= run.exited {
                lines.push((*ended, format!("{who:<11} end of the stream {verb} {resource} {name}")));
            }
        }
    }
    for (at, line) in &run.lines {
        lines.push((*at, format!("terminal    {line}")));
        // What a replica says with a time happened then.
        if let Some((head, time)) = line.rsplit_once(' ')
            && head.contains(" | ")
            && let Some(time) = time.parse().ok().filter(|time| (run.began..*at).contains(time))
        {
            lines.push((time, format!("replica     {head}")));
        }
    }
    lines.extend(run.ends.iter().map(|(name, at)| (*at, format!("process     {name} has ended"))));
    lines.extend(
        run.seen.iter().map(|seen| (seen.at, format!("seen        {} {} {:?}", seen.kind, seen.name, seen.state))),
    );
    lines.push((run.exited, "process     the launcher has ended".to_owned()));
    lines.sort_by(|one, other| one.0.total_cmp(&other.0));
    println!("\nms since the launch (load {})", load());
    for (at, text) in lines {
        let text: String = text.chars().take(WIDTH).collect();
        println!("{:>8.1}  {text}", at - run.began);
    }
}

/// Who asks, if it is about the run: the launcher always, parts of Kubernetes if they change something.
fn who(request: &Request) -> Option<&str> {
    if request.user == USER {
        return Some("launcher");
    }
    // A pod's Secret is asked for before its container starts.
    let is_change = request.resource == "secrets" || !["get", "list", "watch"].contains(&request.verb.as_str());
    let is_of_run = ["pods", "jobs", "secrets", "services", "endpoints"].contains(&request.resource.split('/').next()?);
    if !is_change || !is_of_run {
        return None;
    }
    let user = request.user.rsplit(':').next()?;
    Some(match user {
        "node-1" => "kubelet",
        "kube-scheduler" => "scheduler",
        "job-controller" => "job-ctrl",
        "generic-garbage-collector" => "garbage",
        user => user,
    })
}
