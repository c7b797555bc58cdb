//! A machine started from its backup, until it says on its serial console that it is up.
//!
//! QEMU reads the disks from our own NBD export and writes into a scratch file, so no copy is made and the backup stays as it is.
//! It has no network. It is started by this program's hidden command [`COMMAND`], so that it ends with the thread that waits
//! for it, however that ends, and is ended and waited for as soon as the answer is known.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs, io,
    io::Read,
    os::unix::{
        fs::DirBuilderExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    time::{Duration, Instant},
};

use janus_client::{
    browse::shown,
    export::{At, Door, Export, ExportError, Server, for_left_behind},
    source::medium::Medium,
};
use janus_proto::ids::HandleId;
use rustix::{
    fs::{FlockOperation, flock},
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit, setsid},
};
use tokio_util::sync::CancellationToken;

use super::{ProveError, record::Boot};
use crate::config::Prove;

/// Names of folders begin with it.
const PREFIX: &str = "janus-boot-";
const LOCK: &str = "lock";
/// The name of the hidden command.
pub const COMMAND: &str = "virtual-machine";
/// QEMU, as it is looked for in PATH.
pub const QEMU: &str = "qemu-system-x86_64";
/// What a started machine may write.
const SCRATCH_BYTES: u64 = 16 << 30;
/// Disks that its controller has places for.
const MOST_DISKS: usize = 6;
/// How often it is looked whether to stop.
const LOOK: Duration = Duration::from_millis(200);
/// Signals to all of a service come within this time.
const TOGETHER: Duration = Duration::from_secs(3);
/// How QEMU says that a signal ended it.
const TOLD_TO_END: &[u8] = b"terminating on signal";
/// What is kept of what it says: long enough for the pattern, and for people.
const TAIL_BYTES: usize = 4096;
/// What of that is shown.
const LAST_WORDS: usize = 200;

/// How a machine is started.
#[derive(Debug, Clone)]
pub struct Wish {
    /// What it says when it is up.
    pub pattern: String,
    /// It has so long to say it.
    pub patience: Duration,
    /// Its memory.
    pub memory_mib: u32,
    /// Firmware; empty: BIOS.
    pub firmware: String,
}

impl Wish {
    /// As the settings say.
    pub fn of(settings: &Prove) -> Self {
        Self {
            pattern: settings.boot_pattern.clone(),
            patience: Duration::from_secs(settings.boot_seconds),
            memory_mib: settings.boot_memory_mib,
            firmware: settings.boot_firmware.clone(),
        }
    }
}

/// Where QEMU is, if it is installed.
pub fn qemu() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(QEMU)).find(|file| file.is_file())
}

/// Starts a machine with these disks. Blocks.
///
/// # Errors
/// `Stopped`.
pub fn boot(
    wish: &Wish,
    disks: &[Arc<dyn Medium>],
    stop: &CancellationToken,
) -> Result<Boot, ProveError> {
    let not_tried = |why: String| Ok(Boot::NotTried { why });
    let Some(qemu) = qemu() else {
        return not_tried(format!("{QEMU} isn't installed (Debian: qemu-system-x86)"));
    };
    if disks.len() > MOST_DISKS {
        return not_tried(format!("it has {} disks, more than {MOST_DISKS}", disks.len()));
    }
    if wish.firmware.is_empty() && disks.iter().any(|disk| disk.sector_bytes() != 512) {
        return not_tried(
            "it has sectors of 4096 bytes, of which no BIOS starts: set boot_firmware".into(),
        );
    }
    match Started::start(wish, &qemu, disks) {
        Ok(started) => started.wait(wish, stop),
        Err(error) => not_tried(format!("{QEMU} can't be started: {error}")),
    }
}

/// The hidden command: becomes the program that its arguments name, and ends when who started it does.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let limit = |most| Rlimit { current: Some(most), maximum: Some(most) };
    let _ = setrlimit(Resource::Fsize, limit(SCRATCH_BYTES));
    let _ = setrlimit(Resource::Core, limit(0));
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    // Ctrl-C is for who started it: that ends it.
    let _ = setsid();
    let Some(program) = arguments.next() else { return ExitCode::FAILURE };
    let error = Command::new(program).args(arguments).exec();
    eprintln!("{error}");
    ExitCode::FAILURE
}

/// A folder for sockets and scratch files, gone with this.
struct Folder {
    path: PathBuf,
    /// Held for as long as it is in use.
    _lock: fs::File,
}

impl Folder {
    /// A new one where temporary files are. Those of programs that were killed go.
    fn make() -> io::Result<Self> {
        Self::make_in(&std::env::temp_dir())
    }

    fn make_in(parent: &Path) -> io::Result<Self> {
        for_left_behind(parent, PREFIX, remove_if_dead);
        let path = parent.join(format!("{PREFIX}{}", HandleId::new()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        // Under its name it is locked.
        let lock = fs::File::create(path.join("new-lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        fs::rename(path.join("new-lock"), path.join(LOCK))?;
        Ok(Self { path, _lock: lock })
    }
}

fn remove_if_dead(folder: &Path) -> io::Result<()> {
    let lock = fs::File::open(folder.join(LOCK))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    fs::remove_dir_all(folder)
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(%error, folder = %self.path.display(), "what a started machine wrote is left behind");
        }
    }
}

/// The exports of all disks, until this is dropped.
struct Exports {
    stop: CancellationToken,
    runtime: tokio::runtime::Runtime,
    served: Vec<tokio::task::JoinHandle<()>>,
}

impl Exports {
    fn serve(folder: &Path, disks: &[Arc<dyn Medium>]) -> Result<Self, ExportError> {
        let failed = |source| ExportError::Listen { place: "a runtime".into(), source };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let mut exports = Self {
            stop: CancellationToken::new(),
            runtime: runtime.map_err(failed)?,
            served: Vec::new(),
        };
        for (number, disk) in disks.iter().enumerate() {
            let door = {
                let _inside = exports.runtime.enter();
                Door::open(&At::Socket(folder.join(format!("{number}.sock"))))?
            };
            let export = Arc::new(Export::read_only("", "a disk of a backup", disk.clone()));
            let (server, stop) = (Server { export, door }, exports.stop.clone());
            exports.served.push(exports.runtime.spawn(async move { server.run(&stop).await }));
        }
        Ok(exports)
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        self.stop.cancel();
        for served in self.served.drain(..) {
            let _ = self.runtime.block_on(served);
        }
    }
}

/// QEMU at work; killed and waited for when dropped. Fields go in their order.
struct Started {
    child: Child,
    said: Receiver<Vec<u8>>,
    _exports: Exports,
    folder: Folder,
    began: Instant,
}

impl Drop for Started {
    fn drop(&mut self) {
        // It holds nothing that could be lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Started {
    fn start(wish: &Wish, qemu: &Path, disks: &[Arc<dyn Medium>]) -> io::Result<Self> {
        let folder = Folder::make()?;
        let exports = Exports::serve(&folder.path, disks).map_err(io::Error::other)?;
        let errors = fs::File::create(folder.path.join("errors"))?;
        let mut child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .arg(qemu)
            .args(arguments(wish, &folder.path, disks))
            .env_clear()
            .env("TMPDIR", &folder.path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()?;
        let output = child.stdout.take();
        let (say, said) = sync_channel(16);
        // It ends with the child's output.
        std::thread::spawn(move || {
            let Some(mut output) = output else { return };
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if say.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, said, _exports: exports, folder, began: Instant::now() })
    }

    fn wait(mut self, wish: &Wish, stop: &CancellationToken) -> Result<Boot, ProveError> {
        let (pattern, mut tail) = (wish.pattern.as_bytes(), VecDeque::new());
        loop {
            if stop.is_cancelled() {
                return Err(ProveError::Stopped);
            }
            match self.said.recv_timeout(LOOK) {
                Ok(bytes) => {
                    tail.extend(bytes);
                    let all = tail.make_contiguous();
                    if all.windows(pattern.len()).any(|window| window == pattern) {
                        let milliseconds = self.began.elapsed().as_millis() as u64;
                        return Ok(Boot::Booted { milliseconds });
                    }
                    let keep = TAIL_BYTES.max(pattern.len());
                    tail.drain(..tail.len().saturating_sub(keep));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let (why, by_signal) = self.ended(tail.make_contiguous());
                    if !by_signal {
                        return Ok(Boot::Failed { why });
                    }
                    // Whoever ends all of us ends it, too, and maybe first.
                    return match is_cancelled_soon(stop) {
                        true => Err(ProveError::Stopped),
                        false => Ok(Boot::NotTried { why }),
                    };
                }
            }
            if self.began.elapsed() >= wish.patience {
                let (pattern, seconds) = (&wish.pattern, wish.patience.as_secs());
                let words = last_words(tail.make_contiguous());
                let why = format!("it did not say {pattern:?} within {seconds} s; {words}");
                return Ok(Boot::Failed { why });
            }
        }
    }

    /// Says how it ended, and whether somebody ended it.
    fn ended(&mut self, said: &[u8]) -> (String, bool) {
        let status = self.child.wait();
        let killed = status.as_ref().is_ok_and(|status| status.signal().is_some());
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        let errors = fs::read(self.folder.path.join("errors")).unwrap_or_default();
        // QEMU's own words when it was told to end.
        let told = errors.windows(TOLD_TO_END.len()).any(|words| words == TOLD_TO_END);
        let errors = match errors.is_empty() {
            true => String::new(),
            false => format!("; QEMU: {}", last(&errors)),
        };
        let why = format!("it ended before it was up ({status}{errors}); {}", last_words(said));
        (why, killed || told)
    }
}

fn is_cancelled_soon(stop: &CancellationToken) -> bool {
    let until = Instant::now() + TOGETHER;
    while !stop.is_cancelled() && Instant::now() < until {
        std::thread::sleep(LOOK);
    }
    stop.is_cancelled()
}

fn last_words(said: &[u8]) -> String {
    match said.is_empty() {
        true => {
            "it said nothing on its serial console, where Linux speaks with console=ttyS0".into()
        }
        false => format!("it last said: {}", last(said)),
    }
}

fn last(of: &[u8]) -> String {
    let of = of.trim_ascii();
    shown(&of[of.len().saturating_sub(LAST_WORDS)..])
}

fn arguments(wish: &Wish, folder: &Path, disks: &[Arc<dyn Medium>]) -> Vec<String> {
    let fixed = "-machine q35 -accel kvm -accel tcg -cpu max -nodefaults -no-user-config -display none -vga std -nic none \
                 -no-reboot -chardev stdio,id=serial,signal=off -serial chardev:serial \
                 -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny";
    let mut arguments: Vec<String> = fixed.split_whitespace().map(str::to_owned).collect();
    arguments.extend(["-m".into(), wish.memory_mib.to_string()]);
    if !wish.firmware.is_empty() {
        arguments.extend(["-bios".into(), wish.firmware.clone()]);
    }
    // A comma begins the next option.
    let folder = folder.display().to_string().replace(',', ",,");
    for (number, disk) in disks.iter().enumerate() {
        let place = number + 1;
        arguments.extend([
            "-drive".into(),
            format!("if=none,id=disk{number},format=raw,snapshot=on,file.driver=nbd,file.server.type=unix,file.server.path={folder}/{number}.sock"),
            "-device".into(),
            match disk.sector_bytes() {
                4096 => format!("virtio-blk-pci,drive=disk{number},bootindex={place},logical_block_size=4096,physical_block_size=4096"),
                _ => format!("ide-hd,drive=disk{number},bus=ide.{number},bootindex={place}"),
            },
        ]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_killed_programs_go() {
        let parent = tempfile::tempdir().unwrap();
        let in_use = Folder::make_in(parent.path()).unwrap();
        let killed = parent.path().join("janus-boot-killed");
        fs::create_dir(&killed).unwrap();
        fs::write(killed.join(LOCK), "").unwrap();
        fs::write(killed.join("0.sock"), "").unwrap();
        let young = parent.path().join("janus-boot-young");
        fs::create_dir(&young).unwrap();

        let new = Folder::make_in(parent.path()).unwrap();
        assert!(!killed.exists());
        assert!([&in_use.path, &young, &new.path].iter().all(|path| path.exists()));
        let path = new.path.clone();
        drop(new);
        assert!(!path.exists());
    }

    #[test]
    fn last_words_are_shown_without_what_a_terminal_would_obey() {
        assert!(last_words(b"").contains("console=ttyS0"));
        assert_eq!(last_words(b"\x1b[2Jpanic\r\n"), "it last said: \\u{1b}[2Jpanic");
        let long = [b'x'; 1000];
        assert_eq!(last(&long).len(), LAST_WORDS);
    }
}
