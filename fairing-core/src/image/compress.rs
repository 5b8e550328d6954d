//! gzip on every core, with the same result on any number of them.
//!
//! The stream is cut into blocks of one size. Each is compressed by itself into a gzip member of its own; a file of several
//! members is as valid as one of one ([RFC 1952](https://www.rfc-editor.org/rfc/rfc1952), section 2.2) and decompresses to
//! their contents one after another. Level 1: the time that a higher level takes is more than it saves on the way to a
//! registry, and zstd, which would be better at both, is refused by Docker before version 23.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};

use flate2::{Compress, Compression, Crc, FlushCompress, Status};

use super::content::StreamError;
use super::layer::{Hasher, Layer};
use super::{Descriptor, Digest, LAYER};

/// What decides about the compressed bytes beside the uncompressed ones. A test fails when they change, as with a new
/// version of the compressor; then this changes too, and nothing old is taken from a cache.
pub(super) const VERSION: &str = "gzip-1-512k-a";

/// Each block costs 18 bytes and what its beginning cannot know of what was before it, together below a tenth of a
/// percent; and as many of them are in memory as [`DEPTH`] says.
const BLOCK: usize = 512 << 10;

/// More cores than this compress faster than a disk or a network takes it, and each takes 2 MiB.
const THREADS_LIMIT: usize = 4;

/// Blocks under way for each thread: one that it works on and one that waits.
const DEPTH: usize = 2;

/// A layer in its compressed form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compressed {
    /// Of the archive.
    pub(super) diff_id: Digest,
    /// Of the compressed bytes.
    pub(super) descriptor: Descriptor,
}

/// Writes the compressed form of `layer` to `to`.
pub(super) fn compress(layer: &Layer, to: &mut dyn Write) -> Result<Compressed, StreamError> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_LIMIT);
    compress_with(threads, to, |blocks| layer.write_to(blocks))
}

fn compress_with(
    threads: usize,
    to: &mut dyn Write,
    write: impl FnOnce(&mut dyn Write) -> Result<(), StreamError>,
) -> Result<Compressed, StreamError> {
    thread::scope(|scope| {
        let workers = (0..threads).map(|_| Worker::start(scope)).collect();
        let mut blocks = Blocks {
            workers,
            started: 0,
            finished: 0,
            block: Vec::with_capacity(BLOCK),
            spare: Vec::new(),
            diff_id: Hasher::default(),
            blob: Hasher::default(),
            size: 0,
            to,
        };
        write(&mut blocks)?;
        blocks.finish().map_err(StreamError::Write)
    })
}

/// One thread that compresses. Blocks go around the workers in turn, so they come back in order.
struct Worker<'scope> {
    blocks: SyncSender<Vec<u8>>,
    members: Receiver<(Vec<u8>, Vec<u8>)>,
    _thread: ScopedJoinHandle<'scope, ()>,
}

impl<'scope> Worker<'scope> {
    fn start(scope: &'scope thread::Scope<'scope, '_>) -> Self {
        let (blocks, receive) = sync_channel::<Vec<u8>>(DEPTH);
        let (send, members) = sync_channel(DEPTH);
        let thread = scope.spawn(move || {
            let mut deflate = Compress::new(Compression::new(1), false);
            for block in receive {
                let member = member(&mut deflate, &block);
                // Nobody listens any more once writing has failed.
                if send.send((block, member)).is_err() {
                    return;
                }
            }
        });
        Self { blocks, members, _thread: thread }
    }
}

/// Takes the archive and writes its members.
struct Blocks<'a, 'scope> {
    workers: Vec<Worker<'scope>>,
    /// Number of blocks given to workers and taken back.
    started: usize,
    finished: usize,
    block: Vec<u8>,
    /// Blocks to fill again.
    spare: Vec<Vec<u8>>,
    diff_id: Hasher,
    blob: Hasher,
    size: u64,
    to: &'a mut dyn Write,
}

impl Blocks<'_, '_> {
    fn start_block(&mut self) -> io::Result<()> {
        if self.started - self.finished == self.workers.len() * DEPTH {
            self.finish_block()?;
        }
        let next = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK));
        let block = std::mem::replace(&mut self.block, next);
        let worker = &self.workers[self.started % self.workers.len()];
        worker.blocks.send(block).expect("a worker ends only when nobody sends any more");
        self.started += 1;
        Ok(())
    }

    fn finish_block(&mut self) -> io::Result<()> {
        let worker = &self.workers[self.finished % self.workers.len()];
        let (mut block, member) = worker.members.recv().expect("a worker answers each block");
        self.finished += 1;
        block.clear();
        self.spare.push(block);
        self.to.write_all(&member)?;
        self.blob.write_all(&member)?;
        self.size += member.len() as u64;
        Ok(())
    }

    fn finish(mut self) -> io::Result<Compressed> {
        if !self.block.is_empty() {
            self.start_block()?;
        }
        while self.finished < self.started {
            self.finish_block()?;
        }
        let descriptor = Descriptor { media_type: LAYER.to_owned(), digest: self.blob.digest(), size: self.size };
        Ok(Compressed { diff_id: self.diff_id.digest(), descriptor })
    }
}

impl Write for Blocks<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(BLOCK - self.block.len());
        self.diff_id.write_all(&bytes[..taken])?;
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == BLOCK {
            self.start_block()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `block` as a gzip member: no name, no time, and the mark for an unknown system, so that only the content counts.
fn member(deflate: &mut Compress, block: &[u8]) -> Vec<u8> {
    const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255];
    let mut member = Vec::with_capacity(block.len() / 2 + 1024);
    member.extend_from_slice(&HEADER);
    deflate.reset();
    loop {
        let rest = &block[deflate.total_in() as usize..];
        let status = deflate.compress_vec(rest, &mut member, FlushCompress::Finish);
        match status.expect("deflate takes any bytes and a buffer with room") {
            Status::StreamEnd => break,
            Status::Ok | Status::BufError => member.reserve(64 << 10),
        }
    }
    let mut crc = Crc::new();
    crc.update(block);
    member.extend_from_slice(&crc.sum().to_le_bytes());
    member.extend_from_slice(&(block.len() as u32).to_le_bytes());
    member
}
