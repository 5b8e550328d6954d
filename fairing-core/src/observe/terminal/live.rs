//! A bar per worker at the bottom of a terminal, everything else above.

use std::time::{Duration, Instant};

use super::super::clean;
use super::super::events::{Event, Stream};
use super::super::words;
use super::board::{Board, Worker};
use super::{Note, Sink, Size, View, paint, replica_colour, replica_lines};
use crate::topology::{Replica, Topology};

/// Twenty frames a second look smooth and cost nothing.
const FRAME_INTERVAL: Duration = Duration::from_millis(50);

/// More bars than this push the replicas' lines off the screen; further workers are counted.
const MAX_BARS: usize = 16;

/// Inner width of a bar, in characters.
const MIN_BAR: usize = 8;
const MAX_BAR: usize = 30;

/// Shows a run with bars that are drawn again and again in place.
pub(super) struct Live {
    board: Board,
    out: Sink,
    err: Sink,
    size: Box<dyn Fn() -> Size + Send>,
    /// Widths of the lines on the screen that the next frame replaces.
    drawn: Vec<usize>,
    drawn_at: Option<Instant>,
    finished: bool,
}

impl Live {
    pub(super) fn new(topology: Topology, out: Sink, err: Sink, size: Box<dyn Fn() -> Size + Send>) -> Self {
        Self { board: Board::new(topology), out, err, size, drawn: Vec::new(), drawn_at: None, finished: false }
    }

    /// Writes above the bars.
    fn above(&mut self, stream: Stream, text: &str) {
        if stream == Stream::Stderr {
            let erase = self.erase();
            self.err.write(&format!("{erase}{text}"));
            return;
        }
        // Output that goes elsewhere leaves the bars as they are.
        if self.out.terminal {
            let erase = self.erase();
            self.err.write(&erase);
        }
        self.out.write(text);
    }

    fn note(&mut self, notes: &[Note]) {
        if !notes.is_empty() {
            let colour = self.err.colour;
            let text: String = notes.iter().map(|note| note.rendered(colour)).collect();
            self.above(Stream::Stderr, &text);
        }
    }

    /// Draws if the last frame is old enough or has been erased.
    fn draw(&mut self, now: Instant) {
        let fresh = self.drawn_at.is_some_and(|at| now.saturating_duration_since(at) < FRAME_INTERVAL);
        if self.finished || fresh && !self.drawn.is_empty() {
            return;
        }
        let mut erase = self.erase();
        if erase.is_empty() && self.drawn_at.is_some() {
            // Behind what was written above the bars, the terminal may have echoed a key, such as `^C`.
            erase.push('\r');
        }
        let size = (self.size)();
        let lines = frame(&self.board, size, now);
        self.drawn = lines.iter().map(|(_, line)| line.chars().count()).collect();
        self.drawn_at = Some(now);
        let colour = self.err.colour;
        let painted: String = lines.iter().map(|(name, line)| paint_name(line, *name, colour) + "\n").collect();
        self.err.write(&format!("{erase}{painted}"));
    }

    /// What takes the last frame away and puts the cursor where it began.
    fn erase(&mut self) -> String {
        let columns = (self.size)().columns.max(1);
        // A terminal that has become narrower has wrapped what was drawn for the old width.
        let rows: usize = self.drawn.drain(..).map(|width| width.div_ceil(columns).max(1)).sum();
        if rows == 0 { String::new() } else { format!("\r\x1b[{rows}A\x1b[J") }
    }
}

impl View for Live {
    fn show(&mut self, event: &Event, now: Instant) {
        let notes = self.board.apply(event, now);
        self.note(&notes);
        if let Event::Line { replica, stream, text } = event {
            let sink = if *stream == Stream::Stdout { &self.out } else { &self.err };
            let lines = replica_lines(self.board.topology(), *replica, *stream, text, sink);
            self.above(*stream, &lines);
        }
        self.draw(now);
    }

    fn tick(&mut self, now: Instant) {
        let notes = self.board.tick(now);
        self.note(&notes);
        self.draw(now);
    }

    fn say(&mut self, text: &str) {
        self.above(Stream::Stderr, &format!("{}\n", text.trim_end_matches('\n')));
    }

    fn finish(&mut self, _now: Instant) {
        let notes = self.board.finish();
        self.note(&notes);
        let erase = self.erase();
        self.err.write(&erase);
        self.finished = true;
    }
}

impl Drop for Live {
    /// Takes the bars away if nobody did, for example on the way out with an error.
    fn drop(&mut self) {
        let erase = self.erase();
        self.err.write(&erase);
    }
}

/// The lines of one frame, each with the length of the name that it begins with and the name's colour.
fn frame(board: &Board, size: Size, now: Instant) -> Vec<((usize, u8), String)> {
    // The last column stays free, since some terminals wrap as soon as it is filled.
    let width = size.columns.saturating_sub(1);
    let workers = board.workers().len();
    // Bars that do not fit could not be erased: the cursor stops at the top of the screen.
    let bars = workers.min(MAX_BARS).min(size.rows.saturating_sub(3).max(1));
    let widest = Replica::worker(workers.saturating_sub(1) as u32).to_string().len();
    let mut lines: Vec<_> = (0u32..)
        .zip(&board.workers()[..bars])
        .map(|(rank, worker)| {
            let replica = Replica::worker(rank);
            let name = format!("{replica:widest$}", replica = replica.to_string());
            let line = worker_line(&name, worker, board.has_joined(replica), width, now);
            ((name.len().min(width), replica_colour(board.topology(), replica)), line)
        })
        .collect();
    let plain = |text: String| ((0, 0), text.chars().take(width).collect());
    if bars < workers {
        lines.push(plain(format!("and {} more workers", workers - bars)));
    }
    lines.push(plain(board.footer(now)));
    lines
}

fn paint_name(line: &str, (length, colour): (usize, u8), on: bool) -> String {
    // Names are ASCII, so a length in characters is one in bytes.
    let (name, rest) = line.split_at(length);
    if length == 0 { rest.to_owned() } else { paint(name, colour, on) + rest }
}

/// `worker 0  epoch 2/5 [=====>   ]  61 %  loss 0.4120  14.2k examples/s`, as much of it as fits.
fn worker_line(name: &str, worker: &Worker, joined: bool, width: usize, now: Instant) -> String {
    let clip = |text: String| text.chars().take(width).collect::<String>();
    let Some(progress) = worker.progress else {
        let state = match (worker.ended, joined) {
            (true, _) => "ended",
            (false, true) => "joined",
            (false, false) => "starting",
        };
        return clip(format!("{name}  {state}"));
    };
    let head = format!("{name}  epoch {}/{}", progress.epoch + 1, progress.epochs);
    let percent = format!("{:>3.0} %", worker.share() * 100.0);
    let first = worker.metrics.iter().take(1).map(metric_text);
    let rate = worker.rate(now).map(|rate| format!("{} examples/s", words::short(rate)));
    let others = worker.metrics.iter().skip(1).map(metric_text);

    // The first metric and the speed come before the bar's comfort, further metrics after it.
    let fixed = head.chars().count() + " [] ".len() + percent.len();
    let mut room = width.saturating_sub(fixed + MIN_BAR);
    let mut tail = Vec::new();
    for part in first.chain(rate).chain(others) {
        let needed = 2 + part.chars().count();
        if needed > room {
            break;
        }
        room -= needed;
        tail.push(format!("  {part}"));
    }
    let tail = tail.concat();
    if width < fixed + MIN_BAR {
        return clip(format!("{head} {percent}"));
    }
    let inner = (MIN_BAR + room).min(MAX_BAR);
    format!("{head} [{}] {percent}{tail}", bar(worker.share(), inner))
}

fn metric_text((name, value): &(String, f64)) -> String {
    format!("{} {}", clean::plain(name), words::number(*value))
}

/// The inside of a bar: `=====>   `.
fn bar(share: f64, width: usize) -> String {
    let filled = (share * width as f64).floor() as usize;
    let mut bar = "=".repeat(filled.min(width));
    if filled < width {
        bar.push('>');
    }
    format!("{bar:width$}")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use expect_test::{Expect, expect};

    use super::super::testing::{Broken, Screen, Script};
    use super::*;

    fn view(screen: &Screen, topology: Topology, colour: bool) -> Live {
        let sink = || Sink::new(Box::new(screen.clone()), true, colour);
        let asked = screen.clone();
        Live::new(topology, sink(), sink(), Box::new(move || asked.size()))
    }

    #[track_caller]
    fn check(script: &Script, screen: Screen, expected: Expect) {
        let mut view = view(&screen, Topology::new(2, 1), false);
        script.play_open(&mut view);
        assert!(!screen.raw().contains("\x1b[0m"), "no colour was asked for");
        expected.assert_eq(&screen.text());
    }

    #[test]
    fn lines_stand_above_the_bars() {
        check(
            &Script::whole_run().cut(14),
            Screen::new(80, 24),
            expect![[r#"
            worker 0 │ 60000 images
            2 workers + 1 parameter server joined
            worker 1 │ a hint
            worker 0  epoch 1/2 [========] 100 %  loss 1.5000  1.2k examples/s  norm 0.5000
            worker 1  epoch 1/2 [========] 100 %  loss 1.0000  1.2k examples/s  norm 0.5000
            0:03 elapsed, about 0:03 left
        "#]],
        );
    }

    #[test]
    fn starting_run_says_who_is_missing() {
        check(
            &Script::whole_run().cut(2),
            Screen::new(80, 24),
            expect![[r#"
            worker 0  starting
            worker 1  joined
            0:00 elapsed, waiting for worker 0
        "#]],
        );
    }

    #[test]
    fn narrow_terminal_shows_less() {
        check(
            &Script::whole_run().cut(14),
            Screen::new(40, 24),
            expect![[r#"
            worker 0 │ 60000 images
            2 workers + 1 parameter server joined
            worker 1 │ a hint
            worker 0  epoch 1/2 [===========] 100 %
            worker 1  epoch 1/2 [===========] 100 %
            0:03 elapsed, about 0:03 left
        "#]],
        );
        check(
            &Script::whole_run().cut(14),
            Screen::new(20, 24),
            expect![[r#"
            worker 0 │ 60000 ima
            ges
            2 workers + 1 parame
            ter server joined
            worker 1 │ a hint
            worker 0  epoch 1/2
            worker 1  epoch 1/2
            0:03 elapsed, about
        "#]],
        );
    }

    #[test]
    fn wide_terminal_shows_more() {
        check(
            &Script::whole_run().cut(14),
            Screen::new(120, 24),
            expect![[r#"
            worker 0 │ 60000 images
            2 workers + 1 parameter server joined
            worker 1 │ a hint
            worker 0  epoch 1/2 [==============================] 100 %  loss 1.5000  1.2k examples/s  norm 0.5000
            worker 1  epoch 1/2 [==============================] 100 %  loss 1.0000  1.2k examples/s  norm 0.5000
            0:03 elapsed, about 0:03 left
        "#]],
        );
    }

    #[test]
    fn bars_are_gone_in_the_end() {
        let screen = Screen::new(80, 24);
        let mut shown = view(&screen, Topology::new(2, 1), false);
        Script::whole_run().play(&mut shown);
        shown.say("the end\n");
        drop(shown);
        expect![[r#"
            worker 0 │ 60000 images
            2 workers + 1 parameter server joined
            worker 1 │ a hint
            epoch 1/2  loss 1.3333  norm 0.5000  2,105 examples/s
            warning: the disk is nearly full
            epoch 2/2  loss 0.2500  accuracy 0.8500  2,065 examples/s
            the end
        "#]]
        .assert_eq(&screen.text());
    }

    #[test]
    fn bars_are_gone_after_a_failure() {
        let screen = Screen::new(80, 24);
        let mut shown = view(&screen, Topology::new(2, 1), false);
        Script::failure().play_open(&mut shown);
        drop(shown);
        expect![[r#"
            2 workers + 1 parameter server joined
            worker 1 │ thread 'main' panicked
            worker 1 │ here
            worker 1 was ended by signal 9 (SIGKILL)
            ps 0 exited with code 3
            stopping after this round, then evaluating and saving (Ctrl-C again kills)
        "#]]
        .assert_eq(&screen.text());
    }

    #[test]
    fn colours_tell_replicas_and_streams_apart() {
        let screen = Screen::new(80, 24);
        let mut shown = view(&screen, Topology::new(2, 1), true);
        let mut script = Script::default();
        script.line(0, Stream::Stdout, "green \x1b[32myes").line(1, Stream::Stderr, "bad\x1b[2A");
        script.play_open(&mut shown);
        shown.finish(Instant::now());
        let lines: Vec<String> = screen.raw().lines().filter(|line| line.contains('│')).map(str::to_owned).collect();
        let expected = [
            "\x1b[36mworker 0\x1b[0m \x1b[90m│\x1b[0m green \x1b[32myes\x1b[0m",
            "\x1b[35mworker 1\x1b[0m \x1b[31m│\x1b[0m bad",
        ];
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().zip(expected).all(|(line, expected)| line.ends_with(expected)), "{lines:?}");
    }

    #[test]
    fn frames_are_not_drawn_faster_than_they_are_seen() {
        let screen = Screen::new(80, 24);
        let mut shown = view(&screen, Topology::new(1, 1), false);
        let begin = Instant::now();
        for i in 0..1000 {
            shown.tick(begin + Duration::from_millis(i));
        }
        let frames = screen.raw().matches("elapsed").count();
        assert_eq!(frames, 20);
    }

    #[test]
    fn no_more_bars_than_fit() {
        let screen = Screen::new(80, 6);
        let mut shown = view(&screen, Topology::new(200, 1), false);
        shown.tick(Instant::now());
        expect![[r#"
            worker 0    starting
            worker 1    starting
            worker 2    starting
            and 197 more workers
            0:00 elapsed, waiting for ps 0, worker 0, worker 1, worker 2 and 197 more
        "#]]
        .assert_eq(&screen.text());
    }

    #[test]
    fn terminal_made_narrower_keeps_its_lines() {
        let screen = Screen::new(80, 24);
        let mut shown = view(&screen, Topology::new(2, 1), false);
        let script = Script::whole_run().cut(14);
        script.play_open(&mut shown);
        screen.resize(30);
        shown.finish(Instant::now());
        assert!(!screen.text().contains("elapsed") && !screen.text().contains("[="), "{}", screen.text());
        assert!(screen.text().starts_with("worker 0 │ 60000 images"), "{}", screen.text());
    }

    #[test]
    fn key_echoed_between_two_writes_wraps_no_bar() {
        let screen = Screen::new(80, 24);
        let mut shown = view(&screen, Topology::new(2, 1), false);
        Script::whole_run().cut(14).play_open(&mut shown);
        shown.say("a note");
        screen.clone().write_all(b"^C").unwrap();
        shown.tick(Instant::now());
        assert!(screen.text().contains("a note\nworker 0  epoch"), "{}", screen.text());
        shown.finish(Instant::now());
        assert!(!screen.text().contains("[=") && !screen.text().contains("elapsed"), "{}", screen.text());
    }

    #[test]
    fn terminal_that_has_gone_is_no_failure() {
        let sink = || Sink::new(Box::new(Broken), true, true);
        let size = || Size { columns: 80, rows: 24 };
        let mut view = Live::new(Topology::new(2, 1), sink(), sink(), Box::new(size));
        Script::whole_run().play(&mut view);
    }
}
