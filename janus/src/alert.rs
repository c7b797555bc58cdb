//! Alerts from the one janus that is `primary`: a machine is overdue or under attack, as it seems, a server takes no backups for long; once when it
//! begins, daily while it lasts, and once when it is over.
//!
//! Each way out (webhook, command) has its own list of alerts that weren't taken yet, and goes on trying: a receiver
//! that is down gets them later, in their order. What is open is kept in memory, so a janus that restarts tells again of
//! what still lasts. Right after its start, while servers haven't reported, it tells nothing.

mod deliver;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use janus_proto::{clock::unix_ms, pb::GetRouterStatusResponse};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use self::deliver::Way;
use crate::{
    findings::{About, Finding, findings},
    info::Info,
    registry::Sight,
};

/// Pause between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// What lasts is told again after this.
const AGAIN: Duration = Duration::from_secs(86_400);
/// Pauses between attempts to deliver.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Alerts that wait for one receiver; beyond that the oldest are given up, and the log says so.
const MOST_WAITING: usize = 1000;

/// When to alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// A machine without a new backup for so long is overdue.
    pub overdue: Duration,
    /// A server that takes no backups is told of after this.
    pub unreachable: Duration,
}

/// What an alert says of its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It begins.
    Begun,
    /// It has lasted another day.
    Lasts,
    /// It is over.
    Over,
}

impl Event {
    /// As receivers read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Lasts => "lasts",
            Self::Over => "over",
        }
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alert {
    /// What happened.
    pub event: Event,
    /// `machine_overdue`, `machine_alarm` or `server_unreachable`.
    pub kind: &'static str,
    /// The machine or server.
    pub subject: String,
    /// For people.
    pub text: String,
    /// Unix milliseconds at which janus found it.
    pub at_ms: i64,
}

#[derive(Debug)]
struct Open {
    text: String,
    since: Instant,
    /// When it was told last; not yet while it may pass by itself.
    told: Option<Instant>,
}

/// Which findings are worth an alert now.
#[derive(Debug)]
pub struct Watch {
    rule: Rule,
    begun: Instant,
    open: BTreeMap<About, Open>,
}

fn kind(about: &About) -> Option<(&'static str, &str)> {
    match about {
        About::Overdue(machine) => Some(("machine_overdue", machine)),
        About::Alarm(machine, _) => Some(("machine_alarm", machine)),
        About::Server(server) => Some(("server_unreachable", server)),
        _ => None,
    }
}

impl Watch {
    /// Begins to watch.
    pub fn new(rule: Rule) -> Self {
        Self { rule, begun: Instant::now(), open: BTreeMap::new() }
    }

    /// What is to be told of this status.
    pub fn look(&mut self, status: &GetRouterStatusResponse, now_ms: i64) -> Vec<Alert> {
        let now = Instant::now();
        // A machine's newest backup may be on a server that hasn't reported yet, or never will.
        let all_report = status.servers.iter().all(|server| server.report_age_ms >= 0);
        let knows = all_report || now - self.begun >= self.rule.unreachable.max(LOOK);
        let found: Vec<Finding> = findings(status, self.rule.overdue, now_ms)
            .into_iter()
            .filter(|finding| match finding.about {
                About::Overdue(_) => knows,
                About::Server(_) | About::Alarm(..) => true,
                _ => false,
            })
            .collect();
        let mut alerts = Vec::new();
        for finding in &found {
            let open = self.open.entry(finding.about.clone()).or_insert_with(|| Open {
                text: String::new(),
                since: now,
                told: None,
            });
            open.text.clone_from(&finding.text);
            let wait = match finding.about {
                About::Server(_) => self.rule.unreachable,
                _ => Duration::ZERO,
            };
            let event = match open.told {
                None if now - open.since >= wait => Event::Begun,
                Some(told) if now - told >= AGAIN => Event::Lasts,
                _ => continue,
            };
            open.told = Some(now);
            alerts.extend(alert(event, &finding.about, finding.text.clone(), now_ms));
        }
        let is_found = |about: &About| found.iter().any(|finding| finding.about == *about);
        self.open.retain(|about, open| {
            let stays = is_found(about);
            if !stays && open.told.is_some() {
                let text = format!("over: {}", open.text);
                alerts.extend(alert(Event::Over, about, text, now_ms));
            }
            stays
        });
        alerts
    }
}

fn alert(event: Event, about: &About, text: String, at_ms: i64) -> Option<Alert> {
    let (kind, subject) = kind(about)?;
    Some(Alert { event, kind, subject: subject.to_owned(), text, at_ms })
}

/// Watches and tells over one way until `stop`.
pub async fn run(info: Info, rule: Rule, way: Way, stop: CancellationToken) {
    let telling = async {
        let mut watch = Watch::new(rule);
        let mut waiting: VecDeque<Alert> = VecDeque::new();
        let (mut pause, mut next_try) = (FIRST_PAUSE, Instant::now());
        loop {
            sleep(LOOK).await;
            for alert in watch.look(&info.status(&Sight::all()), unix_ms()) {
                warn!(subject = alert.subject, event = alert.event.name(), "{}", alert.text);
                waiting.push_back(alert);
            }
            while waiting.len() > MOST_WAITING {
                let lost = waiting.pop_front();
                error!(way = way.name(), ?lost, "an alert was given up: too many wait");
            }
            while let Some(alert) = waiting.front()
                && Instant::now() >= next_try
            {
                match way.deliver(info.id(), alert).await {
                    Ok(()) => {
                        info!(way = way.name(), subject = alert.subject, "alert delivered");
                        waiting.pop_front();
                        pause = FIRST_PAUSE;
                    }
                    Err(error) => {
                        let waiting = waiting.len();
                        warn!(way = way.name(), %error, waiting, retry = ?pause, "alert not delivered");
                        next_try = Instant::now() + pause;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
            }
        }
    };
    stop.run_until_cancelled(telling).await;
}

#[cfg(test)]
mod tests {
    use janus_proto::pb::{MachineStatus, MachineUse, ServerStatus};

    use super::*;

    const HOUR_MS: i64 = 3_600_000;
    const NOW_MS: i64 = 1000 * HOUR_MS;

    fn server(name: &str, report_age_ms: i64, ready: bool) -> ServerStatus {
        let reason = if ready { "" } else { "connection refused" }.to_owned();
        ServerStatus { server_id: name.into(), report_age_ms, ready, reason, ..Default::default() }
    }

    fn status(servers: Vec<ServerStatus>, hours_ago: i64) -> GetRouterStatusResponse {
        let last_backup_ms = NOW_MS - hours_ago * HOUR_MS;
        let at = MachineUse { server_id: "a".into(), last_backup_ms, ..MachineUse::default() };
        let machine = MachineStatus {
            machine: "u/m".into(),
            last_backup_ms,
            uses: vec![at],
            ..Default::default()
        };
        GetRouterStatusResponse { servers, machines: vec![machine], ..Default::default() }
    }

    fn watch() -> Watch {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        Watch::new(Rule { overdue: hours(26), unreachable: hours(1) })
    }

    fn told(watch: &mut Watch, status: &GetRouterStatusResponse) -> Vec<(Event, String)> {
        let alerts = watch.look(status, NOW_MS);
        alerts.into_iter().map(|alert| (alert.event, alert.subject)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn an_overdue_machine_is_told_once_then_daily_and_when_it_is_over() {
        let mut watch = watch();
        let late = status(vec![server("a", 0, true)], 27);
        assert_eq!(told(&mut watch, &late), [(Event::Begun, "u/m".into())]);
        assert_eq!(told(&mut watch, &late), []);
        tokio::time::advance(AGAIN).await;
        assert_eq!(told(&mut watch, &late), [(Event::Lasts, "u/m".into())]);
        assert_eq!(told(&mut watch, &late), []);
        let fine = status(vec![server("a", 0, true)], 1);
        assert_eq!(told(&mut watch, &fine), [(Event::Over, "u/m".into())]);
        assert_eq!(told(&mut watch, &fine), []);
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_of_a_server_is_told_at_once() {
        let mut watch = watch();
        let with = |alarm: &str| {
            let mut status = status(vec![server("a", 0, true), server("b", -1, true)], 1);
            status.machines[0].uses[0].alarm = alarm.into();
            status
        };
        assert_eq!(told(&mut watch, &with("encrypted")), [(Event::Begun, "u/m".into())]);
        assert_eq!(told(&mut watch, &with("encrypted")), []);
        assert_eq!(told(&mut watch, &with("")), [(Event::Over, "u/m".into())]);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_told_of_machines_while_a_server_has_not_reported() {
        let mut watch = watch();
        let unknown = status(vec![server("a", 0, true), server("b", -1, true)], 27);
        assert_eq!(told(&mut watch, &unknown), []);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(told(&mut watch, &unknown), [(Event::Begun, "u/m".into())]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_is_told_of_when_it_is_away_for_long() {
        let mut watch = watch();
        let (away, back) =
            (status(vec![server("a", -1, false)], 1), status(vec![server("a", 0, true)], 1));
        assert_eq!(told(&mut watch, &away), []);
        // A short absence is nobody's business.
        assert_eq!(told(&mut watch, &back), []);
        assert_eq!(told(&mut watch, &away), []);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(told(&mut watch, &away), [(Event::Begun, "a".into())]);
        assert_eq!(told(&mut watch, &back), [(Event::Over, "a".into())]);
    }
}
