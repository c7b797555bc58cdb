//! Thin lines: slow is not dead.

use std::time::{Duration, Instant};

use janus_client::{
    link::Direct,
    transfer::{Gate, StartPlan},
    ways::Ways,
};
use janus_proto::{
    ids::{BackupId, ServerId},
    pb::DiskStart,
    tls::Identity,
};
use xtask::{
    disk,
    site::{Part, SITES, Sites, answers},
};

use crate::scene::{Fault::Slow, MIB, NORTH, OFFICE, Phase, SOUTH, Scene, case};

#[test]
fn as_root_an_upload_over_a_slow_line() {
    case(NORTH, Phase::Upload, &[Slow(NORTH)]);
}

#[test]
fn as_root_a_commit_over_a_slow_line() {
    case(SOUTH, Phase::Commit, &[Slow(SOUTH)]);
}

#[test]
fn as_root_a_restore_over_a_slow_line() {
    case(SOUTH, Phase::Restore, &[Slow(SOUTH)]);
}

#[test]
fn as_root_a_commit_through_a_slow_janus() {
    case(SOUTH, Phase::Commit, &[Slow(NORTH)]);
}

#[test]
fn as_root_a_restore_through_a_slow_janus() {
    case(SOUTH, Phase::Restore, &[Slow(NORTH)]);
}

#[test]
fn as_root_an_upload_of_a_machine_on_a_slow_line() {
    case(SOUTH, Phase::Upload, &[Slow(OFFICE)]);
}

/// 100 MiB at 10 Mbit/s through the janus of one site to the server of the other, so that both lines carry all of it.
#[test]
fn as_root_a_thin_line_is_not_a_dead_server() {
    let scene = Scene::new();
    for place in SITES.into_iter().chain([OFFICE]) {
        scene.sites.network().slow(place, 10_000).unwrap();
    }
    let large = scene.sites.folder().join("large.raw");
    disk::blank(&large, 100 * MIB).unwrap();
    disk::write_noise(&large, 0..100 * MIB, 7).unwrap();
    let client = scene.sites.client("desk", &[format!("disk={}", large.display())]).unwrap();
    let mut upload = client.start(&["backup", "--json", "--server", SOUTH]).unwrap();
    let gate = other_machine(&scene.sites);
    let losses_before = SITES.map(|site| losses(&scene.sites, site));

    let (mut answered, mut beside, began) = (Vec::new(), Vec::new(), Instant::now());
    while !upload.has_ended() {
        // Where janus sends it, and to the server whose line is full.
        for server in [None, Some(SOUTH), Some(NORTH)] {
            answered.push(start(&scene.sites, NORTH, &gate, server));
        }
        beside.push(start(&scene.sites, OFFICE, &gate, Some(SOUTH)));
        std::thread::sleep(Duration::from_secs(3));
        assert!(began.elapsed() < Duration::from_secs(240), "{}", upload.log());
    }
    let finished = upload.wait().unwrap();
    let backup: answers::Backup = finished.answer().unwrap();
    let slowest = answered.iter().max().unwrap();
    println!(
        "100 MiB in {:.0} s; {} starts, the slowest {slowest:?}",
        backup.seconds,
        answered.len()
    );
    assert!(backup.seconds > 80.0, "that was no line of 10 Mbit/s: {backup:?}");
    assert_eq!((backup.server.as_str(), backup.skipped.len()), (SOUTH, 0), "{backup:?}");
    assert_eq!(backup.disks[0].sent_bytes, 100 * MIB, "{backup:?}");
    assert!(!finished.stderr.contains("connection lost"), "{}", finished.stderr);
    assert!(answered.len() >= 30 && *slowest < Duration::from_secs(2), "{answered:?}");
    // On the full line itself packets are lost, those of new connections too: one attempt to connect may be in vain.
    assert!(beside.iter().all(|took| *took < Duration::from_secs(5)), "{beside:?}");
    // Nor does any janus believe that it lost a server.
    assert_eq!(SITES.map(|site| losses(&scene.sites, site)), losses_before);
}

fn losses(sites: &Sites, site: &str) -> usize {
    let log = sites.log(site, Part::Janus);
    log.lines()
        .filter(|line| line.contains("not reachable") || line.contains("does not answer"))
        .count()
}

fn other_machine(sites: &Sites) -> Gate {
    let client = sites.client("phone", &[]).unwrap();
    let pki = sites.folder().join("pki/phone");
    let path = |name: &str| pki.join(name);
    let identity = Identity::load(path("cert.pem"), path("key.pem"), path("ca.pem")).unwrap();
    drop(client);
    // Addresses: this process has no names of the namespaces.
    let url = |site: &str| format!("https://{}:7420", sites.network().address(site));
    let urls = SITES.iter().map(|site| url(site)).collect();
    let (failover_after, direct) = (Duration::from_secs(5), Direct::Never);
    let failover_wait = failover_after;
    let ways = Ways::direct(urls, identity);
    Gate { ways, failover_after, failover_wait, direct, machine: None }
}

/// Time until a start of a machine at `place` is answered, the connection included.
fn start(sites: &Sites, place: &str, gate: &Gate, server: Option<&str>) -> Duration {
    let disk = DiskStart { disk_id: "disk".into(), size_bytes: MIB, logical_sector_bytes: 512 };
    let plan =
        StartPlan { backup_id: BackupId::new(), disks: vec![disk], use_counter: 1, machine: None };
    let server: Option<ServerId> = server.map(|server| server.parse().unwrap());
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            sites.enter(place).unwrap();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let began = Instant::now();
                let run = gate.start(&plan, server.as_ref()).await.unwrap();
                let took = began.elapsed();
                gate.abort(run.plan.backup_id, &run.server).await.unwrap();
                took
            })
        });
        asking.join().unwrap()
    })
}
