//! What a URL costs that leads nowhere.

use std::{fs, path::Path, time::Instant};

use serde_json::{Value, json};
use xtask::{
    disk,
    site::{
        Client,
        Cut::{Drop, Reject},
        MACHINES, Part, Plan, Programs, SITES, Site, Sites, answers, url,
    },
};

const NORTH: &str = SITES[0];
const MIB: u64 = 1 << 20;

/// Seconds until a list is answered: the shortest of some tries, so that a busy machine doesn't count as a slow line.
fn answer(client: &Client, urls: &[String]) -> f64 {
    let mut client = client.clone();
    client.settings.set("urls", json!(urls));
    let listed = |_| {
        let began = Instant::now();
        client.list().unwrap();
        began.elapsed().as_secs_f64()
    };
    (0..5).map(listed).fold(f64::MAX, f64::min)
}

fn memory(client: &Client) -> Value {
    let text = fs::read(client.cache().join("ways.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn noise(folder: &Path) -> String {
    let path = folder.join("disk.raw");
    disk::blank(&path, 4 * MIB).unwrap();
    disk::write_noise(&path, 0..4 * MIB, 3).unwrap();
    format!("disk={}", path.display())
}

/// Seconds that a backup takes longer by these URLs than by the last one of them, where nothing is remembered of any: the least of some
/// tries, so that a busy machine doesn't count.
fn first_backup_takes_longer(client: &Client, urls: &[String]) -> f64 {
    let backup = |urls: &[String]| {
        let mut client = client.clone();
        client.settings.set("urls", json!(urls));
        let _ = fs::remove_file(client.cache().join("ways.json"));
        let began = Instant::now();
        client.answer::<answers::Backup>(&["backup", "--server", SITES[1]]).unwrap();
        began.elapsed().as_secs_f64()
    };
    let last = &urls[urls.len() - 1..];
    (0..4).map(|_| -backup(last) + backup(urls)).fold(f64::MAX, f64::min)
}

#[test]
fn as_root_a_home_url_that_leads_nowhere_costs_less_than_half_a_second() {
    let mut sites = Sites::start(Programs::for_tests().unwrap()).unwrap();
    let disk = noise(sites.folder());
    let client = sites.client("laptop", &[disk]).unwrap();
    sites.await_equal(&client, std::time::Duration::from_secs(30)).unwrap();
    let both = SITES.map(|site| url(site, 7420));
    let at_home = answer(&client, &both[..1]);
    let only_away = answer(&client, &both[1..]);

    sites.network().cut_between(MACHINES, NORTH, Drop).unwrap();
    let silent = answer(&client, &both);
    let one_silent = first_backup_takes_longer(&client, &both);
    let two = [both[0].clone(), url(NORTH, 7421), both[1].clone()];
    let two_silent = first_backup_takes_longer(&client, &two);
    client.backup().unwrap();
    assert_eq!(memory(&client)["last"], both[1]);
    let remembered = answer(&client, &both);
    sites.network().heal().unwrap();
    sites.network().cut_between(MACHINES, NORTH, Reject).unwrap();
    let unreachable = answer(&client, &both);
    sites.network().heal().unwrap();
    sites.kill(NORTH, Part::Janus).unwrap();
    let refused = answer(&client, &both);
    sites.start_part(NORTH, Part::Janus).unwrap();
    let back = answer(&client, &both);

    println!("seconds until a list is answered, by the state of the first URL:");
    for (state, seconds) in [
        ("answers", at_home),
        ("(only the second one is set)", only_away),
        ("silent", silent),
        ("silent, the second one worked last", remembered),
        ("unreachable", unreachable),
        ("refused", refused),
        ("answers again", back),
        ("silent, a backup takes longer by", one_silent),
        ("and with two that are silent by", two_silent),
    ] {
        println!("  {state:<36} {seconds:.3}");
    }
    assert!((0.1..0.5).contains(&one_silent), "{one_silent}");
    // It tries its URLs more than once, but waits for those before the last one once only.
    assert!((0.3..0.85).contains(&two_silent), "{two_silent}");
    assert!(silent - only_away > 0.2, "it was not silent");
    assert!(silent - only_away < 0.5 && remembered - only_away < 0.2);
    assert!(unreachable - only_away < 0.2 && refused - only_away < 0.2);
    // The home URL is preferred again as soon as it answers.
    client.backup().unwrap();
    assert_eq!(memory(&client)["last"], both[0]);

    let mut moved = client.clone();
    moved.settings.set("urls", json!([both[1]]));
    moved.backup().unwrap();
    // One run with other URLs costs nothing of what is known of these.
    let known = memory(&moved);
    assert!(known["urls"][&both[0]]["left_ms"].is_i64(), "{known}");
    client.backup().unwrap();
    let known = memory(&client);
    assert!(known["urls"].as_object().unwrap().values().all(|url| url["left_ms"].is_null()));
    assert_eq!(known["urls"].as_object().unwrap().len(), 2, "{known}");
}

/// Each janus reaches the server of its own site, and the first URL is no better than the second.
#[test]
fn as_root_a_cache_is_rebuilt_by_whichever_janus_reaches_a_server() {
    let sites = Sites::start(Programs::for_tests().unwrap()).unwrap();
    let disk = noise(sites.folder());
    let mut client = sites.client("laptop", &[disk]).unwrap();
    client.settings.set("urls", json!(SITES.map(|site| url(site, 7420))));
    sites.await_equal(&client, std::time::Duration::from_secs(30)).unwrap();
    for _ in SITES {
        client.backup().unwrap();
    }
    sites.network().cut_between(SITES[0], SITES[1], Reject).unwrap();
    let rebuilt: Value = client.answer(&["cache", "rebuild"]).unwrap();
    let servers = rebuilt["disks"][0]["servers"].as_array().unwrap();
    assert!(servers.len() == 2 && servers.iter().all(|one| one["error"].is_null()), "{rebuilt}");
    assert_eq!(rebuilt["complete"], true, "{rebuilt}");
}

#[test]
fn a_stranger_at_a_home_address_is_no_way() {
    let plan = |name: &str| Plan { servers: vec![name.into()], janus: false, folder: None };
    let programs = Programs::for_tests().unwrap();
    let (ours, stranger) = (
        Site::start(programs.clone(), &plan("ours")).unwrap(),
        Site::start(programs, &plan("stranger")).unwrap(),
    );
    let disk = noise(ours.folder());
    let mut client = ours.client("laptop", &[disk]).unwrap();
    client.settings.set("urls", json!([stranger.url(), ours.url()]));
    let backup = client.backup().unwrap();
    assert_eq!(backup.server, "ours");
    assert_eq!(memory(&client)["last"], ours.url());

    client.settings.set("urls", json!([stranger.url()]));
    let failure = client.failure(&["list"]).unwrap();
    assert_eq!(failure.exit_code, 3, "{failure:?}");
    assert!(failure.error.contains(&stranger.url()), "{failure:?}");
    assert!(failure.error.contains("authority") || failure.error.contains("CA"), "{failure:?}");
}

#[test]
fn a_damaged_memory_costs_nothing() {
    let plan = Plan { servers: vec!["ours".into()], janus: false, folder: None };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let disk = noise(site.folder());
    let client = site.client("laptop", &[disk]).unwrap();
    client.backup().unwrap();
    fs::write(client.cache().join("ways.json"), "{\"version\": 1, \"la").unwrap();
    let finished = client.run(&["backup", "--json"]).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains("lost; going on without it"), "{}", finished.stderr);
    assert_eq!(memory(&client)["last"], site.url());
}
