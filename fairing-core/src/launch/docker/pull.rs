//! Pulling an image.

use bollard::query_parameters as query;
use futures_util::StreamExt as _;

use super::engine::refused;
use super::{Engine, EngineError};
use crate::registry::Reference;

impl Engine {
    /// Pulls.
    pub fn pull(&self, reference: &Reference) -> Result<String, EngineError> {
        let name = reference.to_string();
        let docker = self.docker().clone();
        let options = query::CreateImageOptionsBuilder::default().from_image(&name).build();
        self.reactor().wait(async move {
            let mut pulling = Box::pin(docker.create_image(Some(options), None, None));
            while let Some(step) = pulling.next().await {
                step.map_err(|error| refused("pull", &error))?;
            }
            Ok(name)
        })
    }
}
