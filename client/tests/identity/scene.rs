//! A site whose first server enrols machines, and calls in anybody's name.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Output,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use janus_proto::{
    channel::{self, ConnectOptions},
    error::{ErrorReason, reason},
    ids::ServerId,
    metadata,
    pb::{
        self, backup_service_client::BackupServiceClient,
        enrollment_service_client::EnrollmentServiceClient,
        restore_service_client::RestoreServiceClient, table_service_client::TableServiceClient,
    },
    proof::Statement,
    tls::Identity,
};
use serde_json::Value;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, transport::Channel};
use xtask::{
    disk,
    site::{Client, Plan, Programs, Settings, Site, USER, free_ports, key_settings},
};

pub const A: &str = "server-a";
pub const B: &str = "server-b";
pub const MIB: u64 = 1 << 20;

/// A start of a run of one small disk.
pub fn start_of(id: &str) -> pb::StartBackupRequest {
    let disk =
        pb::DiskStart { disk_id: "disk".into(), size_bytes: 4096, logical_sector_bytes: 512 };
    pb::StartBackupRequest { backup_id: id.into(), disks: vec![disk], ..Default::default() }
}

pub struct Scene {
    pub site: Site,
    pub enroll_url: String,
}

impl Scene {
    pub fn new() -> Self {
        Self::with_policy(None)
    }

    /// All servers with this policy.
    pub fn with_policy(policy: Option<&str>) -> Self {
        let programs = Programs::for_tests().unwrap();
        let mut site = Site::prepare(programs, &Plan::default()).unwrap();
        if let Some(policy) = policy {
            for name in site.server_names() {
                let path = site.folder().join(format!("{name}-policy.toml"));
                write_private(&path, policy);
                site.server(&name).unwrap().settings.set("policy", path.to_string_lossy());
            }
        }
        let port = free_ports(1).unwrap()[0];
        let ca = site.folder().join("pki");
        let server = site.server(A).unwrap();
        server.settings.set("enroll.listen", format!("127.0.0.1:{port}"));
        server.settings.set("enroll.ca", ca.to_string_lossy());
        site.start_all().unwrap();
        Self { site, enroll_url: format!("https://127.0.0.1:{port}") }
    }

    /// A machine whose certificate is still to come, with a disk of noise.
    pub fn machine(&self, name: &str) -> Client {
        let folder = self.site.client_folder(name);
        let mut settings: Settings = key_settings(&folder.join("keys"));
        let disk = folder.join("disk.raw");
        fs::create_dir_all(&folder).unwrap();
        disk::blank(&disk, 8 * MIB).unwrap();
        disk::write_noise(&disk, 0..8 * MIB, 1).unwrap();
        settings.set("urls", [self.site.url()].to_vec());
        settings.set("cache_path", folder.join("cache").to_string_lossy());
        settings.set("disks", [format!("disk={}", disk.display())].to_vec());
        self.site.client_with(name, settings).unwrap()
    }

    /// Replaces a server's policy, while it runs.
    pub fn set_policy(&self, server: &str, policy: &str) {
        write_private(&self.site.folder().join(format!("{server}-policy.toml")), policy);
    }

    /// Somebody with a certificate of their own, through janus.
    pub fn person(&self, name: &str) -> Client {
        let mut settings = self.site.issue("user", name, &[]).unwrap();
        settings.set("urls", [self.site.url()].to_vec());
        settings.set("cache_path", self.site.client_folder(name).join("cache").to_string_lossy());
        self.site.client_with(name, settings).unwrap()
    }

    pub fn disk(&self, machine: &str) -> PathBuf {
        self.site.client_folder(machine).join("disk.raw")
    }

    pub fn keys(&self, name: &str) -> PathBuf {
        let enrolled = self.site.client_folder(name).join("keys");
        if enrolled.exists() { enrolled } else { self.site.folder().join("pki").join(name) }
    }

    /// `janus-server ARGUMENTS --json` at a server.
    pub fn admin(&self, server: &str, arguments: &[&str]) -> Value {
        let Output { stdout, stderr, .. } =
            self.site.admin(server, &[arguments, &["--json"]].concat()).unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        println!("janus-server {}: {stdout}{stderr}", arguments.join(" "));
        serde_json::from_str(stdout.lines().last().unwrap_or_default()).unwrap()
    }

    pub fn token(&self, machine: &str) -> String {
        let made = self.admin(A, &["enroll", "token", "--machine", machine, "--user", USER]);
        made["token"].as_str().unwrap().to_owned()
    }

    /// A machine that has enrolled.
    pub fn enrolled(&self, name: &str) -> Client {
        let machine = self.machine(name);
        let (url, token) = (&self.enroll_url, self.token(name));
        let done = machine.run(&["enroll", url, &token]).unwrap();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        machine
    }

    /// A backup on every server, and what it restores is what was backed up.
    pub fn works(&self, machine: &Client, name: &str) {
        self.site.await_ready(machine).unwrap();
        machine.backup().unwrap();
        let to = self.site.folder().join("restored");
        let _ = fs::remove_file(&to);
        machine.restore("disk", &to).unwrap();
        disk::compare(&self.disk(name), &to).unwrap();
    }

    /// Asks for a new certificate for the key of `identity`; PEM.
    pub fn renew(&self, identity: &Identity) -> Result<String, Status> {
        let key = self.site.folder().join("pki");
        let find = |name: &str| fs::read_to_string(key.join(name).join("key.pem"));
        let own = |text: &String| {
            let pair = rcgen::KeyPair::from_pem(text).unwrap();
            identity.principal().has_key(rcgen::PublicKeyData::der_bytes(&pair))
        };
        let texts = ["stolen", "by-hand"].map(find).into_iter().flatten();
        let enrolled = fs::read_to_string(self.keys("web1").join("key.pem"));
        let text = texts.chain(enrolled).find(own).unwrap();
        let pair = rcgen::KeyPair::from_pem(&text).unwrap();
        let request = rcgen::CertificateParams::default().serialize_request(&pair).unwrap();
        let message = pb::RenewRequest { signing_request: request.der().to_vec().into() };
        let runtime = Runtime::new().unwrap();
        runtime.block_on(async {
            let options = ConnectOptions::default();
            let channel = channel::connect(&self.enroll_url, identity, options).await.unwrap();
            let mut client = EnrollmentServiceClient::new(channel.channel);
            let answer = client.renew(message).await?;
            Ok(answer.into_inner().certified.unwrap().certificate)
        })
    }

    pub fn identity(&self, name: &str) -> Identity {
        load(&self.keys(name))
    }

    /// A connection with the keys of `name`.
    pub fn caller(&self, url: &str, name: &str) -> Caller {
        Caller::new(url, &self.identity(name))
    }
}

/// A file that others may not write, replaced as a whole.
pub fn write_private(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&new, path).unwrap();
}

pub fn load(keys: &Path) -> Identity {
    let path = |name: &str| keys.join(name);
    Identity::load(path("cert.pem"), path("key.pem"), path("ca.pem")).unwrap()
}

pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    begun.elapsed()
}

pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>, expected: ErrorReason) {
    let status = result.unwrap_err();
    println!("{:?}: {}", status.code(), status.message());
    assert_eq!(reason(&status), Some(expected), "{status:?}");
}

/// Calls as any program can make them.
pub struct Caller {
    runtime: Runtime,
    channel: Channel,
}

/// What a call carries besides its message.
#[derive(Clone, Default)]
pub struct Carried<'a> {
    /// In whose name: the certificate that a janus forwards.
    pub principal: Option<&'a Identity>,
    pub proof: Option<String>,
    /// For another machine than the caller's own.
    pub machine: Option<&'a str>,
}

impl Caller {
    pub fn new(url: &str, identity: &Identity) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let connecting = channel::connect(url, identity, ConnectOptions::default());
        let channel = runtime.block_on(connecting).unwrap().channel;
        Self { runtime, channel }
    }

    pub fn start(
        &self,
        message: &pb::StartBackupRequest,
        with: &Carried<'_>,
    ) -> Result<pb::StartBackupResponse, Status> {
        let request = with.request(message.clone());
        let mut client = BackupServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.start_backup(request)).map(tonic::Response::into_inner)
    }

    pub fn commit(
        &self,
        message: &pb::CommitBackupRequest,
        with: &Carried<'_>,
    ) -> Result<(), Status> {
        let request = with.request(message.clone());
        let mut client = BackupServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.commit_backup(request)).map(drop)
    }

    pub fn table(&self, message: &pb::ReadTableRequest, with: &Carried<'_>) -> Result<(), Status> {
        let request = with.request(message.clone());
        let mut client = TableServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.read_table(request)).map(drop)
    }

    pub fn open(
        &self,
        message: &pb::OpenSnapshotRequest,
        with: &Carried<'_>,
    ) -> Result<String, Status> {
        let request = with.request(message.clone());
        let mut client = RestoreServiceClient::new(self.channel.clone());
        let opened = self.runtime.block_on(client.open_snapshot(request))?;
        Ok(opened.into_inner().handle)
    }
}

/// An upload that goes on, without blocks.
pub struct Upload<'a> {
    runtime: &'a Runtime,
    _blocks: mpsc::Sender<pb::WriteBlocksRequest>,
    answers: Streaming<pb::WriteBlocksResponse>,
}

impl Caller {
    pub fn write(&self, with: &Carried<'_>) -> Upload<'_> {
        let (blocks, stream) = mpsc::channel(1);
        let mut request = with.request(ReceiverStream::new(stream));
        // Not to end by itself.
        request.set_timeout(Duration::from_secs(600));
        let mut client = BackupServiceClient::new(self.channel.clone());
        let answers = self.runtime.block_on(client.write_blocks(request)).unwrap().into_inner();
        Upload { runtime: &self.runtime, _blocks: blocks, answers }
    }
}

impl Upload<'_> {
    /// Why the server has ended it.
    pub fn ended(mut self, within: Duration) -> Status {
        let answer = async { tokio::time::timeout(within, self.answers.message()).await };
        self.runtime.block_on(answer).expect("not ended in time").unwrap_err()
    }
}

impl Carried<'_> {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(20));
        let headers = request.metadata_mut();
        if let Some(identity) = self.principal {
            let value = STANDARD.encode(&identity.principal().der);
            headers.insert(metadata::PRINCIPAL, value.parse().unwrap());
            let between = metadata::certificates_to_text(&identity.principal().intermediates);
            if !between.is_empty() {
                headers.insert(metadata::INTERMEDIATES, between.parse().unwrap());
            }
        }
        if let Some(machine) = self.machine {
            headers.insert(metadata::MACHINE, machine.parse().unwrap());
        }
        if let Some(proof) = &self.proof {
            headers.insert(metadata::PROOF, proof.parse().unwrap());
        }
        request
    }
}

/// What `identity` signs for a call to a server.
pub fn proof(identity: &Identity, statement: &Statement, server: &str) -> Option<String> {
    identity.prove(statement, Some(&server.parse::<ServerId>().unwrap()))
}
