//! Bulk streams are bounded, nobody takes them all, and a slow one holds up no other.

use std::{sync::atomic::Ordering, time::Duration};

use janus::config::Settings;
use janus_proto::{
    error::{ErrorReason, retry_delay},
    pb::{
        self, backup_service_client::BackupServiceClient,
        restore_service_client::RestoreServiceClient,
    },
};
use tokio::{
    sync::mpsc::{self, Sender},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status, Streaming};

use crate::{
    backend::Backend,
    forwarding::{hello, pinned},
    site::{Keys, Running, channel, janus_with, reason, until},
};

type Opened =
    Result<(Sender<pb::WriteBlocksRequest>, Response<Streaming<pb::WriteBlocksResponse>>), Status>;

/// An upload of `machine` that stays open; the server answers at its end.
async fn upload(keys: &Keys, janus: &Running, machine: &str) -> Opened {
    let identity = keys.identity(&format!("client/alice/{machine}"));
    let mut client = BackupServiceClient::new(channel(&janus.url, &identity).await);
    let (sender, messages) = mpsc::channel(4);
    sender.send(hello("s")).await.unwrap();
    let answers = client.write_blocks(pinned(ReceiverStream::new(messages))).await?;
    Ok((sender, answers))
}

fn assert_busy(opened: Opened, message: &str) {
    let refused = opened.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused), retry_delay(&refused)),
        (Code::ResourceExhausted, Some(ErrorReason::TooMany), Some(Duration::from_secs(5)))
    );
    assert_eq!(refused.message(), message);
}

#[tokio::test]
async fn a_stream_over_the_limit_is_refused_with_a_time_to_come_back() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let two = |settings: &mut Settings| settings.max_bulk_streams = 2;
    let janus = janus_with(&keys, &[a.address()], two).await;
    let _web = upload(&keys, &janus, "web").await.unwrap();
    let (db, mut answers) = upload(&keys, &janus, "db").await.unwrap();
    let full = "this janus carries 2 bulk streams already";
    assert_busy(upload(&keys, &janus, "mail").await, full);
    let mut restores =
        RestoreServiceClient::new(channel(&janus.url, &keys.identity("client/alice/mail")).await);
    let refused = restores.read_blocks(pinned(Default::default())).await.unwrap_err();
    assert_eq!(reason(&refused), Some(ErrorReason::TooMany), "downloads count, too");
    restores.open_snapshot(pinned(Default::default())).await.expect("other calls don't");

    drop(db);
    assert!(answers.get_mut().message().await.unwrap().is_some());
    drop(answers);
    until("there is a place again", || async { upload(&keys, &janus, "mail").await.is_ok() }).await;
}

#[tokio::test]
async fn a_caller_that_is_gone_leaves_its_places() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let one = |settings: &mut Settings| settings.max_bulk_streams = 1;
    let janus = janus_with(&keys, &[a.address()], one).await;
    for round in 1..=3 {
        // Dropped with its connection, in the middle of the upload.
        until("there is a place", || async { upload(&keys, &janus, "web").await.is_ok() }).await;
        until("the server sees the end", || async {
            a.seen.broken.load(Ordering::SeqCst) >= round
        })
        .await;
    }
}

#[tokio::test]
async fn one_caller_cannot_take_all_streams() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let two_each = |settings: &mut Settings| settings.max_bulk_streams_per_caller = 2;
    let janus = janus_with(&keys, &[a.address()], two_each).await;
    let _first = upload(&keys, &janus, "web").await.unwrap();
    let _second = upload(&keys, &janus, "web").await.unwrap();
    let full = "client alice/web has 2 bulk streams here already";
    assert_busy(upload(&keys, &janus, "web").await, full);
    upload(&keys, &janus, "db").await.expect("others have theirs");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_hold_up_nobody_else() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus_with(&keys, &[a.address()], |_| {}).await;
    let read = async |machine: &str| {
        let identity = keys.identity(&format!("client/alice/{machine}"));
        let mut client = RestoreServiceClient::new(channel(&janus.url, &identity).await);
        client.read_blocks(pinned(Default::default())).await.unwrap().into_inner()
    };
    // More than fit into any window of the connection to the server, and nobody reads them.
    let mut stalled = Vec::new();
    for n in 0..8 {
        stalled.push(read(&format!("slow{n}")).await);
    }
    let taken = || async {
        let before = a.seen.bytes.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(300)).await;
        a.seen.bytes.load(Ordering::SeqCst) == before
    };
    until("the slow ones stand still", taken).await;
    let stuck_at = a.seen.bytes.load(Ordering::SeqCst);
    assert!(stuck_at > 8 << 20 && stuck_at < 8 * (64 << 20), "{stuck_at}");

    let mut fast = read("fast").await;
    for _ in 0..128 {
        let answer = timeout(Duration::from_secs(10), fast.message()).await.expect("it flows");
        assert_eq!(answer.unwrap().unwrap().batch.unwrap().data.len(), 1 << 20);
    }
    let (sender, mut answers) = upload(&keys, &janus, "writer").await.unwrap();
    drop(sender);
    let acknowledged = timeout(Duration::from_secs(10), answers.get_mut().message()).await;
    assert!(acknowledged.expect("uploads are acknowledged").unwrap().is_some());
}
