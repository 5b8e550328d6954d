//! The user's program built again, static, for the processor of the cluster.
//!
//! The program does not know where it was built: no path of a developer's machine is in it. What `cargo run` says in the
//! environment names the package; the place and the name of the running file say which program of the package it is, with
//! which profile, and, by what cargo keeps beside it, with which features. (Under Unix `cargo run` becomes the program, so
//! there is no parent process whose command could be read.) The package is then built by that same cargo for
//! `ARCH-unknown-linux-musl`, which needs no C library in the image.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Architecture;
use super::executable::{Program, ProgramError};

/// A cold build of a large program on a small machine; longer, and something in it hangs.
const BUILD_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// Questions to `cargo` and `rustc` take some ten milliseconds, unless a file system or a lock is stuck.
const ASK_DEADLINE: Duration = Duration::from_secs(60);

/// How often an ended process is looked for once its output is complete.
const POLL: Duration = Duration::from_millis(5);

/// So much of a failed build's output is in the error; all of it has been shown before.
const LAST_LINES: usize = 20;

/// Failure to build the program anew. Returned by [`StaticBuild`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StaticBuildError {
    /// Nothing says which package the program comes from.
    #[error(
        "a static program is built by cargo, which did not start this one (start it with `cargo run`, or leave out \
         `link = \"static\"`)"
    )]
    NotFromCargo,
    /// The package has no program of that name.
    #[error(
        "package `{package}` has no program, example or test called `{name}` (start it with `cargo run`; a renamed file is not found)"
    )]
    NoProgram {
        /// The package.
        package: String,
        /// The running file's name.
        name: String,
    },
    /// The compiler has no standard library for the target.
    #[error("the compiler cannot build for `{target}` yet (run `rustup target add {target}`)")]
    TargetMissing {
        /// The target.
        target: &'static str,
    },
    /// A tool cannot be started.
    #[error("cannot start `{}` (is Rust's toolchain still installed?)", tool.display())]
    Start {
        /// The tool.
        tool: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A tool did not end in time.
    #[error("`{}` was still {what} after {seconds} s, so it was ended (is another cargo at work in the same folder?)", tool.display())]
    Deadline {
        /// The tool.
        tool: PathBuf,
        /// What it was asked to do.
        what: &'static str,
        /// How long it had been given.
        seconds: u64,
    },
    /// A question to `cargo` or `rustc` was not answered.
    #[error("`{}` failed while {what}: {last_lines}", tool.display())]
    Ask {
        /// The tool.
        tool: PathBuf,
        /// What it was asked to do.
        what: &'static str,
        /// What it said.
        last_lines: String,
    },
    /// The program does not compile for the target.
    #[error("`{command}` failed with {status}{}:\n{last_lines}", remedy.as_deref().map(|remedy| format!(" ({remedy})")).unwrap_or_default())]
    Failed {
        /// The command as one would type it.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What may be missing, if something is.
        remedy: Option<String>,
        /// The end of what it said.
        last_lines: String,
    },
    /// The build was successful and the program is not there.
    #[error("`{command}` built no program (is its target still in Cargo.toml?)")]
    NothingBuilt {
        /// The command as one would type it.
        command: String,
    },
    /// What was built is no program that can be shipped.
    #[error("the program that was built cannot be used")]
    Program(#[from] ProgramError),
    /// What was built still needs libraries, or is for another processor.
    #[error("`{}` is no static program for {architecture} (does a configuration of cargo set `-crt-static` or a linker?)", path.display())]
    NotStatic {
        /// The program.
        path: PathBuf,
        /// What it should be for.
        architecture: Architecture,
    },
}

/// Where the running program comes from, as far as it can be seen from inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `CARGO`: the cargo that started the program.
    pub cargo: OsString,
    /// `CARGO_MANIFEST_DIR`.
    pub manifest_folder: PathBuf,
    /// `CARGO_PKG_NAME`.
    pub package: String,
    /// The running file.
    pub executable: PathBuf,
}

impl Origin {
    /// Reads it from `env`, the variables of this process.
    ///
    /// # Errors
    ///
    /// [`StaticBuildError::NotFromCargo`].
    pub fn read(env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, StaticBuildError> {
        let manifest_folder = env("CARGO_MANIFEST_DIR").ok_or(StaticBuildError::NotFromCargo)?.into();
        let package = env("CARGO_PKG_NAME").and_then(|name| name.into_string().ok());
        let executable = std::env::current_exe().map_err(|_| StaticBuildError::NotFromCargo)?;
        Ok(Self {
            cargo: env("CARGO").unwrap_or_else(|| "cargo".into()),
            manifest_folder,
            package: package.ok_or(StaticBuildError::NotFromCargo)?,
            executable,
        })
    }
}

/// A program of a package, as cargo's options name it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wanted {
    Bin(String),
    Example(String),
    Test(String),
}

impl Wanted {
    fn arguments(&self) -> [&str; 2] {
        match self {
            Wanted::Bin(name) => ["--bin", name],
            Wanted::Example(name) => ["--example", name],
            Wanted::Test(name) => ["--test", name],
        }
    }
}

/// A command that builds the running program for another target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticBuild {
    architecture: Architecture,
    cargo: OsString,
    arguments: Vec<OsString>,
    /// Set for the build, beside what is inherited.
    env: Vec<(String, OsString)>,
    remedy: Option<String>,
}

impl fmt::Display for StaticBuild {
    /// The command as one would type it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.env {
            write!(f, "{name}={} ", value.display())?;
        }
        write!(f, "cargo")?;
        self.arguments.iter().try_for_each(|argument| write!(f, " {}", argument.display()))
    }
}

/// The target that static programs for `architecture` are built for.
pub fn target(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Amd64 => "x86_64-unknown-linux-musl",
        Architecture::Arm64 => "aarch64-unknown-linux-musl",
    }
}

impl StaticBuild {
    /// The command for `architecture`. Asks `cargo` and `rustc`, and builds nothing yet.
    ///
    /// `env` are the variables of this process; what the user has set for a linker or a C compiler stays.
    ///
    /// # Errors
    ///
    /// [`StaticBuildError::NoProgram`], [`StaticBuildError::TargetMissing`], and what asking can fail with.
    pub fn new(
        origin: &Origin,
        architecture: Architecture,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self, StaticBuildError> {
        let target = target(architecture);
        let manifest = origin.manifest_folder.join("Cargo.toml");
        let wanted = wanted(origin, &metadata(origin, &manifest)?)?;
        check_target(origin, target, env)?;

        let mut arguments: Vec<OsString> = ["build", "--message-format=json-render-diagnostics"].map(Into::into).into();
        arguments.extend(["--target", target, "--manifest-path"].map(Into::into));
        arguments.push(manifest.into());
        arguments.extend(["--package", &origin.package].map(Into::into));
        arguments.extend(wanted.arguments().map(Into::into));
        if let Some(folder) = profile_folder(&origin.executable) {
            if let Some(profile) = profile_of(folder) {
                arguments.extend(["--profile", &profile].map(Into::into));
            }
            if let Some(features) = features_of(origin, folder, &wanted) {
                arguments.push("--no-default-features".into());
                if !features.is_empty() {
                    arguments.extend(["--features", &features.join(",")].map(Into::into));
                }
            }
        }
        let (tools, remedy) = tools(architecture, target, env);
        Ok(Self { architecture, cargo: origin.cargo.clone(), arguments, env: tools, remedy })
    }

    /// The same, with what is built in `folder` instead of cargo's own choice.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.arguments.extend([OsStr::new("--target-dir"), folder.as_os_str()].map(OsStr::to_owned));
        self
    }

    /// Builds the program. What cargo says goes to `say` line by line.
    ///
    /// # Errors
    ///
    /// [`StaticBuildError`].
    pub fn run(&self, say: &mut dyn FnMut(&str)) -> Result<Program, StaticBuildError> {
        let mut command = Command::new(&self.cargo);
        command.args(&self.arguments).envs(self.env.iter().map(|(name, value)| (name, value)));
        let output = listen(command, BUILD_DEADLINE, "building", say)?;
        if !output.status.success() {
            return Err(StaticBuildError::Failed {
                command: self.to_string(),
                status: output.status,
                remedy: self.remedy.clone(),
                last_lines: output.last_lines,
            });
        }
        let artifacts = output.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        // The last one: whatever else was built was needed for it.
        let built =
            artifacts.filter_map(|artifact| artifact.get("executable")?.as_str().map(PathBuf::from)).next_back();
        let path = built.ok_or_else(|| StaticBuildError::NothingBuilt { command: self.to_string() })?;
        let program = Program::open(&path)?;
        if !program.is_static() || program.architecture() != self.architecture {
            return Err(StaticBuildError::NotStatic { path, architecture: self.architecture });
        }
        Ok(program)
    }
}

/// What cargo knows of the package, dependencies aside.
fn metadata(origin: &Origin, manifest: &Path) -> Result<Value, StaticBuildError> {
    const WHAT: &str = "reading the package";
    let mut command = Command::new(&origin.cargo);
    command.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
    let output = ask(command, WHAT)?;
    let no_json = |_| StaticBuildError::Ask {
        tool: PathBuf::from(&origin.cargo),
        what: WHAT,
        last_lines: "it answered something that is no JSON".to_owned(),
    };
    serde_json::from_str(&output).map_err(no_json)
}

/// Which program of the package the running file is.
fn wanted(origin: &Origin, metadata: &Value) -> Result<Wanted, StaticBuildError> {
    let file = origin.executable.file_name().unwrap_or_default().to_string_lossy();
    let file = file.strip_suffix(" (deleted)").unwrap_or(&file);
    let folder = origin.executable.parent().and_then(Path::file_name).unwrap_or_default();
    // In `deps`, names end with a hash.
    let stem = file.rsplit_once('-').filter(|(_, hash)| is_hash(hash)).map_or(file, |(stem, _)| stem);
    let packages = metadata.get("packages").and_then(Value::as_array).into_iter().flatten();
    let of_package = packages.filter(|package| package.get("name").and_then(Value::as_str) == Some(&origin.package));
    let targets = of_package.filter_map(|package| package.get("targets")?.as_array()).flatten();
    let found = targets.filter_map(|target| {
        let name = target.get("name")?.as_str()?;
        let kind = target.get("kind")?.as_array()?.first()?.as_str()?;
        let wanted = match kind {
            "bin" if name == file && folder != "examples" => Wanted::Bin(name.to_owned()),
            "example" if name == file && folder == "examples" => Wanted::Example(name.to_owned()),
            "example" if name.replace('-', "_") == stem && folder == "examples" => Wanted::Example(name.to_owned()),
            "test" if name.replace('-', "_") == stem && folder == "deps" => Wanted::Test(name.to_owned()),
            "bin" if name.replace('-', "_") == stem && folder == "deps" => Wanted::Bin(name.to_owned()),
            _ => return None,
        };
        Some((name == file, wanted))
    });
    // The whole name before the one without a hash.
    let found = found.max_by_key(|(is_whole, _)| *is_whole).map(|(_, wanted)| wanted);
    found.ok_or_else(|| StaticBuildError::NoProgram { package: origin.package.clone(), name: file.to_owned() })
}

fn is_hash(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The folder of the profile that a program was built with, such as `target/debug`, if cargo built it.
fn profile_folder(executable: &Path) -> Option<&Path> {
    let mut folder = executable.parent()?;
    if [OsStr::new("examples"), OsStr::new("deps")].contains(&folder.file_name()?) {
        folder = folder.parent()?;
    }
    // Cargo marks the target folder, which is one above, or two where a target was named.
    let is_cargos = folder.ancestors().skip(1).take(2).any(|above| above.join("CACHEDIR.TAG").exists());
    is_cargos.then_some(folder)
}

/// The profile's name, unless it is the default one.
fn profile_of(folder: &Path) -> Option<String> {
    folder.file_name()?.to_str().filter(|name| *name != "debug").map(str::to_owned)
}

/// The features of the package that the running program was built with; `None` if cargo does not say.
///
/// Cargo notes for each thing that it builds how it did so, under the hash that is also in the name of what it built.
/// The running program is a second name of such a file. The notes are cargo's own business, so that they can change, and
/// then the package's default features are built.
fn features_of(origin: &Origin, folder: &Path, wanted: &Wanted) -> Option<Vec<String>> {
    let note = match wanted {
        Wanted::Bin(name) => format!("bin-{name}.json"),
        Wanted::Example(name) => format!("example-{name}.json"),
        Wanted::Test(name) => format!("test-integration-test-{name}.json"),
    };
    let notes = folder.join(".fingerprint");
    let of_hash = |hash: &str| notes.join(format!("{}-{hash}", origin.package)).join(&note);
    let path = hash_of(&origin.executable).map(|hash| of_hash(&hash)).or_else(|| {
        // The file was replaced meanwhile, or cannot have two names: then the one that was built last.
        let prefix = format!("{}-", origin.package);
        let folders = fs::read_dir(&notes).ok()?.filter_map(Result::ok);
        let of_package = folders.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let path = of_hash(name.strip_prefix(&prefix).filter(|hash| is_hash(hash))?);
            Some((fs::metadata(&path).ok()?.modified().ok()?, path))
        });
        of_package.max().map(|(_, path)| path)
    })?;
    let note: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    serde_json::from_str(note.get("features")?.as_str()?).ok()
}

/// The hash in the name that cargo gave the file first.
fn hash_of(executable: &Path) -> Option<String> {
    let hash = |name: &OsStr| {
        name.to_str()?.rsplit_once('-').filter(|(_, hash)| is_hash(hash)).map(|(_, hash)| hash.to_owned())
    };
    if let Some(hash) = hash(executable.file_name()?) {
        return Some(hash);
    }
    let same = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    let wanted = same(&fs::metadata(executable).ok()?);
    let folder = executable.parent()?;
    let folders = [folder.join("deps"), folder.to_owned()];
    let files = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().filter_map(Result::ok);
    let mut hashes = files.filter_map(|file| hash(&file.file_name()).map(|hash| (file, hash)));
    hashes.find(|(file, _)| file.metadata().is_ok_and(|metadata| same(&metadata) == wanted)).map(|(_, hash)| hash)
}

/// Whether the compiler has the target's standard library: it names a folder in either case.
fn check_target(
    origin: &Origin,
    target: &'static str,
    env: &dyn Fn(&str) -> Option<OsString>,
) -> Result<(), StaticBuildError> {
    let beside = Path::new(&origin.cargo).with_file_name("rustc");
    let beside = beside.is_absolute().then(|| beside.into_os_string()).filter(|rustc| Path::new(rustc).exists());
    let mut command = Command::new(env("RUSTC").or(beside).unwrap_or_else(|| "rustc".into()));
    command.args(["--print", "target-libdir", "--target", target]);
    let folder = ask(command, "looking for a target")?;
    let mut files = fs::read_dir(folder.trim()).into_iter().flatten();
    if files.next().is_none() { Err(StaticBuildError::TargetMissing { target }) } else { Ok(()) }
}

/// The linker and the C compiler that cargo would not find by itself, and what to install if it does not work with them.
fn tools(
    architecture: Architecture,
    target: &str,
    env: &dyn Fn(&str) -> Option<OsString>,
) -> (Vec<(String, OsString)>, Option<String>) {
    let is_there = |tool: &str| {
        let path = env("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
    };
    let mut tools = Vec::new();
    let mut remedy = None;
    let underscored = target.replace('-', "_");
    let mut compiler = None;
    if Architecture::current() != Some(architecture) {
        let gcc = match architecture {
            Architecture::Amd64 => "x86_64-linux-gnu-gcc",
            Architecture::Arm64 => "aarch64-linux-gnu-gcc",
        };
        if is_there(gcc) {
            compiler = Some(gcc);
        } else {
            remedy = Some(format!("C code in a dependency needs `{gcc}`: install gcc-{}", gcc.replace("-gcc", "")));
            remedy = remedy.map(|remedy| remedy.replace("x86_64", "x86-64"));
        }
        let linker = format!("CARGO_TARGET_{}_LINKER", underscored.to_uppercase());
        if env(&linker).is_none() && !is_linker_configured(target, env) {
            // Rust's own linker does for programs without C code.
            tools.push((linker, compiler.unwrap_or("rust-lld").into()));
        }
    } else if !is_there("musl-gcc") {
        compiler = Some("cc");
    }
    let names = [format!("CC_{underscored}"), format!("CC_{target}"), "TARGET_CC".to_owned()];
    if let Some(compiler) = compiler.filter(|_| names.iter().all(|name| env(name).is_none())) {
        tools.push((format!("CC_{underscored}"), compiler.into()));
        // Checked variants of C functions are glibc's own; musl has none.
        let flags = format!("CFLAGS_{underscored}");
        if env(&flags).is_none() {
            tools.push((flags, "-U_FORTIFY_SOURCE".into()));
        }
    }
    (tools, remedy)
}

/// Whether one of cargo's configuration files names a linker for `target`; a variable would win over it.
fn is_linker_configured(target: &str, env: &dyn Fn(&str) -> Option<OsString>) -> bool {
    let here = std::env::current_dir().unwrap_or_default();
    let mut folders: Vec<PathBuf> = here.ancestors().map(|folder| folder.join(".cargo")).collect();
    folders.extend(env("CARGO_HOME").map(PathBuf::from));
    folders.extend(env("HOME").map(|home| Path::new(&home).join(".cargo")));
    let files = folders.iter().flat_map(|folder| [folder.join("config.toml"), folder.join("config")]);
    let mut tables = files.filter_map(|file| fs::read_to_string(file).ok()?.parse::<toml::Table>().ok());
    tables.any(|table| table.get("target").and_then(|all| all.get(target)?.get("linker")).is_some())
}

/// What a process said and how it ended.
struct Output {
    status: ExitStatus,
    stdout: String,
    last_lines: String,
}

fn ask(command: Command, what: &'static str) -> Result<String, StaticBuildError> {
    let tool = PathBuf::from(command.get_program());
    let output = listen(command, ASK_DEADLINE, what, &mut |_| {})?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(StaticBuildError::Ask { tool, what, last_lines: output.last_lines })
    }
}

/// Runs a command to its end: its standard output is returned, and its standard error is said line by line.
fn listen(
    mut command: Command,
    deadline: Duration,
    what: &'static str,
    say: &mut dyn FnMut(&str),
) -> Result<Output, StaticBuildError> {
    let end = Instant::now() + deadline;
    let tool = PathBuf::from(command.get_program());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|source| StaticBuildError::Start { tool: tool.clone(), source })?;
    let mut stdout = child.stdout.take().expect("stdout is piped");
    let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
    let (send_output, output) = mpsc::sync_channel(1);
    let (send_line, lines) = mpsc::sync_channel(LAST_LINES);
    // Both are read in threads of their own, so that neither pipe fills up and a silent process does not block us.
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stdout.read_to_end(&mut bytes);
        let _ = send_output.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    thread::spawn(move || {
        for line in stderr.split(b'\n').map_while(Result::ok) {
            if send_line.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let mut last: VecDeque<String> = VecDeque::new();
    let left = || end.saturating_duration_since(Instant::now());
    let late = |child: &mut Child| {
        // Both fail only if it has ended meanwhile.
        let _ = child.kill();
        let _ = child.wait();
        StaticBuildError::Deadline { tool: tool.clone(), what, seconds: deadline.as_secs() }
    };
    loop {
        match lines.recv_timeout(left()) {
            Ok(line) => {
                say(&line);
                last.push_back(line);
                if last.len() > LAST_LINES {
                    last.pop_front();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => return Err(late(&mut child)),
        }
    }
    let stdout = output.recv_timeout(left()).map_err(|_| late(&mut child))?;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => thread::sleep(POLL),
            _ => return Err(late(&mut child)),
        }
    };
    Ok(Output { status, stdout, last_lines: Vec::from(last).join("\n") })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const SOURCE: &str = "fn main() {}";

    /// A package of a user's, in a folder of its own.
    struct Package(tempfile::TempDir);

    impl Package {
        fn new() -> Self {
            let package = Self(tempfile::tempdir().unwrap());
            let manifest = "[package]\nname = \"some-thing\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
                [features]\ndefault = [\"usual\"]\nusual = []\nextra = []\n\
                [profile.quick]\ninherits = \"release\"\n[workspace]\n";
            for (name, text) in [("Cargo.toml", manifest), ("src/main.rs", SOURCE), ("examples/my-fit.rs", SOURCE)] {
                let path = package.at(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            package
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn cargo(&self, arguments: &[&str]) {
            let mut cargo = Command::new(cargo());
            cargo.args(arguments).arg("--quiet").current_dir(self.0.path()).env_remove("CARGO_TARGET_DIR");
            let output = cargo.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }

        fn origin(&self, executable: &str) -> Origin {
            Origin {
                cargo: cargo(),
                manifest_folder: self.0.path().to_owned(),
                package: "some-thing".to_owned(),
                executable: self.at(executable),
            }
        }
    }

    fn cargo() -> OsString {
        env!("CARGO").into()
    }

    #[test]
    fn a_running_program_is_found_in_its_package() {
        let package = Package::new();
        let manifest = package.at("Cargo.toml");
        let metadata = metadata(&package.origin("none"), &manifest).unwrap();
        let check = |executable: &str, expected: Option<Wanted>| {
            let found = wanted(&package.origin(executable), &metadata);
            assert_eq!(found.as_ref().ok(), expected.as_ref(), "{executable}: {found:?}");
        };
        let bin = || Some(Wanted::Bin("some-thing".to_owned()));
        let example = || Some(Wanted::Example("my-fit".to_owned()));
        check("target/debug/some-thing", bin());
        check("target/x86_64-unknown-linux-gnu/quick/some-thing", bin());
        check("target/debug/deps/some_thing-0123456789abcdef", bin());
        check("target/debug/some-thing (deleted)", bin());
        check("target/debug/examples/my-fit", example());
        check("target/debug/examples/my_fit-0123456789abcdef", example());
        check("target/debug/my-fit", None);
        check("target/debug/renamed", None);
        let error = wanted(&package.origin("renamed"), &metadata).unwrap_err().to_string();
        assert!(error.contains("`some-thing`") && error.contains("`renamed`"), "{error}");
    }

    #[test]
    fn the_features_of_the_running_program_are_those_it_was_built_with() {
        let package = Package::new();
        let features = |executable: &str, wanted: Wanted| {
            let origin = package.origin(executable);
            features_of(&origin, profile_folder(&origin.executable)?, &wanted)
        };
        let bin = || Wanted::Bin("some-thing".to_owned());
        let example = || Wanted::Example("my-fit".to_owned());
        assert_eq!(features("target/debug/some-thing", bin()), None, "not built yet");
        package.cargo(&["build", "--features", "extra"]);
        package.cargo(&["build", "--example", "my-fit", "--no-default-features"]);
        assert_eq!(features("target/debug/some-thing", bin()).unwrap(), ["default", "extra", "usual"]);
        assert!(features("target/debug/examples/my-fit", example()).unwrap().is_empty());
        package.cargo(&["build", "--no-default-features"]);
        assert!(features("target/debug/some-thing", bin()).unwrap().is_empty(), "built again, without");
        fs::remove_file(package.at("target/debug/some-thing")).unwrap();
        assert!(features("target/debug/some-thing", bin()).unwrap().is_empty(), "the last one if it is gone");
    }

    #[test]
    fn a_program_that_cargo_did_not_start_is_refused() {
        let all = BTreeMap::from([("CARGO_MANIFEST_DIR", "/package"), ("CARGO_PKG_NAME", "some-thing")]);
        assert!(Origin::read(&|name| all.get(name).map(OsString::from)).is_ok());
        for missing in all.keys() {
            let error =
                Origin::read(&|name| all.get(name).filter(|_| name != *missing).map(OsString::from)).unwrap_err();
            assert!(matches!(error, StaticBuildError::NotFromCargo), "{missing}: {error}");
        }
    }

    #[test]
    fn a_target_that_is_not_installed_gives_the_command_that_installs_it() {
        let package = Package::new();
        let error = check_target(&package.origin("x"), "mips-unknown-linux-musl", &|_| None).unwrap_err().to_string();
        assert!(error.contains("`rustup target add mips-unknown-linux-musl`"), "{error}");
    }

    #[test]
    fn a_linker_of_the_users_stays() {
        let target = "aarch64-unknown-linux-musl";
        let with = |set: &'static [(&str, &str)]| {
            let env =
                move |name: &str| set.iter().find(|(other, _)| *other == name).map(|(_, value)| OsString::from(value));
            let (tools, _) = tools(Architecture::Arm64, target, &env);
            tools.into_iter().map(|(name, value)| (name, value.into_string().unwrap())).collect::<Vec<_>>()
        };
        if Architecture::current() != Some(Architecture::Amd64) {
            return;
        }
        const LINKER: &str = "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER";
        assert_eq!(with(&[]), [(LINKER.to_owned(), "rust-lld".to_owned())], "no gcc on the search path");
        assert!(with(&[(LINKER, "mine")]).is_empty());
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("config.toml"), format!("[target.{target}]\nlinker = \"mine\"\n")).unwrap();
        let home = home.path().as_os_str().to_owned();
        let (tools, remedy) = tools(Architecture::Arm64, target, &|name| (name == "CARGO_HOME").then(|| home.clone()));
        assert_eq!(tools, []);
        assert!(remedy.unwrap().contains("gcc-aarch64-linux-gnu"));
    }

    #[test]
    fn a_tool_that_hangs_is_ended() {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let Err(error) = listen(sleep, Duration::from_millis(20), "waiting", &mut |_| {}) else {
            panic!("it did not end by itself")
        };
        assert!(matches!(error, StaticBuildError::Deadline { what: "waiting", .. }), "{error}");
    }
}
