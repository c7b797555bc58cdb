//! A janus of an older version, with calls that it doesn't know: what can be done without them is, the rest says so.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use janus_proto::{
    channel::{self, ConnectOptions},
    listener::{self, Limits},
    tls::Identity,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, body::Body, transport::Channel};
use tower::{Service, ServiceExt};
use xtask::{
    disk,
    site::{Client, Plan, Programs, Settings, Site},
};

const MIB: u64 = 1 << 20;
/// Calls that came after the first version.
const NEWER: [&str; 3] = ["/janus.v1.TableService/", "/janus.v1.ProbeService/", "/WakeServers"];

/// Stands before a real janus and has never heard of some calls.
#[derive(Clone)]
struct Old {
    janus: Channel,
    unknown: Arc<Mutex<Vec<&'static str>>>,
    /// Those of them that somebody tried.
    tried: Arc<Mutex<BTreeSet<&'static str>>>,
}

impl Service<Request<Incoming>> for Old {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let unknown = self.unknown.lock().unwrap().clone();
        if let Some(call) = unknown.into_iter().find(|call| request.uri().path().contains(call)) {
            self.tried.lock().unwrap().insert(call);
            // As tonic answers for a service or a method that it has no code for.
            return Box::pin(async { Ok(Status::unimplemented("").into_http()) });
        }
        let janus = self.janus.clone();
        Box::pin(async move {
            let answer = janus.oneshot(request.map(Body::new)).await;
            Ok(answer.unwrap_or_else(|error| Status::unavailable(error.to_string()).into_http()))
        })
    }
}

/// A site whose clients meet an old janus.
struct Scene {
    site: Site,
    client: Client,
    old: Old,
    _stop: DropGuard,
    _runtime: Runtime,
}

fn identity(settings: &Settings) -> Identity {
    let path = |key: &str| settings.get(key).unwrap().as_str().unwrap().to_owned();
    Identity::load(path("cert"), path("key"), path("ca")).unwrap()
}

impl Scene {
    fn new() -> Self {
        let mut site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
        let path = site.folder().join("disk.raw");
        disk::blank(&path, 8 * MIB).unwrap();
        disk::write_noise(&path, 0..8 * MIB, 5).unwrap();
        let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
        site.await_ready(&client).unwrap();
        let (ours, theirs) = (identity(&client.settings), identity(site.janus_settings().unwrap()));
        let (runtime, url) = (Runtime::new().unwrap(), site.url());
        let (old, address, stop) = runtime.block_on(async move {
            let janus = channel::connect(&url, &ours, ConnectOptions::default()).await.unwrap();
            let (unknown, tried) = (Arc::default(), Arc::default());
            let old = Old { janus: janus.channel, unknown, tried };
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
            let serving =
                listener::serve(listener, theirs, old.clone(), Limits::default(), stop.clone());
            tokio::spawn(serving);
            (old, address, stop)
        });
        client.settings.set("urls", json!([format!("https://{address}")]));
        Self { site, client, old, _stop: stop.drop_guard(), _runtime: runtime }
    }

    fn forget(&self, calls: &[&'static str]) {
        *self.old.unknown.lock().unwrap() = calls.to_vec();
        self.old.tried.lock().unwrap().clear();
    }

    fn tried(&self) -> Vec<&'static str> {
        self.old.tried.lock().unwrap().iter().copied().collect()
    }
}

#[test]
fn what_came_later_is_done_without() {
    let mut scene = Scene::new();
    scene.forget(&NEWER);
    let (client, to) = (&scene.client, scene.site.folder().join("restored.raw"));
    for _ in 0..3 {
        client.backup().unwrap();
    }
    assert_eq!(client.list().unwrap().snapshots.len(), 3);
    client.restore("disk", &to).unwrap();
    disk::compare(&scene.site.folder().join("disk.raw"), &to).unwrap();
    client.status().unwrap();
    let rebuilt: Value = client.answer(&["cache", "rebuild"]).unwrap();
    assert_eq!(rebuilt["complete"], true, "{rebuilt}");
    let finished = client.run(&["test", "--json"]).unwrap();
    let checked: Value = finished.answer().unwrap();
    let rows = checked["urls"][0]["checks"].as_array().unwrap();
    let throughput = rows.iter().find(|row| row["check"] == "throughput").unwrap();
    assert_eq!(throughput["state"], "skipped", "{checked}");
    // What others have of a server that is away.
    scene.site.kill_server("server-a").unwrap();
    let listed = scene.client.list().unwrap();
    assert!(listed.snapshots.len() == 3 && listed.unreachable.len() == 1, "{listed:?}");
    println!("tried in vain: {:?}", scene.tried());
    assert_eq!(scene.tried().len(), NEWER.len());
}

#[test]
fn what_can_not_be_done_without_says_who_is_to_be_updated() {
    let scene = Scene::new();
    let to = scene.site.folder().join("restored.raw");
    let restore = ["restore", "disk", "--to", to.to_str().unwrap()];
    for _ in 0..2 {
        scene.client.backup().unwrap();
    }
    let cases: [(&'static str, &[&str]); 8] = [
        ("/StartBackup", &["backup"]),
        ("/WriteBlocks", &["backup"]),
        ("/CommitBackup", &["backup"]),
        ("/ListSnapshots", &["list"]),
        ("/ListSnapshots", &restore),
        ("/OpenSnapshot", &restore),
        ("/ReadHashes", &restore),
        ("/GetRouterStatus", &["test"]),
    ];
    for (call, command) in cases {
        scene.forget(&[call]);
        let done = scene.client.run(&[command, &["--json"]].concat()).unwrap();
        println!("{call}: {}", done.answer_line());
        assert!(matches!(done.code, Some(1 | 2)) && done.seconds < 20.0, "{call}: {done:?}");
        let said = done.answer_line();
        assert!(said.contains("older than this client: update it"), "{call}: {said}");
        assert_eq!(scene.tried(), [call]);
        assert!(!to.exists(), "{call}");
    }
    scene.forget(&[]);
    scene.client.backup().unwrap();
}
