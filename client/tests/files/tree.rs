//! Trees of files: made, and told as what a copy must be like.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, Timespec, Timestamps, UTIME_OMIT, mkfifoat, utimensat};
use xtask::noise::Noise;

/// What a file system keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Owners, modes, links, hard links, pipes, any name of 255 bytes.
    pub unix: bool,
    /// Links and hard links, names of 255 UTF-16 units.
    pub links: bool,
    /// Holes.
    pub holes: bool,
    /// Steps of time, in nanoseconds.
    pub time_step: i64,
}

/// A file as a copy must have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Truth {
    pub kind: char,
    pub size: u64,
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified: (i64, i64),
    pub digest: String,
    pub target: PathBuf,
    /// The first name of its file.
    pub first: PathBuf,
}

pub type Truths = BTreeMap<PathBuf, Truth>;

/// Puts about `count` files of all kinds below `root`.
pub fn fill(root: &Path, count: usize, abilities: Abilities, seed: u64) {
    let mut noise = Noise::new(seed);
    odd_ones(root, abilities, &mut noise);
    let folders: Vec<PathBuf> = (0..(count / 40).max(3))
        .map(|number| root.join(format!("folder-{}/sub {number}", number % 7)))
        .collect();
    folders.iter().for_each(|folder| fs::create_dir_all(folder).unwrap());
    fs::create_dir(root.join("many")).unwrap();
    let many = root.join("many");
    for number in 0..count {
        // Half of them in one folder, which grows large. mtools takes five minutes for 2000 files of one folder.
        let is_one_of_many = number % 2 == 0 && (abilities.links || number < 1000);
        let folder = if is_one_of_many { &many } else { &folders[noise.index(folders.len())] };
        let path = folder.join(format!("file-{number:05}.bin"));
        let len = if number % 50 == 0 { 200_000 } else { 6_000 };
        let mut content = vec![0; noise.index(len)];
        if number % 3 == 0 {
            content.fill(b'a' + (number % 26) as u8);
        } else {
            noise.fill(&mut content);
        }
        fs::write(&path, content).unwrap();
        if abilities.unix {
            let mode = [0o644, 0o600, 0o755, 0o400][number % 4];
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            chown(&path, Some(1000 + (number % 3) as u32), Some(number as u32 % 5)).unwrap();
        }
        if abilities.links && number % 25 == 0 {
            fs::hard_link(&path, root.join(format!("again-{number}"))).unwrap();
            symlink(format!("many/file-{number:05}.bin"), root.join(format!("link-{number}")))
                .unwrap();
        }
    }
    date(root, root, &mut noise);
}

/// Holes, long names, links that lead out, nothing at all.
fn odd_ones(root: &Path, abilities: Abilities, noise: &mut Noise) {
    fs::write(root.join("empty"), "").unwrap();
    fs::create_dir_all(root.join("empty folder")).unwrap();
    fs::write(root.join("hello.txt"), "Hello from inside.\n").unwrap();
    // mtools knows the first 65536 characters only.
    let name = if abilities.links { "Grüße 日本 😀.txt" } else { "Grüße 日本.txt" };
    fs::write(root.join(name), "unicode").unwrap();
    let mut large = vec![0; 3_000_000];
    noise.fill(&mut large);
    fs::write(root.join("large.bin"), &large).unwrap();
    let mut deep = root.to_path_buf();
    (0..30).for_each(|level| deep.push(format!("level-{level}")));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "deep").unwrap();
    if abilities.links {
        fs::write(root.join("n".repeat(255)), "long").unwrap();
        symlink("/etc/passwd", root.join("absolute")).unwrap();
        symlink("../../../../../../../etc/passwd", root.join("upwards")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        symlink(".", root.join("itself")).unwrap();
        symlink("x/".repeat(500), root.join("long link")).unwrap();
    } else {
        fs::write(root.join("n".repeat(200)), "long").unwrap();
    }
    if abilities.unix {
        let raw = std::ffi::OsStr::from_bytes(b"not \xff utf-8 \n\x1b[31m");
        fs::write(root.join(raw), "odd").unwrap();
        mkfifoat(CWD, root.join("pipe"), Mode::from_raw_mode(0o600)).unwrap();
    }
    if abilities.holes {
        let sparse = File::create(root.join("sparse.img")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        sparse.write_all_at(b"begin", 0).unwrap();
        sparse.write_all_at(&large[..9000], (20 << 20) + 77).unwrap();
        sparse.write_all_at(b"end", (64 << 20) - 3).unwrap();
        File::create(root.join("all hole")).unwrap().set_len(5 << 20).unwrap();
    }
}

/// Gives everything a time of its own, what is in a folder before it.
fn date(root: &Path, path: &Path, noise: &mut Noise) {
    let meta = path.symlink_metadata().unwrap();
    if meta.is_dir() {
        let mut below: Vec<_> =
            fs::read_dir(path).unwrap().map(|one| one.unwrap().path()).collect();
        below.sort();
        below.iter().for_each(|one| date(root, one, noise));
    }
    let seconds = 1_000_000_000 + noise.below(700_000_000) as i64;
    let modified = Timespec { tv_sec: seconds, tv_nsec: noise.below(1_000_000_000) as i64 };
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let times = Timestamps { last_access: omit, last_modification: modified };
    if path != root {
        utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// What is below `root`, but what a file system has for itself.
pub fn truths(root: &Path, abilities: Abilities) -> Truths {
    let mut truths = Truths::new();
    let mut firsts = BTreeMap::new();
    walk(root, root, abilities, &mut truths, &mut firsts);
    truths
}

fn walk(
    root: &Path,
    folder: &Path,
    abilities: Abilities,
    truths: &mut Truths,
    firsts: &mut BTreeMap<u64, PathBuf>,
) {
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|one| one.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().to_owned();
        let meta = path.symlink_metadata().unwrap();
        let kind = match meta.file_type() {
            kind if kind.is_dir() => 'd',
            kind if kind.is_symlink() => 'l',
            kind if kind.is_file() => 'f',
            _ => continue,
        };
        if name == Path::new("lost+found") {
            continue;
        }
        let nanos = meta.mtime_nsec() / abilities.time_step * abilities.time_step;
        let seconds = meta.mtime() / (abilities.time_step / 1_000_000_000).max(1)
            * (abilities.time_step / 1_000_000_000).max(1);
        let first = match kind {
            'f' => firsts.entry(meta.ino()).or_insert_with(|| name.clone()).clone(),
            _ => name.clone(),
        };
        let truth = Truth {
            kind,
            size: if kind == 'f' { meta.len() } else { 0 },
            mode: if abilities.unix && kind != 'l' { meta.mode() & 0o7777 } else { 0 },
            owner: if abilities.unix { (meta.uid(), meta.gid()) } else { (0, 0) },
            modified: (seconds, nanos),
            digest: if kind == 'f' { digest(&path) } else { String::new() },
            target: if kind == 'l' { fs::read_link(&path).unwrap() } else { PathBuf::new() },
            first,
        };
        truths.insert(name, truth);
        if kind == 'd' {
            walk(root, &path, abilities, truths, firsts);
        }
    }
}

fn digest(path: &Path) -> String {
    blake3::hash(&fs::read(path).unwrap()).to_hex().to_string()
}

/// # Panics
/// With the first few differences.
pub fn assert_equal(what: &str, put_in: &Truths, came_out: &Truths) {
    let mut wrong = Vec::new();
    for (path, expected) in put_in {
        match came_out.get(path) {
            None => wrong.push(format!("{} is missing", path.display())),
            Some(found) if found != expected => {
                wrong.push(format!("{}: {found:?} instead of {expected:?}", path.display()));
            }
            Some(_) => {}
        }
    }
    let more = came_out.keys().filter(|path| !put_in.contains_key(*path));
    wrong.extend(more.map(|path| format!("{} was never there", path.display())));
    assert!(wrong.is_empty(), "{what}: {} wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    println!("{what}: {} files, folders and links are what was put in", put_in.len());
}
