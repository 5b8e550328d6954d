//! The program packed for real: its layers unpacked into a root folder of their own, and the program started in there.
//!
//! The test program packs itself, so it has a `main` of its own: started with [`INSIDE`], it is the packed program.

#![expect(clippy::print_stdout, reason = "a test program with a `main` of its own reports by itself")]

#[path = "common/harness.rs"]
mod harness;

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fairing_core::image::Architecture;
use fairing_core::image::append::{Settings, assemble};
use fairing_core::image::archive::Archive;
use fairing_core::image::cache::Cache;
use fairing_core::image::executable::Program;
use fairing_core::image::layer::Layer;
use fairing_core::image::libraries::Libraries;
use fairing_core::image::static_build::{Origin, StaticBuild, StaticBuildError};
use harness::tests;

/// The argument of the packed program.
const INSIDE: &str = "--inside";

/// A program in a bare root folder needs milliseconds.
const DEADLINE: Duration = Duration::from_secs(60);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|argument| argument == INSIDE) {
        return inside(arguments.get(2).map(String::as_str));
    }
    harness::run(TESTS, &arguments[1..], None);
}

const TESTS: harness::Tests<'_> = tests![
    the_packed_program_does_in_a_bare_root_what_programs_do,
    a_panic_in_the_packed_program_names_its_functions,
    a_copy_in_another_place_is_the_same_layer,
    the_running_program_is_packed_even_if_its_file_is_replaced,
    an_archive_holds_the_image_that_it_names,
    a_static_build_for_another_processor_runs_on_it,
    a_failed_static_build_gives_the_command_and_the_reason,
];

fn say(line: &str) {
    println!("{line}");
}

/// Says why a test does not run here; in CI it has to.
fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{reason}");
    say(&format!("skipped: {reason}"));
}

/// What the packed program does.
fn inside(what: Option<&str>) {
    match what {
        Some("panic") => a_function_that_panics(),
        Some("digest") => say(&Layer::program(&Program::running().unwrap()).diff_id().unwrap().to_string()),
        Some("replaced") => {
            let own = std::env::current_exe().unwrap();
            fs::rename(own.with_extension("new"), &own).unwrap();
            let program = Program::running().unwrap();
            say(&format!("{} {}", program.name(), Layer::program(&program).diff_id().unwrap()));
        }
        _ => {
            let addresses: Vec<_> = "localhost:0".to_socket_addrs().unwrap().collect();
            assert!(addresses.iter().any(|address| address.ip().is_loopback()), "{addresses:?}");
            assert!("no-such-name.invalid:0".to_socket_addrs().is_err());
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let connected = TcpStream::connect(("localhost", listener.local_addr().unwrap().port()));
            assert!(connected.is_ok(), "{connected:?}");
            let sum: u64 = (0..8).map(|i| thread::spawn(move || i)).map(|thread| thread.join().unwrap()).sum();
            assert!(SystemTime::now() > SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
            tempfile::tempfile().unwrap().write_all(b"a temporary file").unwrap();
            say(&format!("inside {sum}"));
        }
    }
}

#[inline(never)]
fn a_function_that_panics() {
    panic!("on purpose");
}

/// A root folder with the unpacked layers of this program.
fn root() -> (tempfile::TempDir, Program) {
    let root = tempfile::tempdir().unwrap();
    let program = Program::running().unwrap();
    let libraries = Libraries::of(&program, None).unwrap();
    for layer in [Layer::libraries(&libraries, true).unwrap(), Layer::program(&program)] {
        let mut tar = Command::new("tar");
        tar.args(["-x", "-C"]).arg(root.path()).stdin(Stdio::piped());
        let mut tar = tar.spawn().unwrap();
        layer.write_to(&mut tar.stdin.take().unwrap()).unwrap();
        assert!(tar.wait().unwrap().success());
    }
    // Every engine puts this file into its containers.
    fs::write(root.path().join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    (root, program)
}

/// Runs the packed program with the unpacked layers as its root; `None` where that is not allowed.
fn run_in(root: &Path, program: &Program, what: &str) -> Option<Output> {
    // A user namespace, so that it needs no rights; as root in a container, often only the plain call is allowed.
    let ways: [&[&str]; 2] = [&["chroot"], &["unshare", "--user", "--map-root-user", "chroot"]];
    for way in ways {
        let mut command = Command::new(way[0]);
        command.args(&way[1..]).arg(root);
        let mut probe = Command::new(way[0]);
        // The loader answers by itself, so this says whether the root can be entered.
        probe.args(&way[1..]).arg(root).arg(loader(root)).arg("--version");
        if !probe.output().is_ok_and(|output| output.status.success()) {
            continue;
        }
        command.arg(format!("/app/{}", program.name())).args([INSIDE, what]);
        command.env_clear().env("RUST_BACKTRACE", "1").env("PATH", std::env::var_os("PATH").unwrap_or_default());
        return Some(ended(command));
    }
    skip("neither chroot nor unshare is allowed here (run as root, or allow user namespaces)");
    None
}

fn loader(root: &Path) -> String {
    let folders = ["lib64", "lib"].map(|folder| root.join(folder));
    let files = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    let mut names = files.map(|file| file.unwrap().path());
    let loader = names.find(|path| path.file_name().unwrap().to_string_lossy().starts_with("ld-")).unwrap();
    format!("/{}", loader.strip_prefix(root).unwrap().display())
}

/// What a command says, if it ends in time.
fn ended(mut command: Command) -> Output {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + DEADLINE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("the packed program was still running after {DEADLINE:?}");
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

fn the_packed_program_does_in_a_bare_root_what_programs_do() {
    let (root, program) = root();
    let Some(output) = run_in(root.path(), &program, "all") else { return };
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "inside 28\n", "{stderr}");
    assert!(output.status.success(), "{stderr}");
}

fn a_panic_in_the_packed_program_names_its_functions() {
    // Not in the root folder: backtraces need /proc, which an engine mounts and this test may not be allowed to.
    let (root, program) = root();
    let mut packed = Command::new(root.path().join("app").join(program.name()));
    packed.args([INSIDE, "panic"]).env("RUST_BACKTRACE", "1");
    let output = ended(packed);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("packing::a_function_that_panics") && stderr.contains("packing::main"), "{stderr}");
}

fn a_copy_in_another_place_is_the_same_layer() {
    let folder = tempfile::tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    let digest = |place: &str| {
        let copy = folder.path().join(place).join(own.file_name().unwrap());
        fs::create_dir(copy.parent().unwrap()).unwrap();
        fs::copy(&own, &copy).unwrap();
        Layer::program(&Program::open(&copy).unwrap()).diff_id().unwrap()
    };
    let here = Layer::program(&Program::running().unwrap()).diff_id().unwrap();
    assert_eq!((digest("one"), digest("two")), (here.clone(), here.clone()));
    // And what is packed, started and packed again is itself.
    let packed = folder.path().join("app");
    let mut tar = Command::new("tar").args(["-x", "-C"]).arg(folder.path()).stdin(Stdio::piped()).spawn().unwrap();
    Layer::program(&Program::running().unwrap()).write_to(&mut tar.stdin.take().unwrap()).unwrap();
    assert!(tar.wait().unwrap().success());
    let mut again = Command::new(packed.join(own.file_name().unwrap()));
    again.args([INSIDE, "digest"]);
    assert_eq!(String::from_utf8_lossy(&ended(again).stdout), format!("{here}\n"));
}

fn the_running_program_is_packed_even_if_its_file_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("fit");
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    fs::write(copy.with_extension("new"), "what a compiler wrote meanwhile").unwrap();
    let expected = Layer::program(&Program::open(&copy).unwrap()).diff_id().unwrap();
    let mut program = Command::new(&copy);
    program.args([INSIDE, "replaced"]);
    let output = ended(program);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("fit {expected}\n"), "{stderr}");
}

fn an_archive_holds_the_image_that_it_names() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::running().unwrap();
    let libraries = Libraries::of(&program, None).unwrap();
    let layers = [Layer::libraries(&libraries, true).unwrap(), Layer::program(&program)];
    let settings = Settings::of_program(program.name());
    let archive = Archive::new(None, &layers, program.architecture(), &settings).unwrap();
    let cache = Cache::open(folder.path()).unwrap();
    let packed = cache.pack_all(&layers).unwrap();
    let image = assemble(None, &packed, program.architecture(), &settings).unwrap();
    assert_eq!(*archive.image_id(), image.config.descriptor.digest, "an engine calls both the same");
    let path = folder.path().join("image.tar");
    archive.write_to("fit:latest", 0, &mut fs::File::create(&path).unwrap()).unwrap();
    let tar = ended({
        let mut tar = Command::new("tar");
        tar.arg("-tf").arg(&path);
        tar
    });
    assert!(tar.status.success() && tar.stderr.is_empty(), "{}", String::from_utf8_lossy(&tar.stderr));
    let names = String::from_utf8(tar.stdout).unwrap();
    let mut expected = vec!["manifest.json".to_owned(), format!("{}.json", archive.image_id().hex())];
    expected.extend(packed.iter().map(|layer| format!("{}.tar", layer.diff_id.hex())));
    assert_eq!(names.lines().collect::<Vec<_>>(), expected);
}

/// A package of a user's with two examples, and where cargo would have put one of them.
fn package(folder: &Path, example: &str) -> Origin {
    let source = r#"
        fn main() {
            let sum: u64 = std::thread::spawn(|| (1..=10).sum()).join().unwrap();
            println!("{} {sum} {}", std::env::consts::ARCH, cfg!(feature = "extra"));
        }
    "#;
    let manifest = "[package]\nname = \"some-thing\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
        [features]\nextra = []\n[profile.quick]\ninherits = \"release\"\n[workspace]\n";
    fs::create_dir_all(folder.join("examples")).unwrap();
    fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    fs::write(folder.join("examples/my-fit.rs"), source).unwrap();
    fs::write(folder.join("examples/broken.rs"), "fn main() { nonsense() }").unwrap();
    Origin {
        cargo: env!("CARGO").into(),
        manifest_folder: folder.to_owned(),
        package: "some-thing".to_owned(),
        executable: folder.join("target/quick/examples").join(example),
    }
}

/// The build, or why there is none here.
fn static_build(origin: &Origin, architecture: Architecture) -> Option<StaticBuild> {
    match StaticBuild::new(origin, architecture, &|name| std::env::var_os(name)) {
        Ok(build) => Some(build.in_folder(&origin.manifest_folder.join("target"))),
        Err(error @ StaticBuildError::TargetMissing { .. }) => {
            skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn a_static_build_for_another_processor_runs_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let origin = package(folder.path(), "my-fit");
    let mut cargo = Command::new(&origin.cargo);
    cargo.args(["build", "--quiet", "--profile", "quick", "--example", "my-fit", "--features", "extra"]);
    let target = folder.path().join("target");
    let built = ended({
        cargo.current_dir(folder.path()).arg("--target-dir").arg(&target);
        cargo
    });
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let Some(build) = static_build(&origin, Architecture::Arm64) else { return };
    let command = build.to_string();
    for part in ["--example my-fit", "--profile quick", "--features extra", "--target aarch64-unknown-linux-musl"] {
        assert!(command.contains(part), "{command}");
    }
    let mut said = Vec::new();
    let program = build.run(&mut |line| said.push(line.to_owned())).unwrap();
    assert!(said.iter().any(|line| line.contains("Compiling some-thing")), "{said:?}");
    assert_eq!((program.architecture(), program.is_static(), program.name()), (Architecture::Arm64, true, "my-fit"));
    assert!(Libraries::of(&program, None).unwrap().is_empty());
    if Command::new("qemu-aarch64").arg("--version").output().is_err() {
        return skip("qemu-aarch64 is not installed (package qemu-user)");
    }
    // What is packed, and not what was built.
    let mut tar = Command::new("tar").args(["-x", "-C"]).arg(folder.path()).stdin(Stdio::piped()).spawn().unwrap();
    Layer::program(&program).write_to(&mut tar.stdin.take().unwrap()).unwrap();
    assert!(tar.wait().unwrap().success());
    let mut qemu = Command::new("qemu-aarch64");
    qemu.arg(folder.path().join("app/my-fit"));
    assert_eq!(String::from_utf8_lossy(&ended(qemu).stdout), "aarch64 55 true\n");
}

fn a_failed_static_build_gives_the_command_and_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let origin = package(folder.path(), "broken");
    let Some(build) = static_build(&origin, Architecture::current().unwrap()) else { return };
    let error = build.run(&mut |_| {}).unwrap_err();
    let StaticBuildError::Failed { command, last_lines, .. } = &error else { panic!("{error}") };
    assert!(command.contains("--example broken"), "{command}");
    assert!(last_lines.contains("nonsense") && last_lines.contains("could not compile"), "{last_lines}");
}
