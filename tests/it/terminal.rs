//! What a run looks like on a terminal and in a pipe, and what Ctrl-C does.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use fairing_tests::law::Law;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use crate::run::{Laws, SMALL, folders, summary};

/// Enough for a run on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// 40 steps of at least 20 ms.
const SLOW: Law = Law { examples: 48, epochs: 10, pause_ms: 20, ..SMALL };

/// Longer than any test waits.
const ENDLESS: Law = Law { epochs: 100_000, pause_ms: 5, ..SMALL };

fn json(law: &Law) -> String {
    serde_json::to_string(law).unwrap()
}

#[test]
fn a_pipe_gets_plain_lines() {
    let ended = Laws::new(&["law", &json(&SLOW)]).env("TERM", "xterm-256color").run();
    let (out, err) = (ended.stdout(), ended.stderr());
    assert!(ended.output.status.success(), "{err}");
    assert!(!out.contains('\x1b') && !err.contains('\x1b'), "{err}");
    assert_eq!(out.lines().count(), 1, "the program's own line and nothing else: {out}");

    let lines: Vec<&str> = err.lines().collect();
    let after = |from: usize, what: &dyn Fn(&str) -> bool| {
        let found = lines[from..].iter().position(|line| what(line));
        from + found.unwrap_or_else(|| panic!("not in {:#?}", &lines[from..]))
    };
    after(0, &|line| line == "Law with 2 workers + 1 parameter server, seed 0");
    let joined = after(0, &|line| line == "2 workers + 1 parameter server joined");
    for worker in ["worker 0 | epoch ", "worker 1 | epoch "] {
        after(joined, &|line| line.starts_with(worker) && line.contains('%'));
    }
    let mut at = joined;
    for epoch in 1..=10 {
        let head = format!("epoch {epoch}/10  loss ");
        at = after(at, &|line| line.starts_with(&head));
    }
    // Not of every epoch: these are shorter than the time from one report of progress to the next.
    after(joined, &|line| line.starts_with("epoch ") && line.ends_with(" examples/s"));
    let head = after(at, &|line| line.starts_with("Law trained by 2 workers + 1 parameter server in "));
    let names = lines[head + 1..].iter().map(|line| line.split_whitespace().next().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["examples", "fingerprint", "loss", "start", "model", "report", "run"]);
    assert!(lines[head + 4].contains("train ") && lines[head + 4].contains("examples/s)"), "{}", lines[head + 4]);
}

#[test]
fn a_reader_that_goes_early_ends_nothing() {
    let mut laws = Laws::new(&["law", &json(&SMALL)]);
    let mut child = laws.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut first = String::new();
    err.read_line(&mut first).unwrap();
    drop(err);
    assert!(first.starts_with("Law with 2 workers"), "{first}");
    assert!(child.wait().unwrap().success());
    assert_eq!(summary(&folders(laws.runs.path())[0])["status"], "succeeded");
}

/// A program on a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: File,
    written: Receiver<Vec<u8>>,
    /// All that was written so far.
    raw: String,
}

const COLUMNS: u16 = 100;
const ROWS: u16 = 30;

impl Terminal {
    fn start(laws: &Laws, term: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        tcsetwinsize(&master, Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = File::from(rustix::fs::open(name, flags, Mode::empty()).unwrap());
        // The echo of a key comes when it is pressed, also in the middle of an escape code, and what is shown then is not the
        // program's doing.
        let mut settings = tcgetattr(&slave).unwrap();
        settings.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&slave, OptionalActions::Now, &settings).unwrap();
        // `setsid -c`, of util-linux, makes it the controlling terminal, so that Ctrl-C becomes a signal.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(laws.command.get_program()).args(laws.command.get_args());
        command.envs(laws.command.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("TERM", term);
        command.env_remove("NO_COLOR");
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        let child = command.spawn().unwrap();
        let mut screen = File::from(master);
        let keyboard = screen.try_clone().unwrap();
        let (sender, written) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Without any process on it, a terminal's other end fails instead of ending.
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keyboard, written, raw: String::new() }
    }

    /// Waits until `ready`, looking at what was written so far.
    #[track_caller]
    fn wait_until(&mut self, ready: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !ready(&self.raw) {
            match self.written.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.raw.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("{error}; on the screen:\n{}", screen(&self.raw)),
            }
        }
    }

    fn press(&mut self, byte: u8) {
        self.keyboard.write_all(&[byte]).unwrap();
    }

    /// Waits for the program's end; gives its status and all that it wrote.
    fn end(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            // Read meanwhile, or a full terminal would hold the program up.
            if let Ok(bytes) = self.written.recv_timeout(Duration::from_millis(20)) {
                self.raw.push_str(&String::from_utf8_lossy(&bytes));
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end; on the screen:\n{}", screen(&self.raw));
        };
        while let Ok(bytes) = self.written.recv_timeout(Duration::from_secs(1)) {
            self.raw.push_str(&String::from_utf8_lossy(&bytes));
        }
        (status, std::mem::take(&mut self.raw))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Does nothing to a program that has ended. A killed launcher takes its replicas with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a person sees in the end: the control codes that fairing uses, executed; any other is a mistake.
fn screen(raw: &str) -> String {
    let mut rows: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column) = (0_usize, 0_usize);
    let mut rest = raw.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\n' => row += 1,
            '\r' => column = 0,
            '\x1b' => {
                assert_eq!(rest.next(), Some('['), "{raw:?}");
                let mut number = String::new();
                while rest.peek().is_some_and(|c| c.is_ascii_digit() || *c == ';') {
                    number.extend(rest.next());
                }
                match rest.next() {
                    Some('A') => row -= number.parse::<usize>().unwrap(),
                    Some('J') => {
                        rows.truncate(row + 1);
                        rows[row].truncate(column);
                    }
                    Some('m') => {}
                    other => panic!("unexpected control code {number}{other:?}"),
                }
            }
            c => {
                if column == usize::from(COLUMNS) {
                    (row, column) = (row + 1, 0);
                }
                rows.resize(rows.len().max(row + 1), Vec::new());
                let width = rows[row].len().max(column + 1);
                rows[row].resize(width, ' ');
                rows[row][column] = c;
                column += 1;
            }
        }
        rows.resize(rows.len().max(row + 1), Vec::new());
    }
    rows.into_iter().map(|row| row.into_iter().collect::<String>().trim_end().to_owned() + "\n").collect()
}

/// Neither a bar nor the line below the bars is left, the cursor was never hidden, and the last line is complete.
#[track_caller]
fn clean(raw: &str) -> String {
    let screen = screen(raw);
    assert!(!screen.contains("[=") && !screen.contains(" elapsed"), "{screen}");
    assert!(!raw.contains("\x1b[?25l"), "{screen}");
    assert!(raw.ends_with('\n') || raw.ends_with("\x1b[J"), "{raw:?}");
    screen
}

#[test]
fn a_terminal_shows_bars_and_is_left_clean() {
    let laws = Laws::new(&["law", &json(&SLOW)]);
    let mut terminal = Terminal::start(&laws, "xterm-256color");
    let (status, raw) = terminal.end();
    assert!(status.success(), "{}", screen(&raw));
    for bar in ["worker 0\x1b[0m  epoch ", "worker 1\x1b[0m  epoch "] {
        assert!(raw.contains(bar), "{raw:?}");
    }
    assert!(raw.contains("[=") && raw.contains("\x1b[J") && raw.contains("elapsed"), "{raw:?}");
    let screen = clean(&raw);
    assert!(screen.contains("epoch 10/10  loss "), "{screen}");
    assert!(screen.contains("Law trained by 2 workers + 1 parameter server in "), "{screen}");
}

#[test]
fn a_terminal_that_can_do_nothing_gets_plain_lines() {
    let laws = Laws::new(&["law", &json(&SMALL)]);
    let (status, raw) = Terminal::start(&laws, "dumb").end();
    assert!(status.success(), "{raw}");
    assert!(!raw.contains('\x1b') && raw.contains("worker 0 | epoch "), "{raw:?}");
}

#[test]
fn ctrl_c_saves_the_model_and_ends_with_130() {
    let laws = Laws::new(&["law", &json(&ENDLESS)]);
    let mut terminal = Terminal::start(&laws, "xterm");
    terminal.wait_until(|raw| raw.contains("epoch 2/100000"));
    terminal.press(0x03);
    let (status, raw) = terminal.end();
    let screen = clean(&raw);
    assert_eq!(status.code(), Some(130), "{screen}");
    assert!(screen.contains("stopping after this round"), "{screen}");
    assert!(screen.contains("Law stopped by the caller after "), "{screen}");
    let folder = &folders(laws.runs.path())[0];
    assert_eq!(summary(folder)["status"], "stopped");
    assert!(folder.join("model.bpk").is_file());
}

#[test]
fn ctrl_c_twice_ends_at_once_and_leaves_the_terminal_clean() {
    // Each step takes longer than the test has patience, so that only the second one can end it.
    let laws = Laws::new(&["law", &json(&Law { pause_ms: 1500, ..ENDLESS })]);
    let mut terminal = Terminal::start(&laws, "xterm");
    terminal.wait_until(|raw| raw.contains("worker 0\x1b[0m  epoch 1/"));
    terminal.press(0x03);
    terminal.wait_until(|raw| raw.contains("stopping after this round"));
    terminal.press(0x03);
    let (status, raw) = terminal.end();
    let screen = clean(&raw);
    assert_eq!(status.code(), Some(130), "{screen}");
    let folder = &folders(laws.runs.path())[0];
    assert!(!folder.join("model.bpk").exists());
    assert_eq!(summary(folder)["status"], "failed");
}
