//! The merged catalog, and the reports that it remembers.

use std::time::Duration;

use janus_proto::{
    error::ErrorReason,
    ids::SnapshotId,
    metadata,
    pb::{
        self, ReportRequest, catalog_service_client::CatalogServiceClient, report_request::Event,
        report_service_client::ReportServiceClient,
        server_info_service_client::ServerInfoServiceClient,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, transport::Channel};

use crate::{
    backend::{Backend, Mood},
    site::{Keys, Running, channel, client, janus, janus_with, reason},
    starts::start_request,
};

pub fn snapshot(server: &str, committed_ms: i64) -> pb::Snapshot {
    pb::Snapshot {
        snapshot_id: SnapshotId::new().to_string(),
        server_id: server.into(),
        machine: "alice/web".into(),
        disk_id: "root".into(),
        committed_ms,
        ..Default::default()
    }
}

async fn catalog(keys: &Keys, janus: &Running) -> CatalogServiceClient<Channel> {
    CatalogServiceClient::new(channel(&janus.url, &keys.identity("client/alice/web")).await)
}

/// A report stream with a full state of `snapshots` and a use counter.
pub async fn report(
    keys: &Keys,
    janus: &Running,
    server: &str,
    snapshots: Vec<pb::Snapshot>,
    use_counter: u64,
) -> (mpsc::Sender<ReportRequest>, Streaming<pb::ReportResponse>) {
    let machines = vec![pb::MachineReport {
        machine: "alice/web".into(),
        use_counter,
        has_chain: true,
        ..Default::default()
    }];
    let full = pb::StateChange { machines, snapshots, ..Default::default() };
    report_all(keys, janus, server, pb::ReportHello::default(), full).await
}

/// A report stream with this beginning and full state.
pub async fn report_all(
    keys: &Keys,
    janus: &Running,
    server: &str,
    hello: pb::ReportHello,
    full: pb::StateChange,
) -> (mpsc::Sender<ReportRequest>, Streaming<pb::ReportResponse>) {
    let identity = keys.identity(&format!("server/{server}"));
    let mut reports = ReportServiceClient::new(channel(&janus.url, &identity).await);
    let (sender, messages) = mpsc::channel(8);
    let events = [Event::Hello(hello), Event::Full(full), Event::FullEnd(pb::FullEnd {})];
    for (sequence, event) in events.into_iter().enumerate() {
        sender
            .send(ReportRequest { sequence: sequence as u64 + 1, event: Some(event) })
            .await
            .unwrap();
    }
    let mut answers = reports.report(ReceiverStream::new(messages)).await.unwrap().into_inner();
    for sequence in 1..=3 {
        assert_eq!(answers.message().await.unwrap().unwrap().sequence, sequence);
    }
    (sender, answers)
}

#[tokio::test]
async fn lists_merge_page_by_page_newest_first() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    *a.seen.snapshots.lock().unwrap() = [9, 7, 5, 3, 1].map(|at| snapshot("a", at)).to_vec();
    *b.seen.snapshots.lock().unwrap() = [8, 6, 2].map(|at| snapshot("b", at)).to_vec();
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut catalog = catalog(&keys, &janus).await;
    let (mut times, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = pb::ListSnapshotsRequest { page_size: 3, page_token, ..Default::default() };
        let page = catalog.list_snapshots(request).await.unwrap().into_inner();
        assert!(page.snapshots.len() <= 3 && page.unreachable.is_empty());
        assert!(page.snapshots.iter().all(|snapshot| snapshot.reachable));
        times.extend(page.snapshots.iter().map(|snapshot| snapshot.committed_ms));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(times, [9, 8, 7, 6, 5, 3, 2, 1]);
}

#[tokio::test]
async fn snapshots_of_a_lost_server_stay_listed_as_unreachable() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let (on_a, on_b) = (snapshot("a", 1), snapshot("b", 2));
    *a.seen.snapshots.lock().unwrap() = vec![on_a.clone()];
    *b.seen.snapshots.lock().unwrap() = vec![on_b.clone()];
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let _report = report(&keys, &janus, "a", vec![on_a.clone()], 1).await;
    let mut catalog = catalog(&keys, &janus).await;
    catalog.list_snapshots(pb::ListSnapshotsRequest::default()).await.unwrap();
    a.line.cut();
    let list =
        catalog.list_snapshots(pb::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let lines: Vec<_> =
        list.snapshots.iter().map(|s| (s.snapshot_id.as_str(), s.reachable)).collect();
    assert_eq!(lines, [(on_b.snapshot_id.as_str(), true), (on_a.snapshot_id.as_str(), false)]);
    assert_eq!((list.unreachable.len(), list.unreachable[0].server_id.as_str()), (1, "a"));
    assert!(list.unreachable[0].since_ms > 0 && !list.unreachable[0].reason.is_empty());

    let request = pb::GetSnapshotRequest { snapshot_id: on_a.snapshot_id };
    assert!(!catalog.get_snapshot(request).await.unwrap().into_inner().snapshot.unwrap().reachable);
    let request = pb::GetSnapshotRequest { snapshot_id: SnapshotId::new().to_string() };
    let unknown = catalog.get_snapshot(request).await.unwrap_err();
    assert_eq!(reason(&unknown), Some(ErrorReason::SnapshotUnknown));
    assert!(unknown.message().contains("; a: "), "{}", unknown.message());
    let disks = catalog.list_disks(pb::ListDisksRequest::default()).await.unwrap().into_inner();
    assert_eq!((disks.disks.len(), disks.disks[0].disk_id.as_str()), (1, "root"));
}

#[tokio::test]
async fn a_janus_that_was_restarted_still_lists_a_server_that_is_down() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let folder = tempfile::tempdir().unwrap();
    let view = folder.path().join("view");
    let servers = [a.address(), b.address()];
    let with_view = async || {
        let view = view.to_string_lossy().into_owned();
        janus_with(&keys, &servers, |settings| settings.view_file = view).await
    };
    let mut first = with_view().await;
    let on_a = snapshot("a", 1);
    {
        let _report = report(&keys, &first, "a", vec![on_a.clone()], 7).await;
        client(&keys, &first.url).await.start_backup(start_request()).await.unwrap();
        first.stop.cancel();
    }
    first.task.take().unwrap().await.unwrap();
    a.line.cut();

    let second = with_view().await;
    let mut listed = catalog(&keys, &second).await;
    let list =
        listed.list_snapshots(pb::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.snapshots.len(), 1, "{list:?}");
    assert_eq!(list.snapshots[0].snapshot_id, on_a.snapshot_id);
    assert!(!list.snapshots[0].reachable);
    assert_eq!((list.unreachable.len(), list.unreachable[0].server_id.as_str()), (1, "a"));
    // Counters are known again, too: the next one is above those of A.
    client(&keys, &second.url).await.start_backup(start_request()).await.unwrap();
    assert_eq!(b.header(metadata::USE).last().map(String::as_str), Some("9"));

    std::fs::write(&view, "no view").unwrap();
    let third = with_view().await;
    let mut listed = catalog(&keys, &third).await;
    let list = listed.list_snapshots(pb::ListSnapshotsRequest::default()).await.unwrap();
    assert!(list.into_inner().snapshots.is_empty());
}

#[tokio::test]
async fn a_pinned_list_is_the_servers_own() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    *a.seen.snapshots.lock().unwrap() = vec![snapshot("a", 1)];
    *b.seen.snapshots.lock().unwrap() = vec![snapshot("b", 2)];
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut request = Request::new(pb::ListSnapshotsRequest::default());
    request.metadata_mut().insert(metadata::SERVER, "a".parse().unwrap());
    let list = catalog(&keys, &janus).await.list_snapshots(request).await.unwrap().into_inner();
    assert_eq!(list.snapshots.iter().map(|s| s.server_id.as_str()).collect::<Vec<_>>(), ["a"]);
}

#[tokio::test]
async fn nobody_reads_another_machines_catalog() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let _a = report(&keys, &janus, "a", vec![], 0).await;
    let request = pb::ListSnapshotsRequest { machine: "bob/web".into(), ..Default::default() };
    let refused = catalog(&keys, &janus).await.list_snapshots(request).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::NotAllowed));
}

#[tokio::test]
async fn reported_counters_decide_where_starts_go() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let _a = report(&keys, &janus, "a", vec![], 41).await;
    let _b = report(&keys, &janus, "b", vec![], 40).await;
    let mut client = client(&keys, &janus.url).await;
    assert_eq!(client.start_backup(start_request()).await.unwrap().into_inner().server_id, "b");
    assert_eq!(b.header(metadata::USE), ["42"]);
}

#[tokio::test]
async fn only_servers_report_and_only_for_themselves() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut reports =
        ReportServiceClient::new(channel(&janus.url, &keys.identity("client/alice/web")).await);
    let refused = reports.report(tokio_stream::iter([ReportRequest::default()])).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::NotAllowed));

    let (sender, mut answers) = report(&keys, &janus, "a", vec![], 1).await;
    let second = report(&keys, &janus, "a", vec![], 1).await;
    sender
        .send(ReportRequest {
            sequence: 4,
            event: Some(Event::Heartbeat(pb::Heartbeat::default())),
        })
        .await
        .unwrap();
    let superseded =
        tokio::time::timeout(Duration::from_secs(5), answers.message()).await.unwrap().unwrap_err();
    assert_eq!(reason(&superseded), Some(ErrorReason::EpochSuperseded));
    drop(second);
}

#[tokio::test]
async fn the_status_tells_clients_of_their_own_machine_only() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let older = snapshot("a", 1);
    let other = pb::Snapshot { machine: "bob/db".into(), ..snapshot("a", 3) };
    let _a = report(&keys, &janus, "a", vec![older, snapshot("a", 2), other], 1).await;
    for (role, expected) in [
        ("client/alice/web", &[("alice/web", 2)][..]),
        ("operator/root", &[("alice/web", 2), ("bob/db", 3)]),
    ] {
        let channel = channel(&janus.url, &keys.identity(role)).await;
        let mut info = ServerInfoServiceClient::new(channel);
        let status = info.get_router_status(pb::GetRouterStatusRequest {}).await.unwrap();
        let machines = &status.get_ref().machines;
        let found: Vec<_> =
            machines.iter().map(|m| (m.machine.as_str(), m.last_backup_ms)).collect();
        assert_eq!(found, expected, "{role}");
    }
}

#[tokio::test]
async fn the_status_shows_how_a_machine_stands_with_each_server() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let _b = report(&keys, &janus, "b", vec![], 6).await;
    let _a = report(&keys, &janus, "a", vec![snapshot("a", 2), snapshot("a", 1)], 5).await;
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut info = ServerInfoServiceClient::new(channel);
    let status = info.get_router_status(pb::GetRouterStatusRequest {}).await.unwrap().into_inner();
    let of = |server: &str, use_counter, last_backup_ms| pb::MachineUse {
        server_id: server.into(),
        use_counter,
        last_backup_ms,
        ..Default::default()
    };
    assert_eq!(status.machines[0].uses, [of("a", 5, 2), of("b", 6, 0)]);
}

#[tokio::test]
async fn a_server_that_is_reached_and_lists_nothing_is_said_to_do_so_since_the_first_time() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let catalog = catalog(&keys, &janus).await;
    let unreachable = async || {
        let list = catalog.clone().list_snapshots(pb::ListSnapshotsRequest::default()).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        list.unwrap().into_inner().unreachable
    };
    assert_eq!(unreachable().await, []);
    for mood in [ErrorReason::StoreFull, ErrorReason::NotAllowed].map(Mood::Refuse) {
        a.set_mood(mood);
        let first = unreachable().await;
        assert!(first[0].since_ms > 0, "{first:?}");
        assert_eq!(unreachable().await, first);
        a.set_mood(Mood::Fine);
        assert_eq!(unreachable().await, []);
        a.set_mood(mood);
        assert!(unreachable().await[0].since_ms > first[0].since_ms, "it was well meanwhile");
    }
}

#[tokio::test]
async fn a_machine_that_starts_backups_and_never_gets_one_done_is_in_the_status() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let machine = |machine: &str, use_counter, never_committed| pb::MachineReport {
        machine: machine.into(),
        use_counter,
        never_committed,
        ..Default::default()
    };
    let machines = vec![
        machine("alice/web", 3, true),
        machine("bob/db", 1, true),
        machine("bob/gone", 9, false),
    ];
    let full = pb::StateChange { machines, ..Default::default() };
    let _a = report_all(&keys, &janus, "a", pb::ReportHello::default(), full).await;
    let machines = async |role: &str| {
        let mut info =
            ServerInfoServiceClient::new(channel(&janus.url, &keys.identity(role)).await);
        let status = info.get_router_status(pb::GetRouterStatusRequest {}).await.unwrap();
        let machines = status.into_inner().machines;
        assert!(machines.iter().all(|one| one.first_use_ms > 0 && one.last_backup_ms == 0));
        assert_eq!(machines[0].uses[0].use_counter, 3);
        machines.into_iter().map(|one| one.machine).collect::<Vec<_>>()
    };
    assert_eq!(machines("operator/root").await, ["alice/web", "bob/db"]);
    assert_eq!(machines("client/alice/web").await, ["alice/web"]);
}
