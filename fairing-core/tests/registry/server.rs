//! A registry of the test's own: Debian's docker-registry on a free port, with its storage in a folder that goes with it.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fairing_core::image::Digest;
use fairing_core::registry::Repository;
use tempfile::TempDir;

use crate::support::skip;

const PROGRAM: &str = "docker-registry";
/// Reading the configuration takes it a tenth of a second; a loaded machine is slower.
const START: Duration = Duration::from_secs(20);
/// Another process may take the port between our look and the registry's.
const PORTS: usize = 5;

/// A running registry; it ends with this value.
pub(crate) struct Server {
    process: Child,
    address: SocketAddr,
    folder: TempDir,
}

/// Who may push, and how the registry speaks.
#[derive(Default)]
pub(crate) struct Kind {
    /// Lines of a configuration, as YAML, under `auth:`.
    pub(crate) auth: Option<String>,
    /// Certificate and key, as PEM.
    pub(crate) tls: Option<(String, String)>,
    /// Its storage is a disk of one mebibyte, which only the registry itself sees.
    pub(crate) small_disk: bool,
    /// Where it believes to be, as a URL; uploads are sent there.
    pub(crate) host: Option<String>,
}

impl Server {
    /// Starts a registry, or says that there is none on this machine.
    pub(crate) fn start(kind: &Kind) -> Option<Self> {
        if !is_installed() {
            return None;
        }
        let folder = TempDir::new().unwrap();
        for _ in 0..PORTS {
            if let Some(server) = Self::try_start(kind, folder.path()) {
                let (process, address) = server;
                return Some(Self { process, address, folder });
            }
        }
        panic!("docker-registry did not start: {}", fs::read_to_string(folder.path().join("log")).unwrap_or_default());
    }

    fn try_start(kind: &Kind, folder: &Path) -> Option<(Child, SocketAddr)> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let mut config = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: true\n  level: error\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\nhttp:\n  addr: {address}\n",
            folder.join("storage").display()
        );
        if let Some(host) = &kind.host {
            config.push_str(&format!("  host: {host}\n"));
        }
        if let Some((certificate, key)) = &kind.tls {
            let (certificate_file, key_file) = (folder.join("certificate.pem"), folder.join("key.pem"));
            fs::write(&certificate_file, certificate).unwrap();
            fs::write(&key_file, key).unwrap();
            let (certificate, key) = (certificate_file.display(), key_file.display());
            config.push_str(&format!("  tls:\n    certificate: {certificate}\n    key: {key}\n"));
        }
        if let Some(auth) = &kind.auth {
            config.push_str(&format!("auth:\n{auth}"));
        }
        let config_file = folder.join("config.yml");
        fs::write(&config_file, config).unwrap();
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut command = Command::new(if kind.small_disk { "unshare" } else { PROGRAM });
        if kind.small_disk {
            fs::create_dir_all(folder.join("storage")).unwrap();
            let script = "mount -t tmpfs -o size=1m none \"$0\" && exec docker-registry serve \"$1\"";
            command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(folder.join("storage"));
        } else {
            command.arg("serve");
        }
        let mut process = command
            .arg(&config_file)
            .env_remove("OTEL_TRACES_EXPORTER")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let began = Instant::now();
        while began.elapsed() < START {
            if process.try_wait().unwrap().is_some() {
                return None;
            }
            if listens(process.id(), address) {
                return Some((process, address));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        _ = process.kill();
        _ = process.wait();
        None
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A repository of this registry.
    pub(crate) fn repository(&self, name: &str) -> Repository {
        format!("{}/{name}", self.address).parse().unwrap()
    }

    /// The manifest under a tag, read from the storage; `None` if there is no such tag.
    pub(crate) fn tagged(&self, name: &str, tag: &str) -> Option<Vec<u8>> {
        let link = self.storage().join(format!("repositories/{name}/_manifests/tags/{tag}/current/link"));
        let digest = fs::read_to_string(link).ok()?;
        Some(self.blob(&digest.parse().unwrap()).unwrap())
    }

    /// Whether the repository has a manifest, read from the storage.
    pub(crate) fn has_manifest(&self, name: &str, digest: &Digest) -> bool {
        let folder = format!("repositories/{name}/_manifests/revisions/sha256/{}/link", digest.hex());
        self.storage().join(folder).exists()
    }

    /// Whether the repository, and not only the registry, has a blob.
    pub(crate) fn has_blob(&self, name: &str, digest: &Digest) -> bool {
        self.storage().join(format!("repositories/{name}/_layers/sha256/{}/link", digest.hex())).exists()
    }

    /// The bytes of a blob, checked by hashing them here.
    pub(crate) fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let hex = digest.hex();
        let bytes = fs::read(self.storage().join(format!("blobs/sha256/{}/{hex}/data", &hex[..2]))).ok()?;
        assert_eq!(Digest::of(&bytes), *digest, "the registry holds a damaged blob");
        Some(bytes)
    }

    fn storage(&self) -> PathBuf {
        self.folder.path().join("storage/docker/registry/v2")
    }

    /// Sends the registry one plain request and gives what it says.
    pub(crate) fn raw(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> io::Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(START))?;
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

/// Whether it is this process, and not another registry, that has the address.
fn listens(process: u32, address: SocketAddr) -> bool {
    // As the kernel writes it: address and port in hexadecimal, the address with its bytes reversed.
    let place = format!("0100007F:{:04X}", address.port());
    let sockets = fs::read_to_string("/proc/net/tcp").unwrap();
    let listening = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let inode =
        listening.into_iter().find_map(|field| (field[1] == place && field[3] == "0A").then(|| field[9].to_owned()));
    let Some(inode) = inode else { return false };
    let Ok(files) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    let mut targets = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    targets.any(|target| target.as_os_str() == format!("socket:[{inode}]").as_str())
}

fn is_installed() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(PROGRAM).exists());
    if !found {
        skip(&format!("needs `{PROGRAM}` (on Debian: apt-get install docker-registry)"));
    }
    found
}

/// Starts a registry, or leaves the test when there is none.
macro_rules! registry {
    ($kind:expr) => {
        match $crate::server::Server::start($kind) {
            Some(server) => server,
            None => return,
        }
    };
    () => {
        registry!(&$crate::server::Kind::default())
    };
}
pub(crate) use registry;
