//! A registry that fails: a named error or a retry that succeeds, and never half an image.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fairing_core::image::{Digest, Image, Source};
use fairing_core::registry::{Client, Keychain, Progress, Push, PushError, Pushed, RequestError, Settings};
use tempfile::TempDir;
use tokio::sync::Notify;

use crate::proxy::{Deed, Proxy, Request, first};
use crate::server::{Kind, Server, registry};
use crate::support::{client, noise, patience, push, skip, small_image, told, wait};

const LARGE: usize = 2_000_000;

/// An image with a large layer between two small ones.
fn sample() -> (Image, TempDir) {
    small_image(&[40_000, LARGE, 30_000], 7)
}

/// Pushes through a proxy with `rule`.
fn through(
    server: &Server,
    image: &Image,
    rule: impl Fn(&Request) -> Deed + Send + Sync + 'static,
) -> (Proxy, Result<Pushed, PushError>) {
    let proxy = Proxy::start(server.address(), rule);
    let repository = proxy.repository("x");
    let pushed = push(&client(), &Push::image(image, &repository).tagged("v1".parse().unwrap()));
    (proxy, pushed)
}

#[track_caller]
fn arrived(server: &Server, image: &Image) {
    assert_eq!(server.tagged("x", "v1").unwrap(), image.manifest);
    for blob in image.layers.iter().chain([&image.config]) {
        assert!(server.blob(&blob.descriptor.digest).is_some());
    }
}

/// Neither a tag nor a manifest: whoever pulls finds nothing, and not half of it.
#[track_caller]
fn absent(server: &Server, image: &Image) {
    assert_eq!(server.tagged("x", "v1"), None);
    assert!(!server.has_manifest("x", &image.descriptor.digest));
}

#[test]
fn a_layer_whose_connection_breaks_starts_again_and_the_others_are_not_resent() {
    let server = registry!();
    let (image, _folder) = sample();
    let broken = Arc::new(AtomicUsize::new(0));
    let (proxy, pushed) = through(&server, &image, {
        let broken = broken.clone();
        move |request| match request.is_upload() && request.length == LARGE as u64 {
            true => first(2, &broken, Deed::CutAfter(700_000)),
            false => Deed::Forward,
        }
    });
    let pushed = pushed.unwrap();
    arrived(&server, &image);
    assert_eq!(broken.load(Ordering::SeqCst), 3);
    assert_eq!(proxy.count(Request::is_upload), 4 + 2, "three layers, the configuration, and two attempts that broke");
    assert!(pushed.sent_bytes > LARGE as u64 + 2 * 700_000, "what was sent in vain counts as sent");
}

#[test]
fn a_connection_that_always_breaks_is_given_up_with_every_reason() {
    let server = registry!();
    let (image, _folder) = sample();
    let (proxy, pushed) = through(&server, &image, |request| match request.length == LARGE as u64 {
        true => Deed::CutAfter(700_000),
        false => Deed::Forward,
    });
    let error = pushed.unwrap_err();
    let PushError::Blob { digest, size_bytes, source, .. } = &error else { panic!("{error:?}") };
    assert_eq!((digest, *size_bytes), (&image.layers[1].descriptor.digest, LARGE as u64));
    let RequestError::GaveUp { attempts, .. } = &**source else { panic!("{source:?}") };
    assert_eq!(attempts.len(), 5);
    assert!(matches!(source.last(), RequestError::Broken { .. }), "{source:?}");
    assert!(told(&error).contains("gave up after 5 attempts"), "{}", told(&error));
    assert_eq!(proxy.count(|request| request.length == LARGE as u64), 5);
    absent(&server, &image);
}

#[test]
fn a_cut_answer_to_the_manifest_is_asked_for_again() {
    let server = registry!();
    let (image, _folder) = sample();
    let (proxy, pushed) = through(&server, &image, |request| {
        let manifest = request.is("PUT", "/manifests/") && request.earlier == 0;
        if manifest { Deed::CutAnswer } else { Deed::Forward }
    });
    pushed.unwrap();
    arrived(&server, &image);
    assert_eq!(proxy.count(|request| request.is("PUT", "/manifests/")), 3);
}

#[test]
fn busy_and_failing_registries_are_asked_again() {
    for (status, headers) in [(500, vec![]), (502, vec![]), (503, vec![]), (429, vec!["Retry-After: 0".to_owned()])] {
        let server = registry!();
        let (image, _folder) = sample();
        let (_proxy, pushed) = through(&server, &image, move |request| match request.earlier {
            // The first of each kind: questions, openings, uploads, manifests.
            0 => Deed::Answer(status, "try later", headers.clone()),
            _ => Deed::Forward,
        });
        pushed.unwrap_or_else(|error| panic!("{status}: {}", told(&error)));
        arrived(&server, &image);
    }
}

#[test]
fn a_registry_that_keeps_failing_is_given_up_in_its_own_words() {
    let server = registry!();
    let (image, _folder) = sample();
    let (_proxy, pushed) = through(&server, &image, |request| match request.is_upload() {
        true => Deed::Answer(500, r#"{"errors":[{"code":"UNKNOWN","message":"the cellar burns"}]}"#, vec![]),
        false => Deed::Forward,
    });
    let error = pushed.unwrap_err();
    assert!(told(&error).contains("with status 500: UNKNOWN the cellar burns"), "{}", told(&error));
    assert!(matches!(error.request(), Some(RequestError::Answer { status: 500, .. })));
    absent(&server, &image);
}

#[test]
fn a_registry_without_space_is_told_at_once() {
    let full =
        r#"{"errors":[{"code":"UNKNOWN","message":"unknown error","detail":{"Enclosed":{"Op":"write","Err":28}}}]}"#;
    let deeds: [fn(&'static str) -> Deed; 2] =
        [|full| Deed::Answer(500, full, vec![]), |_| Deed::Answer(507, "", vec![])];
    for deed in deeds {
        let server = registry!();
        let (image, _folder) = sample();
        let (proxy, pushed) = through(&server, &image, move |request| match request.length == LARGE as u64 {
            true => deed(full),
            false => Deed::Forward,
        });
        let error = pushed.unwrap_err();
        assert!(matches!(error.request(), Some(RequestError::NoSpace { .. })), "{}", told(&error));
        assert_eq!(proxy.count(|request| request.length == LARGE as u64), 1, "it is not tried again");
        absent(&server, &image);
    }
}

#[test]
fn a_full_disk_is_told() {
    let arguments = ["--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"];
    if !Command::new("unshare").args(arguments).output().is_ok_and(|output| output.status.success()) {
        return skip("needs `unshare` and user namespaces (on Debian: sysctl kernel.unprivileged_userns_clone=1)");
    }
    let server = registry!(&Kind { small_disk: true, ..Kind::default() });
    let (image, _folder) = sample();
    let repository = server.repository("x");
    let error = push(&client(), &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::NoSpace { .. })), "{}", told(&error));
    let tag = server.raw("GET", "/v2/x/manifests/v1", &[], &[]).unwrap();
    assert!(tag.starts_with("HTTP/1.1 404"), "{tag}");
}

#[test]
fn an_answer_in_the_middle_of_an_upload_is_heard() {
    let server = registry!();
    let (image, _folder) = small_image(&[30_000_000], 3);
    let (_proxy, pushed) = through(&server, &image, |request| match request.length > 1_000_000 {
        true => Deed::Interrupt(507),
        false => Deed::Forward,
    });
    let error = pushed.unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::NoSpace { .. })), "{}", told(&error));
    absent(&server, &image);
}

#[test]
fn a_refused_manifest_is_told_in_the_registrys_words() {
    let server = registry!();
    let (mut image, folder) = sample();
    // The manifest speaks of a layer that nobody sends.
    let lost = image.layers.remove(0);
    let repository = server.repository("x");
    let error = push(&client(), &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap_err();
    let PushError::ManifestRefused { status, words, .. } = &error else { panic!("{}", told(&error)) };
    assert!([400, 404].contains(status), "{status}");
    assert!(words.contains("MANIFEST_BLOB_UNKNOWN") && words.contains(&lost.descriptor.digest.to_string()), "{words}");
    absent(&server, &image);
    drop(folder);

    let (image, _folder) = sample();
    let (proxy, pushed) = through(&server, &image, |request| match request.is("PUT", "/manifests/") {
        true => Deed::Answer(400, r#"{"errors":[{"code":"MANIFEST_INVALID","message":"too pretty"}]}"#, vec![]),
        false => Deed::Forward,
    });
    let error = pushed.unwrap_err();
    assert!(told(&error).contains("with status 400: MANIFEST_INVALID too pretty"), "{}", told(&error));
    assert_eq!(proxy.count(|request| request.is("PUT", "/manifests/")), 1);
    absent(&server, &image);
}

#[test]
fn a_manifest_that_comes_before_its_layers_are_settled_is_stored_a_little_later() {
    let server = registry!();
    let (image, _folder) = sample();
    let layer = &image.layers[0].descriptor.digest;
    let unknown = format!(
        r#"{{"errors":[{{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown to registry","detail":"{layer}"}}]}}"#
    );
    let unknown: &'static str = unknown.leak();
    let (proxy, pushed) = through(&server, &image, move |request| match request.is("PUT", "/manifests/") {
        true if request.earlier < 2 => Deed::Answer(400, unknown, vec![]),
        _ => Deed::Forward,
    });
    let pushed = pushed.unwrap();
    arrived(&server, &image);
    assert_eq!((pushed.sent, proxy.count(Request::is_upload)), (4, 4), "what is there is not sent again");

    let (image, _folder) = small_image(&[1_000], 5);
    let digest = image.layers[0].descriptor.digest.to_string();
    let (proxy, pushed) = through(&server, &image, move |request| match request.is("PUT", "/manifests/") {
        true => Deed::Answer(404, format!("MANIFEST_BLOB_UNKNOWN {digest}").leak(), vec![]),
        false => Deed::Forward,
    });
    let error = pushed.unwrap_err();
    assert!(matches!(error, PushError::ManifestRefused { status: 404, .. }), "{}", told(&error));
    assert_eq!(proxy.count(|request| request.is("PUT", "/manifests/")), 5, "it is not tried for ever");
    assert!(!server.has_manifest("x", &image.descriptor.digest));
}

#[test]
fn a_refused_tag_leaves_the_image_whole_and_the_old_tag_in_place() {
    let server = registry!();
    let (old, _old_folder) = small_image(&[1_000], 1);
    let (new, _folder) = sample();
    let repository = server.repository("x");
    push(&client(), &Push::image(&old, &repository).tagged("v1".parse().unwrap())).unwrap();
    for (status, expected) in [
        (400, "status 400, DENIED tags never move here"),
        (403, "DENIED tags never move here"),
        (409, "status 409, DENIED tags never move here"),
        (412, "status 412, DENIED tags never move here"),
    ] {
        let proxy = Proxy::start(server.address(), move |request| match request.is("PUT", "/manifests/v1") {
            true => Deed::Answer(status, r#"{"errors":[{"code":"DENIED","message":"tags never move here"}]}"#, vec![]),
            false => Deed::Forward,
        });
        let repository = proxy.repository("x");
        let ask =
            Push::image(&new, &repository).tagged("v1".parse().unwrap()).tagged(format!("v{status}").parse().unwrap());
        let pushed = push(&client(), &ask).unwrap_or_else(|error| panic!("{status}: {}", told(&error)));
        assert_eq!(pushed.refused_tags, [("v1".parse().unwrap(), expected.to_owned())]);
        assert_eq!(pushed.reference, repository.at(new.descriptor.digest.clone()));
        assert_eq!(server.tagged("x", "v1").unwrap(), old.manifest);
        assert_eq!(server.tagged("x", &format!("v{status}")).unwrap(), new.manifest, "the other tag is set");
    }
    assert_eq!(server.blob(&new.descriptor.digest).unwrap(), new.manifest);
}

#[test]
fn a_registry_that_fails_at_a_tag_fails_the_push() {
    let server = registry!();
    let (image, _folder) = sample();
    let (_proxy, pushed) = through(&server, &image, |request| match request.is("PUT", "/manifests/v1") {
        true => Deed::Answer(500, "the cellar burns", vec![]),
        false => Deed::Forward,
    });
    let error = pushed.unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Answer { status: 500, .. })), "{}", told(&error));
}

#[test]
fn a_registry_that_is_down_is_told_with_its_address() {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let (image, _folder) = sample();
    let repository = format!("{address}/x").parse().unwrap();
    let error = push(&client(), &Push::image(&image, &repository)).unwrap_err();
    let Some(RequestError::Unreachable { address: called, .. }) = error.request() else { panic!("{error:?}") };
    assert_eq!(*called, address.to_string());
    assert!(told(&error).contains("Connection refused"), "{}", told(&error));
}

#[test]
fn silence_ends() {
    let (image, _folder) = sample();
    let proxy = Proxy::alone(|_| Deed::Hang);
    let mut patience = patience();
    patience.answer = Duration::from_millis(50);
    patience.attempts = 2;
    let client = Client::with_patience(Settings::default(), Keychain::empty(), patience).unwrap();
    let error = push(&client, &Push::image(&image, &proxy.repository("x"))).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Silent { .. })), "{}", told(&error));
    assert!(told(&error).contains("was silent for 0.05 s during the question for manifest"), "{}", told(&error));
}

#[test]
fn an_upload_that_stands_still_is_tried_again() {
    let server = registry!();
    let (image, _folder) = sample();
    let hung = AtomicUsize::new(0);
    let proxy = Proxy::start(server.address(), move |request| match request.length == LARGE as u64 {
        true => first(1, &hung, Deed::Hang),
        false => Deed::Forward,
    });
    let mut patience = patience();
    patience.stall = Duration::from_secs(1);
    patience.commit = Duration::from_secs(1);
    let client = Client::with_patience(Settings::default(), Keychain::empty(), patience).unwrap();
    let repository = proxy.repository("x");
    push(&client, &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();
    arrived(&server, &image);
}

#[test]
fn a_layer_that_was_changed_is_never_sent_whole() {
    let server = registry!();
    let (image, _folder) = sample();
    let Source::File(path) = &image.layers[1].source else { unreachable!() };
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());

    let mut other = noise(LARGE, 99);
    for bytes in [&other[..], &other[..LARGE / 2], b""] {
        std::fs::write(path, bytes).unwrap();
        let error = push(&client(), &ask).unwrap_err();
        let PushError::Changed { digest, path: Some(named) } = &error else { panic!("{}", told(&error)) };
        assert_eq!((digest, named), (&image.layers[1].descriptor.digest, path));
        assert_eq!(server.blob(&Digest::of(bytes)), None);
        absent(&server, &image);
    }
    // What follows the layer in its file is not sent.
    other = std::iter::chain(noise(LARGE, 7_001), *b"more").collect();
    std::fs::write(path, &other).unwrap();
    push(&client(), &ask).unwrap();
    arrived(&server, &image);

    let (image, _folder) = small_image(&[1_000], 8);
    let Source::File(path) = &image.layers[0].source else { unreachable!() };
    std::fs::remove_file(path).unwrap();
    let error = push(&client(), &Push::image(&image, &repository)).unwrap_err();
    assert!(matches!(&error, PushError::ReadLayer { path: named, .. } if named == path), "{}", told(&error));
}

#[test]
fn an_image_that_is_there_costs_less_than_a_kilobyte() {
    let server = registry!();
    let (image, _folder) = sample();
    let (proxy, pushed) = through(&server, &image, |_| Deed::Forward);
    pushed.unwrap();
    let before = proxy.seen().len();
    let repository = proxy.repository("x");
    let ask = Push::image(&image, &repository);
    for (ask, requests) in [(ask.clone().tagged("v1".parse().unwrap()), 1), (ask, 1)] {
        let before = proxy.seen().len();
        assert!(push(&client(), &ask).unwrap().unchanged);
        let sent = &proxy.seen()[before..];
        let bytes: u64 = sent.iter().map(|request| request.head.len() as u64 + request.length).sum();
        assert_eq!(sent.len(), requests);
        assert!(bytes < 400, "{bytes} bytes: {sent:?}");
    }
    let renamed = Push::image(&image, &repository).tagged("v2".parse().unwrap());
    let before_new = proxy.seen().len();
    push(&client(), &renamed).unwrap();
    let bytes: u64 = proxy.seen()[before_new..].iter().map(|request| request.head.len() as u64 + request.length).sum();
    assert!(bytes < 2_048, "a new tag costs {bytes} bytes");
    assert!(before > 0);
}

#[test]
fn a_dropped_push_leaves_nothing_that_has_a_name() {
    let server = registry!();
    let (image, _folder) = sample();
    let proxy = Proxy::start(server.address(), |request| match request.length == LARGE as u64 {
        true => Deed::Hang,
        false => Deed::Forward,
    });
    let repository = proxy.repository("x");
    let moved = Arc::new(Notify::new());
    let watcher = {
        let moved = moved.clone();
        Arc::new(move |progress: &Progress| {
            if progress.done_blobs == 3 && progress.sent_bytes > 100_000 {
                moved.notify_one();
            }
        })
    };
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap()).watched(watcher);
    let client = client();
    wait(async {
        tokio::select! {
            pushed = client.push(&ask) => panic!("it did not wait for the layer that hangs: {pushed:?}"),
            () = moved.notified() => {}
        }
    });
    absent(&server, &image);
}
