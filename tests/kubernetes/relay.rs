//! Stands between a launcher and the API server: sees each request before it arrives there, and each answer before it arrives
//! here, and can lose it, cut the line or hold everything.
//!
//! Speaks HTTP/1.1 without TLS to the launcher, and to `kubectl proxy`, which knows the way to the API server.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use rustix::process::Pid;
use tempfile::TempDir;

/// `kubectl proxy`, which ends when this is dropped.
pub(crate) struct Proxy {
    child: Child,
    port: u16,
}

impl Proxy {
    pub(crate) fn start() -> Self {
        let mut command = Command::new("kubectl");
        // By default it lets no port-forward through.
        command.args(["proxy", "--port=0", "--accept-paths=.*", "--reject-paths=^$"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("kubectl on the PATH");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().rsplit(':').next().and_then(|port| port.parse().ok());
        Self { child, port: port.unwrap_or_else(|| panic!("kubectl proxy said: {line}")) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request of the launcher's.
pub(crate) struct Request {
    pub(crate) method: String,
    /// With what follows `?`.
    pub(crate) path: String,
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// Whether it changes something by which the launch makes its run.
    pub(crate) fn creates(&self) -> bool {
        self.path.contains("fieldManager=fairing")
    }

    /// Whether it lets the run begin.
    pub(crate) fn releases(&self) -> bool {
        self.method == "PATCH"
    }
}

/// What the relay does with a request or an answer.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Verdict {
    Pass,
    /// Ends the connection that it came by.
    Lose,
    /// Ends all connections, and lets nothing through any more.
    Cut,
    /// Keeps all connections, and lets nothing through any more.
    Hold,
}

/// Where in the exchange of one request the relay is.
pub(crate) struct Moment<'a> {
    pub(crate) request: &'a Request,
    /// The number of the answer, from 1; none before the request has been let through.
    pub(crate) answer: Option<usize>,
    /// The launcher's process.
    pub(crate) launcher: Pid,
}

type Judge = dyn Fn(&Moment<'_>) -> Verdict + Send + Sync;

/// One launcher's relay. Dropping it cuts the line.
pub(crate) struct Relay {
    shared: Arc<Shared>,
    port: u16,
    folder: TempDir,
}

struct Shared {
    upstream: u16,
    judge: Box<Judge>,
    state: Mutex<State>,
    changed: Condvar,
    is_over: AtomicBool,
}

#[derive(Default)]
struct State {
    launcher: Option<Pid>,
    /// Method and path of what was answered.
    answered: Vec<String>,
    verdict: Option<Verdict>,
    connections: Vec<TcpStream>,
}

impl Relay {
    pub(crate) fn new(proxy: &Proxy, judge: impl Fn(&Moment<'_>) -> Verdict + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            upstream: proxy.port,
            judge: Box::new(judge),
            state: Mutex::default(),
            changed: Condvar::new(),
            is_over: AtomicBool::new(false),
        });
        let listening = shared.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                if listening.is_over.load(Ordering::Acquire) {
                    return;
                }
                let (Ok(connection), shared) = (connection, listening.clone()) else { continue };
                thread::spawn(move || drop(shared.carry(connection)));
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: a, cluster: {{server: \"http://127.0.0.1:{port}\"}}}}]\n\
             users: [{{name: a, user: {{}}}}]\ncontexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n\
             current-context: a\n"
        );
        std::fs::write(folder.path().join("kubeconfig"), text).unwrap();
        Self { shared, port, folder }
    }

    /// The kubeconfig that leads here.
    pub(crate) fn kubeconfig(&self) -> String {
        self.folder.path().join("kubeconfig").to_str().unwrap().to_owned()
    }

    /// Says whose relay it is. Nothing is let through before.
    pub(crate) fn serves(&self, launcher: Pid) {
        self.shared.state.lock().unwrap().launcher = Some(launcher);
        self.shared.changed.notify_all();
    }

    /// Method and path of everything that was answered so far.
    pub(crate) fn answered(&self) -> Vec<String> {
        self.shared.state.lock().unwrap().answered.clone()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        let mut state = self.shared.state.lock().unwrap();
        state.verdict = Some(Verdict::Cut);
        state.cut();
        self.shared.changed.notify_all();
        drop(state);
        // Wakes who accepts.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

impl State {
    fn cut(&mut self) {
        for connection in self.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    /// One connection of the launcher's, to its end.
    fn carry(&self, launcher: TcpStream) -> io::Result<()> {
        let server = TcpStream::connect((Ipv4Addr::LOCALHOST, self.upstream))?;
        for connection in [&launcher, &server] {
            connection.set_nodelay(true)?;
            self.state.lock().unwrap().connections.push(connection.try_clone()?);
        }
        let carried = self.exchange(launcher.try_clone()?, server.try_clone()?);
        // Dropping them would not do: they are kept for being cut, too.
        let _ = (launcher.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
        carried
    }

    fn exchange(&self, launcher: TcpStream, server: TcpStream) -> io::Result<()> {
        let (mut from_launcher, mut to_launcher) = (BufReader::new(launcher.try_clone()?), launcher);
        let (mut from_server, mut to_server) = (BufReader::new(server.try_clone()?), server);
        while let Some(head) = Head::read(&mut from_launcher)? {
            let mut words = head.lines[0].split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let mut body = Vec::new();
            head.copy_body(&mut from_launcher, &mut body, false)?;
            let request = Request { method, path, body };
            self.judge(&request, false)?;
            to_server.write_all(&head.bytes())?;
            to_server.write_all(&request.body)?;
            let answer = Head::read(&mut from_server)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            self.judge(&request, true)?;
            to_launcher.write_all(&answer.bytes())?;
            match answer.status() {
                101 => {
                    let up = thread::spawn(move || {
                        let _ = io::copy(&mut from_launcher, &mut to_server);
                        let _ = to_server.shutdown(Shutdown::Write);
                    });
                    let copied = io::copy(&mut from_server, &mut to_launcher);
                    let _ = to_launcher.shutdown(Shutdown::Both);
                    let _ = up.join();
                    return copied.map(drop);
                }
                204 | 304 => {}
                _ => answer.copy_body(&mut from_server, &mut to_launcher, true)?,
            }
        }
        Ok(())
    }

    /// Fails if the connection is to end; does not return as long as everything is held.
    fn judge(&self, request: &Request, is_answer: bool) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        while state.launcher.is_none() && state.verdict.is_none() {
            state = self.changed.wait(state).unwrap();
        }
        let verdict = match (state.verdict, state.launcher) {
            (None, Some(launcher)) => {
                if is_answer {
                    state.answered.push(format!("{} {}", request.method, request.path));
                }
                let answer = is_answer.then_some(state.answered.len());
                // Nothing else comes through meanwhile, so that a signal arrives before what follows.
                (self.judge)(&Moment { request, answer, launcher })
            }
            (verdict, _) => verdict.unwrap_or(Verdict::Cut),
        };
        match verdict {
            Verdict::Pass => return Ok(()),
            Verdict::Lose => {}
            Verdict::Cut => {
                state.verdict = Some(verdict);
                state.cut();
            }
            Verdict::Hold => {
                state.verdict = Some(verdict);
                drop(self.changed.wait_while(state, |state| state.verdict == Some(Verdict::Hold)));
            }
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

/// The lines of a request or an answer before its body.
struct Head {
    lines: Vec<String>,
}

impl Head {
    fn read(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            match line.trim_end() {
                "" => return Ok(Some(Self { lines })),
                line => lines.push(line.to_owned()),
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        format!("{}\r\n\r\n", self.lines.join("\r\n")).into_bytes()
    }

    fn status(&self) -> u16 {
        self.lines[0].split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn field(&self, name: &str) -> Option<&str> {
        let fields = self.lines[1..].iter().filter_map(|line| line.split_once(':'));
        let mut named = fields.filter(|(field, _)| field.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.trim())
    }

    /// Copies the body as it comes. What says nothing of its length ends with the connection, if it is an answer.
    fn copy_body(&self, from: &mut impl BufRead, to: &mut impl Write, is_answer: bool) -> io::Result<()> {
        if self.field("transfer-encoding").is_some_and(|encoding| encoding.eq_ignore_ascii_case("chunked")) {
            loop {
                let mut line = String::new();
                from.read_line(&mut line)?;
                to.write_all(line.as_bytes())?;
                let length = u64::from_str_radix(line.trim(), 16).map_err(|_| io::ErrorKind::InvalidData)?;
                // With the end of its line.
                io::copy(&mut from.take(length + 2), to)?;
                if length == 0 {
                    return Ok(());
                }
            }
        }
        match self.field("content-length").and_then(|length| length.parse().ok()) {
            Some(length) => io::copy(&mut from.take(length), to).map(drop),
            None if is_answer => {
                io::copy(from, to)?;
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            None => Ok(()),
        }
    }
}
