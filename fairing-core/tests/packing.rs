//! The program packed for real: unpacked again, started in a root folder of its own, looked at by others.

use std::fs;
use std::path::Path;

use fairing_core::image::append::{ImagePlan, Settings, assemble};
use fairing_core::image::cache::Cache;
use fairing_core::image::executable::Program;
use fairing_core::image::layer::Layer;
use fairing_core::image::libraries::Libraries;

fn main() {
    let program = Program::running().unwrap();
    let start = std::time::Instant::now();
    let libraries = Libraries::of(&program, None).unwrap();
    for library in libraries.iter() {
        println!("{} {} {}", library.name, library.path.display(), library.at.display());
    }
    println!(
        "{:?} {} {:?} {:?}",
        libraries.glibc(),
        program.size_bytes(),
        program.loads_at_run_time(),
        start.elapsed()
    );
    let layers = [Layer::libraries(&libraries, true).unwrap(), Layer::program(&program)];
    let cache = Cache::open(Path::new("/tmp/fairing-cache-try")).unwrap();
    for _ in 0..3 {
        let start = std::time::Instant::now();
        let packed: Vec<_> = layers.iter().map(|layer| cache.pack(layer).unwrap()).collect();
        let settings = Settings::of_program(program.name());
        let image = assemble(None, &packed, program.architecture(), &settings).unwrap();
        println!("{} {:?}", ImagePlan::new(&image, None, &packed, &settings), start.elapsed());
    }
    for (layer, name) in layers.iter().zip(["/tmp/lib.tar", "/tmp/prog.tar"]) {
        let mut file = fs::File::create(name).unwrap();
        layer.write_to(&mut file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), layer.size_bytes());
    }
}
