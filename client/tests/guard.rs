//! What protects backups from who would destroy them, with real programs: alarms, locks, the audit log, and purges by two.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread::sleep,
    time::{Duration, Instant},
};

use janus_proto::{
    channel::{self, ConnectOptions},
    error::{ErrorReason, reason},
    ids::BackupId,
    pb::{
        self, backup_service_client::BackupServiceClient,
        maintenance_service_client::MaintenanceServiceClient,
    },
    summed::{checked, with_sum},
    tls::Identity,
};
use serde_json::Value;
use xtask::{
    disk, packages,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const SERVER: &str = "server-a";
const MACHINE: &str = "alice/machine";

/// A site with one server, whose rules keep two backups, and a disk with text on three quarters of it.
struct Scene {
    site: Site,
    client: Client,
    disk: PathBuf,
    /// Runs and snapshots, oldest first, each with a copy of the disk.
    copies: Vec<(String, String, PathBuf)>,
}

impl Scene {
    fn new(more: &[(&str, Value)]) -> Self {
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let settings = &mut site.server(SERVER).unwrap().settings;
        settings.set("retention.automatic", false);
        for (rule, count) in [("keep_all_days", 0), ("daily", 1), ("weekly", 0), ("monthly", 0)] {
            settings.set(&format!("retention.{rule}"), count);
        }
        settings.set("retention.at_least", 2);
        for (key, value) in more {
            settings.set(key, value.clone());
        }
        site.start_all().unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, 32 * MIB).unwrap();
        write_text(&disk, 0..24 * MIB, 0);
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, disk, copies: Vec::new() }
    }

    fn backup(&mut self) -> String {
        let backup = self.client.backup().unwrap();
        let copy = self.site.folder().join(format!("copy-{}", self.copies.len()));
        disk::copy(&self.disk, &copy).unwrap();
        let snapshot = backup.disks[0].snapshot_id.clone();
        self.copies.push((backup.backup_id, snapshot.clone(), copy));
        snapshot
    }

    /// As a disk changes in a day: some text is another.
    fn small_change(&self) {
        let number = self.copies.len() as u64;
        write_text(&self.disk, number * MIB..(number + 1) * MIB, number);
    }

    fn admin(&self, arguments: &[&str]) -> Output {
        self.site.admin(SERVER, arguments).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--json"]).collect();
        answer(&arguments, &self.admin(&arguments))
    }

    fn refused(&self, arguments: &[&str], words: &str) -> String {
        let output = self.admin(arguments);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains(words), "{arguments:?}: {said}");
        said
    }

    fn alarms(&self) -> Vec<Value> {
        self.json(&["alarm", "list"])["alarms"].as_array().unwrap().clone()
    }

    /// Why a run stays, by the plan of the server.
    fn reasons(&self, run: &str) -> Vec<String> {
        let plan = self.json(&["retention", "plan"]);
        let runs = plan["machines"][0]["runs"].as_array().unwrap();
        let planned = runs.iter().find(|planned| planned["backup_id"] == run).unwrap();
        let why = planned["why"].as_array().into_iter().flatten();
        why.map(|why| why["rule"].as_str().unwrap().to_owned()).collect()
    }

    fn is_listed(&self, snapshot: &str) -> bool {
        self.client.list().unwrap().snapshots.iter().any(|one| one.snapshot_id == snapshot)
    }

    fn assert_restores(&self, number: usize) {
        let (_, snapshot, copy) = &self.copies[number];
        let to = self.site.folder().join("restored");
        self.client.restore(snapshot, &to).unwrap();
        disk::compare(copy, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    fn store(&mut self) -> PathBuf {
        self.site.server(SERVER).unwrap().images().to_owned()
    }

    fn restart(&mut self) {
        self.site.stop_server(SERVER).unwrap();
        self.start();
    }

    fn start(&mut self) {
        self.site.start_server(SERVER).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Where locks have made files immutable nobody could remove the folder.
        let _ = Command::new("chattr").args(["-R", "-i"]).arg(self.site.folder()).output();
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn answer(arguments: &[&str], output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", said(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Text that is another in each block.
fn write_text(path: &Path, range: std::ops::Range<u64>, seed: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    for offset in range.step_by(4096) {
        let line = format!("{seed} {offset:012} the quick brown fox jumps over the lazy dog\n");
        let text = line.repeat(4096 / line.len() + 1);
        file.write_all_at(&text.as_bytes()[..4096], offset).unwrap();
    }
}

#[test]
fn an_encrypted_disk_raises_an_alarm_and_the_last_good_run_stays() {
    let mut scene = Scene::new(&[]);
    scene.backup();
    for _ in 0..2 {
        scene.small_change();
        scene.backup();
    }
    assert_eq!(scene.alarms(), [Value::Null; 0]);
    // Somebody encrypts the files in place.
    disk::write_noise(&scene.disk, 0..12 * MIB, 7).unwrap();
    scene.backup();
    let alarms = scene.alarms();
    println!("{}", said(&scene.admin(&["alarm", "list"])));
    assert_eq!(alarms.len(), 1, "{alarms:?}");
    assert_eq!(alarms[0]["backup_id"], scene.copies[3].0.as_str());
    assert_eq!(alarms[0]["keeps"][0], scene.copies[2].0.as_str());
    assert!(alarms[0]["disks"]["disk"].as_str().unwrap().contains("after encryption"));
    // Everybody is told.
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let status = scene.client.status().unwrap();
        let uses = status.machines.iter().flat_map(|machine| &machine.uses);
        let told: Vec<_> = uses.filter_map(|at| at.alarm.as_ref()).collect();
        if told.len() == 1 {
            assert!(told[0].contains("alarm: backup"), "{told:?}");
            break;
        }
        assert!(Instant::now() < until, "{status:?}");
        sleep(Duration::from_millis(100));
    }
    assert!(said(&scene.admin(&["usage"])).contains("alarm: backup"));

    // What comes later doesn't push the good one out, also after a restart.
    for _ in 0..3 {
        scene.small_change();
        scene.backup();
    }
    scene.restart();
    let good = scene.copies[2].clone();
    assert_eq!(scene.reasons(&good.0), ["before_alarm"]);
    scene.json(&["retention", "run", "--now", "--force"]);
    assert!(scene.is_listed(&good.1) && !scene.is_listed(&scene.copies[3].1));
    scene.refused(&["delete", &good.1], "last good one before an alarm");
    scene.refused(&["delete", MACHINE], "alarm clear");
    scene.assert_restores(2);
    scene.assert_restores(6);

    scene.json(&["alarm", "clear", MACHINE]);
    assert_eq!(scene.alarms(), [Value::Null; 0]);
    assert_eq!(scene.reasons(&good.0), [""; 0]);
    scene.json(&["retention", "run", "--now", "--force"]);
    assert!(!scene.is_listed(&good.1));
    let shown = scene.json(&["audit", "show"]);
    let records = shown["records"].as_array().unwrap();
    for what in ["alarm", "alarm_clear", "drop", "purge"] {
        assert!(records.iter().any(|record| record["what"] == what), "{what}");
    }
}

#[test]
fn ordinary_changes_raise_no_alarm_and_unusually_large_ones_do() {
    let mut scene = Scene::new(&[]);
    scene.backup();
    // A large file that can't be packed is copied to free space.
    disk::write_noise(&scene.disk, 24 * MIB..30 * MIB, 1).unwrap();
    scene.backup();
    for _ in 0..3 {
        scene.small_change();
        scene.backup();
    }
    // It is written anew, and so is a lot of text.
    disk::write_noise(&scene.disk, 24 * MIB..28 * MIB, 2).unwrap();
    write_text(&scene.disk, 0..2 * MIB, 9);
    scene.backup();
    assert_eq!(scene.alarms(), [Value::Null; 0]);
    // Much more than usual, and more than a fifth of the disk, though all of it can be packed.
    write_text(&scene.disk, 0..20 * MIB, 10);
    scene.backup();
    let alarms = scene.alarms();
    let what = alarms[0]["disks"]["disk"].as_str().unwrap();
    assert!(what.contains("20.0 MiB of 32.0 MiB changed, usual are"), "{what}");
    assert!(!what.contains("encryption"), "{what}");
}

/// Puts another date to all locks, as a clock does that jumps beyond them.
fn let_date_pass(store: &Path) {
    let path = store.join(MACHINE).join(".guard.json");
    let bytes = fs::read(&path).unwrap();
    let mut file: Value = serde_json::from_slice(checked(&bytes).unwrap()).unwrap();
    for lock in file["locks"].as_object_mut().unwrap().values_mut() {
        lock["until_ms"] = 1_000_000.into();
    }
    let mut text = serde_json::to_vec_pretty(&file).unwrap();
    text.push(b'\n');
    fs::write(&path, with_sum(text)).unwrap();
}

#[test]
fn a_locked_run_stays_whoever_wants_to_drop_it() {
    let mut scene = Scene::new(&[]);
    let first = scene.backup();
    let locked = scene.json(&["lock", MACHINE, "--newest", "--until", "2031-01-01"]);
    assert_eq!(locked["backup_id"], scene.copies[0].0.as_str());
    for wrong in ["2020-01-01", "2999-01-01", "soon"] {
        scene.refused(&["lock", MACHINE, "--newest", "--until", wrong], "date");
    }
    scene.refused(&["lock", MACHINE, "nothing", "--until", "2031-01-01"], "has no run nothing");
    for _ in 0..3 {
        scene.small_change();
        scene.backup();
    }
    let run = scene.copies[0].0.clone();
    let holds = |scene: &Scene| {
        scene.refused(&["delete", &first], "is locked until");
        scene.refused(&["delete", MACHINE], "is locked until");
        assert_eq!(scene.reasons(&run), ["locked"]);
        scene.json(&["retention", "run", "--now", "--force"]);
        scene.json(&["trash", "purge"]);
        assert!(scene.is_listed(&first));
        scene.assert_restores(0);
    };
    holds(&scene);
    assert!(!scene.is_listed(&scene.copies[1].1), "only it is locked");
    // A lock isn't shortened.
    let again = scene.json(&["lock", &format!("{MACHINE}/disk"), &run, "--until", "2027-06-01"]);
    assert_eq!(again["until_ms"], locked["until_ms"]);
    // A clock beyond the date unlocks nothing: so much time has not passed.
    scene.site.stop_server(SERVER).unwrap();
    let_date_pass(&scene.store());
    scene.refused(&["delete", &first], "has not seen so much time pass");
    scene.start();
    holds(&scene);
    // What counts the time is lost: the locks hold.
    scene.site.stop_server(SERVER).unwrap();
    fs::remove_file(scene.store().join(".clock.json")).unwrap();
    scene.start();
    holds(&scene);
    // What is locked isn't known: nothing is dropped.
    scene.site.stop_server(SERVER).unwrap();
    let path = scene.store().join(MACHINE).join(".guard.json");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    scene.start();
    scene.refused(&["delete", &first], "what is locked isn't known");
    scene.small_change();
    scene.backup();
    scene.assert_restores(0);
    let plan = scene.admin(&["retention", "run", "--now", "--force"]);
    assert!(said(&plan).contains("what is locked isn't known"), "{}", said(&plan));
}

#[test]
fn a_lock_ends_at_its_date_and_new_runs_are_locked_for_days() {
    let mut scene = Scene::new(&[("retention.lock_days", 2.into())]);
    let first = scene.backup();
    scene.refused(&["delete", &first], "is locked until");
    let locks = scene.json(&["lock", "--list"]);
    let two_days = scene.client.list().unwrap().snapshots[0].committed_ms + 2 * 86_400_000;
    let until = locks["locks"][0]["until_ms"].as_i64().unwrap();
    assert!((until - two_days).abs() < 60_000, "{locks}");
    scene.site.stop_server(SERVER).unwrap();
    scene.site.server(SERVER).unwrap().settings.set("retention.lock_days", 0);
    scene.start();
    scene.small_change();
    let second = scene.backup();
    let soon = time::OffsetDateTime::now_utc() + time::Duration::seconds(4);
    let soon = soon.format(&time::format_description::well_known::Rfc3339).unwrap();
    scene.json(&["lock", MACHINE, &second, "--until", &soon]);
    scene.small_change();
    scene.backup();
    scene.refused(&["delete", &second], "is locked until");
    let until = Instant::now() + Duration::from_secs(20);
    while scene.admin(&["delete", &second]).status.code() != Some(0) {
        assert!(Instant::now() < until);
        sleep(Duration::from_millis(200));
    }
    scene.json(&["trash", "purge"]);
    scene.assert_restores(0);
    scene.assert_restores(2);
    scene.refused(&["delete", &first], "is locked until");
}

#[test]
fn as_root_files_of_locked_runs_are_immutable_and_merges_go_on() {
    let mut scene = Scene::new(&[]);
    for _ in 0..3 {
        scene.small_change();
        scene.backup();
    }
    scene.json(&["lock", MACHINE, &scene.copies[1].0, "--until", "2031-01-01"]);
    let folder = scene.store().join(MACHINE).join("disk");
    let images = || -> Vec<PathBuf> {
        let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let mut images: Vec<_> =
            entries.filter(|path| path.extension().is_some_and(|it| it == "vhdx")).collect();
        images.sort();
        images
    };
    let is_immutable = |path: &Path| {
        let shown = packages::output(Command::new("lsattr").arg(path)).unwrap();
        shown.split_whitespace().next().unwrap().contains('i')
    };
    let before = images();
    assert_eq!(
        before.iter().map(|path| is_immutable(path)).collect::<Vec<_>>(),
        [true, true, false]
    );
    assert!(fs::remove_file(&before[0]).is_err() && fs::write(&before[1], "nothing").is_err());
    // The one below is dropped and merged into the locked one.
    scene.json(&["delete", &scene.copies[0].1]);
    scene.json(&["trash", "purge"]);
    let after = images();
    assert_eq!(after.iter().map(|path| is_immutable(path)).collect::<Vec<_>>(), [true, false]);
    scene.assert_restores(1);
    scene.assert_restores(2);
}

#[test]
fn the_audit_log_tells_who_did_what_and_shows_each_change_of_it() {
    let mut scene = Scene::new(&[]);
    let first = scene.backup();
    scene.small_change();
    scene.backup();
    scene.assert_restores(0);
    scene.json(&["pin", &first]);
    scene.json(&["unpin", &first]);
    scene.json(&["delete", &first]);
    scene.json(&["trash", "restore", &first]);
    scene.refused(&["delete", "alice/nobody"], "no machine");
    let shown = scene.json(&["audit", "show", "--last", "1000"]);
    let records = shown["records"].as_array().unwrap().clone();
    println!("{}", said(&scene.admin(&["audit", "show"])));
    let has = |what: &str, name: &str, result: &str| {
        records.iter().any(|record| {
            record["what"] == what
                && record["who"]["name"].as_str().unwrap().starts_with(name)
                && record["result"].as_str().unwrap().contains(result)
        })
    };
    for (what, name, result) in [
        ("server_start", "this server", "ok"),
        ("start", "client alice/machine", "ok"),
        ("commit", "client alice/machine", "ok"),
        ("open", "client alice/machine", "ok"),
        ("command", "local ", "asked"),
        ("command", "local ", "ok"),
        ("command", "local ", "no machine alice/nobody"),
        ("drop", "this server", "ok"),
        ("restore", "this server", "ok"),
    ] {
        assert!(has(what, name, result), "{what} {name} {result}");
    }
    let commit = records.iter().find(|record| record["what"] == "commit").unwrap();
    assert_eq!(commit["who"]["through"], "janus router");
    assert_eq!(
        (&commit["machine"], &commit["run"]),
        (&MACHINE.into(), &scene.copies[0].0.as_str().into())
    );
    let of_machine = scene.json(&["audit", "show", "--machine", "alice/other"]);
    assert_eq!(of_machine["records"].as_array().unwrap().len(), 0);
    assert_eq!(
        scene.json(&["audit", "show", "--since", "2999-01-01"])["records"]
            .as_array()
            .unwrap()
            .len(),
        0
    );

    let head = scene.json(&["audit", "head"]);
    let hash = head["hash"].as_str().unwrap().to_owned();
    assert!(scene.site.log(SERVER).contains("audit log"), "the head is in the log");
    scene.json(&["audit", "verify", "--head", &hash]);
    // One byte, under the running server and without it.
    let file = scene.store().join(".audit/audit-000000000001.jsonl");
    let whole = fs::read(&file).unwrap();
    let at = whole.len() / 2;
    let mut edited = whole.clone();
    edited[at] ^= 1;
    fs::write(&file, &edited).unwrap();
    let line = 1 + whole[..at].iter().filter(|byte| **byte == b'\n').count();
    scene.refused(&["audit", "verify"], &format!("audit-000000000001.jsonl, line {line}: "));
    // The end is cut off: the server that has written it knows, another one can't, who has noted the head does.
    let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap();
    fs::write(&file, &whole[..=last]).unwrap();
    scene.refused(&["audit", "verify"], "the end was cut off");
    fs::write(&file, &whole).unwrap();
    scene.json(&["audit", "verify"]);
    scene.site.kill_server(SERVER).unwrap();
    fs::write(&file, &edited).unwrap();
    scene.refused(&["audit", "verify"], &format!("line {line}: "));
    fs::write(&file, &whole[..=last]).unwrap();
    scene.json(&["audit", "verify"]);
    scene.refused(&["audit", "verify", "--head", &hash], "no record up to number");
    // A record that a crash has torn.
    fs::write(&file, &whole[..whole.len() - 9]).unwrap();
    let verified = scene.json(&["audit", "verify"]);
    assert_eq!((&verified["torn"], &verified["bad"]), (&1.into(), &Value::Null), "{verified}");
    scene.start();
    assert_eq!(scene.json(&["audit", "verify"])["torn"], 1);
}

#[test]
fn backups_go_on_without_their_audit_log_and_commands_that_drop_do_not() {
    let mut scene = Scene::new(&[]);
    let first = scene.backup();
    scene.site.stop_server(SERVER).unwrap();
    // A folder that can't be made: something else has its name.
    let elsewhere = scene.site.folder().join("audit");
    fs::write(&elsewhere, "in the way").unwrap();
    let settings = &mut scene.site.server(SERVER).unwrap().settings;
    settings.set("audit_path", elsewhere.to_string_lossy());
    scene.start();
    scene.small_change();
    scene.backup();
    scene.assert_restores(0);
    for arguments in [&["delete", &first][..], &["trash", "purge"], &["retention", "run", "--now"]]
    {
        scene.refused(arguments, "can't be recorded");
    }
    assert!(scene.is_listed(&first));
    scene.refused(&["audit", "head"], "audit log can't be written");
    fs::remove_file(&elsewhere).unwrap();
    scene.json(&["delete", &first]);
    // What waited is there.
    let shown = scene.json(&["audit", "show", "--machine", MACHINE]);
    let commits = shown["records"].as_array().unwrap().iter();
    assert_eq!(commits.filter(|record| record["what"] == "commit").count(), 1);
    scene.json(&["audit", "verify"]);
}

/// A command of somebody who has logged in with another account.
fn as_login(scene: &Scene, login: u32, arguments: &[&str]) -> Output {
    let command = scene.site.admin_command(SERVER, arguments);
    let mut shell = Command::new("sh");
    shell.args(["-c", "echo \"$1\" > /proc/self/loginuid && shift && exec \"$@\"", "sh"]);
    shell.arg(login.to_string()).arg(command.get_program()).args(command.get_args());
    shell.output().unwrap()
}

#[test]
fn as_root_a_purge_takes_two_persons_where_the_settings_say_so() {
    let mut scene = Scene::new(&[("retention.purge_needs_second_operator", true.into())]);
    let first = scene.backup();
    for _ in 0..2 {
        scene.small_change();
        scene.backup();
    }
    scene.json(&["delete", &first]);
    let asked = as_login(&scene, 4001, &["trash", "purge", "--json"]);
    let asked = answer(&["trash purge"], &asked);
    assert_eq!((&asked["request"], &asked["runs"]), (&1.into(), &1.into()), "{asked}");
    // Deleted later, and not part of it.
    scene.json(&["delete", &scene.copies[1].1]);
    println!("{}", said(&scene.admin(&["trash", "list"])));
    assert_eq!(scene.json(&["trash", "list"])["trash"].as_array().unwrap().len(), 2);
    let own = as_login(&scene, 4001, &["trash", "purge", "--confirm", "1"]);
    assert_eq!(own.status.code(), Some(1), "{}", said(&own));
    assert!(said(&own).contains("is your own (4001)"), "{}", said(&own));
    let unknown = as_login(&scene, 4002, &["trash", "purge", "--confirm", "7"]);
    assert!(said(&unknown).contains("no request 7"), "{}", said(&unknown));
    scene.restart();
    let done = as_login(&scene, 4002, &["trash", "purge", "--confirm", "1", "--json"]);
    let done = answer(&["confirm"], &done);
    assert_eq!(done["machines"][0]["purged"], serde_json::json!([scene.copies[0].0]), "{done}");
    assert_eq!(scene.json(&["trash", "list"])["trash"].as_array().unwrap().len(), 1);
    scene.refused(&["trash", "restore", &first], "not in the trash");
    scene.assert_restores(2);
    // One that is taken back.
    answer(&["again"], &as_login(&scene, 4001, &["trash", "purge", "--json"]));
    scene.json(&["trash", "purge", "--cancel", "2"]);
    let late = as_login(&scene, 4002, &["trash", "purge", "--confirm", "2"]);
    assert!(said(&late).contains("no request 2"), "{}", said(&late));
    scene.json(&["trash", "restore", &scene.copies[1].1]);
    scene.assert_restores(1);
    let shown = scene.json(&["audit", "show", "--last", "1000"]);
    let records = shown["records"].as_array().unwrap();
    let by = |login: &str| {
        records.iter().any(|one| one["who"]["name"].as_str().unwrap().contains(login))
    };
    assert!(by("logged in as 4001") && by("logged in as 4002"));
}

/// Whoever has a machine's certificate can add backups. There is no call by which he changes what is there.
#[tokio::test]
async fn a_client_certificate_takes_nothing_away() {
    let mut scene = Scene::new(&[]);
    let first = scene.backup();
    let run = scene.copies[0].0.clone();
    let keys = scene.site.folder().join("pki/machine");
    let path = |name: &str| keys.join(name);
    let identity = Identity::load(path("cert.pem"), path("key.pem"), path("ca.pem")).unwrap();
    let direct = scene.site.server(SERVER).unwrap().url();
    for url in [scene.site.url(), direct] {
        let channel =
            channel::connect(&url, &identity, ConnectOptions::default()).await.unwrap().channel;
        let mut backups = BackupServiceClient::new(channel.clone());
        // Gives up what is committed.
        let abort = pb::AbortBackupRequest { backup_id: run.clone() };
        let refused = backups.abort_backup(abort).await.unwrap_err();
        assert_eq!(reason(&refused), Some(ErrorReason::RunState), "{refused}");
        // Begins it again under its id, with another content in mind.
        let disks = vec![pb::DiskStart {
            disk_id: "disk".into(),
            size_bytes: 32 * MIB,
            logical_sector_bytes: 512,
        }];
        let start = pb::StartBackupRequest { backup_id: run.clone(), disks, ..Default::default() };
        let refused = backups.start_backup(start).await.unwrap_err();
        assert_eq!(reason(&refused), Some(ErrorReason::RunState), "{refused}");
        // Commits it again, as something else: what was committed is answered.
        let commit = pb::CommitBackupRequest {
            backup_id: run.clone(),
            epoch: 1,
            disks: vec![pb::DiskCommit {
                disk_id: "disk".into(),
                table_digest: vec![7; 32].into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let committed = backups.commit_backup(commit).await.unwrap().into_inner();
        assert_eq!(committed.snapshots[0].snapshot_id, first);
        // Writes to a session that is none any more.
        let request = pb::GetBackupRequest { backup_id: run.clone() };
        let known = backups.get_backup(request).await.unwrap().into_inner();
        assert!(known.sessions.is_empty() && known.result.is_some());
        let lost = pb::WriteBlocksRequest {
            session_id: BackupId::new().to_string(),
            epoch: 1,
            ..Default::default()
        };
        let sent = backups.write_blocks(tokio_stream::iter([lost])).await;
        let refused = match sent {
            Ok(answers) => answers.into_inner().message().await.unwrap_err(),
            Err(refused) => refused,
        };
        assert_eq!(reason(&refused), Some(ErrorReason::SessionExpired), "{refused}");
        // Maintenance is for operators.
        let mut maintenance = MaintenanceServiceClient::new(channel);
        let request = pb::ForgetServerRequest { server_id: SERVER.into() };
        assert!(maintenance.forget_server(request).await.is_err());
    }
    // A start that is never finished, and one that is given up, change nothing that is there.
    scene.assert_restores(0);
    scene.small_change();
    scene.backup();
    scene.assert_restores(0);
    scene.assert_restores(1);
}
