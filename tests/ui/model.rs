// A model without any framework, for the programs of this folder.

use std::path::Path;

use fairing_core::Model;
use fairing_core::runtime::{Layout, LayoutError};

/// One number.
#[derive(Clone)]
pub struct Point(pub f32);

impl Model for Point {
    type Gradients = f32;

    const EXTENSION: &'static str = "txt";

    fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::new(Vec::new())
    }

    fn read_trained(&self, out: &mut [f32]) {
        out[0] = self.0;
    }

    fn write_trained(self, values: &[f32]) -> Self {
        Point(values[0])
    }

    fn read_frozen(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_frozen(self, _: &[u8]) -> Self {
        self
    }

    fn read_state(&self, _: &mut [f32]) {}

    fn write_state(self, _: &[f32]) -> Self {
        self
    }

    fn read_gradients(&self, gradients: f32, out: &mut [f32], present: &mut [bool]) {
        (out[0], present[0]) = (gradients, true);
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        Ok(self.0.to_string().into_bytes())
    }

    fn load(self, _: &Path) -> Result<Self, String> {
        Ok(self)
    }

    fn seed(_: u64) {}
}
