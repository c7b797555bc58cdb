//! The written rules of `server/src/rights.rs` over real sockets: every method, every role, the own machine and another's.

use std::time::Duration;

use bytes::Bytes;
use janus_proto::{
    channel::{self, ConnectOptions},
    error::{ErrorReason, reason},
    ids::BackupId,
    pb::{self, read_hashes_request::Of},
};
use janus_server::{
    policy::Right,
    rights::{RULES, Reach},
};
use prost::Message;
use tokio::runtime::{Handle, Runtime};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use xtask::site::USER;

use crate::scene::{B, Scene};

/// Messages as bytes: the calls of all methods are made in the same way.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = bytes::Buf::remaining(buffer);
        Ok(Some(bytes::Buf::copy_to_bytes(buffer, length)))
    }
}

struct Peer {
    runtime: Handle,
    channel: Channel,
}

/// What the calls are about: a machine with a snapshot and an open run.
struct Target {
    machine: String,
    snapshot: String,
    run: String,
    session: String,
    handle: String,
}

impl Peer {
    /// Calls a method; answers its first message.
    fn call(&self, method: &str, target: &Target) -> Result<Option<Bytes>, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        let mut request = Request::new(message(method, target));
        request.metadata_mut().insert("janus-machine", target.machine.parse().unwrap());
        request.set_timeout(Duration::from_secs(20));
        let path = format!("/janus.v1.{method}").parse().unwrap();
        self.runtime.block_on(async {
            grpc.ready().await.unwrap();
            let answers = grpc.server_streaming(request, path, Raw).await?;
            answers.into_inner().message().await
        })
    }
}

fn message(method: &str, target: &Target) -> Vec<u8> {
    let Target { machine, snapshot, run, session, handle } = target;
    let start = |id: String| pb::StartBackupRequest {
        backup_id: id,
        disks: vec![pb::DiskStart {
            disk_id: "other".into(),
            size_bytes: 4096,
            logical_sector_bytes: 512,
        }],
        ..Default::default()
    };
    match method {
        "BackupService/StartBackup" => start(run.clone()).encode_to_vec(),
        "BackupService/WriteBlocks" => {
            pb::WriteBlocksRequest { session_id: session.clone(), epoch: 1, ..Default::default() }
                .encode_to_vec()
        }
        "BackupService/CommitBackup" => pb::CommitBackupRequest {
            backup_id: run.clone(),
            epoch: 1,
            disks: vec![pb::DiskCommit {
                disk_id: "other".into(),
                table_digest: vec![7; 32].into(),
                ..Default::default()
            }],
            ..Default::default()
        }
        .encode_to_vec(),
        // Of a run that is already over: the one that others try must stay open.
        "BackupService/AbortBackup" => {
            pb::AbortBackupRequest { backup_id: run.clone() }.encode_to_vec()
        }
        "BackupService/GetBackup" => {
            pb::GetBackupRequest { backup_id: run.clone() }.encode_to_vec()
        }
        "RestoreService/OpenSnapshot" => {
            pb::OpenSnapshotRequest { snapshot_id: snapshot.clone(), ..Default::default() }
                .encode_to_vec()
        }
        "RestoreService/CloseSnapshot" => {
            pb::CloseSnapshotRequest { handle: String::new(), ..Default::default() }.encode_to_vec()
        }
        "RestoreService/ReadHashes" => pb::ReadHashesRequest {
            level: pb::HashLevel::Segment.into(),
            of: Some(Of::Handle(handle.clone())),
            ..Default::default()
        }
        .encode_to_vec(),
        "RestoreService/ReadBlocks" => {
            pb::ReadBlocksRequest { handle: handle.clone(), ..Default::default() }.encode_to_vec()
        }
        "CatalogService/ListMachines" => pb::ListMachinesRequest::default().encode_to_vec(),
        "CatalogService/ListDisks" => {
            pb::ListDisksRequest { machine: machine.clone(), ..Default::default() }.encode_to_vec()
        }
        "CatalogService/ListSnapshots" => {
            pb::ListSnapshotsRequest { machine: machine.clone(), ..Default::default() }
                .encode_to_vec()
        }
        "CatalogService/GetSnapshot" => {
            pb::GetSnapshotRequest { snapshot_id: snapshot.clone() }.encode_to_vec()
        }
        "TableService/ReadTable" => {
            pb::ReadTableRequest { snapshot_id: snapshot.clone(), ..Default::default() }
                .encode_to_vec()
        }
        "TableService/ListTables" => {
            pb::ListTablesRequest { machine: machine.clone(), ..Default::default() }.encode_to_vec()
        }
        "ProbeService/Download" => pb::DownloadRequest { ..Default::default() }.encode_to_vec(),
        _ => Vec::new(),
    }
}

/// Not allowed, or told that there is no such thing.
fn is_refused(result: &Result<Option<Bytes>, Status>) -> bool {
    let Err(status) = result else { return false };
    matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated | Code::NotFound)
}

#[test]
fn every_method_answers_every_role_as_the_rules_say() {
    let mut scene = Scene::with_policy(Some(POLICY));
    let (own, other) = (scene.enrolled("own"), scene.enrolled("other"));
    for name in [USER, "mallory", "reader", "writer", "chief"] {
        scene.person(name);
    }
    scene.site.issue("client", "host", &["--user", "site", "--machine", "host"]).unwrap();
    scene.site.await_ready(&own).unwrap();
    let of = |client: &xtask::site::Client, name: &str| {
        client.answer::<serde_json::Value>(&["backup", "--server", B]).unwrap();
        let listed = client.list().unwrap();
        (format!("{USER}/{name}"), listed.snapshots[0].snapshot_id.clone())
    };
    let (machine, snapshot) = of(&own, "own");
    of(&other, "other");
    scene.site.issue("operator", "root", &[]).unwrap();
    let rescue = ["--user", USER, "--machine", "own", "--hours", "1"];
    scene.site.issue("restore", "rescue", &rescue).unwrap();
    let rescue = ["--user", USER, "--machine", "other", "--hours", "1"];
    scene.site.issue("restore", "rescue-other", &rescue).unwrap();
    let url = scene.site.server(B).unwrap().url();
    let runtime = Runtime::new().unwrap();
    let peer = |name: &str| {
        let identity = scene.identity(name);
        let connecting = channel::connect(&url, &identity, ConnectOptions::default());
        let channel = runtime.block_on(connecting).unwrap().channel;
        let runtime = runtime.handle().clone();
        (identity.principal().role.clone(), Peer { runtime, channel })
    };
    let owner = peer("own").1;
    let begin = |peer: &Peer| {
        let run = BackupId::new().to_string();
        let blank = String::new;
        let target = Target {
            machine: machine.clone(),
            snapshot: snapshot.clone(),
            run: run.clone(),
            session: blank(),
            handle: blank(),
        };
        let started = peer.call("BackupService/StartBackup", &target);
        let started = pb::StartBackupResponse::decode(started.unwrap().unwrap()).unwrap();
        let session = started.sessions[0].session_id.clone();
        Target { session, ..target }
    };
    let open = |peer: &Peer, target: &Target| {
        let opened = peer.call("RestoreService/OpenSnapshot", target);
        let opened = opened.ok().flatten();
        opened.map(|opened| pb::OpenSnapshotResponse::decode(opened).unwrap().handle)
    };
    let mut target = begin(&owner);
    target.handle = open(&owner, &target).unwrap();

    // Who, whether the target is his own machine, and what groups give.
    const BOTH: &[Right] = &[Right::Backup, Right::Restore];
    let callers: [(&str, bool, &[Right]); 13] = [
        ("other", false, &[]),
        ("rescue-other", false, &[]),
        ("router", true, &[]),
        ("root", true, &[]),
        ("server-a", true, &[]),
        ("rescue", true, &[]),
        (USER, true, &[]),
        ("mallory", false, &[]),
        ("reader", false, &[Right::Restore]),
        ("writer", false, &[Right::Backup]),
        ("host", false, &[Right::Backup]),
        ("chief", false, BOTH),
        ("own", true, &[]),
    ];
    let (mut cells, mut told) = (0, String::new());
    for rule in RULES {
        told.push_str(&format!("{:34}", rule.method));
        for (name, is_own, given) in callers {
            let (role, peer) = peer(name);
            // Handles are their opener's: who may open has one of his own.
            let handle = open(&peer, &target).unwrap_or_else(|| target.handle.clone());
            let mine = Target {
                handle,
                machine: target.machine.clone(),
                snapshot: snapshot.clone(),
                run: target.run.clone(),
                session: target.session.clone(),
            };
            // Listing all machines is about the caller's own where he has one.
            let answer = peer.call(rule.method, &mine);
            let is_given = rule.groups.iter().any(|right| given.contains(right));
            let is_expected = match rule.of(&role) {
                Reach::Nothing => is_given,
                Reach::Own => is_own || is_given || is_about_nobody(rule.method),
                Reach::Any => true,
            };
            assert_eq!(
                !is_refused(&answer),
                is_expected,
                "{} by {role}, own machine: {is_own}: {answer:?}",
                rule.method
            );
            if rule.of(&role) == Reach::Nothing && !is_given {
                let status = answer.unwrap_err();
                assert_eq!(reason(&status), Some(ErrorReason::NotAllowed), "{status:?}");
            }
            told.push_str(if is_expected { " yes" } else { "  - " });
            cells += 1;
            if rule.method == "BackupService/AbortBackup" && is_expected {
                target = Target { handle: target.handle.clone(), ..begin(&owner) };
            }
        }
        told.push('\n');
        if rule.method == "BackupService/StartBackup" {
            // Nobody has given it up.
            let answer = owner.call("BackupService/GetBackup", &target);
            let state = pb::GetBackupResponse::decode(answer.unwrap().unwrap()).unwrap().state();
            assert_eq!(state, pb::RunState::Open);
        }
    }
    println!(
        "{told}{cells} cells: other, restore of other, janus, operator, server, restore, user, other user, reader, writer, host, chief, own"
    );
    assert_eq!(cells, RULES.len() * callers.len());
    // What others tried has left nothing behind.
    scene.works(&own, "own");
    scene.works(&other, "other");
}

/// Groups for one machine.
const POLICY: &str = r#"
    [groups.readers]
    members = ["reader"]
    restore = ["alice/own"]
    [groups.writers]
    members = ["writer", "site/host"]
    backup = ["alice/own"]
    [groups.chiefs]
    members = ["Chief"]
    admin = ["alice/own"]
"#;

/// Answers each caller with what he may see, and nothing is named.
fn is_about_nobody(method: &str) -> bool {
    ["CatalogService/ListMachines", "RestoreService/CloseSnapshot"].contains(&method)
}

#[test]
fn a_machine_that_only_writes_reads_nothing_back() {
    let mut scene = Scene::new();
    for name in scene.site.server_names() {
        scene.site.stop_server(&name).unwrap();
        let only = [format!("{USER}/web1")].to_vec();
        scene.site.server(&name).unwrap().settings.set("write_only", only);
        scene.site.start_server(&name).unwrap();
    }
    let machine = scene.enrolled("web1");
    scene.site.await_ready(&machine).unwrap();
    for _ in 0..3 {
        machine.backup().unwrap();
    }
    let to = scene.site.folder().join("restored");
    let failed = machine.failure(&["restore", "disk", "--to", to.to_str().unwrap()]).unwrap();
    assert!(
        failed.error.contains("may only write") && failed.error.contains("pki issue restore"),
        "{failed:?}"
    );
    // Hashes are compared all the same: a lost cache is no new first backup.
    std::fs::remove_dir_all(machine.cache()).unwrap();
    let backup = machine.backup().unwrap();
    assert_eq!(backup.disks[0].sent_bytes, 0, "{backup:?}");
    let rescue = ["--user", USER, "--machine", "web1", "--hours", "1"];
    let keys = scene.site.issue("restore", "rescue", &rescue).unwrap();
    let mut rescuer = scene.machine("rescuer");
    for key in ["cert", "key", "ca"] {
        rescuer.settings.set(key, keys.get(key).unwrap().clone());
    }
    rescuer.restore("disk", &to).unwrap();
    xtask::disk::compare(&scene.disk("web1"), &to).unwrap();
}
