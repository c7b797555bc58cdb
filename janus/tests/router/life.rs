//! Health of the janus itself, and its end.

use std::time::{Duration, Instant};

use janus_proto::{metadata, pb};
use tokio::{net::TcpStream, time::timeout};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    backend::Backend,
    site::{Keys, channel, client, janus, nobody, until},
};

fn asking(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

#[tokio::test]
async fn health_follows_the_servers() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address(), nobody().await]).await;
    let health = HealthClient::new(channel(&janus.url, &keys.identity("client/alice/web")).await);
    let is = |service: &'static str, status: ServingStatus| {
        let mut health = health.clone();
        async move {
            health
                .check(asking(service))
                .await
                .is_ok_and(|answer| answer.get_ref().status() == status)
        }
    };
    for service in ["", "janus.v1.BackupService", "janus.v1.RestoreService"] {
        until("serving", || is(service, ServingStatus::Serving)).await;
    }
    let mut watch =
        health.clone().watch(asking("janus.v1.BackupService")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    a.line.cut();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(is("", ServingStatus::Serving).await, "the process lives");
    let unknown = health.clone().check(asking("no.such.Service")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    a.line.mend();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
}

#[tokio::test]
async fn reflection_and_info_are_served() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let channel = channel(&janus.url, &keys.identity("operator/root")).await;
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel.clone());
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    assert!(list.service.iter().any(|service| service.name == "janus.v1.BackupService"));

    let mut info = pb::server_info_service_client::ServerInfoServiceClient::new(channel);
    let own = info.get_server_info(pb::GetServerInfoRequest {}).await.unwrap();
    assert_eq!(own.metadata().get(metadata::SERVER).unwrap(), "door");
    assert_eq!(own.into_inner().role, "janus");
}

#[tokio::test]
async fn a_drain_ends_in_time_whatever_hangs_on() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let mut janus = janus(&keys, &[a.address()]).await;
    // One that never speaks, one that watches, one that uploads.
    let address = janus.url.strip_prefix("https://").unwrap().to_string();
    let _silent = TcpStream::connect(address).await.unwrap();
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut watch = HealthClient::new(channel).watch(asking("")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let (_sender, messages) = tokio::sync::mpsc::channel(1);
    let mut uploader = client(&keys, &janus.url).await;
    let upload = tokio::spawn(async move {
        uploader
            .write_blocks(tokio_stream::wrappers::ReceiverStream::new(messages))
            .await
            .map(|_| ())
    });
    let begun = Instant::now();
    janus.stop.cancel();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    timeout(Duration::from_secs(5), janus.task.take().unwrap()).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!(upload.await.unwrap().is_err());
}

#[tokio::test]
async fn an_idle_janus_with_watchers_and_reports_stops_at_once() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let mut janus = janus(&keys, &[a.address()]).await;
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut watch = HealthClient::new(channel).watch(asking("")).await.unwrap().into_inner();
    watch.message().await.unwrap();
    let begun = Instant::now();
    janus.stop.cancel();
    timeout(Duration::from_secs(5), janus.task.take().unwrap()).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
}
