//! Where starts go.

use std::time::{Duration, Instant};

use janus_proto::{error::ErrorReason, ids::BackupId, metadata, pb};
use tokio::net::TcpListener;
use tonic::{Code, Request, Response, Status, transport::Channel};

use crate::{
    backend::{Backend, Mood},
    catalog::report,
    site::{Keys, client, janus, nobody, reason, until},
};

type Client = pb::backup_service_client::BackupServiceClient<Channel>;
type Answer = Result<Response<pb::StartBackupResponse>, Status>;

pub fn start_request() -> Request<pb::StartBackupRequest> {
    Request::new(pb::StartBackupRequest {
        backup_id: BackupId::new().to_string(),
        ..Default::default()
    })
}

async fn start(client: &mut Client) -> Answer {
    client.start_backup(start_request()).await
}

fn server(answer: &Answer) -> String {
    answer.as_ref().unwrap().metadata().get(metadata::SERVER).unwrap().to_str().unwrap().to_string()
}

fn skipped(answer: &Answer) -> Vec<String> {
    let answers = answer.as_ref().unwrap().metadata().get_all(metadata::SKIPPED);
    answers.iter().map(|value| value.to_str().unwrap().to_string()).collect()
}

#[tokio::test]
async fn starts_alternate_and_counters_rise() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    for (turn, expected) in ["a", "b", "a", "b"].into_iter().enumerate() {
        let answer = start(&mut client).await;
        assert_eq!((server(&answer).as_str(), skipped(&answer).len()), (expected, 0));
        let counter =
            answer.unwrap().metadata().get(metadata::USE).unwrap().to_str().unwrap().to_string();
        assert_eq!(counter, (turn + 1).to_string());
    }
    let mut higher = start_request();
    higher.metadata_mut().insert(metadata::USE, "50".parse().unwrap());
    client.start_backup(higher).await.unwrap();
    assert_eq!(a.header(metadata::USE), ["50"], "the client's own counter counts");
}

#[tokio::test]
async fn starts_at_the_same_time_of_two_machines_spread() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut clients = Vec::new();
    for machine in 0..6 {
        let identity = keys.identity(&format!("client/alice/m{machine}"));
        clients.push(Client::new(crate::site::channel(&janus.url, &identity).await));
    }
    futures::future::join_all(clients.iter_mut().map(start)).await;
    assert_eq!((a.starts(), b.starts()), (3, 3));
}

#[tokio::test]
async fn a_dead_server_is_skipped_with_the_reason_and_comes_back() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    assert_eq!(server(&start(&mut client).await), "a");
    assert_eq!(server(&start(&mut client).await), "b");
    a.line.cut();
    for _ in 0..2 {
        let answer = start(&mut client).await;
        assert_eq!(server(&answer), "b");
        assert!(skipped(&answer)[0].starts_with("a: "), "{:?}", skipped(&answer));
    }
    a.line.mend();
    let answer = start(&mut client).await;
    assert_eq!(server(&answer), "a", "looked for at once: {:?}", skipped(&answer));
}

#[tokio::test]
async fn without_servers_each_is_listed_with_its_reason() {
    let keys = Keys::new();
    let (one, two) = (nobody().await, nobody().await);
    let janus = janus(&keys, &[one, two]).await;
    let refused = start(&mut client(&keys, &janus.url).await).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused)),
        (Code::Unavailable, Some(ErrorReason::NoServerReady))
    );
    for address in [one, two] {
        assert!(
            refused.message().contains(&format!("https://{address}: connection refused")),
            "{}",
            refused.message()
        );
    }
    use tonic_types::StatusExt;
    assert!(refused.get_details_retry_info().is_some());
}

#[tokio::test]
async fn a_server_that_accepts_and_never_answers_costs_at_most_two_seconds() {
    let keys = Keys::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let b = Backend::new(&keys, "b").await;
    let janus = janus(&keys, &[silent.local_addr().unwrap(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let begun = Instant::now();
    let answer = start(&mut client).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!((server(&answer).as_str(), skipped(&answer).len()), ("b", 1));
}

#[tokio::test]
async fn a_frozen_server_is_skipped_and_used_again_when_it_answers() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    assert_eq!(server(&start(&mut client).await), "a");
    assert_eq!(server(&start(&mut client).await), "b");
    a.line.freeze();
    let begun = Instant::now();
    let answer = start(&mut client).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(server(&answer), "b");
    assert!(skipped(&answer)[0].contains("no answer for"), "{:?}", skipped(&answer));
    a.line.thaw();
    until("a is used again", || {
        let mut client = client.clone();
        async move { server(&start(&mut client).await) == "a" }
    })
    .await;
}

#[tokio::test]
async fn refusals_that_concern_one_server_move_the_start_on_others_are_final() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    a.set_mood(Mood::Refuse(ErrorReason::Draining));
    let answer = start(&mut client).await;
    assert_eq!(
        (server(&answer).as_str(), skipped(&answer)),
        ("b", vec!["a: a refuses".to_string()])
    );
    a.set_mood(Mood::Refuse(ErrorReason::StoreFull));
    assert_eq!(server(&start(&mut client).await), "b");

    b.set_mood(Mood::Refuse(ErrorReason::Draining));
    let refused = start(&mut client).await.unwrap_err();
    assert_eq!(
        reason(&refused),
        Some(ErrorReason::StoreFull),
        "the only server that could: its own words"
    );
    a.set_mood(Mood::Refuse(ErrorReason::Draining));
    let refused = start(&mut client).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::NoServerReady));
    a.set_mood(Mood::Refuse(ErrorReason::LeaseHeld));
    let refused = start(&mut client).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::LeaseHeld));
}

#[tokio::test]
async fn a_start_that_a_server_says_it_cannot_take_goes_elsewhere_while_reads_stay() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    a.health
        .set_service_status("janus.v1.BackupService", tonic_health::ServingStatus::NotServing)
        .await;
    until("a is passed over", || {
        let mut client = client.clone();
        async move {
            let answer = start(&mut client).await;
            server(&answer) == "b" && skipped(&answer) == ["a: takes no backups now"]
        }
    })
    .await;
    let mut pinned = Request::new(pb::GetBackupRequest::default());
    pinned.metadata_mut().insert(metadata::SERVER, "a".parse().unwrap());
    client.get_backup(pinned).await.unwrap();
}

#[tokio::test]
async fn pinned_calls_go_nowhere_else() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let pinned = |name: &str| {
        let mut request = start_request();
        request.metadata_mut().insert(metadata::SERVER, name.parse().unwrap());
        request
    };
    for _ in 0..2 {
        assert_eq!(server(&client.start_backup(pinned("b")).await), "b");
    }
    a.line.cut();
    for name in ["a", "nobody"] {
        let begun = Instant::now();
        let refused = client.start_backup(pinned(name)).await.unwrap_err();
        assert_eq!(
            (refused.code(), reason(&refused)),
            (Code::Unavailable, Some(ErrorReason::ServerUnreachable))
        );
        assert!(
            refused.message().contains(&format!("server {name} can't be reached")),
            "{}",
            refused.message()
        );
        assert!(begun.elapsed() < Duration::from_secs(2));
    }
    assert_eq!(b.starts(), 2);
}

#[tokio::test]
async fn a_run_goes_on_at_its_server() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let run: tonic::metadata::MetadataValue<_> = BackupId::new().to_string().parse().unwrap();
    let mut first = start_request();
    first.metadata_mut().insert(metadata::RUN, run.clone());
    assert_eq!(server(&client.start_backup(first).await), "a");
    assert_eq!(server(&start(&mut client).await), "b", "now b was used last");
    let mut call = Request::new(pb::GetBackupRequest::default());
    call.metadata_mut().insert(metadata::RUN, run.clone());
    let answer = client.get_backup(call).await.unwrap();
    assert_eq!(answer.metadata().get(metadata::SERVER).unwrap(), "a");
    let mut again = start_request();
    again.metadata_mut().insert(metadata::RUN, run);
    assert_eq!(server(&client.start_backup(again).await), "a", "a repeated start finds its run");
}

#[tokio::test]
async fn a_caller_speaks_for_itself_only() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let _a = report(&keys, &janus, "a", vec![], 0).await;
    let mut other = start_request();
    other.metadata_mut().insert(metadata::MACHINE, "alice/db".parse().unwrap());
    let refused = client(&keys, &janus.url).await.start_backup(other).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::NotAllowed));
    let mut operator =
        Client::new(crate::site::channel(&janus.url, &keys.identity("operator/root")).await);
    let refused = start(&mut operator).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::InvalidField));
    assert_eq!(a.starts(), 0);
}

/// What it says of itself is its own affair: the others are sent counters that they take.
#[tokio::test]
async fn a_server_that_tells_absurd_counters_stops_no_backup_on_others() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let c = Backend::new(&keys, "c").await;
    let janus = janus(&keys, &[a.address(), b.address(), c.address()]).await;
    let _a = report(&keys, &janus, "a", vec![], u64::MAX).await;
    let _b = report(&keys, &janus, "b", vec![], 7).await;
    b.seen.use_counter.store(7, std::sync::atomic::Ordering::SeqCst);
    let mut client = client(&keys, &janus.url).await;
    for expected in ["c", "b", "c", "b"] {
        assert_eq!(server(&start(&mut client).await), expected, "they still take turns");
    }
    let mut asked = start_request();
    asked.metadata_mut().insert(metadata::USE, u64::MAX.into());
    assert_eq!(server(&client.start_backup(asked).await), "c", "a caller that asks for too much");
    assert_eq!(a.starts(), 0);
}

/// After a few seconds of looking in vain the next look is seconds away, unless the server shows itself that it lives.
#[tokio::test]
async fn a_server_that_reports_is_looked_for_at_once() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut info = pb::server_info_service_client::ServerInfoServiceClient::new(
        crate::site::channel(&janus.url, &keys.identity("operator/root")).await,
    );
    let mut is_ready = async || {
        let status = info.get_router_status(pb::GetRouterStatusRequest {}).await.unwrap();
        status.into_inner().servers[0].ready
    };
    assert!(is_ready().await);
    a.line.cut();
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    a.line.mend();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!is_ready().await, "nobody has looked");
    let _a = report(&keys, &janus, "a", vec![], 1).await;
    let begun = Instant::now();
    while !is_ready().await {
        assert!(begun.elapsed() < Duration::from_secs(1), "it is not looked for");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
