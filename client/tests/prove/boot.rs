//! Machines that are started from their backup.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::{
    packages::{self, Tool},
    site::{Client, Plan, Programs, Site},
};

use crate::scene::SERVER;

const QEMU: Tool = Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" };

/// A first sector that writes a text to the first serial port, and then waits for ever.
fn boot_sector(text: &str) -> Vec<u8> {
    let mut sector = vec![
        0x31, 0xC0, // xor ax, ax
        0x8E, 0xD8, // mov ds, ax
        0xFC, // cld
        0xBA, 0xF8, 0x03, // mov dx, 0x3F8
        0xBE, 0x16, 0x7C, // mov si, text
        0xAC, // next: lodsb
        0x84, 0xC0, // test al, al
        0x74, 0x03, // jz done
        0xEE, // out dx, al
        0xEB, 0xF8, // jmp next
        0xF4, // done: hlt
        0xEB, 0xFD, // jmp done
    ];
    sector.extend_from_slice(text.as_bytes());
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    sector
}

/// Two machines: one that says that it is up, and one that says something else.
struct Machines {
    site: Site,
    _clients: Vec<Client>,
    scratch: PathBuf,
}

impl Machines {
    fn new() -> Self {
        packages::require(&[QEMU]).unwrap();
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let settings = &mut site.server(SERVER).unwrap().settings;
        settings.set("scrub_mib_per_second", 0);
        settings.set("prove.boot_memory_mib", 64);
        settings.set("prove.boot_seconds", 120);
        site.start_all().unwrap();
        let mut clients = Vec::new();
        for (name, text) in [("loud", "ready\r\nhost login: "), ("silent", "kernel panic")] {
            let disk = site.folder().join(name);
            let mut bytes = boot_sector(text);
            bytes.resize(1 << 20, 0);
            fs::write(&disk, bytes).unwrap();
            let client = site.client(name, &[format!("sda={}", disk.display())]).unwrap();
            site.await_ready(&client).unwrap();
            client.backup().unwrap();
            clients.push(client);
        }
        let scratch = site.folder().join("scratch, of machines");
        fs::create_dir(&scratch).unwrap();
        Self { site, _clients: clients, scratch }
    }

    fn command(&self, more: &[&str]) -> Command {
        let arguments = [&["prove", "--now"], more].concat();
        let mut command = self.site.admin_command(SERVER, &arguments);
        command.env("TMPDIR", &self.scratch);
        command
    }

    fn prove(&self, more: &[&str]) -> Output {
        self.command(more).output().unwrap()
    }

    /// Starts a proof and waits until its machine was started.
    fn begin(&self, more: &[&str]) -> (Child, impl Sized + use<>) {
        let mut command = self.command(more);
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let started = said.any(|line| line.unwrap().contains("waiting for"));
        assert!(started, "{child:?}");
        // What it says later has a reader, too.
        (child, said)
    }

    /// Nothing of a started machine is left.
    fn assert_gone(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        while is_running(&self.scratch) {
            assert!(Instant::now() < until, "a machine still runs");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A process whose arguments name this folder.
fn is_running(folder: &Path) -> bool {
    let name = folder.to_string_lossy().replace(',', ",,");
    let processes = fs::read_dir("/proc").unwrap();
    processes.flatten().any(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&name)
    })
}

#[test]
fn a_machine_is_started_until_it_says_that_it_is_up_and_nothing_of_it_stays() {
    let mut machines = Machines::new();
    let images = machines.site.server(SERVER).unwrap().images().to_owned();
    machines.site.stop_server(SERVER).unwrap();
    let shown = machines.prove(&["alice/loud", "--boot", "--json"]);
    assert_eq!(shown.status.code(), Some(0), "{shown:?}");
    let proof: Value = serde_json::from_slice(&shown.stdout).unwrap();
    println!("{}", proof["proof"]["boot"]);
    assert_eq!(proof["proof"]["boot"]["state"], "booted", "{proof}");
    machines.assert_gone();

    let shown = machines.prove(&["alice/silent", "--boot", "--prove-boot-seconds", "10"]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    println!("{text}");
    assert_eq!(shown.status.code(), Some(1), "{shown:?}");
    for named in ["alice/silent", "\"login:\" within 10 s", "kernel panic"] {
        assert!(text.contains(named), "{named}: {text}");
    }
    machines.assert_gone();

    // Without QEMU that is said before anything is read.
    let without = machines.command(&["alice/loud", "--boot"]).env("PATH", "/nowhere").output();
    let without = without.unwrap();
    assert_eq!(without.status.code(), Some(1), "{without:?}");
    let said = String::from_utf8_lossy(&without.stderr).into_owned();
    assert!(said.contains("qemu-system-x86") && said.contains("--boot"), "{said}");

    // Interrupted it ends its machine; killed, too.
    let (mut child, _said) = machines.begin(&["alice/silent", "--boot"]);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    machines.assert_gone();
    assert_eq!(fs::read_dir(&machines.scratch).unwrap().count(), 0, "scratch files are left");
    let (mut child, _said) = machines.begin(&["alice/silent", "--boot"]);
    child.kill().unwrap();
    child.wait().unwrap();
    machines.assert_gone();
    assert!(images.is_dir());

    // By the settings, by a server that runs.
    let settings = &mut machines.site.server(SERVER).unwrap().settings;
    settings.set("prove.boot", vec!["alice/loud"]);
    machines.site.start_server(SERVER).unwrap();
    let shown = machines.prove(&["alice/loud"]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    println!("{text}");
    assert!(shown.status.success() && text.contains("it was up after"), "{shown:?}");
    let shown = machines.prove(&["alice/silent"]);
    assert!(shown.status.success(), "{shown:?}");
}
