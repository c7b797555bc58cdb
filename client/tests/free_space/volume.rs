//! A volume in an image file, with a file system that can be mounted.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use janus_proto::ranges::Ranges;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

pub struct Volume {
    folder: TempDir,
    path: PathBuf,
}

/// Names and content.
pub type Files = BTreeMap<String, Vec<u8>>;

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

impl Volume {
    pub fn make(command: &str, bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let (program, arguments) = command.split_once(' ').unwrap();
        let arguments: Vec<_> = arguments.split(' ').chain([path.to_str().unwrap()]).collect();
        run(program, &arguments);
        Self { folder, path }
    }

    pub fn copy(&self) -> Self {
        Self::filled_by(|path| {
            fs::copy(&self.path, path).unwrap();
        })
    }

    /// What `fill` writes to a new file.
    pub fn filled_by(fill: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        fill(&path);
        Self { folder, path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn open(&self) -> File {
        File::open(&self.path).unwrap()
    }

    pub fn output(&self, program: &str) -> String {
        self.output_of(program, &[])
    }

    pub fn output_of(&self, program: &str, arguments: &[&str]) -> String {
        run(program, &[arguments, &[self.path.to_str().unwrap()]].concat())
    }

    pub fn check(&self, program: &str, arguments: &[&str]) {
        self.output_of(program, arguments);
    }

    pub fn mount(&self, options: &[&str]) -> Mount {
        let at = self.folder.path().join("mount");
        fs::create_dir_all(&at).unwrap();
        let options = [&["loop"], options].concat().join(",");
        run("mount", &["-o", &options, self.path.to_str().unwrap(), at.to_str().unwrap()]);
        Mount(at)
    }

    /// Fills it with files, and takes a third of them away again, so that free space is in pieces.
    pub fn fill(&self, seed: u64) -> Files {
        let mount = self.mount(&[]);
        let mut chance = StdRng::seed_from_u64(seed);
        for number in 0..2000u32 {
            let len = chance.random_range(0..if number % 40 == 0 { 1_500_000 } else { 25_000 });
            let content: Vec<u8> = (0..len).map(|at| (at ^ number) as u8).collect();
            // A small file system may be full.
            let path = mount.0.join(format!("file-{number}"));
            if fs::write(&path, content).is_err() {
                break;
            }
        }
        mount.sync();
        for number in (0..2000).step_by(3) {
            let _ = fs::remove_file(mount.0.join(format!("file-{number}")));
        }
        drop(mount);
        self.files()
    }

    pub fn files(&self) -> Files {
        let mount = self.mount(&["ro"]);
        let files = fs::read_dir(&mount.0).unwrap().map(|entry| entry.unwrap().path());
        let read = |path: PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(&path).unwrap())
        };
        files.filter(|path| path.is_file()).map(read).collect()
    }

    /// Fills `ranges` with ones.
    pub fn overwrite(&self, ranges: &Ranges) {
        let file = File::options().write(true).open(&self.path).unwrap();
        let ones = vec![0xFF; 1 << 20];
        for range in ranges.iter() {
            for at in range.clone().step_by(1 << 20) {
                let len = (range.end - at).min(1 << 20) as usize;
                file.write_all_at(&ones[..len], at).unwrap();
            }
        }
    }
}

/// Unmounts when it is dropped.
pub struct Mount(PathBuf);

impl Mount {
    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn sync(&self) {
        run("sync", &["-f", self.0.to_str().unwrap()]);
    }

    pub fn freeze(&self) {
        run("fsfreeze", &["--freeze", self.0.to_str().unwrap()]);
    }

    pub fn thaw(&self) {
        run("fsfreeze", &["--unfreeze", self.0.to_str().unwrap()]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Programs that another test is starting hold our open files for a moment.
        for _ in 0..50 {
            if Command::new("umount").arg(&self.0).output().unwrap().status.success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}
