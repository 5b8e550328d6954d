//! Base images: looked up, pinned, and their layers taken over without going through this machine's disk.

use std::sync::atomic::AtomicUsize;

use fairing_core::image::{Architecture, Blob, Image, Source};
use fairing_core::registry::{BaseError, Push, PushError, Reference, Repository, RequestError};
use serde_json::json;

use crate::proxy::{Deed, Proxy, Request, first};
use crate::server::{Server, registry};
use crate::support::{client, image, image_for, index, layer, noise, push, reconfigured, small_image, told, wait};

const LARGE: usize = 1_500_000;

fn reference(repository: &Repository, tag: &str) -> Reference {
    format!("{repository}:{tag}").parse().unwrap()
}

/// A base image in `name` of the registry.
fn base(server: &Server, name: &str) -> Image {
    let (base, _folder) = small_image(&[LARGE, 60_000], 5);
    push(&client(), &Push::image(&base, &server.repository(name)).tagged("12".parse().unwrap())).unwrap();
    base
}

/// An image with one layer of its own on top of a base's.
fn on_top(base: &Image) -> (Image, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let below = base.layers.iter().map(|layer| Blob { source: Source::Base, ..layer.clone() });
    let layers = below.chain([layer(folder.path(), &noise(80_000, 6))]);
    (image(layers.collect()), folder)
}

#[test]
fn a_base_is_pinned_to_the_variant_of_the_architecture() {
    let server = registry!();
    let folder = tempfile::tempdir().unwrap();
    let layers = || vec![layer(folder.path(), &noise(1_000, 1))];
    let images = [image_for(Architecture::Amd64, layers()), image_for(Architecture::Arm64, layers())];
    let (descriptor, bytes) = index(&images);
    let repository = server.repository("library/base");
    push(&client(), &Push::index(&images, &descriptor, &bytes, &repository).tagged("12".parse().unwrap())).unwrap();

    for image in &images {
        let base = wait(client().base(&reference(&repository, "12"), image.architecture)).unwrap();
        let pinned = format!("{repository}:12@{}", image.descriptor.digest);
        assert_eq!(base.reference.to_string(), pinned);
        assert_eq!((&base.descriptor, &base.manifest), (&image.descriptor, &image.manifest));
        assert_eq!(base.config_descriptor, image.config.descriptor);
        assert_eq!(Source::Memory(base.config.clone()), image.config.source);
        let layers: Vec<_> = image.layers.iter().map(|layer| layer.descriptor.clone()).collect();
        assert_eq!(base.layers, layers);
        let again = wait(client().base(&base.reference, image.architecture)).unwrap();
        assert_eq!(again, base, "the pinned reference leads to the same image");
    }
}

#[test]
fn a_base_for_another_architecture_is_refused_with_what_there_is() {
    let server = registry!();
    let folder = tempfile::tempdir().unwrap();
    let only = [image_for(Architecture::Arm64, vec![layer(folder.path(), &noise(1_000, 1))])];
    let (descriptor, bytes) = index(&only);
    let repository = server.repository("base");
    push(&client(), &Push::index(&only, &descriptor, &bytes, &repository).tagged("index".parse().unwrap())).unwrap();
    push(&client(), &Push::image(&only[0], &repository).tagged("single".parse().unwrap())).unwrap();
    for tag in ["index", "single"] {
        let error = wait(client().base(&reference(&repository, tag), Architecture::Amd64)).unwrap_err();
        let expected = format!("base image `{repository}:{tag}` has no `amd64` variant (it has `linux/arm64`)");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_base_that_is_none_is_named() {
    let server = registry!();
    let missing = reference(&server.repository("nothing"), "12");
    let error = wait(client().base(&missing, Architecture::Amd64)).unwrap_err();
    assert!(matches!(error, BaseError::Missing { .. }), "{}", told(&error));
    assert!(told(&error).contains("MANIFEST_UNKNOWN"), "{}", told(&error));

    let (image, _folder) = small_image(&[1_000], 1);
    let image = reconfigured(image, &json!({ "chart": "not an image" }));
    let repository = server.repository("chart");
    push(&client(), &Push::image(&image, &repository).tagged("1".parse().unwrap())).unwrap();
    let error = wait(client().base(&reference(&repository, "1"), Architecture::Amd64)).unwrap_err();
    assert!(matches!(error, BaseError::Architecture { .. }), "{}", told(&error));
}

#[test]
fn a_manifest_of_another_digest_is_not_believed() {
    let server = registry!();
    let base = base(&server, "base");
    let proxy = Proxy::start(server.address(), |request| match request.is("GET", "/manifests/") {
        true => Deed::Say(r#"{"schemaVersion":2}"#.to_owned()),
        false => Deed::Forward,
    });
    let pinned = proxy.repository("base").at(base.descriptor.digest);
    let error = wait(client().base(&pinned, Architecture::Amd64)).unwrap_err();
    let BaseError::Request { source, .. } = &error else { panic!("{}", told(&error)) };
    let RequestError::Content { reason, .. } = &**source else { panic!("{}", told(&error)) };
    assert!(reason.contains("its digest is"), "{reason}");
}

#[test]
fn layers_of_a_base_in_the_same_registry_are_mounted() {
    let server = registry!();
    let base = base(&server, "library/base");
    let (image, _folder) = on_top(&base);
    let proxy = Proxy::start(server.address(), |_| Deed::Forward);
    let (repository, base) = (proxy.repository("team/x"), proxy.repository("library/base"));
    let ask = Push::image(&image, &repository).on_base(&base).tagged("v1".parse().unwrap());
    let pushed = push(&client(), &ask).unwrap();
    assert_eq!((pushed.mounted, pushed.sent, pushed.existed), (2, 2, 0));
    assert_eq!(proxy.count(|request| request.length >= 60_000), 1, "only the layer on top is sent");
    assert_eq!(proxy.count(|request| request.is("GET", "/blobs/")), 0);
    assert_eq!(server.tagged("team/x", "v1").unwrap(), image.manifest);
    assert!(image.layers.iter().all(|layer| server.has_blob("team/x", &layer.descriptor.digest)));
}

#[test]
fn a_refused_mount_means_a_copy_to_the_address_that_it_opened() {
    let server = registry!();
    let base = base(&server, "library/base");
    let (image, _folder) = on_top(&base);
    let proxy = Proxy::start(server.address(), |request| match request.path.split_once("?mount=") {
        // Without its question, a mount is the opening of an upload: that is what a registry answers that cannot mount.
        Some((path, _)) => Deed::ForwardTo(path.to_owned()),
        None => Deed::Forward,
    });
    let (repository, base) = (proxy.repository("team/x"), proxy.repository("library/base"));
    let ask = Push::image(&image, &repository).on_base(&base).tagged("v1".parse().unwrap());
    let pushed = push(&client(), &ask).unwrap();
    assert_eq!((pushed.mounted, pushed.sent), (0, 4));
    assert_eq!(proxy.count(|request| request.is("POST", "/blobs/uploads/")), 4, "one for each blob");
    assert_eq!(server.tagged("team/x", "v1").unwrap(), image.manifest);
}

#[test]
fn a_mount_that_is_refused_outright_means_an_upload() {
    let server = registry!();
    let base = base(&server, "library/base");
    let (image, _folder) = on_top(&base);
    for (status, tag) in [(400, "a"), (403, "b"), (404, "c"), (405, "d")] {
        let proxy = Proxy::start(server.address(), move |request| match request.path.contains("?mount=") {
            true => Deed::Answer(status, r#"{"errors":[{"code":"UNSUPPORTED","message":"no mounts here"}]}"#, vec![]),
            false => Deed::Forward,
        });
        let (repository, base) = (proxy.repository(&format!("team/{tag}")), proxy.repository("library/base"));
        let ask = Push::image(&image, &repository).on_base(&base).tagged("v1".parse().unwrap());
        let pushed = push(&client(), &ask).unwrap_or_else(|error| panic!("{status}: {}", told(&error)));
        assert_eq!((pushed.mounted, pushed.sent), (0, 4));
        assert_eq!(server.tagged(&format!("team/{tag}"), "v1").unwrap(), image.manifest);
    }

    // A user without credentials needs some for the upload too.
    let proxy = Proxy::start(server.address(), |request| match request.path.contains("?mount=") {
        true => Deed::Answer(401, "", vec!["WWW-Authenticate: Basic realm=\"x\"".to_owned()]),
        false => Deed::Forward,
    });
    let (repository, base) = (proxy.repository("team/e"), proxy.repository("library/base"));
    let error = push(&client(), &Push::image(&image, &repository).on_base(&base)).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Unauthorized(_))), "{}", told(&error));
    assert_eq!(proxy.count(|request| request.is("PUT", "/manifests/")), 0);
}

#[test]
fn layers_of_a_base_elsewhere_are_copied_from_registry_to_registry() {
    let (here, there) = (registry!(), registry!());
    let base = base(&there, "base");
    let (image, _folder) = on_top(&base);
    let broken = AtomicUsize::new(0);
    let source = Proxy::start(there.address(), move |request| match request.is("GET", "/blobs/") {
        true => first(2, &broken, Deed::CutAnswerAfter(40_000)),
        false => Deed::Forward,
    });
    let (repository, base) = (here.repository("x"), source.repository("base"));
    let ask = Push::image(&image, &repository).on_base(&base).tagged("v1".parse().unwrap());
    let pushed = push(&client(), &ask).unwrap();
    assert_eq!((pushed.mounted, pushed.sent), (0, 4));
    assert_eq!(source.count(|request| request.is("GET", "/blobs/")), 4, "two broken downloads and two whole ones");
    assert_eq!(here.tagged("x", "v1").unwrap(), image.manifest);
    for layer in &image.layers {
        assert_eq!(here.blob(&layer.descriptor.digest).unwrap().len() as u64, layer.descriptor.size);
    }
}

#[test]
fn a_base_that_gives_other_bytes_or_none_is_named_and_nothing_is_tagged() {
    let (here, there) = (registry!(), registry!());
    let base = base(&there, "base");
    let (image, _folder) = on_top(&base);
    let wrong: [fn(&Request) -> Deed; 3] = [
        |_| Deed::Say("something else".to_owned()),
        |_| Deed::Answer(404, r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"gone"}]}"#, vec![]),
        |_| Deed::CutAnswerAfter(10_000),
    ];
    for (wrong, expected) in wrong.into_iter().zip(["another digest", "BLOB_UNKNOWN gone", "gave up after 5 attempts"])
    {
        let source = Proxy::start(there.address(), move |request| match request.is("GET", "/blobs/") {
            true => wrong(request),
            false => Deed::Forward,
        });
        let (repository, base) = (here.repository("x"), source.repository("base"));
        let ask = Push::image(&image, &repository).on_base(&base).tagged("v1".parse().unwrap());
        let error = push(&client(), &ask).unwrap_err();
        assert!(matches!(&error, PushError::Copy { base: named, .. } if *named == base), "{}", told(&error));
        assert!(told(&error).contains(expected), "{}", told(&error));
        assert_eq!(here.tagged("x", "v1"), None);
    }
}

#[test]
fn a_push_without_the_name_of_its_base_is_refused() {
    let server = registry!();
    let (image, _folder) = on_top(&base(&server, "base"));
    let error = push(&client(), &Push::image(&image, &server.repository("x"))).unwrap_err();
    assert!(matches!(error, PushError::NoBase { .. }), "{}", told(&error));
}
