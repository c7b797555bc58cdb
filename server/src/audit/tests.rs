//! What the log promises: every edited byte is found, a cut end too, a torn record is closed, a full disk loses nothing in silence.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use proptest::prelude::*;

use super::{
    verify::{Found, verify},
    *,
};
use crate::storage::{Op, Verdict, Watcher};

fn who() -> Who {
    Who { name: "client alice/web1".into(), through: "janus router".into() }
}

fn event(number: u64) -> Event {
    Event::new(Action::Start).of_machine(&"alice/web1".parse().unwrap()).noting(number.to_string())
}

fn log_in(folder: &Path) -> Audit {
    Audit::new(Disk::default(), folder)
}

fn checked(folder: &Path, head: Head, noted: Option<BlockHash>) -> Found {
    verify(&Disk::default(), folder, head, noted, &mut |_, _| {}).unwrap()
}

/// Notes of all records, once the log was found to be whole.
fn notes(folder: &Path, head: Head) -> Vec<String> {
    let mut notes = Vec::new();
    let mut seen = |record: &Record, _: &[u8]| notes.push(record.note.clone());
    let found = verify(&Disk::default(), folder, head, None, &mut seen).unwrap();
    assert_eq!(found.bad, None);
    notes
}

fn audit_files(folder: &Path) -> Vec<PathBuf> {
    files(&Disk::default(), folder).unwrap()
}

#[test]
fn a_log_that_was_taken_away_is_not_written_in_silence() {
    let folder = tempfile::tempdir().unwrap();
    let log = log_in(folder.path());
    log.record(&who(), event(0)).unwrap();
    let path = audit_files(folder.path()).pop().unwrap();
    let aside = folder.path().join("aside");
    for take in [
        |path: &Path, _: &Path| fs::remove_file(path),
        |path: &Path, to: &Path| {
            fs::copy(path, to)?;
            fs::rename(to, path)
        },
    ] {
        let kept = folder.path().join("kept");
        fs::hard_link(&path, &kept).unwrap();
        take(&path, &aside).unwrap();
        let failed = log.record(&who(), event(1)).unwrap_err();
        assert!(matches!(failed, AuditError::Gone { .. }), "{failed}");
        assert!(log.warning().unwrap().contains("put it back"));
        // It was put back: nothing is lost.
        fs::rename(&kept, &path).unwrap();
        log.record(&who(), event(2)).unwrap();
        assert_eq!(log.warning(), None);
    }
    let head = log.head().unwrap();
    assert_eq!(notes(folder.path(), head), ["0", "1", "2", "1", "2"]);
}

/// A log of three files with a torn record in it.
fn small_log(folder: &Path) -> Head {
    let log = log_in(folder).rotating(900);
    for number in 0..4 {
        log.record(&who(), event(number)).unwrap();
    }
    drop(log);
    let last = audit_files(folder).pop().unwrap();
    let mut bytes = fs::read(&last).unwrap();
    bytes.extend_from_slice(b"{\"v\":1,\"n\":5,\"ms\":17");
    fs::write(&last, bytes).unwrap();
    let log = log_in(folder).rotating(900);
    for number in 4..7 {
        log.record(&who(), event(number)).unwrap();
    }
    assert!(audit_files(folder).len() > 2);
    log.head().unwrap()
}

#[test]
fn each_edited_byte_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let head = small_log(folder.path());
    let found = checked(folder.path(), head, Some(head.hash));
    assert_eq!((found.bad, found.torn, found.head), (None, 1, head));
    let mut tried = 0;
    for path in audit_files(folder.path()) {
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for edit in [whole[at] ^ 1, whole[at] ^ 0x20, b'\n', 0] {
                if edit == whole[at] {
                    continue;
                }
                let mut bytes = whole.clone();
                bytes[at] = edit;
                fs::write(&path, &bytes).unwrap();
                let bad = checked(folder.path(), head, None).bad;
                let bad = bad.unwrap_or_else(|| panic!("{} byte {at} -> {edit}", path.display()));
                let line = 1 + whole[..at].iter().filter(|byte| **byte == b'\n').count() as u64;
                // What a torn line was closed with is looked for from its beginning.
                assert!(bad.line == line || bad.line + 1 == line, "{bad:?} {line}");
                assert_eq!(bad.file, path);
                tried += 1;
            }
        }
        fs::write(&path, whole).unwrap();
    }
    println!("{tried} edits found");
    assert!(tried > 5000);
}

#[test]
fn a_cut_end_and_lost_files_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let head = small_log(folder.path());
    let files = audit_files(folder.path());
    let last = files.last().unwrap();
    let whole = fs::read(last).unwrap();
    for length in 0..whole.len() {
        fs::write(last, &whole[..length]).unwrap();
        assert!(checked(folder.path(), head, None).bad.is_some(), "cut to {length}");
    }
    // A server that begins on what was cut at the end of a line can't know; who has noted the head does.
    let line = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    fs::write(last, if line < whole.len() { &whole[..line] } else { &whole[..0] }).unwrap();
    let log = log_in(folder.path());
    log.record(&who(), event(99)).unwrap();
    let later = log.head().unwrap();
    assert_eq!(checked(folder.path(), later, None).bad, None);
    let bad = checked(folder.path(), later, Some(head.hash)).bad.unwrap();
    assert!(bad.what.contains("noted hash"), "{bad:?}");
    for missing in &files {
        let bytes = fs::read(missing).unwrap();
        // The one that was cut to nothing.
        if bytes.is_empty() {
            continue;
        }
        fs::remove_file(missing).unwrap();
        assert!(checked(folder.path(), later, None).bad.is_some(), "{}", missing.display());
        fs::write(missing, bytes).unwrap();
    }
}

#[test]
fn a_record_that_a_crash_tore_is_closed_by_one_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let log = log_in(folder.path());
    log.record(&who(), event(0)).unwrap();
    let path = audit_files(folder.path()).pop().unwrap();
    let first = fs::read(&path).unwrap().len();
    log.record(&who(), event(1)).unwrap();
    drop(log);
    let whole = fs::read(&path).unwrap();
    for length in first..=whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let log = log_in(folder.path());
        log.record(&who(), event(2)).unwrap();
        let head = log.head().unwrap();
        let found = checked(folder.path(), head, None);
        // Without its end of line alone a record is whole.
        let is_torn = length != first && length < whole.len() - 1;
        assert_eq!((found.bad, found.torn), (None, u64::from(is_torn)), "{length}");
        // Also by a program that comes later.
        drop(log);
        assert_eq!(log_in(folder.path()).head().unwrap(), head);
    }
    // Whole lines are no work of a crash.
    let mut edited = whole.clone();
    edited[first + 20] ^= 1;
    fs::write(&path, &edited).unwrap();
    let log = log_in(folder.path());
    log.record(&who(), event(3)).unwrap();
    let bad = checked(folder.path(), log.head().unwrap(), None).bad.unwrap();
    assert_eq!((bad.file, bad.line), (path.clone(), 2));
    drop(log);
    // The first record of a file that follows others.
    fs::write(&path, &whole).unwrap();
    let next = folder.path().join("audit-000000000003.jsonl");
    fs::write(&next, "{\"v\":1").unwrap();
    let log = log_in(folder.path());
    log.record(&who(), event(4)).unwrap();
    let found = checked(folder.path(), log.head().unwrap(), None);
    assert_eq!((found.bad, found.torn, found.head.number), (None, 1, 4));
}

/// Fails one operation, or all writes.
#[derive(Debug, Default)]
struct Failing {
    count: AtomicU64,
    /// Number of the operation that fails; 0: none.
    at: AtomicU64,
    is_full: AtomicU64,
}

impl Watcher for Failing {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        let number = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let is_write = matches!(op, Op::Write { .. });
        if self.is_full.load(Ordering::Relaxed) > 0 && is_write {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match number == self.at.load(Ordering::Relaxed) {
            // Half of it gets there.
            true if is_write => {
                Ok(Verdict::Short { written: 100, error: io::ErrorKind::StorageFull.into() })
            }
            true => Err(io::Error::other("the disk fails")),
            false => Ok(Verdict::Go),
        }
    }
}

#[test]
fn a_failure_at_any_operation_loses_no_record() {
    let run = |at: u64| {
        let folder = tempfile::tempdir().unwrap();
        let failing = Arc::new(Failing::default());
        failing.at.store(at, Ordering::Relaxed);
        let log = Audit::new(Disk::watched(failing.clone()), folder.path()).rotating(900);
        let mut failed = 0;
        for number in 0..6 {
            failed += u64::from(log.record(&who(), event(number)).is_err());
        }
        let _ = log.flush();
        log.flush().unwrap();
        assert_eq!(log.warning(), None);
        let head = log.head().unwrap();
        drop(log);
        let notes = notes(folder.path(), head);
        assert_eq!(notes, (0..6).map(|number| number.to_string()).collect::<Vec<_>>(), "at {at}");
        assert_eq!(log_in(folder.path()).head().unwrap(), head, "at {at}");
        (failing.count.load(Ordering::Relaxed), failed)
    };
    let (operations, failed) = run(0);
    assert_eq!(failed, 0);
    let failures: u64 = (1..=operations).map(|at| run(at).1).sum();
    println!("{operations} operations, {failures} of them kept a record waiting");
    assert!(failures > operations / 3);
}

#[test]
fn on_a_full_disk_records_wait_and_what_is_lost_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let failing = Arc::new(Failing::default());
    let log = Audit::new(Disk::watched(failing.clone()), folder.path());
    log.record(&who(), event(0)).unwrap();
    failing.is_full.store(1, Ordering::Relaxed);
    for number in 1..=MOST_WAITING as u64 + 7 {
        log.record(&who(), event(number)).unwrap_err();
    }
    let warning = log.warning().unwrap();
    assert!(warning.contains("1000 records wait in memory, 7 are lost"), "{warning}");
    failing.is_full.store(0, Ordering::Relaxed);
    log.flush().unwrap();
    assert_eq!(log.warning(), None);
    let head = log.head().unwrap();
    assert_eq!(head.number, MOST_WAITING as u64 + 2);
    let found = checked(folder.path(), head, None);
    assert_eq!(found.bad, None);
    assert!(found.lost[0].starts_with("7 records"), "{:?}", found.lost);
}

#[test]
fn openings_of_one_snapshot_are_one_record_for_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let log = log_in(folder.path());
    let opened = |note: &str| Event::new(Action::Open).noting(note);
    for note in ["a", "a", "b", "a"] {
        log.record(&who(), opened(note)).unwrap();
    }
    assert_eq!(notes(folder.path(), log.head().unwrap()), ["a", "b"]);
}

#[test]
fn two_servers_share_no_log() {
    let folder = tempfile::tempdir().unwrap();
    let log = log_in(folder.path());
    log.record(&who(), event(0)).unwrap();
    let other = log_in(folder.path());
    assert!(matches!(other.record(&who(), event(1)), Err(AuditError::Locked { .. })));
}

proptest! {
    #[test]
    fn any_bytes_are_a_record_or_not(bytes in prop::collection::vec(any::<u8>(), 0..300), with_hash: bool) {
        let mut line = bytes;
        if with_hash {
            let hash = blake3::hash(&line);
            line.extend_from_slice(format!(",\"hash\":\"{hash}\"}}\n").as_bytes());
        }
        let _ = record::parse(&line);
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("audit-000000000001.jsonl"), &line).unwrap();
        let log = log_in(folder.path());
        log.record(&who(), event(0)).unwrap();
        let _ = checked(folder.path(), log.head().unwrap(), None);
    }
}
