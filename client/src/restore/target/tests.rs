use super::*;

const SNAPSHOT: &str = "0190c8a2-0000-7000-8000-000000000001";
const OTHER: &str = "0190c8a2-0000-7000-8000-000000000002";

fn open(path: &Path, size: u64, force: bool) -> Result<Target, TargetError> {
    Target::open(
        path,
        &Place::whole(size, 512, TargetFormat::Raw),
        SNAPSHOT,
        Wish { force, ..Wish::default() },
    )
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_file_appears_only_when_it_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let target = open(&path, 8192 + 512, false).unwrap();
    assert_eq!(target.content(), Content::Zeros);
    drop(target);
    assert!(names(dir.path()).is_empty(), "nothing was written");
    let target = open(&path, 8192 + 512, false).unwrap();
    target.write(1, &[5; 4096]).unwrap();
    assert!(!path.exists());
    drop(target);
    // What was written is kept, and found again.
    assert_eq!(names(dir.path()), [format!(".disk.img.{SNAPSHOT}.partial")]);
    let target = open(&path, 8192 + 512, false).unwrap();
    assert!(target.is_resumed() && target.content() == Content::Old);
    target.publish().unwrap();
    drop(target);
    assert_eq!(names(dir.path()), ["disk.img"]);
    let content = fs::read(&path).unwrap();
    assert_eq!((content.len(), content[4095], content[4096], content[8192]), (8704, 0, 5, 0));
    assert!(matches!(open(&path, 4096, false), Err(TargetError::Exists(_))));
    let folder = open(dir.path(), 4096, true).unwrap_err();
    assert!(folder.to_string().contains("/disk.raw"), "{folder}");
    let target = open(&path, 4096, true).unwrap();
    assert_eq!(target.content(), Content::Old);
    target.publish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
}

#[test]
fn a_name_taken_meanwhile_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let target = open(&path, 4096, false).unwrap();
    fs::write(&path, "mine").unwrap();
    assert!(matches!(target.publish(), Err(TargetError::Exists(_))));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}

#[test]
fn two_restores_to_one_place_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, [7; 4096]).unwrap();
    let of = |snapshot: &str, in_place| {
        let wish = Wish { force: true, in_place, full: false };
        Target::open(&path, &Place::whole(4096, 512, TargetFormat::Raw), snapshot, wish)
    };
    let first = of(SNAPSHOT, false).unwrap();
    for (snapshot, in_place) in [(SNAPSHOT, false), (OTHER, false), (OTHER, true)] {
        let busy = of(snapshot, in_place).unwrap_err();
        assert!(matches!(busy, TargetError::Busy { .. }), "{busy}");
    }
    first.write(0, &[8; 4096]).unwrap();
    drop(first);
    // The other one's leftover goes when this one is complete.
    let second = of(OTHER, false).unwrap();
    assert_eq!(names(dir.path()).len(), 3);
    second.publish().unwrap();
    drop(second);
    assert_eq!(names(dir.path()), ["disk.img"]);
    let in_place = of(SNAPSHOT, true).unwrap();
    assert!(matches!(of(OTHER, false), Err(TargetError::Busy { .. })));
    assert!(matches!(of(OTHER, true), Err(TargetError::Busy { .. })));
    in_place.write(0, &[9; 4096]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [9; 4096]);
}

#[test]
fn zeros_in_a_file_are_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let target = open(&path, 1 << 20, false).unwrap();
    target.write(0, &vec![1; 1 << 20]).unwrap();
    target.zero(16, 16).unwrap();
    target.publish().unwrap();
    let content = fs::read(&path).unwrap();
    assert!(content[..65536].iter().all(|byte| *byte == 1));
    assert!(content[65536..131_072].iter().all(|byte| *byte == 0));
    assert!(content[131_072..].iter().all(|byte| *byte == 1));
}
