//! A network that misbehaves when it is told to: connections that are cut at a byte, stand still, or bring damaged frames.
//!
//! [`Faulty`] stands around another transport and is the network as one process sees it. What it does wrong is a list of
//! [`Fault`]s, each at one place of one connection, so that a fault that was found once can be found again. The process as a
//! whole is a [`Life`]: it can end, or freeze, with everything that it has open.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::deadline::TICK;
use super::frame::{HEADER_BYTES, Header, Kind};
use super::transport::{Listener, Stream, Transport};
use crate::topology::{Address, Member};

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Which connection of the process, in the order in which it opens them, from 0.
    pub(crate) connection: usize,
    /// Which of its two directions.
    pub(crate) way: Way,
    pub(crate) what: What,
}

/// A direction, as the process sees it that opened the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Out,
    In,
}

/// What goes wrong, and behind how many bytes or frames of the direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// The connection ends, as by a reset: what lies behind the byte does not arrive.
    Cut { byte: u64 },
    /// Nothing moves in this direction for a while.
    Stall { byte: u64, pause: Duration },
    /// From the byte on, bytes move in small pieces and late.
    Trickle { byte: u64, pause: Duration },
    /// The process ends, and all its connections with it.
    Die { byte: u64 },
    /// The process stands still for ever, with its connections open.
    Freeze { byte: u64 },
    /// The other process ends that this one is to take with it.
    DieOther { byte: u64 },
    /// The frame is sent a second time before the next one; only outward. A second answer is kept from the process.
    Repeat { frame: u64 },
    /// Garbage stands in the place of the frame.
    Garble { frame: u64 },
    /// Garbage stands in the place of the payload of a message or a push; of others it could not be told.
    GarblePayload { frame: u64 },
    /// All frames, of every connection, are of another version of the protocol; only outward.
    Version,
}

/// The network as one process sees it.
#[derive(Clone)]
pub(crate) struct Faulty {
    inner: Arc<dyn Transport>,
    life: Arc<Life>,
}

impl Faulty {
    pub(crate) fn new(inner: Arc<dyn Transport>, life: Arc<Life>) -> Self {
        Self { inner, life }
    }

    fn line(&self, stream: Box<dyn Stream>, number: Option<usize>) -> io::Result<Box<dyn Stream>> {
        let is_here = |fault: &&Fault| Some(fault.connection) == number || fault.what == What::Version;
        let faults = self.life.faults.iter().filter(is_here);
        let of = |way| faults.clone().filter(|fault| fault.way == way).map(|fault| fault.what).collect();
        let line = Arc::new(Line {
            life: self.life.clone(),
            number,
            handle: Mutex::new(stream.try_clone()?),
            cut: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            out: Mutex::new(Track { faults: of(Way::Out), ..Track::default() }),
            inward: Mutex::new(Track { faults: of(Way::In), ..Track::default() }),
            unwanted: AtomicU64::new(0),
        });
        self.life.lines().push(Arc::downgrade(&line));
        if self.life.is_dead() {
            line.cut();
        }
        Ok(Box::new(FaultyStream { stream, line }))
    }
}

impl Transport for Faulty {
    fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>> {
        let listener = Mutex::new(Some(self.inner.listen(address)?));
        Ok(Box::new(FaultyListener { listener, network: self.clone() }))
    }

    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        if self.life.is_dead() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if self.life.frozen.load(Ordering::Acquire) {
            std::thread::sleep(TICK);
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let stream = self.inner.connect(address)?;
        let number = self.life.opened.fetch_add(1, Ordering::AcqRel) as usize;
        self.line(stream, Some(number))
    }
}

/// What moved on one connection, outward and inward.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moved {
    pub(crate) bytes: [u64; 2],
    pub(crate) frames: [u64; 2],
}

/// A process on the network.
#[derive(Default)]
pub(crate) struct Life {
    faults: Vec<Fault>,
    opened: AtomicU64,
    lines: Mutex<Vec<Weak<Line>>>,
    dead: AtomicBool,
    frozen: AtomicBool,
    on_death: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Whom [`What::DieOther`] ends.
    other: OnceLock<Weak<Life>>,
    fired: OnceLock<Instant>,
    moved: Mutex<BTreeMap<usize, Moved>>,
}

impl Life {
    pub(crate) fn new(faults: Vec<Fault>) -> Arc<Self> {
        Arc::new(Self { faults, ..Self::default() })
    }

    /// Sets what happens in the process when it dies.
    pub(crate) fn on_death(&self, call: impl FnOnce() + Send + 'static) {
        *self.on_death.lock().expect("no holder panics") = Some(Box::new(call));
    }

    /// Ends the process: its connections break, nobody is behind its addresses any more.
    pub(crate) fn die(&self) {
        if self.dead.swap(true, Ordering::AcqRel) {
            return;
        }
        for line in self.lines().iter().filter_map(Weak::upgrade) {
            line.cut();
        }
        if let Some(call) = self.on_death.lock().expect("no holder panics").take() {
            // Whoever met the fault may hold what the call needs.
            std::thread::spawn(call);
        }
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// When the first fault happened.
    pub(crate) fn fired(&self) -> Option<Instant> {
        self.fired.get().copied()
    }

    /// Names the process that [`What::DieOther`] ends.
    pub(crate) fn takes_along(&self, other: &Arc<Life>) {
        self.other.get_or_init(|| Arc::downgrade(other));
    }

    /// What moved on the connections that it opened, by their order.
    pub(crate) fn moved(&self) -> BTreeMap<usize, Moved> {
        self.moved.lock().expect("no holder panics").clone()
    }

    fn lines(&self) -> MutexGuard<'_, Vec<Weak<Line>>> {
        self.lines.lock().expect("no holder panics")
    }

    fn fire(&self) {
        self.fired.get_or_init(Instant::now);
    }
}

struct FaultyListener {
    listener: Mutex<Option<Box<dyn Listener>>>,
    network: Faulty,
}

impl Listener for FaultyListener {
    fn accept(&self, timeout: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        let mut listener = self.listener.lock().expect("no holder panics");
        if self.network.life.is_dead() {
            *listener = None;
        }
        let listener = listener.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        match listener.accept(timeout)? {
            Some(stream) => self.network.line(stream, None).map(Some),
            None => Ok(None),
        }
    }
}

/// One connection, shared by the handles to it.
struct Line {
    life: Arc<Life>,
    /// Which of the connections that the process opened; `None` if it was opened by another one.
    number: Option<usize>,
    /// For ending it while others read and write.
    handle: Mutex<Box<dyn Stream>>,
    cut: AtomicBool,
    /// Ended by its owner, who may read what has arrived before.
    closed: AtomicBool,
    out: Mutex<Track>,
    inward: Mutex<Track>,
    /// Frames of parameters to come that answer a repeated push.
    unwanted: AtomicU64,
}

impl Line {
    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.handle.lock().expect("no holder panics").shutdown();
    }

    fn is_over(&self) -> bool {
        self.cut.load(Ordering::Acquire) || self.closed.load(Ordering::Acquire)
    }

    fn note(&self, way: Way, track: &Track) {
        let Some(number) = self.number else { return };
        let mut all = self.life.moved.lock().expect("no holder panics");
        let moved = all.entry(number).or_default();
        (moved.bytes[way as usize], moved.frames[way as usize]) = (track.bytes, track.frames);
    }

    /// Lets the faults happen that are due; returns how many of `wanted` bytes may move at once.
    fn pass(&self, track: &mut Track, wanted: usize) -> io::Result<usize> {
        let broken = || io::Error::from(io::ErrorKind::ConnectionReset);
        let mut most = wanted;
        for what in track.faults.clone() {
            let (What::Cut { byte }
            | What::Stall { byte, .. }
            | What::Trickle { byte, .. }
            | What::Die { byte }
            | What::Freeze { byte }
            | What::DieOther { byte }) = what
            else {
                continue;
            };
            if track.bytes < byte {
                most = most.min((byte - track.bytes) as usize);
                continue;
            }
            self.life.fire();
            match what {
                What::Trickle { pause, .. } => {
                    std::thread::sleep(pause);
                    most = most.min(PIECE);
                    continue;
                }
                What::Cut { .. } => self.cut(),
                What::Stall { pause, .. } => track.still_until = Some(Instant::now() + pause),
                What::Die { .. } => self.life.die(),
                What::Freeze { .. } => self.life.frozen.store(true, Ordering::Release),
                What::DieOther { .. } => {
                    self.life.other.get().and_then(Weak::upgrade).iter().for_each(|life| life.die())
                }
                _ => {}
            }
            track.faults.retain(|fault| *fault != what);
        }
        let since = Instant::now();
        loop {
            if self.cut.load(Ordering::Acquire) {
                return Err(broken());
            }
            if self.closed.load(Ordering::Acquire) {
                return Ok(most);
            }
            let still = track.still_until.is_some_and(|until| Instant::now() < until);
            if !still && !self.life.frozen.load(Ordering::Acquire) {
                return Ok(most);
            }
            if since.elapsed() > TICK {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(TICK / 20);
        }
    }
}

/// The most bytes that a connection moves at once that brings them late.
const PIECE: usize = 2048;

/// No frame begins so, and nothing is encoded so.
const GARBAGE: u8 = 0xee;

/// One direction of a connection.
#[derive(Default)]
struct Track {
    faults: Vec<What>,
    bytes: u64,
    still_until: Option<Instant>,
    /// Frames that have moved whole.
    frames: u64,
    /// The header in hand, as far as it has moved.
    head: Vec<u8>,
    /// Bytes of the payload in hand that have not moved yet.
    left: u64,
    /// The frame in hand, if it will be repeated.
    kept: Vec<u8>,
    /// What goes out before the next frame.
    again: Vec<u8>,
}

impl Track {
    fn has(&self, what: impl Fn(u64) -> What) -> bool {
        self.faults.contains(&what(self.frames))
    }

    /// How many of the next bytes belong to one part of a frame.
    fn part(&self) -> usize {
        if self.left > 0 { usize::try_from(self.left).unwrap_or(usize::MAX) } else { HEADER_BYTES - self.head.len() }
    }

    /// Spoils bytes of one part of a frame that are about to move.
    fn spoil(&self, bytes: &mut [u8]) -> bool {
        let in_payload = self.left > 0;
        let kind = self.head.first();
        let checked = in_payload && [Kind::Message, Kind::Push].iter().any(|known| kind == Some(&(*known as u8)));
        if self.has(|frame| What::Garble { frame }) || (checked && self.has(|frame| What::GarblePayload { frame })) {
            bytes.fill(GARBAGE);
            return true;
        }
        // The second byte of a header.
        let version = 1usize.checked_sub(self.head.len()).and_then(|at| bytes.get_mut(at));
        match version.filter(|_| !in_payload && self.faults.contains(&What::Version)) {
            Some(version) => *version = GARBAGE,
            None => return false,
        }
        true
    }

    /// Takes note of bytes of one part of a frame, as they were before they were spoiled. Returns the header if it is complete.
    fn count(&mut self, bytes: &[u8]) -> Option<Header> {
        self.bytes += bytes.len() as u64;
        if self.has(|frame| What::Repeat { frame }) {
            self.kept.extend_from_slice(bytes);
        }
        let mut complete = None;
        if self.left > 0 {
            self.left -= bytes.len() as u64;
        } else {
            self.head.extend_from_slice(bytes);
            if let Ok(head) = <[u8; HEADER_BYTES]>::try_from(&self.head[..]) {
                complete = Header::decode(head).ok();
                self.left = complete.map_or(0, |header| header.length_bytes);
            }
        }
        if self.left == 0 && self.head.len() == HEADER_BYTES {
            self.again.append(&mut self.kept);
            self.head.clear();
            self.frames += 1;
        }
        complete
    }
}

struct FaultyStream {
    stream: Box<dyn Stream>,
    line: Arc<Line>,
}

impl Read for FaultyStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut track = self.line.inward.lock().expect("no holder panics");
        loop {
            let wanted = buffer.len().min(track.part());
            let most = self.line.pass(&mut track, wanted)?;
            let begins = track.left == 0 && track.head.is_empty();
            // Whole headers only, so that it is known whom a frame is for before any of it is passed on.
            let count = if begins && self.line.unwanted.load(Ordering::Acquire) > 0 && most == HEADER_BYTES {
                let mut head = [0; HEADER_BYTES];
                let mut filled = 0;
                while filled < HEADER_BYTES {
                    match self.stream.read(&mut head[filled..]) {
                        Ok(0) => return Ok(0),
                        Ok(count) => filled += count,
                        Err(error) if filled == 0 => return Err(error),
                        Err(_) if self.line.is_over() => return Ok(0),
                        Err(_) => {}
                    }
                }
                let header = track.count(&head);
                if header.is_some_and(|header| matches!(header.kind, Kind::Parameters | Kind::LastParameters)) {
                    self.line.unwanted.fetch_sub(1, Ordering::AcqRel);
                    let mut rest = vec![0; PIECE];
                    while track.left > 0 {
                        let part = track.part().min(PIECE);
                        match self.stream.read(&mut rest[..part]) {
                            Ok(0) => return Ok(0),
                            Ok(count) => _ = track.count(&rest[..count]),
                            Err(_) if self.line.is_over() => return Ok(0),
                            Err(_) => {}
                        }
                    }
                    continue;
                }
                buffer[..HEADER_BYTES].copy_from_slice(&head);
                return Ok(HEADER_BYTES);
            } else {
                self.stream.read(&mut buffer[..most])?
            };
            let original = buffer[..count].to_vec();
            if track.spoil(&mut buffer[..count]) {
                self.line.life.fire();
            }
            track.count(&original);
            self.line.note(Way::In, &track);
            return Ok(count);
        }
    }
}

impl Write for FaultyStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut track = self.line.out.lock().expect("no holder panics");
        if track.left == 0 && track.head.is_empty() {
            if [Kind::Model, Kind::Tensors].iter().any(|kind| buffer.first() == Some(&(*kind as u8))) {
                // A message and what follows it are repeated together or not at all.
                track.again.clear();
            }
            while !track.again.is_empty() {
                self.line.life.fire();
                let sent = self.stream.write(&track.again)?;
                let push = track.again.first() == Some(&(Kind::Push as u8));
                track.again.drain(..sent);
                if track.again.is_empty() && push {
                    self.line.unwanted.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        let wanted = buffer.len().min(track.part());
        let most = self.line.pass(&mut track, wanted)?;
        let mut spoiled = buffer[..most].to_vec();
        if track.spoil(&mut spoiled) {
            self.line.life.fire();
        }
        let count = self.stream.write(&spoiled)?;
        track.count(&buffer[..count]);
        self.line.note(Way::Out, &track);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for FaultyStream {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(FaultyStream { stream: self.stream.try_clone()?, line: self.line.clone() }))
    }

    fn shutdown(&self) {
        self.line.closed.store(true, Ordering::Release);
        self.stream.shutdown();
    }

    fn is(&self, member: Member) -> bool {
        self.stream.is(member)
    }
}
