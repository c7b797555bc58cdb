//! One case: a fault that strikes in some phase, and what must go on under it and after it.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use janus_proto::ids::SEGMENT_BYTES;
use xtask::{
    disk,
    loopback::SmallFileSystem,
    noise::Noise,
    site::{Client, Cut, Finished, MACHINES, Part, Programs, Running, SITES, Sites, answers},
};

pub const NORTH: &str = SITES[0];
pub const SOUTH: &str = SITES[1];
pub const OFFICE: &str = MACHINES;

pub const MIB: u64 = 1 << 20;
/// Rate of every line at first: operations take long enough to be hit in their middle.
const LINE_KBIT: u32 = 50_000;
const SLOW_KBIT: u32 = 8_000;
const DISK_MIB: u64 = 16;
const FILLER: &str = "filler";
/// Less than the default, so that tests need not wait for a minute.
pub const FAILOVER_SECONDS: u64 = 5;
/// A silent peer is noticed after 15 s, and then there is the failover; starts and lists are far quicker.
const LONGEST: Duration = Duration::from_secs(60);
const QUICK: Duration = Duration::from_secs(12);

/// One thing that happens.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// A place's whole line is cut.
    Line(&'static str, Cut),
    /// The way between two places is cut.
    Way(&'static str, &'static str, Cut),
    /// A place's line gets slow.
    Slow(&'static str),
    /// A program is killed.
    Kill(&'static str, Part),
    /// A program is suspended.
    Freeze(&'static str, Part),
    /// A server's disk has no space left. Only in a scene with small stores.
    Fill(&'static str),
}

/// When it happens. New backups, lists and restores are tried under every fault in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Upload,
    Commit,
    Restore,
}

/// What is cut and gone, to know what can be reached.
struct Broken<'a>(&'a [Fault]);

impl Broken<'_> {
    fn is_open(&self, one: &str, other: &str) -> bool {
        let cuts = |fault: &Fault| match *fault {
            Fault::Line(place, _) => one != other && (place == one || place == other),
            Fault::Way(a, b, _) => (a == one && b == other) || (a == other && b == one),
            _ => false,
        };
        !self.0.iter().any(cuts)
    }

    fn runs(&self, at: &str, which: Part) -> bool {
        let stops = |fault: &Fault| match *fault {
            Fault::Kill(site, part) | Fault::Freeze(site, part) => site == at && part == which,
            _ => false,
        };
        !self.0.iter().any(stops)
    }

    fn takes(&self, site: &str) -> bool {
        let fills = |fault: &Fault| matches!(*fault, Fault::Fill(full) if full == site);
        self.server(site) && !self.0.iter().any(fills)
    }

    fn janus(&self, site: &str) -> bool {
        self.runs(site, Part::Janus) && self.is_open(OFFICE, site)
    }

    fn server(&self, site: &str) -> bool {
        let through = |janus: &&str| self.janus(janus) && self.is_open(janus, site);
        self.runs(site, Part::Server) && SITES.iter().any(through)
    }

    fn any_janus(&self) -> bool {
        SITES.iter().any(|site| self.janus(site))
    }

    fn any_server(&self) -> bool {
        SITES.iter().any(|site| self.server(site))
    }

    fn any_takes(&self) -> bool {
        SITES.iter().any(|site| self.takes(site))
    }
}

/// Sites, and a machine that has a backup on both.
pub struct Scene {
    pub sites: Sites,
    pub client: Client,
    pub disk: PathBuf,
    noise: Noise,
    /// File systems of the servers, where they have their own.
    stores: BTreeMap<&'static str, SmallFileSystem>,
}

impl Scene {
    pub fn new() -> Self {
        Self::on(BTreeMap::new())
    }

    /// Each server's images are on a small file system of its own.
    pub fn with_small_stores() -> Self {
        Self::on(SITES.map(|site| (site, SmallFileSystem::mount(200 * MIB).unwrap())).into())
    }

    fn on(stores: BTreeMap<&'static str, SmallFileSystem>) -> Self {
        let mut sites = Sites::prepare(Programs::for_tests().unwrap()).unwrap();
        for (site, store) in &stores {
            sites.move_images(site, &store.folder().join("images")).unwrap();
        }
        sites.heal().unwrap();
        let seed = Noise::fresh_seed();
        println!("seed {seed}");
        let disk = sites.folder().join("disk.raw");
        disk::blank(&disk, DISK_MIB * MIB).unwrap();
        disk::write_noise(&disk, 0..2 * MIB, seed).unwrap();
        let mut client = sites.client("laptop", &[format!("disk={}", disk.display())]).unwrap();
        client.settings.set("failover_after_seconds", FAILOVER_SECONDS);
        client.settings.set("log", "debug");
        let scene = Self { sites, client, disk, noise: Noise::new(seed), stores };
        scene.lines_as_at_first();
        scene.sites.await_equal(&scene.client, Duration::from_secs(30)).unwrap();
        for _ in SITES {
            scene.client.backup().unwrap();
        }
        scene
    }

    /// Makes it `site`'s turn.
    pub fn make_turn(&mut self, site: &str) {
        for _ in SITES {
            let machines = self.sites.await_equal(&self.client, Duration::from_secs(30)).unwrap();
            let uses = machines[0]["uses"].as_array().unwrap();
            let next = uses.iter().min_by_key(|used| used["use_counter"].as_u64()).unwrap();
            if next["server"] == site {
                return;
            }
            self.client.backup().unwrap();
        }
        panic!("it does not get {site}'s turn");
    }

    pub fn change(&mut self, mib: u64) {
        disk::write_noise(&self.disk, 0..mib * MIB, self.noise.number()).unwrap();
    }

    pub fn inject(&mut self, faults: &[Fault]) {
        for fault in faults {
            match *fault {
                Fault::Line(place, how) => self.sites.network().cut(place, how).unwrap(),
                Fault::Way(one, other, how) => {
                    self.sites.network().cut_between(one, other, how).unwrap();
                }
                Fault::Slow(place) => self.sites.network().slow(place, SLOW_KBIT).unwrap(),
                Fault::Kill(site, part) => self.sites.kill(site, part).unwrap(),
                Fault::Freeze(site, part) => self.sites.process(site, part).unwrap().freeze(),
                Fault::Fill(site) => fill(self.stores[site].folder()),
            }
        }
    }

    fn heal(&mut self) {
        self.sites.heal().unwrap();
        for store in self.stores.values() {
            let _ = fs::remove_file(store.folder().join(FILLER));
        }
        self.lines_as_at_first();
    }

    fn lines_as_at_first(&self) {
        self.rate_lines(LINE_KBIT);
    }

    /// All lines are whole again, with this rate.
    pub fn heal_lines(&self, kbit: u32) {
        self.sites.network().heal().unwrap();
        self.rate_lines(kbit);
    }

    fn rate_lines(&self, kbit: u32) {
        for place in SITES.into_iter().chain([OFFICE]) {
            self.sites.network().slow(place, kbit).unwrap();
        }
    }

    /// A backup in its middle.
    pub fn uploading(&self) -> Running {
        let stored = || SITES.map(|site| self.sites.stored_bytes(site)).iter().sum::<u64>();
        let before = stored();
        let running = self.client.start(&["backup", "--json"]).unwrap();
        await_that(&running, || stored() >= before + 3 * MIB);
        running
    }

    pub fn committing(&self) -> Running {
        let running = self.client.start(&["backup", "--json"]).unwrap();
        await_that(&running, || running.log().contains("committing"));
        running
    }

    /// A restore in its middle.
    pub fn restoring(&self, snapshot: &str, to: &Path) -> Running {
        let folder = to.parent().unwrap();
        let text = to.to_string_lossy();
        let running = self.client.start(&["restore", snapshot, "--to", &text, "--json"]).unwrap();
        let partial = || {
            let files = fs::read_dir(folder).unwrap().flatten();
            let ours =
                files.filter(|file| file.file_name().to_string_lossy().ends_with(".partial"));
            ours.map(|file| disk::allocated_bytes(&file.path()).unwrap_or(0)).sum::<u64>()
        };
        await_that(&running, || partial() >= 3 * MIB);
        running
    }

    /// The newest backup holds what the disk holds.
    pub fn check_restore(&self, snapshot: &str) {
        let to = self.sites.folder().join("restored.raw");
        self.client.restore(snapshot, &to).unwrap();
        disk::compare(&self.disk, &to).unwrap();
        fs::remove_file(to).unwrap();
    }
}

/// Takes what space there is.
pub fn fill(folder: &Path) {
    let mut file = fs::File::create(folder.join(FILLER)).unwrap();
    while io::copy(&mut io::repeat(7).take(MIB), &mut file).is_ok() {}
    file.sync_all().unwrap();
}

pub fn await_that(running: &Running, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < until, "it does not get there: {}", running.log());
        thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes that may be sent again at most, by what the client says of each time it took its run over: what it had sent and had
/// not been acknowledged. Of these it begins with a whole segment.
pub fn may_be_sent_again(finished: &Finished) -> u64 {
    let told = finished.stderr.split_whitespace();
    let told = told.filter_map(|word| word.strip_prefix("unacknowledged_bytes="));
    told.map(|bytes| bytes.parse::<u64>().unwrap() + SEGMENT_BYTES).sum()
}

fn said(finished: &Finished) -> String {
    format!(
        "code {:?} after {:.1} s: {}{}",
        finished.code, finished.seconds, finished.stderr, finished.stdout
    )
}

/// Ended with 0 when it could, else with 3, no server; and in time.
fn assert_ended(what: &str, finished: &Finished, could: bool, limit: Duration) {
    println!("{what}: code {:?} after {:.1} s", finished.code, finished.seconds);
    let expected = if could { 0 } else { 3 };
    assert_eq!(finished.code, Some(expected), "{what}: {}", said(finished));
    assert!(finished.seconds < limit.as_secs_f64(), "{what}: {}", said(finished));
}

/// `faults` strike in `phase` of an operation at `turn`'s server. It and all that comes after ends well if any
/// server can be reached; after healing both janus are equal.
pub fn case(turn: &'static str, phase: Phase, faults: &[Fault]) {
    let fills = faults.iter().any(|fault| matches!(fault, Fault::Fill(_)));
    let mut scene = if fills { Scene::with_small_stores() } else { Scene::new() };
    run_case(&mut scene, turn, phase, faults);
}

pub fn run_case(scene: &mut Scene, turn: &'static str, phase: Phase, faults: &[Fault]) {
    let began = Instant::now();
    scene.make_turn(turn);
    scene.change(DISK_MIB);
    let broken = Broken(faults);
    let known = match phase {
        Phase::Upload | Phase::Commit => strike_backup(scene, phase, faults, &broken),
        Phase::Restore => strike_restore(scene, turn, faults, &broken),
    };
    under_the_fault(scene, &broken, &known);

    scene.heal();
    let healed = Instant::now();
    scene.sites.await_equal(&scene.client, Duration::from_secs(60)).unwrap();
    println!("equal {:.1} s after healing", healed.elapsed().as_secs_f64());
    let last = scene.client.backup().unwrap();
    scene.check_restore(&last.disks[0].snapshot_id);
    println!("{faults:?} in {phase:?} at {turn}: {:.1} s", began.elapsed().as_secs_f64());
}

/// Returns the snapshots that there are then.
fn strike_backup(
    scene: &mut Scene,
    phase: Phase,
    faults: &[Fault],
    broken: &Broken<'_>,
) -> Vec<String> {
    let mut known = snapshots(&scene.client.list().unwrap());
    let running = if phase == Phase::Commit { scene.committing() } else { scene.uploading() };
    scene.inject(faults);
    let finished = running.wait().unwrap();
    // A commit may be through before its line is cut.
    let is_through = phase == Phase::Commit && finished.code == Some(0);
    assert_ended("the backup struck", &finished, broken.any_takes() || is_through, LONGEST);
    if finished.code == Some(0) {
        known.push(finished.answer::<answers::Backup>().unwrap().disks[0].snapshot_id.clone());
    }
    known
}

fn strike_restore(
    scene: &mut Scene,
    turn: &str,
    faults: &[Fault],
    broken: &Broken<'_>,
) -> Vec<String> {
    let backup = scene.client.backup().unwrap();
    assert_eq!(backup.server, turn);
    let known = snapshots(&scene.client.list().unwrap());
    let to = scene.sites.folder().join("restored.raw");
    let running = scene.restoring(&backup.disks[0].snapshot_id, &to);
    scene.inject(faults);
    let finished = running.wait().unwrap();
    assert_ended("the restore struck", &finished, broken.server(turn), LONGEST);
    match finished.code {
        Some(0) => disk::compare(&scene.disk, &to).unwrap(),
        _ => assert!(!to.exists(), "half a disk under its final name"),
    }
    let _ = fs::remove_file(to);
    known
}

/// While it lasts: a new backup, the list, a restore of what can be had.
fn under_the_fault(scene: &mut Scene, broken: &Broken<'_>, known: &[String]) {
    scene.change(1);
    let backup = scene.client.run(&["backup", "--json"]).unwrap();
    assert_ended("a backup under it", &backup, broken.any_takes(), LONGEST);
    let list = scene.client.run(&["list", "--json"]).unwrap();
    assert_ended("a list under it", &list, broken.any_janus(), QUICK);
    if broken.any_janus() {
        let list: answers::List = list.answer().unwrap();
        let listed = snapshots(&list);
        let missing: Vec<_> = known.iter().filter(|id| !listed.contains(id)).collect();
        assert!(missing.is_empty(), "not listed: {missing:?} in {list:?}");
        for snapshot in &list.snapshots {
            assert_eq!(snapshot.reachable, broken.server(&snapshot.server), "{snapshot:?}");
        }
        for site in SITES.iter().filter(|site| !broken.server(site)) {
            assert!(list.unreachable.iter().any(|away| away.server == *site), "{list:?}");
        }
    }
    let to = scene.sites.folder().join("restored.raw");
    let text = to.to_string_lossy();
    let restore = scene.client.run(&["restore", "disk", "--to", &text, "--json"]).unwrap();
    assert_ended("a restore under it", &restore, broken.any_server(), LONGEST);
    if restore.code == Some(0) {
        // The newest there is, as the backup before went where one can be reached.
        disk::compare(&scene.disk, &to).unwrap();
        fs::remove_file(to).unwrap();
    }
}

fn snapshots(list: &answers::List) -> Vec<String> {
    list.snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect()
}
