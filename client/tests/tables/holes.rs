//! What others have of a snapshot whose server is dead from the start.

use xtask::{
    disk,
    site::{Plan, Programs, Site, answers::Elsewhere},
};

use crate::scene::{Expected, MIB, Scene};

const A: &str = "server-a";
const B: &str = "server-b";

#[test]
fn the_share_that_is_told_is_the_share_that_comes_back() {
    let mut scene = Scene::new();
    let first = scene.backup_to(A);
    scene.change(3 * MIB, 11);
    let second = scene.backup_to(B);
    scene.change(2 * MIB, 12);
    let third = scene.backup_to(A);
    scene.change(MIB, 13);
    let fourth = scene.backup_to(B);
    scene.await_mirrored(B, &[&first, &third]);
    scene.await_mirrored(A, &[&second, &fourth]);
    assert_eq!(scene.listed(&first).elsewhere, None, "its server answers");

    scene.site.kill_server(A).unwrap();
    for taken in [&first, &third] {
        let Expected { content_bytes, held_bytes, .. } = Expected::of(taken, &[&second, &fourth]);
        assert!(held_bytes < content_bytes);
        let listed = scene.listed(taken);
        println!("{held_bytes} of {content_bytes}: {listed:?}");
        let servers = vec![B.to_owned()];
        let at_most_bytes = held_bytes;
        let elsewhere =
            Elsewhere { server: B.into(), content_bytes, held_bytes, servers, at_most_bytes };
        assert_eq!(listed.elsewhere, Some(elsewhere));
        assert!(!listed.reachable);
    }
    let text = scene.client.run(&["list"]).unwrap().stdout;
    println!("{text}");
    assert!(text.contains("% of it on server-b"), "{text}");

    // Without a map it says what there is and what to do; the same for what reads snapshots in other ways.
    let to = scene.path("refused");
    let failure =
        scene.client.failure(&["restore", &first.snapshot, "--to", to.to_str().unwrap()]).unwrap();
    println!("{}", failure.error);
    for word in [A, "can't be reached", "% of it", "--partial MAP"] {
        assert!(failure.error.contains(word), "{failure:?}");
    }
    assert_eq!(failure.exit_code, 3);
    let failure = scene.client.failure(&["ls", &format!("{}:/", first.snapshot)]).unwrap();
    println!("{}", failure.error);
    assert!(failure.error.contains("--partial MAP"), "{failure:?}");

    let report = scene.restore_partial(&first, &[&second, &fourth], "first");
    assert!(report.sources.iter().all(|source| source.server == B), "{report:?}");
    scene.restore_partial(&third, &[&second, &fourth], "third");

    // A janus that was started anew has never heard of it: the mirror has.
    scene.site.kill_janus().unwrap();
    scene.site.start_janus().unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    assert!(scene.listed(&first).elsewhere.is_some_and(|elsewhere| elsewhere.server == B));
    scene.restore_partial(&first, &[&second, &fourth], "without-a-view");

    // It is back, and with it all of its snapshot.
    scene.site.start_server(A).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    assert_eq!(scene.listed(&first).elsewhere, None);
    scene.restore(&first, "whole", &[]);
    disk::compare(&first.copy, &scene.path("whole")).unwrap();
}

#[test]
fn a_disk_that_is_the_same_elsewhere_comes_back_whole() {
    let mut scene = Scene::new();
    let first = scene.backup_to(A);
    let second = scene.backup_to(B);
    scene.await_mirrored(B, &[&first]);
    scene.site.kill_server(A).unwrap();
    let listed = scene.listed(&first).elsewhere.unwrap();
    assert_eq!(listed.held_bytes, listed.content_bytes);
    let text = scene.client.run(&["list"]).unwrap().stdout;
    assert!(text.contains("unreachable, 100 % of it on server-b"), "{text}");
    let report = scene.restore(&first, "restored", &[]);
    println!("{report:?}");
    disk::compare(&first.copy, &scene.path("restored")).unwrap();
    assert!(report.lost.is_empty());
    // Over what is there already, only what differs.
    scene.change(MIB, 5);
    let over = scene.disk.clone();
    disk::copy(&over, &scene.path("over")).unwrap();
    let report = scene.restore(&first, "over", &["--force"]);
    assert!(report.fetched_bytes < 2 * MIB, "{report:?}");
    disk::compare(&second.copy, &scene.path("over")).unwrap();
}

#[test]
fn one_more_server_of_which_nobody_has_heard_adds_what_it_has() {
    let servers = ["server-a", "server-b", "server-c"].map(str::to_owned).to_vec();
    let plan = Plan { servers, ..Plan::default() };
    let mut scene = Scene::of(Site::start(Programs::for_tests().unwrap(), &plan).unwrap());
    let first = scene.backup();
    let second = scene.backup();
    scene.change(2 * MIB, 21);
    let third = scene.backup();
    for taken in [&second, &third] {
        scene.await_mirrored(&first.server, &[&second, &third]);
        assert_ne!(taken.server, first.server);
    }
    // The third differs from both; what the second has of the first is all of it.
    scene.await_mirrored(&second.server, &[&first, &third]);
    scene.await_mirrored(&third.server, &[&first, &second]);
    scene.site.kill_server(&third.server).unwrap();
    let Expected { held_bytes, .. } = Expected::of(&third, &[&first, &second]);
    let elsewhere = scene.listed(&third).elsewhere.unwrap();
    // What one of them has the other has, too; that isn't known.
    let bounds = elsewhere.held_bytes..=elsewhere.at_most_bytes;
    assert!(elsewhere.held_bytes == held_bytes && bounds.contains(&held_bytes), "{elsewhere:?}");
    assert_eq!(elsewhere.servers.len(), 2, "{elsewhere:?}");
    let text = scene.client.run(&["list"]).unwrap().stdout;
    assert!(text.contains(" to 100 % of it on server-"), "{text}");
    scene.restore_partial(&third, &[&first, &second], "third");
    scene.site.kill_server(&first.server).unwrap();
    let report = scene.restore(&first, "first", &[]);
    assert!(report.sources.iter().all(|source| source.server == second.server), "{report:?}");
    disk::compare(&first.copy, &scene.path("first")).unwrap();
}

#[test]
fn a_router_in_the_process_of_a_server_leads_to_tables_too() {
    let mut site =
        Site::prepare(Programs::for_tests().unwrap(), &Plan { janus: false, ..Plan::default() })
            .unwrap();
    let router = site.issue("janus", "router", &["--host", "127.0.0.1"]).unwrap();
    let port = xtask::site::free_ports(1).unwrap()[0];
    let url = format!("https://127.0.0.1:{port}");
    let urls: Vec<String> = [A, B].iter().map(|name| site.server(name).unwrap().url()).collect();
    for name in [A, B] {
        let settings = &mut site.server(name).unwrap().settings;
        settings.set("janus_urls", serde_json::json!([url]));
        if name == B {
            for key in ["cert", "key", "ca"] {
                settings.set(&format!("janus.{key}"), router.get(key).unwrap().clone());
            }
            settings.set("janus.listen", format!("127.0.0.1:{port}"));
            settings.set("janus.server_urls", urls.clone());
        }
    }
    site.start_all().unwrap();
    let disk = site.folder().join("disk.raw");
    disk::blank(&disk, 9 * MIB).unwrap();
    disk::write_noise(&disk, 0..9 * MIB, 1).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
    client.settings.set("urls", serde_json::json!([url]));
    site.await_ready(&client).unwrap();
    let backup = client.backup().unwrap();
    assert_eq!(backup.server, A);
    client.backup().unwrap();
    let keys = site.folder().join("pki/machine");
    let caller = crate::caller::Caller::new(&url, &keys);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while caller.mirrored(B, "").unwrap().iter().all(|table| table.share.is_none()) {
        assert!(std::time::Instant::now() < until, "{}", site.log(B));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    site.kill_server(A).unwrap();
    let to = site.folder().join("restored");
    client.restore(&backup.disks[0].snapshot_id, &to).unwrap();
    disk::compare(&disk, &to).unwrap();
}
