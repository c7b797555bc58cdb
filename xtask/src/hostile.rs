//! Bytes of others, valid ones changed in many ways: whatever reads them answers or refuses, quickly and with little memory.
//!
//! Each target gets its committed inputs (`fuzz/corpus/<target>/` of its crate), its own valid ones, and many
//! mutations of both. `JANUS_FUZZ_SEED` repeats a run, `JANUS_FUZZ_ROUNDS` says how many mutations there are, and `JANUS_SOAK` makes
//! it last 10 minutes for each target.

#![allow(clippy::unwrap_used)] // A part of tests.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::noise::Noise;

/// A reader of foreign bytes, as the `fuzz` module of its crate has it.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also of its corpus folder.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&[u8]),
    /// Valid inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Mutations of each target.
const ROUNDS: u64 = 3000;
const SOAK: Duration = Duration::from_secs(600);
/// One input may take so long, on a busy machine and without optimisation.
const SLOWEST: Duration = Duration::from_secs(10);
/// A target may take this much more address space, touched or not.
const MOST_BYTES: u64 = 256 << 20;
/// Where the borders of numbers are, and what tends to be multiplied.
const EXTREMES: &[u64] = &[
    0,
    1,
    2,
    7,
    511,
    512,
    4095,
    4096,
    1 << 20,
    1 << 31,
    1 << 32,
    1 << 40,
    1 << 62,
    1 << 63,
    u64::MAX,
];

/// Changes an input in one way. Places near its beginning are likelier: there the structures are.
fn mutate(bytes: &mut Vec<u8>, chance: &mut Noise) {
    if bytes.is_empty() {
        bytes.push(chance.number() as u8);
        return;
    }
    let reach = match chance.index(3) {
        0 => bytes.len(),
        1 => bytes.len().min(2048),
        _ => bytes.len().min(128),
    };
    let at = chance.index(reach);
    match chance.index(9) {
        0 => bytes[at] ^= 1 << chance.index(8),
        1 => bytes[at] = chance.number() as u8,
        2 | 3 => overwrite(bytes, at, EXTREMES[chance.index(EXTREMES.len())], chance),
        4 => {
            let near = EXTREMES[chance.index(EXTREMES.len())].wrapping_sub(chance.number() % 3);
            overwrite(bytes, at, near, chance);
        }
        5 => bytes.truncate(at),
        6 => {
            let end = (at + chance.index(64)).min(bytes.len());
            bytes[at..end].fill(if chance.index(2) == 0 { 0 } else { 0xff });
        }
        7 => {
            let (len, from) = (chance.index(128), chance.index(bytes.len()));
            let part: Vec<u8> = bytes[from..].iter().take(len).copied().collect();
            let end = (at + part.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&part[..end - at]);
        }
        _ => {
            let more = chance.index(600);
            bytes.resize(bytes.len() + more, chance.number() as u8);
        }
    }
}

/// Puts a number where some field may be, in either order of bytes.
fn overwrite(bytes: &mut [u8], at: usize, value: u64, chance: &mut Noise) {
    let width = [1, 2, 4, 8][chance.index(4)];
    let number = match chance.index(2) {
        0 => value.to_le_bytes()[..width].to_vec(),
        _ => value.to_be_bytes()[8 - width..].to_vec(),
    };
    let at = if chance.index(4) == 0 { at } else { at - at % width };
    let end = (at + width).min(bytes.len());
    bytes[at..end].copy_from_slice(&number[..end - at]);
}

fn corpus_folder(package: &str, target: &Target) -> PathBuf {
    Path::new(package).join("fuzz/corpus").join(target.name)
}

/// The committed inputs and the target's own.
///
/// # Panics
/// When there are none.
pub fn inputs(package: &str, target: &Target) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(corpus_folder(package, target)).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let committed = paths.iter().map(|path| fs::read(path).unwrap());
    let inputs: Vec<_> = committed.chain((target.seeds)()).collect();
    assert!(!inputs.is_empty(), "{} has no inputs", target.name);
    inputs
}

/// Largest address space this process has had.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn run_once(target: &Target, input: &[u8]) {
    let begun = Instant::now();
    (target.run)(input);
    let took = begun.elapsed();
    assert!(took < SLOWEST, "{}: {took:?} for {} bytes", target.name, input.len());
}

/// Runs the target on its inputs and on mutations of them; `package` is the folder of its crate.
///
/// # Panics
/// When an input takes too long or too much memory, or the target panics.
pub fn hammer(package: &str, target: &Target) {
    // One at a time: the memory of the process is measured.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let name = target.name;
    let inputs = inputs(package, target);
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = number("JANUS_FUZZ_SEED");
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | name.len() as u64);
    let most = number("JANUS_FUZZ_ROUNDS").unwrap_or(ROUNDS);
    let soak = std::env::var_os("JANUS_SOAK").is_some();
    println!("{name}: {} inputs, JANUS_FUZZ_SEED={seed}", inputs.len());
    let (mut chance, begun, mut rounds) = (Noise::new(seed), Instant::now(), 0);
    inputs.iter().for_each(|input| run_once(target, input));
    let before = peak_bytes();
    while if soak { begun.elapsed() < SOAK } else { rounds < most } {
        let mut input = inputs[chance.index(inputs.len())].clone();
        (0..=chance.index(4)).for_each(|_| mutate(&mut input, &mut chance));
        run_once(target, &input);
        rounds += 1;
    }
    let grown = peak_bytes() - before;
    println!("{name}: {rounds} mutations in {:?}, {} MiB more", begun.elapsed(), grown >> 20);
    assert!(grown < MOST_BYTES, "{name}: {grown} bytes of address space");
}

/// # Panics
/// When a target has no program for cargo-fuzz.
pub fn assert_programs(package: &str, targets: &[Target]) {
    let folder = Path::new(package).join("fuzz");
    let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    for target in targets {
        let program = folder.join("fuzz_targets").join(format!("{}.rs", target.name));
        let program = fs::read_to_string(program).unwrap();
        assert!(program.contains(&format!("fuzz_{}(", target.name)), "{}", target.name);
        assert!(manifest.contains(&format!("name = \"{}\"", target.name)), "{}", target.name);
    }
}

/// Writes committed inputs of a target anew.
///
/// # Panics
/// When they can't be written.
pub fn write_corpus(package: &str, target: &Target, inputs: Vec<Vec<u8>>) {
    let folder = corpus_folder(package, target);
    fs::create_dir_all(&folder).unwrap();
    for (number, input) in inputs.into_iter().enumerate() {
        fs::write(folder.join(format!("valid-{number}")), input).unwrap();
    }
}

/// A test for each target of `$fuzz`, so that a failure names it.
#[macro_export]
macro_rules! hostile {
    ($fuzz:path; $($name:ident),*) => {
        use $fuzz as of_crate;

        fn targets() -> Vec<$crate::hostile::Target> {
            let targets = of_crate::TARGETS.iter();
            targets
                .map(|one| $crate::hostile::Target { name: one.name, run: one.run, seeds: one.seeds })
                .collect()
        }

        $(#[test]
        fn $name() {
            let target = targets().into_iter().find(|target| target.name == stringify!($name));
            $crate::hostile::hammer(env!("CARGO_MANIFEST_DIR"), &target.unwrap());
        })*

        #[test]
        fn every_target_is_run() {
            let run = [$(stringify!($name)),*];
            let all: Vec<_> = targets().iter().map(|target| target.name).collect();
            assert_eq!(all, run);
        }

        #[test]
        fn every_target_has_a_program_for_cargo_fuzz() {
            $crate::hostile::assert_programs(env!("CARGO_MANIFEST_DIR"), &targets());
        }
    };
}
