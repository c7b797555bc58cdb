//! `janus-server alarm list|clear`: what looked like an attack, and an operator's word that it is looked after.

use clap::Subcommand;
use janus_proto::{ids::MachineKey, show::date};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, table::table};
use crate::{guard::Alarm, runs::RunError};

/// What to do with alarms.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Show backups that changed a disk as an attack does, and which ones before them stay
    List,
    /// End the alarms of a machine: what they kept is left to the rules again
    Clear {
        /// Which
        #[arg(value_name = "USER/MACHINE")]
        machine: MachineKey,
    },
}

pub(super) fn run(admin: &Admin, action: &Action) -> Result<Answer, AdminError> {
    match action {
        Action::List => list(admin),
        Action::Clear { machine } => clear(admin, machine),
    }
}

fn list(admin: &Admin) -> Result<Answer, AdminError> {
    let head = ["MACHINE", "RAISED", "RUN", "WHY", "STAYS UNTIL IT IS CLEARED"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let mut all = Vec::new();
    for machine in admin.machines(None)? {
        for (run, alarm) in machine.guarded().alarms {
            let Alarm { raised_ms, disks, keeps } = &alarm;
            let why: Vec<String> =
                disks.iter().map(|(disk, what)| format!("{disk}: {what}")).collect();
            let stays: Vec<String> = keeps.iter().map(ToString::to_string).collect();
            rows.push(vec![
                machine.key.to_string(),
                date(*raised_ms),
                run.to_string(),
                why.join("; "),
                if stays.is_empty() { "none was here".into() } else { stays.join(", ") },
            ]);
            all.push(json!({
                "machine": machine.key,
                "backup_id": run.to_string(),
                "raised_ms": raised_ms,
                "disks": disks,
                "keeps": stays,
            }));
        }
    }
    let text = match all.is_empty() {
        true => "no alarm is open\n".to_owned(),
        false => table(&rows),
    };
    Ok(Answer::new(text, json!({ "alarms": all })))
}

fn clear(admin: &Admin, key: &MachineKey) -> Result<Answer, AdminError> {
    let mut cleared: Vec<Value> = Vec::new();
    for machine in admin.machines(Some(key))? {
        let alarms = admin.runs().clear_alarms(&machine).map_err(failed)?;
        cleared.extend(alarms.into_iter().map(|(run, _)| json!(run.to_string())));
    }
    let text = match cleared.len() {
        0 => format!("{key}: no alarm is open\n"),
        some => format!("{key}: {some} alarms are over, the rules decide what stays\n"),
    };
    Ok(Answer::new(text, json!({ "machine": key, "cleared": cleared })))
}

pub(super) fn failed(error: RunError) -> AdminError {
    AdminError::Retention(error.into())
}
