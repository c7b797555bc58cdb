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

use serde_json::Value;
use xtask::{
    disk,
    noise::Noise,
    site::{Client, Plan, Programs, Site},
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

/// Damages one file; says how.
fn damage(path: &Path, noise: &mut Noise) -> &'static str {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let place = noise.below(length.max(1));
    match noise.below(4) {
        _ if length == 0 => "left empty",
        0 => {
            let mut byte = [0];
            file.read_exact_at(&mut byte, place).unwrap();
            byte[0] ^= 1 << noise.below(8);
            file.write_all_at(&byte, place).unwrap();
            "one bit flipped"
        }
        1 => {
            let sector = place / 4096 * 4096;
            let zeros = vec![0; 4096.min(length - sector) as usize];
            file.write_all_at(&zeros, sector).unwrap();
            "4 KiB zeroed"
        }
        2 => {
            file.set_len(place).unwrap();
            "cut"
        }
        _ => {
            fs::remove_file(path).unwrap();
            "deleted"
        }
    }
}

#[test]
fn damage_and_kills_cost_time_and_no_backup_is_wrong() {
    let rounds = if std::env::var_os("JANUS_SOAK").is_some() { 100 } else { 10 };
    let given = std::env::var("JANUS_CACHE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(Noise::fresh_seed);
    println!("seed {seed} (JANUS_CACHE_SEED={seed} repeats it), {rounds} rounds");
    let mut noise = Noise::new(seed);
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let (site, path, client) = scene(&plan);
    client.backup().unwrap();
    let (mut noticed, mut harmless) = (0, 0);
    for round in 0..rounds {
        disk::change(&path, MIB, seed.wrapping_add(round)).unwrap();
        // Every other time it is killed before, so that there is an open run and a half-written generation.
        if round % 2 == 1 {
            let running = client.start(&["backup", "--json"]).unwrap();
            thread::sleep(Duration::from_millis(noise.below(400)));
            running.kill();
            running.wait().unwrap();
        }
        let all = files(&client.cache().join("disk"));
        let victim = &all[noise.below(all.len() as u64) as usize];
        let how = damage(victim, &mut noise);
        let backup = client.backup().unwrap();
        let taken = &backup.disks[0];
        let to = site.folder().join("restored");
        client.restore(&taken.snapshot_id, &to).unwrap();
        disk::compare(&path, &to).unwrap();
        fs::remove_file(to).unwrap();
        // What is remembered now is exactly what the server has, whether the damage was noticed or hit nothing that counts.
        let verified = cache(&client, &["verify"]);
        assert_eq!(verified["disks"][0]["proven_by"], 1, "{verified}");
        match taken.compare.as_str() {
            "cache" => harmless += 1,
            _ => noticed += 1,
        }
        let victim = victim.strip_prefix(client.cache()).unwrap().display();
        println!("round {round}: {victim} {how}: found by {}", taken.compare);
    }
    println!(
        "{rounds} of {rounds} backups right; {noticed} damages noticed, {harmless} hit nothing that counts"
    );
    assert_eq!(noticed + harmless, rounds);
}
