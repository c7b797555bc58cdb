//! The processes of the simulated sites: the real janus and the real server, each with what outlives its process.

use std::{
    path::Path,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use janus::{config::Settings as JanusSettings, registry::Registry, serve::Janus};
use janus_proto::{
    ids::{MachineKey, ServerId},
    listener::Door,
    proof::Statement,
    tls::{Identity, Principal, Role},
};
use janus_server::{config::Settings as ServerSettings, pki, runs::Runs, serve::Server};
use tempfile::TempDir;
use tokio::task::{JoinHandle, yield_now};
use tokio_util::sync::CancellationToken;

use super::network::{Network, Node};

pub const SERVERS: usize = 3;
pub const JANUS: usize = 2;
pub const MACHINES: usize = 20;

/// Everybody's certificate, made once: they are the same in all seeds.
struct Identities {
    servers: Vec<Identity>,
    janus: Vec<Identity>,
    machines: Vec<Identity>,
    operator: Identity,
}

fn identities() -> &'static Identities {
    static MADE: OnceLock<Identities> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        pki::init(&folder.path().join("ca"), "simulated").unwrap();
        let make = |node: Node| identity_of(folder.path(), node);
        Identities {
            servers: (0..SERVERS).map(|n| make(Node::Server(n))).collect(),
            janus: (0..JANUS).map(|n| make(Node::Janus(n))).collect(),
            machines: (0..MACHINES).map(|n| make(Node::Machine(n))).collect(),
            operator: make(Node::Operator),
        }
    })
}

fn identity_of(folder: &Path, node: Node) -> Identity {
    let (role, hosts) = match node {
        Node::Server(_) => (Role::Server(server_id(node)), vec![node.to_string()]),
        Node::Janus(_) => (Role::Janus(server_id(node)), vec![node.to_string()]),
        Node::Machine(_) => (Role::Client(machine_key(node)), Vec::new()),
        Node::Operator => (Role::Operator("root".into()), Vec::new()),
    };
    let (out, valid) = (folder.join(node.to_string()), Duration::from_secs(30 * 86_400));
    pki::issue(&folder.join("ca"), &pki::Wanted::new(role, hosts, valid), &out).unwrap();
    Identity::load(out.join("cert.pem"), out.join("key.pem"), out.join("ca.pem")).unwrap()
}

fn identity(node: Node) -> &'static Identity {
    let all = identities();
    match node {
        Node::Server(n) => &all.servers[n],
        Node::Janus(n) => &all.janus[n],
        Node::Machine(n) => &all.machines[n],
        Node::Operator => &all.operator,
    }
}

/// Who sits at a node.
pub fn principal(node: Node) -> Principal {
    identity(node).principal().clone()
}

/// What it signs.
pub fn prove(node: Node, statement: &Statement, server: Option<&ServerId>) -> Option<String> {
    identity(node).prove(statement, server)
}

pub fn server_id(node: Node) -> ServerId {
    node.to_string().parse().unwrap()
}

pub fn machine_key(node: Node) -> MachineKey {
    MachineKey::new("user", &node.to_string()).unwrap()
}

fn url(node: Node) -> String {
    format!("https://{node}:7420")
}

/// A running process.
pub struct Process {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

/// A janus and its process, if it has one.
pub struct JanusHost {
    node: Node,
    process: Option<Process>,
    /// What the present process knows.
    pub registry: Registry,
    /// Processes so far.
    pub life: u64,
    /// State of the registry that the rules have seen.
    pub looked_at: Option<u64>,
}

impl JanusHost {
    pub fn new(number: usize) -> Self {
        let (node, registry) = (Node::Janus(number), Registry::new());
        Self { node, process: None, registry, life: 0, looked_at: None }
    }

    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub fn start(&mut self, network: &Network) {
        if self.is_up() {
            return;
        }
        let settings = JanusSettings {
            server_urls: (0..SERVERS).map(|n| url(Node::Server(n))).collect(),
            // First backups are not what this is about, and holding them changes whose turn it is.
            max_initial_runs: 100,
            drain_seconds: 3,
            ..JanusSettings::default()
        };
        let door = Door::Known(network.listen(self.node));
        let dialer = Arc::new(network.dialer(self.node, principal(self.node)));
        let janus = Janus::between(settings, identity(self.node).clone(), door, dialer).unwrap();
        self.registry = janus.fleet().registry().clone();
        self.looked_at = None;
        self.life += 1;
        let stop = CancellationToken::new();
        let running = janus.run(stop.clone());
        self.process = Some(Process { task: tokio::spawn(async { running.await.unwrap() }), stop });
    }

    /// Takes the process, to be ended.
    pub fn take(&mut self) -> Option<Process> {
        self.process.take()
    }
}

/// A server, its store, and its process, if it has one.
pub struct ServerHost {
    node: Node,
    folder: TempDir,
    process: Option<Process>,
    runs: Weak<Runs>,
    pub life: u64,
    /// It mirrors the tables of the others.
    mirrors: bool,
}

impl ServerHost {
    pub fn new(number: usize, mirrors: bool) -> Self {
        // In memory where there is such a place: real files without a disk.
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = tempfile::Builder::new().prefix("janus-simulation-").tempdir_in(place);
        let (node, folder) = (Node::Server(number), folder.unwrap());
        Self { node, folder, process: None, runs: Weak::new(), life: 0, mirrors }
    }

    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// What the present process holds.
    pub fn runs(&self) -> Option<Arc<Runs>> {
        self.runs.upgrade().filter(|_| self.is_up())
    }

    pub fn start(&mut self, network: &Network) {
        if self.is_up() {
            return;
        }
        let settings = ServerSettings {
            image_path: self.folder.path().to_owned(),
            janus_urls: (0..JANUS).map(|n| url(Node::Janus(n))).collect(),
            drain_seconds: 3,
            // It works by the real clock.
            scrub_mib_per_second: 0,
            mirror_tables: self.mirrors,
            ..ServerSettings::default()
        };
        let door = Door::Known(network.listen(self.node));
        let dialer = Arc::new(network.dialer(self.node, principal(self.node)));
        let server = Server::between(settings, identity(self.node).clone(), door, dialer).unwrap();
        self.runs = Arc::downgrade(server.runs());
        self.life += 1;
        let stop = CancellationToken::new();
        let running = server.run(stop.clone());
        self.process = Some(Process { task: tokio::spawn(async { running.await.unwrap() }), stop });
    }

    /// Takes the process, to be ended, and what shows that nothing of it goes on.
    pub fn take(&mut self) -> (Option<Process>, Weak<Runs>) {
        (self.process.take(), self.runs.clone())
    }
}

/// Nothing of the old process may go on: it would write into the store of the new one.
pub async fn wait_until_dead(runs: Weak<Runs>) {
    for _ in 0..1000 {
        if runs.strong_count() == 0 {
            return;
        }
        yield_now().await;
    }
    panic!("something of a server goes on after its end");
}

impl Process {
    /// Kills it.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// Ends it in good order.
    pub async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}
