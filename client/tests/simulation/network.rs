//! A network in memory: every connection is two pipes whose bytes take time, are held back, or break, as the links
//! between the nodes are.
//!
//! A link is held when a network drops its packets or one end is frozen: nothing arrives, nobody is told, and all of it
//! arrives when the link is released. A link is cut when packets are refused: connections break at once.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures::future::poll_fn;
use janus_proto::{
    channel::{ConnectError, ConnectOptions, Dial, Dialing, Stream, Target},
    ids::ServerId,
    listener::Known,
    proof::Statement,
    tls::Principal,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, mpsc},
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};

pub use crate::node::Node;

/// What a server's report is cut into.
const REPORT_PIECE: usize = 700;
/// A connection to a process that died is known to be broken so long after its last byte.
const NEWS: Duration = Duration::from_millis(100);
/// Bytes on their way in one direction of a connection.
const PIPE_BYTES: usize = 1 << 20;

/// One direction between two nodes.
#[derive(Debug, Clone, Copy, Default)]
struct Link {
    /// Reasons to hold it.
    holds: u32,
    /// Reasons to refuse connections on it.
    cuts: u32,
    /// Reasons for it to be slow, and how slow.
    slow: u32,
    slow_by: Duration,
    connections: u64,
    /// Last change for the worse or better.
    changed: Option<Instant>,
}

#[derive(Default)]
struct Inner {
    links: BTreeMap<(Node, Node), Link>,
    doors: BTreeMap<Node, mpsc::Sender<Known>>,
    /// Frozen as often as this says.
    frozen: BTreeMap<Node, u32>,
    changed: BTreeMap<Node, Instant>,
    /// When `.0` last got bytes of `.1` on a connection of its own.
    heard: BTreeMap<(Node, Node), Instant>,
    wires: Vec<Weak<Wire>>,
    /// For the next connection between two nodes.
    snags: BTreeMap<(Node, Node), Snag>,
}

/// What happens to the bytes that a connection's maker sends, after so many of them.
#[derive(Debug, Clone, Copy)]
pub struct Snag {
    pub after: usize,
    pub how: Snagged,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snagged {
    /// The rest waits on its way, longer than what is sent later on another connection: see [`Network::free_oldest`].
    Stalls,
    /// The connection breaks.
    Breaks,
}

/// Sees what one node sends to another on a connection that the first has made, and how long the first has heard
/// nothing of the other.
pub type Tap = Box<dyn Fn(Node, Node, &[u8], Duration) + Send + Sync>;

/// Shared by all nodes; cheap to clone.
#[derive(Clone)]
pub struct Network(Arc<Shared>);

struct Shared {
    seed: u64,
    inner: Mutex<Inner>,
    released: Notify,
    tap: Tap,
}

impl Network {
    pub fn new(seed: u64, tap: Tap) -> Self {
        let inner = Mutex::new(Inner::default());
        Self(Arc::new(Shared { seed, inner, released: Notify::new(), tap }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections of `node`, made in the name of `principal`.
    pub fn dialer(&self, node: Node, principal: Principal) -> Dialer {
        Dialer { network: self.clone(), node, principal }
    }

    /// `node` listens.
    pub fn listen(&self, node: Node) -> mpsc::Receiver<Known> {
        let (send, receive) = mpsc::channel(64);
        let mut inner = self.lock();
        inner.changed.insert(node, Instant::now());
        inner.doors.insert(node, send);
        drop(inner);
        // What an earlier process of the node has left is unknown to the new one.
        self.break_wires(|wire| wire.touches(node));
        receive
    }

    /// The process at `node` is gone: its connections break, or just fall silent when the whole host is gone.
    pub fn gone(&self, node: Node, silently: bool) {
        let mut inner = self.lock();
        inner.doors.remove(&node);
        inner.changed.insert(node, Instant::now());
        let wires = inner.live();
        drop(inner);
        for wire in wires.iter().filter(|wire| wire.touches(node)) {
            wire.abandon(node, silently);
        }
    }

    /// Changes the links between `a` and `b`, in both directions.
    pub fn change(&self, a: Node, b: Node, change: impl Fn(&mut Bend)) {
        self.bend(a, b, &change);
        self.bend(b, a, change);
    }

    /// Changes the link from `from` to `to`.
    pub fn bend(&self, from: Node, to: Node, change: impl Fn(&mut Bend)) {
        let mut inner = self.lock();
        let link = inner.links.entry((from, to)).or_default();
        let mut bend = Bend { link, cut: false };
        change(&mut bend);
        let cut = bend.cut;
        link.changed = Some(Instant::now());
        drop(inner);
        if cut {
            self.break_wires(|wire| wire.touches(from) && wire.touches(to));
        }
        self.wake();
    }

    /// Stops or resumes `node`: it neither hears nor says anything.
    pub fn freeze(&self, node: Node, is_frozen: bool) {
        let mut inner = self.lock();
        let count = inner.frozen.entry(node).or_default();
        *count = if is_frozen { *count + 1 } else { count.saturating_sub(1) };
        inner.changed.insert(node, Instant::now());
        drop(inner);
        self.wake();
    }

    /// The next connection that `from` makes to `to` has a snag.
    pub fn snag(&self, from: Node, to: Node, snag: Snag) {
        self.lock().snags.insert((from, to), snag);
    }

    /// Lets the oldest connection from `from` to `to` that has stalled go on; false when none has.
    pub fn free_oldest(&self, from: Node, to: Node) -> bool {
        let mut inner = self.lock();
        inner.snags.remove(&(from, to));
        let wires = inner.live();
        drop(inner);
        let mut stalled = wires
            .iter()
            .filter(|wire| wire.nodes == (from, to) && wire.pipe(0).snag.take().is_some());
        stalled.next().inspect(|wire| wire.wake()).is_some()
    }

    /// Whether nothing is wrong between two nodes, and since when.
    pub fn well_since(&self, a: Node, b: Node) -> Option<Instant> {
        let inner = self.lock();
        let mut since = None;
        for (from, to) in [(a, b), (b, a)] {
            let link = inner.links.get(&(from, to)).copied().unwrap_or_default();
            if link.holds > 0 || link.cuts > 0 || link.slow > 0 {
                return None;
            }
            since = since.max(link.changed);
        }
        for node in [a, b] {
            if inner.frozen.get(&node).is_some_and(|count| *count > 0) {
                return None;
            }
            since = since.max(inner.changed.get(&node).copied());
        }
        let listens = |node| matches!(node, Node::Machine(_) | Node::Operator);
        let open = [a, b].iter().all(|node| listens(*node) || inner.doors.contains_key(node));
        if open { Some(since.unwrap_or_else(Instant::now)) } else { None }
    }

    /// Time since `node` got a byte of `other` on a connection that it has made.
    fn silence(&self, node: Node, other: Node) -> Duration {
        self.lock().heard.get(&(node, other)).map(Instant::elapsed).unwrap_or_default()
    }

    fn wake(&self) {
        let wires = self.lock().live();
        wires.iter().for_each(|wire| wire.wake());
        self.0.released.notify_waiters();
    }

    fn break_wires(&self, is_meant: impl Fn(&Wire) -> bool) {
        let wires = self.lock().live();
        for wire in wires.iter().filter(|wire| is_meant(wire)) {
            wire.reset();
        }
    }

    fn is_held(&self, from: Node, to: Node) -> bool {
        let inner = self.lock();
        let frozen = |node| inner.frozen.get(&node).is_some_and(|count| *count > 0);
        inner.links.get(&(from, to)).is_some_and(|link| link.holds > 0)
            || frozen(from)
            || frozen(to)
    }

    fn latency(&self, from: Node, to: Node, rng: &mut SmallRng) -> Duration {
        let inner = self.lock();
        let link = inner.links.get(&(from, to)).copied().unwrap_or_default();
        let slow = if link.slow > 0 { link.slow_by } else { Duration::ZERO };
        slow + Duration::from_millis(rng.random_range(1..6))
    }

    /// Waits until bytes get from `from` to `to`, and takes the time that they need.
    async fn cross(&self, from: Node, to: Node, rng: &mut SmallRng) {
        sleep(self.latency(from, to, rng)).await;
        loop {
            let mut released = std::pin::pin!(self.0.released.notified());
            released.as_mut().enable();
            if !self.is_held(from, to) {
                return;
            }
            released.await;
        }
    }

    /// Chance for one connection: the same however the events of other links are ordered.
    fn rng(&self, from: Node, to: Node) -> SmallRng {
        let mut inner = self.lock();
        let link = inner.links.entry((from, to)).or_default();
        link.connections += 1;
        let text = format!("{} {from} {to} {}", self.0.seed, link.connections);
        let hash = blake3::hash(text.as_bytes());
        SmallRng::seed_from_u64(u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i])))
    }

    async fn connect(
        &self,
        node: Node,
        target: &Target,
        me: &Principal,
        rng: &mut SmallRng,
    ) -> Result<(End, Node), ConnectError> {
        let refused = || ConnectError::Refused { target: target.to_string() };
        let to = Node::of(target.host()).ok_or_else(refused)?;
        self.cross(node, to, rng).await;
        let door = {
            let inner = self.lock();
            let cut = |from, to| inner.links.get(&(from, to)).is_some_and(|link| link.cuts > 0);
            if cut(node, to) || cut(to, node) {
                let reason = "no route to host".into();
                return Err(ConnectError::Unreachable { target: target.to_string(), reason });
            }
            inner.doors.get(&to).cloned().ok_or_else(refused)?
        };
        let snag = self.lock().snags.remove(&(node, to));
        let there = Pipe { snag, ..Pipe::new(rng) };
        let wire = Arc::new(Wire {
            network: self.clone(),
            nodes: (node, to),
            pipes: [Mutex::new(there), Mutex::new(Pipe::new(rng))],
        });
        self.lock().wires.push(Arc::downgrade(&wire));
        let far = Box::new(End::new(wire.clone(), false)) as Stream;
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let known = Known { stream: far, principal: me.clone(), address };
        let near = End::new(wire, true);
        door.try_send(known).map_err(|_| refused())?;
        self.cross(to, node, rng).await;
        Ok((near, to))
    }
}

/// How a link is bent.
pub struct Bend<'a> {
    link: &'a mut Link,
    cut: bool,
}

impl Bend<'_> {
    pub fn hold(&mut self) {
        self.link.holds += 1;
    }

    pub fn release(&mut self) {
        self.link.holds -= 1;
    }

    pub fn cut(&mut self) {
        self.link.cuts += 1;
        self.cut = true;
    }

    pub fn mend(&mut self) {
        self.link.cuts -= 1;
    }

    pub fn slow(&mut self, by: Duration) {
        self.link.slow += 1;
        self.link.slow_by = by;
    }

    pub fn speed_up(&mut self) {
        self.link.slow -= 1;
    }
}

impl Inner {
    fn live(&mut self) -> Vec<Arc<Wire>> {
        self.wires.retain(|wire| wire.strong_count() > 0);
        self.wires.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Makes the connections of one node.
pub struct Dialer {
    network: Network,
    node: Node,
    principal: Principal,
}

impl Dial for Dialer {
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let late = |what| {
                let (target, after) = (target.to_string(), options.connect_timeout);
                ConnectError::TimedOut { target, what, after }
            };
            let to = Node::of(target.host()).unwrap_or(Node::Operator);
            let mut rng = self.network.rng(self.node, to);
            let connecting = self.network.connect(self.node, target, &self.principal, &mut rng);
            let connected = timeout(options.connect_timeout, connecting).await;
            let (mut end, to) = connected.map_err(|_| late("no answer to the TCP connect"))??;
            let greeted =
                timeout(options.connect_timeout, poll_fn(|cx| end.poll_readable(cx))).await;
            match greeted.map_err(|_| late("it accepted the connection and then said nothing"))? {
                Ok(true) => {}
                Ok(false) | Err(_) => {
                    let reason = "closed before a word".into();
                    return Err(ConnectError::Closed { target: target.to_string(), reason });
                }
            }
            let peer = super::site::principal(to);
            Ok((Box::new(end) as Stream, peer))
        })
    }

    fn prove(&self, statement: &Statement, server: Option<&ServerId>) -> Option<String> {
        super::site::prove(self.node, statement, server)
    }
}

/// One connection. Pipe 0 leads from the node that has made it, pipe 1 back.
struct Wire {
    network: Network,
    nodes: (Node, Node),
    pipes: [Mutex<Pipe>; 2],
}

struct Pipe {
    rng: SmallRng,
    /// Between two pieces of what is written at once. The same for all: how many pieces there are depends on the length of
    /// signatures, which no seed decides.
    pause: Duration,
    chunks: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    /// Nothing comes after this.
    closed_at: Option<Instant>,
    /// The reading end is gone.
    is_unread: bool,
    /// The connection is broken: the reading end hears of it when the link isn't held.
    is_reset: bool,
    /// The reading end's process is dead.
    is_dead: bool,
    /// The writing end's process is dead, and nobody is told.
    is_silenced: bool,
    snag: Option<Snag>,
    last_at: Instant,
    read_at: Instant,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn new(rng: &mut SmallRng) -> Self {
        let mut rng = SmallRng::seed_from_u64(rng.random());
        Self {
            pause: Duration::from_millis(rng.random_range(5..40)),
            rng,
            chunks: VecDeque::new(),
            bytes: 0,
            closed_at: None,
            is_unread: false,
            is_reset: false,
            is_dead: false,
            is_silenced: false,
            snag: None,
            last_at: Instant::now(),
            read_at: Instant::now(),
            reader: None,
            writer: None,
        }
    }

    fn is_broken(&self, is_held: bool) -> bool {
        let is_reset = match self.news_at() {
            Some(at) => self.chunks.is_empty() && at <= Instant::now(),
            None => self.is_reset,
        };
        self.is_dead || is_reset && !is_held
    }

    /// What a dead process has sent arrives before the news of its death, and is read before it, too.
    fn news_at(&self) -> Option<Instant> {
        (self.is_reset && self.is_silenced).then(|| self.read_at + NEWS)
    }

    /// The next bytes wait behind a snag.
    fn is_stalled(&self) -> bool {
        self.snag.is_some_and(|snag| snag.after == 0 && snag.how == Snagged::Stalls)
    }

    /// Bytes that may be read before a snag, at most `count`.
    fn before_snag(&self, count: usize) -> usize {
        self.snag.map_or(count, |snag| count.min(snag.after))
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl Wire {
    fn touches(&self, node: Node) -> bool {
        self.nodes.0 == node || self.nodes.1 == node
    }

    fn pipe(&self, index: usize) -> MutexGuard<'_, Pipe> {
        self.pipes[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From where to where a pipe leads.
    fn ends(&self, index: usize) -> (Node, Node) {
        if index == 0 { self.nodes } else { (self.nodes.1, self.nodes.0) }
    }

    fn wake(&self) {
        (0..2).for_each(|index| self.pipe(index).wake());
    }

    fn reset(&self) {
        for index in 0..2 {
            let mut pipe = self.pipe(index);
            pipe.is_reset = true;
            pipe.wake();
        }
    }

    /// `node` has died. Its own end breaks at once, so that nothing of it goes on.
    fn abandon(&self, node: Node, silently: bool) {
        for index in 0..2 {
            let (_, to) = self.ends(index);
            let mut pipe = self.pipe(index);
            // What it has not read is lost; what it has sent is still on its way, and nothing ever follows.
            if to == node {
                pipe.is_dead = true;
            } else {
                pipe.is_silenced = true;
                pipe.is_reset |= !silently;
            }
            pipe.wake();
        }
    }
}

/// One end of a connection.
struct End {
    wire: Arc<Wire>,
    /// The node that has made the connection holds this end.
    is_near: bool,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl End {
    fn new(wire: Arc<Wire>, is_near: bool) -> Self {
        Self { wire, is_near, sleep: None }
    }

    fn incoming(&self) -> usize {
        usize::from(self.is_near)
    }

    /// Whether there are bytes to read; `false`: the end.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let wire = self.wire.clone();
        let (from, to) = wire.ends(self.incoming());
        let mut pipe = wire.pipe(self.incoming());
        pipe.reader = Some(cx.waker().clone());
        let is_held = wire.network.is_held(from, to);
        if pipe.is_broken(is_held) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let next = pipe.chunks.front().map(|(at, _)| *at).or(pipe.closed_at).or(pipe.news_at());
        let is_held = is_held || pipe.is_stalled();
        let Some(at) = next.filter(|_| !is_held) else { return Poll::Pending };
        if at > Instant::now() {
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(at)));
            if sleep.deadline() != at {
                sleep.as_mut().reset(at);
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        if pipe.chunks.is_empty() && pipe.closed_at.is_none() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(!pipe.chunks.is_empty()))
    }
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !std::task::ready!(self.poll_readable(cx))? {
            return Poll::Ready(Ok(()));
        }
        let wire = self.wire.clone();
        let mut pipe = wire.pipe(self.incoming());
        let most = pipe.before_snag(buf.remaining());
        let mut is_torn = false;
        if let Some((_, chunk)) = pipe.chunks.front_mut() {
            let count = chunk.len().min(most);
            buf.put_slice(&chunk[..count]);
            chunk.advance(count);
            if chunk.is_empty() {
                pipe.chunks.pop_front();
            }
            pipe.bytes -= count;
            pipe.read_at = Instant::now();
            if let Some(snag) = &mut pipe.snag {
                snag.after -= count;
                is_torn = snag.after == 0 && snag.how == Snagged::Breaks;
            }
        }
        if let Some(writer) = pipe.writer.take() {
            writer.wake();
        }
        drop(pipe);
        if is_torn {
            wire.reset();
        }
        if self.is_near {
            let (near, far) = wire.nodes;
            wire.network.lock().heard.insert((near, far), Instant::now());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let index = usize::from(!self.is_near);
        let (from, to) = self.wire.ends(index);
        let is_held = self.wire.network.is_held(to, from);
        let is_broken = self.wire.pipe(1 - index).is_broken(is_held);
        let mut pipe = self.wire.pipe(index);
        // A host that is gone says nothing of it; writing there goes on for a while.
        if is_broken || pipe.is_unread && !pipe.is_dead && !is_held {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if pipe.bytes >= PIPE_BYTES {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut chunk = Vec::with_capacity(slices.iter().map(|slice| slice.len()).sum());
        slices.iter().for_each(|slice| chunk.extend_from_slice(slice));
        if chunk.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let count = chunk.len();
        if self.is_near {
            let silence = self.wire.network.silence(from, to);
            (self.wire.network.0.tap)(from, to, &chunk, silence);
        }
        let mut at = Instant::now() + self.wire.network.latency(from, to, &mut pipe.rng);
        pipe.bytes += count;
        let mut rest = Bytes::from(chunk);
        // Reports come in pieces, as on a thin line: a janus is seen with the first half of one.
        let piece =
            if matches!(from, Node::Server(_)) && self.is_near { REPORT_PIECE } else { count };
        while !rest.is_empty() {
            at = at.max(pipe.last_at);
            pipe.last_at = at;
            pipe.chunks.push_back((at, rest.split_to(piece.min(rest.len()))));
            at += pipe.pause;
        }
        if let Some(reader) = pipe.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close();
        Poll::Ready(Ok(()))
    }
}

impl End {
    fn close(&self) {
        let mut pipe = self.wire.pipe(usize::from(!self.is_near));
        if pipe.closed_at.is_none() && !pipe.is_silenced {
            pipe.closed_at = Some(pipe.last_at.max(Instant::now()));
        }
        if let Some(reader) = pipe.reader.take() {
            reader.wake();
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.close();
        let mut pipe = self.wire.pipe(self.incoming());
        pipe.is_unread = true;
        if let Some(writer) = pipe.writer.take() {
            writer.wake();
        }
    }
}
