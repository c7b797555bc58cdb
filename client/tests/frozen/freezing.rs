//! The watchdog and whoever watches it, on real file systems.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use janus_client::{
    config::DiskSpec,
    frozen::freeze::{End, Freeze, Outcome, Target},
    source::{Source, mounts},
};
use janus_proto::{buffers::Buffer, pb::Consistency};
use rustix::process::{Pid, Signal, kill_process};
use xtask::loopback::{Kind, LoopDevice, SmallFileSystem};

const CLIENT: &str = env!("CARGO_BIN_EXE_janus-client");
/// A write that takes longer waits for something.
const MOMENT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(30);

fn small(kind: Kind) -> SmallFileSystem {
    SmallFileSystem::mount_as(kind, 300 << 20).unwrap()
}

fn target(folder: &Path) -> Target {
    let device = fs::metadata(folder).unwrap().dev();
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounted = mounts::writable(&[number]);
    let found = mounted.iter().find(|one| one.mounts.iter().any(|(_, at)| Path::new(at) == folder));
    Target::open(found.unwrap()).unwrap()
}

fn freeze(folders: &[&Path], limit: Duration) -> Freeze {
    let targets = folders.iter().map(|folder| target(folder)).collect();
    Freeze::begin(OsStr::new(CLIENT), targets, limit).unwrap()
}

/// Says when a write has gone through.
pub(super) fn write(folder: &Path, name: &str) -> Receiver<()> {
    let (tell, told) = mpsc::channel();
    let path = folder.join(name);
    thread::spawn(move || {
        let mut file = fs::File::create(path).unwrap();
        file.write_all(b"written").unwrap();
        file.sync_all().unwrap();
        let _ = tell.send(());
    });
    told
}

fn is_blocked(write: &Receiver<()>) -> bool {
    write.recv_timeout(MOMENT) == Err(RecvTimeoutError::Timeout)
}

/// Watchdogs that this process has started, and that hold this folder.
fn watchdogs(folder: &Path) -> Vec<i32> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<i32> = children
        .flat_map(|text| {
            text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()
        })
        .collect();
    let is_one = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        String::from_utf8_lossy(&line).contains("freeze-watchdog")
            && open.any(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == folder))
    };
    pids.into_iter().filter(is_one).collect()
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

#[test]
fn as_root_writes_wait_until_thawed() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let mounted = small(kind);
        let frozen = freeze(&[mounted.folder()], LONG);
        assert_eq!(frozen.outcomes(), [Outcome::Frozen], "{kind:?}");
        let write = write(mounted.folder(), "one");
        assert!(is_blocked(&write), "{kind:?}");
        // What somebody else has frozen stays so.
        let second = freeze(&[mounted.folder()], LONG);
        assert_eq!(second.outcomes(), [Outcome::Busy], "{kind:?}");
        assert_eq!(second.thaw(), End::Told);
        assert!(is_blocked(&write), "{kind:?}");
        assert_eq!(frozen.thaw(), End::Told, "{kind:?}");
        write.recv_timeout(LONG).unwrap();
    }
}

#[test]
fn as_root_several_are_frozen_and_one_that_cannot_be_is_named() {
    let (ext4, xfs) = (small(Kind::Ext4), small(Kind::Xfs));
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let shm = target(Path::new("/dev/shm"));
    let targets = vec![target(ext4.folder()), shm, target(xfs.folder())];
    let frozen = Freeze::begin(OsStr::new(CLIENT), targets, LONG).unwrap();
    assert_eq!(frozen.outcomes(), [Outcome::Frozen, Outcome::Unsupported, Outcome::Frozen]);
    let writes = [write(ext4.folder(), "one"), write(xfs.folder(), "one")];
    assert!(writes.iter().all(is_blocked));
    write(memory.path(), "one").recv_timeout(MOMENT).unwrap();
    drop(frozen);
    writes.iter().for_each(|write| write.recv_timeout(LONG).unwrap());
}

fn source(path: &Path, allow_live: bool) -> Result<Source, String> {
    let spec = DiskSpec { name: Some("disk".parse().unwrap()), path: path.to_owned() };
    Source::open(&spec, None, allow_live).map_err(|error| error.to_string())
}

fn consistency(path: &Path) -> Consistency {
    source(path, true).unwrap().consistency()
}

fn run(program: &str, arguments: &[&OsStr]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program}");
}

#[test]
fn as_root_a_device_that_nobody_can_write_to_counts_as_frozen() {
    let mounted = small(Kind::Ext4);
    assert_eq!(consistency(mounted.device()), Consistency::Smeared);
    run("mount", &["-o".as_ref(), "remount,ro".as_ref(), mounted.folder().as_os_str()]);
    assert_eq!(consistency(mounted.device()), Consistency::Frozen);
    run("umount", &[mounted.folder().as_os_str()]);
    assert_eq!(consistency(mounted.device()), Consistency::Frozen);
    // Something that isn't mounted here has it.
    let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let taken = fs::File::options().read(true).custom_flags(flags).open(mounted.device()).unwrap();
    let refused = source(mounted.device(), false).unwrap_err();
    assert!(refused.contains("is in use by something that isn't seen here"), "{refused}");
    assert_eq!(consistency(mounted.device()), Consistency::Smeared);
    drop(taken);
    assert_eq!(consistency(mounted.device()), Consistency::Frozen);
}

#[test]
fn as_root_every_device_of_a_mounted_btrfs_is_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let devices: Vec<LoopDevice> = ["one", "two"]
        .map(|name| {
            let file = folder.path().join(name);
            fs::File::create(&file).unwrap().set_len(200 << 20).unwrap();
            LoopDevice::attach(&file).unwrap()
        })
        .into();
    let both: Vec<&OsStr> = devices.iter().map(|device| device.path().as_os_str()).collect();
    let raid = ["-q", "-d", "raid1", "-m", "raid1"].map(OsStr::new);
    run("mkfs.btrfs", &[&raid, &*both].concat());
    let at = folder.path().join("at");
    fs::create_dir(&at).unwrap();
    run("mount", &[both[0], at.as_os_str()]);
    let refused = devices.iter().map(|device| source(device.path(), false));
    let refused: Vec<_> = refused.map(|opened| opened.map(|source| source.consistency())).collect();
    run("mount", &["-o".as_ref(), "remount,ro".as_ref(), at.as_os_str()]);
    let frozen: Vec<_> = devices.iter().map(|device| consistency(device.path())).collect();
    run("umount", &[at.as_os_str()]);
    for answer in refused {
        let words = answer.unwrap_err();
        assert!(words.contains(&format!("is mounted writable at {}", at.display())), "{words}");
    }
    assert_eq!(frozen, [Consistency::Frozen; 2]);
}

#[test]
fn as_root_what_the_cache_has_of_a_disk_is_not_believed() {
    const MIB: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    fs::write(&file, vec![1; 8 << 20]).unwrap();
    let disk = LoopDevice::attach(&file).unwrap();
    // From its second mebibyte on, in sectors; as the kernel does when it reads a partition table.
    run("addpart", &[disk.path().as_os_str(), "1".as_ref(), "2048".as_ref(), "8192".as_ref()]);
    let part = disk
        .path()
        .with_file_name(format!("{}p1", disk.path().file_name().unwrap().to_str().unwrap()));
    // Who keeps the disk open, as a mounted partition does, keeps its cache.
    let whole = fs::File::open(disk.path()).unwrap();
    let mut cached = vec![0; 8 << 20];
    whole.read_exact_at(&mut cached, 0).unwrap();
    let written = fs::File::options().write(true).open(&part).unwrap();
    written.write_all_at(&vec![2; MIB as usize], 0).unwrap();
    written.sync_all().unwrap();
    drop(written);
    // Otherwise there is nothing to be seen.
    whole.read_exact_at(&mut cached[..4096], MIB).unwrap();
    assert_eq!(cached[..4096], [1; 4096]);
    let source = source(disk.path(), false).unwrap();
    let mut buffer = Buffer::take();
    source.read_at(MIB, &mut buffer).unwrap();
    let mut few = [0; 512];
    source.read_at(MIB + 512, &mut few).unwrap();
    run("delpart", &[disk.path().as_os_str(), "1".as_ref()]);
    assert!(buffer.iter().all(|byte| *byte == 2));
    assert_eq!(few, [2; 512]);
}

#[test]
fn as_root_a_watchdog_thaws_when_its_time_is_over() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let mounted = small(kind);
        let began = Instant::now();
        let frozen = freeze(&[mounted.folder()], Duration::from_secs(2));
        let write = write(mounted.folder(), "one");
        assert!(is_blocked(&write));
        write.recv_timeout(LONG).unwrap();
        let took = began.elapsed();
        assert!(took > Duration::from_millis(1900) && took < Duration::from_secs(4), "{took:?}");
        assert_eq!(frozen.thaw(), End::Expired);
    }
}

#[test]
fn as_root_without_another_word_its_time_is_ten_seconds() {
    let mounted = small(Kind::Ext4);
    let began = Instant::now();
    let mut command = Command::new(CLIENT);
    command.arg("freeze-watchdog").arg(mounted.folder());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(said.by_ref().take(3).collect::<Vec<_>>(), ["begin 0", "frozen 0", "done"]);
    let write = write(mounted.folder(), "one");
    // What ends others doesn't end it.
    for kind in [Signal::TERM, Signal::INT, Signal::HUP] {
        signal(i32::try_from(child.id()).unwrap(), kind);
    }
    assert!(is_blocked(&write));
    assert_eq!(said.next().as_deref(), Some("expired"));
    write.recv_timeout(LONG).unwrap();
    let took = began.elapsed().as_secs_f64();
    assert!((9.9..12.0).contains(&took), "{took}");
    assert!(child.wait().unwrap().success());
}

#[test]
fn as_root_a_watchdog_whose_client_is_gone_thaws_at_once() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let mounted = small(kind);
        // The client: it is killed, and the watchdog sees only the end of its pipe.
        let script = format!("sleep 60 | {CLIENT} freeze-watchdog {}", mounted.folder().display());
        let mut command = Command::new("/bin/sh");
        let mut shell = command.args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(shell.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(said.any(|line| line == "done"));
        let write = write(mounted.folder(), "one");
        assert!(is_blocked(&write));
        let children = format!("/proc/{0}/task/{0}/children", shell.id());
        let children = fs::read_to_string(children).unwrap();
        let is_sleep = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim() == "sleep"
        };
        let sleep = children.split_whitespace().find(is_sleep).unwrap();
        let began = Instant::now();
        signal(sleep.parse().unwrap(), Signal::KILL);
        write.recv_timeout(LONG).unwrap();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        assert!(said.any(|line| line == "thawed"));
        shell.wait().unwrap();
    }
}

#[test]
fn as_root_the_client_thaws_when_its_watchdog_is_killed_or_stopped() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let mounted = small(kind);
        for how in [Signal::KILL, Signal::STOP] {
            let frozen = freeze(&[mounted.folder()], Duration::from_secs(2));
            let write = write(mounted.folder(), "one");
            assert!(is_blocked(&write));
            let found = watchdogs(mounted.folder());
            let [watchdog] = found[..] else { panic!("{found:?}") };
            let began = Instant::now();
            signal(watchdog, how);
            write.recv_timeout(LONG).unwrap();
            let took = began.elapsed();
            let most = if how == Signal::KILL { 1 } else { 4 };
            assert!(took < Duration::from_secs(most), "{how:?}: {took:?}");
            assert_eq!(frozen.thaw(), End::Lost);
            assert!(watchdogs(mounted.folder()).is_empty());
        }
    }
}
