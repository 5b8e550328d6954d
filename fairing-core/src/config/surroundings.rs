//! The one file of this module that looks at the file system.

use std::path::{Path, PathBuf};

use super::{ConfigError, Env};

/// The name of the file beside the user's `Cargo.toml`.
pub const FILE_NAME: &str = "Fairing.toml";

/// What a configuration needs to know of the file system: folders, and the text of `Fairing.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    /// The current folder, absolute; folders in variables and in code are meant from here.
    pub current: PathBuf,
    /// The folder of the user's `Cargo.toml`, absolute; folders in the attribute and in `Fairing.toml` are meant from here.
    pub manifest: PathBuf,
    /// Cargo's build folder, absolute; run folders are below it by default.
    pub target: PathBuf,
    /// The user's folder of caches, absolute; compressed layers are below it by default.
    pub cache: PathBuf,
    /// The text of `Fairing.toml` in [`Surroundings::manifest`], if there is one.
    pub file: Option<String>,
}

impl Surroundings {
    /// Looks around: the one function of this module that touches the file system.
    ///
    /// Cargo sets `CARGO_MANIFEST_DIR` for what it runs; a program that is started otherwise is taken to be at home in
    /// the current folder. The build folder is `CARGO_TARGET_DIR`, or `target` beside the nearest `Cargo.lock` at or above
    /// the manifest's folder or the current one, or else `target` in the current folder. The folder of caches is
    /// `XDG_CACHE_HOME`, or `.cache` in `HOME`, as far as they are absolute, or else the build folder.
    ///
    /// # Errors
    ///
    /// - [`ConfigError::CurrentFolder`] if there is no current folder.
    /// - [`ConfigError::ReadFile`] if `Fairing.toml` exists but cannot be read, or is not UTF-8. Its absence is no error.
    pub fn read(env: &impl Env) -> Result<Self, ConfigError> {
        let current = std::env::current_dir().map_err(|source| ConfigError::CurrentFolder { source })?;
        let folder = |name: &str| env.get(name).filter(|path| !path.is_empty()).map(|path| current.join(path));
        let manifest = folder("CARGO_MANIFEST_DIR").unwrap_or_else(|| current.clone());
        let locked = |path: &Path| path.ancestors().find(|path| path.join("Cargo.lock").is_file()).map(Path::to_owned);
        let target = folder("CARGO_TARGET_DIR").unwrap_or_else(|| {
            let workspace = locked(&manifest).or_else(|| locked(&current));
            workspace.unwrap_or_else(|| current.clone()).join("target")
        });
        let absolute = |name: &str| env.get(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        let cache = cache.unwrap_or_else(|| target.clone());
        let path = manifest.join(FILE_NAME);
        let file = match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(ConfigError::ReadFile { path, source }),
        };
        Ok(Self { current, manifest, target, cache, file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn env(pairs: &[(&str, &Path)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, path)| ((*name).to_owned(), path.to_str().unwrap().to_owned())).collect()
    }

    #[test]
    fn the_manifest_folder_gives_the_file_and_its_workspace_the_target() {
        let workspace = tempfile::tempdir().unwrap();
        let member = workspace.path().join("crates/member");
        std::fs::create_dir_all(&member).unwrap();
        std::fs::write(workspace.path().join("Cargo.lock"), "").unwrap();
        std::fs::write(member.join(FILE_NAME), "workers = 2").unwrap();

        let found = Surroundings::read(&env(&[("CARGO_MANIFEST_DIR", &member)])).unwrap();
        assert_eq!(found.file.as_deref(), Some("workers = 2"));
        assert_eq!(found.manifest, member);
        assert_eq!(found.target, workspace.path().join("target"));

        let elsewhere = workspace.path().join("elsewhere");
        let found =
            Surroundings::read(&env(&[("CARGO_MANIFEST_DIR", workspace.path()), ("CARGO_TARGET_DIR", &elsewhere)]));
        assert_eq!(found.as_ref().unwrap().target, elsewhere);
        assert_eq!(found.unwrap().file, None);
    }

    #[test]
    fn caches_go_where_the_user_keeps_them() {
        let cache = |pairs: &[(&str, &str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(name, path)| (*name, Path::new(*path))).collect();
            let pairs = [&[("CARGO_TARGET_DIR", Path::new("/build"))], &*pairs].concat();
            Surroundings::read(&env(&pairs)).unwrap().cache
        };
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/caches"), ("HOME", "/home/me")]), Path::new("/caches"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "caches"), ("HOME", "/home/me")]), Path::new("/home/me/.cache"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", ""), ("HOME", "/home/me")]), Path::new("/home/me/.cache"));
        assert_eq!(cache(&[("HOME", "")]), Path::new("/build"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE_NAME), [0xff, 0xfe]).unwrap();
        let error = Surroundings::read(&env(&[("CARGO_MANIFEST_DIR", folder.path())])).unwrap_err();
        assert!(error.to_string().ends_with("Fairing.toml`"), "{error}");
    }
}
