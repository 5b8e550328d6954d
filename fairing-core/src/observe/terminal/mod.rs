//! What a person sees of a run while it goes on.
//!
//! [`terminal()`] chooses: a live view with a bar per worker where standard error is a terminal, else plain lines
//! without any escape code. Both show the same: how far each worker is, its metrics and its speed, a line for each
//! finished epoch, and every line of the replicas with the replica's name before it. What fairing says goes to standard
//! error; a replica's lines go to the stream of the same name.
//!
//! Bars are drawn here and not by a library: a frame is one write, a terminal that goes away is no panic, and time comes
//! from the caller.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use super::clean;
use super::events::{Event, Stream};
use crate::config::Env;
use crate::topology::{Replica, Role, Topology};

mod board;
mod live;
mod plain;
#[cfg(test)]
mod testing;

/// Shows the events of one run.
///
/// Output that fails, for example because its reader has gone (`cargo run | head`), is dropped: a run does not end for
/// want of a reader.
pub trait View: Send {
    /// Shows one event; `now` is when it happened.
    fn show(&mut self, event: &Event, now: Instant);

    /// To be called now and then (a few times a second) while nothing happens, so that clocks move on.
    fn tick(&mut self, now: Instant);

    /// Prints a text of fairing's own, one or more lines, to standard error. Also after [`View::finish`].
    fn say(&mut self, text: &str);

    /// Ends the show, however the run ended: says what is still to say and takes the bars away.
    fn finish(&mut self, now: Instant);
}

/// The view that suits this process's standard streams.
///
/// Of the environment it reads `NO_COLOR` (if not empty, nothing is coloured) and `TERM` (`dumb` means plain lines).
pub fn terminal(topology: Topology, env: &impl Env) -> Box<dyn View> {
    let colour = env.get("NO_COLOR").is_none_or(|value| value.is_empty());
    let capable = env.get("TERM").is_some_and(|term| !term.is_empty() && term != "dumb");
    let stream = |terminal: bool, to: Box<dyn Write + Send>| {
        let terminal = terminal && capable;
        Sink::new(to, terminal, terminal && colour)
    };
    let out = stream(io::stdout().is_terminal(), Box::new(io::stdout()));
    let err = stream(io::stderr().is_terminal(), Box::new(io::stderr()));
    if err.terminal {
        Box::new(live::Live::new(topology, out, err, Box::new(stderr_size)))
    } else {
        Box::new(plain::Plain::new(topology, out, err))
    }
}

/// Prints a text that was asked for to standard output. A reader that has gone is no failure.
pub fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
    let _ = io::stdout().flush();
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy)]
struct Size {
    columns: usize,
    rows: usize,
}

fn stderr_size() -> Size {
    // A terminal that does not know its size says 0, or nothing; this is what it most probably shows.
    const USUAL: Size = Size { columns: 80, rows: 24 };
    match rustix::termios::tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
            Size { columns: size.ws_col.into(), rows: size.ws_row.into() }
        }
        _ => USUAL,
    }
}

/// One of the two standard streams, or what stands in for it.
struct Sink {
    /// `None` once nobody reads it any more.
    to: Option<Box<dyn Write + Send>>,
    terminal: bool,
    colour: bool,
}

impl Sink {
    fn new(to: Box<dyn Write + Send>, terminal: bool, colour: bool) -> Self {
        Self { to: Some(to), terminal, colour }
    }

    fn write(&mut self, text: &str) {
        let Some(to) = &mut self.to else { return };
        // Any other failure may pass (a disk that is full just now), a reader that has gone does not come back.
        if let Err(error) = to.write_all(text.as_bytes()).and_then(|()| to.flush())
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            self.to = None;
        }
    }
}

/// How something of fairing's own is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tone {
    Info,
    Warning,
    Bad,
}

/// A line of fairing's own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Note {
    tone: Tone,
    text: String,
}

const RED: u8 = 31;
const YELLOW: u8 = 33;
const GREY: u8 = 90;

/// One per replica, over and over; without red and yellow, which mean something.
const PALETTE: [u8; 8] = [36, 35, 32, 34, 96, 95, 92, 94];

fn replica_colour(topology: Topology, replica: Replica) -> u8 {
    let index = match replica.role {
        Role::Worker => replica.rank.index(),
        Role::Ps => topology.worker_count() + replica.rank.index(),
    };
    PALETTE[index % PALETTE.len()]
}

fn paint(text: &str, colour: u8, on: bool) -> String {
    if on { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
}

impl Note {
    /// The note as lines with their ends.
    fn rendered(&self, colour: bool) -> String {
        let text = clean::plain(&self.text);
        let painted = match self.tone {
            Tone::Info => text,
            Tone::Warning => paint(&text, YELLOW, colour),
            Tone::Bad => paint(&text, RED, colour),
        };
        format!("{painted}\n")
    }
}

/// What a replica wrote, as lines with their ends, its name before each.
fn replica_lines(topology: Topology, replica: Replica, stream: Stream, text: &str, sink: &Sink) -> String {
    let name = replica.to_string();
    let prefix = if sink.terminal {
        // Names of one width, so that the lines of all replicas begin in one column.
        let widest = topology.replicas().map(|replica| replica.to_string().len()).max().unwrap_or(0);
        let name = paint(&format!("{name:widest$}"), replica_colour(topology, replica), sink.colour);
        let bar =
            if stream == Stream::Stderr { paint("│", RED, sink.colour) } else { paint("│", GREY, sink.colour) };
        format!("{name} {bar} ")
    } else {
        format!("{name} | ")
    };
    let line = |line| if sink.colour { clean::coloured(line) } else { clean::plain(line) };
    text.split('\n').map(|text| format!("{prefix}{}\n", line(text))).collect()
}
