//! Servers whose settings differ: shown everywhere, and with `require_equal_settings` used last.

use janus::config::Settings;
use janus_proto::{
    error::{ErrorReason, reason},
    metadata,
    pb::{
        self, GetRouterStatusRequest, SharedSettings,
        server_info_service_client::ServerInfoServiceClient,
    },
};
use tonic::metadata::MetadataMap;

use crate::{
    backend::Backend,
    catalog::report_all,
    life::scrape,
    site::{Keys, Running, channel, client, janus_with, until},
    starts::start_request,
};

/// A report of a server with these settings.
async fn report(
    keys: &Keys,
    janus: &Running,
    server: &str,
    prefer_vhdx: bool,
) -> impl Sized + use<> {
    let settings = SharedSettings {
        image_path: "/srv/janus".into(),
        prefer_vhdx,
        separate_folders_by_user: true,
    };
    let hello = pb::ReportHello { settings: Some(settings), ..Default::default() };
    report_all(keys, janus, server, hello, pb::StateChange::default()).await
}

fn values(answer: &MetadataMap, name: &str) -> Vec<String> {
    answer.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}

async fn status(keys: &Keys, janus: &Running) -> pb::GetRouterStatusResponse {
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut info = ServerInfoServiceClient::new(channel);
    info.get_router_status(GetRouterStatusRequest {}).await.unwrap().into_inner()
}

#[tokio::test]
async fn differences_are_shown_in_the_status_and_in_the_answer_of_each_start() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let listen = |settings: &mut Settings| settings.metrics_listen = "127.0.0.1:0".into();
    let janus = janus_with(&keys, &[a.address(), b.address()], listen).await;
    let counted = async || {
        let page = scrape(janus.metrics.unwrap()).await;
        let mut figures =
            page.lines().filter_map(|line| line.strip_prefix("janus_settings_differences "));
        figures.next().unwrap().to_owned()
    };
    let _a = report(&keys, &janus, "a", true).await;
    let mut client = client(&keys, &janus.url).await;
    let answer = client.start_backup(start_request()).await.unwrap();
    assert!(values(answer.metadata(), metadata::WARNING).is_empty());
    assert!(status(&keys, &janus).await.warnings.is_empty());

    let with_other = report(&keys, &janus, "b", false).await;
    let expected = ["prefer_vhdx differs: false on b; true on a"];
    let answer = client.start_backup(start_request()).await.unwrap();
    assert_eq!(values(answer.metadata(), metadata::WARNING), expected);
    let shown = status(&keys, &janus).await;
    assert_eq!(
        (shown.warnings, counted().await.as_str()),
        (expected.map(str::to_owned).to_vec(), "1.0")
    );
    assert!(!shown.servers[1].settings.clone().unwrap().prefer_vhdx);

    drop(with_other);
    let _same = report(&keys, &janus, "b", true).await;
    assert!(status(&keys, &janus).await.warnings.is_empty());
    assert_eq!(counted().await, "0.0");
}

#[tokio::test]
async fn a_server_with_other_settings_is_left_out_but_never_the_last() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let servers = [a.address(), b.address()];
    let strict = |settings: &mut Settings| {
        settings.require_equal_settings = true;
        settings.prefer_vhdx = false;
    };
    let janus = janus_with(&keys, &servers, strict).await;
    let (_a, _b) =
        (report(&keys, &janus, "a", true).await, report(&keys, &janus, "b", false).await);
    let mut client = client(&keys, &janus.url).await;
    for _ in 0..2 {
        let answer = client.start_backup(start_request()).await.unwrap();
        assert_eq!(answer.get_ref().server_id, "b");
    }
    let answer = client.start_backup(start_request()).await.unwrap();
    let reason = "a: its prefer_vhdx differs from this janus' (require_equal_settings)";
    assert_eq!(values(answer.metadata(), metadata::SKIPPED), [reason]);
    b.line.cut();
    assert_eq!(client.start_backup(start_request()).await.unwrap().into_inner().server_id, "a");
}

#[tokio::test]
async fn two_servers_of_one_name_are_noticed_until_one_is_gone() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus_with(&keys, &[a.address()], |_| {}).await;
    let of = |store_generation: &str| pb::ReportHello {
        store_generation: store_generation.into(),
        ..Default::default()
    };
    let full = pb::StateChange::default;
    let _real = report_all(&keys, &janus, "a", of("real"), full()).await;
    assert!(status(&keys, &janus).await.warnings.is_empty());
    let other = report_all(&keys, &janus, "a", of("other"), full()).await;
    let warnings = status(&keys, &janus).await.warnings;
    assert!(warnings[0].starts_with("server a reports two stores, other and real"), "{warnings:?}");
    drop(other);
    let gone = || async { status(&keys, &janus).await.servers[0].report_age_ms == -1 };
    until("the other is gone", gone).await;
    let _real = report_all(&keys, &janus, "a", of("real"), full()).await;
    assert!(status(&keys, &janus).await.warnings.is_empty());
}

/// A report of a server with this store.
async fn report_store(
    keys: &Keys,
    janus: &Running,
    server: &str,
    store: &str,
) -> impl Sized + use<> {
    let hello = pb::ReportHello { store_generation: store.into(), ..Default::default() };
    report_all(keys, janus, server, hello, pb::StateChange::default()).await
}

#[tokio::test]
async fn of_two_servers_with_one_store_neither_gets_starts_until_one_has_another() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus_with(&keys, &[a.address(), b.address()], |_| {}).await;
    let mut client = client(&keys, &janus.url).await;
    let _a = report_store(&keys, &janus, "a", "store-1").await;
    client.start_backup(start_request()).await.unwrap();
    let copy = report_store(&keys, &janus, "b", "store-1").await;
    let starts = (a.starts(), b.starts());

    let refused = client.start_backup(start_request()).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::NoServerReady), "{refused}");
    for part in [
        "a: it reports the same store as server b",
        "b: it reports the same store as server a",
        "adopt --new-id",
    ] {
        assert!(refused.message().contains(part), "{refused}");
    }
    let mut pinned = start_request();
    pinned.metadata_mut().insert(metadata::SERVER, "a".parse().unwrap());
    let refused = client.start_backup(pinned).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::NoServerReady), "{refused}");
    assert_eq!((a.starts(), b.starts()), starts, "none of them was asked");

    let shown = status(&keys, &janus).await;
    assert_eq!(shown.warnings.len(), 1, "{:?}", shown.warnings);
    assert!(shown.warnings[0].starts_with("servers a and b report the same store"));
    assert!(shown.servers.iter().all(|server| !server.ready && server.reason.contains("adopt")));
    // Reads go on.
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut catalog = pb::catalog_service_client::CatalogServiceClient::new(channel);
    catalog.list_snapshots(pb::ListSnapshotsRequest::default()).await.unwrap();

    // A copy whose stream is torn is still one: its server can be reached.
    drop(copy);
    client.start_backup(start_request()).await.unwrap_err();
    let _b = report_store(&keys, &janus, "b", "store-2").await;
    client.start_backup(start_request()).await.unwrap();
    assert!(status(&keys, &janus).await.warnings.is_empty());
}
