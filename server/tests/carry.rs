//! Runs carried by hand from one store to another: exact, continued where a chain is, refused where something is wrong.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use chains::{Content, Model, changed};
use janus_proto::carried::{CarriedDisk, CarriedError, Manifest};
use janus_server::{
    carry::{self, CarryError, Imported, NewRun},
    chain::Run,
    image::Format,
    runs::RunError,
    storage::Disk,
};
use readers::{INSTALL_7Z, assert_same, libvhdi, run as read, seven_zip};
use xtask::packages;

mod chains;
mod readers;

const MIB: usize = 1 << 20;

/// A store with a chain of three runs of two disks, and the contents of the newest.
struct Scene {
    base: tempfile::TempDir,
    model: Model,
    contents: [(&'static str, Content); 2],
    newest: Arc<Run>,
}

impl Scene {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let store = base.path().join("from");
        let mut model = Model::new(&store);
        let mut contents = [
            ("sda", changed(&vec![0; 17 * MIB + 512], &[(0, 700, 1), (3000, 1200, 2)])),
            ("sdb", changed(&vec![0; 5 * MIB], &[(100, 900, 3)])),
        ];
        model.backup(&contents);
        for seed in 4..6 {
            let change =
                |content: &Content| changed(content, &[(seed * 31, 40, seed), (seed * 100, 30, 0)]);
            contents = contents.map(|(name, content)| (name, change(&content)));
            model.backup(&contents);
        }
        let newest = model.runs.machine(&model.key).unwrap().snapshots()[0].run.clone();
        Self { base, model, contents, newest }
    }

    fn folder(&self) -> PathBuf {
        self.base.path().join("carried")
    }

    /// The newest run in a folder.
    fn export(&self) -> Manifest {
        carry::export(&self.model.runs, &self.newest, &self.folder(), &|_, _| true).unwrap()
    }

    /// A store that holds nothing yet.
    fn other(&self, name: &str, format: Format) -> Model {
        Model::of(format, &self.base.path().join(name))
    }
}

/// What a folder holds.
fn carried(folder: &Path) -> Result<NewRun, CarryError> {
    let storage = Disk::default();
    NewRun::carried(&storage, folder, &Manifest::read(&storage, folder)?)
}

fn import(model: &Model, folder: &Path) -> Result<Imported, CarryError> {
    carry::import(&model.runs, &carried(folder)?, &|_, _| true)
}

/// Notes what an import must have made.
fn expect(model: &mut Model, run: &Run, contents: &[(&str, Content)]) {
    for (snapshot, (_, content)) in run.snapshots.iter().zip(contents) {
        model.contents.insert(snapshot.id, content.clone());
        model.live.insert(snapshot.id);
    }
}

fn data_bytes(contents: &[(&str, Content)]) -> u64 {
    let blocks = contents.iter().flat_map(|(_, content)| content.chunks(4096));
    blocks.filter(|block| block.iter().any(|byte| *byte != 0)).map(|block| block.len() as u64).sum()
}

#[test]
fn a_run_is_carried_to_an_empty_store_and_backed_up_on() {
    let scene = Scene::new();
    let manifest = scene.export();
    for format in Format::ALL {
        let mut other = scene.other(format.extension(), format);
        let imported = import(&other, &scene.folder()).unwrap();
        assert!(!imported.was_here && !imported.went_on);
        assert_eq!(imported.written_bytes, data_bytes(&scene.contents));
        let run = &imported.run;
        assert_eq!((run.committed_ms, run.sequence), (scene.newest.committed_ms, 1));
        for (snapshot, (was, entry)) in
            run.snapshots.iter().zip(scene.newest.snapshots.iter().zip(&manifest.disks))
        {
            assert_ne!(snapshot.id, was.id, "an id is in one store only");
            assert_eq!(
                (snapshot.table_digest, entry.table_digest),
                (was.table_digest, was.table_digest)
            );
            assert_eq!(snapshot.parent, None);
            assert!(snapshot.image.ends_with(format.extension()));
        }
        let counter = |model: &Model| model.runs.machine(&model.key).unwrap().use_counter();
        assert_eq!(counter(&other), 0, "an import is no use");
        expect(&mut other, run, &scene.contents);
        other.check();
        let again = import(&other, &scene.folder()).unwrap();
        assert!(again.was_here && again.run.backup == run.backup);
        // It stands a restart, and the next backup is a delta.
        other.reopen();
        other.check();
        let [(name, content), (other_name, rest)] = scene.contents.clone();
        let next = [(name, changed(&content, &[(5, 5, 55)])), (other_name, rest)];
        let next = other.backup(&next);
        assert_eq!(next.snapshots[0].parent, Some(run.snapshots[0].id));
        assert_eq!(counter(&other), 1);
        other.check();
        other.assert_clean();
    }
}

#[test]
fn outside_readers_read_what_is_carried_and_what_was_imported() {
    let scene = Scene::new();
    scene.export();
    let padded = |content: &Content| {
        let mut bytes = content.to_vec();
        bytes.resize(content.len().next_multiple_of(4096), 0);
        bytes
    };
    let check = |image: &Path, content: &Content, what: &str| {
        let expected = padded(content);
        assert_same(&read(&mut seven_zip(image), INSTALL_7Z).stdout, &expected, what);
        assert_same(&libvhdi(&[image.to_owned()], ""), &expected, what);
        let raw = scene.base.path().join("qemu.raw");
        let format = if image.extension().is_some_and(|e| e == "vhd") { "vpc" } else { "vhdx" };
        let mut qemu = std::process::Command::new("qemu-img");
        qemu.args(["convert", "-O", "raw"]).args(packages::for_qemu(image, format)).arg(&raw);
        read(&mut qemu, "apt-get install qemu-utils");
        assert_same(&fs::read(&raw).unwrap(), &expected, what);
    };
    for (name, content) in &scene.contents {
        check(&scene.folder().join(format!("{name}.vhdx")), content, "carried");
    }
    for format in Format::ALL {
        let other = scene.other(format.extension(), format);
        let run = import(&other, &scene.folder()).unwrap().run;
        for (snapshot, (_, content)) in run.snapshots.iter().zip(&scene.contents) {
            check(&other.folder.join("user/machine").join(&snapshot.image), content, "imported");
        }
    }
}

#[test]
fn an_older_chain_is_continued_with_what_differs_and_a_newer_one_is_kept() {
    let scene = Scene::new();
    let first = scene.model.runs.machine(&scene.model.key).unwrap().snapshots().pop().unwrap();
    let (old, new) = (scene.base.path().join("old"), scene.folder());
    carry::export(&scene.model.runs, &first.run, &old, &|_, _| true).unwrap();
    scene.export();
    let mut other = scene.other("to", Format::Vhdx);
    let oldest = import(&other, &old).unwrap().run;
    let olds: Vec<_> = oldest.snapshots.iter().zip(["sda", "sdb"]).map(|(_, name)| name).collect();
    let old_contents: Vec<_> = olds
        .iter()
        .zip(&first.run.snapshots)
        .map(|(name, snapshot)| (*name, scene.model.contents[&snapshot.id].clone()))
        .collect();
    expect(&mut other, &oldest, &old_contents);
    let newest = import(&other, &new).unwrap();
    let differing: u64 = old_contents
        .iter()
        .zip(&scene.contents)
        .flat_map(|((_, old), (_, new))| old.chunks(4096).zip(new.chunks(4096)))
        .filter(|(old, new)| old != new && new.iter().any(|byte| *byte != 0))
        .map(|(_, new)| new.len() as u64)
        .sum();
    assert_eq!(newest.written_bytes, differing);
    assert_eq!(newest.run.snapshots[0].parent, Some(oldest.snapshots[0].id));
    expect(&mut other, &newest.run, &scene.contents);
    other.check();

    // The other way round the older one would be taken for the newest.
    let mut other = scene.other("newer", Format::Vhdx);
    let run = import(&other, &new).unwrap().run;
    expect(&mut other, &run, &scene.contents);
    let files = other.files();
    let refused = import(&other, &old).err().unwrap();
    assert!(matches!(refused, CarryError::Run(RunError::Older { .. })), "{refused}");
    assert!(refused.to_string().contains("--machine"), "{refused}");
    assert_eq!(other.files(), files);
    other.check();
}

#[test]
fn an_import_that_was_stopped_goes_on_and_writes_the_rest_only() {
    let scene = Scene::new();
    scene.export();
    let all = data_bytes(&scene.contents);
    // It is heard after each segment.
    let first = Arc::new(scene.contents[0].1[..12 * MIB].to_vec());
    let written_first = data_bytes(&[("sda", first)]);
    assert!(written_first > 2 * MIB as u64);
    let total: u64 = scene.contents.iter().map(|(_, content)| content.len() as u64).sum();
    for restarted in [false, true] {
        let mut other = scene.other(&format!("to-{restarted}"), Format::Vhdx);
        let stopped =
            carry::import(&other.runs, &carried(&scene.folder()).unwrap(), &|done, of| {
                assert_eq!(of, total);
                done < 9 * MIB as u64
            });
        assert!(matches!(stopped, Err(CarryError::Stopped)));
        other.check();
        if restarted {
            other.reopen();
        }
        let imported = import(&other, &scene.folder()).unwrap();
        assert!(imported.went_on);
        assert_eq!(imported.written_bytes, all - written_first);
        expect(&mut other, &imported.run, &scene.contents);
        other.check();
        other.assert_clean();
    }
    // A backup of the machine comes first, and ends it.
    let mut other = scene.other("overtaken", Format::Vhdx);
    let new = carried(&scene.folder()).unwrap();
    carry::import(&other.runs, &new, &|_, _| false).err().unwrap();
    other.backup(&scene.contents);
    other.check();
    other.assert_clean();
}

/// Its run may be gone where it came from: what was received isn't.
#[test]
fn a_stopped_import_goes_on_with_a_newer_run_of_the_same_disks() {
    let scene = Scene::new();
    let first = scene.model.runs.machine(&scene.model.key).unwrap().snapshots().pop().unwrap().run;
    let (old, new) = (scene.base.path().join("old"), scene.folder());
    carry::export(&scene.model.runs, &first, &old, &|_, _| true).unwrap();
    scene.export();
    let before = &scene.model.contents[&first.snapshots[0].id];
    let (now, rest) = (&scene.contents[0].1, &scene.contents[1..]);
    let blocks = before.chunks(4096).zip(now.chunks(4096)).enumerate();
    let differs = |(index, (before, now)): &(usize, (&[u8], &[u8]))| {
        before != now || *index >= 12 * MIB / 4096
    };
    let lacking: Vec<u8> = blocks.filter(differs).flat_map(|(_, (_, now))| now.to_vec()).collect();
    let lacking = data_bytes(&[("sda", Arc::new(lacking))]) + data_bytes(rest);
    for restarted in [false, true] {
        let mut other = scene.other(&format!("to-{restarted}"), Format::Vhdx);
        let some = |done, _| done < 9 * MIB as u64;
        let stopped = carry::import(&other.runs, &carried(&old).unwrap(), &some);
        assert!(matches!(stopped, Err(CarryError::Stopped)));
        if restarted {
            other.reopen();
        }
        let imported = import(&other, &new).unwrap();
        assert!(imported.went_on);
        assert_eq!(imported.written_bytes, lacking);
        let origin = imported.run.origin.as_ref().unwrap();
        let expected = (Some(scene.newest.backup), scene.newest.committed_ms);
        assert_eq!((origin.run, origin.taken_ms), expected);
        expect(&mut other, &imported.run, &scene.contents);
        other.check();
        assert!(import(&other, &new).unwrap().was_here);
        assert!(matches!(
            import(&other, &old).err().unwrap(),
            CarryError::Run(RunError::Older { .. })
        ));
        other.reopen();
        other.check();
        other.assert_clean();
    }
}

#[test]
fn a_backup_is_told_of_an_import_at_work() {
    let scene = Scene::new();
    scene.export();
    let other = scene.other("to", Format::Vhdx);
    let new = carried(&scene.folder()).unwrap();
    let seen = Cell::new(false);
    carry::import(&other.runs, &new, &|_, _| {
        let refused = other.try_send(&scene.contents).err().unwrap();
        assert!(matches!(refused, RunError::Importing { .. }), "{refused}");
        let twice = import(&other, &scene.folder()).err().unwrap();
        assert!(matches!(twice, CarryError::Run(RunError::Importing { .. })), "{twice}");
        seen.set(true);
        true
    })
    .unwrap();
    assert!(seen.get());
}

#[test]
fn a_damaged_byte_is_named_and_leaves_the_store_as_it_was() {
    let scene = Scene::new();
    let manifest = scene.export();
    let mut other = scene.other("to", Format::Vhdx);
    let old = scene.model.runs.machine(&scene.model.key).unwrap().snapshots().pop().unwrap().run;
    let folder = scene.base.path().join("old");
    carry::export(&scene.model.runs, &old, &folder, &|_, _| true).unwrap();
    let run = import(&other, &folder).unwrap().run;
    let contents: Vec<_> = ["sda", "sdb"]
        .into_iter()
        .zip(&old.snapshots)
        .map(|(name, snapshot)| (name, scene.model.contents[&snapshot.id].clone()))
        .collect();
    expect(&mut other, &run, &contents);
    let files = other.files();
    // The last block that the second disk's image holds: all else was written by then.
    let image = scene.folder().join("sdb.vhdx");
    let entry = &manifest.disks[1];
    let disk = CarriedDisk::open(&Disk::default(), &scene.folder(), entry).unwrap();
    let Err(CarryError::Carried(CarriedError::Block { offset, .. })) =
        Err::<(), _>(CarryError::from(disk.wrong(31 * 5 + 3)))
    else {
        panic!("the block is in the image")
    };
    let bytes = fs::read(&image).unwrap();
    let mut damaged = bytes.clone();
    damaged[offset as usize + 77] ^= 0x10;
    fs::write(&image, &damaged).unwrap();
    let error = import(&other, &scene.folder()).err().unwrap().to_string();
    println!("{error}");
    for part in ["sdb.vhdx", &format!("byte {offset}"), "disk sdb"] {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    assert_eq!(other.files(), files);
    other.check();
    // Mended, it is taken in from the start.
    fs::write(&image, &bytes).unwrap();
    let imported = import(&other, &scene.folder()).unwrap();
    assert!(!imported.went_on);
    expect(&mut other, &imported.run, &scene.contents);
    other.check();
    other.assert_clean();
}

#[test]
fn an_export_that_is_stopped_or_finds_damage_leaves_nothing() {
    let scene = Scene::new();
    let folder = scene.folder();
    let stopped =
        carry::export(&scene.model.runs, &scene.newest, &folder, &|done, _| done < 6 << 20);
    assert!(matches!(stopped, Err(CarryError::Stopped)));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    // A block of the base that no delta covers.
    let base = scene.model.runs.machine(&scene.model.key).unwrap().snapshots().pop().unwrap().run;
    let image = scene.model.folder.join("user/machine").join(&base.snapshots[0].image);
    let mut bytes = fs::read(&image).unwrap();
    let block = &scene.contents[0].1[4000 * 4096..4001 * 4096];
    let at = bytes.windows(4096).step_by(512).position(|window| window == block).unwrap() * 512;
    bytes[at + 5] ^= 1;
    fs::write(&image, bytes).unwrap();
    let lost = carry::export(&scene.model.runs, &scene.newest, &folder, &|_, _| true).unwrap_err();
    assert!(matches!(lost, CarryError::Lost { block: 4000, .. }), "{lost}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    let names: BTreeSet<_> = scene.model.files();
    assert!(names.iter().all(|name| !name.ends_with(".partial")));
}
