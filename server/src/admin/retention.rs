//! `janus-server retention plan|run`: what would go and why, and having it go.

use clap::{Args, Subcommand};
use janus_proto::{
    ids::{BackupId, MachineKey},
    show::{amount, date},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, Task, table::table};
use crate::{
    chain::retain::{Plan, Planned, Verdict},
    retention::Carried,
    runs::{Hold, PurgeReport},
};

/// What of it.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Show what would go, what stays, and why
    Plan {
        /// Only this machine
        #[arg(value_name = "USER/MACHINE")]
        machine: Option<MachineKey>,
    },
    /// Drop what no rule keeps, and purge what is due in the trash
    Run(RunArguments),
}

impl Action {
    /// True when nothing is dropped by it.
    pub(super) fn only_shows(&self) -> bool {
        match self {
            Self::Plan { .. } => true,
            Self::Run(arguments) => arguments.dry_run,
        }
    }
}

/// Arguments of `retention run`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct RunArguments {
    /// Only this machine
    #[arg(value_name = "USER/MACHINE")]
    machine: Option<MachineKey>,
    /// Do it
    #[arg(long, required_unless_present = "dry_run")]
    now: bool,
    /// Only show what would go
    #[arg(long)]
    dry_run: bool,
    /// Also where the clock is doubtful, or more would go than max_drop_percent allows
    #[arg(long)]
    force: bool,
}

pub(super) fn run(admin: &Admin, action: &Action, task: &Task<'_>) -> Result<Answer, AdminError> {
    match action {
        Action::Plan { machine } => plan(admin, machine.as_ref(), task),
        Action::Run(arguments) if arguments.dry_run => {
            plan(admin, arguments.machine.as_ref(), task)
        }
        Action::Run(arguments) => carry_out(admin, arguments, task),
    }
}

fn plan(admin: &Admin, only: Option<&MachineKey>, task: &Task<'_>) -> Result<Answer, AdminError> {
    let mut rows = vec![["MACHINE", "COMMITTED", "RUN", "", "WHY"].map(String::from).to_vec()];
    let (mut machines, mut notes) = (Vec::new(), String::new());
    let (mut drops, mut runs, mut is_bad) = (0, 0, false);
    for machine in admin.machines(only)? {
        task.check()?;
        let name = machine.key.to_string();
        let plan = match admin.retention().plan(&machine) {
            Ok(plan) => plan,
            Err(error) => {
                notes.push_str(&format!("{name}: {error}\n"));
                machines.push(json!({ "machine": name, "error": error.to_string() }));
                is_bad = true;
                continue;
            }
        };
        rows.extend(plan.runs.iter().map(|planned| row(&name, planned)));
        for point in plan.drops() {
            if let Some(wait) = admin.retention().lacks_room(&machine, point.backup) {
                notes
                    .push_str(&format!("{name}: run {} would be kept now, {wait}\n", point.backup));
            }
        }
        let holds = admin.runs().holds(&machine.key)?;
        for hold in &holds {
            let (server, snapshot, until) = (&hold.server, hold.snapshot, date(hold.until_ms()));
            notes.push_str(&format!(
                "{name}: {server} fills a stub from snapshot {snapshot}, which stays until that is full, or until {until} if nothing is heard of {server}\n"
            ));
        }
        drops += plan.drops().count();
        runs += plan.runs.len();
        if let Some(stop) = &plan.stop {
            notes.push_str(&format!("{name}: nothing goes without --force: {stop}\n"));
        }
        machines.push(plan_json(&name, &plan, &holds));
    }
    let text = format!("{}{notes}{drops} of {runs} runs would go\n", table(&rows));
    let answer = json!({ "machines": machines, "drops": drops, "runs": runs });
    Ok(Answer { is_bad, ..Answer::new(text, answer) })
}

fn row(machine: &str, planned: &Planned) -> Vec<String> {
    let (verdict, why) = match &planned.verdict {
        Verdict::Keep(reasons) => ("keep", kept_for(planned, reasons)),
        Verdict::Drop(reason) => ("DROP", reason.to_string()),
    };
    let point = &planned.point;
    let committed = date(point.committed_ms);
    vec![machine.into(), committed, point.backup.to_string(), verdict.into(), why]
}

/// The rules, each with its disks unless all of the run want it.
fn kept_for(
    planned: &Planned,
    reasons: &[(crate::chain::retain::Reason, Vec<janus_proto::ids::DiskId>)],
) -> String {
    let shown = reasons.iter().map(|(reason, disks)| {
        if disks.len() == planned.point.disks.len() {
            return reason.to_string();
        }
        let disks: Vec<&str> = disks.iter().map(|disk| disk.as_str()).collect();
        format!("{reason} ({})", disks.join(" "))
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn plan_json(machine: &str, plan: &Plan, holds: &[Hold]) -> Value {
    let hold = |hold: &Hold| json!({ "server": hold.server, "snapshot_id": hold.snapshot, "until_ms": hold.until_ms() });
    let holds: Vec<Value> = holds.iter().map(hold).collect();
    let runs = plan.runs.iter().map(|planned| {
        let (keep, why) = match &planned.verdict {
            Verdict::Keep(reasons) => {
                let why =
                    reasons.iter().map(|(reason, disks)| json!({ "rule": reason, "disks": disks }));
                (true, Value::Array(why.collect()))
            }
            Verdict::Drop(reason) => (false, json!(reason)),
        };
        let (backup, committed_ms) = (planned.point.backup.to_string(), planned.point.committed_ms);
        json!({ "backup_id": backup, "committed_ms": committed_ms, "keep": keep, "why": why })
    });
    let runs: Vec<Value> = runs.collect();
    let stop = plan.stop.as_ref().map(ToString::to_string);
    json!({ "machine": machine, "stop": stop, "runs": runs, "holds": holds })
}

/// What became of one machine.
struct Done {
    machine: MachineKey,
    /// What was dropped, or why that can't be told: one machine's damaged file keeps no other's backups.
    carried: Result<Carried, String>,
    purge: PurgeReport,
}

fn carry_out(
    admin: &Admin,
    arguments: &RunArguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let before = free(admin)?;
    let mut all = Vec::new();
    for machine in admin.machines(arguments.machine.as_ref())? {
        task.check()?;
        let told = |runs| task.tell(format!("{}: {runs} runs dropped, purging", machine.key));
        let (carried, purge) =
            admin.retention().thin(&machine, arguments.force, task.token(), &told);
        let carried = carried.map_err(|error| error.to_string());
        all.push(Done { machine: machine.key.clone(), carried, purge });
    }
    let after = free(admin)?;
    let mut text = String::new();
    for done in &all {
        text.push_str(&done.text());
    }
    text.push_str(&format!("free: {} before, {} now\n", amount(before), amount(after)));
    let machines: Vec<Value> = all.iter().map(Done::json).collect();
    let answer = json!({ "machines": machines, "free_bytes_before": before, "free_bytes": after });
    let is_bad = all.iter().any(|done| done.is_stopped(arguments.force));
    Ok(Answer { is_bad, ..Answer::new(text, answer) })
}

impl Done {
    fn is_stopped(&self, force: bool) -> bool {
        self.carried.as_ref().map_or(true, |carried| carried.plan.stop.is_some() && !force)
    }

    fn text(&self) -> String {
        let machine = &self.machine;
        let mut text = String::new();
        let purged = self.purge.purged.len();
        match &self.carried {
            Err(error) => {
                text.push_str(&format!("{machine}: nothing dropped, {purged} purged: {error}\n"));
            }
            Ok(Carried { plan, dropped, .. }) => match &plan.stop {
                Some(stop) if dropped.is_empty() => {
                    text.push_str(&format!("{machine}: nothing goes without --force: {stop}\n"));
                }
                _ => text.push_str(&format!(
                    "{machine}: {} runs dropped, {purged} purged\n",
                    dropped.len()
                )),
            },
        }
        for (run, why) in self.carried.iter().flat_map(|carried| &carried.waiting) {
            text.push_str(&format!("  run {run} waits: {why}\n"));
        }
        for (snapshot, why) in &self.purge.waiting {
            text.push_str(&format!("  snapshot {snapshot} waits for its purge: {why}\n"));
        }
        text
    }

    fn json(&self) -> Value {
        let ids = |runs: &[BackupId]| runs.iter().map(ToString::to_string).collect::<Vec<_>>();
        let waiting = self.purge.waiting.iter().map(|(id, why)| (id.to_string(), why.to_string()));
        let carried = self.carried.as_ref().ok();
        let blocked = carried.iter().flat_map(|carried| &carried.waiting);
        let blocked = blocked.map(|(id, why)| (id.to_string(), why.clone()));
        json!({
            "machine": self.machine,
            "error": self.carried.as_ref().err(),
            "stop": carried.and_then(|carried| carried.plan.stop.as_ref()).map(ToString::to_string),
            "dropped": carried.map(|carried| ids(&carried.dropped)).unwrap_or_default(),
            "purged": ids(&self.purge.purged),
            "waiting": blocked.chain(waiting).map(|(id, why)| json!({ "id": id, "why": why })).collect::<Vec<_>>(),
        })
    }
}

fn free(admin: &Admin) -> Result<u64, AdminError> {
    let space = admin.runs().store().space();
    let space =
        space.map_err(|source| AdminError::Io { action: "ask for the free space", source })?;
    Ok(space.0)
}
