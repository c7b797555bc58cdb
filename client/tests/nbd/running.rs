//! A machine that runs: its disk is held still by QEMU, through the hook that comes with the client.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

use super::{MIB, full_compare, qemu, read_bytes};

const SIZE: u64 = 256 * MIB;

/// QEMU's block layer without a machine: what a guest would write comes over NBD.
struct Machine {
    child: Child,
    folder: PathBuf,
}

impl Machine {
    fn start(folder: &Path) -> Self {
        let at = |name: &str| folder.join(name).display().to_string();
        let [qmp, nbd] = ["vm.qmp", "vm.nbd"].map(|name| folder.join(name));
        for socket in [&qmp, &nbd] {
            let _ = fs::remove_file(socket);
        }
        let child = Command::new("qemu-storage-daemon")
            .args([
                "--blockdev",
                &format!("driver=file,node-name=file,filename={}", at("vm.qcow2")),
            ])
            .args(["--blockdev", "driver=qcow2,node-name=drive0,file=file"])
            .args(["--chardev", &format!("socket,path={},server=on,wait=off,id=q", at("vm.qmp"))])
            .args(["--monitor", "chardev=q"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", at("vm.nbd"))])
            .args(["--export", "type=nbd,id=guest,node-name=drive0,name=guest,writable=on"])
            .spawn()
            .unwrap();
        qemu::await_that("QEMU is there", || qmp.exists() && nbd.exists());
        Self { child, folder: folder.to_owned() }
    }

    /// What the guest sees of its disk.
    fn guest(&self) -> String {
        format!("nbd+unix:///guest?socket={}/vm.nbd", self.folder.display())
    }

    fn write(&self, command: &str) {
        let said = qemu::run("qemu-io", &["-f", "raw", "-c", command, &self.guest()]);
        assert!(!said.contains("failed"), "{said}");
    }

    fn flatten(&self, to: &Path) {
        let to = qemu::text(to);
        qemu::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &self.guest(), to]);
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Scene {
    site: Site,
    client: Client,
}

impl Scene {
    fn new() -> Self {
        let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
        let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
        let folder = site.folder().to_owned();
        qemu::create(&folder.join("vm.qcow2"), SIZE);
        let source = format!("vm=nbd+unix:///vm?socket={}/vm.nbd", folder.display());
        let mut client = site.client("machine", &[source]).unwrap();
        client.settings.set("post_backup", hook(&folder, "end"));
        site.await_ready(&client).unwrap();
        Self { site, client }
    }

    /// The guest writes, the disk is frozen, the guest overwrites that; the backup is of the moment between.
    fn backup(&mut self, machine: &Machine, before: &str, after: &str) -> Value {
        machine.write(before);
        let folder = self.site.folder().to_owned();
        let flat = folder.join("flat");
        machine.flatten(&flat);
        let begin = hook(&folder, "begin").join(" ");
        let late = format!("qemu-io -f raw -c '{after}' '{}' >/dev/null", machine.guest());
        let script = format!("{begin} && {late}");
        self.client.settings.set("pre_backup", vec!["/bin/sh", "-c", &script]);
        let answer: Value = self.client.answer(&["backup"]).unwrap();
        let taken = answer["disks"][0].clone();
        let restored = folder.join("restored");
        self.client.restore(taken["snapshot_id"].as_str().unwrap(), &restored).unwrap();
        disk::compare(&flat, &restored).unwrap();
        fs::remove_file(restored).unwrap();
        assert!(!folder.join("janus-vm.scratch").exists());
        taken
    }
}

fn hook(folder: &Path, what: &str) -> Vec<String> {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/hooks/qemu-freeze");
    let at = |name: &str| folder.join(name).display().to_string();
    let (qmp, nbd) = (at("vm.qmp"), at("vm.nbd"));
    let words = [program, what, "--qmp", &qmp, "--nbd", &nbd, "--disk", "vm=drive0"];
    words.map(str::to_owned).to_vec()
}

#[test]
fn a_machine_that_runs_is_backed_up_as_of_one_moment_and_only_what_it_wrote_is_read() {
    let mut scene = Scene::new();
    let machine = Machine::start(scene.site.folder());
    let taken = scene.backup(&machine, "write -q -P 1 0 32M", "write -q -P 2 1M 1M");
    assert_eq!(full_compare(&taken), Some("nothing is remembered of an earlier backup"));

    // What was written after the first freeze, and since.
    let taken = scene.backup(&machine, "write -q -P 3 100M 64K", "write -q -P 4 100M 128K");
    assert_eq!(full_compare(&taken), None, "{taken}");
    let read = read_bytes(&taken);
    assert!((MIB..4 * MIB).contains(&read), "{read}");

    // A backup fails after the freeze; what it would have read is read by the next one.
    scene.site.kill_server("server-a").unwrap();
    let begin = hook(scene.site.folder(), "begin");
    scene.client.settings.set("pre_backup", begin);
    scene.client.failure(&["backup"]).unwrap();
    scene.site.start_server("server-a").unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let taken = scene.backup(&machine, "write -q -P 5 200M 64K", "discard -q 0 1M");
    assert_eq!(full_compare(&taken), None, "{taken}");

    // A backup is killed: nobody takes anything back but the next one.
    let begin = hook(scene.site.folder(), "begin").join(" ");
    let kill = format!("{begin} && kill -9 $PPID");
    scene.client.settings.set("pre_backup", vec!["/bin/sh", "-c", &kill]);
    assert!(scene.client.answer::<Value>(&["backup"]).is_err());
    let taken = scene.backup(&machine, "write -q -P 6 201M 64K", "write -q -P 7 0 1M");
    assert_eq!(full_compare(&taken), None, "{taken}");

    // QEMU dies: its bitmaps were never written.
    machine.kill();
    let machine = Machine::start(scene.site.folder());
    let taken = scene.backup(&machine, "write -q -P 8 202M 64K", "write -q -P 9 0 1M");
    assert!(full_compare(&taken).unwrap().contains("is gone"), "{taken}");
    let taken = scene.backup(&machine, "write -q -P 1 203M 64K", "write -q -P 2 0 1M");
    assert_eq!(full_compare(&taken), None, "{taken}");
}
