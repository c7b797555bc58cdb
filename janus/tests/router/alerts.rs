//! Alerts by a real HTTP listener and a real command.

use std::{sync::Arc, time::Duration};

use janus::config::Settings;
use janus_proto::pb::{self, report_request::Event};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::Mutex,
    time::sleep,
};

use crate::{
    backend::Backend,
    catalog::{report, snapshot},
    site::{Keys, janus_with, until},
};

/// Takes webhooks: the first `refusals` with 503, the rest with 204. Returns its URL and what it was told.
async fn receiver(mut refusals: usize) -> (String, Arc<Mutex<Vec<serde_json::Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let taken = Arc::new(Mutex::new(Vec::new()));
    let told = taken.clone();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let (mut request, mut buffer) = (String::new(), [0; 4096]);
            let body = loop {
                let count = tcp.read(&mut buffer).await.unwrap();
                request.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
                let length = |head: &str| {
                    let line = head.lines().find(|line| line.starts_with("content-length: "));
                    line.unwrap()["content-length: ".len()..].parse::<usize>().unwrap()
                };
                match request.split_once("\r\n\r\n") {
                    Some((head, body)) if body.len() >= length(head) => break body.to_owned(),
                    _ => {}
                }
            };
            assert!(request.starts_with("POST /hook HTTP/1.1\r\n"), "{request}");
            let answer = if refusals > 0 {
                refusals -= 1;
                "503 Service Unavailable"
            } else {
                told.lock().await.push(serde_json::from_str(&body).unwrap());
                "204 No Content"
            };
            let answer = format!("HTTP/1.1 {answer}\r\nconnection: close\r\n\r\n");
            tcp.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (url, taken)
}

fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_millis() as i64
}

#[tokio::test]
async fn alerts_arrive_once_by_webhook_and_command_although_the_first_attempt_fails() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let (url, told) = receiver(1).await;
    let folder = tempfile::tempdir().unwrap();
    let mails = folder.path().join("mails");
    let script = format!("cat >> '{}'", mails.display());
    let primary = |settings: &mut Settings| {
        settings.primary = true;
        settings.alert_webhook = url.clone();
        settings.alert_command = ["/bin/sh", "-c", script.as_str()].map(str::to_owned).to_vec();
        settings.alert_after_minutes = 0;
    };
    let janus = janus_with(&keys, &[a.address()], primary).await;
    let (sender, _answers) = report(&keys, &janus, "a", vec![snapshot("a", 1000)], 1).await;
    let count = || async { told.lock().await.len() };
    until("the overdue machine is told of", || async { count().await >= 1 }).await;
    // A new backup.
    let snapshots = vec![snapshot("a", now_ms())];
    let change = Event::Change(pb::StateChange { snapshots, ..Default::default() });
    sender.send(pb::ReportRequest { sequence: 9, event: Some(change) }).await.unwrap();
    until("its end is told", || async { count().await >= 2 }).await;
    a.line.cut();
    until("the lost server is told of", || async { count().await >= 3 }).await;
    sleep(Duration::from_secs(3)).await;
    let told = told.lock().await;
    let said: Vec<_> = told
        .iter()
        .map(|alert| ["event", "kind", "subject"].map(|key| alert[key].as_str().unwrap()))
        .collect();
    assert_eq!(
        said,
        [
            ["begun", "machine_overdue", "alice/web"],
            ["over", "machine_overdue", "alice/web"],
            ["begun", "server_unreachable", "a"],
        ]
    );
    let text = told[0]["text"].as_str().unwrap();
    assert!(text.ends_with(": alice/web has no backup since 1970-01-01 00:00:01"), "{text}");
    let mails = std::fs::read_to_string(mails).unwrap();
    let subjects: Vec<_> = mails.lines().filter(|line| line.starts_with("Subject: ")).collect();
    assert_eq!(subjects.len(), 3, "{mails}");
    assert!(subjects[2].contains("] a: "), "{mails}");
}
