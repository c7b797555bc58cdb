use super::*;
use crate::journal::Answer;

const DAY: i64 = DAY_SECONDS;

/// A journal that says the same each time.
struct Says(Result<Changes, Distrust>);

impl Journal for Says {
    fn kind(&self) -> JournalKind {
        JournalKind::NtfsUsn
    }

    fn changes(&self, cursor: Option<&[u8]>) -> Answer {
        let changes = if cursor.is_some() { self.0.clone() } else { Err(Distrust::NoCursor) };
        Answer { changes, next: Some(b"next".to_vec()) }
    }
}

fn volume(start: u64, len: u64, says: Result<Changes, Distrust>) -> Journalled<'static> {
    Journalled { start, len, name: "1".into(), journal: Box::new(Says(says)) }
}

fn changes(changed: Ranges, free: Ranges) -> Result<Changes, Distrust> {
    Ok(Changes { changed, free })
}

/// Nothing has changed, and nothing is free.
fn nothing() -> Result<Changes, Distrust> {
    changes(Ranges::new(), Ranges::new())
}

fn known(memory: Option<Memory>, now: i64) -> Known<'static> {
    Known {
        disk: "d",
        memory,
        resized: None,
        kind: "",
        zeros: Ranges::new(),
        volumes: Vec::new(),
        now,
    }
}

/// What a first run leaves.
fn memory(journals: &[Journalled<'_>], policy: Policy) -> Memory {
    Reading::plan(known(None, 100 * DAY), journals, policy).memory
}

const MIB: u64 = 1 << 20;
const NO_AUDIT: Policy = Policy { full_compare_runs: 30, full_compare_days: 14, audit_percent: 0 };

#[test]
fn what_no_journal_speaks_for_is_read() {
    let journals = [volume(MIB, MIB, changes((0..4096).into(), (8192..20_000).into()))];
    let first = memory(&journals, NO_AUDIT);
    let reading = Reading::plan(known(Some(first), 100 * DAY), &journals, NO_AUDIT);
    assert_eq!(reading.heard[0].unread, Ok(MIB - 4096));
    let segment = reading.segment(0, 4 * MIB);
    let bits = |bits: SegmentBits| {
        (0..1024).filter(|b| bits[b / 64] >> (b % 64) & 1 == 1).collect::<Vec<_>>()
    };
    // Block 4 of the volume is free in part: it is neither free nor promised as a whole.
    let promised: Vec<usize> = (256..512).filter(|b| ![256, 258, 259, 260].contains(b)).collect();
    assert_eq!(bits(segment.promised), promised);
    assert_eq!(
        bits(segment.known),
        (256..512).filter(|b| ![256, 260].contains(b)).collect::<Vec<_>>()
    );
}

#[test]
fn zeros_come_before_promises_and_are_remembered() {
    let journals = [volume(0, 4 * MIB, nothing())];
    let first = memory(&journals, NO_AUDIT);
    let zeros = Known { zeros: (MIB..2 * MIB).into(), ..known(Some(first), 100 * DAY) };
    let reading = Reading::plan(zeros, &journals, NO_AUDIT);
    let segment = reading.segment(0, 4 * MIB);
    assert_eq!((segment.zeros[4], segment.promised[4], segment.known[4]), (u64::MAX, 0, 0));
    assert_eq!((segment.zeros[3], segment.promised[3]), (0, u64::MAX));
    assert!(reading.memory.skipped && !segment.word(3).doubts_zeros);
    let next = Reading::plan(known(Some(reading.memory), 100 * DAY), &journals, NO_AUDIT);
    assert!(next.segment(0, 4 * MIB).word(3).doubts_zeros && !next.memory.skipped);
}

#[test]
fn every_reason_to_compare_all_is_told_and_counts_as_one_comparison() {
    let journals = [volume(0, MIB, nothing())];
    let told = |memory: Option<Memory>, now: i64| {
        let reading = Reading::plan(known(memory, now), &journals, NO_AUDIT);
        (reading.heard[0].unread.clone().err(), reading.memory)
    };
    let (why, first) = told(None, 100 * DAY);
    assert_eq!(why, Some(Distrust::NoCursor));
    assert_eq!((first.runs, first.compared), (0, 100 * DAY));
    let due = Some(Distrust::Due { runs: 30, days: 14 });
    let (why, second) = told(Some(first.clone()), 114 * DAY - 1);
    assert_eq!((why, second.runs, second.compared), (None, 1, 100 * DAY));
    assert_eq!(told(Some(second.clone()), 114 * DAY).0, due);
    assert_eq!(told(Some(second.clone()), 99 * DAY).0, due, "a clock that went back");
    assert_eq!(told(Some(Memory { runs: 28, ..second.clone() }), 101 * DAY).0, None);
    let (why, after) = told(Some(Memory { runs: 29, ..second.clone() }), 101 * DAY);
    assert_eq!((why, after.runs, after.compared), (due, 0, 101 * DAY));
    let off = told(Some(Memory { missed: Some((4096, 0)), ..second }), 101 * DAY).0.unwrap();
    assert!(off.to_string().contains("byte 4096 on 1970-01-01"), "{off}");
}

/// A hash that stands for what isn't read must be of the same bytes as those of what is.
#[test]
fn what_was_sealed_otherwise_is_read_as_a_whole() {
    let journals = [volume(0, MIB, nothing())];
    let plan = |memory, kind| {
        Reading::plan(Known { kind, ..known(memory, 100 * DAY) }, &journals, NO_AUDIT)
    };
    let mut memory = None;
    let kinds = ["", "", "one", "one", "two", "", ""];
    let reasons: Vec<_> = kinds
        .iter()
        .map(|kind| {
            // As the cache keeps it.
            let kept = memory.take().and_then(|memory: Memory| Memory::parse(&memory.to_bytes()));
            let reading = plan(kept, kind);
            memory = Some(reading.memory.clone());
            (reading.has_promises(), reading.distrust)
        })
        .collect();
    let (believed, other) = ((true, None), (false, Some(Distrust::OtherKind)));
    let first = (false, Some(Distrust::NoCursor));
    let expected =
        [&first, &believed, &other, &believed, &other, &other, &believed].map(Clone::clone);
    assert_eq!(reasons, expected);
}

#[test]
fn a_volume_that_moved_or_grew_or_whose_journal_does_not_know_is_read() {
    let first = memory(&[volume(0, MIB, nothing())], NO_AUDIT);
    let grown = [volume(0, 2 * MIB, nothing())];
    let reading = Reading::plan(known(Some(first.clone()), 100 * DAY), &grown, NO_AUDIT);
    assert_eq!(reading.heard[0].unread, Err(Distrust::Resized { old: MIB, new: 2 * MIB }));
    assert!(!reading.has_promises());
    let moved = [volume(4096, MIB, nothing()), volume(2 * MIB, MIB, Err(Distrust::NoJournal))];
    let reading = Reading::plan(known(Some(first), 100 * DAY), &moved, NO_AUDIT);
    let unread: Vec<_> = reading.heard.iter().map(|heard| heard.unread.clone()).collect();
    assert_eq!(unread, [Err(Distrust::NoCursor), Err(Distrust::NoCursor)]);
    assert!(!reading.has_promises());
}

#[test]
fn audits_reach_every_promised_piece_once_in_their_turns() {
    let policy = Policy { full_compare_runs: 0, full_compare_days: 0, audit_percent: 5 };
    let journals = [volume(0, 64 * MIB, nothing())];
    let mut memory = memory(&journals, policy);
    let mut read = vec![0; 256];
    for _ in 0..40 {
        let reading = Reading::plan(known(Some(memory), 100 * DAY), &journals, policy);
        let pieces = (0..256).filter(|piece| {
            reading.segment(piece / 16, 64 * MIB).known[(piece % 16) as usize] == 0
        });
        let pieces: Vec<u64> = pieces.collect();
        assert!(pieces.len() < 60, "about a twentieth, not {pieces:?}");
        pieces.iter().for_each(|piece| read[*piece as usize] += 1);
        memory = reading.memory;
    }
    // Wherever one begins to count.
    assert!(read.iter().all(|times| *times == 2), "{read:?}");
}

#[test]
fn promises_count_from_one_cursor_and_end_with_a_miss() {
    let journals = [volume(0, MIB, nothing())];
    let first = memory(&journals, NO_AUDIT);
    let reading = Reading::plan(known(Some(first), 100 * DAY), &journals, NO_AUDIT);
    let cursor = Some(BlockHash([7; 32]));
    let planned = Planned::new(reading, cursor);
    assert!(planned.now(cursor).has_promises());
    assert_eq!(planned.now(None).distrust, Some(Distrust::Reconciled));
    assert!(!planned.now(None).has_promises());
    let kept = Memory::parse(&planned.cursor()).unwrap();
    assert_eq!((kept.missed, kept.volumes.len()), (None, 1));
    planned.miss(8192, 7);
    assert_eq!(planned.now(cursor).distrust, Some(Distrust::Missed { offset: 8192 }));
    let kept = Memory::parse(&planned.cursor()).unwrap();
    assert_eq!((kept.missed, kept.volumes.len()), (Some((8192, 7)), 0));
}

#[test]
fn only_whole_blocks_get_a_bit_but_a_short_last_one_is_whole() {
    let size = (4 << 20) + 8192 + 512;
    let set: Ranges = [4095..12288, (4 << 20) + 4096..size].into_iter().collect();
    assert_eq!(segment_bits(&set, 0, size)[0], 0b110);
    assert_eq!(segment_bits(&set, 1, size)[0], 0b110);
    let cut = Ranges::from((4 << 20) + 4096..size - 1);
    assert_eq!(segment_bits(&cut, 1, size)[0], 0b010);
    assert_eq!(segment_bits(&Ranges::from(0..size), 0, size), [u64::MAX; SEGMENT_WORDS]);
}
