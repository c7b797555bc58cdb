//! `janus-server seed`: the newest backups of another server's machines into this store.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use janus_proto::{
    bandwidth::{self, Window, Zone},
    channel::Dialer,
    grants::Which,
    ids::{BLOCK_BYTES, BackupId, DiskId, MachineKey},
    show::{amount, date},
    tls::Identity,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Admin, AdminError, Answer, Task,
    carry::{Progress, what_came},
    table::table,
};
use crate::{
    carry::{CarryError, Imported},
    chain::ranges::BlockRanges,
    config::replicate::{Hours, limits},
    fetching::Fetched,
    runs::now_ms,
    seed::{self, Event, SeedError, Seeder},
    serve,
};

/// How often it is looked whether it is time.
const LOOK: Duration = Duration::from_millis(500);

/// What to seed, and from where.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    /// The server that has them: its name, which is asked for through janus_urls, or its URL
    #[arg(long, value_name = "NAME|URL", required = true)]
    from: Option<String>,
    /// One machine, or one of its disks
    #[arg(value_name = "USER/MACHINE[/DISK]", required_unless_present_any = ["user", "all"],
        conflicts_with_all = ["user", "all"])]
    target: Option<Which>,
    /// The run to fetch, as `janus-client list` shows it; without it the newest of each disk
    #[arg(long, value_name = "ID", requires = "target", conflicts_with_all = ["user", "all"])]
    run: Option<BackupId>,
    /// All machines of a user
    #[arg(long, conflicts_with = "all")]
    user: Option<String>,
    /// All machines
    #[arg(long)]
    all: bool,
    /// Fetch only hashes of disks that have no backup here: their next backup can come at once, as a delta, and
    /// what it builds on is filled in the background
    #[arg(long)]
    hashes_only: bool,
    /// Fetch only in this part of the day, UTC: HH:MM-HH:MM; wait for it meanwhile
    #[arg(long, value_name = "HOURS")]
    hours: Option<Hours>,
    /// Fetch at most so many MiB in a second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    mib_per_second: Option<u32>,
    /// Fetch at most so fast at a time of day, UTC: "08:00-18:00 20 Mbit/s"; may be repeated
    #[arg(long, value_name = "LIMIT", conflicts_with = "mib_per_second")]
    bandwidth: Vec<String>,
    /// Leave it to the server, after what it was left before: it goes on by itself, also after failures and restarts
    #[arg(long)]
    queue: bool,
}

/// What else can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    /// Show the queue, what is being seeded or imported here, what was stopped on its way, and stubs that aren't full
    Status,
    /// Take a seeding out of the queue; what it has brought stays
    Cancel {
        /// As `status` shows it
        number: u32,
    },
}

/// A seeding that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Order {
    /// Name or URL of the other server.
    pub from: String,
    /// Which machines.
    pub which: Which,
    /// The run; none: the newest of each disk.
    #[serde(default)]
    pub run: Option<BackupId>,
    /// Stubs where no chain is.
    pub hashes_only: bool,
    pub hours: Option<Hours>,
    pub mib_per_second: Option<u32>,
    /// Rates by the time of day.
    #[serde(default)]
    pub bandwidth: Vec<String>,
}

impl Order {
    /// What was asked for beside whose and from where.
    pub fn how(&self) -> String {
        let hashes = self.hashes_only.then(|| "hashes only".to_owned());
        let hours = self.hours.map(|hours| hours.to_string());
        let rate = self.mib_per_second.map(|rate| format!("{rate} MiB/s"));
        let run = self.run.map(|run| format!("run {run}"));
        let rates = self.bandwidth.iter().cloned();
        let all: Vec<_> = [run, hashes, hours, rate].into_iter().flatten().chain(rates).collect();
        if all.is_empty() { "whole".to_owned() } else { all.join(", ") }
    }

    fn limits(&self) -> Result<Vec<Window>, CarryError> {
        let limits = limits(self.mib_per_second.unwrap_or(0), &self.bandwidth);
        limits.map_err(|reason| SeedError::Limit(reason).into())
    }

    /// Whether its hours, if it has any, are now.
    pub fn is_time(&self) -> bool {
        self.hours.is_none_or(|hours| hours.left(now_ms()).is_some())
    }

    /// Waits for its hours; false when it is to stop.
    fn wait(&self, task: &Task<'_>) -> bool {
        if !self.is_time() {
            task.tell("waiting for the hours that were named".to_owned());
        }
        while !self.is_time() {
            if task.token().is_cancelled() {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }
}

impl Arguments {
    /// What is asked for; `None`: nothing is to be seeded.
    fn order(&self) -> Option<Order> {
        let from = self.from.clone().filter(|_| self.action.is_none())?;
        let which = match (&self.target, &self.user) {
            (Some(target), _) => target.clone(),
            (None, Some(user)) => Which::User(user.clone()),
            (None, None) => Which::All,
        };
        let Self { run, hashes_only, hours, mib_per_second, .. } = *self;
        let bandwidth = self.bandwidth.clone();
        Some(Order { from, which, run, hashes_only, hours, mib_per_second, bandwidth })
    }
}

pub(super) fn run(
    admin: &Admin,
    arguments: &Arguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    if let Some(Action::Cancel { number }) = arguments.action {
        admin.queue().cancel(admin.runs(), number)?;
        return Ok(Answer::new(
            format!("seeding {number} is out of the queue\n"),
            json!({ "cancelled": number }),
        ));
    }
    let Some(order) = arguments.order() else { return status(admin) };
    order.limits()?;
    if !arguments.queue {
        return seed(admin, &order, true, task);
    }
    seed::check_from(&order.from, &admin.server()?, &admin.settings().janus_urls)?;
    let number = admin.queue().add(admin.runs(), order)?;
    let text = format!(
        "seeding {number} is in the queue of this server: `janus-server seed status` tells how far it is, `seed cancel {number}` takes it out\n"
    );
    Ok(Answer::new(text, json!({ "number": number })))
}

/// Seeds. Outside of its hours it `waits`, or ends as if it was stopped.
pub(super) fn seed(
    admin: &Admin,
    order: &Order,
    waits: bool,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let began = Instant::now();
    let settings = admin.settings();
    let identity = Identity::load_with(&settings.cert, &settings.key, &settings.ca, &settings.pki)?;
    let own = serve::name(&identity)?;
    let dialer: Dialer = Arc::new(identity);
    let dialer = bandwidth::limited(dialer, &order.limits()?, Zone::Utc);
    let connected =
        Seeder::connect(&order.from, (&own, &dialer), &settings.janus_urls, task.token());
    let seeder = connected?.hashes_only(order.hashes_only).only(order.run);
    let machines = seeder.machines(std::slice::from_ref(&order.which))?;
    let server = seeder.server().to_string();
    let (mut text, mut listed, mut failed, mut written_bytes) = (String::new(), vec![], 0, 0);
    for (machine, which) in &machines {
        task.check()?;
        let mut told = Told::new(machine);
        let doing = format!("of {machine} seeded");
        let progress = Progress::new(&doing, task);
        let is_time = || if waits { order.wait(task) } else { order.is_time() };
        let hear = |done, all| is_time() && progress.hear(done, all);
        match seeder.seed(admin.runs(), machine, which, &hear, &mut |event| told.event(&event)) {
            Ok(()) => {}
            Err(CarryError::Stopped) => return Err(AdminError::Cancelled),
            // The others can be seeded all the same.
            Err(error) => told.failed(&error),
        }
        failed += usize::from(told.has_failed);
        written_bytes += told.written_bytes;
        text.push_str(&told.text);
        listed.extend(told.runs);
    }
    let (count, seconds) = (machines.len(), began.elapsed().as_secs_f64());
    text.push_str(&format!(
        "{} of {count} machines done, {} of data written from {server} in {seconds:.1} s\n",
        count - failed,
        amount(written_bytes),
    ));
    let json = json!({
        "from": server,
        "written_bytes": written_bytes,
        "seconds": seconds,
        "failed": failed,
        "runs": listed,
    });
    Ok(Answer { is_bad: failed > 0, ..Answer::new(text, json) })
}

/// Runs that are made of what another server or a folder has, and aren't done.
fn status(admin: &Admin) -> Result<Answer, AdminError> {
    let (mut text, queue) = admin.queue().shown()?;
    let head = ["machine", "disk", "received", "backup of", "state"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut listed = Vec::new();
    for machine in admin.runs().machines() {
        for run in machine.active() {
            let Some(origin) = run.origin() else { continue };
            let is_going_on = run.lease_left().is_some();
            let sessions = run.sessions();
            for open in run.record().disks {
                let size = open.size_bytes;
                // Of one that was begun before this server was started that isn't known until it goes on.
                let session = sessions.iter().find(|session| session.disk.session == open.session);
                let received =
                    session.map(|session| (session.marks().received * BLOCK_BYTES).min(size));
                let told = received.map_or_else(|| "?".to_owned(), amount);
                rows.push(vec![
                    machine.key.to_string(),
                    open.disk.to_string(),
                    format!("{told} of {}", amount(size)),
                    date(origin.taken_ms),
                    if is_going_on { "going on" } else { "stopped" }.to_owned(),
                ]);
                listed.push(json!({
                    "machine": machine.key,
                    "disk_id": open.disk,
                    "received_bytes": received,
                    "size_bytes": size,
                    "taken_ms": origin.taken_ms,
                    "going_on": is_going_on,
                }));
            }
        }
    }
    let (stub_rows, stubs) = stubs(admin);
    let (rule_rows, rules) = rules(admin);
    if !rules.is_empty() {
        text.push_str(&table(&rule_rows));
    }
    if queue.is_empty() && listed.is_empty() && stubs.is_empty() {
        text.push_str("nothing is being seeded or imported here\n");
    }
    if !listed.is_empty() {
        text.push_str(&table(&rows));
    }
    if !stubs.is_empty() {
        text.push_str(&table(&stub_rows));
    }
    Ok(Answer::new(text, json!({ "queue": queue, "open": listed, "stubs": stubs, "rules": rules })))
}

/// Rules of `[replicate]`, and what came of their last turns. Without the server that follows them nobody knows.
fn rules(admin: &Admin) -> (Vec<Vec<String>>, Vec<Value>) {
    let head = ["rule", "last turn", "brought", "failed"];
    let (mut rows, mut listed) = (vec![head.map(str::to_owned).to_vec()], Vec::new());
    for name in admin.settings().replicate.keys() {
        let turn = admin.runs().fetching().of(name);
        let of_turn = |show: fn(&Fetched) -> String| turn.as_ref().map_or_else(|| "-".into(), show);
        rows.push(vec![
            name.clone(),
            of_turn(|turn| date(turn.ended_ms)),
            of_turn(|turn| turn.brought.to_string()),
            of_turn(|turn| turn.failed.clone().unwrap_or_else(|| "-".to_owned())),
        ]);
        listed.push(json!({
            "rule": name,
            "ended_ms": turn.as_ref().map(|turn| turn.ended_ms),
            "brought": turn.as_ref().map(|turn| turn.brought),
            "failed": turn.as_ref().and_then(|turn| turn.failed.as_ref()),
        }));
    }
    (rows, listed)
}

/// Stubs, and what they lack.
fn stubs(admin: &Admin) -> (Vec<Vec<String>>, Vec<Value>) {
    let head = ["machine", "disk", "stub lacks", "backup of", "asked of the next backup"];
    let (mut rows, mut listed) = (vec![head.map(str::to_owned).to_vec()], Vec::new());
    for machine in admin.runs().machines() {
        let health = machine.health();
        for held in machine.stubs() {
            let (run, snapshot) = (&held.run, held.snapshot());
            let size = snapshot.size_bytes;
            let bytes = |blocks: &BlockRanges| (blocks.blocks() * BLOCK_BYTES).min(size);
            let missing = health.missing(snapshot).map_or(0, bytes);
            let asked = health.damage(snapshot).map_or(0, |damage| bytes(&damage.blocks));
            let taken_ms = run.taken_ms();
            rows.push(vec![
                machine.key.to_string(),
                snapshot.disk.to_string(),
                format!("up to {} of {}", amount(missing), amount(size)),
                date(taken_ms),
                if asked == 0 { "-".to_owned() } else { amount(asked) },
            ]);
            listed.push(json!({
                "machine": machine.key,
                "disk_id": snapshot.disk,
                "snapshot_id": snapshot.id,
                "missing_bytes": missing,
                "size_bytes": size,
                "taken_ms": taken_ms,
                "asked_bytes": asked,
            }));
        }
    }
    (rows, listed)
}

/// What is said of a machine.
struct Told<'a> {
    machine: &'a MachineKey,
    text: String,
    runs: Vec<Value>,
    written_bytes: u64,
    has_failed: bool,
}

impl<'a> Told<'a> {
    fn new(machine: &'a MachineKey) -> Self {
        Self { machine, text: String::new(), runs: Vec::new(), written_bytes: 0, has_failed: false }
    }

    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Here(disk, newest_ms) => self.here(disk, *newest_ms),
            Event::PassedOver(disk) => self.passed_over(disk),
            Event::Seeded(imported) => self.seeded(imported),
            Event::Failed(error) => self.failed(error),
        }
    }

    fn seeded(&mut self, imported: &Imported) {
        let run = &imported.run;
        let disks: Vec<_> = run.snapshots.iter().map(|one| one.disk.to_string()).collect();
        let what = what_came(imported, "");
        let (machine, when) = (self.machine, date(run.committed_ms));
        self.text.push_str(&format!("{machine}: {}, backup of {when}, {what}\n", disks.join(", ")));
        self.written_bytes += imported.written_bytes;
        self.runs.push(json!({
            "machine": machine,
            "backup_id": run.backup,
            "committed_ms": run.committed_ms,
            "disks": disks,
            "was_here": imported.was_here,
            "went_on": imported.went_on,
            "written_bytes": imported.written_bytes,
            "promised_bytes": imported.promised_bytes,
        }));
    }

    fn here(&mut self, disk: &DiskId, newest_ms: i64) {
        let (machine, when) = (self.machine, date(newest_ms));
        self.text.push_str(&format!("{machine}: {disk}, a backup as new is here ({when})\n"));
        self.runs.push(json!({ "machine": machine, "disks": [disk], "newest_here_ms": newest_ms }));
    }

    fn passed_over(&mut self, disk: &DiskId) {
        let machine = self.machine;
        self.text.push_str(&format!(
            "{machine}: {disk}, its newest backup there has lost something: an older one is taken\n"
        ));
    }

    fn failed(&mut self, error: &CarryError) {
        let machine = self.machine;
        let again =
            if error.may_go_on() { "; the same command goes on from what is here" } else { "" };
        self.text.push_str(&format!("{machine}: FAILED: {error}{again}\n"));
        self.runs.push(json!({ "machine": machine, "error": error.to_string() }));
        self.has_failed = true;
    }
}
