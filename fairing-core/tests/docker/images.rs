//! Images in the engine: handed over, built, pulled, pushed, tidied.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use fairing_core::image::append::{Base, Settings};
use fairing_core::image::archive::Archive;
use fairing_core::image::executable::Program;
use fairing_core::image::layer::Layer;
use fairing_core::image::libraries::Libraries;
use fairing_core::image::{Architecture, Descriptor, Digest, LAYER};
use fairing_core::launch::LaunchError;
use fairing_core::launch::docker::{
    BuildError, Dockerfile, Engine as Connection, EngineError, LoadError, LoadProgress, Logins, RoleLimits,
    TransferError, TransferProgress, image_labels,
};
use fairing_core::observe::events::Exit;
use fairing_core::registry::Login;
use fairing_core::topology::{Replica, Topology};
use tempfile::TempDir;

use crate::engine::Engine;
use crate::harness::{Tests, tests};
use crate::{Run, connect, eventually, left, name, nothing_is_left, with_engine};

pub(crate) const TESTS: Tests<'_> = tests![
    loaded_image_runs_and_is_sent_once,
    layers_that_the_engine_has_are_not_sent,
    image_that_cannot_be_read_is_not_loaded,
    engine_that_goes_away_ends_the_loading,
    layers_go_on_a_base_that_the_engine_has,
    generated_dockerfile_gives_the_same_program,
    own_dockerfile_sees_its_folder_and_the_layers,
    build_that_fails_is_named_and_leaves_nothing_nameless,
    pushed_image_is_pulled_by_digest,
    older_images_go_unless_somebody_needs_them,
    image_that_a_run_begins_with_outlives_the_end_of_another,
    removed_image_is_named_and_can_be_loaded_again,
    two_launchers_of_one_program_do_not_break_each_other,
    sweep_removes_what_is_left_and_nothing_that_lives,
];

/// The architecture of this program, and so of the engine.
fn architecture() -> Architecture {
    Architecture::current().unwrap()
}

/// This program and its libraries, as layers.
fn program_layers() -> Vec<Layer> {
    let program = Program::running().unwrap();
    let libraries = Libraries::of(&program, None).unwrap();
    vec![Layer::libraries(&libraries, true).unwrap(), Layer::program(&program)]
}

/// A layer with one small file.
fn note(folder: &Path, text: &str) -> Layer {
    let path = folder.join("note");
    fs::write(&path, text).unwrap();
    Layer::files([(path.as_path(), "/note")]).unwrap()
}

fn settings(program: &str) -> Settings {
    Settings { labels: image_labels(program), ..Settings::of_program(Program::running().unwrap().name()) }
}

fn archive<'a>(layers: &'a [Layer], program: &str) -> Archive<'a> {
    Archive::new(None, layers, architecture(), &settings(program)).unwrap()
}

fn unheard(_: LoadProgress) {}

/// Removes what a test has left at the engine.
fn remove(images: &[&str]) {
    with_engine(|engine| engine.lines(&[&["rmi", "--force"], images].concat()));
}

fn images(engine: &Engine) -> Vec<String> {
    engine.lines(&["images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "reference=fairing/*"])
}

fn loaded_image_runs_and_is_sent_once() {
    let (engine, layers) = (connect(), program_layers());
    let archive = archive(&layers, "Load_ed");
    let heard = Mutex::new(Vec::new());
    let loaded = engine.load("Load_ed", &archive, None, &|progress| heard.lock().unwrap().push(progress)).unwrap();
    assert_eq!(loaded.id, archive.image_id().to_string());
    assert_eq!(loaded.tag, format!("fairing/load-ed:{}", &archive.image_id().hex()[..12]));
    assert_eq!(loaded.sent_bytes, layers.iter().map(Layer::size_bytes).sum::<u64>());
    let last = LoadProgress { sent_bytes: loaded.sent_bytes, total_bytes: loaded.sent_bytes };
    assert_eq!(heard.into_inner().unwrap().last(), Some(&last));

    let again = engine.load("Load_ed", &archive, None, &|_| panic!("nothing is to be sent")).unwrap();
    assert_eq!((again.id, again.sent_bytes), (loaded.id.clone(), 0));

    let run = Run::of_image(&loaded.id, &name(), Topology::new(1, 1), "look", RoleLimits::default(), vec![]);
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
    drop(run);
    remove(&[&loaded.tag]);
    nothing_is_left();
}

fn layers_that_the_engine_has_are_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let engine = connect();
    let mut layers = program_layers();
    let first = engine.load("parts", &archive(&layers, "parts"), None, &unheard).unwrap();
    layers.push(note(folder.path(), "second"));
    let second = engine.load("parts", &archive(&layers, "parts"), None, &unheard).unwrap();
    assert_eq!(second.sent_bytes, layers[2].size_bytes());
    // An image of another program shares them as well, also when the first one is gone.
    remove(&[&first.tag]);
    layers[2] = note(folder.path(), "third");
    let third = engine.load("other", &archive(&layers, "other"), None, &unheard).unwrap();
    assert_eq!(third.sent_bytes, layers[2].size_bytes());
    let run = Run::of_image(&third.id, &name(), Topology::new(1, 1), "lines", RoleLimits::default(), vec![]);
    let (_, exits) = run.finish(2);
    assert_eq!(exits.len(), 2);
    drop(run);
    remove(&[&second.tag, &third.tag]);
    nothing_is_left();
}

fn image_that_cannot_be_read_is_not_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large");
    fs::write(&path, vec![1; 10_000_000]).unwrap();
    let layers = [Layer::files([(path.as_path(), "/large")]).unwrap()];
    let archive = archive(&layers, "unreadable");
    fs::write(&path, vec![1; 9_000_000]).unwrap();
    let error = connect().load("unreadable", &archive, None, &unheard).unwrap_err();
    assert!(matches!(error, LoadError::Read { .. }), "{error:?}");
    // Of the same size, only the engine can tell.
    fs::write(&path, vec![2; 10_000_000]).unwrap();
    let error = connect().load("unreadable", &archive, None, &unheard).unwrap_err();
    assert!(matches!(error, LoadError::Engine(_)), "{error:?}");
    assert!(
        error.to_string().starts_with("the container engine failed to load the image `fairing/unreadable:"),
        "{error}"
    );
    assert_eq!(with_engine(images), Vec::<String>::new());
    nothing_is_left();
}

fn engine_that_goes_away_ends_the_loading() {
    let server = Engine::start();
    let engine = Connection::connect(&BTreeMap::from([("DOCKER_HOST".to_owned(), server.host())])).unwrap();
    let layers = program_layers();
    let server = Mutex::new(Some(server));
    let ends_the_engine = |_: LoadProgress| drop(server.lock().unwrap().take());
    let error = engine.load("ended", &archive(&layers, "ended"), None, &ends_the_engine).unwrap_err();
    let LoadError::Engine(EngineError::Refused { status: None, action, .. }) = &error else { panic!("{error:?}") };
    assert!(action.starts_with("load the image `fairing/ended:"), "{error}");
}

fn layers_go_on_a_base_that_the_engine_has() {
    let engine = connect();
    let mut layers = program_layers();
    let program = layers.split_off(1);
    let base_archive = archive(&layers, "base");
    let base_id = engine.load("base", &base_archive, None, &unheard).unwrap().id;
    let descriptor = Descriptor { media_type: LAYER.to_owned(), digest: Digest::of(b""), size: 0 };
    let base = Base {
        reference: "base:1".to_owned(),
        digest: descriptor.digest.clone(),
        layers: vec![descriptor],
        config: base_archive.config().to_owned(),
    };
    let archive = Archive::new(Some(&base), &program, architecture(), &settings("on-base")).unwrap();
    let loaded = engine.load("on-base", &archive, Some(&base_id), &unheard).unwrap();
    assert_eq!((loaded.id.clone(), loaded.sent_bytes), (archive.image_id().to_string(), program[0].size_bytes()));
    runs(&loaded.id);
    // What an engine does that cannot be given single layers.
    let dockerfile = Dockerfile::Generated { base: Some(&base_id) };
    let built = engine.build("built-on-base", &archive, dockerfile, &Logins::new(), &mut |_| {}).unwrap();
    runs(&built.id);
    remove(&[&built.tag, &loaded.tag, &base_id]);
    let error = engine.load("on-base", &archive, Some(&base_id), &unheard).unwrap_err();
    assert!(matches!(error, LoadError::NoBase { .. }), "{error:?}");
    nothing_is_left();
}

/// A container of the image starts and says what it should.
#[track_caller]
fn runs(image: &str) {
    let run = Run::of_image(image, &name(), Topology::new(1, 1), "look", RoleLimits::default(), vec![]);
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
    assert!(lines.iter().any(|line| line.2 == "user 65532"), "{lines:?}");
}

fn inspect(image: &str, format: &str) -> String {
    with_engine(|engine| engine.lines(&["inspect", "--format", format, image])).concat()
}

fn generated_dockerfile_gives_the_same_program() {
    let (engine, layers) = (connect(), program_layers());
    let settings =
        Settings { env: [("VARIABLE".to_owned(), "$HOME \\ \"quoted\"".to_owned())].into(), ..settings("generated") };
    let archive = Archive::new(None, &layers, architecture(), &settings).unwrap();
    let dockerfile = Dockerfile::Generated { base: None };
    let mut output = Vec::new();
    let mut hear = |line: &str| output.push(line.to_owned());
    let built = engine.build("generated", &archive, dockerfile, &Logins::new(), &mut hear).unwrap();
    assert!(output.iter().any(|line| line.contains("ADD fairing/program.tar /")), "{output:?}");
    let sizes = inspect(&built.id, "{{len .RootFS.Layers}}").parse::<usize>().unwrap();
    assert!(sizes >= layers.len(), "each layer is one of its own");
    let entrypoint = inspect(&built.id, "{{json .Config.Entrypoint}} {{.Config.User}} {{.Config.WorkingDir}}");
    assert_eq!(entrypoint, format!("[\"{}\"] 65532:65532 /app", settings.entrypoint[0]));
    assert!(inspect(&built.id, "{{json .Config.Env}}").contains(r#""VARIABLE=$HOME \\ \"quoted\"""#));
    assert_eq!(inspect(&built.id, "{{index .Config.Labels \"fairing.dev/program\"}}"), "generated");
    runs(&built.id);
    let silent = &mut |line: &str| panic!("nothing is to be built: {line}");
    let again = engine.build("generated", &archive, dockerfile, &Logins::new(), silent).unwrap();
    assert_eq!((again.id, again.sent_bytes), (built.id, 0));
    remove(&[&built.tag]);
    nothing_is_left();
}

/// A folder with a Dockerfile that puts this program on nothing and then does `rest`.
fn context(rest: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let head = "FROM scratch\nADD fairing/libraries.tar /\nADD fairing/program.tar /\n";
    fs::write(folder.path().join("Dockerfile"), format!("{head}{rest}")).unwrap();
    folder
}

/// A step or an entry point that plays a part of this program.
fn play(behaviour: &str) -> String {
    format!(r#"["{}", "replica", "{behaviour}"]"#, settings("").entrypoint[0])
}

fn entrypoint() -> String {
    format!(r#"ENTRYPOINT ["{}"]"#, settings("").entrypoint[0])
}

fn own_dockerfile_sees_its_folder_and_the_layers() {
    let (engine, layers) = (connect(), program_layers());
    let archive = archive(&layers, "own");
    let rest = format!("COPY . /context/\nENV VARIABLE=seen\nRUN {}\n{}\n", play("files"), entrypoint());
    let folder = context(&rest);
    for path in ["target/debug/large", ".git/HEAD", "src/main.rs", "src/secret.key", "sub/target/kept", "notes.md"] {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "content").unwrap();
    }
    std::os::unix::fs::symlink("src/main.rs", folder.path().join("link")).unwrap();
    fs::write(folder.path().join(".dockerignore"), "# secrets\n**/*.key\n*.md\nDockerfile\n").unwrap();
    let mut output = Vec::new();
    let mut hear = |line: &str| output.push(line.to_owned());
    let dockerfile = folder.path().join("Dockerfile");
    let built = engine.build("own", &archive, Dockerfile::Own(&dockerfile), &Logins::new(), &mut hear).unwrap();
    let mut files: Vec<&str> = output.iter().filter_map(|line| line.strip_prefix("file /context/")).collect();
    files.sort_unstable();
    let layers = ["fairing", "fairing/libraries.tar", "fairing/program.tar"];
    let sent = ["Dockerfile", "link", "src", "src/main.rs", "sub", "sub/target", "sub/target/kept"];
    let mut expected = [layers.as_slice(), &sent].concat();
    expected.sort_unstable();
    assert_eq!(files, expected, "{output:#?}");
    assert!(output.contains(&"variable seen".to_owned()), "{output:#?}");
    assert!(built.tag.starts_with("fairing/own:"));
    runs(&built.id);
    // The engine remembers every step.
    let again = engine.build("own", &archive, Dockerfile::Own(&dockerfile), &Logins::new(), &mut |_| {}).unwrap();
    assert_eq!(again.id, built.id);
    remove(&[&built.tag]);
    nothing_is_left();
}

fn build_that_fails_is_named_and_leaves_nothing_nameless() {
    let (engine, layers) = (connect(), program_layers());
    let archive = archive(&layers, "fails");
    let build = |folder: &Path| {
        let dockerfile = folder.join("Dockerfile");
        engine.build("fails", &archive, Dockerfile::Own(&dockerfile), &Logins::new(), &mut |_| {})
    };
    let folder = tempfile::tempdir().unwrap();
    let error = build(folder.path()).unwrap_err();
    let missing = folder.path().join("Dockerfile");
    assert_eq!(
        error.to_string(),
        format!("cannot read the Dockerfile `{}` (set `dockerfile` to one)", missing.display())
    );

    fs::write(&missing, "FROM scratch\n").unwrap();
    fs::write(folder.path().join(".dockerignore"), "[a-z]\n").unwrap();
    let error = build(folder.path()).unwrap_err();
    assert!(error.to_string().contains("has the line `[a-z]`"), "{error}");

    let error = build(context("").path()).unwrap_err();
    assert!(matches!(error, BuildError::NoEntrypoint { .. }), "{error:?}");
    nothing_is_left();

    fs::remove_file(folder.path().join(".dockerignore")).unwrap();
    fs::write(&missing, "FROM 127.0.0.1:1/no/base:1\nENTRYPOINT [\"/a\"]\n").unwrap();
    let error = build(folder.path()).unwrap_err();
    assert!(matches!(error, BuildError::Failed { .. }) && error.to_string().contains("127.0.0.1:1"), "{error:?}");

    let failing =
        |step: &str| build(context(&format!("ENV STEP={step}\nRUN {}\n{}\n", play("fail"), entrypoint())).path());
    for step in ["first", "second", "second"] {
        let error = failing(step).unwrap_err();
        let BuildError::Failed { reason, last_lines, .. } = &error else { panic!("{error:?}") };
        assert!(reason.contains("returned a non-zero code: 3"), "{reason}");
        assert!(last_lines.contains(&"this step fails".to_owned()), "{last_lines:?}");
        assert!(error.to_string().contains("\n  | this step fails"), "{error}");
        nothing_is_left();
        assert_eq!(with_engine(images), ["fairing/fails:unfinished"]);
    }
    let built = build(context(&entrypoint()).path()).unwrap();
    assert_eq!(with_engine(images), [built.tag.as_str()]);
    remove(&[&built.tag]);
    nothing_is_left();
}

/// `htpasswd -nbBC 4 fairing 'not-to-be-seen'`
const HTPASSWD: &str = "fairing:$2y$04$mH.qhpkSIPbnpTkp3xYHn.W1yz2i/PdoaFT/WUIL4Lj/uehKV3Ir.\n";

fn pushed_image_is_pulled_by_digest() {
    let folder = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    fs::write(folder.path().join("htpasswd"), HTPASSWD).unwrap();
    let place = folder.path().display();
    let configuration = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {place}/data\n\
         http:\n  addr: 127.0.0.1:{port}\nauth:\n  htpasswd:\n    realm: test\n    path: {place}/htpasswd\n",
    );
    let path = folder.path().join("registry.yml");
    fs::write(&path, configuration).unwrap();
    let server = Engine::start_beside(Some(&path));
    let engine = Connection::connect(&BTreeMap::from([("DOCKER_HOST".to_owned(), server.host())])).unwrap();
    let layers = program_layers();
    let archive = archive(&layers, "pushed");
    let loaded = engine.load("pushed", &archive, None, &unheard).unwrap();
    let repository = format!("127.0.0.1:{port}/team/pushed");
    let password = |password: &str| Login::Password { username: "fairing".to_owned(), password: password.to_owned() };
    let (login, wrong) = (password("not-to-be-seen"), password("wrong-and-not-to-be-seen"));
    // There is no token server here to take it.
    let identity = Login::Identity("token-not-to-be-seen".to_owned());
    let tags = ["run-1".to_owned(), "latest".to_owned()];
    let push = |login, heard: &mut Vec<TransferProgress>| {
        engine.push_image(&loaded.id, &repository, &tags, login, &mut |progress| heard.push(progress))
    };
    for login in [None, Some(&wrong), Some(&identity)] {
        refused(&push(login, &mut vec![]).unwrap_err(), &repository);
    }
    let mut heard = Vec::new();
    let reference = push(Some(&login), &mut heard).unwrap();
    let digest = reference.strip_prefix(&format!("{repository}@")).unwrap();
    assert!(digest.parse::<Digest>().is_ok(), "{reference}");
    assert!(heard.iter().any(|progress| progress.bytes.is_some()), "{heard:?}");
    // What is in the registry is what the digest says.
    let link = folder.path().join("data/docker/registry/v2/blobs/sha256").join(&digest[7..9]).join(&digest[7..]);
    assert_eq!(Digest::of(&fs::read(link.join("data")).unwrap()).to_string(), digest);
    // The engine has it under that name: nothing is fetched, whoever asks.
    let silent = &mut |progress: TransferProgress| panic!("nothing is to be fetched: {progress:?}");
    assert_eq!(engine.pull(&reference, None, silent).unwrap(), loaded.id);

    server.lines(&["rmi", "--force", &loaded.id]);
    for login in [None, Some(&wrong), Some(&identity)] {
        refused(&engine.pull(&reference, login, &mut |_| {}).unwrap_err(), &repository);
    }
    let tagged = format!("{repository}:run-1@{digest}");
    assert_eq!(engine.pull(&tagged, Some(&login), &mut |_| {}).unwrap(), loaded.id);
    assert_eq!(left(&server), Vec::<String>::new());
    assert_eq!(images(&server), [loaded.tag.as_str()]);
    let other = format!("{repository}@sha256:{}", "0".repeat(64));
    let error = engine.pull(&other, Some(&login), &mut |_| {}).unwrap_err();
    assert!(matches!(error, TransferError::Missing { .. }), "{error:?}");
    let run =
        Run::launch(engine.clone(), &reference, &name(), Topology::new(1, 1), "look", RoleLimits::default(), vec![]);
    let run = run.unwrap();
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
    drop(run);
    // It can be fetched again, so it goes with the other leftovers.
    assert_eq!(engine.tidy_older("pushed", "", ANY_AGE).unwrap(), [loaded.tag.as_str()]);
    assert_eq!(images(&server), Vec::<String>::new());
    assert_eq!(left(&server), Vec::<String>::new());
}

/// However short ago an image was named.
const ANY_AGE: Duration = Duration::ZERO;

#[track_caller]
fn refused(error: &TransferError, repository: &str) {
    assert!(matches!(error, TransferError::Unauthorized { .. }), "{error:?}");
    let said = format!("{error:?} {error}");
    assert!(said.contains(repository) && !said.contains("not-to-be-seen"), "{said}");
}

fn older_images_go_unless_somebody_needs_them() {
    let folder = tempfile::tempdir().unwrap();
    let engine = connect();
    let load = |program: &str, text: &str| {
        let layers = [note(folder.path(), text)];
        engine.load(program, &archive(&layers, program), None, &unheard).unwrap()
    };
    let used = load("tidied", "used by a container");
    let old = load("tidied", "old");
    let named = load("tidied", "named by the user");
    let kept = load("tidied", "the new one");
    let other = load("other", "of another program");
    let container = with_engine(|engine| {
        engine.lines(&["tag", &named.id, "keep:me"]);
        engine.lines(&["create", &used.id, "/note"]).concat()
    });
    assert_eq!(engine.tidy_older("tidied", &kept.id, ANY_AGE).unwrap(), [old.tag.as_str()]);
    assert_eq!(engine.tidy_older("tidied", &kept.id, ANY_AGE).unwrap(), Vec::<String>::new());
    let mut expected = [&used.tag, &named.tag, &kept.tag, &other.tag].map(String::as_str);
    expected.sort_unstable();
    let mut found = with_engine(images);
    found.sort_unstable();
    assert_eq!(found, expected);
    with_engine(|engine| engine.lines(&["rm", &container]));
    assert_eq!(engine.tidy_older("tidied", &kept.id, ANY_AGE).unwrap(), [used.tag.as_str()]);
    remove(&["keep:me", &named.tag, &kept.tag, &other.tag]);
    nothing_is_left();
}

fn image_that_a_run_begins_with_outlives_the_end_of_another() {
    let (engine, layers) = (connect(), program_layers());
    let loaded = engine.load("begun", &archive(&layers, "begun"), None, &unheard).unwrap();
    let topology = Topology::new(1, 1);
    let run = Run::launch(connect(), &loaded.id, &name(), topology, "look", RoleLimits::default(), vec![]).unwrap();
    run.finish(2);
    drop(run);
    // No container uses it now, as between the loading and the launch.
    assert_eq!(engine.tidy("begun", "sha256:newer").unwrap(), Vec::<String>::new());
    assert_eq!(engine.tidy_older("begun", "sha256:newer", ANY_AGE).unwrap(), [loaded.tag.as_str()]);
    nothing_is_left();
}

fn removed_image_is_named_and_can_be_loaded_again() {
    let (engine, layers) = (connect(), program_layers());
    let archive = archive(&layers, "removed");
    let loaded = engine.load("removed", &archive, None, &unheard).unwrap();
    // Another launcher's run of a newer program has ended.
    assert_eq!(engine.tidy_older("removed", "sha256:newer", ANY_AGE).unwrap(), [loaded.tag.as_str()]);
    let run = name();
    let launch = || {
        let topology = Topology::new(1, 1);
        Run::launch(connect(), &loaded.id, &run, topology, "look", RoleLimits::default(), vec![])
    };
    let Err(error) = launch() else { panic!("there is no image") };
    let LaunchError::Engine(EngineError::NoImage { image }) = &error else { panic!("{error:?}") };
    assert_eq!(*image, loaded.id);
    nothing_is_left();
    let again = engine.load("removed", &archive, None, &unheard).unwrap();
    assert_eq!(again, loaded);
    let run = launch().unwrap();
    let (_, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)));
    // An image in use is not removed.
    assert_eq!(engine.tidy_older("removed", "sha256:newer", ANY_AGE).unwrap(), Vec::<String>::new());
    drop(run);
    assert_eq!(engine.tidy_older("removed", "sha256:newer", ANY_AGE).unwrap(), [loaded.tag.as_str()]);
    nothing_is_left();
}

fn two_launchers_of_one_program_do_not_break_each_other() {
    const RUNS: usize = 5;
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    thread::scope(|scope| {
        for folder in &folders {
            scope.spawn(move || {
                let engine = connect();
                let mut layers = program_layers();
                layers.push(note(folder.path(), &folder.path().display().to_string()));
                let archive = archive(&layers, "shared");
                for _ in 0..RUNS {
                    let mut launched = None;
                    eventually("a run is launched", || {
                        let image = engine.load("shared", &archive, None, &unheard).unwrap();
                        let topology = Topology::new(1, 1);
                        match Run::launch(
                            connect(),
                            &image.id,
                            &name(),
                            topology,
                            "look",
                            RoleLimits::default(),
                            vec![],
                        ) {
                            Ok(run) => launched = Some((run, image.id)),
                            Err(LaunchError::Engine(EngineError::NoImage { .. })) => {}
                            Err(error) => panic!("{error:?}"),
                        }
                        launched.is_some()
                    });
                    let (run, image) = launched.unwrap();
                    let (lines, exits) = run.finish(2);
                    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
                    drop(run);
                    engine.tidy_older("shared", &image, ANY_AGE).unwrap();
                }
            });
        }
    });
    // At most the image of the last run of each.
    assert!((1..=2).contains(&with_engine(images).len()));
    connect().tidy_older("shared", "", ANY_AGE).unwrap();
    assert_eq!(with_engine(images), Vec::<String>::new());
    nothing_is_left();
}

fn sweep_removes_what_is_left_and_nothing_that_lives() {
    let folder = tempfile::tempdir().unwrap();
    let engine = connect();
    assert_eq!(engine.sweep().unwrap().to_string(), "nothing was left of earlier runs");

    let layers = [note(folder.path(), "swept")];
    let image = engine.load("swept", &archive(&layers, "swept"), None, &unheard).unwrap();
    let living = name();
    let run = Run::with(&living, Topology::new(1, 1), "sleep", RoleLimits::default(), vec![]);
    let _ready = [run.line(), run.line()];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let leave = |run: &str, created: u64| {
        let labels = [
            format!("--label=fairing.dev/run={run}"),
            "--label=app.kubernetes.io/managed-by=fairing".to_owned(),
            format!("--label=fairing.dev/created={created}"),
        ];
        let labels = labels.each_ref().map(String::as_str);
        with_engine(|engine| {
            engine.lines(&[["network", "create"].as_slice(), &labels, &[run]].concat());
            let name = format!("--name={run}-worker-0");
            engine.lines(&[["create", &name, "--network", run].as_slice(), &labels, &[&image.id, "/note"]].concat());
        });
    };
    leave("left-over", now - 3600);
    leave("just-made", now);
    // The user's own, with a label that looks like fairing's.
    with_engine(|engine| engine.lines(&["network", "create", "--label=fairing.dev/run=mine", "mine"]));
    let swept = engine.sweep().unwrap();
    let mut alive = ["just-made".to_owned(), living.clone()];
    alive.sort_unstable();
    assert_eq!(swept.alive, alive);
    let expected =
        "removed what the run `left-over` had left: 1 container (`left-over-worker-0`), 1 network (`left-over`)";
    assert!(swept.to_string().starts_with(expected), "{swept}");
    assert!(swept.images.is_empty() && swept.failures.is_empty(), "the image is still used: {swept}");

    let networks = with_engine(|engine| engine.lines(&["network", "ls", "--format", "{{.Name}}"]));
    for name in ["just-made", "mine", living.as_str()] {
        assert!(networks.iter().any(|network| network == name), "{networks:?}");
    }
    with_engine(|engine| {
        engine.lines(&["rm", "just-made-worker-0"]);
        engine.lines(&["network", "rm", "just-made", "mine"]);
    });
    with_engine(|engine| engine.lines(&["tag", &image.tag, &image.tag]));
    assert!(engine.sweep().unwrap().images.is_empty(), "somebody may be about to use it");
    let swept = engine.sweep_older(ANY_AGE).unwrap();
    let expected =
        format!("removed 1 image that nothing uses: `{}`\nleft the run `{living}` alone: it is alive", image.tag);
    assert_eq!(swept.to_string(), expected);
    // A run that has just ended is its launcher's business.
    [Replica::worker(0), Replica::ps(0)].into_iter().for_each(|replica| run.launched.kill(replica));
    let (_, exits) = run.finish(2);
    assert_eq!(exits.len(), 2);
    assert_eq!(engine.sweep().unwrap().alive, [living]);
    drop(run);
    nothing_is_left();
}
