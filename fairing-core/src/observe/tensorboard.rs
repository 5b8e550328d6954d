//! The numbers of a run as TensorBoard reads them, while the run goes on.
//!
//! ```text
//! tensorboard/run/events.out.tfevents.…        merged values, hyperparameters, how it ended
//! tensorboard/worker-0/events.out.tfevents.…   one worker's own values, if there is more than one
//! ```
//!
//! An event file is a sequence of records, each a length, a checksum of the length, a protobuf message `Event`, and a checksum
//! of the message. Five fields of two messages are all that is written, so they are encoded here, without a protobuf library
//! and its code generator.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::events::Metric;

/// How long a written value may stay in memory.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of one file that may wait: a scalar takes about 60, so that this is some thousand values a second.
const BUFFER_BYTES: usize = 256 << 10;

/// Failure to keep values for TensorBoard. Returned by [`TensorBoard`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorBoardError {
    /// A file cannot be created or written, for example because the disk is full. Nothing more is written then: a record
    /// behind half a record could not be read.
    #[error("cannot write values for TensorBoard to `{}`", path.display())]
    Write {
        /// The file or its folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// Writes a run's values as event files, one of the merged values and, with several workers, one of each worker's own.
///
/// After a failure, which is reported once, every call succeeds and writes nothing.
#[derive(Debug)]
pub struct TensorBoard {
    run: EventFile,
    /// By rank; empty if there is one worker, whose values are the merged ones.
    workers: Vec<EventFile>,
    /// Since when something has been waiting.
    waiting_since: Option<Instant>,
    failed: bool,
}

impl TensorBoard {
    /// Creates the file of merged values in `folder`, which is created too; the workers' appear with their first values.
    ///
    /// `started` becomes part of the files' names.
    ///
    /// # Errors
    ///
    /// [`TensorBoardError::Write`].
    pub fn create(folder: &Path, workers: usize, started: SystemTime) -> Result<Self, TensorBoardError> {
        let ranks = if workers > 1 { workers } else { 0 };
        let mut board = Self {
            run: EventFile::new(&folder.join("run"), started),
            workers: (0..ranks).map(|rank| EventFile::new(&folder.join(format!("worker-{rank}")), started)).collect(),
            waiting_since: None,
            failed: false,
        };
        board.flush()?;
        Ok(board)
    }

    /// Adds a metric: its merged value, and its value on each rank. It is on disk at the latest with the first `write` or
    /// [`tick`](Self::tick) a second later.
    ///
    /// The step is the round. TensorBoard keeps values as `f32`.
    ///
    /// # Errors
    ///
    /// [`TensorBoardError::Write`].
    pub fn write(&mut self, metric: &Metric, time: SystemTime, now: Instant) -> Result<(), TensorBoardError> {
        if self.failed {
            return Ok(());
        }
        let event = |value: f64| scalar(&metric.name, value, metric.round, time);
        self.run.add(&event(metric.value));
        for (file, value) in self.workers.iter_mut().zip(&metric.ranks) {
            if let Some(value) = value {
                file.add(&event(*value));
            }
        }
        self.waiting_since.get_or_insert(now);
        if self.run.buffer.len() >= BUFFER_BYTES { self.flush() } else { self.tick(now) }
    }

    /// Adds a text, shown as it is in the tab "Text" under `tag`.
    ///
    /// # Errors
    ///
    /// [`TensorBoardError::Write`].
    pub fn text(&mut self, tag: &str, words: &str, time: SystemTime) -> Result<(), TensorBoardError> {
        if self.failed {
            return Ok(());
        }
        // TensorBoard reads Markdown, in which what is indented stays as it is.
        let markdown: String = words.lines().map(|line| format!("    {line}\n")).collect();
        self.run.add(&text(tag, &markdown, time));
        self.flush()
    }

    /// Writes out what has waited for a second.
    ///
    /// # Errors
    ///
    /// [`TensorBoardError::Write`].
    pub fn tick(&mut self, now: Instant) -> Result<(), TensorBoardError> {
        match self.waiting_since {
            Some(since) if now.saturating_duration_since(since) >= FLUSH_INTERVAL => self.flush(),
            _ => Ok(()),
        }
    }

    /// Writes out everything.
    ///
    /// # Errors
    ///
    /// [`TensorBoardError::Write`].
    pub fn flush(&mut self) -> Result<(), TensorBoardError> {
        self.waiting_since = None;
        if self.failed {
            return Ok(());
        }
        for file in std::iter::once(&mut self.run).chain(&mut self.workers) {
            if let Err(source) = file.flush() {
                self.failed = true;
                return Err(TensorBoardError::Write { path: file.path.clone(), source });
            }
        }
        Ok(())
    }
}

/// One event file. It is opened for each flush only, so that a run with hundreds of workers does not hold as many files open.
#[derive(Debug)]
struct EventFile {
    path: PathBuf,
    /// Whole records; the header alone until something follows it.
    buffer: Vec<u8>,
    /// Whether it has to appear although it has no value yet, or has appeared.
    exists: bool,
}

impl EventFile {
    fn new(folder: &Path, started: SystemTime) -> Self {
        let seconds = started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut file = Self {
            path: folder.join(format!("events.out.tfevents.{seconds:010}.fairing")),
            buffer: Vec::new(),
            exists: folder.ends_with("run"),
        };
        record(&version(started), &mut file.buffer);
        file
    }

    fn add(&mut self, event: &[u8]) {
        self.exists = true;
        record(event, &mut self.buffer);
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.exists || self.buffer.is_empty() {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = File::options().create(true).append(true).open(&self.path)?;
        file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Appends a message in its frame.
fn record(message: &[u8], out: &mut Vec<u8>) {
    let length = (message.len() as u64).to_le_bytes();
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(message);
    out.extend(masked_crc(message).to_le_bytes());
}

/// CRC-32C, rotated and shifted, so that a checksum of data that holds checksums stays a good one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The first event of every file.
fn version(time: SystemTime) -> Vec<u8> {
    let mut event = Message::event(time, 0);
    event.bytes(3, b"brain.Event:2");
    event.0
}

fn scalar(tag: &str, value: f64, step: u64, time: SystemTime) -> Vec<u8> {
    let mut entry = Message::default();
    entry.bytes(1, tag.as_bytes());
    entry.float(2, value as f32);
    summary(entry, step, time)
}

/// A string tensor of one element, for the plugin "text".
fn text(tag: &str, markdown: &str, time: SystemTime) -> Vec<u8> {
    const DT_STRING: u64 = 7;
    const DATA_CLASS_TENSOR: u64 = 2;
    let mut dimension = Message::default();
    dimension.varint(1, 1);
    let mut shape = Message::default();
    shape.bytes(2, &dimension.0);
    let mut tensor = Message::default();
    tensor.varint(1, DT_STRING);
    tensor.bytes(2, &shape.0);
    tensor.bytes(8, markdown.as_bytes());
    let mut plugin = Message::default();
    plugin.bytes(1, b"text");
    let mut metadata = Message::default();
    metadata.bytes(1, &plugin.0);
    metadata.varint(4, DATA_CLASS_TENSOR);
    let mut entry = Message::default();
    entry.bytes(1, tag.as_bytes());
    entry.bytes(8, &tensor.0);
    entry.bytes(9, &metadata.0);
    summary(entry, 0, time)
}

fn summary(entry: Message, step: u64, time: SystemTime) -> Vec<u8> {
    let mut summary = Message::default();
    summary.bytes(1, &entry.0);
    let mut event = Message::event(time, step);
    event.bytes(5, &summary.0);
    event.0
}

/// A protobuf message in the making.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` with its time, in seconds since 1970, and its step.
    fn event(time: SystemTime, step: u64) -> Self {
        let mut event = Self::default();
        event.key(1, 1);
        let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        event.0.extend(seconds.to_le_bytes());
        event.varint(2, step);
        event
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.key(field, 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time() -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(1_767_323_045_250)
    }

    fn metric(name: &str, round: u64, ranks: &[Option<f64>]) -> Metric {
        Metric { name: name.into(), epoch: 0, round, value: 0.5, ranks: ranks.into() }
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4: 32 bytes of 0, of 0xff, and ascending ones.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c::crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46dd_794e);
        // The header that every event file of TensorFlow starts with: the length 24 and its masked checksum.
        assert_eq!(masked_crc(&24_u64.to_le_bytes()), u32::from_le_bytes([0xa3, 0x7f, 0x4b, 0x22]));
    }

    #[test]
    fn a_scalar_is_an_event_of_protobuf() {
        let found = scalar("loss", 0.5, 300, time());
        let seconds = 1_767_323_045.25_f64.to_le_bytes();
        let summary = [b"\x0a\x0b\x0a\x04loss\x15".as_slice(), &0.5_f32.to_le_bytes()].concat();
        let expected = [&[0x09], seconds.as_slice(), &[0x10, 0xac, 0x02, 0x2a, summary.len() as u8], &summary].concat();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_record_is_framed_by_length_and_checksums() {
        let mut framed = Vec::new();
        record(b"abc", &mut framed);
        assert_eq!(framed.len(), 8 + 4 + 3 + 4);
        assert_eq!(framed[..8], 3_u64.to_le_bytes());
        assert_eq!(framed[12..15], *b"abc");
        assert_eq!(framed[15..], masked_crc(b"abc").to_le_bytes());
    }

    fn size(folder: &Path, name: &str) -> u64 {
        let files = std::fs::read_dir(folder.join(name)).into_iter().flatten();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
    }

    #[test]
    fn values_are_on_disk_a_second_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 2, time()).unwrap();
        let begin = Instant::now();
        let header = size(folder.path(), "run");
        assert!(header > 0, "a run that has no value yet can be seen");
        board.write(&metric("loss", 0, &[Some(0.5), None]), time(), begin).unwrap();
        assert_eq!(size(folder.path(), "run"), header);
        board.tick(begin + FLUSH_INTERVAL).unwrap();
        assert!(size(folder.path(), "run") > header);
        assert!(size(folder.path(), "worker-0") > header);
        assert!(!folder.path().join("worker-1").exists(), "worker 1 gave no value");
    }

    #[test]
    fn a_single_worker_has_no_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 1, time()).unwrap();
        board.write(&metric("loss", 0, &[Some(0.5)]), time(), Instant::now()).unwrap();
        board.flush().unwrap();
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["run"]);
    }

    #[test]
    fn waiting_values_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 1, time()).unwrap();
        let begin = Instant::now();
        for round in 0..20_000 {
            board.write(&metric("loss", round, &[Some(0.5)]), time(), begin).unwrap();
            assert!(board.run.buffer.len() <= BUFFER_BYTES);
        }
    }

    #[test]
    fn a_failure_is_named_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 1, time()).unwrap();
        std::fs::remove_dir_all(folder.path()).unwrap();
        std::fs::write(folder.path(), "no folder").unwrap();
        let error = board.text("a", "b", time()).unwrap_err();
        assert!(error.to_string().starts_with("cannot write values for TensorBoard to `"), "{error}");
        board.text("a", "b", time()).unwrap();
        board.write(&metric("loss", 0, &[None]), time(), Instant::now()).unwrap();
        board.flush().unwrap();
        std::fs::remove_file(folder.path()).unwrap();
    }
}
