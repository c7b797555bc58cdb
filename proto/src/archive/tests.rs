//! Names, indexes, manifests, and a file read out of a store.

use std::sync::Arc;

use bytes::Bytes;
use object_store::{memory::InMemory, path::Path};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    index::{Index, Packer, unpack},
    manifest::RunFacts,
    names::{Edition, Kind, MachinePlace},
    reader::{Frames, Packed, Reading, fetch_index},
    *,
};
use crate::{
    ids::{BackupId, BlockHash, SnapshotId},
    image::Format,
    storage::Elsewhere,
};

fn place() -> MachinePlace {
    let prefix = Path::from("of/us");
    MachinePlace::new(&prefix, &"server-a".parse().unwrap(), &"alice/laptop".parse().unwrap())
}

fn store() -> Store {
    Store::new(Arc::new(InMemory::new()), Path::from("of/us"), &CancellationToken::new())
        .with_patience(Duration::ZERO)
}

#[test]
fn names_tell_what_belongs_to_which_snapshot() {
    let (place, snapshot) = (place(), SnapshotId::new());
    let name = place.file(
        &"sda".parse().unwrap(),
        Edition { snapshot, number: 0 },
        Kind::Image(Format::Vhdx),
    );
    let sum = BlockHash([0xab; 32]);
    let (part, index) = (name.part(12, &sum), name.index(&sum));
    let folder = "of/us/server-a/alice/laptop";
    assert_eq!(
        part.as_ref(),
        format!("{folder}/disks/sda/{snapshot}.vhdx.0000012.abababababababab.zst")
    );
    assert_eq!(
        index.as_ref(),
        format!("{folder}/disks/sda/{snapshot}.vhdx.index.abababababababab")
    );
    let anew = place.file(&"sda".parse().unwrap(), Edition { snapshot, number: 2 }, Kind::Table);
    assert_eq!(anew.as_str(), format!("{snapshot}_2.table"));
    for object in [&part, &index, &anew.index(&sum)] {
        assert_eq!(place.owner(object), Some(snapshot));
    }
    for other in
        ["of/us/server-a/alice/laptop/disks/sda/readme.txt", "of/us/server-a/alice/laptop/runs/x"]
    {
        assert_eq!(place.owner(&Path::from(other)), None, "{other}");
    }
    let table = place.file(&"sda".parse().unwrap(), Edition { snapshot, number: 0 }, Kind::Table);
    let all = [part.clone(), index, table.part(0, &BlockHash([1; 32]))];
    let all = all.into_iter().map(|object| (object, 5)).collect();
    let parts: Vec<_> = name.parts_in(&all).collect();
    assert_eq!(parts, [(&part, &5)]);
    let run = BackupId::new();
    let manifest = place.manifest(1_700_000_000_123, run, None);
    assert_eq!(manifest.as_ref(), format!("{folder}/runs/001700000000123-{run}.json"));
    let alone = place.manifest(1_700_000_000_123, run, Some(&"sda".parse().unwrap()));
    for manifest in [&manifest, &alone] {
        assert!(place.is_of(manifest, run) && !place.is_of(manifest, BackupId::new()));
    }
    assert!(!place.is_of(&part, run));
}

/// A file of some frames in the store, with its index.
async fn file(store: &Store, content: &[u8]) -> (names::FileName, FileEntry) {
    let name = place().file(
        &"sda".parse().unwrap(),
        Edition { snapshot: SnapshotId::new(), number: 0 },
        Kind::Table,
    );
    let (mut index, mut packer) = (Index::new(content.len() as u64), Packer::default());
    let frames: Vec<_> = content.chunks(FRAME_BYTES as usize).collect();
    for part in frames.chunks(PART_FRAMES as usize) {
        part.iter().for_each(|frame| packer.push(frame).unwrap());
        let (bytes, lengths) = packer.take();
        let sum = BlockHash(*blake3::hash(&bytes).as_bytes());
        store.put(&name.part(index.part_count(), &sum), &bytes.into()).await.unwrap();
        index.push(sum, &lengths);
    }
    let bytes = Bytes::from(index.encode());
    let index_sum = BlockHash(*blake3::hash(&bytes).as_bytes());
    store.put(&name.index(&index_sum), &bytes).await.unwrap();
    let (length_bytes, stored_bytes) = (content.len() as u64, index.stored_bytes());
    let entry = FileEntry { length_bytes, stored_bytes, index_sum };
    (name, entry)
}

/// Zeros but for some bytes in each third frame, and a last one that is short.
fn content(frames: usize) -> Vec<u8> {
    let mut content = vec![0; frames * FRAME_BYTES as usize - 777];
    let stride = 3 * FRAME_BYTES as usize;
    for (at, byte) in content.iter_mut().enumerate().filter(|(at, _)| at % stride < 5000) {
        *byte = (at / 7) as u8;
    }
    content
}

#[test]
fn a_file_in_parts_reads_as_the_file() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, content) = (store(), content(PART_FRAMES as usize + 3));
    let (name, entry) = runtime.block_on(file(&store, &content));
    assert!(entry.stored_bytes < 200 << 10, "zeros take {} bytes", entry.stored_bytes);
    for reading in [Reading::Frames, Reading::Whole] {
        let index = Arc::new(runtime.block_on(fetch_index(&store, &name, &entry)).unwrap());
        assert_eq!((index.part_count(), index.stored_bytes()), (2, entry.stored_bytes));
        let frames = Frames::new(8);
        let packed =
            Arc::new(Packed::new(&store, runtime.handle(), name.clone(), index, &frames, reading));
        for range in
            [0..1, 5000..2 << 20, (31 << 20) + 5..(33 << 20) + 9, content.len() - 1..content.len()]
        {
            let mut buffer = vec![1; range.len()];
            packed.read_exact_at(&mut buffer, range.start as u64).unwrap();
            assert!(buffer == content[range.clone()], "{range:?}");
        }
        let past = packed.read_exact_at(&mut [0; 2], content.len() as u64 - 1);
        assert_eq!(past.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(packed.read_rest().unwrap().is_empty());
    }
}

#[test]
fn a_part_that_is_not_what_was_written_is_named() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, content) = (store(), content(5));
    let (name, entry) = runtime.block_on(file(&store, &content));
    let index = Arc::new(runtime.block_on(fetch_index(&store, &name, &entry)).unwrap());
    let part = name.part(0, index.sum(0).unwrap());
    let mut bytes = runtime.block_on(store.get(&part, 1 << 20)).unwrap().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    runtime.block_on(store.put(&part, &bytes.clone().into())).unwrap();
    let packed = |reading| {
        let frames = Frames::new(8);
        Packed::new(&store, runtime.handle(), name.clone(), index.clone(), &frames, reading)
    };
    let wrong = packed(Reading::Whole).read_rest().unwrap();
    assert!(wrong.len() == 1 && wrong[0].to_string().contains(part.as_ref()), "{wrong:?}");
    // Shorter than it was, and gone.
    bytes.truncate(last);
    runtime.block_on(store.put(&part, &bytes.into())).unwrap();
    let read = Arc::new(packed(Reading::Frames)).read_exact_at(&mut [0; 9], 4 << 20).unwrap_err();
    assert_eq!(read.kind(), io::ErrorKind::InvalidData, "{read}");
    runtime.block_on(store.delete(&part)).unwrap();
    runtime.block_on(store.delete(&part)).unwrap();
    let wrong = packed(Reading::Whole).read_rest().unwrap();
    assert!(matches!(wrong[..], [ArchiveError::Missing { .. }]), "{wrong:?}");
    let other = FileEntry { index_sum: BlockHash([0; 32]), ..entry };
    let refused = runtime.block_on(fetch_index(&store, &name, &other)).unwrap_err();
    assert!(refused.is_damage(), "{refused}");
}

#[test]
fn an_index_has_one_size_and_nothing_else_is_one() {
    let mut index = Index::new(34 << 20);
    index.push(BlockHash([1; 32]), &[7; 32]);
    index.push(BlockHash([2; 32]), &[9; 2]);
    let bytes = index.encode();
    assert_eq!(Some(bytes.len() as u64), Index::encoded_bytes(34 << 20));
    assert_eq!(Index::decode(34 << 20, &bytes).unwrap(), index);
    assert_eq!((index.frames_of(1), index.part_bytes(1)), (32..34, 18));
    assert!(Index::decode(33 << 20, &bytes).is_err());
    assert!(Index::decode(34 << 20, &bytes[1..]).is_err());
    assert!(Index::decode(u64::MAX, &bytes).is_err());
    for (at, value) in [(0, 0), (8, 2), (14, 1), (20, 1), (24, 1), (64, 0), (67, 1)] {
        let mut wrong = bytes.clone();
        wrong[at] = value;
        assert!(Index::decode(34 << 20, &wrong).is_err(), "byte {at}");
    }
    assert!(unpack(&[1, 2, 3], 5).is_err());
    let mut packer = Packer::default();
    packer.push(&[0; 9]).unwrap();
    let (frame, _) = packer.take();
    assert_eq!(unpack(&frame, 9).unwrap(), [0; 9]);
    assert!(unpack(&frame, 8).is_err() && unpack(&frame, 10).is_err());
}

fn manifest() -> Manifest {
    let file =
        FileEntry { length_bytes: 5 << 20, stored_bytes: 4096, index_sum: BlockHash([3; 32]) };
    let link = Link {
        snapshot: SnapshotId::new(),
        edition: 0,
        data_write: Uuid::now_v7(),
        virtual_disk: Uuid::new_v4(),
        image: file,
        table: file,
    };
    let entry = DiskEntry {
        disk: "sda".parse().unwrap(),
        size_bytes: 1 << 30,
        logical_sector_bytes: 512,
        table_digest: BlockHash([5; 32]),
        consistency: 1,
        skipped_bytes: 0,
        format: Format::Vhdx,
        links: vec![link],
    };
    let facts = RunFacts {
        server: "server-a".parse().unwrap(),
        run: BackupId::new(),
        machine: "alice/laptop".parse().unwrap(),
        committed_ms: 1_700_000_000_000,
        seal: vec![1, 2],
    };
    Manifest::new(facts, vec![entry])
}

#[test]
fn a_manifest_is_only_told_from_its_own_bytes() {
    let good = manifest();
    let bytes = good.to_bytes().unwrap();
    assert_eq!(Manifest::parse("x", &bytes).unwrap(), good);
    assert_eq!(good.seal(), [1, 2]);
    let mut wrong = bytes.clone();
    wrong[40] ^= 1;
    assert!(Manifest::parse("x", &wrong).unwrap_err().is_damage());
    let text = String::from_utf8(crate::summed::checked(&bytes).unwrap().to_vec()).unwrap();
    let newer = text.replace("\"format\": 1", "\"format\": 2");
    let newer = Manifest::parse("x", &crate::summed::with_sum(newer.into()));
    assert!(matches!(newer, Err(ArchiveError::Newer { format: 2, .. })), "{newer:?}");
    for (from, to) in [
        ("1073741824", "1073741825"),
        ("\"logical_sector_bytes\": 512", "\"logical_sector_bytes\": 513"),
        ("\"disk\": \"sda\"", "\"disk\": \"../sda\""),
        ("\"length_bytes\": 5242880", "\"length_bytes\": 18446744073709551615"),
        ("\"kind\"", "\"kinds\""),
    ] {
        assert!(text.contains(from), "{from}");
        let wrong = crate::summed::with_sum(text.replace(from, to).into());
        assert!(Manifest::parse("x", &wrong).is_err(), "{to}");
    }
    let changes: [fn(&mut Manifest); 4] = [
        |wrong| wrong.disks.clear(),
        |wrong| wrong.disks.push(wrong.disks[0].clone()),
        |wrong| wrong.client_seal = "xyz".into(),
        |wrong| wrong.committed_ms = -1,
    ];
    for change in changes {
        let mut wrong = good.clone();
        change(&mut wrong);
        assert!(wrong.to_bytes().is_err(), "{wrong:?}");
    }
}

#[tokio::test]
async fn a_run_is_written_once_and_read_where_it_lies() {
    let (store, place, run) = (store(), place(), manifest());
    let object = place.manifest(run.committed_ms, run.run, None);
    let bytes = Bytes::from(run.to_bytes().unwrap());
    store.create(&object, &bytes).await.unwrap();
    // The answer was lost, and it is tried again.
    store.create(&object, &bytes).await.unwrap();
    let other = Bytes::from(manifest().to_bytes().unwrap());
    let occupied = store.create(&object, &other).await;
    assert!(matches!(occupied, Err(ArchiveError::Occupied { .. })), "{occupied:?}");
    let elsewhere = place.manifest(1, run.run, None);
    store.put(&elsewhere, &bytes).await.unwrap();
    let (server, machine) = (run.server.clone(), run.machine.clone());
    assert_eq!(
        runs::machines(&store, None, None).await.unwrap(),
        [(server.clone(), machine.clone())]
    );
    let listed = runs::runs(&store, &server, &machine).await.unwrap();
    assert!(listed[0].manifest.as_ref().unwrap_err().is_damage(), "{listed:?}");
    assert_eq!(listed[1].manifest.as_ref().unwrap(), &run);
}

#[test]
fn only_urls_of_stores_are_places() {
    for wrong in [
        "",
        "s3:/x",
        "http://x/y",
        "file://x",
        "s3://",
        "s3://id:secret@bucket/",
        "s3://a/b?c",
        "gs://a/../b",
    ] {
        assert!(Place::new(wrong).check().is_err(), "{wrong}");
    }
    for good in ["s3://bucket", "s3://bucket/a/b/", "gs://b/p", "az://c/p", "file:///mnt/x"] {
        Place::new(good).check().unwrap();
    }
    let secret = vec![("AWS_SECRET_ACCESS_KEY".to_owned(), "xyzzy".to_owned())];
    let place = Place { options: secret, ..Place::new("s3://bucket") };
    assert!(!format!("{place:?}").contains("xyzzy"));
}
