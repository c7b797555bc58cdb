//! A small Debian, backed up and restored, starts from the restored disk until it asks for a login. Only in the soak: the
//! processor is emulated, and packages come from a mirror. Needs root.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use xtask::{
    disk,
    dist::root::Root,
    loopback::LoopDevice,
    packages::{self, Tool},
};

use super::scene::{MIB, Scene};

const TOOLS: &[Tool] = &[
    Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" },
    Tool { program: "mkfs.ext4", package: "e2fsprogs" },
];
/// Of its first partition.
const START: u64 = MIB;
const DISK_BYTES: u64 = 1500 * MIB;
/// It has so long to start.
const PATIENCE: Duration = Duration::from_secs(600);
const INSTALL: &str = "apt-get update -qq && apt-get install -y -qq --no-install-recommends \
                       linux-image-cloud-amd64 systemd-sysv udev extlinux";

/// A Debian with a kernel and a boot loader, in the first partition of a disk.
fn make(disk: &Path, work: &Path) {
    let root = Root::unpack().unwrap();
    let at = |path: &str| root.path().join(path);
    fs::copy("/etc/resolv.conf", at("etc/resolv.conf")).unwrap();
    root.run(&["sh", "-c", INSTALL]).unwrap();
    let named = |beginning: &str| {
        let mut names = fs::read_dir(at("boot")).unwrap().flatten().map(|entry| entry.file_name());
        names.find_map(|name| name.into_string().ok().filter(|name| name.starts_with(beginning)))
    };
    let (kernel, first) = (named("vmlinuz-").unwrap(), named("initrd.img-").unwrap());
    fs::create_dir_all(at("boot/syslinux")).unwrap();
    let config = format!(
        "DEFAULT linux\nLABEL linux\nKERNEL /boot/{kernel}\nAPPEND initrd=/boot/{first} root=/dev/vda1 ro console=ttyS0\n"
    );
    fs::write(at("boot/syslinux/syslinux.cfg"), config).unwrap();
    fs::write(at("etc/fstab"), "/dev/vda1 / ext4 errors=remount-ro 0 1\n").unwrap();

    let partition = work.join("partition");
    disk::blank(&partition, DISK_BYTES - START).unwrap();
    // What the boot loader reads.
    let mut mkfs = packages::command("mkfs.ext4");
    mkfs.args(["-q", "-F", "-O", "^64bit,^metadata_csum", "-d"]).arg(root.path()).arg(&partition);
    packages::output(&mut mkfs).unwrap();
    let device = LoopDevice::attach(&partition).unwrap();
    let mount = work.join("mount");
    fs::create_dir(&mount).unwrap();
    packages::output(packages::command("mount").arg(device.path()).arg(&mount)).unwrap();
    let mut extlinux = Command::new(at("usr/bin/extlinux"));
    let installed = packages::output(extlinux.arg("--install").arg(mount.join("boot/syslinux")));
    packages::output(packages::command("umount").arg(&mount)).unwrap();
    installed.unwrap();
    drop(device);

    disk::blank(disk, DISK_BYTES).unwrap();
    let file = fs::OpenOptions::new().write(true).open(disk).unwrap();
    let loader = fs::read(at("usr/lib/EXTLINUX/mbr.bin")).unwrap();
    file.write_all_at(&loader[..loader.len().min(440)], 0).unwrap();
    let sectors = ((DISK_BYTES - START) / 512) as u32;
    let mut entry = vec![0x80, 0, 2, 0, 0x83, 0xFF, 0xFF, 0xFF];
    entry.extend(((START / 512) as u32).to_le_bytes());
    entry.extend(sectors.to_le_bytes());
    file.write_all_at(&entry, 446).unwrap();
    file.write_all_at(&[0x55, 0xAA], 510).unwrap();
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", partition.display())).arg(format!("of={}", disk.display()));
    dd.args(["bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"]);
    packages::output(&mut dd).unwrap();
    fs::remove_file(partition).unwrap();
}

/// What a machine with this disk says on its serial port until it asks for a login.
fn starts(disk: &Path, log: PathBuf) -> Duration {
    let began = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-m 512 -machine q35 -accel tcg -cpu max -display none -nic none".split(' '));
    qemu.arg("-no-reboot").arg("-serial").arg(format!("file:{}", log.display()));
    qemu.arg("-drive").arg(format!("file={},format=raw,if=virtio", disk.display()));
    let mut machine = qemu.stdin(Stdio::null()).spawn().unwrap();
    let said = || String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    while !said().contains("login:") && machine.try_wait().unwrap().is_none() {
        if began.elapsed() > PATIENCE {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    let took = began.elapsed();
    let _ = machine.kill();
    machine.wait().unwrap();
    let said = said();
    let tail: String = said.chars().skip(said.chars().count().saturating_sub(600)).collect();
    assert!(said.contains("login:"), "{tail}");
    println!("{}", tail.trim());
    took
}

#[test]
fn as_root_a_restored_debian_starts() {
    if std::env::var_os("JANUS_SOAK").is_none() {
        println!("NOT RUN: only in the soak");
        return;
    }
    packages::require(TOOLS).unwrap();
    let mut scene = Scene::new(&["server-a", "server-b"], MIB);
    make(&scene.disk, scene.site.folder());
    let taken = scene.backup();
    let to = scene.path("restored.raw");
    scene.restore(&taken, &to, &[]);
    let took = starts(&to, scene.path("serial.log"));
    println!("a login {:.1} s after its restored disk was started", took.as_secs_f64());
    // With the same server away, from the other one: what the machine's start has changed is a backup, too.
    fs::rename(&to, &scene.disk).unwrap();
    let newest = scene.backup();
    assert_ne!(newest.server, taken.server);
    scene.site.kill_server(&taken.server).unwrap();
    scene.restore(&newest, &to, &[]);
    disk::compare(&newest.copy, &to).unwrap();
    starts(&to, scene.path("second.log"));
}
