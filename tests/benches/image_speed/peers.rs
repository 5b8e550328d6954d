//! What others need for the same: crane with and without zstd, and docker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Place;
use crate::engine::Engine;
use crate::processes;
use crate::table::{Measured, Table, fact, measure};

/// The peers that are not on this machine, with how to get them.
pub(crate) fn absent() -> Vec<String> {
    let crane = (!is_there("crane")).then_some(
        "crane (go install github.com/google/go-containerregistry/cmd/crane@v0.22.1, and put it on the path)",
    );
    let zstd = (!is_there("zstd")).then_some("crane with zstd (on Debian: apt-get install zstd)");
    crane.into_iter().chain(zstd).map(str::to_owned).collect()
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Those that are here.
pub(crate) struct Peers<'a> {
    place: &'a Place,
    has_crane: bool,
    has_zstd: bool,
}

impl<'a> Peers<'a> {
    pub(crate) fn new(place: &'a Place) -> Self {
        let has_crane = is_there("crane");
        Self { place, has_crane, has_zstd: has_crane && is_there("zstd") }
    }

    /// Builds and pushes with everyone, into repositories of their own that perhaps have `suffix` in their names.
    pub(crate) fn record(&self, table: &mut Table, case: &'static str, suffix: Option<&str>, slow: bool) {
        let repository = |peer: &str| {
            let name = suffix.map_or_else(|| peer.to_owned(), |suffix| format!("{peer}-{suffix}"));
            format!("{}:v1", self.place.registry.repository(&name))
        };
        let [crane, crane_memory, zstd, docker] = names(case);
        if self.has_crane {
            match measure(|| self.crane(&repository("crane"), false)) {
                Ok(Measured { value: peak, ms, others }) => {
                    table.record(fact(crane), ms, others);
                    table.record(fact(crane_memory), peak, others);
                }
                Err(error) => table.fail(fact(crane), &error),
            }
        }
        if self.has_zstd {
            table.time(fact(zstd), || self.crane(&repository("crane-zstd"), true).map(drop));
        }
        if let Some(engine) = self.place.engine.as_ref().filter(|_| slow) {
            table.time(fact(docker), || self.docker(engine, &repository("docker")));
        }
    }

    /// Returns crane's peak of memory in MiB.
    fn crane(&self, to: &str, has_zstd: bool) -> anyhow::Result<f64> {
        let archive = self.archive(has_zstd)?;
        processes::run_with_peak(Command::new("crane").args(crane(&self.place.registry.base(), &archive, to)))
    }

    /// The layer for crane, which compresses it itself if it is not yet.
    pub(crate) fn archive(&self, has_zstd: bool) -> anyhow::Result<PathBuf> {
        let folder = self.place.folder.path();
        let archive = folder.join(if has_zstd { "layer.tar.zst" } else { "layer.tar" });
        let mut tar = Command::new("tar");
        if has_zstd {
            tar.args(["--use-compress-program", "zstd -1 -q"]);
        }
        tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-C"]).arg(folder);
        processes::run(tar.arg("-cf").arg(&archive).arg("app"))?;
        Ok(archive)
    }

    pub(crate) fn docker(&self, engine: &Engine, to: &str) -> anyhow::Result<()> {
        let folder = self.place.folder.path().join("context");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("Dockerfile"), format!("FROM {}\nCOPY app /app\n", self.place.registry.base()))?;
        // A name for the same file, as a user has the program in place.
        let app = folder.join("app");
        if !app.exists() {
            fs::hard_link(self.place.program.path(), &app)?;
        }
        engine.docker(&["build", "--quiet", "--tag", to, &folder.display().to_string()])?;
        engine.docker(&["push", "--quiet", to])?;
        Ok(())
    }

    pub(crate) fn has_crane(&self) -> bool {
        self.has_crane
    }

    pub(crate) fn has_zstd(&self) -> bool {
        self.has_zstd
    }
}

/// crane's arguments for a layer on a base.
pub(crate) fn crane(base: &str, archive: &Path, to: &str) -> Vec<String> {
    let archive = archive.display().to_string();
    ["append", "-b", base, "-f", &archive, "-t", to].map(str::to_owned).to_vec()
}

fn names(case: &'static str) -> [&'static str; 4] {
    match case {
        "changed" => [
            "changed: tar and crane append, ms",
            "changed: crane, peak memory, MiB",
            "changed: tar | zstd -1 and crane append, ms",
            "changed: docker build and docker push, ms",
        ],
        "same" => [
            "same: tar and crane append, ms",
            "same: crane, peak memory, MiB",
            "same: tar | zstd -1 and crane append, ms",
            "same: docker build and docker push, ms",
        ],
        _ => [
            "cold: tar and crane append, ms",
            "cold: crane, peak memory, MiB",
            "cold: tar | zstd -1 and crane append, ms",
            "cold: docker build and docker push, ms",
        ],
    }
}
