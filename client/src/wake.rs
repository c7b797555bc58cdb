//! Servers that sleep: a magic packet before the first probe, and then patience, but no longer than they take to boot.

use std::{collections::BTreeSet, time::Duration};

use janus_proto::{
    pb::WakeServersRequest,
    tls::Role,
    wake::{EVERYBODY, Mac, Sleeper, WakeError, place, wake_and_tell},
};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response};

use crate::{
    link::{Address, QUICK},
    ways::{Known, Ways},
};

/// How often it is looked whether one answers.
const LOOK: Duration = Duration::from_secs(1);
/// How long a look takes at most where this machine knows of no server to wake, or has waited long enough for one.
const GLANCE: Duration = Duration::from_secs(2);
/// How often the packets are sent again.
const AGAIN: Duration = Duration::from_secs(10);
/// What stands for the addresses that `janus-client test` has remembered.
const REMEMBERED: &str = "remembered";

/// Servers to wake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// This one.
    Host(Sleeper),
    /// Those whose addresses are remembered, by packets to this place.
    Remembered(std::net::SocketAddr),
}

/// Reads the setting `wake`.
///
/// # Errors
/// When one can't be understood.
pub fn parse(texts: &[String]) -> Result<Vec<Wish>, WakeError> {
    let parse = |text: &String| match text.strip_prefix(REMEMBERED) {
        Some("") => Ok(Wish::Remembered(EVERYBODY)),
        Some(to) => {
            let to = to.strip_prefix('@').and_then(|to| place(to).ok());
            to.map(Wish::Remembered).ok_or_else(|| WakeError(text.clone()))
        }
        None => text.parse().map(Wish::Host),
    };
    texts.iter().map(parse).collect()
}

/// Wakes the servers up, or asks janus to, which knows its own; returns as soon as a server can be reached, after `boot` at the
/// latest. What comes then says itself that nobody answers. Where none sleeps that anybody knows to wake, nothing is waited for.
pub async fn wake_up(wishes: &[Wish], boot: Duration, ways: &Ways, stop: &CancellationToken) {
    let sleepers = sleepers(wishes, ways);
    let began = Instant::now();
    let mut sent: Option<Instant> = None;
    while !stop.is_cancelled() {
        if sent.is_none_or(|at| at.elapsed() >= AGAIN) {
            for sleeper in &sleepers {
                wake_and_tell(sleeper).await;
            }
            sent = Some(Instant::now());
        }
        // Where nobody may be asleep a way that hangs is not to cost its time twice.
        let is_first = sleepers.is_empty() && began.elapsed() < GLANCE;
        let left = boot.saturating_sub(began.elapsed());
        let longest = if is_first { GLANCE } else { QUICK.min(left.max(GLANCE)) };
        match timeout(longest, look(ways)).await.unwrap_or(Found::Asleep { woken: 0 }) {
            Found::Awake => {
                tracing::debug!(seconds = began.elapsed().as_secs(), "somebody answers");
                return;
            }
            Found::Asleep { woken: 0 } if sleepers.is_empty() => return,
            Found::Asleep { woken } => tracing::debug!(woken, "janus sends magic packets"),
        }
        let left = boot.saturating_sub(began.elapsed());
        if left.is_zero() {
            tracing::warn!(
                boot_seconds = boot.as_secs(),
                "magic packets were sent, but no server answers"
            );
            return;
        }
        let _ = stop.run_until_cancelled(tokio::time::sleep(LOOK.min(left))).await;
    }
}

/// What a look at all ways has found.
enum Found {
    /// A server can be reached, or somebody who doesn't tell.
    Awake,
    /// None; the janus that were asked wake so many hosts.
    Asleep { woken: u32 },
}

async fn look(ways: &Ways) -> Found {
    let (mut tries, mut woken) = (ways.tries(), 0);
    while let Some((_, link)) = tries.next().await {
        if !matches!(link.peer(), Role::Janus(_)) {
            return Found::Awake;
        }
        let request = Address::default().request(WakeServersRequest {}, Some(QUICK));
        match link.info().wake_servers(request).await.map(Response::into_inner) {
            Ok(answer) if answer.reachable_servers == 0 => woken += answer.woken_hosts,
            Ok(_) => return Found::Awake,
            // An older janus doesn't tell.
            Err(status) if status.code() == Code::Unimplemented => return Found::Awake,
            Err(error) => tracing::debug!(%error, url = link.url(), "can't ask for its servers"),
        }
    }
    Found::Asleep { woken }
}

fn sleepers(wishes: &[Wish], ways: &Ways) -> Vec<Sleeper> {
    let mut sleepers = Vec::new();
    for wish in wishes {
        match wish {
            Wish::Host(sleeper) => sleepers.push(*sleeper),
            Wish::Remembered(to) => {
                let memory = ways.memory();
                let known = memory.urls.values().flat_map(Known::macs);
                let known: BTreeSet<Mac> = known.filter_map(|mac| mac.parse().ok()).collect();
                if known.is_empty() {
                    tracing::warn!(
                        "wake: no hardware address is remembered; run `janus-client test` in the servers' network while they are on"
                    );
                }
                sleepers.extend(known.into_iter().map(|mac| Sleeper { mac, to: *to }));
            }
        }
    }
    sleepers
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use janus_proto::{
        channel::{ConnectOptions, Dial, Dialing, Target},
        ids::ServerId,
        proof::Statement,
    };

    use super::*;

    /// A host that never answers.
    struct Silent;

    impl Dial for Silent {
        fn dial<'a>(&'a self, _: &'a Target, _: &'a ConnectOptions) -> Dialing<'a> {
            Box::pin(std::future::pending())
        }

        fn prove(&self, _: &Statement, _: Option<&ServerId>) -> Option<String> {
            None
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_hangs_takes_no_longer_than_a_server_may_to_boot() {
        let ways = Ways::new(vec!["https://silent:1".into()], Arc::new(Silent));
        let sleeper = [Wish::Host("00:11:22:33:44:55@127.0.0.1".parse().unwrap())];
        for (wishes, boot, longest) in
            [(&sleeper[..], 3, 5), (&sleeper, 30, 32), (&sleeper, 0, 2), (&[], 30, 2)]
        {
            let began = Instant::now();
            let boot = Duration::from_secs(boot);
            wake_up(wishes, boot, &ways, &CancellationToken::new()).await;
            let took = began.elapsed();
            assert!(took <= Duration::from_secs(longest), "{boot:?}: {took:?}");
            assert!(took >= boot || wishes.is_empty(), "{boot:?}: {took:?}");
        }
    }

    #[test]
    fn a_wish_is_an_address_or_what_is_remembered() {
        let parse = |text: &str| parse(&[text.to_owned()]);
        assert_eq!(parse("remembered").unwrap(), [Wish::Remembered(EVERYBODY)]);
        let to = "10.0.0.255:9".parse().unwrap();
        assert_eq!(parse("remembered@10.0.0.255").unwrap(), [Wish::Remembered(to)]);
        assert!(matches!(parse("00:11:22:33:44:55").unwrap()[..], [Wish::Host(_)]));
        assert!(parse("remember").is_err() && parse("remembered@x").is_err());
    }
}
