//! One seed from its first to its last event.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use janus_proto::{
    chance,
    channel::{self, ConnectOptions},
    ids::{ServerId, SnapshotId},
    pb::{ListSnapshotsRequest, catalog_service_client::CatalogServiceClient},
};
use janus_server::runs::PurgeOptions;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    faults,
    machine::{KNOWN, Machine, Pace},
    network::{Network, Node},
    rules::{Counts, Rules, is_well},
    site::{
        JANUS, JanusHost, MACHINES, SERVERS, ServerHost, machine_key, principal, server_id,
        wait_until_dead,
    },
};

/// How often it is looked at what each janus knows.
const LOOK: Duration = Duration::from_millis(250);
/// The same where something has just happened to a report.
const CLOSELY: Duration = Duration::from_millis(10);
/// After the last fault, until everything is known to everybody and every lease has ended.
const SETTLE: Duration = Duration::from_secs(62);
/// How long all must stay well then.
const WELL: Duration = Duration::from_secs(20);
/// Reports of the last runs have arrived after this.
const QUIET: Duration = Duration::from_secs(8);

/// Everything there is.
pub struct World {
    pub network: Network,
    pub rules: Rules,
    servers: Vec<Mutex<ServerHost>>,
    janus: Vec<Mutex<JanusHost>>,
    /// Servers whose process ends or begins just now.
    leaving: Vec<AtomicBool>,
    slow_by: Duration,
    /// Names of the servers.
    ids: Vec<ServerId>,
}

/// How one seed ended.
pub struct Outcome {
    pub broken: Option<String>,
    pub trace: Vec<String>,
    pub counts: Counts,
}

/// Plays one seed. The thread must do nothing else.
pub fn play(seed: u64) -> Outcome {
    chance::seed_this_thread(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let outcome = runtime.block_on(World::play(seed));
    drop(runtime);
    outcome
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn new(seed: u64, rng: &mut SmallRng) -> Arc<Self> {
        let slow_by = match rng.random_bool(0.4) {
            true => Duration::from_millis(rng.random_range(100..500)),
            false => Duration::ZERO,
        };
        let rules = Rules::new(!slow_by.is_zero());
        let watching = rules.clone();
        let tap = move |from, to, bytes: &[u8], silence| watching.saw(from, to, bytes, silence);
        Arc::new(Self {
            network: Network::new(seed, Box::new(tap)),
            rules,
            // It takes its time, and starts and commits are what rules are about.
            servers: (0..SERVERS)
                .map(|n| Mutex::new(ServerHost::new(n, seed.is_multiple_of(3))))
                .collect(),
            janus: (0..JANUS).map(|n| Mutex::new(JanusHost::new(n))).collect(),
            leaving: (0..SERVERS).map(|_| AtomicBool::new(false)).collect(),
            slow_by,
            ids: (0..SERVERS).map(|n| server_id(Node::Server(n))).collect(),
        })
    }

    async fn play(seed: u64) -> Outcome {
        let mut rng = SmallRng::seed_from_u64(seed);
        let world = Self::new(seed, &mut rng);
        (0..SERVERS).for_each(|n| world.start_server(n));
        (0..JANUS).for_each(|n| world.start_janus(n));
        let (pace, paces) = watch::channel(Pace::Rest);
        let machines = TaskTracker::new();
        for number in 0..MACHINES {
            let machine = Machine::new(number, world.clone(), seed);
            machines.spawn(machine.run(paces.clone()));
        }
        drop(paces);
        let chaos = Duration::from_secs(rng.random_range(40..120));
        let story = async {
            world.live_through(&mut rng, &pace, chaos).await;
            drop(pace);
            machines.close();
            machines.wait().await;
        };
        let watching = async {
            while !world.rules.is_broken() {
                world.look();
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            () = watching => {}
            () = story => {}
        }
        world.end().await;
        let (broken, trace, counts) = world.rules.outcome();
        Outcome { broken, trace, counts }
    }

    async fn live_through(
        self: &Arc<Self>,
        rng: &mut SmallRng,
        pace: &watch::Sender<Pace>,
        chaos: Duration,
    ) {
        sleep(Duration::from_secs(2)).await;
        pace.send_replace(Pace::Chaos);
        faults::rage(self, rng, chaos).await;
        pace.send_replace(Pace::Rest);
        self.rules.note("all is well".into());
        sleep(SETTLE).await;
        self.rules.all_is_well();
        pace.send_replace(Pace::Well);
        sleep(WELL).await;
        pace.send_replace(Pace::Rest);
        sleep(QUIET).await;
        self.compare().await;
    }

    pub fn janus_life(&self, number: usize) -> u64 {
        locked(&self.janus[number]).life
    }

    pub fn server_life(&self, number: usize) -> u64 {
        locked(&self.servers[number]).life
    }

    pub fn is_server_leaving(&self, number: usize) -> bool {
        self.leaving[number].load(Ordering::Relaxed)
    }

    /// Extra latency of lines that are slow.
    pub fn slowness(&self) -> Duration {
        self.slow_by
    }

    pub fn start_server(&self, number: usize) {
        locked(&self.servers[number]).start(&self.network);
        self.leaving[number].store(false, Ordering::Relaxed);
    }

    pub fn start_janus(&self, number: usize) {
        locked(&self.janus[number]).start(&self.network);
    }

    /// Ends a server's process: in good order, or not.
    pub async fn end_server(&self, number: usize, how: End) {
        self.leaving[number].store(true, Ordering::Relaxed);
        let (process, runs) = match how {
            End::Stop => {
                let (process, runs) = locked(&self.servers[number]).take();
                if let Some(process) = process {
                    process.stop().await;
                }
                self.network.gone(Node::Server(number), false);
                (None, runs)
            }
            End::Crash { silently } => {
                self.network.gone(Node::Server(number), silently);
                locked(&self.servers[number]).take()
            }
        };
        if let Some(process) = process {
            process.kill().await;
        }
        wait_until_dead(runs).await;
    }

    /// Ends a janus' process.
    pub async fn end_janus(&self, number: usize, how: End) {
        let process = locked(&self.janus[number]).take();
        match (process, how) {
            (Some(process), End::Stop) => {
                process.stop().await;
                self.network.gone(Node::Janus(number), false);
            }
            (Some(process), End::Crash { silently }) => {
                self.network.gone(Node::Janus(number), silently);
                process.kill().await;
            }
            (None, _) => {}
        }
    }

    /// What each janus knows only grows.
    pub fn look(&self) {
        for number in 0..JANUS {
            let mut host = locked(&self.janus[number]);
            let revision = Some(host.registry.revision());
            // Most looks find nothing new.
            if !host.is_up() || host.looked_at == revision {
                continue;
            }
            host.looked_at = revision;
            let (janus, life) = (Node::Janus(number), host.life);
            let known = self.ids.iter().flat_map(|server| host.registry.snapshot_ids(server));
            let known: BTreeSet<_> = known.collect();
            self.rules.knows(janus, life, known);
            for (server, id) in self.ids.iter().enumerate() {
                self.rules.uses(janus, life, server, host.registry.uses(id));
            }
        }
    }

    /// Looks often for a while: something may be wrong for milliseconds only.
    pub async fn look_closely(&self, long: Duration) {
        let until = Instant::now() + long;
        while Instant::now() < until && !self.rules.is_broken() {
            sleep(CLOSELY).await;
            self.look();
        }
    }

    /// Asks `janus` for the snapshots of a machine, as an administrator does: nothing that it has learnt of, and nothing of
    /// a server that it reaches, may be absent.
    pub async fn list(&self, janus: usize, machine: usize) -> Option<BTreeSet<SnapshotId>> {
        let (node, key) = (Node::Janus(janus), machine_key(Node::Machine(machine)));
        let (life, lines) = (self.janus_life(janus), self.lines_of(node));
        let mut expected = BTreeSet::new();
        for number in 0..SERVERS {
            let server = Node::Server(number);
            let known =
                locked(&self.janus[janus]).registry.snapshots(&self.ids[number], Some(&key), None);
            expected.extend(
                known.iter().filter_map(|snapshot| snapshot.snapshot_id.parse::<SnapshotId>().ok()),
            );
            if !self.is_server_leaving(number)
                && is_well(&self.network, node, server, KNOWN)
                && let Some(runs) = locked(&self.servers[number]).runs()
                && let Some(machine) = runs.machine(&key)
            {
                expected.extend(machine.snapshots().iter().map(|held| held.snapshot().id));
            }
        }
        let listed =
            timeout(Duration::from_secs(15), self.ask(janus, key.as_str())).await.ok()??;
        // What has changed meanwhile may excuse everything.
        if life != self.janus_life(janus) || lines != self.lines_of(node) {
            return None;
        }
        let absent = expected.difference(&listed).filter(|id| !self.rules.is_dropped(**id));
        let absent: Vec<_> = absent.map(ToString::to_string).collect();
        if !absent.is_empty() {
            self.rules.fail(format!("{node} does not list {} of {key}", absent.join(", ")));
        }
        self.rules.count(|counts| counts.lists += 1);
        Some(listed)
    }

    /// Lets a server's retention take all but the newest backup of some machines, and sometimes their files.
    pub fn retain(&self, server: usize, machines: Range<usize>, is_purge: bool) {
        let node = Node::Server(server);
        let Some(runs) = locked(&self.servers[server]).runs() else { return };
        for machine in machines {
            let key = machine_key(Node::Machine(machine));
            let Some(held) = runs.machine(&key).map(|machine| machine.snapshots()) else {
                continue;
            };
            let older: Vec<_> = held.iter().skip(1).collect();
            let backups: Vec<_> = older.iter().map(|held| held.run.backup).collect();
            // One that an open run builds on stays, and with it all of them.
            if backups.is_empty() || runs.trash(&key, &backups, "retention", 0).is_err() {
                continue;
            }
            self.rules.note(format!("{node} drops {} snapshots of {key}", backups.len()));
            self.rules.dropped(older.iter().map(|held| held.snapshot().id));
            if is_purge {
                let options = PurgeOptions { now_ms: i64::MAX, reserve_bytes: 0, copy: false };
                runs.purge_due(&key, &options, &CancellationToken::new());
            }
        }
    }

    /// How the lines of a janus to all servers are.
    fn lines_of(&self, janus: Node) -> Vec<Option<Instant>> {
        (0..SERVERS).map(|n| self.network.well_since(janus, Node::Server(n))).collect()
    }

    async fn ask(&self, janus: usize, machine: &str) -> Option<BTreeSet<SnapshotId>> {
        let dialer = Arc::new(self.network.dialer(Node::Operator, principal(Node::Operator)));
        let url = format!("https://{}:7420", Node::Janus(janus));
        let connection =
            channel::connect_through(&url, dialer, ConnectOptions::default()).await.ok()?;
        let mut client = CatalogServiceClient::new(connection.channel);
        let request =
            ListSnapshotsRequest { machine: machine.into(), page_size: 1000, ..Default::default() };
        let answer = client.list_snapshots(request).await.ok()?.into_inner();
        let ids = answer.snapshots.iter().map(|snapshot| snapshot.snapshot_id.parse());
        ids.collect::<Result<_, _>>().ok()
    }

    /// All is well for a while: every janus knows what every server holds, and no more.
    async fn compare(&self) {
        for number in 0..SERVERS {
            let server = server_id(Node::Server(number));
            let Some(runs) = locked(&self.servers[number]).runs() else {
                return self.rules.fail(format!("{server} is not up"));
            };
            let machines = runs.machines();
            let counters: BTreeSet<_> =
                machines.iter().map(|m| (m.key.clone(), m.use_counter())).collect();
            let held: BTreeSet<_> = machines
                .iter()
                .flat_map(|machine| machine.snapshots())
                .map(|held| held.snapshot().id)
                .collect();
            for janus in 0..JANUS {
                let registry = locked(&self.janus[janus]).registry.clone();
                let uses: BTreeSet<_> = registry.uses(&server).into_iter().collect();
                if uses != counters {
                    self.rules.fail(format!(
                        "janus-{janus} has counters {uses:?} of {server}, which has {counters:?}"
                    ));
                }
                if registry.snapshot_ids(&server) != held {
                    self.rules.fail(format!(
                        "janus-{janus} knows other snapshots of {server} than it holds"
                    ));
                }
            }
            for id in self.rules.kept(Node::Server(number)) {
                let opened = runs.snapshot(id).map(|held| runs.open_snapshot(&held).map(drop));
                match opened {
                    Some(Ok(())) => {}
                    Some(Err(error)) => self.rules.fail(format!("{server}: {error}")),
                    None => self.rules.fail(format!("{server} has lost snapshot {id}")),
                }
            }
        }
        for machine in 0..3 {
            let lists = join_all((0..JANUS).map(|janus| self.list(janus, machine))).await;
            if lists.iter().any(|list| list.is_none() || *list != lists[0]) {
                self.rules.fail(format!("the catalogs of machine-{machine} differ"));
            }
        }
    }

    async fn end(&self) {
        for number in 0..JANUS {
            self.end_janus(number, End::Crash { silently: false }).await;
        }
        for number in 0..SERVERS {
            self.end_server(number, End::Crash { silently: false }).await;
        }
    }
}

/// How a process ends.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// As on SIGTERM.
    Stop,
    /// As on SIGKILL; `silently` when the whole host goes.
    Crash { silently: bool },
}
