//! The exit codes of a replica and of the launcher: success is 0 and nothing else is.

use std::fmt;

/// Why a process of a run ended, as its exit code tells it.
///
/// | code | meaning |
/// |---|---|
/// | 0 | did its part to the end |
/// | 64 | `train` returned an error |
/// | 65 | the model's layout differs from the other replicas' |
/// | 66 | its placement or configuration cannot be used |
/// | 67 | did not reach `launch()` |
/// | 68 | ended because another replica failed |
/// | 69 | a loss, gradient or parameter was not finite |
/// | 70 | the protocol between replicas was broken |
/// | 71 | a peer did not answer in time |
/// | 101 | panicked |
/// | 130 | stopped by the user (Ctrl-C; the launcher's code) |
/// | 143 | told to end (SIGTERM) in a container: a worker when its round was finished, a server when the others had heard it |
///
/// 64 to 71 lie in the range that `sysexits.h` leaves to programs, below the 126 and up that shells use; 101 is Rust's own
/// code for a panic; 130 and 143 are what shells report for SIGINT and SIGTERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitCode {
    /// Did its part to the end.
    Success,
    /// The user's `train` returned an error.
    UserError,
    /// The model's layout differs from the other replicas'.
    Layout,
    /// The placement or the configuration cannot be used.
    Configuration,
    /// The process did not reach `launch()`.
    NeverLaunched,
    /// Ended because another replica failed: an echo, never the cause.
    LostPeer,
    /// A loss, gradient or parameter was not finite.
    NotFinite,
    /// The protocol between replicas was broken.
    Protocol,
    /// A peer did not answer in time.
    Timeout,
    /// Panicked.
    Panic,
    /// Stopped by the user; the launcher's code.
    Stopped,
    /// Told to end by whoever runs its container: evicted, deleted, stopped.
    Terminated,
}

const ALL: [ExitCode; 12] = [
    ExitCode::Success,
    ExitCode::UserError,
    ExitCode::Layout,
    ExitCode::Configuration,
    ExitCode::NeverLaunched,
    ExitCode::LostPeer,
    ExitCode::NotFinite,
    ExitCode::Protocol,
    ExitCode::Timeout,
    ExitCode::Panic,
    ExitCode::Stopped,
    ExitCode::Terminated,
];

impl ExitCode {
    /// The number that the process exits with.
    pub const fn code(self) -> u8 {
        match self {
            ExitCode::Success => 0,
            ExitCode::UserError => 64,
            ExitCode::Layout => 65,
            ExitCode::Configuration => 66,
            ExitCode::NeverLaunched => 67,
            ExitCode::LostPeer => 68,
            ExitCode::NotFinite => 69,
            ExitCode::Protocol => 70,
            ExitCode::Timeout => 71,
            ExitCode::Panic => 101,
            ExitCode::Stopped => 130,
            ExitCode::Terminated => 143,
        }
    }

    /// Inverse of [`ExitCode::code`]; `None` for a number that fairing never exits with.
    pub fn from_code(code: i32) -> Option<Self> {
        ALL.into_iter().find(|known| i32::from(known.code()) == code)
    }

    /// The meaning in words, to follow a replica's name: `worker 1` + ` ` + `panicked`.
    pub const fn describe(self) -> &'static str {
        match self {
            ExitCode::Success => "did its part to the end",
            ExitCode::UserError => "returned an error from `train`",
            ExitCode::Layout => "has a model whose layout differs from the other replicas'",
            ExitCode::Configuration => "cannot use its placement or configuration",
            ExitCode::NeverLaunched => "did not reach `launch()`",
            ExitCode::LostPeer => "ended because another replica failed",
            ExitCode::NotFinite => "met a number that is not finite",
            ExitCode::Protocol => "broke the protocol between replicas",
            ExitCode::Timeout => "waited in vain for a peer",
            ExitCode::Panic => "panicked",
            ExitCode::Stopped => "was stopped by the user",
            ExitCode::Terminated => "was told to end (SIGTERM)",
        }
    }

    /// Whether the process ended because another one did, so that the cause is elsewhere.
    pub const fn is_echo(self) -> bool {
        matches!(self, ExitCode::LostPeer)
    }

    /// Ends this process with the code. Destructors do not run; standard output is flushed.
    pub fn exit(self) -> ! {
        std::process::exit(i32::from(self.code()))
    }
}

impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.describe())
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_one_meaning() {
        for known in ALL {
            assert_eq!(ExitCode::from_code(known.code().into()), Some(known));
        }
        assert_eq!(ExitCode::from_code(1), None, "1 is what any program may exit with");
        assert_eq!(ALL.into_iter().filter(|known| known.is_echo()).count(), 1);
    }
}
