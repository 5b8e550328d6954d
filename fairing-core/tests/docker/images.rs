//! Images in the engine: handed over, built, pulled, pushed, tidied.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use fairing_core::image::Architecture;
use fairing_core::image::append::Settings;
use fairing_core::image::archive::Archive;
use fairing_core::image::executable::Program;
use fairing_core::image::layer::Layer;
use fairing_core::image::libraries::Libraries;
use fairing_core::launch::docker::{LoadError, LoadProgress, RoleLimits, image_labels};
use fairing_core::observe::events::Exit;
use fairing_core::topology::Topology;

use crate::engine::Engine;
use crate::{Run, connect, name, nothing_is_left, with_engine};

pub(crate) const TESTS: &[(&str, fn())] = tests![
    loaded_image_runs_and_is_sent_once,
    layers_that_the_engine_has_are_not_sent,
    image_that_cannot_be_read_is_not_loaded,
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
