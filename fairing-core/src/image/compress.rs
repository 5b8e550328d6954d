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
pub(super) const VERSION: &str = "gzip-1-256k-a";

/// Each block costs 18 bytes and what its beginning cannot know of what was before it, together below half a percent; and
/// as many of them are in memory as [`DEPTH`] says.
const BLOCK: usize = 256 << 10;

/// More cores than this compress faster than a disk or a network takes it, and each takes 1 MiB.
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

/// The threads that compress, for one layer after another.
pub(super) struct Compressor<'scope> {
    workers: Vec<Worker<'scope>>,
    /// Blocks to fill again.
    spare: Vec<Block>,
}

/// Starts the threads, and ends them when `work` is done.
pub(super) fn with_compressor<T>(work: impl FnOnce(&mut Compressor<'_>) -> T) -> T {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_LIMIT);
    with_threads(threads, work)
}

fn with_threads<T>(threads: usize, work: impl FnOnce(&mut Compressor<'_>) -> T) -> T {
    thread::scope(|scope| {
        let workers = (0..threads).map(|_| Worker::start(scope)).collect();
        work(&mut Compressor { workers, spare: Vec::new() })
    })
}

impl Compressor<'_> {
    /// Writes the compressed form of `layer` to `to`.
    pub(super) fn compress(&mut self, layer: &Layer, to: &mut dyn Write) -> Result<Compressed, StreamError> {
        self.compress_what(to, |blocks| layer.write_to(blocks))
    }

    fn compress_what(
        &mut self,
        to: &mut dyn Write,
        write: impl FnOnce(&mut dyn Write) -> Result<(), StreamError>,
    ) -> Result<Compressed, StreamError> {
        let mut blocks = Blocks {
            block: self.spare.pop().unwrap_or_else(Block::new),
            compressor: self,
            started: 0,
            finished: 0,
            diff_id: Hasher::default(),
            blob: Hasher::default(),
            size: 0,
            to,
        };
        let written = write(&mut blocks).and_then(|()| blocks.finish().map_err(StreamError::Write));
        if written.is_err() {
            blocks.abandon();
        }
        written?;
        let Blocks { diff_id, blob, size, .. } = blocks;
        let descriptor = Descriptor { media_type: LAYER.to_owned(), digest: blob.digest(), size };
        Ok(Compressed { diff_id: diff_id.digest(), descriptor })
    }
}

/// Memory that goes to a worker full and comes back to be filled again. The workers allocate nothing themselves: an
/// allocator keeps some MiB for each thread that does.
struct Block {
    bytes: Vec<u8>,
    member: Vec<u8>,
}

impl Block {
    fn new() -> Self {
        // Room for the longest that deflate makes of a block, with what a member has around it.
        let member = HEADER.len() + deflated_limit(BLOCK) + 8;
        Self { bytes: Vec::with_capacity(BLOCK), member: Vec::with_capacity(member) }
    }
}

/// One thread that compresses. Blocks go around the workers in turn, so they come back in order.
struct Worker<'scope> {
    blocks: SyncSender<Block>,
    members: Receiver<Block>,
    _thread: ScopedJoinHandle<'scope, ()>,
}

impl<'scope> Worker<'scope> {
    fn start(scope: &'scope thread::Scope<'scope, '_>) -> Self {
        let (blocks, receive) = sync_channel::<Block>(DEPTH);
        let (send, members) = sync_channel(DEPTH);
        let mut deflate = Compress::new(Compression::new(1), false);
        let thread = scope.spawn(move || {
            for mut block in receive {
                make_member(&mut deflate, &mut block);
                // Nobody listens any more once writing has failed.
                if send.send(block).is_err() {
                    return;
                }
            }
        });
        Self { blocks, members, _thread: thread }
    }
}

/// Takes the archive and writes its members.
struct Blocks<'a, 'scope> {
    compressor: &'a mut Compressor<'scope>,
    /// Number of blocks given to workers and taken back.
    started: usize,
    finished: usize,
    block: Block,
    diff_id: Hasher,
    blob: Hasher,
    size: u64,
    to: &'a mut dyn Write,
}

impl Blocks<'_, '_> {
    fn start_block(&mut self) -> io::Result<()> {
        let workers = self.compressor.workers.len();
        if self.started - self.finished == workers * DEPTH {
            self.finish_block()?;
        }
        let next = self.compressor.spare.pop().unwrap_or_else(Block::new);
        let block = std::mem::replace(&mut self.block, next);
        let worker = &self.compressor.workers[self.started % workers];
        worker.blocks.send(block).expect("a worker ends only when nobody sends any more");
        self.started += 1;
        Ok(())
    }

    fn take_back(&mut self) -> Block {
        let worker = &self.compressor.workers[self.finished % self.compressor.workers.len()];
        let block = worker.members.recv().expect("a worker answers each block");
        self.finished += 1;
        block
    }

    fn finish_block(&mut self) -> io::Result<()> {
        let mut block = self.take_back();
        let written = self.to.write_all(&block.member);
        self.blob.write_all(&block.member)?;
        self.size += block.member.len() as u64;
        block.bytes.clear();
        self.compressor.spare.push(block);
        written
    }

    fn finish(&mut self) -> io::Result<()> {
        // Nothing at all is one empty member: no file without any is gzip.
        if !self.block.bytes.is_empty() || self.started == 0 {
            self.start_block()?;
        }
        while self.finished < self.started {
            self.finish_block()?;
        }
        Ok(())
    }

    /// Takes back what is still with the workers, so that the next layer finds them without work.
    fn abandon(&mut self) {
        while self.finished < self.started {
            self.take_back();
        }
    }
}

impl Write for Blocks<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let block = &mut self.block.bytes;
        let taken = bytes.len().min(BLOCK - block.len());
        self.diff_id.write_all(&bytes[..taken])?;
        block.extend_from_slice(&bytes[..taken]);
        if block.len() == BLOCK {
            self.start_block()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How a gzip member starts: no name, no time, and the mark for an unknown system, so that only the content counts.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255];

/// The most bytes that one stored part of a deflate stream has.
const STORED: usize = 65_535;

/// Makes a gzip member of the block's bytes.
fn make_member(deflate: &mut Compress, block: &mut Block) {
    let Block { bytes, member } = block;
    member.clear();
    member.extend_from_slice(&HEADER);
    deflate.reset();
    let status = deflate.compress_vec(bytes, member, FlushCompress::Finish).expect("deflate takes any bytes");
    // One that is cut short would leave its mark on the next: a reset of zlib-rs 0.6.8 forgets that a block is open, and
    // what follows then lacks the head of its own, or the compressor panics.
    assert!(status == Status::StreamEnd, "there is room for the longest that deflate makes of a block");
    // Level 1 makes noise a twentieth longer; as it is, it is a few bytes longer and is read faster.
    if member.len() - HEADER.len() > stored_length(bytes.len()) {
        member.truncate(HEADER.len());
        store(bytes, member);
    }
    let mut crc = Crc::new();
    crc.update(bytes);
    member.extend_from_slice(&crc.sum().to_le_bytes());
    member.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
}

/// The most that level 1 makes of so many bytes: its fixed code has at most nine bits for a byte, and less for each of
/// several that were there before (RFC 1951, section 3.2.6). Some more, since a compressor that has filled its memory to the
/// last byte cannot say that it is done.
const fn deflated_limit(bytes: usize) -> usize {
    bytes + bytes.div_ceil(8) + 64
}

/// Length of a deflate stream that holds so many bytes as they are.
fn stored_length(bytes: usize) -> usize {
    bytes + 5 * bytes.div_ceil(STORED).max(1)
}

/// Appends `bytes` as they are, as a deflate stream (RFC 1951, section 3.2.4).
fn store(bytes: &[u8], member: &mut Vec<u8>) {
    let parts = bytes.len().div_ceil(STORED);
    for (index, part) in bytes.chunks(STORED).enumerate() {
        let length = part.len() as u16;
        member.push(u8::from(index + 1 == parts));
        member.extend_from_slice(&length.to_le_bytes());
        member.extend_from_slice(&(!length).to_le_bytes());
        member.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;

    /// Bytes of a program are something between noise and zeros.
    fn bytes(length: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8 & if state & 0x30_0000 == 0 { 0xff } else { 0x11 }
        };
        (0..length).map(next).collect()
    }

    fn compressed(threads: usize, bytes: &[u8]) -> (Compressed, Vec<u8>) {
        let mut out = Vec::new();
        let compressed = with_threads(threads, |compressor| {
            compressor.compress_what(&mut out, |blocks| blocks.write_all(bytes).map_err(StreamError::Write))
        });
        (compressed.unwrap(), out)
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bytes_and_they_are_gzip() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 12_345] {
            let original = bytes(length);
            let (described, first) = compressed(1, &original);
            assert_eq!(described.descriptor.digest, Digest::of(&first));
            assert_eq!(described.descriptor.size, first.len() as u64);
            assert_eq!(described.diff_id, Digest::of(&original));
            for threads in 2..=4 {
                assert!(compressed(threads, &original) == (described.clone(), first.clone()), "{threads} threads");
            }
            let mut again = Vec::new();
            flate2::read::MultiGzDecoder::new(first.as_slice()).read_to_end(&mut again).unwrap();
            assert!(again == original, "{length} bytes");
        }
    }

    #[test]
    fn gzip_itself_reads_it() {
        let original = bytes(3 * BLOCK + 1);
        let (_, compressed) = compressed(2, &original);
        let mut gzip = Command::new("gzip").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = gzip.stdin.take().unwrap();
        let writer = thread::spawn(move || stdin.write_all(&compressed));
        let output = gzip.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(output.status.success() && output.stdout == original, "{}", output.status);
    }

    /// If this fails, the compressor is another one: then `VERSION` changes, and these digits.
    #[test]
    fn the_compressor_is_the_one_that_its_version_names() {
        let (described, _) = compressed(2, &bytes(2 * BLOCK));
        let digest = "sha256:f1a2fc137459eb2fd15a0b60f21ce2cf13a5ec9af53a25a509b21e207eaef70d";
        assert_eq!((VERSION, described.descriptor.digest.to_string().as_str()), ("gzip-1-256k-a", digest));
    }

    #[test]
    fn a_disk_that_is_full_ends_one_layer_and_not_the_next() {
        let mut full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let original = bytes(20 * BLOCK);
        let write = |blocks: &mut dyn Write| blocks.write_all(&original).map_err(StreamError::Write);
        let again = with_threads(2, |compressor| {
            let error = compressor.compress_what(&mut full, write);
            let Err(StreamError::Write(error)) = error else { panic!("{error:?}") };
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            compressor.compress_what(&mut io::sink(), write).unwrap()
        });
        assert_eq!(again, compressed(1, &original).0);
    }

    #[test]
    fn a_layer_that_cannot_be_read_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, "some").unwrap();
        let layer = Layer::files([(path.as_path(), "/app/data")]).unwrap();
        std::fs::write(&path, "some more").unwrap();
        let error = with_compressor(|compressor| compressor.compress(&layer, &mut io::sink())).unwrap_err();
        assert!(matches!(error, StreamError::Changed { .. }), "{error}");
    }

    /// Bytes that do not compress, of these values.
    fn noise(values: std::ops::RangeInclusive<u8>) -> Vec<u8> {
        let mut state = 1_u64;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            values.start() + ((state >> 32) % (u64::from(values.end() - values.start()) + 1)) as u8
        };
        std::iter::repeat_with(next).take(BLOCK).collect()
    }

    #[test]
    fn what_cannot_be_compressed_is_kept_and_the_next_block_is_not_harmed() {
        // Those from 144 on have the longest codes.
        for noise in [noise(0..=255), noise(144..=255)] {
            let mut deflate = Compress::new(Compression::new(1), false);
            let mut block = Block::new();
            let before = block.member.capacity();
            for original in [noise, bytes(BLOCK)] {
                block.bytes.clear();
                block.bytes.extend_from_slice(&original);
                make_member(&mut deflate, &mut block);
                assert_eq!(block.member.capacity(), before);
                assert!(block.member.len() <= stored_length(BLOCK) + HEADER.len() + 8);
                let mut again = Vec::new();
                flate2::read::MultiGzDecoder::new(block.member.as_slice()).read_to_end(&mut again).unwrap();
                assert!(again == original);
            }
        }
    }
}
