//! A run to show, and screens to show it on.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::events::{Event, Exit, Metric, Progress, Stream};
use super::{Size, View};
use crate::topology::{Rank, Replica};

/// Events, each with its time in milliseconds since the start.
#[derive(Default, Clone)]
pub(super) struct Script {
    now: u64,
    events: Vec<(u64, Event)>,
}

impl Script {
    /// Two workers and a server train for two epochs.
    pub(super) fn whole_run() -> Self {
        let mut script = Self::default();
        script.event(Event::Joined(Replica::ps(0))).wait(20).event(Event::Joined(Replica::worker(1))).wait(40);
        script.line(0, Stream::Stdout, "60000 images").event(Event::Joined(Replica::worker(0))).wait(40);
        for rank in 0..2 {
            script.progress(rank, 0, 1, 100, 32);
        }
        script.metric("loss", 0, [2.5, 2.0]).wait(2000);
        for rank in 0..2 {
            script.progress(rank, 0, 61, 100, 61 * 32);
        }
        script.metric("loss", 0, [1.5, 1.0]).metric("norm", 0, [0.5, 0.5]).wait(10);
        script.line(1, Stream::Stderr, "a hint\x1b[2A").wait(1000);
        for rank in 0..2 {
            script.progress(rank, 0, 100, 100, 3200);
        }
        script.metric("loss", 0, [0.5, 0.5]).wait(100);
        for rank in 0..2 {
            script.progress(rank, 1, 1, 100, 3232);
        }
        script.event(Event::Warning("the disk is nearly full".into())).wait(3000);
        for rank in 0..2 {
            script.progress(rank, 1, 100, 100, 6400);
        }
        script.metric("loss", 1, [0.25, 0.25]).metric("accuracy", 1, [0.8, 0.9]).wait(10);
        for replica in [Replica::worker(0), Replica::worker(1), Replica::ps(0)] {
            script.event(Event::Exited { replica, exit: Exit::Code(0) });
        }
        script
    }

    /// A worker is killed after the first batch.
    pub(super) fn failure() -> Self {
        let mut script = Self::default();
        for replica in [Replica::ps(0), Replica::worker(0), Replica::worker(1)] {
            script.event(Event::Joined(replica));
        }
        script.progress(0, 0, 1, 100, 32).wait(100).line(1, Stream::Stderr, "thread 'main' panicked\nhere").wait(10);
        script.event(Event::Exited { replica: Replica::worker(1), exit: Exit::Signal(9) });
        script.event(Event::Exited { replica: Replica::ps(0), exit: Exit::Code(3) }).event(Event::Stopping);
        script
    }

    /// The first events only.
    pub(super) fn cut(mut self, events: usize) -> Self {
        self.events.truncate(events);
        self
    }

    pub(super) fn wait(&mut self, milliseconds: u64) -> &mut Self {
        self.now += milliseconds;
        self
    }

    pub(super) fn event(&mut self, event: Event) -> &mut Self {
        self.events.push((self.now, event));
        self
    }

    pub(super) fn progress(&mut self, rank: u32, epoch: u64, batch: u64, batches: u64, examples: u64) -> &mut Self {
        self.event(Event::Progress(Progress { rank: Rank(rank), epoch, epochs: 2, batch, batches, examples }))
    }

    pub(super) fn metric(&mut self, name: &str, epoch: u64, ranks: [f64; 2]) -> &mut Self {
        let value = (ranks[0] + ranks[1]) / 2.0;
        self.event(Event::Metric(Metric { name: name.into(), epoch, round: 0, value, ranks: ranks.map(Some).into() }))
    }

    pub(super) fn line(&mut self, worker: u32, stream: Stream, text: &str) -> &mut Self {
        self.event(Event::Line { replica: Replica::worker(worker), stream, text: text.into() })
    }

    /// Shows the events and ends the show.
    pub(super) fn play(&self, view: &mut impl View) {
        let end = self.play_open(view);
        view.finish(end);
    }

    /// Shows the events, then what a moment later is to be seen.
    pub(super) fn play_open(&self, view: &mut impl View) -> Instant {
        let begin = Instant::now();
        let mut now = begin;
        for (at, event) in &self.events {
            now = begin + Duration::from_millis(*at);
            view.show(event, now);
        }
        now += Duration::from_millis(60);
        view.tick(now);
        now
    }
}

/// Collects what is written.
#[derive(Default, Clone)]
pub(super) struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A pipe without a reader.
pub(super) struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

/// A terminal: wraps, understands the few sequences that are used here, and reflows when its width changes.
#[derive(Clone)]
pub(super) struct Screen(Arc<Mutex<Inner>>);

struct Inner {
    size: Size,
    raw: String,
    /// Rows of the screen and of what has scrolled away.
    rows: Vec<Row>,
    row: usize,
    column: usize,
}

#[derive(Default, Clone)]
struct Row {
    text: Vec<char>,
    /// Whether the next row goes on with the same line.
    wrapped: bool,
}

impl Screen {
    pub(super) fn new(columns: usize, rows: usize) -> Self {
        let size = Size { columns, rows };
        Self(Arc::new(Mutex::new(Inner { size, raw: String::new(), rows: vec![Row::default()], row: 0, column: 0 })))
    }

    pub(super) fn size(&self) -> Size {
        self.0.lock().unwrap().size
    }

    /// Everything that was written.
    pub(super) fn raw(&self) -> String {
        self.0.lock().unwrap().raw.clone()
    }

    /// What is to be seen.
    pub(super) fn text(&self) -> String {
        let inner = self.0.lock().unwrap();
        let lines: Vec<String> = inner.rows.iter().map(|row| row.text.iter().collect::<String>()).collect();
        lines.join("\n")
    }

    pub(super) fn resize(&self, columns: usize) {
        let mut inner = self.0.lock().unwrap();
        let rows = std::mem::take(&mut inner.rows);
        let mut line = Vec::new();
        for row in rows {
            line.extend(row.text);
            if !row.wrapped {
                let count = line.len().div_ceil(columns).max(1);
                for (i, part) in (0..count).map(|i| (i, line.iter().skip(i * columns).take(columns))) {
                    inner.rows.push(Row { text: part.copied().collect(), wrapped: i + 1 < count });
                }
                line.clear();
            }
        }
        inner.size.columns = columns;
        inner.row = inner.rows.len() - 1;
    }
}

impl Inner {
    fn put(&mut self, c: char) {
        if self.column == self.size.columns {
            self.rows[self.row].wrapped = true;
            self.down();
        }
        let (row, column) = (self.row, self.column);
        let text = &mut self.rows[row].text;
        if text.len() <= column {
            text.resize(column + 1, ' ');
        }
        text[column] = c;
        self.column += 1;
    }

    fn down(&mut self) {
        self.row += 1;
        self.column = 0;
        if self.row == self.rows.len() {
            self.rows.push(Row::default());
        }
    }

    fn sequence(&mut self, parameter: &str, last: char) {
        match last {
            'A' => {
                let top = self.rows.len().saturating_sub(self.size.rows);
                self.row = self.row.saturating_sub(parameter.parse().unwrap()).max(top);
            }
            'J' => {
                self.rows.truncate(self.row + 1);
                self.rows[self.row].text.truncate(self.column);
                self.rows[self.row].wrapped = false;
            }
            'm' => {}
            other => panic!("sequence {parameter}{other} is not known"),
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = std::str::from_utf8(bytes).unwrap();
        let mut inner = self.0.lock().unwrap();
        inner.raw.push_str(text);
        let mut rest = text.chars();
        while let Some(c) = rest.next() {
            match c {
                '\r' => inner.column = 0,
                '\n' => inner.down(),
                '\x1b' => {
                    let (parameter, _) = rest.as_str().split_once(|c: char| c.is_ascii_alphabetic()).unwrap();
                    let parameter = parameter.strip_prefix('[').unwrap().to_owned();
                    let last = rest.nth(parameter.len() + 1).unwrap();
                    inner.sequence(&parameter, last);
                }
                c => inner.put(c),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
