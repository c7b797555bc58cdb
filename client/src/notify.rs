//! Who is told how a backup ended: a webhook and a program, once each. What they do never changes what came of the backup.
//!
//! Failures that follow each other are told of at the first one, then daily; so a machine that tries again and again
//! doesn't ring each time. What nobody has taken is told of at the next failure.

use std::{io, path::PathBuf, time::Duration};

use janus_proto::{
    child::{TellError, tell},
    webhook::{DeliverError, Webhook},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::timeout;

use crate::state::Failing;

/// Failures that last are told of again after this.
const AGAIN_MS: i64 = 86_400_000;

/// What can be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// A backup failed.
    Failure,
    /// One was made after others failed.
    Recovery,
    /// One was made.
    Success,
}

impl Event {
    /// As receivers read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Failure => "failure",
            Self::Recovery => "recovery",
            Self::Success => "success",
        }
    }
}

/// The section `[notify]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NotifySettings {
    /// What is told of.
    pub when: Vec<Event>,
    /// URL that gets JSON; empty: none.
    pub webhook: String,
    /// Authority of its certificate (PEM); empty: those of the system.
    pub ca: PathBuf,
    /// Program with its arguments that gets JSON on stdin.
    pub command: Vec<String>,
    /// Longest time that each of both may take.
    pub seconds: u64,
}

impl Default for NotifySettings {
    fn default() -> Self {
        Self {
            when: vec![Event::Failure, Event::Recovery],
            webhook: String::new(),
            ca: PathBuf::new(),
            command: Vec::new(),
            seconds: 30,
        }
    }
}

/// Why nobody was told.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The webhook didn't take it.
    #[error("notify.webhook: {0}")]
    Webhook(#[from] DeliverError),
    /// The program can't be started, or not be waited for.
    #[error("notify.command: {program}: {source}")]
    Start {
        /// Its first word.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// It failed.
    #[error("notify.command: {program} ended with {status}: {said}")]
    Failed {
        /// Its first word.
        program: String,
        /// Its exit code or signal.
        status: std::process::ExitStatus,
        /// What it said.
        said: String,
    },
    /// It took too long.
    #[error("notify.{what}: no end after {seconds} s (notify.seconds)")]
    TooLong {
        /// `webhook` or `command`.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
}

impl NotifySettings {
    /// True when somebody wants to know of `event`.
    pub fn wants(&self, event: Event) -> bool {
        let is_set = !self.webhook.is_empty() || !self.command.is_empty();
        is_set && self.when.contains(&event)
    }

    /// Tells all. True when somebody has taken it, so that one that is deaf doesn't make the others ring each time; who
    /// hasn't is in the log.
    pub async fn tell(&self, message: &Value) -> bool {
        let (posted, run) = tokio::join!(self.post(message), self.run(message));
        let mut told = false;
        for (is_set, result) in
            [(!self.webhook.is_empty(), posted), (!self.command.is_empty(), run)]
        {
            match result {
                Ok(()) => told |= is_set,
                Err(error) => tracing::error!(%error, "not told how the backup ended"),
            }
        }
        told
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    async fn post(&self, message: &Value) -> Result<(), NotifyError> {
        if self.webhook.is_empty() {
            return Ok(());
        }
        let ca = Some(self.ca.as_path()).filter(|ca| !ca.as_os_str().is_empty());
        let webhook = Webhook::new(&self.webhook, ca)?;
        let posted = timeout(self.limit(), webhook.post("janus-client", message)).await;
        let late = |_| NotifyError::TooLong { what: "webhook", seconds: self.seconds };
        Ok(posted.map_err(late)??)
    }

    async fn run(&self, message: &Value) -> Result<(), NotifyError> {
        let Some((program, arguments)) = self.command.split_first() else { return Ok(()) };
        let told = tell(program, arguments, &format!("{message}\n"), self.limit()).await;
        told.map_err(|error| match error {
            TellError::Start(source) => NotifyError::Start { program: program.clone(), source },
            TellError::TooLong(_) => {
                NotifyError::TooLong { what: "command", seconds: self.seconds }
            }
            TellError::Failed { status, said } => {
                NotifyError::Failed { program: program.clone(), status, said }
            }
        })
    }
}

/// The failures so far, with one more.
pub fn one_more(before: Option<&Failing>, error: &str, now_ms: i64) -> Failing {
    match before {
        None => Failing { since_ms: now_ms, count: 1, error: error.to_owned(), told_ms: None },
        Some(before) => {
            let count = before.count.saturating_add(1);
            Failing { count, error: error.to_owned(), ..before.clone() }
        }
    }
}

/// True when these failures are to be told of now. A clock that was set back doesn't keep them from it.
pub fn is_news(failing: &Failing, now_ms: i64) -> bool {
    failing.told_ms.is_none_or(|told| now_ms.saturating_sub(told).saturating_abs() >= AGAIN_MS)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use serde_json::json;

    use super::*;

    fn shell(script: &str) -> NotifySettings {
        let command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        NotifySettings { command, seconds: 1, ..NotifySettings::default() }
    }

    #[test]
    fn failures_are_told_of_first_and_then_daily() {
        let first = one_more(None, "full", 1000);
        assert!(is_news(&first, 1000));
        let told = Failing { told_ms: Some(1000), ..first };
        let second = one_more(Some(&told), "away", 2000);
        assert_eq!((second.since_ms, second.count, second.error.as_str()), (1000, 2, "away"));
        assert!(!is_news(&second, 2000));
        assert!(is_news(&second, 1000 + AGAIN_MS) && is_news(&second, 1000 - AGAIN_MS));
    }

    #[test]
    fn nobody_is_told_where_nobody_is_named() {
        assert!(!NotifySettings::default().wants(Event::Failure));
        assert!(shell("true").wants(Event::Failure) && !shell("true").wants(Event::Success));
    }

    #[tokio::test]
    async fn a_program_gets_the_message_and_its_failure_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("got");
        let script = format!("cat > {}", file.display());
        assert!(shell(&script).tell(&json!({ "text": "x" })).await);
        assert_eq!(fs::read_to_string(file).unwrap(), "{\"text\":\"x\"}\n");
        let failed = shell("echo no mailbox >&2; exit 3").run(&json!({})).await.unwrap_err();
        assert!(failed.to_string().contains("exit status: 3: no mailbox"), "{failed}");
        let unread = shell("exit 0").run(&json!({ "text": "x".repeat(1 << 20) })).await;
        unread.unwrap();
        let missing = NotifySettings { command: vec!["/nonexistent".into()], ..shell("") };
        assert!(!missing.tell(&json!({})).await);
    }

    #[tokio::test]
    async fn a_program_that_hangs_dies_with_its_children_at_its_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let alive = folder.path().join("alive");
        let script = format!("(sleep 2; touch {}) & sleep 60", alive.display());
        let began = Instant::now();
        let late = shell(&script).run(&json!({})).await.unwrap_err();
        assert!(late.to_string().contains("notify.seconds"), "{late}");
        assert!(began.elapsed() < Duration::from_secs(2));
        tokio::time::sleep(Duration::from_millis(1300)).await;
        assert!(!alive.exists());
    }

    #[tokio::test]
    async fn a_webhook_that_is_away_or_silent_is_named() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let webhook = format!("http://{}/hook", silent.local_addr().unwrap());
        let settings = NotifySettings { webhook, seconds: 1, ..NotifySettings::default() };
        let late = settings.post(&json!({})).await.unwrap_err();
        assert!(late.to_string().contains("no end after 1 s"), "{late}");
        drop(silent);
        let away = settings.post(&json!({})).await.unwrap_err();
        assert!(away.to_string().contains("refused"), "{away}");
    }
}
