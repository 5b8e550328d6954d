/// One worker's connection to its run.
#[derive(Debug)]
pub struct Worker {
    _private: (),
}
