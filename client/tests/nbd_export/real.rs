//! What qemu-img, qemu-io, nbdcopy and nbdinfo make of an export.

use std::{fs, os::unix::fs::FileExt, process::Command};

use janus_proto::ranges::Ranges;
use serde_json::Value;
use xtask::disk;

use crate::scene::{MIB, SIZE, Scene, run, text};

/// What `nbdinfo --map` prints: ranges by what is said of them.
fn map(uri: &str, context: &str, is_wanted: impl Fn(&Value) -> bool) -> Ranges {
    let map = run("nbdinfo", &["--json", &format!("--map={context}"), uri]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let mut end = 0;
    let mut found = Ranges::new();
    for extent in map.as_array().unwrap() {
        let [offset, length] = ["offset", "length"].map(|key| extent[key].as_u64().unwrap());
        assert_eq!(offset, end, "{map}");
        end = offset + length;
        if is_wanted(extent) {
            found.push(offset..end);
        }
    }
    assert_eq!(end, SIZE, "{map}");
    found
}

#[test]
fn programs_read_the_disk_and_its_holes() {
    let scene = Scene::new(&["server-a"]);
    scene.backup();
    let export = scene.serve("vm", &[]);
    let uri = &export.uri.clone()[..];
    let (image, copy) = (text(&scene.image), scene.path("copy"));

    println!("{}", run("nbdinfo", &[uri]));
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", uri])).unwrap();
    let about = &info["exports"][0];
    assert_eq!((&about["export-size"], &about["is_read_only"]), (&SIZE.into(), &true.into()));
    assert_eq!(about["can_multi_conn"], true, "{about}");
    assert_eq!(about["contexts"], serde_json::json!(["base:allocation"]));
    assert_eq!(
        (&about["block_size_minimum"], &about["block_size_maximum"]),
        (&1.into(), &(32 * MIB).into()),
        "{about}"
    );
    println!("{}", run("nbdinfo", &["--list", uri]));

    println!("{}", run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, uri]));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", uri, text(&copy)]);
    disk::compare(&scene.image, &copy).unwrap();
    fs::remove_file(&copy).unwrap();
    run("nbdcopy", &[uri, text(&copy)]);
    disk::compare(&scene.image, &copy).unwrap();
    // Holes came as holes.
    let allocated = disk::allocated_bytes(&copy).unwrap();
    assert!(allocated < 36 * MIB, "{allocated}");

    let holes = map(uri, "base:allocation", |extent| extent["type"] == 3);
    let block = 4096;
    let expected: Ranges = [3 * MIB..5 * MIB, 37 * MIB..SIZE / block * block].into_iter().collect();
    assert_eq!(holes, expected);
    let seen: Value =
        serde_json::from_str(&run("qemu-img", &["map", "--output=json", "-f", "raw", uri]))
            .unwrap();
    println!("qemu-img map: {seen}");
    let zero = |extent: &&Value| extent["zero"] == true && extent["data"] == false;
    let zeros: u64 =
        seen.as_array().unwrap().iter().filter(zero).map(|e| e["length"].as_u64().unwrap()).sum();
    assert!(zeros >= expected.total() - MIB, "{seen}");
    let said = export.end();
    assert!(said.contains(&format!("nbdcopy '{uri}'")), "{said}");
}

#[test]
fn over_tcp_it_is_the_same_and_json_says_where() {
    let scene = Scene::new(&["server-a"]);
    let id = scene.backup();
    let running = scene.client.start(&["nbd", &id, "--listen", "127.0.0.1:0", "--json"]).unwrap();
    let mut line = String::new();
    crate::scene::await_that("it says where", || {
        line = running.output().lines().next().unwrap_or_default().to_owned();
        line.ends_with('}')
    });
    let told: Value = serde_json::from_str(&line).unwrap();
    println!("{told}");
    assert_eq!((&told["event"], &told["snapshot_id"]), (&"serving".into(), &Value::from(id)));
    assert_eq!((&told["size_bytes"], &told["writable"]), (&SIZE.into(), &false.into()));
    let uri = told["uri"].as_str().unwrap();
    assert!(uri.starts_with("nbd://127.0.0.1:"), "{uri}");
    let copy = scene.path("copy");
    run("nbdcopy", &["--connections=4", uri, text(&copy)]);
    disk::compare(&scene.image, &copy).unwrap();
    running.interrupt();
    let finished = running.wait().unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let answer: Value = serde_json::from_str(finished.answer_line()).unwrap();
    assert!(answer["fetched_bytes"].as_u64().unwrap() >= 35 * MIB, "{answer}");

    for (listen, why) in [("0.0.0.0:0", "loopback"), ("nonsense", "invalid")] {
        let failure = scene.client.failure(&["nbd", "vm", "--listen", listen]).unwrap();
        assert!(failure.error.contains(why), "{failure:?}");
    }
    let failure = scene.client.failure(&["nbd", "other", "--listen", "127.0.0.1:0"]).unwrap();
    assert_eq!(failure.exit_code, 5, "{failure:?}");
}

/// The older snapshot is on another server.
#[test]
fn changes_since_a_snapshot_are_told_to_the_block() {
    let scene = Scene::new(&["server-a", "server-b"]);
    let first = scene.backup();
    let changed = disk::change(&scene.image, MIB, 7).unwrap();
    // Some go back to zeros, some come from there.
    let zeroed = 6 * MIB..6 * MIB + 20 * 4096;
    fs::OpenOptions::new()
        .write(true)
        .open(&scene.image)
        .unwrap()
        .write_all_at(&[0; 20 * 4096], zeroed.start)
        .unwrap();
    disk::write_noise(&scene.image, 50 * MIB..51 * MIB, 9).unwrap();
    let blocks = changed.iter().map(|block| block * 4096..(block + 1) * 4096);
    let expected: Vec<_> = blocks.chain([zeroed, 50 * MIB..51 * MIB]).collect();
    let expected = expected.iter().fold(Ranges::new(), |mut all, range| {
        all.insert(range.clone());
        all
    });
    scene.backup();
    let export = scene.serve("vm", &["--changed-since", &first]);
    let uri = &export.uri[..];
    for name in ["janus:changed", "qemu:dirty-bitmap:janus-changed"] {
        assert_eq!(map(uri, name, |extent| extent["type"] == 1), expected, "{name}");
    }
    println!("{}", run("nbdinfo", &["--map=qemu:dirty-bitmap:janus-changed", "--totals", uri]));
    // QEMU takes any context for a dirty bitmap: what is dirty is shown as no data.
    let socket = text(&export.socket);
    let bitmap = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},file.x-dirty-bitmap=janus:changed"
    );
    let seen = run("qemu-img", &["map", "--output=json", "--image-opts", &bitmap]);
    let seen: Value = serde_json::from_str(&seen).unwrap();
    let dirty = seen.as_array().unwrap().iter().filter(|extent| extent["data"] == false);
    let dirty = dirty.map(|extent| {
        let [start, length] = ["start", "length"].map(|key| extent[key].as_u64().unwrap());
        start..start + length
    });
    assert_eq!(dirty.collect::<Ranges>(), expected);
    export.end();

    // Nothing changed since itself; of another disk nothing can be told.
    let same = scene.client.list().unwrap().snapshots[0].snapshot_id.clone();
    let export = scene.serve("vm", &["--changed-since", &same]);
    assert!(map(&export.uri, "janus:changed", |extent| extent["type"] == 1).is_empty());
    export.end();
    let gone = "0192f0a0-0000-7000-8000-000000000000";
    let failure = scene.client.failure(&["nbd", "vm", "--changed-since", gone]).unwrap();
    assert_eq!(failure.exit_code, 5, "{failure:?}");
}

#[test]
fn writes_go_to_the_scratch_file_and_nowhere_else() {
    let scene = Scene::new(&["server-a"]);
    let id = scene.backup();
    let (plain, scratch, copy) = (scene.path("plain"), scene.path("scratch"), scene.path("copy"));
    disk::copy(&scene.image, &plain).unwrap();
    let export = scene.serve("vm", &["--write", text(&scratch), "--changed-since", &id]);
    let commands = [
        "write -P 1 0 64k",
        "write -P 2 4095 4098",
        "write -P 3 100 1",
        "write -f -P 4 10M 3M",
        "write -z 20M 1M",
        "write -z -u 22M 1M",
        "write -z 30000001 70001",
        "discard 24M 2M",
        "write -P 5 64M 512",
        "write -P 6 39M 5000",
        "flush",
    ];
    for image in [text(&plain), &export.uri] {
        let mut arguments = vec!["-f", "raw", "-d", "unmap"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let said = run("qemu-io", &[&arguments[..], &[image]].concat());
        assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    }
    println!(
        "{}",
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&plain), &export.uri])
    );
    run("nbdcopy", &[&export.uri, text(&copy)]);
    disk::compare(&plain, &copy).unwrap();
    // What was written is told, and what was zeroed.
    let holes = map(&export.uri, "base:allocation", |extent| extent["type"] == 3);
    for hole in [22 * MIB..23 * MIB, 24 * MIB..26 * MIB] {
        assert_eq!(holes.intersect(&Ranges::from(hole.clone())), Ranges::from(hole));
    }
    let written = map(&export.uri, "janus:changed", |extent| extent["type"] == 1);
    assert!(written.contains(39 * MIB) && !written.contains(39 * MIB + 8192), "{written:?}");
    assert_eq!(written.intersect(&Ranges::from(0..65_536)).total(), 65_536);
    let allocated = disk::allocated_bytes(&scratch).unwrap();
    assert!(allocated < 7 * MIB, "{allocated}");

    // A scratch file is nobody else's.
    let again = ["nbd", "vm", "--write", text(&scratch), "--listen", "127.0.0.1:0"];
    let failure = scene.client.failure(&again).unwrap();
    assert!(failure.error.contains("exists already"), "{failure:?}");
    export.end();
    assert!(!scratch.exists());
    let restored = scene.path("restored");
    scene.client.restore(&id, &restored).unwrap();
    disk::compare(&scene.image, &restored).unwrap();

    // Without --write nothing is written.
    let export = scene.serve("vm", &[]);
    let refused = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512", &export.uri])
        .output()
        .unwrap();
    assert!(!refused.status.success() || !refused.stderr.is_empty(), "{refused:?}");
    export.end();
}
