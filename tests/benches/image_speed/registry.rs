//! A registry on a port of its own, and what is in it before anything is measured.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use fairing_core::image::append::{self, Settings};
use fairing_core::image::cache::Cache;
use fairing_core::image::layer::Layer;
use fairing_core::image::{Architecture, Digest};
use fairing_core::registry::{Client, Keychain, Push};

/// Far above the tenth of a second that it takes.
const START: Duration = Duration::from_secs(20);

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);

/// Bytes of files in the base image; with gzip 25 to 35 MB, as Debian's smallest.
const BASE_SIZE: u64 = 80_000_000;

/// Where the files of the base image come from.
const BASE_FOLDERS: [&str; 3] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/bin"];

/// Debian's `docker-registry`; it ends with this value.
pub(crate) struct Registry {
    process: Child,
    address: SocketAddr,
    configuration: PathBuf,
    /// For what is packed once.
    cache: PathBuf,
}

impl Registry {
    /// Starts one that keeps its things in `folder`.
    pub(crate) fn start(folder: &Path) -> anyhow::Result<Self> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let storage = folder.join("storage");
        let configuration = folder.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: true\n  level: error\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\nhttp:\n  addr: {address}\n",
            storage.display()
        );
        fs::write(&configuration, text)?;
        let log = File::create(folder.join("registry.log"))?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .env_remove("OTEL_TRACES_EXPORTER")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("no `docker-registry` (on Debian: apt-get install docker-registry)")?;
        let mut registry = Self { process, address, configuration, cache: folder.join("base-cache") };
        let deadline = Instant::now() + START;
        while TcpStream::connect(address).is_err() {
            let ended = registry.process.try_wait()?;
            anyhow::ensure!(
                ended.is_none() && Instant::now() < deadline,
                "docker-registry does not start at {address}"
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(registry)
    }

    /// Another one with the same configuration has the same content.
    pub(crate) fn configuration(&self) -> &Path {
        &self.configuration
    }

    /// What a repository is called in it.
    pub(crate) fn repository(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// The base image.
    pub(crate) fn base(&self) -> String {
        self.repository("base:v1")
    }

    /// Puts a base image there that is as large as Debian's smallest.
    pub(crate) fn push_base(&self) -> anyhow::Result<()> {
        let mut size = 0;
        let mut files = Vec::new();
        for folder in BASE_FOLDERS {
            let Ok(entries) = fs::read_dir(folder) else { continue };
            let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            for path in paths {
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                if metadata.is_file() && size + metadata.len() < BASE_SIZE {
                    size += metadata.len();
                    files.push((path.clone(), format!("/base{}", path.display())));
                }
            }
        }
        let layer = Layer::files(files.iter().map(|(path, at)| (path.as_path(), at.as_str())))?;
        let packed = Cache::open(&self.cache)?.pack(&layer)?;
        eprintln!("the base image: {} bytes, {} compressed", size, packed.blob.descriptor.size);
        let architecture = Architecture::current().context("images are for amd64 and arm64")?;
        let settings = Settings { env: BTreeMap::new(), ..Settings::default() };
        let image = append::assemble(None, &[packed], architecture, &settings)?;
        let repository = self.repository("base").parse()?;
        let client = Client::new(Default::default(), Keychain::empty())?;
        let push = Push::image(&image, &repository).tagged("v1".parse()?);
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?
            .block_on(client.push(&push))?;
        Ok(())
    }

    /// Sends bytes in the fewest requests that a registry takes: one to open an upload, one with all of them. Their digest
    /// is given, and nothing is asked for first.
    pub(crate) fn raw_upload(&self, bytes: &[u8], digest: &Digest) -> anyhow::Result<()> {
        let opened = self.ask("POST", "/v2/raw/blobs/uploads/", &[])?;
        let location =
            opened.lines().find_map(|line| line.strip_prefix("Location: ")).context("no place to upload to")?;
        let path = location.split_once("/v2/").context("no place to upload to")?.1.trim();
        let answer = self.ask("PUT", &format!("/v2/{path}&digest={digest}"), bytes)?;
        anyhow::ensure!(answer.starts_with("HTTP/1.1 201"), "the registry does not take a blob: {answer}");
        Ok(())
    }

    fn ask(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_nodelay(true)?;
        let (host, length) = (self.address, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}
