//! Images that nobody needs any more.
//!
//! An image is removed if no container uses it and nothing is lost with it: it has fairing's labels, or only names that
//! fairing gave it. Nothing is forced, so the engine has the last word. One that the user has named stays.

use std::collections::HashSet;

use bollard::Docker;
use bollard::models::ImageSummary;
use bollard::query_parameters as query;

use super::container::MANAGER_LABEL;
use super::engine::{Engine, EngineError, in_time};
use super::load::{OWN_NAMES, PROGRAM_LABEL};

impl Engine {
    /// Removes the images of `program` that no container uses, all but the one with the id `kept`, and returns their names.
    ///
    /// A launcher that was about to use one of them gets [`EngineError::NoImage`] and loads its image again.
    ///
    /// # Errors
    ///
    /// [`EngineError`]
    pub fn tidy(&self, program: &str, kept: &str) -> Result<Vec<String>, EngineError> {
        let is_old = |image: &ImageSummary| {
            is_labelled(image) && image.labels.get(PROGRAM_LABEL).is_some_and(|of| of == program) && image.id != kept
        };
        self.reactor().wait(async { remove_unused(self.docker(), is_old).await })
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

/// Removes the images that are `chosen`, unless a container uses them or the user has named them.
pub(super) async fn remove_unused(
    docker: &Docker,
    chosen: impl Fn(&ImageSummary) -> bool,
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
    use super::*;

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
