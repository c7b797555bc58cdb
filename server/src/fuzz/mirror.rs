//! Records of mirrored tables, and the messages that these come in.

use std::path::Path;

use janus_proto::{
    ids::{BlockHash, SnapshotId},
    pb,
};
use prost::Message;

use crate::{
    chain::{
        store,
        table::{SegmentBitmap, TableStack},
    },
    mirror::{
        pull,
        record::{Description, Record},
    },
};

/// Size of the disk that segments are put on.
const DISK_BYTES: u64 = (9 << 20) + 512;
/// Segments of a message that are looked at: what comes after is read by the same code.
const MOST_SEGMENTS: usize = 64;

/// Records, with and without their sum.
pub fn fuzz_mirror_record(bytes: &[u8]) {
    let summed = store::with_sum(bytes.to_vec());
    for bytes in [bytes, &summed] {
        let Ok(record) = Record::parse(Path::new("record"), bytes) else { continue };
        let folder = record.description.folder();
        assert!(folder.is_relative() && folder.components().count() == 4, "{folder:?}");
        let again = record.to_bytes(Path::new("record")).map(|bytes| {
            Record::parse(Path::new("record"), &bytes).is_ok_and(|again| again == record)
        });
        assert!(again.unwrap_or(false), "a record that can't be written again");
    }
}

/// Messages of a table.
pub fn fuzz_table_message(bytes: &[u8]) {
    let Ok(message) = pb::ReadTableResponse::decode(bytes) else { return };
    if let Some(snapshot) = message.start.and_then(|start| start.snapshot) {
        let _ = Description::try_from(snapshot);
    }
    let Ok(zeros) = TableStack::new(Vec::new(), DISK_BYTES) else { return };
    for segment in message.segments.iter().take(MOST_SEGMENTS) {
        let _ = pull::differing(segment).map(|differing| differing.over(&zeros));
    }
}

fn snapshot() -> pb::Snapshot {
    pb::Snapshot {
        snapshot_id: SnapshotId::new().to_string(),
        server_id: "server-a".into(),
        machine: "alice/laptop".into(),
        disk_id: "sda".into(),
        committed_ms: 1,
        size_bytes: DISK_BYTES,
        table_digest: vec![7; 32].into(),
        client_seal: vec![1, 2].into(),
        ..Default::default()
    }
}

/// A whole one and a difference.
pub(super) fn record_seeds() -> Vec<Vec<u8>> {
    let record = |base| -> Option<Vec<u8>> {
        let description = Description::try_from(snapshot()).ok()?;
        let mut bytes =
            Record { description, base, number: 3 }.to_bytes(Path::new("record")).ok()?;
        // The sum is added again.
        bytes.truncate(bytes.len().saturating_sub(65));
        Some(bytes)
    };
    [None, Some(SnapshotId::new())].into_iter().filter_map(record).collect()
}

/// The first message of a table, with two segments.
pub(super) fn message_seeds() -> Vec<Vec<u8>> {
    let mut present = SegmentBitmap::default();
    present.insert(5);
    let words: Vec<u8> = present.0.iter().flat_map(|word| word.to_le_bytes()).collect();
    let segment = |segment| pb::TableSegment {
        segment,
        digest: vec![1; 32].into(),
        present: words.clone().into(),
        hashes: BlockHash([2; 32]).0.to_vec().into(),
    };
    let start = pb::TableStart { snapshot: Some(snapshot()), since_snapshot_id: String::new() };
    let message =
        pb::ReadTableResponse { start: Some(start), segments: vec![segment(0), segment(2)] };
    vec![message.encode_to_vec()]
}
