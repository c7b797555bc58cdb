//! Peers that are slow on purpose, and peers that are many.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use janus_proto::{
    pb::{
        self, backup_service_client::BackupServiceClient,
        restore_service_client::RestoreServiceClient,
    },
    tls::Identity,
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    calls::{pinned, start_of},
    raw::{DATA, END_HEADERS, END_STREAM, HEADERS, Raw, call, frame, message, tcp},
    scene::{BAD, STALL, Scene, Target},
};

/// From the TCP connection to the end of the handshake, and from there to the first frame.
const HANDSHAKE: Duration = Duration::from_secs(5);
const LATE: Duration = Duration::from_secs(3);

/// Seconds until the other end has closed; `None`: it hasn't in time.
async fn closed(mut tcp: TcpStream, within: Duration) -> Option<f64> {
    let begun = Instant::now();
    let mut rest = [0; 256];
    let reading = async { while !matches!(tcp.read(&mut rest).await, Ok(0) | Err(_)) {} };
    timeout(within, reading).await.ok().map(|()| begun.elapsed().as_secs_f64())
}

/// Opens `count` silent connections; how many were closed within half a second, and how many in the time of a handshake.
async fn silent(to: SocketAddr, count: usize) -> (usize, usize) {
    let mut waiting = Vec::new();
    for _ in 0..count {
        let Ok(tcp) = tcp(to, 67).await else { continue };
        waiting.push(tokio::spawn(closed(tcp, HANDSHAKE + LATE)));
    }
    let (mut at_once, mut in_time) = (0, 0);
    for closed in waiting {
        match closed.await.unwrap() {
            Some(seconds) if seconds < 2.0 => at_once += 1,
            Some(_) => in_time += 1,
            None => {}
        }
    }
    (at_once, in_time)
}

/// The first bytes of a TLS hello, one by one.
async fn drops(to: SocketAddr) -> Option<f64> {
    let mut tcp = tcp(to, 68).await.unwrap();
    let begun = Instant::now();
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    for byte in hello.iter().chain(std::iter::repeat(&7)) {
        if begun.elapsed() > HANDSHAKE + LATE || tcp.write_all(&[*byte]).await.is_err() {
            break;
        }
        let read = timeout(Duration::from_millis(100), tcp.read(&mut [0; 16])).await;
        if matches!(read, Ok(Ok(0) | Err(_))) {
            return Some(begun.elapsed().as_secs_f64());
        }
    }
    None
}

#[test]
fn handshakes_that_do_not_end_take_nobody_elses_place() {
    let mut scene = Scene::new();
    let bad = scene.identity(BAD);
    let mut waiting = Vec::new();
    for target in [Target::Server, Target::Janus] {
        let (to, bad) = (scene.address(target), bad.clone());
        let unspoken = async move {
            let mut raw = Raw::connect(to, &bad).await.unwrap();
            let begun = Instant::now();
            raw.closed_within(HANDSHAKE + LATE).await.then(|| begun.elapsed().as_secs_f64())
        };
        let held = scene.runtime.spawn(silent(to, 300));
        let [dropping, unspoken] = [scene.runtime.spawn(drops(to)), scene.runtime.spawn(unspoken)];
        waiting.push((target, held, dropping, unspoken));
    }
    std::thread::sleep(Duration::from_secs(1));
    for (target, held, dropping, unspoken) in waiting {
        // The good one comes from another address.
        scene.after(
            target,
            "300 connections that say nothing, while they are held",
            "others get in",
        );
        let (at_once, in_time) = scene.runtime.block_on(held).unwrap();
        let outcome = format!("{at_once} closed at once, {in_time} within the time of a handshake");
        assert_eq!(at_once + in_time, 300, "{outcome}");
        assert!(in_time <= 64, "{outcome}");
        scene.after(target, "300 connections that say nothing", outcome);
        for (case, waiting) in [("a hello in drops", dropping), ("no HTTP/2 after TLS", unspoken)] {
            let took = scene.runtime.block_on(waiting).unwrap().expect(case);
            assert!(took > 3.0, "{case}: {took}");
            scene.after(target, case, format!("closed after {took:.1} s"));
        }
    }
    scene.close();
}

#[test]
fn one_machine_takes_neither_all_connections_nor_all_streams() {
    let mut scene = Scene::new();
    let bad = scene.identity(BAD);
    for target in [Target::Server, Target::Janus] {
        let to = scene.address(target);
        let (open, refused) = scene.runtime.block_on(many_connections(to, &bad, 150));
        let outcome = format!("{open} of 150 are served, {refused} refused");
        assert!(open <= 64 && refused >= 80, "{outcome}");
        scene.after(target, "150 connections of one machine", outcome);

        let outcome = scene.runtime.block_on(async {
            let mut raw = Raw::greeted(to, &bad, &[]).await.unwrap();
            let upload = call("/janus.v1.BackupService/WriteBlocks", &[]);
            let opened = (0..2000).flat_map(|n| frame(HEADERS, END_HEADERS, 1 + 2 * n, &upload));
            let _ = raw.send(&opened.collect::<Vec<_>>()).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            let seen = raw.seen();
            let (resets, answers) = (seen.resets.len(), seen.frames[1]);
            assert!(resets as u64 + answers >= 1800 || seen.goaway.is_some(), "{seen:?}");
            format!("{resets} refused, {answers} answered, GOAWAY {:?}", seen.goaway)
        });
        scene.after(target, "2000 streams on a connection", outcome);
    }
    scene.close();
}

/// How many connections of `bad` are open together and answer a call, and how many are refused.
async fn many_connections(to: SocketAddr, bad: &Identity, count: usize) -> (usize, usize) {
    let mut raws = Vec::new();
    let watch = call("/grpc.health.v1.Health/Watch", &[]);
    for _ in 0..count {
        let Ok(mut raw) = Raw::greeted(to, bad, &[]).await else { continue };
        let sent =
            [frame(HEADERS, END_HEADERS, 1, &watch), frame(DATA, END_STREAM, 1, &message(&[]))];
        if raw.send(&sent.concat()).await.is_ok() {
            raws.push(raw);
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A watch that is answered has DATA; one that is refused has headers alone.
    let open = raws.iter().filter(|raw| raw.seen().data > 0).count();
    (open, count - open)
}

/// A call with one message; then nothing is taken of its answer.
fn read_all(handle: &str) -> [Vec<u8>; 2] {
    let request = pb::ReadBlocksRequest { handle: handle.into(), ..Default::default() };
    let headers = call("/janus.v1.RestoreService/ReadBlocks", &[("janus-server", "server-a")]);
    [headers, message(&request.encode_to_vec())]
}

#[test]
fn who_takes_nothing_or_sends_drops_loses_the_call() {
    let mut scene = Scene::new();
    let (bad, own) = (scene.identity(BAD), scene.snapshots[1].clone());
    for target in [Target::Server, Target::Janus] {
        let to = scene.address(target);
        let channel = scene.channel(target, BAD);
        let mut restore = RestoreServiceClient::new(channel.clone());
        let open = pb::OpenSnapshotRequest { snapshot_id: own.clone(), ..Default::default() };
        let opened = scene.runtime.block_on(restore.open_snapshot(pinned(open))).unwrap();
        let handle = opened.into_inner().handle;

        // Sixty connections would do the same: of one caller sixteen downloads go on at once.
        let [headers, request] = read_all(&handle);
        let mut raw = scene.runtime.block_on(async {
            let mut raw = Raw::greeted(to, &bad, &[(4, 0)]).await.unwrap();
            for n in 0..100 {
                let id = 1 + 2 * n;
                let open = frame(HEADERS, END_HEADERS, id, &headers);
                let ask = frame(DATA, END_STREAM, id, &request);
                raw.send(&[open, ask].concat()).await.unwrap();
            }
            raw
        });
        std::thread::sleep(Duration::from_secs(1));
        scene.after(
            target,
            "100 restores that nothing is taken of, while they are held",
            "others are served",
        );
        let seen = scene.runtime.block_on(async {
            let until = Instant::now() + STALL + LATE;
            while raw.seen().resets.len() < 16 && Instant::now() < until {
                // Pings are answered meanwhile: the connection lives.
                let _ = raw.send(&[]).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            raw.seen()
        });
        // Over the share: refused, which is headers. The others: an answer that begins, and a reset when its time is over.
        let outcome =
            format!("{} answers begun or refused, {} given up", seen.frames[1], seen.resets.len());
        assert!(seen.frames[1] >= 100, "{outcome}");
        assert!((8..=17).contains(&seen.resets.len()) || seen.ended.is_some(), "{outcome}");
        scene.after(target, "100 restores that nothing is taken of", outcome);
        drop(raw);

        let mut backup = BackupServiceClient::new(channel);
        let (_, request) = start_of(&[("slow", 1 << 20)]);
        let started = scene.runtime.block_on(backup.start_backup(pinned(request))).unwrap();
        let session_id = started.get_ref().sessions[0].session_id.clone();
        let first = pb::WriteBlocksRequest {
            session_id,
            epoch: started.get_ref().epoch,
            ..Default::default()
        };
        let took = scene.runtime.block_on(async {
            let mut raw = Raw::greeted(to, &bad, &[]).await.unwrap();
            let upload =
                call("/janus.v1.BackupService/WriteBlocks", &[("janus-server", "server-a")]);
            let open = frame(HEADERS, END_HEADERS, 1, &upload);
            let hello = frame(DATA, 0, 1, &message(&first.encode_to_vec()));
            // The beginning of a message of 1 MiB.
            let begin = frame(DATA, 0, 1, &[0, 0, 0x10, 0, 0]);
            raw.send(&[open, hello, begin].concat()).await.unwrap();
            let begun = Instant::now();
            while begun.elapsed() < STALL * 2 + LATE {
                // Trailers after the first headers, or a reset.
                let seen = raw.seen();
                if seen.frames[1] >= 2 || !seen.resets.is_empty() || seen.ended.is_some() {
                    return Some(begun.elapsed());
                }
                let _ = raw.send(&frame(DATA, 0, 1, &[7])).await;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            None
        });
        let took = took.expect("an upload in drops ends");
        let outcome = format!("ended after {:.1} s", took.as_secs_f64());
        scene.after(target, "an upload in drops", outcome);
    }
    scene.close();
}
