//! What sealing costs one core, beside hashing: `cargo xtask bench --seal` runs it.
//!
//! As in a backup: a MiB at a time, which is in the cache of the processor when it is hashed. Processor time counts, so that what else
//! runs does not. Beside it the crate `xts-mode`, which
//! encrypts unit after unit with the same cipher.

#![allow(clippy::unwrap_used)] // A measurement that can't be made has no result to go on with.

use std::{fs, hint::black_box, path::PathBuf, sync::Arc};

use aes::{Aes256, cipher::KeyInit};
use janus_client::seal::{MasterKey, Sealer};
use janus_proto::{hash::hash_blocks, ids::BLOCK_BYTES};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use xts_mode::{Xts128, get_tweak_default};

const PIECE_BYTES: usize = 1 << 20;
const BLOCK: usize = BLOCK_BYTES as usize;

/// Arguments.
#[derive(clap::Parser)]
struct Args {
    /// How much goes through each
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// How often each is measured; the best counts
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Not used: nothing is written but the figures
    #[arg(long)]
    place: Option<PathBuf>,
    /// Where to write the figures
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() {
    let args: Args = clap::Parser::parse();
    let key = Arc::new(MasterKey::generate().unwrap());
    let sealer = Sealer::new(key, "alice/web1".parse().unwrap());
    let seal = sealer.disk(&"disk".parse().unwrap(), 1 << 40).unwrap();
    let other = Xts128::new(Aes256::new(&[1; 32].into()), Aes256::new(&[2; 32].into()));
    let mut hashes = Vec::with_capacity(PIECE_BYTES / BLOCK);
    let mut hash = |piece: &[u8]| {
        hashes.clear();
        hash_blocks(piece, &mut hashes);
        black_box(hashes.last());
    };
    let mut rows = Vec::new();
    let mut row = |what: &str, work: &mut dyn FnMut(u64, &mut [u8])| {
        let rates = (0..args.rounds).map(|_| rate(args.mib, &mut *work));
        let best = rates.fold(0.0, f64::max);
        println!("{what}: {best:.0} MiB/s on one core");
        rows.push(json!({ "what": what, "mib_per_second": best }));
    };
    row("hash", &mut |_, piece| hash(piece));
    row("seal", &mut |offset, piece| seal.seal(offset, piece));
    row("seal and hash", &mut |offset, piece| {
        seal.seal(offset, piece);
        hash(piece);
    });
    row("open", &mut |offset, piece| seal.open(offset, piece));
    row("xts-mode, unit after unit", &mut |offset, piece| {
        let first = u128::from(offset / BLOCK_BYTES);
        other.encrypt_area(piece, BLOCK, first, get_tweak_default);
    });
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&Value::Array(rows)).unwrap()).unwrap();
    }
}

fn rate(mib: u64, work: &mut dyn FnMut(u64, &mut [u8])) -> f64 {
    let mut piece: Vec<u8> = (0..PIECE_BYTES).map(|at| (at * 31 + at / 4096) as u8 | 1).collect();
    let begun = processor_seconds();
    for at in 0..mib {
        work(at * PIECE_BYTES as u64, &mut piece);
    }
    black_box(&piece);
    mib as f64 / (processor_seconds() - begun)
}

/// Of this thread.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
