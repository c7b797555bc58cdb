//! A disk, servers and what their snapshots truly hold, as plain vectors; and a client that uses the cache as a backup does.

use std::collections::{BTreeMap, HashMap};

use janus_proto::{
    hash::{hash_block, segment_digest, table_digest, zero_hash},
    ids::{
        BlockHash, SEGMENT_BLOCKS, ServerId, SnapshotId, StoreGeneration, block_count, block_len,
        segment_count,
    },
};

use crate::cache::{CacheError, DiskCache, Head};

/// What blocks hold, as numbers; 0 is zeros.
#[derive(Clone)]
pub(super) struct Content {
    pub(super) size_bytes: u64,
    pub(super) blocks: Vec<u32>,
}

impl Content {
    pub(super) fn zeros(size_bytes: u64) -> Self {
        Self { size_bytes, blocks: vec![0; block_count(size_bytes) as usize] }
    }

    pub(super) fn hash(&self, block: u64) -> BlockHash {
        let len = block_len(self.size_bytes, block);
        match self.blocks[block as usize] {
            0 => zero_hash(len),
            number => {
                hash_block(&[&number.to_le_bytes()[..], &(len as u32).to_le_bytes()].concat())
            }
        }
    }

    pub(super) fn segment(&self, segment: u64) -> Vec<BlockHash> {
        let first = segment * SEGMENT_BLOCKS;
        (first..block_count(self.size_bytes).min(first + SEGMENT_BLOCKS))
            .map(|block| self.hash(block))
            .collect()
    }

    pub(super) fn digests(&self) -> Vec<BlockHash> {
        (0..segment_count(self.size_bytes))
            .map(|segment| segment_digest(&self.segment(segment)))
            .collect()
    }

    /// As a server does it for a session of a new size: the common part, then zeros.
    pub(super) fn resized(&self, size_bytes: u64) -> Self {
        let mut new = Self::zeros(size_bytes);
        for (to, from) in new.blocks.iter_mut().zip(&self.blocks) {
            *to = *from;
        }
        new
    }
}

/// Servers with their heads; snapshots never change.
#[derive(Default)]
pub(super) struct World {
    pub(super) snapshots: HashMap<SnapshotId, Content>,
    pub(super) heads: BTreeMap<ServerId, Head>,
    store: Option<StoreGeneration>,
}

pub(super) fn server(number: usize) -> ServerId {
    ["a", "b", "c"][number].parse().unwrap()
}

impl World {
    /// `server` commits `content`.
    pub(super) fn commit(&mut self, server: &ServerId, content: Content) -> Head {
        self.commit_as(server, content, SnapshotId::new())
    }

    pub(super) fn commit_as(
        &mut self,
        server: &ServerId,
        content: Content,
        snapshot_id: SnapshotId,
    ) -> Head {
        let head = Head {
            snapshot_id,
            table_digest: table_digest(content.size_bytes, &content.digests()),
            store_generation: *self.store.get_or_insert_with(StoreGeneration::new),
        };
        self.snapshots.insert(snapshot_id, content);
        self.heads.insert(server.clone(), head);
        head
    }

    /// What a session on `server` starts from.
    pub(super) fn session(&self, server: &ServerId, size_bytes: u64) -> Content {
        let head = self
            .heads
            .get(server)
            .map(|head| self.snapshots[&head.snapshot_id].resized(size_bytes));
        head.unwrap_or_else(|| Content::zeros(size_bytes))
    }

    /// *For every server S and block b that is not in changed(S), T\[b\] is the hash of b in head(S)*, a head of another
    /// size being seen as a session of the disk's size sees it.
    pub(super) fn check(&self, cache: &DiskCache) -> Result<(), CacheError> {
        let size_bytes = cache.size_bytes();
        let table = table(cache)?;
        for number in 0..3 {
            let server = server(number);
            let Some(head) = cache.head(&server) else { continue };
            let truth = self.snapshots[&head.snapshot_id].resized(size_bytes);
            let must_send = cache.must_send(&server);
            let mut must = 0;
            for block in 0..block_count(size_bytes) {
                if must_send.contains(block) {
                    must += 1;
                    continue;
                }
                assert_eq!(
                    table[block as usize],
                    truth.hash(block),
                    "block {block} of the head of {server}"
                );
            }
            assert_eq!(must_send.count(), must);
        }
        Ok(())
    }
}

pub(super) fn table(cache: &DiskCache) -> Result<Vec<BlockHash>, CacheError> {
    let segments = (0..segment_count(cache.size_bytes())).map(|segment| cache.segment(segment));
    Ok(segments.collect::<Result<Vec<_>, _>>()?.concat())
}

/// Makes T equal to `content`, as a client that compares digests first.
pub(super) fn reconcile(
    cache: &DiskCache,
    server: &ServerId,
    head: Option<Head>,
    content: &Content,
) -> Result<(), CacheError> {
    let mine = cache.segment_digests()?;
    let theirs = content.digests();
    let differing = (0..mine.len())
        .filter(|at| mine[*at] != theirs[*at])
        .map(|at| (at as u64, content.segment(at as u64)));
    cache.adopt(server, head, differing)
}

/// How far a backup gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Half of the segments are staged, then the run is given up.
    Half,
    /// The server has committed, the client never heard of it.
    ServerCommitted,
    /// All of it.
    Done,
}

/// One backup of `disk` to `server`: reconciles when the heads aren't the same, sends what differs or must go, and checks
/// that what the server then has is the disk.
pub(super) fn back_up(
    cache: &DiskCache,
    world: &mut World,
    server: &ServerId,
    disk: &Content,
    until: Until,
) -> Result<(), CacheError> {
    let mut session = world.session(server, disk.size_bytes);
    let head = world.heads.get(server).copied();
    if cache.head(server) != head || head.is_none() {
        reconcile(cache, server, head, &session)?;
    }
    let must_send = cache.must_send(server);
    let stage = cache.stage();
    let segments = segment_count(disk.size_bytes);
    for segment in 0..segments {
        if until == Until::Half && segment >= segments / 2 {
            return Ok(());
        }
        let must = must_send.segment_bits(segment);
        let mut changed = Vec::new();
        for (at, (old, new)) in
            cache.segment(segment)?.into_iter().zip(disk.segment(segment)).enumerate()
        {
            let block = segment as usize * SEGMENT_BLOCKS as usize + at;
            if old != new {
                changed.push((at as u16, new));
            }
            if old != new || must[at / 64] >> (at % 64) & 1 == 1 {
                session.blocks[block] = disk.blocks[block];
            }
        }
        // Every third segment is read twice, as after a digest mismatch.
        if segment % 3 == 2 {
            stage.put(segment, &[(0, hash_block(b"read wrongly"))])?;
        }
        stage.put(segment, &changed)?;
    }
    assert_eq!(session.blocks, disk.blocks, "the server {server} got something else than the disk");
    let head = world.commit(server, session);
    if until == Until::Done {
        cache.commit(stage, server, head, b"cursor".to_vec())?;
        assert_eq!(cache.head(server), Some(head));
        assert!(cache.must_send(server).is_nothing());
    }
    Ok(())
}
