//! The ways to janus and the servers: the URLs of the settings, tried together, earlier ones with a head start.
//!
//! Away from home the first URL leads nowhere: that costs a head start, not a time-out, and less once another one is known to
//! have worked last. Who answers must prove to be of our group, so a stranger at a home address is no way.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use janus_proto::{
    channel::{ConnectError, Dialer, HEAD_START, race},
    tls::Identity,
};

use crate::link::{Link, LinkError};

pub mod memory;

pub use memory::{Known, Memory};

/// Head start where a later URL answered last: enough for an answer from the same building.
const SHORT_HEAD_START: Duration = Duration::from_millis(75);

/// URLs, how connections are made, and what is remembered of them. Clones share what they remember.
#[derive(Clone)]
pub struct Ways {
    urls: Vec<String>,
    dialer: Dialer,
    memory: Arc<Mutex<Memory>>,
}

impl std::fmt::Debug for Ways {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ways").field("urls", &self.urls).finish_non_exhaustive()
    }
}

impl Ways {
    /// These URLs, by connections that `dialer` makes; nothing is remembered.
    pub fn new(urls: Vec<String>, dialer: Dialer) -> Self {
        Self { urls, dialer, memory: Arc::default() }
    }

    /// These URLs, directly.
    pub fn direct(urls: Vec<String>, identity: Identity) -> Self {
        Self::new(urls, Arc::new(identity))
    }

    /// The same with what `folder` remembers of these URLs. Reads a file.
    pub fn remembering(self, folder: &Path) -> Self {
        let memory = Memory::read(folder, &self.urls);
        Self { memory: Arc::new(Mutex::new(memory)), ..self }
    }

    /// The URLs.
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// What makes connections.
    pub fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    /// What is remembered.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same ways, beginning with the URL at `place`.
    pub fn beginning_with(&self, place: usize) -> Self {
        let mut urls = self.urls.clone();
        if !urls.is_empty() {
            let first = place % urls.len();
            urls.rotate_left(first);
        }
        Self { urls, ..self.clone() }
    }

    /// All of them, not yet tried.
    pub fn tries(&self) -> Tries<'_> {
        Tries { ways: self, waiting: (0..self.urls.len()).collect(), failed: Vec::new() }
    }

    /// Connects by the first one that answers.
    ///
    /// # Errors
    /// When none does; it says why of each.
    pub async fn connect(&self) -> Result<Link, LinkError> {
        let mut tries = self.tries();
        let next = tries.next().await;
        next.map(|(_, link)| link).ok_or_else(|| tries.unreachable())
    }

    fn head_start(&self) -> Duration {
        let memory = self.memory();
        let later = |last: &String| self.urls.iter().skip(1).any(|url| url == last);
        match &memory.last {
            Some(last) if later(last) => SHORT_HEAD_START,
            _ => HEAD_START,
        }
    }
}

/// Ways that are tried one after another, for callers to whom the first one that answers may not be good enough.
pub struct Tries<'a> {
    ways: &'a Ways,
    waiting: VecDeque<usize>,
    failed: Vec<ConnectError>,
}

impl Tries<'_> {
    /// The next link, with the place of its URL; `None` when all have had their turn. A way that was overtaken is tried
    /// again by the next call.
    pub async fn next(&mut self) -> Option<(usize, Link)> {
        let ways = self.ways;
        let tries = self.waiting.iter();
        let tries: Vec<_> =
            tries.map(|place| connect(ways.urls[*place].clone(), ways.dialer.clone())).collect();
        let raced = race(tries, ways.head_start()).await;
        let gone = |at: usize| {
            raced.won.as_ref().is_some_and(|(won, _)| *won == at)
                || raced.failed.iter().any(|(failed, _)| *failed == at)
        };
        let mut left = (0..self.waiting.len()).filter(|at| !gone(*at));
        let left: VecDeque<_> = left.by_ref().map(|at| self.waiting[at]).collect();
        for (_, error) in &raced.failed {
            tracing::debug!(%error, "a URL leads nowhere");
        }
        self.failed.extend(raced.failed.into_iter().map(|(_, error)| error));
        let waiting = std::mem::replace(&mut self.waiting, left);
        let (won, link) = raced.won?;
        let place = waiting[won];
        ways.memory().note(link.url(), link.peer());
        Some((place, link))
    }

    /// The error when no way led to an answer.
    pub fn unreachable(self) -> LinkError {
        LinkError::Unreachable(self.failed)
    }
}

async fn connect(url: String, dialer: Dialer) -> Result<Link, ConnectError> {
    Link::connect(&url, &dialer).await
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Instant,
    };

    use janus_proto::{
        channel::{ConnectOptions, Dial, Dialing, Target},
        ids::ServerId,
        proof::Statement,
    };

    use super::*;

    /// `https://silent:1` never answers, `https://refused:1` refuses at once. Nobody gets further than that.
    #[derive(Default)]
    struct Deaf(AtomicUsize);

    impl Dial for Deaf {
        fn dial<'a>(&'a self, target: &'a Target, _: &'a ConnectOptions) -> Dialing<'a> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                if target.host() == "silent" {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                }
                Err(ConnectError::Refused { target: target.to_string() })
            })
        }

        fn prove(&self, _: &Statement, _: Option<&ServerId>) -> Option<String> {
            None
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_leads_nowhere_is_told_in_the_order_of_the_settings() {
        let urls = ["silent:1", "refused:1", "nonsense"].map(|host| format!("https://{host}"));
        let (deaf, began) = (Arc::new(Deaf::default()), Instant::now());
        let ways = Ways::new(urls.to_vec(), deaf.clone());
        let LinkError::Unreachable(errors) = ways.connect().await.unwrap_err() else { panic!() };
        let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert!(texts[0].contains("silent") && texts[1].contains("refused"), "{texts:?}");
        assert!(texts[2].contains("no port"), "{texts:?}");
        assert!(began.elapsed() < Duration::from_secs(1));
        assert_eq!(deaf.0.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn the_head_start_is_short_where_a_later_way_worked_last() {
        let ways = Ways::new(vec!["https://a:1".into(), "https://b:1".into()], {
            Arc::new(Deaf::default())
        });
        assert_eq!(ways.head_start(), HEAD_START);
        ways.memory().last = Some("https://b:1".into());
        assert_eq!(ways.head_start(), SHORT_HEAD_START);
        assert_eq!(ways.beginning_with(1).head_start(), HEAD_START);
        ways.memory().last = Some("https://gone:1".into());
        assert_eq!(ways.head_start(), HEAD_START);
    }
}
