//! Who may read tables: servers those of all machines, machines their own; and servers nothing more than that.

use janus_proto::{
    error::{ErrorReason, reason},
    ids::{BackupId, SessionId},
    pb::{self, read_hashes_request::Of},
};
use tonic::{Code, Request, Status};

use crate::{
    caller::{Caller, pinned},
    scene::{MACHINE, MIB, Scene},
};

const A: &str = "server-a";
const B: &str = "server-b";

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, expected: ErrorReason) {
    let status = result.unwrap_err();
    println!("{:?}: {}", status.code(), status.message());
    assert_eq!(reason(&status), Some(expected), "{status:?}");
}

fn as_machine<T>(mut request: Request<T>) -> Request<T> {
    request.metadata_mut().insert("janus-machine", MACHINE.parse().unwrap());
    request
}

#[test]
fn servers_read_what_others_have_and_write_nothing() {
    let mut scene = Scene::new();
    let first = scene.backup_to(A);
    scene.change(MIB, 3);
    let second = scene.backup_to(B);
    scene.await_mirrored(B, &[&first]);
    scene.await_mirrored(A, &[&second]);
    let direct = scene.site.server(A).unwrap().url();
    let keys = scene.path("pki").join(B);
    for caller in [scene.caller(B), Caller::new(&direct, &keys)] {
        let machines = pb::ListMachinesRequest::default();
        let machines = caller.wait(caller.catalog().list_machines(pinned(A, machines))).unwrap();
        assert_eq!(machines.into_inner().machines[0].machine, MACHINE);
        let listed = pb::ListSnapshotsRequest { machine: MACHINE.into(), ..Default::default() };
        let listed = caller.wait(caller.catalog().list_snapshots(pinned(A, listed))).unwrap();
        assert_eq!(listed.into_inner().snapshots.len(), 1);
        let (start, whole) = caller.table(A, &first.snapshot, "").unwrap();
        assert_eq!(start.snapshot.unwrap().snapshot_id, first.snapshot);
        assert_eq!(whole.len(), 9, "of eleven segments two are zeros");
        // A snapshot that isn't there is no reason to fail: it is whole then, and says so.
        let (start, again) = caller.table(A, &first.snapshot, &second.snapshot).unwrap();
        assert!(start.since_snapshot_id.is_empty() && again == whole);
        assert_eq!(caller.mirrored(A, MACHINE).unwrap().len(), 1);
        let handle = caller.open(A, &first.snapshot, false).unwrap();
        let message = pb::ReadBlocksRequest { handle, ..Default::default() };
        let blocks = caller.wait(async {
            let mut blocks = caller.restore().read_blocks(pinned(A, message)).await?.into_inner();
            blocks.message().await
        });
        assert!(blocks.unwrap().unwrap().batch.is_some());

        // Nothing of a run.
        let id = BackupId::new().to_string();
        let disk =
            pb::DiskStart { disk_id: "disk".into(), size_bytes: 4096, logical_sector_bytes: 512 };
        let start = pb::StartBackupRequest {
            backup_id: id.clone(),
            disks: vec![disk],
            ..Default::default()
        };
        let start = caller.wait(caller.backup().start_backup(as_machine(pinned(A, start))));
        refused(start, ErrorReason::NotAllowed);
        let commit = pb::CommitBackupRequest { backup_id: id.clone(), ..Default::default() };
        let commit = caller.wait(caller.backup().commit_backup(as_machine(pinned(A, commit))));
        refused(commit, ErrorReason::NotAllowed);
        let abort = pb::AbortBackupRequest { backup_id: id.clone() };
        let abort = caller.wait(caller.backup().abort_backup(as_machine(pinned(A, abort))));
        refused(abort, ErrorReason::NotAllowed);
        let asked = pb::GetBackupRequest { backup_id: id };
        let asked = caller.wait(caller.backup().get_backup(as_machine(pinned(A, asked))));
        refused(asked, ErrorReason::NotAllowed);
        let write = as_machine(pinned(A, tokio_stream::iter([pb::WriteBlocksRequest::default()])));
        let written = caller.wait(async {
            let mut answers = caller.backup().write_blocks(write).await?.into_inner();
            answers.message().await
        });
        refused(written, ErrorReason::NotAllowed);
        let hashes = pb::ReadHashesRequest {
            level: pb::HashLevel::Segment.into(),
            of: Some(Of::SessionId(SessionId::new().to_string())),
            ..Default::default()
        };
        let hashes = caller.wait(caller.restore().read_hashes(as_machine(pinned(A, hashes))));
        refused(hashes.map(drop), ErrorReason::NotAllowed);
    }
}

#[test]
fn a_machine_sees_its_own_tables_only() {
    let scene = Scene::new();
    let first = scene.backup_to(A);
    let second = scene.backup_to(B);
    scene.await_mirrored(B, &[&first]);
    scene.await_mirrored(A, &[&second]);
    scene.site.client("other", &[]).unwrap();
    let own = scene.caller("machine");
    let other = scene.caller("other");
    assert_eq!(own.mirrored(B, MACHINE).unwrap().len(), 1);
    assert!(other.mirrored(B, "").unwrap().is_empty());
    refused(other.mirrored(B, MACHINE), ErrorReason::NotAllowed);
    refused(other.open(B, &first.snapshot, true), ErrorReason::SnapshotUnknown);
    refused(other.table(B, &second.snapshot, ""), ErrorReason::SnapshotUnknown);
    // What is only mirrored is no snapshot here, but for who asks for its table.
    refused(own.open(B, &first.snapshot, false), ErrorReason::SnapshotUnknown);
    refused(own.table(B, &first.snapshot, ""), ErrorReason::SnapshotUnknown);
    let handle = own.open(B, &first.snapshot, true).unwrap();
    let blocks = pb::ReadBlocksRequest { handle: handle.clone(), ..Default::default() };
    let blocks = own.wait(own.restore().read_blocks(pinned(B, blocks)));
    refused(blocks.map(drop), ErrorReason::SnapshotUnknown);
    // Its handle is nobody else's.
    let hashes = |caller: &Caller| {
        let message = pb::ReadHashesRequest {
            level: pb::HashLevel::Segment.into(),
            of: Some(Of::Handle(handle.clone())),
            ..Default::default()
        };
        caller.wait(async {
            let answers = caller.restore().read_hashes(pinned(B, message)).await?;
            let mut answers = answers.into_inner();
            let batch = answers.message().await?.unwrap().batch.unwrap();
            Ok::<_, Status>(batch.hashes.len() / 32)
        })
    };
    assert_eq!(hashes(&own).unwrap(), 11);
    refused(hashes(&other), ErrorReason::HandleExpired);
    // A token of nowhere.
    let page_token = pb::ListTablesRequest { page_token: second.snapshot, ..Default::default() };
    let listed = own.wait(own.tables().list_tables(pinned(B, page_token)));
    assert_eq!(listed.unwrap_err().code(), Code::InvalidArgument);
}
