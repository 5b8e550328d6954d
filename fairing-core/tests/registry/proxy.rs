//! Stands between client and registry, counts what passes, and misbehaves on request.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use fairing_core::registry::Repository;

/// A proxy in front of one registry; it ends with this value.
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

struct Shared {
    upstream: Option<SocketAddr>,
    rule: Box<dyn Fn(&Request) -> Deed + Send + Sync>,
    seen: Mutex<Vec<Request>>,
    open: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
}

/// A request as it came, without its body.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    /// As it was sent, the request line and the blank line included.
    pub(crate) head: String,
    /// Of the body, as announced.
    pub(crate) length: u64,
    /// What a token server is sent.
    pub(crate) form: String,
    /// How many requests of this method and kind of path came before.
    pub(crate) earlier: usize,
}

/// What to do with a request.
pub(crate) enum Deed {
    /// Pass it on.
    Forward,
    /// Answer it here, after its body was read.
    Answer(u16, &'static str, Vec<String>),
    /// Answer it here with status 200 and this text.
    Say(String),
    /// Answer it here with its own head as the body.
    Echo(u16),
    /// Pass it on with another path.
    ForwardTo(String),
    /// Answer it here at once and read nothing of its body.
    Interrupt(u16),
    /// Close the connection after so many bytes of the body.
    CutAfter(u64),
    /// Pass it on and close the connection instead of bringing the answer.
    CutAnswer,
    /// Pass on the answer's head and so many bytes of its body.
    CutAnswerAfter(u64),
    /// Read it and say nothing.
    Hang,
}

impl Request {
    pub(crate) fn is(&self, method: &str, part: &str) -> bool {
        self.method == method && self.path.contains(part)
    }

    /// Whether it carries a blob.
    pub(crate) fn is_upload(&self) -> bool {
        self.is("PUT", "/blobs/uploads/")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    fn kind(&self) -> (&str, &str) {
        let kinds = ["/blobs/uploads/", "/blobs/", "/manifests/", "/token"];
        (&self.method, kinds.into_iter().find(|kind| self.path.contains(kind)).unwrap_or_default())
    }
}

impl Proxy {
    /// Starts a proxy for the server at `upstream`; each request is dealt with as `rule` says.
    pub(crate) fn start(upstream: SocketAddr, rule: impl Fn(&Request) -> Deed + Send + Sync + 'static) -> Self {
        Self::with(Some(upstream), rule)
    }

    /// Starts a server that answers by `rule` alone.
    pub(crate) fn alone(rule: impl Fn(&Request) -> Deed + Send + Sync + 'static) -> Self {
        Self::with(None, rule)
    }

    fn with(upstream: Option<SocketAddr>, rule: impl Fn(&Request) -> Deed + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            upstream,
            rule: Box::new(rule),
            seen: Mutex::default(),
            open: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let listening = std::thread::spawn({
            let shared = shared.clone();
            move || {
                let mut connections = Vec::new();
                for stream in listener.incoming() {
                    if shared.ended.load(Ordering::SeqCst) {
                        break;
                    }
                    let (stream, shared) = (stream.unwrap(), shared.clone());
                    shared.open.lock().unwrap().push(stream.try_clone().unwrap());
                    connections.push(std::thread::spawn(move || _ = shared.serve(&stream)));
                }
                connections.into_iter().for_each(|connection| connection.join().unwrap());
            }
        });
        Self { address, shared, listening: Some(listening) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn repository(&self, name: &str) -> Repository {
        format!("{}/{name}", self.address).parse().unwrap()
    }

    /// The requests that came, in order.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// How many requests there were that `which` names.
    pub(crate) fn count(&self, which: impl Fn(&Request) -> bool) -> usize {
        self.seen().iter().filter(|request| which(request)).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, then everyone who still reads.
        _ = TcpStream::connect(self.address);
        for stream in self.shared.open.lock().unwrap().iter() {
            _ = stream.shutdown(Shutdown::Both);
        }
        let listening = self.listening.take().unwrap();
        if !std::thread::panicking() {
            listening.join().unwrap();
        }
    }
}

impl Shared {
    /// Deals with the requests of one connection.
    fn serve(&self, stream: &TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream);
        let mut stream = stream;
        while let Some(request) = self.read_head(&mut reader)? {
            let deed = (self.rule)(&request);
            match deed {
                Deed::Forward => self.forward(&request, &mut reader, stream, u64::MAX)?,
                Deed::CutAnswerAfter(bytes) => {
                    self.forward(&request, &mut reader, stream, bytes)?;
                    return stream.shutdown(Shutdown::Both);
                }
                Deed::CutAnswer => {
                    self.forward(&request, &mut reader, &mut io::sink(), u64::MAX)?;
                    return stream.shutdown(Shutdown::Both);
                }
                Deed::Answer(status, body, headers) => {
                    io::copy(&mut (&mut reader).take(request.length), &mut io::sink())?;
                    stream.write_all(&answer(&request, status, body, &headers))?;
                }
                Deed::Say(text) => stream.write_all(&answer(&request, 200, &text, &[]))?,
                Deed::ForwardTo(path) => {
                    let head = request.head.replacen(&request.path, &path, 1);
                    self.forward(&Request { path, head, ..request }, &mut reader, stream, u64::MAX)?;
                }
                Deed::Echo(status) => {
                    io::copy(&mut (&mut reader).take(request.length), &mut io::sink())?;
                    stream.write_all(&answer(&request, status, &request.head, &[]))?;
                }
                Deed::Interrupt(status) => {
                    stream.write_all(&answer(&request, status, "", &["Connection: close".to_owned()]))?;
                    stream.shutdown(Shutdown::Write)?;
                    // Closing with unread bytes would reset the connection and might take the answer with it.
                    io::copy(&mut reader, &mut io::sink())?;
                    return Ok(());
                }
                Deed::CutAfter(bytes) => {
                    io::copy(&mut (&mut reader).take(bytes), &mut io::sink())?;
                    return stream.shutdown(Shutdown::Both);
                }
                Deed::Hang => {
                    io::copy(&mut reader, &mut io::sink())?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn read_head<R: BufRead>(&self, reader: &mut R) -> io::Result<Option<Request>> {
        let mut head = String::new();
        loop {
            let before = head.len();
            if reader.read_line(&mut head)? == 0 {
                return Ok(None);
            }
            if head[before..].trim().is_empty() {
                break;
            }
        }
        let mut line = head.split(' ').map(str::to_owned);
        let (method, path) = (line.next().unwrap_or_default(), line.next().unwrap_or_default());
        let mut request = Request { method, path, head, length: 0, form: String::new(), earlier: 0 };
        request.length = request.header("content-length").map_or(0, |length| length.parse().unwrap());
        if request.path.starts_with("/token") {
            reader.take(std::mem::take(&mut request.length)).read_to_string(&mut request.form)?;
        }
        let mut seen = self.seen.lock().unwrap();
        request.earlier = seen.iter().filter(|earlier| earlier.kind() == request.kind()).count();
        seen.push(request.clone());
        Ok(Some(request))
    }

    /// Passes a request on over a connection of its own, and brings back at most `longest` bytes of the answer's body.
    fn forward(&self, request: &Request, body: &mut impl Read, mut back: impl Write, longest: u64) -> io::Result<()> {
        let mut upstream = TcpStream::connect(self.upstream.expect("this server has nobody behind it"))?;
        upstream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let head = request.head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        upstream.write_all(head.as_bytes())?;
        io::copy(&mut body.take(request.length), &mut upstream)?;
        let mut answer = BufReader::new(upstream);
        let (mut length, mut head) = (None, String::new());
        loop {
            let mut line = String::new();
            answer.read_line(&mut line)?;
            let lower = line.to_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse::<u64>().ok();
            }
            // This side keeps its connection.
            if !lower.starts_with("connection:") {
                head.push_str(&line);
            }
            if line.trim().is_empty() {
                break;
            }
        }
        back.write_all(head.as_bytes())?;
        let bodiless = request.method == "HEAD" || head.contains(" 204 ");
        if !bodiless {
            let length = length.expect("docker-registry says how long its answers are");
            io::copy(&mut answer.take(length.min(longest)), &mut back)?;
        }
        back.flush()
    }
}

fn answer(request: &Request, status: u16, body: &str, headers: &[String]) -> Vec<u8> {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let body = if request.method == "HEAD" { "" } else { body };
    format!("HTTP/1.1 {status} Said\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len()).into_bytes()
}

/// A deed for the first `times` requests that come here, then [`Deed::Forward`].
pub(crate) fn first(times: usize, counter: &AtomicUsize, deed: Deed) -> Deed {
    if counter.fetch_add(1, Ordering::SeqCst) < times { deed } else { Deed::Forward }
}
