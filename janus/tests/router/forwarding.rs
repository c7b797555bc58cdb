//! What travels through a janus comes out as it went in.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body::Frame;
use janus::config::Settings;
use janus_proto::{
    error::ErrorReason,
    metadata, pb,
    trace::{TRACEPARENT, TraceContext},
};
use prost::Message;
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};
use tower::ServiceExt;

use crate::{
    backend::{Backend, Mood},
    site::{Keys, channel, client, janus, janus_with, reason, until},
    starts::start_request,
};

pub fn hello(session: &str) -> pb::WriteBlocksRequest {
    pb::WriteBlocksRequest { session_id: session.into(), ..Default::default() }
}

fn data(bytes: Bytes) -> pb::WriteBlocksRequest {
    let batch = pb::BlockBatch { data: bytes, ..Default::default() };
    pb::WriteBlocksRequest { batch: Some(batch), ..Default::default() }
}

pub fn pinned<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(metadata::SERVER, "a".parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_arrives_whole() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let piece: Bytes = (0..1_048_576_u32).map(|i| (i % 251) as u8).collect::<Vec<_>>().into();
    let mut sum = blake3::Hasher::new();
    for _ in 0..256 {
        sum.update(&piece);
    }
    let messages = stream::iter([hello("s")]).chain(stream::repeat(piece).take(256).map(data));
    let mut answers = client.write_blocks(pinned(messages)).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().received_messages, 257);
    assert!(answers.message().await.unwrap().is_none());
    assert_eq!(a.seen.bytes.load(Ordering::SeqCst), 256 << 20);
    assert_eq!(a.seen.sum.lock().unwrap().finalize(), sum.finalize());

    let mut info = pb::server_info_service_client::ServerInfoServiceClient::new(
        channel(&janus.url, &keys.identity("operator/root")).await,
    );
    let status = info.get_router_status(pb::GetRouterStatusRequest {}).await.unwrap().into_inner();
    assert!(status.servers[0].bytes_sent > 256 << 20, "the counters prove the path");
    assert_eq!((status.janus_id.as_str(), status.servers[0].server_id.as_str()), ("door", "a"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_flow_at_once() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let many = |settings: &mut Settings| {
        (settings.max_bulk_streams, settings.max_bulk_streams_per_caller) = (300, 300);
    };
    let janus = janus_with(&keys, &[a.address()], many).await;
    let client = client(&keys, &janus.url).await;
    let (mut senders, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        let (sender, messages) = mpsc::channel(4);
        sender.send(hello("s")).await.unwrap();
        senders.push(sender);
        let mut client = client.clone();
        calls.push(tokio::spawn(async move {
            let mut answers =
                client.write_blocks(pinned(ReceiverStream::new(messages))).await?.into_inner();
            answers.message().await
        }));
    }
    until("all are open", || async { a.seen.uploads.load(Ordering::SeqCst) == 300 }).await;
    for sender in senders {
        sender.send(data(Bytes::from_static(&[7; 4096]))).await.unwrap();
    }
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().unwrap().received_messages, 2);
    }
    assert_eq!(a.seen.bytes.load(Ordering::SeqCst), 300 * 4096);
}

#[tokio::test]
async fn a_given_up_download_ends_at_the_server() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let answers = client.write_blocks(pinned(stream::iter([hello("hold")]))).await.unwrap();
    until("the call is open", || async { a.seen.uploads.load(Ordering::SeqCst) == 1 }).await;
    let begun = Instant::now();
    drop(answers);
    until("the server sees the end", || async { a.seen.broken.load(Ordering::SeqCst) == 1 }).await;
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_broken_upload_is_broken_at_the_server_too() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let message = hello("s").encode_to_vec();
    let mut framed = vec![0];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    let open = a.seen.clone();
    let frames = stream::once(async move { Ok(Frame::data(Bytes::from(framed))) }).chain(
        stream::once(async move {
            while open.uploads.load(Ordering::SeqCst) == 0 {
                sleep(Duration::from_millis(5)).await;
            }
            Err(std::io::Error::other("the client's disk broke"))
        }),
    );
    let request = http::Request::post("/janus.v1.BackupService/WriteBlocks")
        .header("content-type", "application/grpc")
        .header(metadata::SERVER, "a")
        .body(tonic::body::Body::new(http_body_util::StreamBody::new(frames)))
        .unwrap();
    // Not a half-close: the server must not take what has arrived for all there is.
    let answer = tokio::spawn(channel.oneshot(request));
    until("the server sees a broken upload", || async {
        a.seen.broken.load(Ordering::SeqCst) == 1
    })
    .await;
    drop(answer);
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_upload_ends_it() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let piece = Bytes::from(vec![1; 1 << 20]);
    let messages = stream::iter([hello("early")]).chain(stream::repeat(piece).map(data));
    let refused = client.write_blocks(pinned(messages)).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused)),
        (Code::NotFound, Some(ErrorReason::SessionExpired))
    );
}

#[tokio::test]
async fn statuses_pass_with_their_details() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let refused = client(&keys, &janus.url)
        .await
        .commit_backup(pinned(pb::CommitBackupRequest::default()))
        .await
        .unwrap_err();
    assert_eq!((refused.code(), reason(&refused)), (Code::Aborted, Some(ErrorReason::HeadMoved)));
    assert_eq!(refused.message(), "the head on a has moved");
    assert_eq!(refused.metadata().get(metadata::SERVER).unwrap(), "a");
}

#[tokio::test]
async fn a_status_after_messages_passes() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let answers = client.write_blocks(pinned(stream::iter([hello("fail")]))).await.unwrap();
    let mut answers = answers.into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().received_messages, 1);
    let end = answers.message().await.unwrap_err();
    assert_eq!((end.code(), reason(&end)), (Code::ResourceExhausted, Some(ErrorReason::StoreFull)));
    assert_eq!(end.message(), "the disk is full");
}

#[tokio::test]
async fn the_server_sees_its_own_authority() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    client(&keys, &janus.url).await.start_backup(start_request()).await.unwrap();
    let uri = a.seen.uri.lock().unwrap().clone();
    let expected = format!("https://{}/janus.v1.BackupService/StartBackup", a.address());
    assert_eq!(uri.to_string(), expected);
    assert!(a.header("host").is_empty());
}

/// Longer than a silent connection counts as alive.
#[tokio::test]
async fn a_quiet_stream_is_left_alone() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let (sender, messages) = mpsc::channel(4);
    sender.send(hello("s")).await.unwrap();
    let answers = client.write_blocks(pinned(ReceiverStream::new(messages))).await.unwrap();
    sleep(Duration::from_secs(18)).await;
    sender.send(data(Bytes::from_static(&[7; 4096]))).await.unwrap();
    drop(sender);
    assert_eq!(answers.into_inner().message().await.unwrap().unwrap().received_messages, 2);
}

/// The line is cut at any moment of an upload without a pin: before it, or in the middle.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_whole_at_one_server_or_fails() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    assert_eq!(client.start_backup(start_request()).await.unwrap().into_inner().server_id, "a");
    let piece = Bytes::from(vec![7; 1 << 20]);
    // The line is cut at moments up to twice what an upload takes on this machine now.
    let begun = Instant::now();
    let messages =
        stream::iter([hello("s")]).chain(stream::repeat(piece.clone()).take(16).map(data));
    client.write_blocks(messages).await.unwrap().into_inner().message().await.unwrap();
    let twelfth = begun.elapsed() / 12;
    let (mut whole, mut failed) = (0, 0);
    for round in 0..24_u32 {
        // Of its own name: a may still be reading what came of the last one before the cut.
        let session = format!("round {round}");
        let before = b.seen.uploads.load(Ordering::SeqCst);
        let messages =
            stream::iter([hello(&session)]).chain(stream::repeat(piece.clone()).take(16).map(data));
        let upload = async { client.write_blocks(messages).await?.into_inner().message().await };
        let cut = async {
            sleep(twelfth * round).await;
            a.line.cut();
        };
        let (answer, ()) = tokio::join!(upload, cut);
        let whole_at = |server: &Backend| {
            server.seen.whole.lock().unwrap().contains(&(session.clone(), 16 << 20))
        };
        let moved = b.seen.uploads.load(Ordering::SeqCst) > before;
        match answer {
            Ok(answer) => {
                whole += 1;
                assert_eq!(answer.unwrap().received_messages, 17);
                assert!(whole_at(if moved { &b } else { &a }), "moved to b: {moved}");
            }
            Err(lost) => {
                failed += 1;
                assert_eq!(lost.code(), Code::Unavailable, "{lost}");
                assert!(!moved, "what a has seen moves nowhere");
            }
        }
        a.line.mend();
        until("a is back", || async {
            let mut start = start_request();
            start.metadata_mut().insert(metadata::SERVER, "a".parse().unwrap());
            client.clone().start_backup(start).await.is_ok()
        })
        .await;
    }
    assert!(whole > 0 && failed > 0, "both were met: {whole} whole, {failed} failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_under_load_costs_no_start_and_no_upload() {
    let keys = Keys::new();
    let a = Backend::draining_for(&keys, "a", Duration::from_secs(10)).await;
    let b = Backend::new(&keys, "b").await;
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let client = client(&keys, &janus.url).await;
    let (sender, messages) = mpsc::channel(4);
    sender.send(hello("s")).await.unwrap();
    let mut uploader = client.clone();
    let mut answers =
        uploader.write_blocks(pinned(ReceiverStream::new(messages))).await.unwrap().into_inner();

    let starting: Vec<_> = (0..16)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move {
                let mut servers = Vec::new();
                for _ in 0..50 {
                    let answer = client.start_backup(start_request()).await?;
                    servers.push(answer.into_inner().server_id);
                }
                Ok::<_, tonic::Status>(servers)
            })
        })
        .collect();
    until("both take starts", || async { a.starts() > 50 && b.starts() > 50 }).await;
    // GOAWAY: the upload may end, new calls go elsewhere.
    a.stop.cancel();
    let mut servers = Vec::new();
    for calls in starting {
        servers.extend(calls.await.unwrap().expect("no start fails"));
    }
    assert_eq!(servers.len(), 16 * 50);
    assert!(b.starts() > a.starts(), "the rest went to b");
    for _ in 0..8 {
        sender.send(data(Bytes::from(vec![7; 1 << 20]))).await.unwrap();
    }
    drop(sender);
    assert_eq!(answers.message().await.unwrap().unwrap().received_messages, 9);
    assert_eq!(a.seen.bytes.load(Ordering::SeqCst), 8 << 20);
}

#[tokio::test]
async fn the_server_gets_the_callers_certificate_and_deadline_and_nobody_elses() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let identity = keys.identity("client/alice/web");
    let mut client =
        pb::backup_service_client::BackupServiceClient::new(channel(&janus.url, &identity).await);
    let own = BASE64_STANDARD.encode(&identity.principal().der);
    let forged = BASE64_STANDARD.encode(&keys.identity("operator/root").principal().der);
    for is_pinned in [true, false] {
        let mut request = start_request();
        request.metadata_mut().insert(metadata::PRINCIPAL, forged.parse().unwrap());
        request.set_timeout(Duration::from_secs(7));
        if is_pinned {
            request.metadata_mut().insert(metadata::SERVER, "a".parse().unwrap());
        }
        client.start_backup(request).await.unwrap();
        assert_eq!(a.header(metadata::PRINCIPAL), [own.as_str()]);
        assert_eq!(a.header("grpc-timeout"), ["7000000u"]);
        assert_eq!(a.header("te"), ["trailers"]);
    }
}

#[tokio::test]
async fn a_server_lost_in_the_middle_is_unavailable_not_a_clean_end() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let (sender, messages) = mpsc::channel(4);
    sender.send(hello("s")).await.unwrap();
    let mut answers =
        client.write_blocks(pinned(ReceiverStream::new(messages))).await.unwrap().into_inner();
    a.line.cut();
    let lost = answers.message().await.unwrap_err();
    assert_eq!(
        (lost.code(), reason(&lost)),
        (Code::Unavailable, Some(ErrorReason::ServerUnreachable))
    );
    assert!(lost.message().contains("server a was lost"), "{}", lost.message());
    assert_eq!(b.seen.uploads.load(Ordering::SeqCst), 0, "pinned streams never move");
}

#[tokio::test]
async fn a_start_in_flight_moves_on_when_its_server_is_lost_but_not_while_it_works() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    a.set_mood(Mood::Stuck);
    let call = tokio::spawn(async move { client.start_backup(start_request()).await });
    sleep(Duration::from_millis(2500)).await;
    assert!(!call.is_finished() && b.starts() == 0, "a slow start is not a dead server");
    a.line.cut();
    assert_eq!(call.await.unwrap().unwrap().into_inner().server_id, "b");
}

#[tokio::test]
async fn an_upload_on_a_frozen_server_ends_after_a_while() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let (sender, messages) = mpsc::channel(4);
    sender.send(hello("s")).await.unwrap();
    let mut answers =
        client.write_blocks(pinned(ReceiverStream::new(messages))).await.unwrap().into_inner();
    a.line.freeze();
    let begun = Instant::now();
    let lost = answers.message().await.unwrap_err();
    assert_eq!(
        (lost.code(), reason(&lost)),
        (Code::Unavailable, Some(ErrorReason::ServerUnreachable))
    );
    assert!((10..25).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_pinned_call_to_a_frozen_server_ends_soon() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let janus = janus(&keys, &[a.address(), b.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let on_a = || pinned(start_request().into_inner());
    client.start_backup(on_a()).await.unwrap();
    a.line.freeze();
    let begun = Instant::now();
    let lost = client.start_backup(on_a()).await.unwrap_err();
    assert_eq!(reason(&lost), Some(ErrorReason::ServerUnreachable), "{lost}");
    assert!(lost.message().contains("no answer for"), "{lost}");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn methods_from_the_future_are_forwarded_and_foreign_ones_are_not() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut grpc =
        tonic::client::Grpc::new(channel(&janus.url, &keys.identity("client/alice/web")).await);
    for (path, server) in [("/janus.v1.BackupService/NotYet", "a"), ("/other.v1.Thing/Do", "door")]
    {
        grpc.ready().await.unwrap();
        let codec =
            tonic_prost::ProstCodec::<pb::GetBackupRequest, pb::GetBackupResponse>::default();
        let refused = grpc
            .unary(Request::new(Default::default()), path.parse().unwrap(), codec)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::Unimplemented);
        assert_eq!(refused.metadata().get(metadata::SERVER).unwrap(), server, "{path}");
    }
}

#[tokio::test]
async fn a_trace_goes_on_at_the_server_under_a_new_parent() {
    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let mut client = client(&keys, &janus.url).await;
    let mut start = async |traceparent: &'static str| {
        let mut request = start_request();
        request.metadata_mut().insert(TRACEPARENT, traceparent.parse().unwrap());
        client.start_backup(request).await.unwrap();
        let seen = a.header(TRACEPARENT);
        assert_eq!(seen.len(), 1, "{seen:?}");
        (seen[0].parse::<TraceContext>().unwrap().trace_id(), seen[0].clone())
    };
    let (trace, header) = start(GIVEN).await;
    assert_eq!(trace, "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_ne!(header, GIVEN);
    let (other, _) = start("nonsense").await;
    assert_ne!(other, trace);
}
