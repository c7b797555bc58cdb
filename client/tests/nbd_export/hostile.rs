//! Strangers at the socket of a real export: they get errors or are left, and others are served. What each of them may
//! do wrong is tried one by one in the unit tests of `export`; here they come all together.

use rand::{Rng, SeedableRng, rngs::StdRng};
use xtask::disk;

use crate::{
    raw::{READ, Raw, WRITE},
    scene::{Scene, peak_mib, run, text},
};

/// Replay one with `NBD_SEED=N`.
#[test]
fn strangers_cost_little_and_never_the_others() {
    let scene = Scene::new(&["server-a"]);
    scene.backup();
    let scratch = scene.path("scratch");
    let export = scene.serve("vm", &["--write", text(&scratch)]);
    let one = std::env::var("NBD_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let count = if std::env::var_os("JANUS_SOAK").is_some() { 20_000 } else { 400 };
    let seeds = one.map_or(0..count, |seed| seed..seed + 1);
    println!("seeds {seeds:?}; one again: NBD_SEED=N");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (seeds, socket) = (seeds.clone(), &export.socket);
            scope.spawn(move || {
                for seed in seeds.skip(thread).step_by(4) {
                    stranger(socket, seed);
                }
            });
        }
        // Meanwhile somebody copies the disk.
        let copy = scene.path("copy");
        for _ in 0..3 {
            run("nbdcopy", &["--connections=1", &export.uri, text(&copy)]);
            disk::compare(&scene.image, &copy).unwrap();
        }
    });
    let peak = peak_mib(export.pid());
    println!("{count} strangers, memory at most {peak} MiB");
    assert!(peak < 700, "{peak} MiB");
    let log = export.log();
    assert!(!log.contains("panicked"), "{log}");
    export.end();
}

/// Sends what a client may send and then something else; writes nothing whole.
fn stranger(socket: &std::path::Path, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let noise = |random: &mut StdRng, most: usize| {
        let mut bytes = vec![0; random.random_range(0..most)];
        random.fill(&mut bytes[..]);
        bytes
    };
    // The server may leave in the middle of what is sent.
    let mut raw = Raw::connect(socket);
    let send = |raw: &mut Raw, bytes: &[u8]| {
        use std::io::Write;
        let _ = raw.socket.write_all(bytes);
    };
    match random.random_range(0..8) {
        0 => send(&mut raw, &noise(&mut random, 4096)),
        1 => {}
        2 => {
            send(&mut raw, &3u32.to_be_bytes());
            send(&mut raw, &[&b"IHAVEOPT"[..], &noise(&mut random, 200)].concat());
        }
        3 => {
            send(&mut raw, &3u32.to_be_bytes());
            let head = [random.random_range(0..12u32), random.random()].map(u32::to_be_bytes);
            send(&mut raw, &[b"IHAVEOPT", &head.concat()[..], &noise(&mut random, 9000)].concat());
        }
        4 => {
            drop(raw);
            let mut raw = Raw::ready(socket, random.random());
            // Refused, too large, past the end; then half a request.
            raw.request(random.random_range(8..99), 1, random.random(), random.random());
            raw.request(READ, 2, random.random(), random.random());
            send(&mut raw, &0x2560_9513u32.to_be_bytes());
        }
        5 => {
            drop(raw);
            let mut raw = Raw::ready(socket, random.random());
            let len = random.random_range(1..1 << 20);
            raw.request(WRITE, 1, 0, len);
            send(&mut raw, &noise(&mut random, len as usize));
        }
        6 => {
            drop(raw);
            let mut raw = Raw::ready(socket, random.random());
            // Answers that nobody takes.
            (0..32).for_each(|cookie| raw.request(READ, cookie, 0, 32 << 20));
        }
        _ => {
            drop(raw);
            let mut raw = Raw::ready(socket, random.random());
            raw.request_with(random.random_range(0..16), random.random_range(3..8), 1, 0, 0);
            send(&mut raw, &noise(&mut random, 300));
        }
    }
}
