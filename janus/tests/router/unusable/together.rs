//! Several servers that can't be used at once: together they cost no more than one does, and a start is answered within
//! two seconds whenever another server is ready.

use std::{
    fmt,
    time::{Duration, Instant},
};

use futures::{
    future::join_all,
    stream::{self, StreamExt},
};
use janus_proto::{metadata, pb};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::listen;
use crate::{
    backend::Backend,
    site::{Keys, Running, channel, client, janus_with, nobody},
    starts::start_request,
};

const LIMIT: Duration = Duration::from_secs(2);

/// What is wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It answered until just before the start.
    Frozen,
    /// It takes connections, proves who it is, and says no more.
    Silent,
    /// It takes connections and says nothing at all.
    Dumb,
    /// Nobody listens.
    Refused,
    /// Packets to it are lost.
    BlackHole,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A server that can't be used, with what keeps it like that.
enum Bad {
    Frozen(Backend),
    Other { url: String, _kept: Box<dyn std::any::Any + Send> },
}

impl Bad {
    async fn new(keys: &Keys, kind: Kind, name: &'static str) -> Self {
        match kind {
            Kind::Frozen => Self::Frozen(Backend::new(keys, name).await),
            Kind::Silent => {
                let identity = keys.identity(&format!("server/{name}"));
                let acceptor = TlsAcceptor::from(identity.server_config());
                let (address, tasks) = listen(move |tcp| {
                    let acceptor = acceptor.clone();
                    async move {
                        let _open = acceptor.accept(tcp).await;
                        std::future::pending().await
                    }
                })
                .await;
                other(format!("https://{address}"), tasks)
            }
            Kind::Dumb => {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let url = format!("https://{}", listener.local_addr().unwrap());
                other(url, listener)
            }
            Kind::Refused => other(format!("https://{}", nobody().await), ()),
            Kind::BlackHole => {
                let (url, open) = black_hole().await;
                other(url, open)
            }
        }
    }

    fn url(&self) -> String {
        match self {
            Self::Frozen(backend) => format!("https://{}", backend.address()),
            Self::Other { url, .. } => url.clone(),
        }
    }

    fn freeze(&self) {
        if let Self::Frozen(backend) = self {
            backend.line.freeze();
        }
    }

    fn starts(&self) -> usize {
        if let Self::Frozen(backend) = self { backend.starts() } else { 0 }
    }
}

fn other(url: String, kept: impl Send + 'static) -> Bad {
    Bad::Other { url, _kept: Box::new(kept) }
}

/// A listener whose queue is full: the kernel drops what else comes.
async fn black_hole() -> (String, impl Send + 'static) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(connected) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await
    {
        waiting.push(connected.unwrap());
        assert!(waiting.len() < 10, "its queue is never full");
    }
    (format!("https://{address}"), (listener, waiting))
}

/// Another machine visits all servers that can be used, so that all are connected and have just spoken.
async fn visit_all(keys: &Keys, janus: &Running, usable: usize) {
    let channel = channel(&janus.url, &keys.identity("client/bob/other")).await;
    let mut client = pb::backup_service_client::BackupServiceClient::new(channel);
    for _ in 0..usable {
        client.start_backup(start_request()).await.unwrap();
    }
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// Asserts that a start passes over servers of these kinds in time; how long it took.
async fn pass_over(kinds: &[Kind]) -> Duration {
    let keys = Keys::new();
    let bad: Vec<Bad> =
        join_all(kinds.iter().zip(NAMES).map(|(kind, name)| Bad::new(&keys, *kind, name))).await;
    let good = Backend::new(&keys, "good").await;
    let mut urls: Vec<String> = bad.iter().map(Bad::url).collect();
    urls.push(format!("https://{}", good.address()));
    let janus = janus_with(&keys, &[], |settings| settings.server_urls = urls).await;
    let frozen = kinds.iter().filter(|kind| **kind == Kind::Frozen).count();
    visit_all(&keys, &janus, frozen + 1).await;
    let mut client = client(&keys, &janus.url).await;
    let before: Vec<usize> = bad.iter().map(Bad::starts).collect();
    bad.iter().for_each(Bad::freeze);
    let begun = Instant::now();
    let answer = client.start_backup(start_request()).await.unwrap();
    let took = begun.elapsed();
    let skipped = answer.metadata().get_all(metadata::SKIPPED).iter().count();
    assert_eq!(answer.get_ref().server_id, "good", "{kinds:?}");
    assert_eq!(skipped, kinds.len(), "{kinds:?}: each is named");
    assert!(took < LIMIT, "{kinds:?}: {took:?}");
    assert_eq!(bad.iter().map(Bad::starts).collect::<Vec<_>>(), before, "{kinds:?}: none got it");
    took
}

/// Some at a time: most of what they do is to wait.
async fn pass_over_each(of: impl IntoIterator<Item = Vec<Kind>>) {
    let each = of.into_iter().map(|kinds| async move { (pass_over(&kinds).await, kinds) });
    let mut done = stream::iter(each).buffer_unordered(4);
    while let Some((took, kinds)) = done.next().await {
        let kinds: Vec<String> = kinds.iter().map(ToString::to_string).collect();
        println!("{:>5} ms  {}", took.as_millis(), kinds.join(", "));
    }
}

const KINDS: [Kind; 5] = [Kind::Frozen, Kind::Silent, Kind::Dumb, Kind::Refused, Kind::BlackHole];

#[tokio::test]
async fn two_bad_servers_cost_no_more_than_two_seconds() {
    let pairs = KINDS.iter().enumerate().flat_map(|(i, a)| KINDS[i..].iter().map(|b| vec![*a, *b]));
    pass_over_each(pairs).await;
}

#[tokio::test]
async fn three_bad_servers_cost_no_more_than_two_seconds() {
    use Kind::{BlackHole, Dumb, Frozen, Refused, Silent};
    let triples = [
        [Frozen, Frozen, Frozen],
        [Frozen, Silent, Refused],
        [BlackHole, Frozen, Silent],
        [Silent, Silent, Silent],
        [BlackHole, BlackHole, Frozen],
        [Refused, Dumb, Frozen],
    ];
    pass_over_each(triples.map(Vec::from)).await;
}

#[tokio::test]
async fn five_bad_servers_cost_no_more_than_two_seconds() {
    use Kind::{BlackHole, Frozen, Silent};
    let fives = [KINDS, [Frozen; 5], [BlackHole; 5], [Silent, Frozen, BlackHole, Frozen, Silent]];
    pass_over_each(fives.map(Vec::from)).await;
}

#[tokio::test]
async fn servers_that_die_while_others_are_waited_for_cost_no_more_than_two_seconds() {
    let keys = Keys::new();
    let all = join_all(["a", "b", "c", "good"].map(|name| Backend::new(&keys, name))).await;
    let addresses: Vec<_> = all.iter().map(Backend::address).collect();
    let janus = janus_with(&keys, &addresses, |_| {}).await;
    visit_all(&keys, &janus, all.len()).await;
    let mut client = client(&keys, &janus.url).await;
    // Each answers until its turn is near.
    all[0].line.freeze();
    let dying = async {
        for (backend, pause) in all[1..].iter().zip([950, 400]) {
            sleep(Duration::from_millis(pause)).await;
            backend.line.freeze();
        }
        std::future::pending().await
    };
    let begun = Instant::now();
    let answer = tokio::select! {
        answer = client.start_backup(start_request()) => answer.unwrap(),
        () = dying => unreachable!(),
    };
    let took = begun.elapsed();
    println!("{} ms", took.as_millis());
    assert_eq!(answer.get_ref().server_id, "good");
    assert!(took < LIMIT, "{took:?}");
}

#[tokio::test]
async fn the_order_among_those_that_answer_is_kept() {
    let keys = Keys::new();
    let all = join_all(NAMES.map(|name| Backend::new(&keys, name))).await;
    let addresses: Vec<_> = all.iter().map(Backend::address).collect();
    let janus = janus_with(&keys, &addresses, |_| {}).await;
    let mut client = client(&keys, &janus.url).await;
    for name in NAMES {
        let answer = client.start_backup(start_request()).await.unwrap();
        assert_eq!(answer.get_ref().server_id, name);
    }
    // A and B are the oldest, and c is before d and e.
    all[..2].iter().for_each(|backend| backend.line.freeze());
    for name in ["c", "d", "e", "c"] {
        let begun = Instant::now();
        let answer = client.start_backup(start_request()).await.unwrap();
        assert_eq!(answer.get_ref().server_id, name);
        assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    }
    all[..2].iter().for_each(|backend| backend.line.thaw());
    sleep(Duration::from_millis(1500)).await;
    let answer = client.start_backup(start_request()).await.unwrap();
    assert_eq!(answer.get_ref().server_id, "a", "used longest ago, and it answers again");
}
