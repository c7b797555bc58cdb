//! Programs that run before and after a backup.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, time::Instant};

use serde_json::Value;
use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

#[test]
fn hooks_run_around_a_backup_and_the_second_one_also_after_a_failure() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let (path, told) = (site.folder().join("disk.raw"), site.folder().join("told"));
    disk::blank(&path, 1 << 20).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    let shell = |script: &str| {
        vec!["/bin/sh".to_owned(), "-c".into(), format!("({script}) >> {}", told.display())]
    };
    let took = || {
        let said = fs::read_to_string(&told).unwrap_or_default();
        let _ = fs::remove_file(&told);
        said
    };
    client.settings.set("hook_seconds", 2);
    client.settings.set("pre_backup", shell("echo pre"));
    client.settings.set("post_backup", shell("echo $JANUS_RESULT"));
    client.backup().unwrap();
    assert_eq!(took(), "pre\nok\n");
    let _: Value = client.answer(&["backup", "--dry-run"]).unwrap();
    assert_eq!(took(), "");

    client.settings.set("pre_backup", shell("echo pre; exit 3"));
    let failure = client.failure(&["backup"]).unwrap();
    assert!(failure.exit_code == 1 && failure.error.contains("pre_backup"), "{failure:?}");
    assert_eq!(took(), "pre\nfailed\n");

    client.settings.set("pre_backup", shell("echo pre; sleep 60"));
    let began = Instant::now();
    let failure = client.failure(&["backup"]).unwrap();
    assert!(
        failure.error.contains("hook_seconds") && began.elapsed().as_secs() < 20,
        "{failure:?}"
    );
    assert_eq!(took(), "pre\nfailed\n");

    client.settings.set("pre_backup", shell("true"));
    client.settings.set("post_backup", shell("exit 1"));
    let failure = client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("the backup was made, but post_backup"), "{failure:?}");
    assert_eq!(client.list().unwrap().snapshots.len(), 2);
}
