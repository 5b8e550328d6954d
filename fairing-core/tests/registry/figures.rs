//! What a push costs. `cargo test --test registry figures -- --ignored --nocapture`

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use fairing_core::registry::{Keychain, Push, Settings};

use crate::proxy::{Deed, Proxy};
use crate::server::{Server, registry};
use crate::support::{client_with, noise, push, small_image};
use crate::tls::Authority;

const LAYER_BYTES: usize = 11_000_000;

#[test]
#[ignore = "prints figures and proves nothing"]
fn figures() {
    let server = registry!();
    let (image, _folder) = small_image(&[LAYER_BYTES], 1);
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    let open = || client_with(Settings::default(), Keychain::empty());
    raw_upload(&server, &noise(LAYER_BYTES, 2));
    // The peak is counted from here on.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak_kib();
    timed("first push", || push(&open(), &ask).unwrap());
    println!("peak memory: {} KiB more than before ({before} KiB)", peak_kib() - before);
    for _ in 0..3 {
        timed("nothing changed", || push(&open(), &ask).unwrap());
    }
    for seed in 10..13 {
        let (image, _folder) = small_image(&[LAYER_BYTES], seed);
        timed("program changed", || push(&open(), &Push::image(&image, &repository)).unwrap());
    }
    for seed in 20..23 {
        let bytes = noise(LAYER_BYTES, seed);
        timed("raw upload", || raw_upload(&server, &bytes));
    }
    let proxy = Proxy::start(server.address(), |_| Deed::Forward);
    let repository = proxy.repository("x");
    let bytes = |before: usize| -> u64 {
        proxy.seen()[before..].iter().map(|request| request.head.len() as u64 + request.length).sum()
    };
    push(&open(), &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();
    println!("nothing changed: {} requests, {} bytes", proxy.seen().len(), bytes(0));
    let before = proxy.seen().len();
    push(&open(), &Push::image(&image, &repository).tagged("v2".parse().unwrap())).unwrap();
    println!("a new tag: {} requests, {} bytes", proxy.seen().len() - before, bytes(before));
}

#[test]
#[ignore = "prints figures and proves nothing"]
fn figures_over_tls() {
    let authority = Authority::new("ours");
    let server = registry!(&authority.kind(&["127.0.0.1"]));
    let (image, folder) = small_image(&[LAYER_BYTES], 1);
    let settings = Settings { registry_ca: Some(authority.file(folder.path())), ..Settings::default() };
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    for what in ["first push", "nothing changed", "nothing changed"] {
        timed(&format!("{what} over TLS"), || push(&client_with(settings.clone(), Keychain::empty()), &ask).unwrap());
    }
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = run();
    println!("{what}: {:.1} ms", began.elapsed().as_secs_f64() * 1_000.0);
    done
}

/// The same bytes in two requests, without looking and without hashing on this side.
fn raw_upload(server: &Server, bytes: &[u8]) {
    let digest = fairing_core::image::Digest::of(bytes);
    let opened = server.raw("POST", "/v2/raw/blobs/uploads/", &[], &[]).unwrap();
    let location = opened.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap();
    let path = location.split_once("/v2/").unwrap().1;
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let head = format!(
        "PUT /v2/{path}&digest={digest} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        server.address(),
        bytes.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
}

/// The most memory that this process had since that was last cleared.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
