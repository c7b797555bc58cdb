use std::{fs, path::Path};

use janus_proto::hash::zero_segment;

use super::{
    super::{Place, TargetFormat, target::Wish},
    *,
};
use crate::progress::Progress;

const SNAPSHOT: &str = "0190c8a2-0000-7000-8000-000000000001";
const SIZE: u64 = 3 * SEGMENT_BYTES + 4096 + 512;

fn place() -> Place {
    Place::whole(SIZE, 512, TargetFormat::Raw)
}

/// Bytes that differ from place to place.
fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 4096 % 251 + at % 7 + 1) as u8).collect()
}

fn digests(content: &[u8]) -> Arc<[BlockHash]> {
    let digest = |segment: &[u8]| {
        let mut hashes = Vec::new();
        hash_blocks(segment, &mut hashes);
        segment_digest(&hashes)
    };
    content.chunks(SEGMENT_BYTES as usize).map(digest).collect()
}

/// Surveys what is at `path`; the parts that are left to fetch, by their segments, and what was counted.
fn survey(path: &Path, wish: Wish, wanted: &[u8]) -> (Vec<Part>, [u64; 5], Arc<Target>) {
    let target = Arc::new(Target::open(path, &place(), SNAPSHOT, wish).unwrap());
    let counts = Arc::new(Counts::new(Progress::new(SIZE)));
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    let parts = runtime.block_on(async {
        let mut found =
            Survey::new(&target, &digests(wanted), SIZE, place().segments(), &counts).start(2);
        let mut parts = Vec::new();
        while let Some(part) = found.parts.recv().await {
            parts.push(part);
        }
        found.finish().await.unwrap();
        parts
    });
    let mut parts = parts;
    parts.sort_by_key(|part| part.segment);
    (parts, counts.all(), target)
}

fn segments(parts: &[Part]) -> Vec<u64> {
    parts.iter().map(|part| part.segment).collect()
}

#[test]
fn what_is_right_already_is_left_alone_and_zeros_are_made_here() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut wanted = content();
    fs::write(&path, &wanted).unwrap();
    // One block of the second segment, and all of the third are zeros now; the short end differs.
    wanted[SEGMENT_BYTES as usize + 8192] ^= 1;
    wanted[2 * SEGMENT_BYTES as usize..3 * SEGMENT_BYTES as usize].fill(0);
    wanted[SIZE as usize - 1] ^= 1;
    let wish = Wish { force: true, in_place: true, full: false };
    let (parts, [read, .., verified, _], target) = survey(&path, wish, &wanted);
    assert_eq!(segments(&parts), [1, 3]);
    assert!(parts.iter().all(|part| part.has_content));
    assert_eq!((read, verified), (SIZE, 2 * SEGMENT_BYTES));
    drop(target);
    let now = fs::read(&path).unwrap();
    assert!(now[2 * SEGMENT_BYTES as usize..3 * SEGMENT_BYTES as usize].iter().all(|b| *b == 0));
    // Unread, all is wanted but what is zeros.
    let (parts, [read, .., verified, _], _) = survey(&path, Wish { full: true, ..wish }, &wanted);
    assert_eq!((segments(&parts), read, verified), (vec![0, 1, 3], 0, SEGMENT_BYTES));
}

#[test]
fn a_new_file_needs_what_is_not_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let mut wanted = content();
    wanted[..SEGMENT_BYTES as usize].fill(0);
    assert_eq!(digests(&wanted)[0], zero_segment());
    let (parts, [read, .., verified, _], _) =
        survey(&dir.path().join("disk"), Wish::default(), &wanted);
    assert_eq!((segments(&parts), read, verified), (vec![1, 2, 3], 0, SEGMENT_BYTES));
    assert!(parts.iter().all(|part| !part.has_content));
}

#[test]
fn a_file_that_is_replaced_gives_its_blocks_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let wanted = content();
    // Shorter than the disk, and one segment of it differs.
    let mut old = wanted[..2 * SEGMENT_BYTES as usize + 4096].to_vec();
    old[5] ^= 1;
    fs::write(&path, &old).unwrap();
    let wish = Wish { force: true, ..Wish::default() };
    let (parts, [_, .., verified, _], target) = survey(&path, wish, &wanted);
    assert_eq!((segments(&parts), verified), (vec![0, 2, 3], SEGMENT_BYTES));
    assert_eq!(
        parts.iter().map(|part| part.has_content).collect::<Vec<_>>(),
        [true, true, false],
        "past its end are zeros"
    );
    assert_eq!(fs::read(&path).unwrap(), old);
    target.publish().unwrap();
    let now = fs::read(&path).unwrap();
    assert!(now.len() as u64 == SIZE && now[..old.len()] == old[..]);
}

#[test]
fn of_a_part_of_a_disk_its_own_segments_are_compared_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    let wanted = content();
    // From the middle of the first segment to the middle of a block in the third.
    let window = SEGMENT_BYTES - 8192..2 * SEGMENT_BYTES + 4096 + 512;
    let inside = window.start as usize..window.end as usize;
    fs::write(&path, &wanted[inside.clone()]).unwrap();
    let place = Place { window, ..place() };
    let wish = Wish { force: true, in_place: true, full: false };
    let target = Arc::new(Target::open(&path, &place, SNAPSHOT, wish).unwrap());
    let counts = Arc::new(Counts::new(Progress::new(SIZE)));
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    let mut parts: Vec<Part> = runtime.block_on(async {
        let survey = Survey::new(&target, &digests(&wanted), SIZE, place.segments(), &counts);
        let mut found = survey.start(1);
        let mut parts = Vec::new();
        while let Some(part) = found.parts.recv().await {
            parts.push(part);
        }
        parts
    });
    parts.sort_by_key(|part| part.segment);
    // The second is right; of the others only blocks outside, and the one at the end, are not known.
    assert_eq!(segments(&parts), [0, 2]);
    let known = |part: &Part| -> Vec<u64> {
        let blocks = part.blocks();
        let is_known = |block: &u64| {
            let start = (*block * 4096) as usize;
            let mut hash = Vec::new();
            hash_blocks(&wanted[start..start + 4096], &mut hash);
            part.held(*block) == hash[0]
        };
        blocks.filter(is_known).collect()
    };
    assert_eq!(known(&parts[0]), [1022, 1023]);
    assert_eq!(known(&parts[1]), [2048]);
    for part in &parts {
        let blocks = part.blocks();
        let all = blocks.start as usize * 4096..(blocks.end as usize * 4096).min(wanted.len());
        target.write(blocks.start, &wanted[all]).unwrap();
    }
    target.zero(0, 10).unwrap();
    assert!(fs::read(&path).unwrap() == wanted[inside], "what is outside was not written");
}
