//! `janus-server policy`: who is in which group, and what that gives. Reads the file and asks the directory itself, so that a policy can be
//! looked at before a server uses it.

use std::{collections::BTreeSet, path::PathBuf};

use janus_proto::grants::Which;
use serde_json::{Value, json};

use super::{Answer, ask::AskError, table::table};
use crate::{
    config::Settings,
    policy::{Member, Members, Right, directory, file::File, follow::members},
};

/// Members that are named in one line.
const MOST_NAMED: usize = 8;

/// What a command line asks.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Arguments {
    /// Only what this user, or machine, may do beyond its own
    #[arg(value_name = "USER|USER/MACHINE")]
    member: Option<String>,
    /// This file instead of the one that the settings name
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
}

pub(super) fn run(settings: &Settings, arguments: &Arguments) -> Result<Answer, AskError> {
    let path = arguments.file.as_ref().unwrap_or(&settings.policy);
    if path.as_os_str().is_empty() {
        return Err(AskError::NoPolicy);
    }
    let only: Option<Member> = arguments.member.as_deref().map(str::parse).transpose()?;
    let file = File::read(path)?;
    let asked = file.directory().map(|(ldap, groups)| ask(ldap, &groups));
    let (users, problem) = match asked.transpose() {
        Ok(users) => (users, None),
        Err(problem) => (None, Some(problem)),
    };
    let groups: Vec<_> = file.groups.keys().zip(members(&file, users.as_ref())).collect();
    let mut rows =
        vec![["GROUP", "MEMBERS", "BACKUP", "RESTORE", "ADMIN"].map(String::from).to_vec()];
    let mut all = Vec::new();
    for (name, group) in &groups {
        if only.as_ref().is_some_and(|only| !group.members.contains(only)) {
            continue;
        }
        let rights =
            [Right::Backup, Right::Restore, Right::Admin].map(|right| machines(group, right));
        let mut row = vec![(*name).clone(), named(&group.members)];
        row.extend(
            rights
                .iter()
                .map(|rights| if rights.is_empty() { "-".into() } else { rights.join(" ") }),
        );
        rows.push(row);
        let [backup, restore, admin] = rights;
        let members: Vec<_> = group.members.iter().map(ToString::to_string).collect();
        all.push(json!({ "group": name, "members": members, "backup": backup, "restore": restore, "admin": admin }));
    }
    let mut text = match (&only, all.is_empty()) {
        (Some(only), true) => format!("{only} is in no group\n"),
        (None, true) => "no groups\n".to_owned(),
        _ => table(&rows),
    };
    if let Some(problem) = &problem {
        text.push_str(&format!("directory: {problem}: its members are not shown\n"));
    }
    let write_only = settings.write_only().unwrap_or_default();
    let digest = file.digest(&write_only);
    if only.is_none() {
        let short = digest.get(..12).unwrap_or("none");
        text.push_str(&format!(
            "policy {short}: the same on each server that gives the same rights\n"
        ));
    }
    let is_bad = problem.is_some();
    let told: Value = json!({ "groups": all, "digest": digest, "problem": problem });
    Ok(Answer { is_bad, ..Answer::new(text, told) })
}

fn ask(
    ldap: &crate::policy::file::Ldap,
    groups: &BTreeSet<String>,
) -> Result<directory::Users, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    runtime.block_on(directory::users(ldap, groups))
}

fn machines(group: &Members, right: Right) -> Vec<String> {
    group.rights.machines(right).iter().map(Which::to_string).collect()
}

fn named(members: &BTreeSet<Member>) -> String {
    let mut names: Vec<_> = members.iter().take(MOST_NAMED).map(ToString::to_string).collect();
    match members.len().saturating_sub(MOST_NAMED) {
        0 if names.is_empty() => "nobody".into(),
        0 => names.join(" "),
        more => {
            names.push(format!("and {more} more"));
            names.join(" ")
        }
    }
}
