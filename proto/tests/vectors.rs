//! `proto/vectors.json`, which clients in other languages read too, holds for this crate.

use janus_proto::{
    hash::{hash_block, hash_blocks, segment_digest, table_digest, zero_segment_of},
    ids::{
        BackupId, BlockHash, DiskId, HandleId, MachineKey, SEGMENT_BLOCKS, ServerId, SessionId,
        SnapshotId, block_count, block_len, segment_count,
    },
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Vectors {
    disks: Vec<Disk>,
    names: Texts,
    machine_keys: Texts,
    ids: Texts,
}

#[derive(Deserialize)]
struct Disk {
    content: String,
    size_bytes: u64,
    blocks: u64,
    first_block_hash: Option<BlockHash>,
    last_block_hash: Option<BlockHash>,
    segment_digests: Vec<BlockHash>,
    table_digest: BlockHash,
}

#[derive(Deserialize)]
struct Texts {
    valid: Vec<String>,
    invalid: Vec<String>,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../vectors.json")).expect("vectors.json is valid")
}

impl Disk {
    fn bytes(&self) -> Vec<u8> {
        match self.content.as_str() {
            "zeros" => vec![0; self.size_bytes as usize],
            "pattern" => {
                (0..self.size_bytes).map(|i| (i % 251) as u8 ^ (i / 4096 % 256) as u8).collect()
            }
            other => panic!("content {other}"),
        }
    }
}

#[test]
fn digests_are_those_of_the_vectors() {
    let disks = vectors().disks;
    assert_eq!(disks.len(), 14);
    for disk in disks {
        let size = disk.size_bytes;
        let mut hashes = Vec::new();
        hash_blocks(&disk.bytes(), &mut hashes);
        assert_eq!(
            (hashes.len() as u64, block_count(size)),
            (disk.blocks, disk.blocks),
            "{} {size}",
            disk.content
        );
        assert_eq!(hashes.first().copied(), disk.first_block_hash, "{} {size}", disk.content);
        assert_eq!(hashes.last().copied(), disk.last_block_hash, "{} {size}", disk.content);
        let segments: Vec<_> = hashes.chunks(SEGMENT_BLOCKS as usize).map(segment_digest).collect();
        assert_eq!(segments, disk.segment_digests, "{} {size}", disk.content);
        assert_eq!(segments.len() as u64, segment_count(size));
        assert_eq!(table_digest(size, &segments), disk.table_digest, "{} {size}", disk.content);
    }
}

#[test]
fn blocks_hashed_one_by_one_have_the_same_hashes() {
    for disk in vectors().disks {
        let bytes = disk.bytes();
        let last = disk.blocks.checked_sub(1).map(|block| {
            let length = block_len(disk.size_bytes, block);
            hash_block(&bytes[bytes.len() - length..])
        });
        assert_eq!(last, disk.last_block_hash, "{} {}", disk.content, disk.size_bytes);
    }
}

#[test]
fn zero_segments_need_no_hashing() {
    for disk in vectors().disks.iter().filter(|disk| disk.content == "zeros") {
        let segments: Vec<_> = (0..segment_count(disk.size_bytes))
            .map(|segment| zero_segment_of(disk.size_bytes, segment))
            .collect();
        assert_eq!(segments, disk.segment_digests, "{}", disk.size_bytes);
    }
}

#[test]
fn names_and_ids_are_accepted_and_refused_as_the_vectors_say() {
    let vectors = vectors();
    for name in &vectors.names.valid {
        assert!(name.parse::<DiskId>().is_ok() && name.parse::<ServerId>().is_ok(), "{name:?}");
        assert!(MachineKey::new(name, name).is_ok(), "{name:?}");
    }
    for name in &vectors.names.invalid {
        assert!(name.parse::<DiskId>().is_err() && name.parse::<ServerId>().is_err(), "{name:?}");
        assert!(
            MachineKey::new("user", name).is_err() && MachineKey::new(name, "machine").is_err(),
            "{name:?}"
        );
    }
    for key in &vectors.machine_keys.valid {
        assert_eq!(key.parse::<MachineKey>().unwrap().as_str(), key);
    }
    for key in &vectors.machine_keys.invalid {
        assert!(key.parse::<MachineKey>().is_err(), "{key:?}");
    }
    for id in &vectors.ids.valid {
        assert_eq!(id.parse::<SnapshotId>().unwrap().to_string(), *id);
        assert!(
            id.parse::<BackupId>().is_ok()
                && id.parse::<SessionId>().is_ok()
                && id.parse::<HandleId>().is_ok()
        );
    }
    for id in &vectors.ids.invalid {
        assert!(id.parse::<SnapshotId>().is_err() && id.parse::<BackupId>().is_err(), "{id:?}");
    }
}
