//! How bytes travel between machines: TCP, and mutual TLS 1.3 around it; [`Plaintext`] is the one way without.
//!
//! [`Tls`] is the transport. What it does to bytes it can do over any [`Stream`], see [`over`]: the launcher reaches a
//! coordinator through an engine, not by a socket.

use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError, mpsc};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::deadline::{CONNECT, TICK};
use super::transport::{Listener, Stream, Transport, accept_within, wrong_address};
use crate::secure::identity::{Identity, IdentityError};
use crate::secure::tls::{Settings, is};
use crate::topology::{Address, Member};

/// Connections that wait to be accepted: all replicas of a large run at once.
const BACKLOG: i32 = 1024;

/// TCP with TLS, as one member of a run. Who is at the other end is known from the certificate, never from an address.
pub(crate) struct Tls {
    settings: Settings,
}

impl Tls {
    /// The transport of `identity`'s owner.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Unusable`] if the identity's bytes are not what was issued.
    pub(crate) fn new(identity: &Identity) -> Result<Self, IdentityError> {
        Ok(Self { settings: Settings::new(identity)? })
    }
}

impl Transport for Tls {
    fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>> {
        Ok(Box::new(TlsListener { listener: listen(address)?, settings: self.settings.clone() }))
    }

    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        let Address::Tls { server, host, port } = address else { return Err(wrong_address(address)) };
        let stream = connect(resolve(host, *port)?)?;
        let tls = self.settings.connect(Member::Replica(*server)).map_err(io::Error::other)?;
        TlsStream::open(Box::new(stream), tls)
    }
}

/// TCP and nothing around it. Whoever reaches a port of the run can read the parameters, change them and take part; only for
/// replicas whose author has said by name that this is meant.
pub(crate) struct Plaintext;

impl Transport for Plaintext {
    fn listen(&self, address: &Address) -> io::Result<Box<dyn Listener>> {
        Ok(Box::new(PlaintextListener(listen(address)?)))
    }

    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        let Address::Tls { host, port, .. } = address else { return Err(wrong_address(address)) };
        Ok(Box::new(PlaintextStream(connect(resolve(host, *port)?)?)))
    }
}

struct PlaintextListener(TcpListener);

impl Listener for PlaintextListener {
    fn accept(&self, timeout: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        let accepted = accept_within(&self.0, timeout, || self.0.accept())?;
        accepted.map(|(stream, _)| Ok(Box::new(PlaintextStream(set_up(stream)?)) as Box<dyn Stream>)).transpose()
    }
}

/// A stream between two who believe each other.
struct PlaintextStream(TcpStream);

impl Read for PlaintextStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for PlaintextStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for PlaintextStream {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Self(TcpStream::try_clone(&self.0)?)))
    }

    fn shutdown(&self) {
        Stream::shutdown(&self.0);
    }

    fn is(&self, _: Member) -> bool {
        true
    }
}

/// TLS as a client over any stream, to `server` at its other end.
///
/// Returns at once: the first write or read exchanges certificates, and fails if somebody else answers.
///
/// # Errors
///
/// If the identity cannot be used, or the stream has no second handle.
pub(crate) fn over(stream: Box<dyn Stream>, identity: &Identity, server: Member) -> io::Result<Box<dyn Stream>> {
    let settings = Settings::new(identity).map_err(io::Error::other)?;
    TlsStream::open(stream, settings.connect(server).map_err(io::Error::other)?)
}

fn listen(address: &Address) -> io::Result<TcpListener> {
    let Address::Tls { host, port, .. } = address else { return Err(wrong_address(address)) };
    let listener = match host.parse::<IpAddr>() {
        // Nobody else can mean this address.
        Ok(host) if host.is_loopback() => TcpListener::bind((host, *port))?,
        _ => everywhere(*port)?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Listens at `port` of every address of this machine: which of them the others know is not known here.
fn everywhere(port: u16) -> io::Result<TcpListener> {
    match both_families(port) {
        // The machine knows only the older one.
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        socket => Ok(TcpListener::from(socket?)),
    }
}

fn both_families(port: u16) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The default is the machine's to choose.
    sockopt::set_ipv6_v6only(&socket, false)?;
    // A replica that is started again need not wait until the connections of its former life are forgotten.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The addresses of `host`. A name that cannot be resolved is an error of kind `NotFound`: it may be known a little later.
fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::from((address, port))]);
    }
    let (found, finding) = mpsc::channel();
    let name = host.to_owned();
    // The system's resolver cannot be told how long it may take, so that it is left behind if it takes too long.
    std::thread::spawn(move || {
        let _ = found.send((name.as_str(), port).to_socket_addrs().map(Vec::from_iter));
    });
    let not_found = |reason: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::NotFound, format!("cannot resolve the name `{host}`: {reason}"))
    };
    match finding.recv_timeout(CONNECT) {
        Ok(Ok(addresses)) if !addresses.is_empty() => Ok(addresses),
        Ok(Ok(_)) => Err(not_found(&"it has no address")),
        Ok(Err(error)) => Err(not_found(&error)),
        Err(_) => Err(not_found(&format_args!("no answer within {} ms", CONNECT.as_millis()))),
    }
}

/// Connects to the first of `addresses` that answers.
fn connect(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let most = CONNECT / addresses.len() as u32;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match TcpStream::connect_timeout(&address, most) {
            Ok(stream) => return set_up(stream),
            Err(error) => last = io::Error::new(error.kind(), format!("{address}: {error}")),
        }
    }
    Err(last)
}

fn set_up(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))?;
    // A message is one write, and waits for nothing.
    stream.set_nodelay(true)?;
    Ok(stream)
}

struct TlsListener {
    listener: TcpListener,
    settings: Settings,
}

impl Listener for TlsListener {
    fn accept(&self, timeout: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        let Some((stream, _)) = accept_within(&self.listener, timeout, || self.listener.accept())? else {
            return Ok(None);
        };
        let tls = self.settings.accept().map_err(io::Error::other)?;
        // Nothing is exchanged here, where a caller who says nothing would hold the others up.
        TlsStream::open(Box::new(set_up(stream)?), tls).map(Some)
    }
}

/// Bytes in the clear, of nobody in particular.
impl Stream for TcpStream {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(TcpStream::try_clone(self)?))
    }

    fn shutdown(&self) {
        // An error means that the stream is closed already, which is what was asked for.
        let _ = TcpStream::shutdown(self, std::net::Shutdown::Both);
    }

    fn is(&self, _: Member) -> bool {
        false
    }
}

/// A handle to one end of a TLS connection.
struct TlsStream(Arc<Session>);

/// One end of a TLS connection, for one thread that reads and one that writes.
///
/// The network is waited for with one of the two halves locked, never with `tls`: so what arrives is decrypted while a write
/// waits, and two ends that both send much do not wait for each other. A half is locked before `tls`.
struct Session {
    tls: Mutex<rustls::Connection>,
    /// The handshake is over.
    handshaken: Condvar,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    /// For ending the stream while others read and write.
    handle: Mutex<Box<dyn Stream>>,
    /// Ended from this side.
    closed: AtomicBool,
}

/// Bytes that are read from the network at once where little is said: a record.
const LEAST_READ_BYTES: usize = 17 << 10;

/// The same where much is: some records, so that there are few system calls.
const MOST_READ_BYTES: usize = 128 << 10;

/// Bytes that are encrypted and sent at once, for the same reason.
const WRITE_BYTES: usize = 128 << 10;

/// The way in.
struct Incoming {
    stream: Box<dyn Stream>,
    /// What has arrived; of that, `start..end` is still to be decrypted.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Why no more will be.
    failed: Option<rustls::Error>,
}

/// The way out.
struct Outgoing {
    stream: Box<dyn Stream>,
    /// What is encrypted; of that, what lies behind `sent` has not left yet.
    bytes: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    /// Sends what there is. An error of the kind that passes leaves the rest for the next call.
    fn send(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + TICK;
        while self.sent < self.bytes.len() {
            match self.stream.write(&self.bytes[self.sent..])? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => self.sent += count,
            }
            // A peer that takes little at a time is not to hold up those who wait for this half.
            if self.sent < self.bytes.len() && Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }
}

/// Whether a failed read or write may be repeated.
fn passes(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

impl TlsStream {
    fn open(stream: Box<dyn Stream>, mut tls: rustls::Connection) -> io::Result<Box<dyn Stream>> {
        // What is encrypted is taken out at once.
        tls.set_buffer_limit(None);
        let (reading, writing) = (stream.try_clone()?, stream.try_clone()?);
        Ok(Box::new(Self(Arc::new(Session {
            tls: Mutex::new(tls),
            handshaken: Condvar::new(),
            incoming: Mutex::new(Incoming { stream: reading, bytes: Vec::new(), start: 0, end: 0, failed: None }),
            outgoing: Mutex::new(Outgoing { stream: writing, bytes: Vec::new(), sent: 0 }),
            handle: Mutex::new(stream),
            closed: AtomicBool::new(false),
        }))))
    }
}

impl Session {
    fn tls(&self) -> MutexGuard<'_, rustls::Connection> {
        self.tls.lock().expect("no holder panics")
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().expect("no holder panics")
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let deadline = Instant::now() + TICK;
        let mut incoming = self.incoming.lock().expect("no holder panics");
        loop {
            let decrypted = self.decrypt(&mut incoming, buffer);
            self.answer();
            match decrypted? {
                Some(0) if Instant::now() > deadline => return Err(io::ErrorKind::TimedOut.into()),
                Some(0) => {}
                Some(count) => return Ok(count),
                None => return Ok(0),
            }
            if !self.receive(&mut incoming)? {
                return Ok(0);
            }
        }
    }

    /// Waits for more from the network, which has nothing left to decrypt; `false` if this side has ended the stream.
    fn receive(&self, incoming: &mut Incoming) -> io::Result<bool> {
        if incoming.end == incoming.bytes.len() {
            // It was full.
            let more = (incoming.end * 2).clamp(LEAST_READ_BYTES, MOST_READ_BYTES);
            incoming.bytes.resize(more, 0);
        }
        match incoming.stream.read(&mut incoming.bytes) {
            Ok(0) if self.closed.load(Ordering::Acquire) => Ok(false),
            Ok(0) => {
                let message = "the stream was cut (the other process ended, or somebody between)";
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, message))
            }
            Ok(count) => {
                (incoming.start, incoming.end) = (0, count);
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// Decrypts into `buffer` what has arrived; returns how much that is, or `None` if the other end has said that no more
    /// comes. Without a buffer, goes on until the handshake is over.
    fn decrypt(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut tls = self.tls();
        let mut filled = 0;
        loop {
            if buffer.is_empty() {
                if !tls.is_handshaking() {
                    return Ok(Some(0));
                }
            } else {
                match tls.reader().read(&mut buffer[filled..]) {
                    Ok(0) => return Ok((filled > 0).then_some(filled)),
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                if filled == buffer.len() {
                    return Ok(Some(filled));
                }
            }
            if let Some(error) = &incoming.failed {
                return if filled > 0 { Ok(Some(filled)) } else { Err(refused(error)) };
            }
            if incoming.start == incoming.end {
                return Ok(Some(filled));
            }
            let was_handshaking = tls.is_handshaking();
            incoming.start += tls.read_tls(&mut &incoming.bytes[incoming.start..incoming.end])?;
            incoming.failed = tls.process_new_packets().err();
            if was_handshaking && !tls.is_handshaking() {
                self.handshaken.notify_all();
            }
        }
    }

    /// Sends what TLS has to say by itself: its part of the handshake, new keys, why it refuses.
    ///
    /// Does not wait for a writer, who takes it along. What cannot be sent is no error here: that the stream is broken
    /// will be read, and perhaps why.
    fn answer(&self) {
        let mut outgoing = match self.outgoing.try_lock() {
            Ok(outgoing) => outgoing,
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(_)) => panic!("no holder panics"),
        };
        let mut tls = self.tls();
        // A write that has not ended yet will go on by itself, and until then nobody is to wait for it here.
        let first = outgoing.bytes.is_empty() || tls.is_handshaking();
        take(&mut tls, &mut outgoing);
        drop(tls);
        if first {
            let _ = outgoing.send();
        }
    }

    /// Brings the handshake to its end before something is written; waits no longer than a tick.
    fn shake_hands(&self) -> io::Result<()> {
        let deadline = Instant::now() + TICK;
        loop {
            self.answer();
            let tls = self.tls();
            if !tls.is_handshaking() {
                return Ok(());
            }
            let now = Instant::now();
            if now > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.incoming.try_lock() {
                Ok(mut incoming) => {
                    drop(tls);
                    if incoming.start == incoming.end && incoming.failed.is_none() && !self.receive(&mut incoming)? {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                    let shaken = self.decrypt(&mut incoming, &mut []);
                    if shaken.is_err() {
                        self.answer();
                    }
                    shaken?;
                }
                // Whoever reads does it.
                Err(TryLockError::WouldBlock) => {
                    let waits = |tls: &mut rustls::Connection| tls.is_handshaking();
                    drop(self.handshaken.wait_timeout_while(tls, deadline - now, waits).expect("no holder panics"));
                }
                Err(TryLockError::Poisoned(_)) => panic!("no holder panics"),
            }
        }
    }

    fn write(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.shake_hands()?;
        let mut outgoing = self.outgoing();
        // Not more than one piece ever waits: what the peer does not take is this side's to hold back.
        outgoing.send()?;
        let mut piece = Vec::with_capacity(buffers.len().min(2));
        let mut room = WRITE_BYTES;
        for buffer in buffers {
            let part = &buffer[..buffer.len().min(room)];
            room -= part.len();
            piece.push(IoSlice::new(part));
        }
        let count = {
            let mut tls = self.tls();
            let count = tls.writer().write_vectored(&piece)?;
            take(&mut tls, &mut outgoing);
            count
        };
        match outgoing.send() {
            // It is taken; the next write, or a flush, sends the rest.
            Err(error) if passes(&error) => Ok(count),
            sent => sent.map(|()| count),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut outgoing = self.outgoing();
        take(&mut self.tls(), &mut outgoing);
        outgoing.send()?;
        outgoing.stream.flush()
    }

    fn shutdown(&self) {
        self.closed.store(true, Ordering::Release);
        // Longer than this a writer has the lock only if the peer takes nothing, and then it takes no goodbye either.
        let deadline = Instant::now() + TICK / 10;
        let outgoing = loop {
            match self.outgoing.try_lock() {
                Ok(outgoing) => break Some(outgoing),
                Err(_) if Instant::now() > deadline => break None,
                Err(_) => std::thread::sleep(TICK / 500),
            }
        };
        if let Some(mut outgoing) = outgoing {
            let mut tls = self.tls();
            tls.send_close_notify();
            take(&mut tls, &mut outgoing);
            drop(tls);
            // Whether it arrived or not, this is the end.
            let _ = outgoing.send();
        }
        self.handle.lock().expect("no holder panics").shutdown();
    }
}

/// Moves what is encrypted out of TLS.
fn take(tls: &mut rustls::Connection, outgoing: &mut Outgoing) {
    while tls.wants_write() {
        tls.write_tls(&mut outgoing.bytes).expect("memory takes what is written");
    }
}

/// In words for whoever looks for the reason of a run's end.
fn refused(error: &rustls::Error) -> io::Error {
    let message = match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
            format!("the other end is not whom it should be, or of another run ({error})")
        }
        rustls::Error::AlertReceived(_) => format!("the other end does not accept this one ({error})"),
        error => error.to_string(),
    };
    io::Error::new(io::ErrorKind::InvalidData, message)
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() { Ok(0) } else { self.0.read(buffer) }
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for TlsStream {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Self(self.0.clone())))
    }

    fn shutdown(&self) {
        self.0.shutdown();
    }

    fn is(&self, member: Member) -> bool {
        is(&self.0.tls(), member)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A run's members on this machine.

    use super::*;
    use crate::secure::identity::Authority;
    use crate::topology::Replica;

    /// A run whose members can be had as needed.
    pub(crate) struct Meeting(pub(crate) Authority);

    impl Meeting {
        pub(crate) fn new(run: &str) -> Self {
            Self(Authority::new(run).unwrap())
        }

        pub(crate) fn identity(&self, member: Member) -> Identity {
            self.0.issue(member).unwrap()
        }

        pub(crate) fn transport(&self, member: Member) -> Tls {
            Tls::new(&self.identity(member)).unwrap()
        }
    }

    /// An address at which nobody listens yet.
    pub(crate) fn loopback(server: Replica) -> Address {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        Address::Tls { server, host: Ipv4Addr::LOCALHOST.to_string(), port }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Meeting, loopback};
    use super::*;
    use crate::protocol::connection::{Connection, ConnectionError, at_most};
    use crate::protocol::deadline::STALL;
    use crate::protocol::transport::memory_pair;
    use crate::topology::Replica;
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    use rustls::pki_types::{CertificateDer, ServerName};

    const SERVER: Replica = Replica { role: crate::topology::Role::Ps, rank: crate::topology::Rank(0) };

    fn worker() -> Member {
        Replica::worker(1).into()
    }

    /// Both ends of a connection over loopback, of whoever they claim to be.
    fn pair(calling: &Identity, called: &Identity) -> (Connection, Connection) {
        let address = loopback(SERVER);
        let listener = Tls::new(called).unwrap().listen(&address).unwrap();
        let near = Tls::new(calling).unwrap().connect(&address).unwrap();
        let far = listener.accept(STALL).unwrap().unwrap();
        (Connection::new(near), Connection::new(far))
    }

    /// Both ends over a stream in memory, and that stream.
    fn pair_in_memory() -> (Connection, Connection, Box<dyn Stream>) {
        let run = Meeting::new("test");
        let settings = |member| Settings::new(&run.identity(member)).unwrap();
        joined(&settings(worker()), &settings(SERVER.into()))
    }

    fn joined(calling: &Settings, called: &Settings) -> (Connection, Connection, Box<dyn Stream>) {
        let (near, far) = memory_pair();
        let line = near.try_clone().unwrap();
        let near = TlsStream::open(Box::new(near), calling.connect(SERVER.into()).unwrap()).unwrap();
        let far = TlsStream::open(Box::new(far), called.accept().unwrap()).unwrap();
        (Connection::new(near), Connection::new(far), line)
    }

    /// Why the two do not come together, as each end has it.
    fn disagreement(mut near: Connection, mut far: Connection) -> [String; 2] {
        let ask = |end: &mut Connection| {
            // The other one may have hung up by now; why is to be read.
            let _ = end.write_all(&[1], &at_most(STALL));
            let error = end.read_exact(&mut [0], &at_most(STALL)).unwrap_err();
            end.shutdown();
            match error {
                ConnectionError::Broken(error) => error.to_string(),
                other => panic!("{other}"),
            }
        };
        std::thread::scope(|scope| {
            let far = scope.spawn(move || ask(&mut far));
            [ask(&mut near), far.join().unwrap()]
        })
    }

    /// Says a byte from `near` to `far`.
    fn greet(near: &mut Connection, far: &mut Connection) {
        std::thread::scope(|scope| {
            scope.spawn(|| near.write_all(&[7], &at_most(STALL)).unwrap());
            let mut byte = [0];
            far.read_exact(&mut byte, &at_most(STALL)).unwrap();
            assert_eq!(byte, [7]);
        });
    }

    #[test]
    fn each_end_knows_the_other_by_its_certificate() {
        let run = Meeting::new("test");
        let (mut near, mut far) = pair(&run.identity(worker()), &run.identity(SERVER.into()));
        assert!(!near.is(SERVER.into()) && !far.is(worker()));
        greet(&mut near, &mut far);
        let members = [worker(), SERVER.into(), Replica::worker(0).into(), Replica::worker(11).into(), Member::Caller];
        let known = |end: &Connection| members.into_iter().filter(|member| end.is(*member)).collect::<Vec<_>>();
        assert_eq!((known(&near), known(&far)), (vec![SERVER.into()], vec![worker()]));
    }

    #[test]
    fn a_member_of_another_run_is_refused_by_both_ends() {
        // Of the same name, so that nothing but the key differs.
        let [run, other] = ["test", "test"].map(Meeting::new);
        let (own, server) = (run.identity(worker()), run.identity(SERVER.into()));
        let stranger = other.identity(worker());
        let [near, _] = disagreement_of(&stranger, &server);
        assert!(near.contains("invalid peer certificate"), "{near}");
        // Knows whom it calls, and has nothing to be known by.
        let [near, far] = disagreement_of(&stranger.trusting(&own), &server);
        assert!(far.contains("invalid peer certificate"), "{far}");
        assert!(near.contains("received fatal alert"), "{near}");
        // And the other way round.
        let [near, far] = disagreement_of(&own, &other.identity(SERVER.into()).trusting(&own));
        assert!(near.contains("invalid peer certificate"), "{near}");
        assert!(far.contains("received fatal alert"), "{far}");
    }

    fn disagreement_of(calling: &Identity, called: &Identity) -> [String; 2] {
        let (near, far) = pair(calling, called);
        disagreement(near, far)
    }

    #[test]
    fn who_answers_in_the_place_of_another_is_named() {
        let run = Meeting::new("test");
        for answering in [Replica::ps(1), Replica::worker(0)] {
            let [near, _] = disagreement_of(&run.identity(worker()), &run.identity(answering.into()));
            assert!(near.contains("ps-0") && near.contains(&answering.file_name()), "{near}");
        }
        // The caller calls, and is not called.
        let (near, far, _) = joined(
            &Settings::new(&run.identity(worker())).unwrap(),
            &Settings::new(&run.identity(Member::Caller)).unwrap(),
        );
        let [near, _] = disagreement(near, far);
        assert!(near.contains("invalid peer certificate"), "{near}");
    }

    #[test]
    fn without_a_certificate_or_with_an_older_tls_nobody_comes_in() {
        let run = Meeting::new("test");
        let server = run.identity(SERVER.into());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_slice(server.authority())).unwrap();
        for (version, words) in [(&rustls::version::TLS13, "no certificates"), (&rustls::version::TLS12, "Tls12")] {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = rustls::ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[version])
                .unwrap()
                .with_root_certificates(roots.clone())
                .with_no_client_auth();
            let name = ServerName::try_from(SERVER.file_name()).unwrap();
            let client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
            let (near, far) = memory_pair();
            let near = TlsStream::open(Box::new(near), client.into()).unwrap();
            let far = TlsStream::open(Box::new(far), Settings::new(&server).unwrap().accept().unwrap()).unwrap();
            let [_, far] = disagreement(Connection::new(near), Connection::new(far));
            assert!(far.contains(words), "{far}");
        }
    }

    #[test]
    fn callers_who_say_nothing_or_nonsense_hold_nobody_up() {
        let run = Meeting::new("test");
        let address = loopback(SERVER);
        let Address::Tls { port, .. } = address else { unreachable!() };
        let listener = run.transport(SERVER.into()).listen(&address).unwrap();
        // Silence, another protocol, the first half of a record, a record that is longer than any.
        let strangers: [&[u8]; 4] = [b"", b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 2, 0, 1, 0], &[22, 3, 1, 255, 255]];
        let mut open = Vec::new();
        for words in strangers {
            let mut stranger = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            stranger.write_all(words).unwrap();
            open.push((stranger, listener.accept(STALL).unwrap().unwrap()));
        }
        // They are still there, and another one is served.
        let mut near = Connection::new(run.transport(worker()).connect(&address).unwrap());
        let mut far = Connection::new(listener.accept(STALL).unwrap().unwrap());
        greet(&mut near, &mut far);
        let ends = open.iter_mut().map(|(_, stream)| stream.read(&mut [0]).unwrap_err());
        let waits = ends.map(|error| passes(&error)).collect::<Vec<_>>();
        assert_eq!(waits, [true, false, true, false]);
    }

    #[test]
    fn a_stream_that_is_cut_is_no_end() {
        let (mut near, mut far, line) = pair_in_memory();
        greet(&mut near, &mut far);
        near.write_all(&[1, 2, 3], &at_most(STALL)).unwrap();
        line.shutdown();
        let mut received = [0; 3];
        far.read_exact(&mut received, &at_most(STALL)).unwrap();
        assert_eq!(received, [1, 2, 3]);
        let Err(ConnectionError::Broken(error)) = far.read_exact(&mut [0], &at_most(STALL)) else { panic!() };
        assert!(error.to_string().contains("cut"), "{error}");
    }

    #[test]
    fn a_byte_that_is_changed_on_its_way_is_noticed() {
        let run = Meeting::new("test");
        let (mut near, changed) = memory_pair();
        let (mut other, far) = memory_pair();
        let called = Settings::new(&run.identity(SERVER.into())).unwrap();
        let mut far = Connection::new(TlsStream::open(Box::new(far), called.accept().unwrap()).unwrap());
        let mut client = Connection::new(over(Box::new(changed), &run.identity(worker()), SERVER.into()).unwrap());
        let quiet = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (mut answers, mut to_client) = (other.try_clone().unwrap(), near.try_clone().unwrap());
            scope.spawn(move || relay(&mut answers, &mut to_client, |bytes| bytes.len()));
            let quiet = &quiet;
            scope.spawn(move || {
                relay(&mut near, &mut other, |bytes| {
                    if quiet.load(Ordering::Acquire) {
                        *bytes.last_mut().unwrap() ^= 1;
                    }
                    bytes.len()
                });
            });
            greet(&mut client, &mut far);
            quiet.store(true, Ordering::Release);
            client.write_all(&[1; 100], &at_most(STALL)).unwrap();
            let Err(ConnectionError::Broken(error)) = far.read_exact(&mut [0], &at_most(STALL)) else { panic!() };
            assert!(error.to_string().contains("decrypt"), "{error}");
            far.shutdown();
            client.shutdown();
        });
    }

    /// What somebody in the middle does with bytes, told how many have gone before: how many go on.
    type Meddle<'a> = &'a (dyn Fn(usize, &mut [u8]) -> usize + Sync);

    fn leave(_: usize, bytes: &mut [u8]) -> usize {
        bytes.len()
    }

    /// Lets two ends greet each other through somebody who meddles with what is said and with what is answered. Returns who
    /// was sure to have met the other one.
    fn meet(settings: &[Settings; 2], most: Duration, said: Meddle<'_>, answered: Meddle<'_>) -> [bool; 2] {
        let ((near, near_line), (far_line, far)) = (memory_pair(), memory_pair());
        let near = TlsStream::open(Box::new(near), settings[0].connect(SERVER.into()).unwrap()).unwrap();
        let far = TlsStream::open(Box::new(far), settings[1].accept().unwrap()).unwrap();
        let lines = [&near_line, &far_line].map(|line| [line.try_clone().unwrap(), line.try_clone().unwrap()]);
        let [[mut from_near, mut to_near], [mut from_far, mut to_far]] = lines;
        let greet = |end: &mut Connection, other| {
            let met = end.write_all(&[7], &at_most(most)).and_then(|()| end.read_exact(&mut [0], &at_most(most)));
            assert!(met.is_err() || end.is(other));
            if met.is_err() {
                end.shutdown();
            }
            met.is_ok()
        };
        let (mut near, mut far) = (Connection::new(near), Connection::new(far));
        std::thread::scope(|scope| {
            for (from, to, meddle) in [(&mut from_near, &mut to_far, said), (&mut from_far, &mut to_near, answered)] {
                scope.spawn(move || {
                    let mut before = 0;
                    relay(from, to, |bytes| {
                        let passed = meddle(before, bytes);
                        before += bytes.len();
                        passed
                    });
                    from.shutdown();
                    to.shutdown();
                });
            }
            let meeting = scope.spawn(|| greet(&mut near, SERVER.into()));
            let met = [greet(&mut far, worker()), meeting.join().unwrap()];
            [&near_line, &far_line].into_iter().for_each(Stream::shutdown);
            met
        })
    }

    fn two_ends() -> [Settings; 2] {
        let run = Meeting::new("test");
        [worker(), SERVER.into()].map(|member| Settings::new(&run.identity(member)).unwrap())
    }

    #[test]
    fn a_handshake_that_is_cut_anywhere_is_an_error_at_both_ends() {
        let ends = two_ends();
        assert_eq!(meet(&ends, STALL, &leave, &leave), [true, true]);
        for place in (0..600).step_by(23) {
            let cut = |before: usize, bytes: &mut [u8]| bytes.len().min(place - before);
            assert_eq!(meet(&ends, STALL, &cut, &leave), [false, false], "cut at byte {place}");
            assert_eq!(meet(&ends, STALL, &leave, &cut), [false, false], "cut at byte {place} of the answer");
        }
    }

    #[test]
    fn nobody_is_taken_for_another_whatever_is_changed_on_the_way() {
        let ends = two_ends();
        let mut noticed = 0;
        // A length that was changed makes an end wait for more than there is.
        let most = TICK;
        for place in (0..600usize).step_by(31) {
            let change = |before: usize, bytes: &mut [u8]| {
                if let Some(byte) = place.checked_sub(before).and_then(|at| bytes.get_mut(at)) {
                    *byte ^= 0x10;
                }
                bytes.len()
            };
            for met in [meet(&ends, most, &change, &leave), meet(&ends, most, &leave, &change)] {
                noticed += usize::from(met != [true, true]);
            }
        }
        // Some bytes say nothing: the version in a record's head, for one.
        assert!(noticed > 30, "{noticed} of 40");
    }

    /// Carries bytes until one end is closed, or `pass` lets only some of them through.
    fn relay(from: &mut dyn Read, to: &mut dyn Write, mut pass: impl FnMut(&mut [u8]) -> usize) {
        let mut bytes = vec![0; 5000];
        loop {
            let count = match from.read(&mut bytes) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if passes(&error) => continue,
                Err(_) => return,
            };
            let passed = pass(&mut bytes[..count]);
            let mut rest = &bytes[..passed];
            while !rest.is_empty() {
                match to.write(rest) {
                    Ok(count) => rest = &rest[count..],
                    Err(error) if passes(&error) => {}
                    Err(_) => return,
                }
            }
            if passed < count {
                return;
            }
        }
    }

    #[test]
    fn who_is_behind_a_relay_is_known_all_the_same() {
        let run = Meeting::new("test");
        let address = loopback(SERVER);
        let Address::Tls { port, .. } = address else { unreachable!() };
        let listener = run.transport(SERVER.into()).listen(&address).unwrap();
        let (near, mut relayed) = memory_pair();
        let mut socket = set_up(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap()).unwrap();
        let mut far = Connection::new(listener.accept(STALL).unwrap().unwrap());
        let mut near = Connection::new(over(Box::new(near), &run.identity(Member::Caller), SERVER.into()).unwrap());
        std::thread::scope(|scope| {
            let (mut answers, mut back) = (TcpStream::try_clone(&socket).unwrap(), relayed.try_clone().unwrap());
            scope.spawn(move || relay(&mut answers, &mut back, |bytes| bytes.len()));
            scope.spawn(move || relay(&mut relayed, &mut socket, |bytes| bytes.len()));
            greet(&mut near, &mut far);
            assert!(near.is(SERVER.into()) && far.is(Member::Caller));
            greet(&mut far, &mut near);
            near.shutdown();
            far.shutdown();
        });
    }

    /// Some bytes that do not repeat soon.
    fn bytes(seed: u64, count: usize) -> Vec<u8> {
        let mut generator = StdRng::seed_from_u64(seed);
        let mut bytes = vec![0; count];
        generator.fill(&mut bytes[..]);
        bytes
    }

    /// Both ends send `count` bytes at once, in pieces of any size, and read the other's in others.
    fn exchange_at_once(near: Connection, far: Connection, count: usize) {
        std::thread::scope(|scope| {
            for (seed, end) in [(0, near), (1, far)] {
                let mut writer = end.try_clone().unwrap();
                let mut reader = end;
                scope.spawn(move || {
                    let mut sizes = StdRng::seed_from_u64(seed + 10);
                    let sent = bytes(seed, count);
                    let mut rest = &sent[..];
                    while !rest.is_empty() {
                        let (piece, after) = rest.split_at(rest.len().min(sizes.random_range(1..300_000)));
                        let (head, body) = piece.split_at(piece.len().min(16));
                        writer.write_both(head, body).unwrap();
                        rest = after;
                    }
                });
                scope.spawn(move || {
                    let mut sizes = StdRng::seed_from_u64(seed + 20);
                    let mut received = vec![0; count];
                    let mut rest = &mut received[..];
                    while !rest.is_empty() {
                        let most = if sizes.random_bool(0.5) { 100 } else { 100_000 };
                        let (piece, after) = rest.split_at_mut(sizes.random_range(1..=most).min(rest.len()));
                        reader.read_exact(piece, &at_most(STALL)).unwrap();
                        rest = after;
                    }
                    assert!(received == bytes(1 - seed, count));
                });
            }
        });
    }

    #[test]
    fn bytes_arrive_in_order_while_both_ends_send_much() {
        let run = Meeting::new("test");
        let (near, far) = pair(&run.identity(worker()), &run.identity(SERVER.into()));
        exchange_at_once(near, far, 8 << 20);
        let (near, far, _) = pair_in_memory();
        exchange_at_once(near, far, 8 << 20);
    }

    #[test]
    fn keys_are_changed_before_they_wear_out() {
        let run = Meeting::new("test");
        let short = |member| Settings::with_short_lived_keys(&run.identity(member), 40).unwrap();
        let (near, far, _) = joined(&short(worker()), &short(SERVER.into()));
        // Several hundred records each way.
        exchange_at_once(near, far, 8 << 20);
    }

    /// Sends `count` bytes from `near`, which nobody takes; calls `then` when that is noticed. Returns how the writing went.
    fn send_untaken(mut near: Connection, count: usize, then: impl FnOnce()) -> Result<Connection, ConnectionError> {
        let full = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let full = &full;
            let writing = scope.spawn(move || {
                let patience = |waited| {
                    full.store(true, Ordering::Release);
                    at_most(STALL)(waited)
                };
                near.write_all(&bytes(0, count), &patience).map(|()| near)
            });
            while !full.load(Ordering::Acquire) && !writing.is_finished() {
                std::thread::sleep(TICK / 20);
            }
            then();
            writing.join().unwrap()
        })
    }

    #[test]
    fn what_a_peer_does_not_take_yet_is_neither_lost_nor_sent_twice() {
        // The second one fits into memory, and with what is added by encrypting it does not.
        for count in [3 << 20, 256 << 10] {
            let (mut near, mut far, _) = pair_in_memory();
            greet(&mut near, &mut far);
            let mut received = vec![0; count];
            let near = send_untaken(near, count, || far.read_exact(&mut received, &at_most(STALL)).unwrap());
            assert!(near.is_ok() && received == bytes(0, count));
        }
    }

    #[test]
    fn a_writer_that_waits_is_ended_by_a_shutdown() {
        let (mut near, mut far, _) = pair_in_memory();
        greet(&mut near, &mut far);
        let handle = near.try_clone().unwrap();
        let ended = send_untaken(near, 3 << 20, || handle.shutdown());
        assert!(matches!(ended, Err(ConnectionError::Broken(_))));
    }

    #[test]
    fn a_replica_that_is_still_starting_is_waited_for() {
        let run = Meeting::new("test");
        let calling = run.transport(worker());
        // Longer than a name can be, so that no one is asked for it.
        let unknown = Address::Tls { server: SERVER, host: "x".repeat(64), port: 1 };
        let error = calling.connect(&unknown).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("cannot resolve"), "{error}");
        assert_eq!(calling.connect(&loopback(SERVER)).err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_server_is_found_at_every_address_of_its_machine() {
        let run = Meeting::new("test");
        let Address::Tls { port, .. } = loopback(SERVER) else { unreachable!() };
        let at = |host: &str| Address::Tls { server: SERVER, host: host.into(), port };
        let listener = run.transport(SERVER.into()).listen(&at("ps-0.somewhere")).unwrap();
        for host in ["127.0.0.1", "localhost"] {
            let mut near = Connection::new(run.transport(worker()).connect(&at(host)).unwrap());
            let mut far = Connection::new(listener.accept(STALL).unwrap().unwrap());
            greet(&mut near, &mut far);
        }
        assert_eq!(run.transport(SERVER.into()).listen(&at("x")).err().unwrap().kind(), io::ErrorKind::AddrInUse);
    }
}
