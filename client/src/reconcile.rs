//! Hashes of what a session or a snapshot holds, read from its server: segment digests first, block hashes only where they differ.

use futures::{Stream, StreamExt, TryStreamExt, future, stream};
use janus_proto::{
    error::WireError,
    ids::{BlockHash, SEGMENT_BLOCKS, ServerId, block_count, segment_count},
    model::{MAX_HASHES, MAX_RANGES},
    pb::{BlockRange, HashLevel, ReadHashesRequest, ReadHashesResponse, read_hashes_request::Of},
};
use tokio::sync::mpsc;

use crate::{
    cache::{CacheError, DiskCache, Head},
    link::{self, Address, Link, LinkError},
};

const DOING: &str = "reading the server's hashes";

/// Why a session could not be compared with.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A call failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The hash cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A task of ours ended.
    #[error("comparing hashes was interrupted")]
    Ended,
}

/// Content to be read from a server: a session's, or an opened snapshot's.
#[derive(Debug, Clone)]
pub struct HashReader {
    /// Connection.
    pub link: Link,
    /// The server, and the session's run.
    pub address: Address,
    /// What.
    pub of: Of,
    /// Size of its disk.
    pub size_bytes: u64,
}

impl HashReader {
    /// Digests of all segments, as a commit would store them now.
    ///
    /// # Errors
    /// When the call fails or the answer isn't complete.
    pub async fn segment_digests(&self) -> Result<Vec<BlockHash>, LinkError> {
        read_segment_digests(&self.link, &self.address, self.of.clone(), self.size_bytes).await
    }

    /// Makes the cache's table equal to this content; returns how many segments differed. `head` when that
    /// is the content of the server's head.
    ///
    /// # Errors
    /// When a call or the cache fails; the cache then is as before.
    pub async fn adopt_into(
        &self,
        cache: &DiskCache,
        server: &ServerId,
        head: Option<Head>,
    ) -> Result<usize, ReconcileError> {
        let theirs = self.segment_digests().await?;
        let table = cache.clone();
        let ours = blocking(move || table.segment_digests()).await??;
        let differing: Vec<u64> = (0..theirs.len() as u64)
            .filter(|segment| ours.get(*segment as usize) != theirs.get(*segment as usize))
            .collect();
        let count = differing.len();
        let (sender, mut receiver) = mpsc::channel::<(u64, Vec<BlockHash>)>(16);
        let (table, server) = (cache.clone(), server.clone());
        let adopting = tokio::task::spawn_blocking(move || {
            let stage = table.stage();
            let mut left = count;
            while let Some((segment, hashes)) = receiver.blocking_recv() {
                stage.put_hashes(segment, &hashes)?;
                left -= 1;
            }
            // The sender went away before its end: adopt nothing.
            if left > 0 {
                return Err(ReconcileError::Ended);
            }
            table.adopt_stage(stage, &server, head)?;
            Ok(())
        });
        let sent = self.send_blocks(&differing, sender).await;
        let adopted = adopting.await.map_err(|_| ReconcileError::Ended)?;
        match (sent, adopted) {
            (Err(error), Ok(()) | Err(ReconcileError::Ended)) => Err(error.into()),
            (_, Err(error)) => Err(error),
            (Ok(()), Ok(())) => Ok(count),
        }
    }

    /// The block hashes of one segment.
    ///
    /// # Errors
    /// When the call fails or the answer isn't complete.
    pub async fn block_hashes(&self, segment: u64) -> Result<Vec<BlockHash>, LinkError> {
        // Room for all there is: nobody receives meanwhile.
        let (sender, mut receiver) = mpsc::channel(1);
        self.send_blocks(&[segment], sender).await?;
        let (_, hashes) = receiver.recv().await.ok_or_else(|| out_of_order(segment))?;
        Ok(hashes)
    }

    /// Reads the block hashes of `segments` and hands them on, whole segments at a time.
    async fn send_blocks(
        &self,
        segments: &[u64],
        sender: mpsc::Sender<(u64, Vec<BlockHash>)>,
    ) -> Result<(), LinkError> {
        let blocks = block_count(self.size_bytes);
        for part in segments.chunks(MAX_RANGES) {
            let ranges = part.iter().map(|segment| self.range_of(*segment)).collect();
            let mut answers = std::pin::pin!(self.read(HashLevel::Block, ranges).await?);
            let mut wanted = part.iter().copied();
            let mut segment = wanted.next();
            let mut waiting: Vec<BlockHash> = Vec::with_capacity(SEGMENT_BLOCKS as usize);
            while let Some((mut first, hashes)) = answers.try_next().await? {
                for hash in hashes {
                    let Some(current) = segment else { return Err(out_of_order(first)) };
                    if first != current * SEGMENT_BLOCKS + waiting.len() as u64 {
                        return Err(out_of_order(first));
                    }
                    waiting.push(hash);
                    first += 1;
                    if first % SEGMENT_BLOCKS == 0 || first == blocks {
                        if sender.send((current, std::mem::take(&mut waiting))).await.is_err() {
                            return Ok(()); // The receiver failed and says so itself.
                        }
                        segment = wanted.next();
                        // One message may go on with the next range without a gap in its numbers only.
                    }
                }
            }
            if segment.is_some() {
                return Err(out_of_order(blocks));
            }
        }
        Ok(())
    }

    fn range_of(&self, segment: u64) -> BlockRange {
        let first_block = segment * SEGMENT_BLOCKS;
        let block_count = (block_count(self.size_bytes) - first_block).min(SEGMENT_BLOCKS);
        BlockRange { first_block, block_count }
    }

    async fn read(
        &self,
        level: HashLevel,
        ranges: Vec<BlockRange>,
    ) -> Result<impl Stream<Item = Result<(u64, Vec<BlockHash>), LinkError>> + use<>, LinkError>
    {
        read(&self.link, &self.address, self.of.clone(), level, ranges).await
    }
}

/// Digests of all segments of a snapshot or session, whose disk has this size.
///
/// # Errors
/// When the call fails or the answer isn't complete.
pub(crate) async fn read_segment_digests(
    link: &Link,
    address: &Address,
    of: Of,
    size_bytes: u64,
) -> Result<Vec<BlockHash>, LinkError> {
    let expected = segment_count(size_bytes) as usize;
    let mut digests = Vec::with_capacity(expected);
    let answers = read(link, address, of, HashLevel::Segment, vec![]).await?;
    let mut answers = std::pin::pin!(answers);
    while let Some((first, hashes)) = answers.try_next().await? {
        if first != digests.len() as u64 || digests.len() + hashes.len() > expected {
            return Err(out_of_order(first));
        }
        digests.extend(hashes);
    }
    if digests.len() != expected {
        return Err(out_of_order(digests.len() as u64));
    }
    Ok(digests)
}

async fn read(
    link: &Link,
    address: &Address,
    of: Of,
    level: HashLevel,
    ranges: Vec<BlockRange>,
) -> Result<impl Stream<Item = Result<(u64, Vec<BlockHash>), LinkError>> + use<>, LinkError> {
    let message = ReadHashesRequest { level: level.into(), ranges, of: Some(of), hash_bytes: 0 };
    let request = address.request(message, None);
    let mut client = link.bulk_restore();
    let answers = link::stream_of(client.read_hashes(request), DOING).await?;
    Ok(within(answers).map(|answer| parse(answer?)))
}

/// A stream's messages, each within a deadline.
fn within(
    answers: tonic::Streaming<ReadHashesResponse>,
) -> impl Stream<Item = Result<ReadHashesResponse, LinkError>> {
    stream::unfold(Some(answers), |answers| async {
        let mut answers = answers?;
        match link::next_of(&mut answers, DOING).await {
            Ok(Some(message)) => Some((Ok(message), Some(answers))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
    .filter(|item| future::ready(!matches!(item, Ok(message) if message.batch.is_none())))
}

fn parse(answer: ReadHashesResponse) -> Result<(u64, Vec<BlockHash>), LinkError> {
    let batch = answer.batch.unwrap_or_default();
    if !batch.hashes.len().is_multiple_of(BlockHash::LEN)
        || batch.hashes.len() > MAX_HASHES * BlockHash::LEN
    {
        let length =
            WireError::Length { field: "hashes", expected: 32, actual: batch.hashes.len() };
        return Err(LinkError::answer(DOING)(length));
    }
    let hashes =
        batch.hashes.chunks_exact(BlockHash::LEN).map(|hash| BlockHash::from_wire("hashes", hash));
    Ok((batch.first, hashes.collect::<Result<_, _>>().map_err(LinkError::answer(DOING))?))
}

fn out_of_order(at: u64) -> LinkError {
    let reason = format!("hashes are missing or out of order at {at}");
    LinkError::answer(DOING)(WireError::Invalid { field: "first", reason })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ReconcileError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ReconcileError::Ended)
}
