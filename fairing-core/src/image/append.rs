//! Layers on a base or on nothing: the image as a value. Performs no IO.
//!
//! The manifest and the configuration are written with sorted keys and without times, so the same layers on the same base
//! give the same digest.
//!
//! A base in Docker's format (schema 2) becomes an OCI image. Its layers stay the same bytes; only the names of their types
//! change, for which OCI has the equivalent, so that one manifest does not mix the two. Every registry and engine that
//! takes the one takes the other.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use super::cache::Packed;
use super::layer::{LayerName, USER};
use super::libraries::{BESIDE_BASE, PROGRAM_FOLDER};
use super::{Architecture, Blob, CONFIG, Descriptor, Digest, INDEX, Image, LAYER, MANIFEST, Source};

/// What programs look for other programs in; engines set the same where an image says nothing.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The time of everything in an image, so that its digest does not depend on when it was built.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// OCI's prefix of annotations and labels that everyone understands.
const ANNOTATION: &str = "org.opencontainers.image";

/// Failure to put layers on a base. Returned by [`assemble`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// The base is for another processor than the program.
    #[error("base image `{base}` is for {found} and the program for {wanted} (set `base` to an image for {wanted})")]
    Architecture {
        /// The base.
        base: String,
        /// What its configuration says.
        found: String,
        /// What the program is for.
        wanted: Architecture,
    },
    /// The base's configuration is not one of an image.
    #[error("base image `{base}` has a broken configuration: {what} (set `base` to another image)")]
    Broken {
        /// The base.
        base: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A layer of the base cannot be in an OCI image.
    #[error(
        "base image `{base}` has a layer of the type `{media_type}`, which cannot be used (set `base` to another image)"
    )]
    LayerType {
        /// The base.
        base: String,
        /// The layer's type.
        media_type: String,
    },
}

/// The image that layers are put on, as a registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// As the user wrote it, such as `debian:12-slim`.
    pub reference: String,
    /// Of its manifest for the one architecture.
    pub digest: Digest,
    /// Its layers, the lowest first.
    pub layers: Vec<Descriptor>,
    /// Its configuration, byte by byte.
    pub config: Vec<u8>,
}

/// What an image says about itself and how it is started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// What is started, and its first arguments; those of a run come behind.
    pub entrypoint: Vec<String>,
    /// Variables; they win over a base's.
    pub env: BTreeMap<String, String>,
    /// Annotation `title`.
    pub title: Option<String>,
    /// Annotation `revision`: the commit that the program was built from.
    pub revision: Option<String>,
    /// Further labels of the image; they win over a base's.
    pub labels: BTreeMap<String, String>,
}

impl Settings {
    /// Those for the program called `name`, which [`super::layer::Layer::program`] puts into the image.
    pub fn of_program(name: &str) -> Self {
        Self { entrypoint: vec![format!("{PROGRAM_FOLDER}/{name}")], title: Some(name.to_owned()), ..Self::default() }
    }
}

/// Puts `layers`, the lowest first, on `base` or on nothing. Empty layers are for the caller to leave out.
///
/// # Errors
///
/// [`AppendError`].
///
/// # Source
///
/// OCI image specification 1.1, `manifest.md` and `config.md`.
pub fn assemble(
    base: Option<&Base>,
    layers: &[Packed],
    architecture: Architecture,
    settings: &Settings,
) -> Result<Image, AppendError> {
    let labels = annotations(base, settings);
    let diff_ids: Vec<_> = layers.iter().map(|layer| (layer.name, layer.diff_id.clone())).collect();
    let (config, _) = configuration(base, &diff_ids, architecture, settings)?;
    let config = blob_of(CONFIG, config);

    let base_layers = base.map(|base| base.layers.iter().map(|layer| oci_layer(base, layer))).into_iter().flatten();
    let mut blobs: Vec<Blob> = base_layers.collect::<Result<_, _>>()?;
    blobs.extend(layers.iter().map(|layer| layer.blob.clone()));
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor,
        "layers": blobs.iter().map(|blob| &blob.descriptor).collect::<Vec<_>>(),
        "annotations": labels,
    });
    let manifest = to_canonical(&manifest);
    let descriptor = descriptor_of(MANIFEST, &manifest);
    Ok(Image { architecture, descriptor, manifest, config, layers: blobs })
}

/// The configuration of the image with these layers on `base` or on nothing, and the digests of all its layers.
pub(super) fn configuration(
    base: Option<&Base>,
    layers: &[(LayerName, Digest)],
    architecture: Architecture,
    settings: &Settings,
) -> Result<(Vec<u8>, Vec<String>), AppendError> {
    let config = match base {
        Some(base) => base_config(base, architecture)?,
        None => empty_config(architecture),
    };
    let of_base = config["rootfs"]["diff_ids"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let own = layers.iter().map(|(_, diff_id)| diff_id.to_string());
    let diff_ids = of_base.map(str::to_owned).chain(own).collect();
    let config = complete(config, layers, settings, &annotations(base, settings), base.is_some());
    Ok((config, diff_ids))
}

fn empty_config(architecture: Architecture) -> Value {
    json!({
        "architecture": architecture.to_string(), "os": "linux", "config": { "Env": [PATH] },
        "rootfs": { "type": "layers", "diff_ids": [] }, "history": [],
    })
}

/// `config` with these layers on top and this program.
fn complete(
    mut config: Value,
    layers: &[(LayerName, Digest)],
    settings: &Settings,
    labels: &BTreeMap<String, String>,
    is_on_base: bool,
) -> Vec<u8> {
    let has_libraries = layers.iter().any(|(name, _)| *name == LayerName::Libraries);
    set_process(&mut config["config"], settings, labels, is_on_base && has_libraries);
    config["created"] = CREATED.into();
    for (name, diff_id) in layers {
        list(&mut config["rootfs"]["diff_ids"]).push(diff_id.to_string().into());
        // A base without a history, or with one that does not fit its layers, has none that could be continued.
        if let Some(history) = config.get_mut("history") {
            list(history).push(json!({ "created": CREATED, "created_by": format!("fairing: {name}") }));
        }
    }
    to_canonical(&config)
}

/// The index of images of one program for several architectures, and its bytes.
pub fn index(images: &[Image]) -> (Descriptor, Vec<u8>) {
    let mut images: Vec<&Image> = images.iter().collect();
    images.sort_by_key(|image| image.architecture);
    let manifests: Vec<Value> = images
        .iter()
        .map(|image| {
            let mut manifest = json!(image.descriptor);
            manifest["platform"] = json!({ "architecture": image.architecture.to_string(), "os": "linux" });
            manifest
        })
        .collect();
    let bytes = to_canonical(&json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests }));
    (descriptor_of(INDEX, &bytes), bytes)
}

fn base_config(base: &Base, architecture: Architecture) -> Result<Value, AppendError> {
    let broken = |what| AppendError::Broken { base: base.reference.clone(), what };
    let mut config: Value = serde_json::from_slice(&base.config).map_err(|_| broken("it is no JSON"))?;
    let found = config.get("architecture").and_then(Value::as_str).ok_or_else(|| broken("no architecture"))?;
    let os = config.get("os").and_then(Value::as_str).unwrap_or("linux");
    if found != architecture.to_string() || os != "linux" {
        let found = if os == "linux" { found.to_owned() } else { format!("{os}/{found}") };
        return Err(AppendError::Architecture { base: base.reference.clone(), found, wanted: architecture });
    }
    let diff_ids = config.get("rootfs").and_then(|rootfs| rootfs.get("diff_ids")).and_then(Value::as_array);
    let diff_ids = diff_ids.ok_or_else(|| broken("no list of layers"))?.len();
    if diff_ids != base.layers.len() {
        return Err(broken("it names another number of layers than the manifest"));
    }
    let history = config.get("history").and_then(Value::as_array);
    let is_filled = |entry: &&Value| entry.get("empty_layer").and_then(Value::as_bool) != Some(true);
    let fits = history.is_some_and(|history| history.iter().filter(is_filled).count() == diff_ids);
    let fields = config.as_object_mut().ok_or_else(|| broken("it is no JSON object"))?;
    if !fits {
        fields.remove("history");
    }
    if !fields.get("config").is_some_and(Value::is_object) {
        fields.insert("config".to_owned(), json!({}));
    }
    // Docker's own notes on how the base was built; they describe another image than this.
    for stale in ["container", "container_config", "docker_version", "id", "parent", "moby.buildkit.buildinfo.v1"] {
        fields.remove(stale);
    }
    Ok(config)
}

/// How the program is started. Of a base's process only the environment and the labels stay.
fn set_process(process: &mut Value, settings: &Settings, labels: &BTreeMap<String, String>, has_libraries: bool) {
    let process = process.as_object_mut().expect("it is made an object before");
    let old_env = process.remove("Env");
    let old_env = old_env.iter().flat_map(|env| env.as_array().into_iter().flatten()).filter_map(Value::as_str);
    let mut env: Vec<String> = old_env.map(str::to_owned).collect();
    let mut set = |name: &str, value: String| {
        env.retain(|variable| variable.split('=').next() != Some(name));
        env.push(format!("{name}={value}"));
    };
    settings.env.iter().for_each(|(name, value)| set(name, value.clone()));
    if has_libraries {
        // Behind the base's own folders: what it brings itself fits it best.
        let before = env.iter().find_map(|variable| variable.strip_prefix("LD_LIBRARY_PATH="));
        let path = before.map_or(BESIDE_BASE.to_owned(), |before| format!("{before}:{BESIDE_BASE}"));
        env.retain(|variable| !variable.starts_with("LD_LIBRARY_PATH="));
        env.push(format!("LD_LIBRARY_PATH={path}"));
    }
    // Checks, volumes and ports of the base's own program would be applied to this one.
    for stale in [
        "Cmd",
        "Healthcheck",
        "Volumes",
        "ExposedPorts",
        "OnBuild",
        "StopSignal",
        "Shell",
        "ArgsEscaped",
        "Hostname",
        "Domainname",
        "Image",
        "Tty",
        "OpenStdin",
        "StdinOnce",
        "AttachStdin",
        "AttachStdout",
        "AttachStderr",
    ] {
        process.remove(stale);
    }
    process.insert("Env".to_owned(), json!(env));
    process.insert("Entrypoint".to_owned(), json!(settings.entrypoint));
    process.insert("User".to_owned(), format!("{USER}:{USER}").into());
    process.insert("WorkingDir".to_owned(), PROGRAM_FOLDER.into());
    let old_labels = process.remove("Labels");
    let mut all: Map<String, Value> = old_labels.as_ref().and_then(Value::as_object).cloned().unwrap_or_default();
    all.extend(labels.iter().chain(&settings.labels).map(|(name, value)| (name.clone(), value.clone().into())));
    process.insert("Labels".to_owned(), Value::Object(all));
}

fn annotations(base: Option<&Base>, settings: &Settings) -> BTreeMap<String, String> {
    let all = [
        ("title", settings.title.clone()),
        ("revision", settings.revision.clone()),
        ("base.name", base.map(|base| base.reference.clone())),
        ("base.digest", base.map(|base| base.digest.to_string())),
    ];
    all.into_iter().filter_map(|(name, value)| Some((format!("{ANNOTATION}.{name}"), value?))).collect()
}

/// A layer of a base under the name that OCI has for its type.
fn oci_layer(base: &Base, layer: &Descriptor) -> Result<Blob, AppendError> {
    let media_type = match layer.media_type.as_str() {
        LAYER | "application/vnd.docker.image.rootfs.diff.tar.gzip" => LAYER,
        "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
            "application/vnd.oci.image.layer.v1.tar"
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            "application/vnd.oci.image.layer.v1.tar+zstd"
        }
        other => {
            return Err(AppendError::LayerType { base: base.reference.clone(), media_type: other.to_owned() });
        }
    };
    Ok(Blob { descriptor: Descriptor { media_type: media_type.to_owned(), ..layer.clone() }, source: Source::Base })
}

fn blob_of(media_type: &str, bytes: Vec<u8>) -> Blob {
    Blob { descriptor: descriptor_of(media_type, &bytes), source: Source::Memory(bytes) }
}

fn descriptor_of(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor { media_type: media_type.to_owned(), digest: Digest::of(bytes), size: bytes.len() as u64 }
}

fn list(value: &mut Value) -> &mut Vec<Value> {
    value.as_array_mut().expect("it is checked or made a list before")
}

/// JSON without spaces and with sorted keys, whichever way `serde_json` keeps objects in this program.
fn to_canonical(value: &Value) -> Vec<u8> {
    serde_json::to_vec(&sorted(value)).expect("JSON values are JSON")
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields: BTreeMap<&String, &Value> = fields.iter().collect();
            Value::Object(fields.into_iter().map(|(name, value)| (name.clone(), sorted(value))).collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// What an image will consist of, in words for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePlan {
    /// For which processor.
    pub architecture: Architecture,
    /// The digest that the image has.
    pub digest: Digest,
    /// What it is put on, if anything.
    pub base: Option<(String, Digest)>,
    /// The layers that are put on it, the lowest first.
    pub layers: Vec<PlannedLayer>,
    /// What is started.
    pub entrypoint: Vec<String>,
}

/// A layer of an [`ImagePlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedLayer {
    /// What is in it.
    pub name: LayerName,
    /// Number of bytes unpacked.
    pub size_bytes: u64,
    /// What a registry knows it by, and its size there.
    pub compressed: Descriptor,
}

impl ImagePlan {
    /// The plan of an image that [`assemble`] made of the same values.
    pub fn new(image: &Image, base: Option<&Base>, layers: &[Packed], settings: &Settings) -> Self {
        let planned = layers.iter().map(|layer| PlannedLayer {
            name: layer.name,
            size_bytes: layer.size_bytes,
            compressed: layer.blob.descriptor.clone(),
        });
        Self {
            architecture: image.architecture,
            digest: image.descriptor.digest.clone(),
            base: base.map(|base| (base.reference.clone(), base.digest.clone())),
            layers: planned.collect(),
            entrypoint: settings.entrypoint.clone(),
        }
    }
}

impl fmt::Display for ImagePlan {
    /// Several lines, without a line break after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "image {} for linux/{}", self.digest, self.architecture)?;
        match &self.base {
            Some((reference, digest)) => writeln!(f, "  on {reference} ({digest})")?,
            None => writeln!(f, "  on an empty base")?,
        }
        for layer in &self.layers {
            let (size, sent) = (megabytes(layer.size_bytes), megabytes(layer.compressed.size));
            let name = layer.name.to_string();
            writeln!(f, "  layer {name:<9} {size:>9}, {sent:>9} compressed, {}", layer.compressed.digest)?;
        }
        write!(f, "  starts {} as user {USER}", self.entrypoint.join(" "))
    }
}

fn megabytes(bytes: u64) -> String {
    if bytes < 1_000_000 { format!("{:.1} kB", bytes as f64 / 1e3) } else { format!("{:.1} MB", bytes as f64 / 1e6) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use expect_test::expect;

    use super::*;

    fn layer(name: LayerName, text: &str) -> Packed {
        let descriptor = descriptor_of(LAYER, text.as_bytes());
        let blob = Blob { descriptor, source: Source::File(PathBuf::from(text)) };
        Packed::checked(name, Digest::of(text.as_bytes()), 1024, blob)
    }

    fn layers() -> [Packed; 2] {
        [layer(LayerName::Libraries, "libraries"), layer(LayerName::Program, "program")]
    }

    fn settings() -> Settings {
        let env = BTreeMap::from([("FAIRING_RUN".to_owned(), "x".to_owned())]);
        Settings { env, revision: Some("4f2c".to_owned()), ..Settings::of_program("fit") }
    }

    fn base(config: &Value, layers: &[&str]) -> Base {
        let layer = |media_type: &&str| descriptor_of(media_type, media_type.as_bytes());
        Base {
            reference: "debian:12-slim".to_owned(),
            digest: Digest::of(b"base"),
            layers: layers.iter().map(layer).collect(),
            config: config.to_string().into_bytes(),
        }
    }

    fn debian() -> Value {
        json!({
            "architecture": "amd64", "os": "linux", "created": "2026-01-02T03:04:05Z", "docker_version": "20.10",
            "config": {
                "Env": ["PATH=/usr/bin", "FAIRING_RUN=old", "LD_LIBRARY_PATH=/usr/local/nvidia/lib"],
                "Cmd": ["bash"], "Entrypoint": ["/entry"], "User": "root", "Volumes": { "/var": {} },
                "Labels": { "maintainer": "someone" }, "Healthcheck": { "Test": ["CMD", "true"] },
            },
            "rootfs": { "type": "layers", "diff_ids": ["sha256:11"] },
            "history": [{ "created_by": "ADD" }, { "created_by": "ENV", "empty_layer": true }],
        })
    }

    fn pretty(bytes: &[u8]) -> String {
        serde_json::to_string_pretty(&serde_json::from_slice::<Value>(bytes).unwrap()).unwrap()
    }

    fn config(image: &Image) -> &[u8] {
        let Source::Memory(bytes) = &image.config.source else { panic!("configurations are in memory") };
        assert_eq!(image.config.descriptor, descriptor_of(CONFIG, bytes));
        bytes
    }

    #[test]
    fn an_image_on_nothing() {
        let image = assemble(None, &layers(), Architecture::Arm64, &settings()).unwrap();
        assert_eq!(image.descriptor, descriptor_of(MANIFEST, &image.manifest));
        expect![[r#"
            {
              "annotations": {
                "org.opencontainers.image.revision": "4f2c",
                "org.opencontainers.image.title": "fit"
              },
              "config": {
                "digest": "sha256:9c4a5f4785874ce54e1feb40913abf7ae32b47a492d310ab28142123c114e4c1",
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "size": 669
              },
              "layers": [
                {
                  "digest": "sha256:01cfc309bfc026dd4c48b8c92e1fa89ff3ad31e831e1355002d32c7a6cf6d48c",
                  "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                  "size": 9
                },
                {
                  "digest": "sha256:1310ca2c8932dbd118668bd97442558a3e1f546b5e15c69699dfbd6024f548d8",
                  "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                  "size": 7
                }
              ],
              "mediaType": "application/vnd.oci.image.manifest.v1+json",
              "schemaVersion": 2
            }"#]]
        .assert_eq(&pretty(&image.manifest));
        expect![[r#"
            {
              "architecture": "arm64",
              "config": {
                "Entrypoint": [
                  "/app/fit"
                ],
                "Env": [
                  "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                  "FAIRING_RUN=x"
                ],
                "Labels": {
                  "org.opencontainers.image.revision": "4f2c",
                  "org.opencontainers.image.title": "fit"
                },
                "User": "65532:65532",
                "WorkingDir": "/app"
              },
              "created": "1970-01-01T00:00:00Z",
              "history": [
                {
                  "created": "1970-01-01T00:00:00Z",
                  "created_by": "fairing: libraries"
                },
                {
                  "created": "1970-01-01T00:00:00Z",
                  "created_by": "fairing: program"
                }
              ],
              "os": "linux",
              "rootfs": {
                "diff_ids": [
                  "sha256:01cfc309bfc026dd4c48b8c92e1fa89ff3ad31e831e1355002d32c7a6cf6d48c",
                  "sha256:1310ca2c8932dbd118668bd97442558a3e1f546b5e15c69699dfbd6024f548d8"
                ],
                "type": "layers"
              }
            }"#]]
        .assert_eq(&pretty(config(&image)));
        let names = layers().map(|layer| (layer.name, layer.diff_id));
        assert_eq!(configuration(None, &names, Architecture::Arm64, &settings()).unwrap().0, config(&image));
    }

    #[test]
    fn an_image_on_a_base_keeps_its_layers_and_its_environment() {
        let base = base(&debian(), &["application/vnd.docker.image.rootfs.diff.tar.gzip"]);
        let image = assemble(Some(&base), &layers(), Architecture::Amd64, &settings()).unwrap();
        assert_eq!(image.layers[0].source, Source::Base);
        assert_eq!(image.layers[0].descriptor.digest, base.layers[0].digest);
        assert!(image.layers.iter().all(|layer| layer.descriptor.media_type == LAYER), "one kind of names");
        expect![[r#"
            {
              "architecture": "amd64",
              "config": {
                "Entrypoint": [
                  "/app/fit"
                ],
                "Env": [
                  "PATH=/usr/bin",
                  "FAIRING_RUN=x",
                  "LD_LIBRARY_PATH=/usr/local/nvidia/lib:/app/lib"
                ],
                "Labels": {
                  "maintainer": "someone",
                  "org.opencontainers.image.base.digest": "sha256:cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2",
                  "org.opencontainers.image.base.name": "debian:12-slim",
                  "org.opencontainers.image.revision": "4f2c",
                  "org.opencontainers.image.title": "fit"
                },
                "User": "65532:65532",
                "WorkingDir": "/app"
              },
              "created": "1970-01-01T00:00:00Z",
              "history": [
                {
                  "created_by": "ADD"
                },
                {
                  "created_by": "ENV",
                  "empty_layer": true
                },
                {
                  "created": "1970-01-01T00:00:00Z",
                  "created_by": "fairing: libraries"
                },
                {
                  "created": "1970-01-01T00:00:00Z",
                  "created_by": "fairing: program"
                }
              ],
              "os": "linux",
              "rootfs": {
                "diff_ids": [
                  "sha256:11",
                  "sha256:01cfc309bfc026dd4c48b8c92e1fa89ff3ad31e831e1355002d32c7a6cf6d48c",
                  "sha256:1310ca2c8932dbd118668bd97442558a3e1f546b5e15c69699dfbd6024f548d8"
                ],
                "type": "layers"
              }
            }"#]].assert_eq(&pretty(config(&image)));
    }

    #[test]
    fn the_order_in_which_keys_are_written_does_not_count() {
        let of = |text: &str| {
            let base = Base { config: text.as_bytes().to_vec(), ..base(&json!({}), &[]) };
            assemble(Some(&base), &[], Architecture::Amd64, &Settings::default()).unwrap().descriptor
        };
        let one = of(r#"{"architecture":"amd64","os":"linux","rootfs":{"diff_ids":[],"type":"layers"}}"#);
        assert_eq!(one, of(r#"{ "rootfs":{"type":"layers","diff_ids":[]}, "os":"linux", "architecture":"amd64"}"#));
    }

    #[test]
    fn what_changes_an_image_changes_its_digest() {
        let digest = |layers: &[Packed], architecture, settings: &Settings| {
            assemble(None, layers, architecture, settings).unwrap().descriptor.digest
        };
        let first = digest(&layers(), Architecture::Amd64, &settings());
        assert_eq!(first, digest(&layers(), Architecture::Amd64, &settings()));
        let others = [
            digest(&layers()[..1], Architecture::Amd64, &settings()),
            digest(&layers(), Architecture::Arm64, &settings()),
            digest(&layers(), Architecture::Amd64, &Settings::of_program("fit")),
        ];
        assert!(others.iter().all(|other| *other != first));
    }

    #[test]
    fn a_base_that_does_not_fit_is_refused() {
        let wrong = |change: &dyn Fn(&mut Value), layers: &[&str]| {
            let mut config = debian();
            change(&mut config);
            let base = base(&config, layers);
            assemble(Some(&base), &[], Architecture::Amd64, &Settings::default()).unwrap_err().to_string()
        };
        expect![
            "base image `debian:12-slim` is for arm64 and the program for amd64 (set `base` to an image for amd64)"
        ]
        .assert_eq(&wrong(&|config| config["architecture"] = "arm64".into(), &[LAYER]));
        expect!["base image `debian:12-slim` is for windows/amd64 and the program for amd64 (set `base` to an image for amd64)"].assert_eq(&wrong(&|config| config["os"] = "windows".into(), &[LAYER]));
        expect!["base image `debian:12-slim` has a broken configuration: it names another number of layers than the manifest (set `base` to another image)"].assert_eq(&wrong(&|_| {}, &[LAYER, LAYER]));
        expect![
            "base image `debian:12-slim` has a broken configuration: no architecture (set `base` to another image)"
        ]
        .assert_eq(&wrong(&|config| *config = Value::Null, &[LAYER]));
        expect!["base image `debian:12-slim` has a layer of the type `application/vnd.docker.image.rootfs.foreign.diff.tar.gzip`, which cannot be used (set `base` to another image)"].assert_eq(&wrong(&|_| {}, &["application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"]));
    }

    #[test]
    fn an_index_names_each_image_with_its_processor() {
        let image = |architecture| assemble(None, &layers(), architecture, &settings()).unwrap();
        let (arm, amd) = (image(Architecture::Arm64), image(Architecture::Amd64));
        let (descriptor, bytes) = index(&[arm.clone(), amd.clone()]);
        assert_eq!(index(&[amd.clone(), arm.clone()]), (descriptor.clone(), bytes.clone()));
        assert_eq!(descriptor, descriptor_of(INDEX, &bytes));
        let index: Value = serde_json::from_slice(&bytes).unwrap();
        for (place, image) in [amd, arm].iter().enumerate() {
            let entry = &index["manifests"][place];
            assert_eq!(entry["digest"], image.descriptor.digest.to_string());
            assert_eq!(entry["platform"]["architecture"], image.architecture.to_string());
        }
    }

    #[test]
    fn a_plan_is_read_by_a_person() {
        let base = base(&debian(), &[LAYER]);
        let image = assemble(Some(&base), &layers(), Architecture::Amd64, &settings()).unwrap();
        expect![[r#"
            image sha256:5c5a4bc1d8f90727829e1054ae0c3a4e383487eb9a08ddb82319391aa6a84fe6 for linux/amd64
              on debian:12-slim (sha256:cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2)
              layer libraries    1.0 kB,    0.0 kB compressed, sha256:01cfc309bfc026dd4c48b8c92e1fa89ff3ad31e831e1355002d32c7a6cf6d48c
              layer program      1.0 kB,    0.0 kB compressed, sha256:1310ca2c8932dbd118668bd97442558a3e1f546b5e15c69699dfbd6024f548d8
              starts /app/fit as user 65532"#]].assert_eq(&ImagePlan::new(&image, Some(&base), &layers(), &settings()).to_string());
    }
}
