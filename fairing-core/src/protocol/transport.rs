//! How bytes travel: in memory (tests, `train_in_memory`), over Unix sockets (local), or over [`super::tcp`].

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use super::deadline::TICK;
use crate::topology::{Address, Member};

/// A connected byte stream. Reads and writes that wait longer than [`TICK`] fail with `WouldBlock` or `TimedOut`, so
/// that the caller can look whether waiting still makes sense.
pub(crate) trait Stream: Read + Write + Send {
    /// A second handle to the same stream.
    fn try_clone(&self) -> io::Result<Box<dyn Stream>>;

    /// Ends both directions; the other end reads end of file.
    fn shutdown(&self);

    /// Whether `member` is at the other end. Not asked of a network where streams are only open to whom the process or the
    /// folder is open to; there the answer is yes.
    fn is(&self, member: Member) -> bool;
}

/// Where connections arrive.
pub(crate) trait Listener: Send {
    /// The next connection, or `None` if there is none within `timeout`.
    fn accept(&self, timeout: Duration) -> io::Result<Option<Box<dyn Stream>>>;
}

/// A way to connect replicas.
pub(crate) trait Transport: Send + Sync {
    /// Listens at `address`.
    fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>>;

    /// Connects to `address` once. An error that may pass, since nobody listens yet, has a kind of which
    /// [`connect_patiently`] knows that.
    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>>;
}

/// Connects to `address`, again and again until `deadline`, since the listener may still be starting.
///
/// `waiting` is asked between attempts and may give up earlier.
pub(crate) fn connect_patiently(
    transport: &dyn Transport,
    address: &Address,
    deadline: Instant,
    waiting: &dyn Fn() -> io::Result<()>,
) -> io::Result<Box<dyn Stream>> {
    let mut pauses = pauses(address);
    loop {
        match transport.connect(address) {
            Ok(stream) => return Ok(stream),
            Err(error) => match error.kind() {
                // Of a machine that is still starting, neither its name nor the way to it need be known.
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::TimedOut
                    if Instant::now() < deadline =>
                {
                    waiting()?;
                    // Never too long for one more attempt, however long the pauses have become.
                    let left = deadline.saturating_duration_since(Instant::now());
                    std::thread::sleep(pauses.next().expect("there is always one more").min(left));
                }
                _ => return Err(error),
            },
        }
    }
}

/// How long to wait between two attempts to connect to `address`, one after the other.
fn pauses(address: &Address) -> impl Iterator<Item = Duration> + use<> {
    // Starting takes milliseconds on one machine; a longer pause would be most of the launch time.
    const FIRST: Duration = Duration::from_millis(1);
    const LONGEST_ON_ONE_MACHINE: Duration = Duration::from_millis(50);
    // Elsewhere an attempt asks others: a name server, which does not know a pod's name until about a second after its start
    // and says so, and the network. Most are there after two seconds of quick steps. Who waits longer waits for a machine or an
    // image, and hundreds of replicas must not keep the name server busy meanwhile.
    const LONGEST_BETWEEN_MACHINES: Duration = Duration::from_secs(1);
    const QUICK_STEPS: usize = 45;
    let growing = |first: Duration, longest: Duration| {
        std::iter::successors(Some(first), move |pause| Some((*pause * 2).min(longest)))
    };
    let quick = if matches!(address, Address::Tls { .. }) { QUICK_STEPS } else { usize::MAX };
    growing(FIRST, LONGEST_ON_ONE_MACHINE).take(quick).chain(growing(LONGEST_ON_ONE_MACHINE, LONGEST_BETWEEN_MACHINES))
}

/// Unix sockets in a private folder.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unix;

pub(super) fn wrong_address(address: &Address) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("`{address}` is not an address of this transport"))
}

pub(crate) fn unix_stream(stream: UnixStream) -> io::Result<Box<dyn Stream>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))?;
    Ok(Box::new(stream))
}

impl Transport for Unix {
    fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>> {
        let Address::Unix(path) = address else { return Err(wrong_address(address)) };
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Box::new(listener))
    }

    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        let Address::Unix(path) = address else { return Err(wrong_address(address)) };
        unix_stream(UnixStream::connect(path)?)
    }
}

impl Listener for UnixListener {
    fn accept(&self, timeout: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        match accept_within(self, timeout, || UnixListener::accept(self))? {
            Some((stream, _)) => unix_stream(stream).map(Some),
            None => Ok(None),
        }
    }
}

/// What `accept` gives, or `None` if `listener`, which does not block, has nothing within `timeout`.
pub(super) fn accept_within<T>(
    listener: impl AsFd,
    timeout: Duration,
    accept: impl FnOnce() -> io::Result<T>,
) -> io::Result<Option<T>> {
    let timeout = rustix::event::Timespec::try_from(timeout).map_err(io::Error::other)?;
    let mut ready = [rustix::event::PollFd::new(&listener, rustix::event::PollFlags::IN)];
    match rustix::event::poll(&mut ready, Some(&timeout)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    match accept() {
        Ok(accepted) => Ok(Some(accepted)),
        // Whoever called has gone again.
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Stream for UnixStream {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(UnixStream::try_clone(self)?))
    }

    fn shutdown(&self) {
        // An error means that the stream is closed already, which is what was asked for.
        let _ = UnixStream::shutdown(self, std::net::Shutdown::Both);
    }

    fn is(&self, _: Member) -> bool {
        true
    }
}

/// Streams between threads of this process.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    listeners: Arc<Mutex<HashMap<String, MemoryAddress>>>,
}

/// Who listens: the way to it, and whether it still lives.
type MemoryAddress = (SyncSender<MemoryStream>, Weak<()>);

/// Connections that wait to be accepted; a refused connection is tried again.
const BACKLOG: usize = 64;

/// As much as a socket's buffer holds, so that tests meet the same blocking.
const PIPE_BYTES: usize = 256 << 10;

impl Transport for Memory {
    fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>> {
        let Address::Memory(name) = address else { return Err(wrong_address(address)) };
        let (sender, receiver) = sync_channel(BACKLOG);
        let mut listeners = self.listeners.lock().expect("no holder panics");
        if listeners.get(name).is_some_and(|(_, alive)| alive.strong_count() > 0) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let alive = Arc::new(());
        listeners.insert(name.clone(), (sender, Arc::downgrade(&alive)));
        Ok(Box::new(MemoryListener { receiver, _alive: alive }))
    }

    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        let Address::Memory(name) = address else { return Err(wrong_address(address)) };
        let listeners = self.listeners.lock().expect("no holder panics");
        let (listener, _) = listeners.get(name).ok_or(io::ErrorKind::NotFound)?;
        let (near, far) = memory_pair();
        listener.try_send(far).map_err(|error| match error {
            TrySendError::Full(_) => io::Error::from(io::ErrorKind::ConnectionRefused),
            // Nobody will listen here again.
            TrySendError::Disconnected(_) => io::Error::from(io::ErrorKind::BrokenPipe),
        })?;
        Ok(Box::new(near))
    }
}

struct MemoryListener {
    receiver: Receiver<MemoryStream>,
    _alive: Arc<()>,
}

impl Listener for MemoryListener {
    fn accept(&self, timeout: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        match self.receiver.recv_timeout(timeout) {
            Ok(stream) => Ok(Some(Box::new(stream))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// One direction of a memory stream.
#[derive(Default)]
struct Pipe {
    state: Mutex<PipeState>,
    changed: Condvar,
}

#[derive(Default)]
struct PipeState {
    bytes: VecDeque<u8>,
    closed: bool,
}

impl Pipe {
    fn close(&self) {
        self.state.lock().expect("no holder panics").closed = true;
        self.changed.notify_all();
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let state = self.state.lock().expect("no holder panics");
        let waits = |state: &mut PipeState| state.bytes.is_empty() && !state.closed;
        let (mut state, timeout) = self.changed.wait_timeout_while(state, TICK, waits).expect("no holder panics");
        if timeout.timed_out() && waits(&mut state) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let count = state.bytes.read(buffer)?;
        self.changed.notify_all();
        Ok(count)
    }

    fn write(&self, buffer: &[u8]) -> io::Result<usize> {
        let state = self.state.lock().expect("no holder panics");
        let waits = |state: &mut PipeState| state.bytes.len() >= PIPE_BYTES && !state.closed;
        let (mut state, timeout) = self.changed.wait_timeout_while(state, TICK, waits).expect("no holder panics");
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if timeout.timed_out() && waits(&mut state) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let count = buffer.len().min(PIPE_BYTES - state.bytes.len());
        state.bytes.extend(&buffer[..count]);
        self.changed.notify_all();
        Ok(count)
    }
}

/// Both pipes of one end; the last handle of an end closes them, as with a socket.
struct End {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.incoming.close();
        self.outgoing.close();
    }
}

pub(super) struct MemoryStream(Arc<End>);

/// Both ends of a stream.
pub(super) fn memory_pair() -> (MemoryStream, MemoryStream) {
    let (one, other) = (Arc::new(Pipe::default()), Arc::new(Pipe::default()));
    let near = End { incoming: one.clone(), outgoing: other.clone() };
    let far = End { incoming: other, outgoing: one };
    (MemoryStream(Arc::new(near)), MemoryStream(Arc::new(far)))
}

impl Read for MemoryStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.incoming.read(buffer)
    }
}

impl Write for MemoryStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.outgoing.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for MemoryStream {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(MemoryStream(self.0.clone())))
    }

    fn shutdown(&self) {
        self.0.incoming.close();
        self.0.outgoing.close();
    }

    fn is(&self, _: Member) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::protocol::connection::{Connection, ConnectionError, at_most};
    use crate::protocol::deadline::STALL;
    use crate::protocol::tcp::testing::{Meeting, loopback};
    use crate::topology::Replica;

    /// A name, a transport for each end, an address to listen on, and the folder that must live as long.
    type Case = (&'static str, [Box<dyn Transport>; 2], Address, Option<tempfile::TempDir>);

    fn all() -> Vec<Case> {
        let folder = tempfile::tempdir().unwrap();
        let socket = Address::Unix(folder.path().join("s"));
        let memory = Memory::default();
        let run = Meeting::new("test");
        let tls = [Replica::worker(0), Replica::ps(0)].map(|replica| run.transport(replica.into()));
        vec![
            ("memory", [Box::new(memory.clone()), Box::new(memory)], Address::Memory("s".into()), None),
            ("unix", [Box::new(Unix), Box::new(Unix)], socket, Some(folder)),
            ("tls", tls.map(|tls| Box::new(tls) as Box<dyn Transport>), loopback(Replica::ps(0)), None),
        ]
    }

    #[test]
    fn attempts_between_machines_are_quick_for_two_seconds_and_rare_after_a_while() {
        let [near, far] = [Address::Memory("s".into()), loopback(Replica::ps(0))];
        let after = |address, attempts| pauses(address).take(attempts).sum::<Duration>();
        for address in [&near, &far] {
            assert_eq!(after(address, 4), Duration::from_millis(1 + 2 + 4 + 8));
            assert!(after(address, 45) < Duration::from_millis(2_100) && after(address, 45) > Duration::from_secs(2));
        }
        assert!(pauses(&near).skip(100).take(100).all(|pause| pause == Duration::from_millis(50)));
        assert!(pauses(&far).skip(100).take(100).all(|pause| pause == Duration::from_secs(1)));
    }

    /// A name that is unknown at first, as a pod's is after its start.
    struct Unknown {
        memory: Memory,
        until: usize,
        asked: std::sync::atomic::AtomicUsize,
    }

    impl Transport for Unknown {
        fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>> {
            self.memory.listen(address)
        }

        fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
            match self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < self.until {
                true => Err(io::ErrorKind::NotFound.into()),
                false => self.memory.connect(address),
            }
        }
    }

    #[test]
    fn a_name_that_is_unknown_at_first_is_asked_for_again() {
        let address = Address::Memory("s".into());
        let unknown = |until| Unknown { memory: Memory::default(), until, asked: 0.into() };
        let transport = unknown(20);
        let _listener = transport.listen(&address).unwrap();
        connect_patiently(&transport, &address, Instant::now() + STALL, &|| Ok(())).unwrap();
        // And one that is never known is given up in time.
        let (started, limit) = (Instant::now(), Duration::from_millis(200));
        let error = connect_patiently(&unknown(usize::MAX), &address, started + limit, &|| Ok(())).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(started.elapsed() >= limit && started.elapsed() < STALL);
    }

    #[test]
    fn bytes_arrive_in_order_and_the_end_is_seen() {
        for (name, [calling, called], address, _folder) in all() {
            let nobody = calling.connect(&address).err().unwrap().kind();
            assert!(matches!(nobody, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused), "{name}: {nobody}");
            let listener = called.listen(&address).unwrap();
            assert!(listener.accept(Duration::ZERO).unwrap().is_none(), "{name}");
            let mut near = Connection::new(calling.connect(&address).unwrap());
            let mut far = Connection::new(listener.accept(STALL).unwrap().unwrap());
            let sent: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    near.write_all(&sent, &at_most(STALL)).unwrap();
                    near.shutdown();
                });
                let mut received = vec![0; sent.len()];
                far.read_exact(&mut received, &at_most(STALL)).unwrap();
                assert!(received == sent, "{name}");
                let end = far.read_exact(&mut [0], &at_most(STALL)).unwrap_err();
                assert!(
                    matches!(&end, ConnectionError::Broken(error) if error.kind() == io::ErrorKind::UnexpectedEof),
                    "{name}: {end:?}"
                );
            });
        }
    }

    #[test]
    fn a_silent_peer_costs_one_tick_not_for_ever() {
        for (name, [calling, called], address, _folder) in all() {
            let listener = called.listen(&address).unwrap();
            let mut near = calling.connect(&address).unwrap();
            let _far = listener.accept(STALL).unwrap().unwrap();
            let kind = near.read(&mut [0; 8]).unwrap_err().kind();
            assert!(matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{name}: {kind}");
        }
    }
}
