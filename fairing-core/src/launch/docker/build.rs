//! The builder `docker`: the engine builds the image, from a generated Dockerfile or from the user's own.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::models::{BuildInfo, ImageSummary};
use bollard::query_parameters as query;

use super::context::{Context, place};
use super::engine::{Engine, EngineError};
use super::guardian::BuildGuardian;
use super::ignore::Patterns;
use super::load::{Loaded, image_labels, repository, tag};
use super::pull::{credentials, server, without_secrets};
use super::stream::{ExchangeError, exchange};
use super::tidy::tags;
use crate::image::StreamError;
use crate::image::archive::Archive;
use crate::launch::lines::Lines;
use crate::registry::Login;

/// Label of an image that the engine built: the id that the same content has when it is loaded.
const CONTENT_LABEL: &str = "fairing.dev/content";

/// Tag of the last step of a build that failed or is of no use, so that the next one goes on from there and nothing nameless is left.
pub(super) const UNFINISHED: &str = "unfinished";

/// How long a build may say nothing: longer than any step of it is quiet, such as one that compiles a large program.
const SILENCE: Duration = Duration::from_secs(30 * 60);

/// Lines of a failed build's output that its error repeats.
const LINES_KEPT: usize = 20;

/// Failure to build an image. Returned by [`Engine::build`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// There is no such Dockerfile.
    #[error("cannot read the Dockerfile `{}` (set `dockerfile` to one)", path.display())]
    Dockerfile {
        /// Where it should be.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A line of `.dockerignore` has no meaning here.
    #[error("`{}` has the line `{line}` (patterns consist of names, `*`, `**` and `?`, with `!` in front or not)", path.display())]
    Ignore {
        /// The file.
        path: PathBuf,
        /// The line.
        line: String,
    },
    /// Something that a generated Dockerfile cannot say.
    #[error("{what} of the image has a line break in it (remove it, or use the builder `append`)")]
    LineBreak {
        /// The name of a variable, or another part of the configuration.
        what: String,
    },
    /// What is sent for the build cannot be read.
    #[error("failed to read what the image is built from")]
    Read(#[source] StreamError),
    /// A step of the Dockerfile failed.
    #[error("the engine failed to build the image from {dockerfile}: {reason}{}", quoted(last_lines))]
    Failed {
        /// Which Dockerfile.
        dockerfile: String,
        /// The engine's own words.
        reason: String,
        /// The last lines of the build's output.
        last_lines: Vec<String>,
    },
    /// The image does not say what it runs.
    #[error("the image of {dockerfile} has no entry point (add `ENTRYPOINT [\"/path/of/the/program\"]`)")]
    NoEntrypoint {
        /// Which Dockerfile.
        dockerfile: String,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

fn quoted(lines: &[String]) -> String {
    lines.iter().fold(String::new(), |text, line| text + "\n  | " + line)
}

/// What an image is built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dockerfile<'a> {
    /// One that puts each layer on a base, or on nothing, and says what the archive's configuration says.
    Generated {
        /// What [`Engine::pull`] returned for the base.
        base: Option<&'a str>,
    },
    /// The user's own.
    Own(&'a Path),
}

/// Logins by registry, for base images that are not public.
pub type Logins = std::collections::BTreeMap<String, Login>;

impl Engine {
    /// Builds the image of `program` at the engine, with its classic builder.
    ///
    /// With a Dockerfile of the user's own, the build sees the files in its folder but for what `.dockerignore` leaves out
    /// and, unless that says otherwise (`!target`), `target` and `.git`. Of the language of `.dockerignore` there are
    /// comments, `!`, `*`, `**`, `?` and folders; escapes and classes of characters such as `[a-z]` are refused. Beside
    /// the files are the archive's layers: `fairing/libraries.tar`, `fairing/data.tar`, `fairing/files.tar`,
    /// `fairing/program.tar`, as far as there are such layers. The program is in `/app`, its libraries are where its
    /// loader looks for them. So this is a whole Dockerfile for a program called `fashion`:
    ///
    /// ```text
    /// FROM debian:12-slim
    /// RUN apt-get update && apt-get install --yes libgomp1
    /// ADD fairing/program.tar /
    /// ENTRYPOINT ["/app/fashion"]
    /// ```
    ///
    /// Without libraries of its own the program needs a base with a C library that is as new as this machine's.
    ///
    /// `output` hears every line of the build's output. A generated Dockerfile whose image the engine has is not built
    /// again. `logins` are for the images that the user's Dockerfile names.
    ///
    /// # Errors
    ///
    /// [`BuildError`]; also if the build says nothing for half an hour.
    pub fn build(
        &self,
        program: &str,
        archive: &Archive<'_>,
        dockerfile: Dockerfile<'_>,
        logins: &Logins,
        output: &mut (dyn FnMut(&str) + Send),
    ) -> Result<Loaded, BuildError> {
        let mut labels = image_labels(program);
        let (context, known_tag) = match dockerfile {
            Dockerfile::Generated { base } => {
                let tag = tag(program, &archive.image_id().hex());
                labels.insert(CONTENT_LABEL.to_owned(), archive.image_id().to_string());
                if let Some(id) = self.built(&tag, archive)? {
                    return Ok(Loaded { id, tag, sent_bytes: 0 });
                }
                let text = generated(archive, base)?;
                let dockerfile = ("Dockerfile".to_owned(), text.into_bytes());
                (Context { dockerfile, folder: None, layers: archive.layers() }, Some(tag))
            }
            Dockerfile::Own(path) => {
                let (dockerfile, folder) = own(path)?;
                (Context { dockerfile, folder: Some(folder), layers: archive.layers() }, None)
            }
        };
        let described = match dockerfile {
            Dockerfile::Generated { .. } => "the generated Dockerfile".to_owned(),
            Dockerfile::Own(path) => format!("`{}`", path.display()),
        };
        let before = known_tag.as_deref().and_then(|tag| self.called(tag));
        let guardian = BuildGuardian::start(program, self);
        let (lines, last) = (Lines::default(), VecDeque::new());
        let mut output = Output { hear: output, lines, last, guardian, step: None, id: None };
        let sent_bytes =
            match self.run_build(&context, known_tag.as_deref(), labels.into_iter().collect(), logins, &mut output) {
                Ok(sent_bytes) => sent_bytes,
                Err(error) => {
                    self.keep_unfinished(program, output.step.as_deref());
                    return Err(match error {
                        ExchangeError::Body(source) => BuildError::Read(source),
                        ExchangeError::Engine(EngineError::Refused { reason, status, .. })
                            if status.is_some() || !output.last.is_empty() =>
                        {
                            let reason = without_secrets(reason, logins.values());
                            BuildError::Failed { dockerfile: described, reason, last_lines: output.last.into() }
                        }
                        ExchangeError::Engine(error) => error.into(),
                    });
                }
            };
        let id = output.id.ok_or_else(|| BuildError::Failed {
            dockerfile: described.clone(),
            reason: "it did not say what it built".to_owned(),
            last_lines: output.last.clone().into(),
        })?;
        let image = self.call("look at the built image", self.docker().inspect_image(&id))?;
        // The engine may have said a shorter one.
        let id = image.id.unwrap_or(id);
        if image.config.and_then(|config| config.entrypoint).is_none_or(|entrypoint| entrypoint.is_empty()) {
            self.keep_unfinished(program, Some(&id));
            return Err(BuildError::NoEntrypoint { dockerfile: described });
        }
        let tag = match known_tag {
            Some(tag) => tag,
            None => {
                let tag = tag(program, id.trim_start_matches("sha256:"));
                self.name(&id, &tag)?;
                tag
            }
        };
        // Last: an earlier build that was killed may have left this very image under that name only.
        self.keep_unfinished(program, None);
        self.forget(before, &id);
        Ok(Loaded { id, tag, sent_bytes })
    }

    /// The id of the image called `tag`.
    pub(super) fn called(&self, tag: &str) -> Option<String> {
        self.call("look for an image", self.docker().inspect_image(tag)).ok()?.id
    }

    /// Removes the image `before`, of which `id` has taken the name, unless something needs it.
    pub(super) fn forget(&self, before: Option<String>, id: &str) {
        if let Some(before) = before.filter(|before| before != id) {
            // The engine refuses what is in use; then it goes with the end of a run.
            let removed = self.docker().remove_image(&before, None::<query::RemoveImageOptions>, None);
            let _ = self.call("remove an image without a name", removed);
        }
    }

    /// The last of the nameless images that were made on `step`, or else that one.
    pub(super) fn last_step_after(&self, step: &str) -> String {
        let options = query::ListImagesOptionsBuilder::default().all(true).build();
        let listed = self.call("list the images", self.docker().list_images(Some(options)));
        let mut nameless = listed.unwrap_or_default();
        nameless.retain(|image| tags(image).next().is_none());
        let mut last = step.to_owned();
        let is_on = |image: &ImageSummary, step: &str| {
            let digits = |id: &str| id.trim_start_matches("sha256:").to_owned();
            !image.parent_id.is_empty() && digits(&image.parent_id).starts_with(&digits(step))
        };
        // Taken out, so that this ends whatever the engine says.
        while let Some(index) = nameless.iter().position(|image| is_on(image, &last)) {
            last = nameless.swap_remove(index).id;
        }
        last
    }

    /// The id of the image called `tag`, if it was built of the archive.
    fn built(&self, tag: &str, archive: &Archive<'_>) -> Result<Option<String>, EngineError> {
        let inspected = self.call(&format!("look for the image `{tag}`"), self.docker().inspect_image(tag));
        match inspected {
            Ok(image) => {
                let labels = image.config.and_then(|config| config.labels).unwrap_or_default();
                let is_of = labels.get(CONTENT_LABEL).is_some_and(|content| *content == archive.image_id().to_string());
                Ok(image.id.filter(|_| is_of))
            }
            Err(error) if error.is_absence() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn run_build(
        &self,
        context: &Context<'_>,
        tag: Option<&str>,
        labels: HashMap<String, String>,
        logins: &Logins,
        output: &mut Output<'_>,
    ) -> Result<u64, ExchangeError<StreamError>> {
        let options = query::BuildImageOptions {
            dockerfile: context.dockerfile.0.clone(),
            t: tag.map(str::to_owned),
            labels: Some(labels),
            rm: true,
            forcerm: true,
            ..query::BuildImageOptions::default()
        };
        let credentials =
            logins.iter().map(|(registry, login)| (server(registry).to_owned(), credentials(registry, login)));
        let credentials = (!logins.is_empty()).then(|| credentials.collect());
        let sent_bytes = std::sync::atomic::AtomicU64::new(0);
        let sent = |bytes| sent_bytes.store(bytes, std::sync::atomic::Ordering::Relaxed);
        let built = exchange(
            self,
            "build the image",
            SILENCE,
            |to| context.write_to(to),
            &sent,
            |body| self.docker().build_image(options, credentials, Some(bollard::body_try_stream(body))),
            &mut |info: BuildInfo| output.take(info),
        );
        output.finish();
        built.map(|()| sent_bytes.into_inner())
    }

    /// Gives `step`, the last one of a build that failed or is of no use, a name, and takes it from the one that had it.
    ///
    /// Nothing depends on it: at worst an image without a name is left.
    pub(super) fn keep_unfinished(&self, program: &str, step: Option<&str>) {
        let (docker, name) = (self.docker(), format!("{}:{UNFINISHED}", repository(program)));
        let before = self.called(&name);
        let step = step.and_then(|step| {
            let image = self.call("look at a step", docker.inspect_image(step)).ok()?;
            // With another name it is a base, or it is the user's.
            let mut names = [image.repo_tags, image.repo_digests].into_iter().flatten().flatten();
            let is_free = names.all(|known| known.ends_with(&name));
            image.id.filter(|_| is_free)
        });
        match (step, before) {
            (Some(step), before) => {
                let _ = self.name(&step, &name);
                self.forget(before, &step);
            }
            (None, Some(_)) => {
                let removed = docker.remove_image(&name, None::<query::RemoveImageOptions>, None);
                let _ = self.call("remove an unfinished image", removed);
            }
            (None, None) => {}
        }
    }

    /// Calls the image `id` also `tag`.
    pub(super) fn name(&self, id: &str, tag: &str) -> Result<(), EngineError> {
        let (repository, version) = tag.rsplit_once(':').expect("fairing's names of images have tags");
        let options = query::TagImageOptionsBuilder::default().repo(repository).tag(version).build();
        self.call(&format!("name an image `{tag}`"), self.docker().tag_image(id, Some(options)))
    }
}

/// Whether the user's own Dockerfile, and what lies beside it to say what is sent, can be read.
///
/// # Errors
///
/// [`BuildError`].
pub fn check_dockerfile(path: &Path) -> Result<(), BuildError> {
    own(path).map(drop)
}

/// The user's own Dockerfile with its name, its folder, and what of the folder is sent.
type Own = ((String, Vec<u8>), (PathBuf, Patterns));

fn own(path: &Path) -> Result<Own, BuildError> {
    let unreadable = |source| BuildError::Dockerfile { path: path.to_owned(), source };
    let text = fs::read(path).map_err(unreadable)?;
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| unreadable(io::Error::other("its name is not UTF-8")))?.to_owned();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
    let list = folder.join(".dockerignore");
    let patterns = match fs::read_to_string(&list) {
        Ok(text) => Patterns::read(&text).map_err(|line| BuildError::Ignore { path: list, line })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Patterns::read("").expect("the defaults are good"),
        Err(source) => return Err(BuildError::Read(StreamError::Read { path: list, source })),
    };
    Ok(((name, text), (folder, patterns)))
}

/// A Dockerfile for the image that the archive is.
fn generated(archive: &Archive<'_>, base: Option<&str>) -> Result<String, BuildError> {
    let config: serde_json::Value = serde_json::from_slice(archive.config()).unwrap_or_default();
    let config = &config["config"];
    let text = |name: &str| config[name].as_str().unwrap_or_default();
    let mut dockerfile = format!("FROM {}\n", base.unwrap_or("scratch"));
    for layer in archive.layers() {
        writeln!(dockerfile, "ADD {} /", place(layer)).expect("a string can be written");
    }
    let variables =
        config["Env"].as_array().into_iter().flatten().filter_map(|variable| variable.as_str()?.split_once('='));
    for (name, value) in variables {
        writeln!(dockerfile, "ENV {name}={}", quote(value, || format!("variable `{name}`"))?)
            .expect("a string can be written");
    }
    writeln!(dockerfile, "WORKDIR {}", text("WorkingDir")).expect("a string can be written");
    writeln!(dockerfile, "USER {}", text("User")).expect("a string can be written");
    // JSON has no line breaks in it and needs no further quotes.
    writeln!(dockerfile, "ENTRYPOINT {}", config["Entrypoint"]).expect("a string can be written");
    Ok(dockerfile)
}

/// A value as a Dockerfile has it, so that nothing in it is taken for a variable.
fn quote(value: &str, what: impl FnOnce() -> String) -> Result<String, BuildError> {
    if value.contains(['\n', '\r']) {
        return Err(BuildError::LineBreak { what: what() });
    }
    let escaped = value.chars().fold(String::new(), |mut text, character| {
        if matches!(character, '"' | '\\' | '$') {
            text.push('\\');
        }
        text.push(character);
        text
    });
    Ok(format!("\"{escaped}\""))
}

/// What a build says.
struct Output<'a> {
    hear: &'a mut (dyn FnMut(&str) + Send),
    lines: Lines,
    last: VecDeque<String>,
    /// Goes on with the last step if this process dies.
    guardian: BuildGuardian,
    /// The image of the last step.
    step: Option<String>,
    id: Option<String>,
}

impl Output<'_> {
    fn take(&mut self, info: BuildInfo) {
        if let Some(id) = info.aux.and_then(|aux| aux.id) {
            self.id = Some(id);
        }
        if let Some(text) = info.stream {
            let mut lines = Vec::new();
            self.lines.push(text.as_bytes(), |line| lines.push(line));
            lines.into_iter().for_each(|line| self.say(line));
        }
        // Of a base that is pulled, the beginnings and ends; not every piece of it.
        let is_progress = info.progress_detail.is_some_and(|detail| detail.current.is_some());
        if let Some(status) = info.status.filter(|_| !is_progress) {
            self.say(info.id.map_or(status.clone(), |id| format!("{id}: {status}")));
        }
    }

    fn finish(&mut self) {
        if let Some(line) = self.lines.finish() {
            self.say(line);
        }
    }

    fn say(&mut self, line: String) {
        if let Some(id) = line.strip_prefix(" ---> ").filter(|id| is_short_id(id)) {
            self.guardian.hear(id);
            self.step = Some(id.to_owned());
        }
        if line.trim().is_empty() {
            return;
        }
        (self.hear)(&line);
        if self.last.len() == LINES_KEPT {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }
}

fn is_short_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_in_a_dockerfile_is_only_itself() {
        let quoted = |value: &str| quote(value, || "variable `A`".to_owned()).map_err(|error| error.to_string());
        assert_eq!(quoted("plain words").unwrap(), "\"plain words\"");
        assert_eq!(quoted("$HOME \"a\\b\"").unwrap(), "\"\\$HOME \\\"a\\\\b\\\"\"");
        let expected = "variable `A` of the image has a line break in it (remove it, or use the builder `append`)";
        assert_eq!(quoted("a\nb").unwrap_err(), expected);
    }
}
