//! `janus-server pki revoke` and `pki revoked`: certificates that are no longer believed, here and on all other servers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use janus_proto::{
    channel::{Dialer, Expect},
    ids::{MachineKey, ServerId, check_name},
    pb,
    show::date,
    tls::{Identity, Role},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Admin, AdminError, Answer, Task, table::table};
use crate::{peer, serve};

/// How long the command waits for other servers before it names those that don't know yet.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(300);

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Refuse all certificates that somebody has until now, on all servers, and end what is open
    Revoke(Whom),
    /// Show whose certificates are refused
    Revoked,
}

/// Whose certificates. Exactly one is named.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
#[group(required = true, multiple = false)]
pub struct Whom {
    /// A machine: its own certificates and those for restoring it
    #[arg(long, value_name = "USER/MACHINE")]
    pub machine: Option<MachineKey>,
    /// A backup server
    #[arg(long, value_name = "NAME")]
    pub server: Option<ServerId>,
    /// A janus
    #[arg(long, value_name = "NAME")]
    pub janus: Option<ServerId>,
    /// A user: the own certificate, not those of machines
    #[arg(long, value_name = "NAME")]
    #[serde(default)]
    pub user: Option<String>,
    /// An operator
    #[arg(long, value_name = "NAME")]
    pub operator: Option<String>,
}

impl Whom {
    fn roles(&self) -> Result<Vec<Role>, AdminError> {
        if let Some(key) = &self.machine {
            return Ok(vec![Role::Client(key.clone()), Role::Restore(key.clone())]);
        }
        if let Some(name) = &self.user {
            check_name("user", name)?;
            return Ok(vec![Role::User(name.clone())]);
        }
        if let Some(name) = &self.operator {
            check_name("operator", name)?;
            return Ok(vec![Role::Operator(name.clone())]);
        }
        let servers = self.server.clone().map(Role::Server);
        Ok(servers.or(self.janus.clone().map(Role::Janus)).into_iter().collect())
    }
}

pub(super) fn run(admin: &Admin, action: &Action, task: &Task<'_>) -> Result<Answer, AdminError> {
    match action {
        Action::Revoke(whom) => revoke(admin, whom, task),
        Action::Revoked => list(admin),
    }
}

fn revoke(admin: &Admin, whom: &Whom, task: &Task<'_>) -> Result<Answer, AdminError> {
    let identity = admin.identity()?;
    let own = serve::name(&identity)?;
    let roles = whom.roles()?;
    if roles.contains(&identity.principal().role) {
        return Err(AdminError::OwnCertificate);
    }
    let group = identity.principal().group.clone();
    let revoked = admin.revoked()?;
    revoked.revoke(roles.iter().map(|role| role.uri(&group)).collect())?;
    let names = roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    task.tell(format!("{names}: refused by {own}; telling the other servers"));
    // It can't know, and needn't.
    let gone = roles.iter().find_map(|role| match role {
        Role::Server(name) => Some(name),
        _ => None,
    });
    let others = Others::after(admin, (&identity, &own, gone), &revoked.known().digest(), task);
    let mut text = format!("revoked: {names}\n");
    if let Some(machine) = &whom.machine
        && admin.runs().machine(machine).is_none()
    {
        text.push_str(&format!(
            "NOTE: no machine {machine} has backups here: is the name right?\n"
        ));
    }
    if admin.settings().janus_urls.is_empty() {
        text.push_str(
            "NOTE: this server has no janus_urls, so nobody else was told: revoke on each server\n",
        );
    }
    if whom.janus.is_some() && !others.missing.is_empty() {
        text.push_str("NOTE: the news travels by janus; what only this one reached is told here alone: revoke on each server\n");
    }
    let list = |names: &[String]| names.join(", ");
    match others.known.is_empty() {
        true => text.push_str(&format!("known to: {own}\n")),
        false => text.push_str(&format!("known to: {own}, {}\n", list(&others.known))),
    }
    if !others.missing.is_empty() {
        text.push_str(&format!(
            "NOT YET known to: {}; each gets it when it comes back\n",
            list(&others.missing)
        ));
    }
    if let Some(problem) = &others.problem {
        text.push_str(&format!("the other servers can't be asked: {problem}\n"));
    }
    text.push_str("a certificate that is made from now on is believed again\n");
    if !admin.settings().pki.names.is_empty() {
        text.push_str(
            "one of your PKI counts as made when its validity begins: see to it that nobody gets one there who shouldn't\n",
        );
    }
    let known_to = [vec![own.to_string()], others.known].concat();
    let is_bad = !others.missing.is_empty() || others.problem.is_some();
    let told = json!({
        "revoked": roles.iter().map(|role| role.uri(&group)).collect::<Vec<_>>(),
        "known_to": known_to,
        "not_yet_known_to": others.missing,
        "problem": others.problem,
    });
    Ok(Answer { is_bad, ..Answer::new(text, told) })
}

/// Which other servers know what this one does.
#[derive(Default)]
struct Others {
    known: Vec<String>,
    missing: Vec<String>,
    problem: Option<String>,
}

impl Others {
    /// After they have had time to learn it.
    fn after(
        admin: &Admin,
        (identity, own, gone): (&Identity, &ServerId, Option<&ServerId>),
        digest: &str,
        task: &Task<'_>,
    ) -> Self {
        let urls = &admin.settings().janus_urls;
        if urls.is_empty() {
            return Self::default();
        }
        let problem = |problem: String| Self { problem: Some(problem), ..Self::default() };
        if admin.revoked.is_none() {
            return problem("this server doesn't run; they are told when it does".into());
        }
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return problem(error.to_string()),
        };
        let dialer = Arc::new(identity.clone()) as Dialer;
        let began = Instant::now();
        loop {
            let asked = runtime.block_on(statuses(urls, &dialer));
            let others = Self::of(&asked, [Some(own), gone], digest);
            let is_over = began.elapsed() > PATIENCE || task.is_cancelled();
            if is_over || (others.missing.is_empty() && others.problem.is_none()) {
                return others;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// A server that any janus says knows it does.
    fn of(
        asked: &Result<Vec<pb::ServerStatus>, String>,
        without: [Option<&ServerId>; 2],
        digest: &str,
    ) -> Self {
        let servers = match asked {
            Ok(servers) => servers,
            Err(problem) => return Self { problem: Some(problem.clone()), ..Self::default() },
        };
        let mut others = Self::default();
        for server in servers {
            let name = match server.server_id.as_str() {
                "" => server.url.as_str(),
                id if without.iter().flatten().any(|name| name.as_str() == id) => continue,
                id => id,
            };
            let is_known = server.revocations_digest == digest;
            let list = if is_known { &mut others.known } else { &mut others.missing };
            if !list.iter().any(|listed| listed == name) {
                list.push(name.to_owned());
            }
        }
        others.missing.retain(|name| !others.known.contains(name));
        others
    }
}

/// What each janus says of the servers.
async fn statuses(urls: &[String], dialer: &Dialer) -> Result<Vec<pb::ServerStatus>, String> {
    let (mut all, mut problem) = (Vec::new(), None);
    for url in urls {
        let one = [url.clone()];
        let asked = async {
            let peers = peer::connect(&one, Expect::Janus, dialer).await?;
            peers.router_status().await.map_err(|status| peer::told(&status))
        };
        match asked.await {
            Ok(status) => all.extend(status.servers),
            Err(error) => problem = Some(format!("{url}: {error}")),
        }
    }
    match problem {
        Some(problem) if all.is_empty() => Err(problem),
        _ => Ok(all),
    }
}

fn list(admin: &Admin) -> Result<Answer, AdminError> {
    let all = admin.revoked()?.known().all();
    let mut rows = vec![vec!["WHOSE CERTIFICATES".to_owned(), "ISSUED UNTIL".to_owned()]];
    let until = |seconds: i64| date(seconds.saturating_mul(1000));
    rows.extend(all.iter().map(|one| vec![one.principal.clone(), until(one.until)]));
    let text = if all.is_empty() { "nothing is revoked\n".to_owned() } else { table(&rows) };
    let told: Vec<_> =
        all.iter().map(|one| json!({ "principal": one.principal, "until": one.until })).collect();
    Ok(Answer::new(text, json!({ "revoked": told })))
}
