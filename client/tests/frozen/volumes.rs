//! Programs that stand in for LVM's and ZFS': what they are told is written down, a snapshot is a copy of a loop device's file.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use tempfile::TempDir;
use xtask::loopback::SmallFileSystem;

/// What every stand-in begins with: its folder, writing down how it was called, and what the test wants of it.
const HEAD: &str = r#"#!/bin/sh
dir='@DIR@'; vg='@VG@'; mount='@MOUNT@'; file='@FILE@'
echo "$(basename "$0") $*" >> "$dir/said"
fail() { echo "$1" >&2; exit 5; }
attach() { losetup --read-only --find --show "$1"; }
# What a test wants to happen in the middle of a command.
if [ -e "$dir/on-$(basename "$0")-$1" ]; then . "$dir/on-$(basename "$0")-$1"; fi
"#;

/// Like LVM, it freezes what is mounted on the volume while it makes a snapshot.
const LVCREATE: &str = r#"
while [ $# -gt 1 ]; do case "$1" in --name) name=$2;; esac; shift; done
[ "$1" = "$vg/system" ] || fail "no volume $1"
fsfreeze --freeze "$mount"; cp --sparse=always "$file" "$dir/$name"; fsfreeze --unfreeze "$mount"
[ -e "$dir/overflow" ] && size=$(stat -c %s "$dir/$name")
mkdir -p "/dev/$vg"; ln -s "$(attach "$dir/$name")" "/dev/$vg/$name"
[ -e "$dir/overflow" ] && truncate -s 1M "$dir/$name"
attr=sri-a-s---; [ -e "$dir/overflow" ] && attr=sri-I-s---
echo "$vg $name $attr system janus-backup" >> "$dir/snapshots"
"#;

const LVREMOVE: &str = r#"
shift; name=${1#"$vg"/}
[ -e "$dir/$name" ] || fail "no volume $1"
losetup --detach "$(readlink "/dev/$vg/$name")"; rm "/dev/$vg/$name" "$dir/$name"
grep -v " $name " "$dir/snapshots" > "$dir/new"; mv "$dir/new" "$dir/snapshots"
"#;

const LVS: &str = r#"
row() { printf '{"vg_name":"%s","lv_name":"%s","lv_attr":"%s","origin":"%s","lv_tags":"%s","lv_kernel_major":"%s","lv_kernel_minor":"%s"}' "$@"; }
printf '{"report":[{"lv":['
row "$vg" system owi-aos--- "" "" @MAJOR@ @MINOR@
touch "$dir/snapshots"
while read -r group name attr origin tags; do printf ,; row "$group" "$name" "$attr" "$origin" "$tags" -1 -1; done < "$dir/snapshots"
echo ']}]}'
"#;

/// Unlike LVM, it freezes nothing.
const ZFS: &str = r#"
for last; do :; done
case "$1" in
list) touch "$dir/snapshots"; tr ' ' '\t' < "$dir/snapshots";;
snapshot) cp --sparse=always "$file" "$dir/${last#*@}"; echo "$last yes -" >> "$dir/snapshots";;
clone) name=${last#*/}
    [ -e "$dir/$name" ] || fail "no snapshot"
    ln -s "$(attach "$dir/$name")" "/dev/zvol/$last"
    sed "s|@$name yes -|@$name yes $last|" "$dir/snapshots" > "$dir/new"; mv "$dir/new" "$dir/snapshots";;
destroy) case "$last" in
    *@*) [ -e "/dev/zvol/$vg/${last#*@}" ] && fail "it has clones"; rm "$dir/${last#*@}"
        grep -v "^$last " "$dir/snapshots" > "$dir/new"; mv "$dir/new" "$dir/snapshots";;
    *) losetup --detach "$(readlink "/dev/zvol/$last")"; rm "/dev/zvol/$last";;
    esac;;
esac
"#;

/// A mounted ext4 whose loop device counts as a volume.
pub struct Volume {
    pub mounted: SmallFileSystem,
    folder: TempDir,
    pub group: String,
    links: PathBuf,
    own_link: Option<PathBuf>,
}

impl Volume {
    pub fn lvm() -> Self {
        let volume = Self::new("/dev");
        let scripts = [("lvs", LVS), ("lvcreate", LVCREATE), ("lvremove", LVREMOVE)];
        scripts.iter().for_each(|(name, script)| volume.install(name, script));
        volume
    }

    pub fn zfs() -> Self {
        let mut volume = Self::new("/dev/zvol");
        volume.install("zfs", ZFS);
        fs::create_dir_all(&volume.links).unwrap();
        let link = volume.links.join("disk");
        std::os::unix::fs::symlink(volume.device(), &link).unwrap();
        volume.own_link = Some(link);
        volume
    }

    fn new(links: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let group = format!("janustest{}v{number}", std::process::id());
        let links = Path::new(links).join(&group);
        let mounted = SmallFileSystem::mount(64 << 20).unwrap();
        Self { mounted, folder: tempfile::tempdir().unwrap(), group, links, own_link: None }
    }

    fn install(&self, name: &str, script: &str) {
        let device = self.device();
        let losetup = ["--noheadings", "--output", "BACK-FILE", device.to_str().unwrap()];
        let file = Command::new("losetup").args(losetup).output().unwrap();
        let rdev = fs::metadata(device).unwrap().rdev();
        let text = format!("{HEAD}{script}")
            .replace("@DIR@", self.folder.path().to_str().unwrap())
            .replace("@VG@", &self.group)
            .replace("@MOUNT@", self.mounted.folder().to_str().unwrap())
            .replace("@FILE@", String::from_utf8(file.stdout).unwrap().trim())
            .replace("@MAJOR@", &rustix::fs::major(rdev).to_string())
            .replace("@MINOR@", &rustix::fs::minor(rdev).to_string());
        let path = self.programs().join(name);
        fs::create_dir_all(self.programs()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }

    pub fn programs(&self) -> PathBuf {
        self.folder.path().join("programs")
    }

    pub fn device(&self) -> &Path {
        self.mounted.device()
    }

    /// Its files: `said`, `snapshots`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A script that runs in the middle of `PROGRAM FIRST-ARGUMENT`.
    pub fn on(&self, command: &str, script: &str) {
        fs::write(self.file(&format!("on-{command}")), script).unwrap();
    }

    pub fn calm(&self, command: &str) {
        fs::remove_file(self.file(&format!("on-{command}"))).unwrap();
    }

    /// Command lines since the last call, with the name of the snapshot as NAME and without listings.
    pub fn said(&self) -> Vec<String> {
        let text = fs::read_to_string(self.file("said")).unwrap_or_default();
        let _ = fs::remove_file(self.file("said"));
        let lines = text.lines().filter(|l| !l.starts_with("lvs") && !l.starts_with("zfs list"));
        let short = |word: &str| {
            let start = word.find("janus-").filter(|at| word[*at + 6..].len() == 32);
            start.map_or_else(|| word.to_owned(), |at| format!("{}NAME", &word[..at]))
        };
        let lines = lines.map(|line| line.split(' ').map(short).collect::<Vec<_>>().join(" "));
        lines.map(|line| line.replace(&self.group, "vg")).collect()
    }

    /// Snapshots that are there.
    pub fn snapshots(&self) -> String {
        fs::read_to_string(self.file("snapshots")).unwrap_or_default()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.links).into_iter().flatten().flatten() {
            let link = entry.path();
            if Some(&link) != self.own_link.as_ref()
                && let Ok(device) = fs::read_link(&link)
            {
                let _ = Command::new("losetup").arg("--detach").arg(device).output();
            }
            let _ = fs::remove_file(link);
        }
        let _ = fs::remove_dir(&self.links);
        if self.own_link.is_some() {
            // Stays where ZFS has links of its own.
            let _ = fs::remove_dir("/dev/zvol");
        }
    }
}
