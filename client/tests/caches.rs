//! The hash cache of a machine: shown, checked, made anew, forgotten; and damaged in every way, which may cost time only.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use janus_proto::{hash::hash_block, ids::BlockHash};
use serde_json::Value;
use xtask::{
    disk,
    loopback::SmallFileSystem,
    noise::Noise,
    site::{Client, Finished, Plan, Programs, Site, answers},
};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 40 * MIB + 512;

fn scene(plan: &Plan) -> (Site, PathBuf, Client) {
    let site = Site::start(Programs::for_tests().unwrap(), plan).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, DISK_BYTES).unwrap();
    disk::write_noise(&path, 0..DISK_BYTES - 4 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    (site, path, client)
}

fn cache(client: &Client, arguments: &[&str]) -> Value {
    let arguments: Vec<&str> = ["cache"].iter().chain(arguments).copied().collect();
    client.answer(&arguments).unwrap()
}

/// What each server is known to have: its name and how many blocks changed since.
fn known(client: &Client) -> Vec<(String, u64)> {
    let shown = cache(client, &["show"]);
    let servers = shown["disks"][0]["servers"].as_array().cloned().unwrap_or_default();
    let known = servers.iter().map(|one| {
        (one["server"].as_str().unwrap().to_owned(), one["changed_blocks"].as_u64().unwrap())
    });
    known.collect()
}

#[test]
fn a_cache_is_shown_checked_made_anew_and_forgotten() {
    let (mut site, path, client) = scene(&Plan::default());
    assert_eq!(cache(&client, &["show"])["disks"].as_array().unwrap().len(), 0);
    client.backup().unwrap();
    disk::change(&path, MIB, 2).unwrap();
    let second = client.backup().unwrap().server;
    let first = if second == "server-a" { "server-b" } else { "server-a" };
    let expected = known(&client);
    let changed = |server: &str| expected.iter().find(|(name, _)| name == server).unwrap().1;
    assert_eq!((changed(&second), changed(first)), (0, MIB / 4096));
    let verified = cache(&client, &["verify", "disk"]);
    assert_eq!(verified["disks"][0]["proven_by"], 1, "{verified}");

    // Lost, and made anew: the next backups send what changed, as if nothing had been.
    fs::remove_dir_all(client.cache().join("disk")).unwrap();
    let rebuilt = cache(&client, &["rebuild"]);
    assert_eq!(rebuilt["complete"], true, "{rebuilt}");
    assert_eq!(known(&client).len(), 2);
    disk::change(&path, MIB, 3).unwrap();
    for _ in 0..2 {
        let backup = client.backup().unwrap();
        assert_eq!(backup.disks[0].compare, "cache", "{backup:?}");
        assert!(backup.disks[0].sent_bytes <= 2 * MIB, "{backup:?}");
    }

    // Where a server can't be asked, what is known of it stays.
    site.kill_server(first).unwrap();
    let finished = client.run(&["cache", "rebuild", "--json"]).unwrap();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_eq!(known(&client).len(), 2);

    let forgotten = cache(&client, &["forget", "--server", first]);
    assert_eq!(forgotten["forgotten"][0], "disk");
    assert_eq!(known(&client).iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [&second]);
    cache(&client, &["forget", "disk"]);
    assert_eq!(known(&client), []);
    assert_eq!(client.backup().unwrap().disks[0].compare, "reconciled");

    for (arguments, said) in [
        (&["cache", "show", "other"][..], "no hash cache of disk other"),
        (&["cache", "rebuild", "other"], "no disk with the id other"),
        (&["cache", "forget"], "name what to forget"),
    ] {
        let failure = client.failure(arguments).unwrap();
        assert!(failure.error.contains(said) && failure.exit_code == 2, "{failure:?}");
    }
}

/// Backs up, and restores what was.
fn backs_up(site: &Site, path: &Path, client: &Client) -> Finished {
    let finished = client.run(&["backup", "--json"]).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let backup: answers::Backup = finished.answer().unwrap();
    let to = site.folder().join("restored");
    client.restore(&backup.disks[0].snapshot_id, &to).unwrap();
    disk::compare(path, &to).unwrap();
    fs::remove_file(to).unwrap();
    finished
}

/// The disk that it is on loses what is there: first single files, of which reading the own memory's first page stands for one, then
/// all of it.
#[test]
fn as_root_a_cache_on_a_failing_disk_stops_no_backup() {
    let (site, path, mut client) = scene(&Plan::default());
    client.backup().unwrap();
    for name in ["state.json", "disk/CURRENT", "ways.json"] {
        let file = client.cache().join(name);
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", file).unwrap();
    }
    let finished = backs_up(&site, &path, &client);
    assert!(finished.stderr.contains("going on without remembering"), "{finished:?}");
    assert!(finished.stderr.contains("damaged and moved aside"), "{finished:?}");
    let finished = backs_up(&site, &path, &client);
    assert!(!finished.stderr.contains("going on without"), "{finished:?}");

    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    client.settings.set("cache_path", store.folder().join("cache").to_string_lossy());
    client.backup().unwrap();
    store.lose_content().unwrap();
    for round in 0..3 {
        disk::change(&path, MIB, round).unwrap();
        println!("{}", backs_up(&site, &path, &client).stderr);
    }
}

/// Files that a cache is made of.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with("quarantine-") {
            found.extend(files(&path));
        } else if path.is_file() && name != "lock" {
            found.push(path);
        }
    }
    found.sort_unstable();
    found
}

/// Damages one file at these places, all of which have the same; says how.
fn damage(path: &Path, places: &[u64], noise: &mut Noise) -> &'static str {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let (kind, bit) = (noise.below(4), 1 << noise.below(8));
    if kind == 3 || length == 0 {
        fs::remove_file(path).unwrap();
        return "deleted";
    }
    for place in places {
        match kind {
            0 => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, *place).unwrap();
                file.write_all_at(&[byte[0] ^ bit], *place).unwrap();
            }
            1 => {
                let sector = place / 4096 * 4096;
                let zeros = vec![0; 4096.min(length - sector) as usize];
                file.write_all_at(&zeros, sector).unwrap();
            }
            _ => file.set_len(*places.iter().min().unwrap()).unwrap(),
        }
    }
    ["one bit flipped", "4 KiB zeroed", "cut"][kind as usize]
}

/// Damages what the next backup can't do without: `CURRENT`, or wherever the database has the hash of one block that is still the
/// same. Says what.
fn damage_what_counts(folder: &Path, same: &[[u8; 4096]], noise: &mut Noise) -> String {
    if noise.below(3) == 0 {
        let current = folder.join("CURRENT");
        let place = noise.below(fs::metadata(&current).unwrap().len());
        return format!("CURRENT {}", damage(&current, &[place], noise));
    }
    let hash = hash_block(&same[noise.below(same.len() as u64) as usize]);
    let byte = noise.below(BlockHash::LEN as u64);
    let mut done = Vec::new();
    // Two, where a compaction was killed.
    for database in files(folder).iter().filter(|path| path.ends_with("db")) {
        let bytes = fs::read(database).unwrap();
        let found = bytes.windows(BlockHash::LEN).enumerate().filter(|(_, part)| *part == hash.0);
        let places: Vec<_> = found.map(|(at, _)| at as u64 + byte).collect();
        if !places.is_empty() {
            let how = damage(database, &places, noise);
            done.push(format!("a hash, {} times in db, {how}", places.len()));
        }
    }
    assert!(!done.is_empty(), "no database has it");
    done.join(", ")
}

/// Damages any file anywhere, be it of use or not. Says what.
fn damage_anything(folder: &Path, noise: &mut Noise) -> String {
    let all = files(folder);
    let victim = &all[noise.below(all.len() as u64) as usize];
    let place = noise.below(fs::metadata(victim).unwrap().len().max(1));
    let how = damage(victim, &[place], noise);
    format!("{} {how}", victim.strip_prefix(folder).unwrap().display())
}

/// Blocks of the disk with data.
fn blocks(path: &Path) -> Vec<[u8; 4096]> {
    let bytes = fs::read(path).unwrap();
    let (blocks, _) = bytes[..(DISK_BYTES - 4 * MIB) as usize].as_chunks();
    blocks.to_vec()
}

#[test]
fn damage_and_kills_cost_time_and_no_backup_is_wrong() {
    let rounds = if std::env::var_os("JANUS_SOAK").is_some() { 100 } else { 10 };
    let given = std::env::var("JANUS_CACHE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(Noise::fresh_seed);
    println!("seed {seed} (JANUS_CACHE_SEED={seed} repeats it), {rounds} rounds");
    let mut noise = Noise::new(seed);
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let (site, path, mut client) = scene(&plan);
    client.settings.set("log", "warn,janus_client=debug");
    client.backup().unwrap();
    let (mut noticed, mut others, mut others_noticed) = (0, 0, 0);
    for round in 0..rounds + rounds / 5 {
        let changed = disk::change(&path, MIB, seed.wrapping_add(round)).unwrap();
        let all = (0..).zip(blocks(&path));
        let same: Vec<_> =
            all.filter(|(at, _)| !changed.contains(at)).map(|(_, block)| block).collect();
        // Every other time it is killed before, so that there is an open run and a half-written generation.
        if round % 2 == 1 {
            let running = client.start(&["backup", "--json"]).unwrap();
            thread::sleep(Duration::from_millis(noise.below(400)));
            running.kill();
            running.wait().unwrap();
        }
        let (folder, counts) = (client.cache().join("disk"), round < rounds);
        let what = match counts {
            true => damage_what_counts(&folder, &same, &mut noise),
            false => damage_anything(&folder, &mut noise),
        };
        let finished = backs_up(&site, &path, &client);
        let compare = finished.answer::<answers::Backup>().unwrap().disks[0].compare.clone();
        // What is remembered now is exactly what the server has, whether the damage was noticed or hit nothing that counts.
        let verified = cache(&client, &["verify"]);
        assert_eq!(verified["disks"][0]["proven_by"], 1, "{verified}");
        let said = ["the hash cache starts empty", "the hash cache is damaged"];
        let is_noticed = said.iter().any(|said| finished.stderr.contains(said));
        println!("round {round}: {what}: noticed {is_noticed}, by {compare}");
        match counts {
            true => noticed += u64::from(is_noticed),
            false => {
                (others, others_noticed) = (others + 1, others_noticed + u64::from(is_noticed))
            }
        }
        assert!(is_noticed || !counts, "{}", finished.stderr);
    }
    println!(
        "{noticed} of {rounds} damages found; of {others} anywhere {others_noticed}, the others hit nothing that counts; all backups right"
    );
    assert_eq!(noticed, rounds);
}
