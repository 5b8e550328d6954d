//! What arrives, and what is not sent.

use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex};

use fairing_core::image::Architecture;
use fairing_core::image::append::{self, assemble};
use fairing_core::image::cache::Cache;
use fairing_core::image::executable::Program;
use fairing_core::image::layer::Layer;
use fairing_core::image::libraries::Libraries;
use fairing_core::registry::Push;

use crate::server::{Server, registry};
use crate::support::{client, image_for, index, layer, noise, push, skip, small_image};

/// Everything that the image is made of is in the registry, whole.
#[track_caller]
fn holds(server: &Server, name: &str, image: &fairing_core::image::Image) {
    assert_eq!(server.blob(&image.descriptor.digest).unwrap(), image.manifest, "the manifest came byte by byte");
    assert!(server.has_manifest(name, &image.descriptor.digest));
    for blob in image.layers.iter().chain([&image.config]) {
        let bytes = server.blob(&blob.descriptor.digest).unwrap();
        assert_eq!(bytes.len() as u64, blob.descriptor.size);
        assert!(server.has_blob(name, &blob.descriptor.digest));
    }
}

#[test]
fn an_image_arrives_whole_and_is_called_by_digest_and_tag() {
    let server = registry!();
    let (image, _folder) = small_image(&[3_000_000, 200_000, 128 * 1024, 1], 1);
    let repository = server.repository("team/name");
    let pushed = push(&client(), &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();

    holds(&server, "team/name", &image);
    assert_eq!(server.tagged("team/name", "v1").unwrap(), image.manifest);
    assert_eq!(pushed.reference.to_string(), format!("{repository}@{}", image.descriptor.digest));
    assert_eq!((pushed.sent, pushed.mounted, pushed.existed, pushed.unchanged), (5, 0, 0, false));
    let blobs: u64 = image.layers.iter().chain([&image.config]).map(|blob| blob.descriptor.size).sum();
    // Once under the digest, once under the tag.
    assert_eq!(pushed.sent_bytes, blobs + 2 * image.descriptor.size);
}

#[test]
fn nothing_is_sent_for_an_image_that_is_there() {
    let server = registry!();
    let (image, folder) = small_image(&[300_000], 1);
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    push(&client(), &ask).unwrap();
    // The layers are not even looked at.
    folder.close().unwrap();
    let again = push(&client(), &ask).unwrap();
    assert!(again.unchanged);
    assert_eq!((again.sent_bytes, again.sent), (0, 0));

    let renamed = push(&client(), &Push::image(&image, &repository).tagged("v2".parse().unwrap())).unwrap();
    assert!(renamed.unchanged);
    assert_eq!(renamed.sent_bytes, image.descriptor.size, "a new tag costs the manifest");
    assert_eq!(server.tagged("x", "v2").unwrap(), image.manifest);
}

#[test]
fn crane_accepts_an_image_of_fairings_own_making() {
    let server = registry!();
    if Command::new("crane").arg("version").output().is_err() {
        let reason = "needs `crane` (go install github.com/google/go-containerregistry/cmd/crane@v0.22.1)";
        return skip(reason);
    }
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(&folder.path().join("cache")).unwrap();
    // Larger than a block of the compressor, and neither all alike nor all noise.
    let notes = folder.path().join("notes");
    fs::write(&notes, [noise(3_000_000, 1), vec![b'x'; 2_000_000]].concat()).unwrap();
    let program = Program::open("/bin/true".as_ref()).unwrap();
    let libraries = Libraries::of(&program, None).unwrap();
    let layers = [
        Layer::libraries(&libraries, true).unwrap(),
        Layer::files([(notes.as_path(), "/data/notes")]).unwrap(),
        Layer::program(&program),
    ];
    let packed = cache.pack_all(&layers).unwrap();
    let image = assemble(None, &packed, program.architecture(), &append::Settings::of_program(program.name())).unwrap();
    let repository = server.repository("x");
    push(&client(), &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();

    let crane = |arguments: &[&str]| {
        let output = Command::new("crane").args(arguments).output().unwrap();
        assert!(output.status.success(), "crane {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    crane(&["validate", "--remote", &format!("{repository}:v1")]);
    assert_eq!(crane(&["manifest", &format!("{repository}:v1")]), image.manifest);
}

#[test]
fn an_index_brings_the_images_of_all_its_architectures() {
    let server = registry!();
    let folder = tempfile::tempdir().unwrap();
    let data = layer(folder.path(), &noise(50_000, 1));
    let program = |seed| layer(folder.path(), &noise(70_000, seed));
    let images = [
        image_for(Architecture::Amd64, vec![data.clone(), program(2)]),
        image_for(Architecture::Arm64, vec![data, program(3)]),
    ];
    let (descriptor, bytes) = index(&images);
    let repository = server.repository("x");
    let ask = Push::index(&images, &descriptor, &bytes, &repository).tagged("v1".parse().unwrap());
    let pushed = push(&client(), &ask).unwrap();
    assert_eq!(pushed.sent, 5, "the data layer is sent once for both");
    for image in &images {
        holds(&server, "x", image);
    }
    assert_eq!(server.tagged("x", "v1").unwrap(), bytes);
    assert_eq!(pushed.reference.digest(), Some(&descriptor.digest));
    assert!(push(&client(), &ask).unwrap().unchanged);
}

#[test]
fn two_pushes_of_one_image_at_once_both_succeed() {
    let server = registry!();
    let (image, _folder) = small_image(&[1_000_000, 1_000_000], 1);
    let repository = server.repository("x");
    std::thread::scope(|scope| {
        for tag in ["a", "b"] {
            let ask = Push::image(&image, &repository).tagged(tag.parse().unwrap());
            scope.spawn(move || push(&client(), &ask).unwrap());
        }
    });
    holds(&server, "x", &image);
    assert_eq!(server.tagged("x", "a").unwrap(), image.manifest);
    assert_eq!(server.tagged("x", "b").unwrap(), image.manifest);
}

#[test]
fn progress_ends_where_it_said_it_would() {
    let server = registry!();
    let (image, _folder) = small_image(&[900_000, 50_000], 1);
    let repository = server.repository("x");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = seen.clone();
    let watcher = Arc::new(move |progress: &fairing_core::registry::Progress| note.lock().unwrap().push(*progress));
    push(&client(), &Push::image(&image, &repository).watched(watcher)).unwrap();
    let seen = seen.lock().unwrap();
    let last = seen.iter().max_by_key(|progress| (progress.done_blobs, progress.sent_bytes)).unwrap();
    assert_eq!((last.done_blobs, last.blobs), (3, 3));
    assert_eq!(last.sent_bytes, last.missing_bytes);
    assert_eq!(last.missing_bytes, 950_000 + image.config.descriptor.size);
    assert!(seen.len() > 7, "a layer of {} bytes is seen on its way", 900_000);
}
