//! Images and clients for the tests.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fairing_core::image::{Architecture, Blob, CONFIG, Descriptor, Digest, INDEX, Image, LAYER, MANIFEST, Source};
use fairing_core::registry::{Client, Keychain, Patience, Push, PushError, Pushed, Settings};
use serde_json::json;
use tempfile::TempDir;

/// Runs a future to its end; that it may move between threads is what fairing waits for it by.
pub(crate) fn wait<F: Future + Send>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let output = runtime.block_on(future);
    // A helper program that hangs must not hold the test.
    runtime.shutdown_background();
    output
}

/// A client that knows no credentials and does not wait long.
pub(crate) fn client() -> Client {
    client_with(Settings::default(), Keychain::empty())
}

pub(crate) fn client_with(settings: Settings, keychain: Keychain) -> Client {
    Client::with_patience(settings, keychain, patience()).unwrap()
}

/// As by default, but in shorter times.
pub(crate) fn patience() -> Patience {
    let mut patience = Patience::default();
    patience.pause = Duration::from_millis(5);
    // What hangs is to be seen as an error of the test and not as a test without an end.
    [patience.answer, patience.stall, patience.commit] = [Duration::from_secs(15); 3];
    patience
}

/// A keychain whose only file says `config`.
pub(crate) fn keychain(folder: &Path, config: &serde_json::Value) -> Keychain {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let env: BTreeMap<String, String> = [("DOCKER_CONFIG".to_owned(), folder.display().to_string())].into();
    Keychain::from_env(&env)
}

/// Bytes that look like nothing and do not compress.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A layer in a file of `folder`.
pub(crate) fn layer(folder: &Path, bytes: &[u8]) -> Blob {
    let descriptor = descriptor(LAYER, bytes);
    let path: PathBuf = folder.join(descriptor.digest.hex());
    fs::write(&path, bytes).unwrap();
    Blob { descriptor, source: Source::File(path) }
}

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor { media_type: media_type.to_owned(), digest: Digest::of(bytes), size: bytes.len() as u64 }
}

/// An image of these layers, which need not be archives: registries do not look inside.
pub(crate) fn image(layers: Vec<Blob>) -> Image {
    image_for(Architecture::Amd64, layers)
}

pub(crate) fn image_for(architecture: Architecture, layers: Vec<Blob>) -> Image {
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.descriptor.digest).collect();
    let config = json!({
        "architecture": architecture.to_string(),
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = serde_json::to_vec(&config).unwrap();
    let config = Blob { descriptor: descriptor(CONFIG, &config), source: Source::Memory(config) };
    let descriptors: Vec<_> = layers.iter().map(|layer| &layer.descriptor).collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor,
        "layers": descriptors,
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    Image { architecture, descriptor: descriptor(MANIFEST, &manifest), manifest, config, layers }
}

/// An image of one layer for each length, distinct by `seed`, and the folder with the layers.
pub(crate) fn small_image(lengths: &[usize], seed: u64) -> (Image, TempDir) {
    let folder = TempDir::new().unwrap();
    let layers = lengths.iter().zip(seed * 1_000..).map(|(length, seed)| layer(folder.path(), &noise(*length, seed)));
    (image(layers.collect()), folder)
}

/// An index of `images`.
pub(crate) fn index(images: &[Image]) -> (Descriptor, Vec<u8>) {
    let manifests: Vec<_> = images
        .iter()
        .map(|image| {
            json!({
                "mediaType": image.descriptor.media_type,
                "digest": image.descriptor.digest,
                "size": image.descriptor.size,
                "platform": { "os": "linux", "architecture": image.architecture.to_string() },
            })
        })
        .collect();
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    let index = serde_json::to_vec(&index).unwrap();
    (descriptor(INDEX, &index), index)
}

/// Pushes and waits for the end.
pub(crate) fn push(client: &Client, push: &Push<'_>) -> Result<Pushed, PushError> {
    wait(client.push(push))
}

/// An error with all its causes, as a person sees it.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The image with another configuration.
pub(crate) fn reconfigured(image: Image, config: &serde_json::Value) -> Image {
    let config = serde_json::to_vec(config).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["config"] = serde_json::to_value(descriptor(CONFIG, &config)).unwrap();
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let config = Blob { descriptor: descriptor(CONFIG, &config), source: Source::Memory(config) };
    Image { descriptor: descriptor(MANIFEST, &manifest), manifest, config, ..image }
}

/// As RFC 4648 has it, with padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let number = (0..3).fold(0u32, |number, at| number << 8 | u32::from(*three.get(at).unwrap_or(&0)));
        for digit in 0..4 {
            let value = (number >> (18 - 6 * digit)) & 63;
            text.push(if digit <= three.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

/// Says that a test is skipped, and how to get it; in CI that is a failure. Past libtest, which shows what the macros print of
/// failed tests only.
pub(crate) fn skip(reason: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "skipped in CI: {reason}");
    std::io::stderr().write_all(format!("skipped: {reason}\n").as_bytes()).unwrap();
}

/// Says that a test is skipped where nothing can be done about it.
pub(crate) fn mention(reason: &str) {
    std::io::stderr().write_all(format!("not tested here: {reason}\n").as_bytes()).unwrap();
}
