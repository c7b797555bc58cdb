//! What goes wrong with a store costs time, and nothing else.

use std::{
    thread,
    time::{Duration, Instant},
};

use xtask::disk;

use super::{
    s3::{BUCKET, Fault, Plan, S3, files},
    scene::{MIB, SERVER, Scene, done},
};

const PAUSE: Duration = Duration::from_millis(1200);

#[test]
fn nothing_is_lost_by_errors_silence_and_half_answers() {
    let s3 = S3::start();
    let url = format!("s3://{BUCKET}/of/us");
    let mut scene = Scene::with(&s3, 48, 18);
    scene.backup();
    let plan = |method, every, fault| Plan { method, every, fault };
    let writing = [
        vec![plan("PUT", 2, Fault::Status(500)), plan("GET", 3, Fault::Status(503))],
        vec![plan("PUT", 2, Fault::LoseAnswer), plan("GET", 2, Fault::Truncate)],
        vec![plan("PUT", 3, Fault::Close), plan("GET", 3, Fault::Close)],
        vec![plan("PUT", 4, Fault::Silence(PAUSE)), plan("GET", 4, Fault::Hang(PAUSE))],
        vec![plan("PUT", 2, Fault::Slow(Duration::from_millis(300)))],
    ];
    for (round, plans) in (0..).zip(&writing) {
        s3.plan(plans);
        scene.archive(&[]);
        let faults = s3.take_faults();
        println!("{plans:?}: {faults} faults");
        assert!(faults > 0, "{plans:?}");
        disk::change(&scene.disk, MIB, 20 + round).unwrap();
        scene.backup();
    }
    // The last one was not archived.
    scene.taken.pop();
    s3.plan(&[]);
    let verified =
        done(&scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap());
    assert_eq!(verified["images"], 5, "{verified}");

    let reading = [
        plan("GET", 4, Fault::Status(500)),
        plan("GET", 3, Fault::Truncate),
        plan("GET", 5, Fault::Close),
        plan("GET", 20, Fault::Silence(PAUSE)),
        plan("GET", 20, Fault::Hang(PAUSE)),
    ];
    for (plan, taken) in reading.iter().zip(&scene.taken) {
        s3.plan(&[*plan]);
        let began = Instant::now();
        scene.assert_one_restored(taken, &url, Some(&s3));
        let faults = s3.take_faults();
        println!("{plan:?}: {faults} faults, {:.1} s", began.elapsed().as_secs_f64());
        assert!(faults > 0, "{plan:?}");
    }
    s3.plan(&[plan("GET", 3, Fault::Truncate)]);
    done(&scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap());
}

/// Parts of images.
fn parts(s3: &S3) -> usize {
    let all = files(&s3.objects(), ".vhdx.0");
    all.iter().filter(|path| path.extension().is_some_and(|name| name == "zst")).count()
}

#[test]
fn what_a_killed_archive_has_sent_is_used_by_the_next_one() {
    let s3 = S3::start();
    let url = format!("s3://{BUCKET}/of/us");
    let mut scene = Scene::with(&s3, 112, 100);
    scene.backup();
    scene.site.stop_server(SERVER).unwrap();
    let slow = Plan { method: "PUT", every: 1, fault: Fault::Slow(Duration::from_millis(400)) };
    s3.plan(&[slow]);
    let mut killed =
        scene.site.admin_command(SERVER, &["archive", "off", "--json"]).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while parts(&s3) < 2 {
        assert!(Instant::now() < until, "it does not get there");
        thread::sleep(Duration::from_millis(5));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(
        files(&s3.objects(), ".json").iter().all(|path| !path.to_str().unwrap().contains("/runs/"))
    );
    let began = s3.take_put_bytes();
    // Something that nobody needs any more.
    let orphan = files(&s3.objects(), ".zst")[0].clone();
    let name = orphan.file_name().unwrap().to_str().unwrap();
    let (snapshot, rest) = name.split_once('.').unwrap();
    let other = snapshot.replace(&snapshot[..8], "00000000");
    let orphan = orphan.with_file_name(format!("{other}.{rest}"));
    std::fs::write(&orphan, "parts of a run that is gone").unwrap();
    s3.plan(&[]);
    let archived = scene.archive(&[]);
    let kept = archived["runs"][0]["disks"][0]["kept_bytes"].as_u64().unwrap();
    let sent = archived["sent_bytes"].as_u64().unwrap();
    println!("{began} bytes sent, {kept} of them used, {sent} sent by the second");
    assert!(kept > 32 * MIB && sent + kept < 102 * MIB, "{archived}");
    assert!(!orphan.exists());
    done(&scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap());
    scene.assert_restored(&url, Some(&s3));
}
