//! The ways out of an alert: a webhook (POST of JSON), or a command that gets a mail on stdin. One attempt each, with a
//! deadline.

use std::{path::Path, time::Duration};

use janus_proto::{
    child::{TellError, tell},
    ids::ServerId,
    show::date,
    webhook::{DeliverError, Webhook},
};
use tokio::time::timeout;

use super::Alert;

/// Deadline of one attempt.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest subject of a mail.
const MOST_SUBJECT: usize = 200;

/// Where alerts go.
#[derive(Debug, Clone)]
pub enum Way {
    /// POST to a URL.
    Webhook(Box<Webhook>),
    /// A program with its arguments.
    Command(Vec<String>),
}

impl Way {
    /// A webhook. `https` is checked against the authorities in the file `ca`, or else those that this system trusts.
    ///
    /// # Errors
    /// When the URL is none, or there is nobody to trust.
    pub fn webhook(url: &str, ca: Option<&Path>) -> Result<Self, DeliverError> {
        Ok(Self::Webhook(Box::new(Webhook::new(url, ca)?)))
    }

    /// For the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Webhook(_) => "alert_webhook",
            Self::Command(_) => "alert_command",
        }
    }

    /// One attempt to deliver.
    ///
    /// # Errors
    /// When the receiver hasn't taken it for certain.
    pub async fn deliver(&self, janus: &ServerId, alert: &Alert) -> Result<(), DeliverError> {
        match self {
            Self::Webhook(webhook) => {
                let message = message(janus, alert);
                let late = |_| DeliverError::Lost(format!("no end after {} s", DEADLINE.as_secs()));
                let posted = timeout(DEADLINE, webhook.post("janus", &message)).await;
                posted.map_err(late)?
            }
            Self::Command(command) => run(command, &mail(janus, alert)).await,
        }
    }
}

fn message(janus: &ServerId, alert: &Alert) -> serde_json::Value {
    serde_json::json!({
        "text": format!("janus {janus}: {}", alert.text),
        "event": alert.event.name(),
        "kind": alert.kind,
        "subject": alert.subject,
        "janus": janus.as_str(),
        "at_ms": alert.at_ms,
    })
}

/// A mail as sendmail takes it. Names and reasons come from outside: no line of theirs may become a header.
fn mail(janus: &ServerId, alert: &Alert) -> String {
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let subject: String = alert.text.chars().map(plain).take(MOST_SUBJECT).collect();
    let one_line: String =
        alert.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!(
        "Subject: [janus {janus}] {subject}\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n{one_line}\n\nFound by janus {janus} at {} UTC ({}, {}).\n",
        date(alert.at_ms),
        alert.kind,
        alert.event.name(),
    )
}

async fn run(command: &[String], message: &str) -> Result<(), DeliverError> {
    let [program, arguments @ ..] = command else {
        return Err(DeliverError::Setup("alert_command is empty".into()));
    };
    tell(program, arguments, message, DEADLINE).await.map_err(|error| match error {
        TellError::Failed { status, said } => {
            DeliverError::Refused(format!("{status} of {program}: {said}"))
        }
        other => DeliverError::Lost(format!("{program}: {other}")),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::Event, *};

    fn alert(text: &str) -> Alert {
        let (kind, subject) = ("server_unreachable", "a".to_owned());
        Alert { event: Event::Begun, kind, subject, text: text.into(), at_ms: 1_767_225_600_000 }
    }

    #[test]
    fn no_text_becomes_a_header() {
        let mail = mail(&"router".parse().unwrap(), &alert("a: x\r\nBcc: eve@example.org\n\nü"));
        let (head, body) = mail.split_once("\n\n").unwrap();
        assert!(
            head.starts_with("Subject: [janus router] a: x??Bcc: eve@example.org???\n"),
            "{head}"
        );
        assert_eq!(head.lines().filter(|line| line.starts_with("Bcc")).count(), 0);
        assert!(body.starts_with("a: x  Bcc: eve@example.org  ü\n\nFound by"), "{body}");
    }

    #[tokio::test]
    async fn a_command_says_why_it_failed() {
        let shell = |script: &str| ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        run(&shell("exit 0"), &"x".repeat(1 << 20)).await.unwrap();
        let failed = run(&shell("echo no such mailbox >&2; exit 3"), "").await.unwrap_err();
        assert!(
            failed.to_string().contains("exit status: 3")
                && failed.to_string().contains("no such mailbox")
        );
        assert!(run(&["/nonexistent".into()], "").await.is_err());
    }
}
