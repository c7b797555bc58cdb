//! A first backup that is struck after 10, 50 and 90 % of it: what is sent again, and how soon bytes flow.

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

use janus_proto::channel::STREAM_WINDOW_BYTES;
use xtask::{
    disk,
    site::{
        Client, Cut,
        Part::{Janus, Server},
        Running, SITES, answers,
    },
};

use crate::scene::{
    FAILOVER_SECONDS, Fault, MIB, NORTH, OFFICE, Scene, await_that, may_be_sent_again,
};

const DISK_BYTES: u64 = 64 * MIB;
/// A first backup takes six seconds.
const LINE_KBIT: u32 = 100_000;
/// What may be under way without having been acknowledged: a window on each of the two ways, and what programs and systems
/// on them buffer.
const UNDER_WAY: u64 = 2 * STREAM_WINDOW_BYTES as u64 + 8 * MIB;
/// Silence after which a peer is given up.
const SILENCE: Duration = Duration::from_secs(15);

/// What happens in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strike {
    /// The machine's line is cut for two seconds.
    Line,
    /// It is cut for so long that its connections die.
    LongLine,
    /// The server is killed and started again.
    Server,
    /// The janus that the run goes through is killed.
    Janus,
    /// The machine loses its power, and begins again.
    Client,
    /// The server is gone for good.
    ServerForGood,
}

/// A row of the table.
struct Row {
    strike: Strike,
    percent: u64,
    again: u64,
    /// What may be sent again, by what the client had heard of.
    unacknowledged: u64,
    flowing: Duration,
    ended: f64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { strike, percent, again, unacknowledged, flowing, ended } = self;
        let mib = |bytes: &u64| *bytes as f64 / MIB as f64;
        let (again, unacknowledged, flowing) =
            (mib(again), mib(unacknowledged), flowing.as_secs_f64());
        write!(
            f,
            "{strike:?} at {percent} %: {again:.1} MiB sent again (at most {unacknowledged:.1} by what was acknowledged), bytes flow after {flowing:.1} s, ended after {ended:.1} s"
        )
    }
}

fn stored(scene: &Scene) -> [u64; 2] {
    SITES.map(|site| scene.sites.stored_bytes(site))
}

/// A machine of its own for each backup: it is its first.
fn machine(scene: &Scene, percent: u64) -> Client {
    let path = scene.sites.folder().join(format!("first-{percent}.raw"));
    disk::blank(&path, DISK_BYTES).unwrap();
    disk::write_noise(&path, 0..DISK_BYTES, percent).unwrap();
    let disks = [format!("disk={}", path.display())];
    let mut client = scene.sites.client(&format!("first-{percent}"), &disks).unwrap();
    client.settings.set("failover_after_seconds", FAILOVER_SECONDS);
    client
}

fn begin(client: &Client) -> Running {
    client.start(&["backup", "--json"]).unwrap()
}

fn strike(strike: Strike, percents: &[u64]) {
    let mut scene = Scene::new();
    for place in SITES.into_iter().chain([OFFICE]) {
        scene.sites.network().slow(place, LINE_KBIT).unwrap();
    }
    for percent in percents {
        let row = struck(&mut scene, strike, *percent);
        println!("{row}");
        let limit = match strike {
            // What the server had not received yet is no repetition.
            Strike::Client => DISK_BYTES / 100,
            Strike::ServerForGood => DISK_BYTES + UNDER_WAY,
            _ => UNDER_WAY.min(row.unacknowledged),
        };
        assert!(row.again <= limit, "{row}");
        let waited = SILENCE + Duration::from_secs(FAILOVER_SECONDS + 10);
        assert!(row.flowing < waited, "{row}");
    }
}

fn struck(scene: &mut Scene, strike: Strike, percent: u64) -> Row {
    let client = machine(scene, percent);
    let before = stored(scene);
    let mut running = begin(&client);
    let grown = |scene: &Scene| {
        let now = stored(scene);
        [now[0].saturating_sub(before[0]), now[1].saturating_sub(before[1])]
    };
    await_that(&running, || grown(scene).iter().sum::<u64>() >= DISK_BYTES * percent / 100);
    let at = usize::from(grown(scene)[1] > grown(scene)[0]);
    let (site, other) = (SITES[at], SITES[1 - at]);
    let mut lost = 0;
    match strike {
        Strike::Line => cut_for(scene, Duration::from_secs(2)),
        Strike::LongLine => cut_for(scene, SILENCE + Duration::from_secs(3)),
        Strike::Server => {
            scene.sites.kill(site, Server).unwrap();
            scene.sites.start_part(site, Server).unwrap();
        }
        Strike::Janus => scene.sites.kill(NORTH, Janus).unwrap(),
        Strike::Client => {
            running.kill();
            running.wait().unwrap();
            // What was on its way arrives.
            thread::sleep(Duration::from_secs(1));
            // With each block comes its hash, in the journal and the table.
            lost = DISK_BYTES.saturating_sub(grown(scene)[at] / 130 * 128);
            running = begin(&client);
        }
        Strike::ServerForGood => scene.sites.kill(site, Server).unwrap(),
    }
    let (since, now) = (Instant::now(), grown(scene));
    await_that(&running, || {
        let grown = grown(scene);
        grown[0] > now[0] + MIB / 4
            || grown[1] > now[1] + MIB / 4
            || percent == 90 && is_over(&grown)
    });
    let flowing = since.elapsed();
    let finished = running.wait().unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let backup: answers::Backup = finished.answer().unwrap();
    let expected = if strike == Strike::ServerForGood { other } else { site };
    assert_eq!(backup.server, expected, "{}", finished.stderr);
    let to = scene.sites.folder().join("restored.raw");
    client.restore(&backup.disks[0].snapshot_id, &to).unwrap();
    disk::compare(&scene.sites.folder().join(format!("first-{percent}.raw")), &to).unwrap();
    std::fs::remove_file(to).unwrap();
    scene.sites.heal().unwrap();
    scene.heal_lines(LINE_KBIT);
    let sent = backup.disks[0].sent_bytes;
    let again = match strike {
        Strike::Client => sent.saturating_sub(lost),
        // To the other one goes all that this one had.
        Strike::ServerForGood => now[at],
        _ => sent.saturating_sub(DISK_BYTES),
    };
    let unacknowledged = may_be_sent_again(&finished);
    if strike == Strike::LongLine {
        assert!(unacknowledged > 0, "its connections have outlived it: {}", finished.stderr);
    }
    Row { strike, percent, again, unacknowledged, flowing, ended: since.elapsed().as_secs_f64() }
}

fn cut_for(scene: &mut Scene, time: Duration) {
    scene.inject(&[Fault::Line(OFFICE, Cut::Down)]);
    thread::sleep(time);
    scene.heal_lines(LINE_KBIT);
}

/// All of it is there already.
fn is_over(grown: &[u64; 2]) -> bool {
    grown.iter().any(|bytes| *bytes >= DISK_BYTES)
}

#[test]
fn as_root_a_line_that_is_cut_for_a_while() {
    strike(Strike::Line, &[10, 50, 90]);
}

#[test]
fn as_root_a_line_that_is_cut_until_connections_die() {
    strike(Strike::LongLine, &[50]);
}

#[test]
fn as_root_a_server_that_is_killed_and_started() {
    strike(Strike::Server, &[10, 50, 90]);
}

#[test]
fn as_root_a_janus_that_is_killed() {
    strike(Strike::Janus, &[10, 50, 90]);
}

#[test]
fn as_root_a_machine_that_is_killed_and_begins_again() {
    strike(Strike::Client, &[10, 50, 90]);
}

#[test]
fn as_root_a_server_that_is_gone_for_good() {
    strike(Strike::ServerForGood, &[10, 50, 90]);
}
