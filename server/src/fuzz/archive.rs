//! Objects of archives: manifests, indexes, and frames of parts.

use janus_proto::{
    archive::{
        DiskEntry, FRAME_BYTES, FileEntry, Link, Manifest, Path,
        index::{Index, Packer, unpack},
        manifest::RunFacts,
    },
    ids::{BackupId, BlockHash, SnapshotId},
    image::Format,
    summed,
};
use uuid::Uuid;

/// The largest file whose index is looked at: larger ones are read by the same code.
const MOST_BYTES: u64 = 256 << 30;

/// Manifests, with and without their sum.
pub fn fuzz_archive_manifest(bytes: &[u8]) {
    let summed = summed::with_sum(bytes.to_vec());
    for bytes in [bytes, &summed] {
        let Ok(manifest) = Manifest::parse("manifest", bytes) else { continue };
        let place = manifest.place(&Path::from("prefix"));
        for entry in &manifest.disks {
            for (name, file) in entry.files(&place) {
                assert!(name.index(&file.index_sum).prefix_matches(&place.disks), "{name:?}");
            }
            let _ = entry.stored_bytes();
        }
        let again = manifest.to_bytes().map(|bytes| Manifest::parse("manifest", &bytes));
        assert!(again.is_ok_and(|again| again.is_ok_and(|again| again == manifest)));
    }
}

/// The length of a file, its index, and as much as is left as a frame.
pub fn fuzz_archive_index(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let length = u64::from_le_bytes(*length) % MOST_BYTES;
    if let Ok(index) = Index::decode(length, rest) {
        assert!(index.encode() == rest && index.length_bytes() == length);
        let parts: u64 = (0..index.part_count()).map(|part| index.part_bytes(part)).sum();
        assert_eq!(parts, index.stored_bytes());
    }
    let _ = unpack(rest, length.min(FRAME_BYTES));
}

pub(super) fn manifest_seeds() -> Vec<Vec<u8>> {
    let file =
        FileEntry { length_bytes: 5 << 20, stored_bytes: 4096, index_sum: BlockHash([3; 32]) };
    let link = |number: u8| Link {
        snapshot: SnapshotId::new(),
        edition: u32::from(number),
        data_write: Uuid::from_bytes([number; 16]),
        virtual_disk: Uuid::from_bytes([9; 16]),
        image: file,
        table: file,
    };
    let (Ok(disk), Ok(server), Ok(machine)) =
        ("sda".parse(), "server-a".parse(), "alice/laptop".parse())
    else {
        return Vec::new();
    };
    let entry = DiskEntry {
        disk,
        size_bytes: 1 << 30,
        logical_sector_bytes: 512,
        table_digest: BlockHash([5; 32]),
        consistency: 1,
        skipped_bytes: 0,
        format: Format::Vhdx,
        links: vec![link(1), link(2)],
    };
    let facts =
        RunFacts { server, run: BackupId::new(), machine, committed_ms: 1, seal: vec![1, 2] };
    let bytes = Manifest::new(facts, vec![entry]).to_bytes().unwrap_or_default();
    let text = summed::checked(&bytes).unwrap_or_default().to_vec();
    vec![bytes, text]
}

pub(super) fn index_seeds() -> Vec<Vec<u8>> {
    let length: u64 = 34 << 20;
    let mut index = Index::new(length);
    index.push(BlockHash([1; 32]), &[7; 32]);
    index.push(BlockHash([2; 32]), &[9; 2]);
    let mut packer = Packer::default();
    let packed = packer.push(&[5; 700]);
    let (frame, _) = packer.take();
    let mut seeds = vec![[&length.to_le_bytes()[..], &index.encode()].concat()];
    if packed.is_ok() {
        seeds.push([&700_u64.to_le_bytes()[..], &frame].concat());
    }
    seeds
}
