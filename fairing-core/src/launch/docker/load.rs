//! Handing an image to the engine.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use bollard::query_parameters as query;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use super::engine::refused;
use super::{Engine, EngineError};
use crate::image::archive::Archive;
use crate::registry::Reference;

struct Pipe(mpsc::Sender<io::Result<Bytes>>, Vec<u8>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes))).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Engine {
    /// Loads.
    pub fn load(&self, archive: &Archive<'_>, _progress: &mut dyn FnMut(u64, u64)) -> Result<String, EngineError> {
        let id = archive.image_id().to_string();
        if self.call("look", self.docker().inspect_image(&id)).is_ok() {
            return Ok(id);
        }
        let (sender, mut receiver) = mpsc::channel(4);
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let mut pipe = Pipe(sender, Vec::new());
                let _ = archive.write_to(&mut pipe);
            });
            let stream = futures_util::stream::poll_fn(move |context| receiver.poll_recv(context));
            let docker = self.docker().clone();
            let result = self.reactor().wait(async move {
                let mut loading = Box::pin(docker.import_image_stream(query::ImportImageOptionsBuilder::default().quiet(true).build(), stream, None));
                while let Some(step) = loading.next().await {
                    step?;
                }
                Ok::<_, bollard::errors::Error>(())
            });
            let _ = writer.join();
            result.map_err(|error| refused("load", &error))
        })?;
        Ok(id)
    }

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
