//! A site in this process: certificates, backends on real sockets behind a line that can be cut or frozen, a janus.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use janus::{config::Settings, serve::Janus};
use janus_proto::{
    channel::{self, ConnectOptions},
    error::ErrorReason,
    pb::backup_service_client::BackupServiceClient,
    tls::Identity,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, transport::Channel};

/// The CA of a test and what it has issued.
pub struct Keys {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Keys {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem())
            .unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    /// Folder with cert.pem and key.pem of `role`, such as `client/alice/web`.
    fn issue(&self, role: &str) -> std::path::PathBuf {
        let folder = self.folder.path().join(role.replace('/', "-"));
        std::fs::create_dir_all(&folder).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::URI(format!("janus://home/{role}").try_into().unwrap()),
            SanType::IpAddress([127, 0, 0, 1].into()),
        ];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(folder.join("cert.pem"), certificate.pem()).unwrap();
        std::fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
        folder
    }

    pub fn ca(&self) -> std::path::PathBuf {
        self.folder.path().join("ca.pem")
    }

    pub fn identity(&self, role: &str) -> Identity {
        let folder = self.issue(role);
        Identity::load(folder.join("cert.pem"), folder.join("key.pem"), self.ca()).unwrap()
    }

    pub fn files(&self, role: &str) -> impl AsRef<Path> + use<> {
        self.issue(role)
    }
}

/// A relay before a backend: what a network does to it.
pub struct Line {
    pub address: SocketAddr,
    frozen: watch::Sender<bool>,
    up: Arc<AtomicBool>,
    cut: watch::Sender<u64>,
    task: JoinHandle<()>,
}

impl Line {
    pub async fn new(backend: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (frozen, cut, up) =
            (watch::Sender::new(false), watch::Sender::new(0), Arc::new(AtomicBool::new(true)));
        let (is_frozen, is_cut, is_up) = (frozen.subscribe(), cut.subscribe(), up.clone());
        let task = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                if !is_up.load(Ordering::Relaxed) {
                    continue;
                }
                let (is_frozen, mut is_cut) = (is_frozen.clone(), is_cut.clone());
                is_cut.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(backend).await else { return };
                    let (near_in, near_out) = near.into_split();
                    let (far_in, far_out) = far.into_split();
                    tokio::select! {
                        () = relay(near_in, far_out, is_frozen.clone()) => {}
                        () = relay(far_in, near_out, is_frozen) => {}
                        _ = is_cut.changed() => {}
                    }
                });
            }
        });
        Self { address, frozen, up, cut, task }
    }

    /// Nothing gets through any more, in either direction, and nobody is told.
    pub fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    pub fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    /// All connections break, and new ones too, until [`Line::mend`].
    pub fn cut(&self) {
        self.up.store(false, Ordering::Relaxed);
        self.cut.send_modify(|n| *n += 1);
    }

    pub fn mend(&self) {
        self.up.store(true, Ordering::Relaxed);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut frozen: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        if frozen.wait_for(|frozen| !frozen).await.is_err()
            || to.write_all(&buffer[..count]).await.is_err()
        {
            return;
        }
    }
}

/// A running janus; dropping it stops it.
pub struct Running {
    pub url: String,
    pub metrics: Option<SocketAddr>,
    pub health: Option<SocketAddr>,
    pub stop: CancellationToken,
    pub task: Option<JoinHandle<()>>,
    _stop_on_drop: DropGuard,
}

/// A janus before `servers`.
pub async fn janus(keys: &Keys, servers: &[SocketAddr]) -> Running {
    janus_with(keys, servers, |_| {}).await
}

pub async fn janus_with(
    keys: &Keys,
    servers: &[SocketAddr],
    change: impl FnOnce(&mut Settings),
) -> Running {
    let files = keys.files("janus/door");
    let mut settings = Settings {
        listen: "127.0.0.1:0".into(),
        server_urls: servers.iter().map(|address| format!("https://{address}")).collect(),
        cert: files.as_ref().join("cert.pem"),
        key: files.as_ref().join("key.pem"),
        ca: keys.ca(),
        drain_seconds: 2,
        ..Settings::default()
    };
    change(&mut settings);
    let janus = Janus::start(settings).await.unwrap();
    let url = format!("https://{}", janus.address().unwrap());
    let (metrics, health) = (janus.metrics_address(), janus.health_address());
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { janus.run(stop).await.unwrap() }
    });
    Running {
        url,
        metrics,
        health,
        task: Some(task),
        _stop_on_drop: stop.clone().drop_guard(),
        stop,
    }
}

pub async fn channel(url: &str, identity: &Identity) -> Channel {
    channel::connect(url, identity, ConnectOptions::default()).await.unwrap().channel
}

pub async fn client(keys: &Keys, url: &str) -> BackupServiceClient<Channel> {
    BackupServiceClient::new(channel(url, &keys.identity("client/alice/web")).await)
}

/// An address where nobody listens.
pub async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// Waits until `condition` holds, at most 10 s.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    for _ in 0..500 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

pub fn reason(status: &Status) -> Option<ErrorReason> {
    janus_proto::error::reason(status)
}
