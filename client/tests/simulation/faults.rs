//! What goes wrong: drawn from the seed, several at a time, and all of it undone in the end.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    network::{Node, Snag, Snagged},
    site::{JANUS, MACHINES, SERVERS},
    world::{End, World},
};

/// Nodes whose process ends or begins; each has one such fault at a time.
type Busy = Arc<Mutex<BTreeSet<Node>>>;

/// Lets things go wrong for `long`, and returns when all of them are over.
pub async fn rage(world: &Arc<World>, rng: &mut SmallRng, long: Duration) {
    let (until, mut faults, busy) = (Instant::now() + long, JoinSet::new(), Busy::default());
    while Instant::now() < until {
        sleep(Duration::from_millis(rng.random_range(500..9_000))).await;
        let (world, busy) = (world.clone(), busy.clone());
        faults.spawn(fault(world, SmallRng::seed_from_u64(rng.random()), busy));
    }
    while faults.join_next().await.is_some() {}
}

async fn fault(world: Arc<World>, mut rng: SmallRng, busy: Busy) {
    let server = rng.random_range(0..SERVERS);
    let janus = rng.random_range(0..JANUS);
    let (s, j) = (Node::Server(server), Node::Janus(janus));
    let long = Duration::from_millis(match rng.random_range(0..3) {
        0 => rng.random_range(200..3_000),
        1 => rng.random_range(3_000..15_000),
        _ => rng.random_range(15_000..45_000),
    });
    let how = match rng.random_range(0..3) {
        0 => End::Stop,
        1 => End::Crash { silently: false },
        _ => End::Crash { silently: true },
    };
    let kind = rng.random_range(0..16);
    if kind < 7 || kind == 11 || kind == 15 {
        world.rules.count(|counts| counts.partitions += 1);
    }
    match kind {
        0 | 1 => {
            world.rules.note(format!("{j} and {s} are parted for {long:?}"));
            world.network.change(j, s, |link| link.hold());
            sleep(long).await;
            world.network.change(j, s, |link| link.release());
        }
        2 => {
            let (from, to) = if rng.random_bool(0.5) { (j, s) } else { (s, j) };
            world.rules.note(format!("nothing gets from {from} to {to} for {long:?}"));
            world.network.bend(from, to, |link| link.hold());
            sleep(long).await;
            world.network.bend(from, to, |link| link.release());
        }
        3 => {
            world.rules.note(format!("{j} and {s} are cut off for {long:?}"));
            world.network.change(j, s, |link| link.cut());
            sleep(long).await;
            world.network.change(j, s, |link| link.mend());
        }
        4 => parted_sites(&world, &mut rng, long).await,
        5 => {
            let machine = Node::Machine(rng.random_range(0..MACHINES));
            world.rules.note(format!("{machine} and {j} are parted for {long:?}"));
            world.network.change(machine, j, |link| link.hold());
            sleep(long).await;
            world.network.change(machine, j, |link| link.release());
        }
        6 | 15 => {
            let node = if kind == 6 { s } else { j };
            world.rules.note(format!("{node} is frozen for {long:?}"));
            world.network.freeze(node, true);
            sleep(long).await;
            world.network.freeze(node, false);
        }
        7 | 8 => {
            if take(&busy, s) {
                world.rules.count(|counts| counts.crashes += 1);
                world.rules.note(format!("{s}: {how:?} for {long:?}"));
                world.end_server(server, how).await;
                sleep(long).await;
                world.start_server(server);
                world.rules.note(format!("{s} is up again"));
                give_back(&busy, s);
            }
        }
        9 => {
            if take(&busy, j) {
                world.rules.count(|counts| counts.crashes += 1);
                world.rules.note(format!("{j}: {how:?} for {long:?}"));
                world.end_janus(janus, how).await;
                sleep(long).await;
                world.start_janus(janus);
                world.rules.note(format!("{j} is up again"));
                give_back(&busy, j);
            }
        }
        14 => {
            let first = rng.random_range(0..MACHINES);
            let last = rng.random_range(first..MACHINES);
            world.retain(server, first..last + 1, rng.random_bool(0.3));
        }
        12 => torn_report(&world, &mut rng, janus, server).await,
        13 => {
            if take(&busy, s) {
                late_report(&world, &mut rng, janus, server).await;
                give_back(&busy, s);
            }
        }
        10 => {
            let machine = rng.random_range(0..MACHINES);
            world.list(janus, machine).await;
        }
        _ if !world.slowness().is_zero() => {
            let by = world.slowness();
            world.rules.note(format!("{j} and {s} are slow for {long:?}"));
            world.network.change(j, s, |link| link.slow(by));
            sleep(long).await;
            world.network.change(j, s, |link| link.speed_up());
        }
        _ => {
            for machine in 0..MACHINES / 2 {
                world.list(janus, machine).await;
            }
        }
    }
}

/// Two sites that don't see each other: one janus, one server and half of the machines are on the first.
async fn parted_sites(world: &World, rng: &mut SmallRng, long: Duration) {
    let (near_janus, near_server) = (rng.random_range(0..JANUS), rng.random_range(0..SERVERS));
    let is_near = |node| match node {
        Node::Janus(n) => n == near_janus,
        Node::Server(n) => n == near_server,
        Node::Machine(n) => n < MACHINES / 2,
        Node::Operator => true,
    };
    let nodes: Vec<Node> = (0..SERVERS)
        .map(Node::Server)
        .chain((0..JANUS).map(Node::Janus))
        .chain((0..MACHINES).map(Node::Machine))
        .collect();
    let (near, far): (Vec<Node>, Vec<Node>) = nodes.into_iter().partition(|node| is_near(*node));
    world.rules.note(format!(
        "janus-{near_janus} and server-{near_server} are a site of their own for {long:?}"
    ));
    let pairs: Vec<_> = near.iter().flat_map(|a| far.iter().map(move |b| (*a, *b))).collect();
    pairs.iter().for_each(|(a, b)| world.network.change(*a, *b, |link| link.hold()));
    sleep(long).await;
    pairs.iter().for_each(|(a, b)| world.network.change(*a, *b, |link| link.release()));
}

/// A report stream breaks in the middle of its full state, once or twice.
async fn torn_report(world: &World, rng: &mut SmallRng, janus: usize, server: usize) {
    let (s, j) = (Node::Server(server), Node::Janus(janus));
    for _ in 0..rng.random_range(1..3) {
        let after = bytes(rng);
        world.rules.count(|counts| counts.snags += 1);
        world.rules.note(format!("the next report of {s} to {j} breaks after {after} bytes"));
        world.network.snag(s, j, Snag { after, how: Snagged::Breaks });
        report_anew(world, s, j).await;
        world.look_closely(Duration::from_secs(2)).await;
    }
}

/// A report stream stalls, its server dies and comes back, and its new stream stalls too. Then the rest of the old one
/// arrives in the middle of the new one, which nobody may be confused by.
async fn late_report(world: &World, rng: &mut SmallRng, janus: usize, server: usize) {
    let (s, j) = (Node::Server(server), Node::Janus(janus));
    let [a, b] = std::array::from_fn(|_| bytes(rng));
    // Mostly the new one stalls earlier: then nobody has told of what lies between.
    let (old, new) = if rng.random_bool(0.7) { (a.max(b), a.min(b)) } else { (a, b) };
    world.rules.count(|counts| counts.snags += 1);
    world.rules.count(|counts| counts.crashes += 1);
    world.rules.note(format!("reports of {s} to {j} stall after {old} bytes, then after {new}"));
    let stalls = |after| Snag { after, how: Snagged::Stalls };
    world.network.snag(s, j, stalls(old));
    report_anew(world, s, j).await;
    // Meanwhile runs begin and end, as this report doesn't know.
    sleep(Duration::from_millis(rng.random_range(1_000..9_000))).await;
    world.end_server(server, End::Crash { silently: true }).await;
    sleep(Duration::from_millis(rng.random_range(100..2_000))).await;
    world.network.snag(s, j, stalls(new));
    world.start_server(server);
    world.look_closely(Duration::from_millis(rng.random_range(500..5_000))).await;
    while world.network.free_oldest(s, j) {
        world.look_closely(Duration::from_secs(1)).await;
    }
}

/// So many bytes are less than most reports have. The first 900 end with the hello.
fn bytes(rng: &mut SmallRng) -> usize {
    if rng.random_bool(0.2) { rng.random_range(1..900) } else { rng.random_range(900..5_000) }
}

/// Breaks the connections between a server and a janus for a moment, so that a new report begins.
async fn report_anew(world: &World, s: Node, j: Node) {
    world.network.change(j, s, |link| link.cut());
    sleep(Duration::from_millis(50)).await;
    world.network.change(j, s, |link| link.mend());
}

fn take(busy: &Busy, node: Node) -> bool {
    busy.lock().unwrap_or_else(PoisonError::into_inner).insert(node)
}

fn give_back(busy: &Busy, node: Node) {
    busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
}
