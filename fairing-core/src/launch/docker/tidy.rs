//! Images that nobody needs any more.
//!
//! An image is removed if no container uses it and nothing is lost with it: it has fairing's labels, or only names that
//! fairing gave it. Nothing is forced, so the engine has the last word. One that the user has named stays, and so does one
//! that may be about to be used.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use bollard::Docker;
use bollard::models::{ImageInspect, ImageSummary};
use bollard::query_parameters as query;

use super::container::MANAGER_LABEL;
use super::engine::{Engine, EngineError, in_time};
use super::load::{OWN_NAMES, PROGRAM_LABEL};

/// Time since an image was last given a name within which it counts as used: another launcher may be between making it and
/// creating its containers, for as long as it takes to push it to a registry over a slow line.
pub(super) const FRESH: Duration = Duration::from_secs(10 * 60);

impl Engine {
    /// Removes the images of `program` that no container uses, all but the one with the id `kept`, and returns their names.
    ///
    /// One that was named less than ten minutes ago stays, where the engine knows when that was (Docker does): a launcher
    /// names its image when it begins, so that it does not lose it to a run that ends. One that loses it all the same gets
    /// [`EngineError::NoImage`].
    ///
    /// # Errors
    ///
    /// [`EngineError`]
    pub fn tidy(&self, program: &str, kept: &str) -> Result<Vec<String>, EngineError> {
        self.tidy_older(program, kept, FRESH)
    }

    /// As [`Engine::tidy`], with another age than ten minutes.
    #[doc(hidden)]
    pub fn tidy_older(&self, program: &str, kept: &str, age: Duration) -> Result<Vec<String>, EngineError> {
        let is_old = |image: &ImageSummary| {
            is_labelled(image) && image.labels.get(PROGRAM_LABEL).is_some_and(|of| of == program) && image.id != kept
        };
        self.reactor().wait(async { remove_unused(self.docker(), is_old, age).await })
    }
}

/// Whether fairing made the image.
pub(super) fn is_labelled(image: &ImageSummary) -> bool {
    image.labels.get(MANAGER_LABEL.0).is_some_and(|manager| manager == MANAGER_LABEL.1)
}

/// The names that people know the image by.
pub(super) fn tags(image: &ImageSummary) -> impl Iterator<Item = &str> {
    image.repo_tags.iter().map(String::as_str).filter(|tag| !tag.contains("<none>"))
}

/// Whether fairing gave the name.
pub(super) fn is_own_name(tag: &str) -> bool {
    // Podman writes the registry that it means where none is named.
    let written = ["localhost/", "docker.io/"].into_iter().find_map(|registry| tag.strip_prefix(registry));
    written.unwrap_or(tag).starts_with(OWN_NAMES)
}

/// Gives an image of fairing's a name that it has, which makes it [`FRESH`].
pub(super) async fn renew(docker: &Docker, image: &ImageInspect) {
    let tags = image.repo_tags.iter().flatten();
    let Some((name, tag)) = tags.filter(|tag| is_own_name(tag)).find_map(|tag| tag.rsplit_once(':')) else { return };
    let options = query::TagImageOptionsBuilder::default().repo(name).tag(tag).build();
    let id = image.id.as_deref().unwrap_or_default();
    // At worst the image is removed, which has an error of its own.
    let _ = in_time("name an image", docker.tag_image(id, Some(options))).await;
}

/// Whether the image was named within `age`, and still is. A time to come is that of a clock before ours.
///
/// One whose name another image has taken, by a build of what had been loaded, is what engines call dangling, and nobody's.
fn is_fresh(image: &ImageInspect, now: SystemTime, age: Duration) -> bool {
    if image.repo_tags.iter().flatten().next().is_none() {
        return false;
    }
    let named = image.metadata.as_ref().and_then(|metadata| metadata.last_tag_time.as_deref()).and_then(time);
    named.is_some_and(|named| now.duration_since(named).unwrap_or_default() < age)
}

/// A time as RFC 3339 writes it, in any zone; the engine has that of its machine. `None` before 1970, which means never.
fn time(text: &str) -> Option<SystemTime> {
    let (local, zone) = text.split_at_checked(text.len().checked_sub("+00:00".len())?)?;
    let Some((hours, minutes)) = zone.get(1..)?.split_once(':').filter(|_| zone.starts_with(['+', '-'])) else {
        return humantime::parse_rfc3339(text).ok();
    };
    let offset = Duration::from_secs(hours.parse::<u64>().ok()? * 3600 + minutes.parse::<u64>().ok()? * 60);
    let local = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
    if zone.starts_with('+') { local.checked_sub(offset) } else { local.checked_add(offset) }
}

/// Removes the images that are `chosen`, unless a container uses them, the user has named them, or they were named within
/// `age`.
pub(super) async fn remove_unused(
    docker: &Docker,
    chosen: impl Fn(&ImageSummary) -> bool,
    age: Duration,
) -> Result<Vec<String>, EngineError> {
    let options = query::ListImagesOptionsBuilder::default().digests(true).build();
    let mut images = in_time("list the images", docker.list_images(Some(options))).await?;
    images.retain(|image| chosen(image) && !is_users(image));
    if images.is_empty() {
        return Ok(Vec::new());
    }
    // The engine refuses to remove what is used, but not before it has taken all names but one away.
    let options = query::ListContainersOptionsBuilder::default().all(true).build();
    let containers = in_time("list the containers", docker.list_containers(Some(options))).await?;
    let used: HashSet<String> = containers.into_iter().filter_map(|container| container.image_id).collect();
    images.retain(|image| !used.contains(&image.id));
    // Those that were built on a base before the base.
    images.sort_by_key(|image| !is_labelled(image));
    let mut removed = Vec::new();
    for image in &images {
        match in_time("look at an image", docker.inspect_image(&image.id)).await {
            Ok(image) if is_fresh(&image, SystemTime::now(), age) => continue,
            Err(error) if !error.is_absence() => return Err(error),
            _ => {}
        }
        for name in tags(image).chain([image.id.as_str()]) {
            match in_time("remove an image", docker.remove_image(name, None::<query::RemoveImageOptions>, None)).await {
                Ok(_) | Err(EngineError::Refused { status: Some(404 | 409), .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let is_there = in_time("look for an image", docker.inspect_image(&image.id)).await;
        if is_there.is_err_and(|error| error.is_absence()) {
            removed.push(tags(image).next().unwrap_or(&image.id).to_owned());
        }
    }
    Ok(removed)
}

/// Whether the image has a name that fairing did not give it. One in a registry that has the image is no such name.
fn is_users(image: &ImageSummary) -> bool {
    let in_registry = |tag: &str| {
        let repository = tag.rsplit_once(':').map_or(tag, |(repository, _)| repository);
        image.repo_digests.iter().any(|name| name.split('@').next() == Some(repository))
    };
    tags(image).any(|tag| !is_own_name(tag) && !in_registry(tag))
}

#[cfg(test)]
mod tests {
    use bollard::models::ImageInspectMetadata;

    use super::*;

    #[test]
    fn an_image_that_was_just_named_is_fresh() {
        #[track_caller]
        fn check(named: Option<&str>, expected: bool) {
            let metadata = ImageInspectMetadata { last_tag_time: named.map(str::to_owned) };
            let repo_tags = Some(vec!["fairing/fit:0123".to_owned()]);
            let image = ImageInspect { metadata: Some(metadata), repo_tags, ..Default::default() };
            let nameless = ImageInspect { repo_tags: None, ..image.clone() };
            let now = humantime::parse_rfc3339("2026-11-25T12:00:00Z").unwrap();
            assert_eq!(is_fresh(&image, now, Duration::from_secs(600)), expected, "{named:?}");
            assert!(!is_fresh(&nameless, now, Duration::from_secs(600)), "{named:?}");
        }
        check(Some("2026-11-25T11:50:00.123456789Z"), true);
        check(Some("2026-11-25T11:49:59Z"), false);
        check(Some("2026-11-25T13:20:01.5+01:30"), true);
        check(Some("2026-11-25T13:20:00+01:30"), false);
        check(Some("2026-11-25T10:50:01-01:00"), true);
        check(Some("2026-11-25T12:30:00Z"), true);
        check(Some("0001-01-01T00:00:00Z"), false);
        check(Some(""), false);
        check(Some("no time at all"), false);
        check(None, false);
        assert!(!is_fresh(&ImageInspect::default(), SystemTime::now(), Duration::from_secs(600)));
    }

    #[test]
    fn an_image_that_the_user_named_stays() {
        #[track_caller]
        fn check(tags: &[&str], digests: &[&str], expected: bool) {
            let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let image = ImageSummary { repo_tags: owned(tags), repo_digests: owned(digests), ..Default::default() };
            assert_eq!(is_users(&image), expected, "{tags:?} {digests:?}");
        }
        check(&[], &[], false);
        check(&["<none>:<none>"], &["<none>@<none>"], false);
        check(&["fairing/a:1"], &[], false);
        check(&["localhost/fairing/a:1"], &[], false);
        check(&["fairing/a:1", "keep:me"], &[], true);
        check(&["fairing/a:1", "localhost:5000/a:1"], &["localhost:5000/a@sha256:00"], false);
        check(&["localhost:5000/a:1"], &["localhost:5000/b@sha256:00"], true);
    }
}
