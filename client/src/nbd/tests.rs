//! The client against servers of our own: one that does right in all the ways it may, and one that doesn't.

use std::{
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use janus_proto::ranges::Ranges;
use rand::{Rng, SeedableRng, rngs::StdRng};

use self::server::{Behaviour, Script, serve};
use super::{Limits, NbdError, NbdMedium, Uri, bitmap::QemuBitmap};
use crate::{
    journal::{Distrust, Journal},
    source::medium::Medium,
};

mod server;

const LIMITS: Limits =
    Limits { patience: Duration::from_millis(300), reconnect: Duration::from_millis(300) };

/// A server for one test; its threads end with their connections.
struct Served {
    folder: tempfile::TempDir,
    connections: Arc<AtomicU32>,
}

impl Served {
    /// Serves every connection as `behaviour` says, which gets its number.
    fn new(behaviour: impl Fn(u32) -> Behaviour + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let connections = Arc::new(AtomicU32::new(0));
        let count = connections.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let Ok(socket) = socket else { return };
                let behaviour = behaviour(count.fetch_add(1, Ordering::SeqCst));
                std::thread::spawn(move || {
                    // A client that ends the connection is nothing to speak of.
                    let _ = serve(&socket, &behaviour);
                });
            }
        });
        Self { folder, connections }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn open(&self) -> Result<NbdMedium, NbdError> {
        NbdMedium::open(Uri::of_socket(self.socket()), LIMITS)
    }
}

fn read(medium: &NbdMedium, range: std::ops::Range<u64>) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0xee; (range.end - range.start) as usize];
    medium.read_exact_at(&mut buffer, range.start)?;
    Ok(buffer)
}

#[test]
fn threads_read_at_once_and_each_gets_its_own_bytes() {
    for structured in [true, false] {
        let right = Behaviour { structured, shuffles: true, ..Behaviour::default() };
        let content = right.content.clone();
        let served = Served::new(move |_| right.clone());
        let medium = served.open().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (medium, content) = (&medium, &content);
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(thread);
                    for _ in 0..200 {
                        let start = random.random_range(0..content.len());
                        let end = random.random_range(start..=content.len());
                        let got = read(medium, start as u64..end as u64).unwrap();
                        assert!(got == content[start..end], "{start}..{end}");
                    }
                });
            }
        });
        assert_eq!(served.connections.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn requests_keep_to_the_units_and_limits_of_the_server() {
    for (min, max) in [(1, 4096), (512, 512), (4096, 8192), (512, 1 << 25)] {
        let mut picky = Behaviour { units: Some((min, max)), ..Behaviour::default() };
        picky.content = picky.content[..24 * 4096].into();
        let content = picky.content.clone();
        let served = Served::new(move |_| picky.clone());
        let medium = served.open().unwrap();
        for range in [0..1, 511..513, 4000..20_000, content.len() - 5..content.len()] {
            let got = read(&medium, range.start as u64..range.end as u64).unwrap();
            assert!(got == content[range.clone()], "{min} {max} {range:?}");
        }
        assert!(read(&medium, content.len() as u64 - 1..content.len() as u64 + 1).is_err());
    }
    let odd = |units| {
        let served = Served::new(move |_| Behaviour { units: Some(units), ..Behaviour::default() });
        served.open().unwrap_err().to_string()
    };
    for units in [(0, 4096), (3, 4096), (8192, 4096), (1 << 17, 1 << 25)] {
        assert!(odd(units).contains("block sizes"), "{units:?}");
    }
    // A last part that can't be read would be left out.
    assert!(odd((65_536, 1 << 20)).contains("units of 65536"));
}

#[test]
fn only_holes_that_read_as_zeros_are_holes() {
    let right = Behaviour::default();
    let (content, holes) = (right.content.clone(), right.holes.clone());
    let served = Served::new(move |_| right.clone());
    let medium = served.open().unwrap();
    let (mut at, mut found) = (0, Ranges::new());
    while at < medium.size_bytes() {
        let stretch = medium.stretch(at);
        assert!(stretch.end > at && stretch.end <= medium.size_bytes());
        if stretch.hole {
            assert!(content[at as usize..stretch.end as usize].iter().all(|byte| *byte == 0));
            found.push(at..stretch.end);
        }
        at = stretch.end;
    }
    assert_eq!(found, holes);
}

#[test]
fn a_bitmap_of_the_cursor_tells_what_changed_and_all_else_is_distrusted() {
    let right = Behaviour::default();
    let (dirty, size) = (right.dirty.clone(), right.content.len() as u64);
    let served = Served::new(move |_| right.clone());
    let medium = served.open().unwrap();
    assert_eq!(medium.bitmaps().collect::<Vec<_>>(), [server::BITMAP]);
    let journal = |begun| QemuBitmap { medium: &medium, begun, bad: &[] };
    let first = journal(Some(server::BITMAP)).changes(None);
    assert_eq!(first.changes, Err(Distrust::NoCursor));
    let cursor = first.next.unwrap();
    let then = journal(None).changes(Some(&cursor));
    assert_eq!((then.changes.unwrap().changed, then.next), (dirty, None));

    let other = "janus-00000000000000000000000000000000";
    let gone = journal(Some(other)).changes(None).next.unwrap();
    let gone = journal(None).changes(Some(&gone)).changes;
    assert_eq!(gone, Err(Distrust::BitmapGone { name: other.into() }));
    let text = String::from_utf8(cursor.clone()).unwrap();
    let resized = text.replace(&size.to_string(), "512");
    let resized = journal(None).changes(Some(resized.as_bytes())).changes;
    assert_eq!(resized, Err(Distrust::Resized { old: 512, new: size }));
    for damaged in
        [&b""[..], b"{}", &cursor[1..], text.replace("\"format\":1", "\"format\":2").as_bytes()]
    {
        assert_eq!(journal(None).changes(Some(damaged)).changes, Err(Distrust::NoCursor));
    }
    let bad = [(server::BITMAP.to_owned(), Distrust::Inconsistent { name: server::BITMAP.into() })];
    let journal = QemuBitmap { medium: &medium, begun: None, bad: &bad };
    assert_eq!(journal.changes(Some(&cursor)).changes, Err(bad[0].1.clone()));

    let silent = Behaviour { script: Script::NoStatus, ..Behaviour::default() };
    let served = Served::new(move |_| silent.clone());
    let medium = served.open().unwrap();
    let journal = QemuBitmap { medium: &medium, begun: None, bad: &[] };
    let unreadable = journal.changes(Some(&cursor)).changes.unwrap_err();
    assert!(matches!(unreadable, Distrust::Unreadable { .. }), "{unreadable}");
    println!("full compare: {unreadable}");
}

#[test]
fn a_broken_link_is_made_anew_unless_the_export_is_another_then() {
    let breaks = |number: u32| match number {
        0..2 => Behaviour { script: Script::Cut(3000), ..Behaviour::default() },
        _ => Behaviour::default(),
    };
    let served = Served::new(breaks);
    let medium = served.open().unwrap();
    assert!(read(&medium, 0..60_000).unwrap() == Behaviour::default().content[..60_000]);
    assert_eq!(served.connections.load(Ordering::SeqCst), 3);

    let shrinks = |number: u32| match number {
        0 => Behaviour { script: Script::Cut(3000), ..Behaviour::default() },
        _ => Behaviour { content: vec![0; 512].into(), ..Behaviour::default() },
    };
    let served = Served::new(shrinks);
    let error = read(&served.open().unwrap(), 0..60_000).unwrap_err().to_string();
    assert!(error.contains("and has 512"), "{error}");
}

#[test]
fn a_server_that_says_nothing_or_drips_is_left_in_time() {
    for script in [Script::Mute(0), Script::Mute(40), Script::Mute(1200), Script::Drip] {
        let began = Instant::now();
        let served = Served::new(move |_| Behaviour { script, ..Behaviour::default() });
        let error = match served.open() {
            Ok(medium) => read(&medium, 0..60_000).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("does not answer"), "{script:?}: {error}");
        assert!(began.elapsed() < Duration::from_secs(5), "{script:?}: {:?}", began.elapsed());
    }
}

#[test]
fn endless_options_end() {
    let served = Served::new(|_| Behaviour { script: Script::Endless, ..Behaviour::default() });
    let error = served.open().unwrap_err().to_string();
    assert!(error.contains("no end"), "{error}");
}

/// Replay one with `NBD_SEED=N`.
#[test]
fn whatever_a_server_sends_ends_in_the_data_or_an_error() {
    let one = std::env::var("NBD_SEED").ok().map(|seed| seed.parse().unwrap());
    let count = if std::env::var_os("JANUS_SOAK").is_some() { 5_000 } else { 300 };
    let seeds = one.map_or(0..count, |seed| seed..seed + 1);
    let (mut right, mut refused) = (0, 0);
    println!(
        "seeds {seeds:?}; one again: NBD_SEED=N cargo test -p janus-client nbd::tests::whatever"
    );
    for seed in seeds {
        let began = Instant::now();
        let outcome = std::panic::catch_unwind(|| mutated(seed));
        let outcome = outcome.unwrap_or_else(|_| panic!("seed {seed}"));
        assert!(began.elapsed() < Duration::from_secs(10), "seed {seed}: {:?}", began.elapsed());
        match outcome {
            Ok(()) => right += 1,
            Err(_) => refused += 1,
        }
    }
    println!("{right} with all data right, {refused} with an error");
    assert!(one.is_some() || (right > 10 && refused > 100), "{right} right, {refused} refused");
}

/// Every connection has one of its messages' heads changed, cut, doubled or left out.
fn mutated(seed: u64) -> Result<(), String> {
    let behaviour = move |number: u32| {
        let mut random = StdRng::seed_from_u64(seed ^ (u64::from(number) << 40));
        Behaviour {
            structured: random.random_bool(0.8),
            script: Script::Mutate { at: random.random_range(0..40), seed: random.random() },
            ..Behaviour::default()
        }
    };
    let served = Served::new(behaviour);
    let medium = served.open().map_err(|error| error.to_string())?;
    let content = Behaviour::default().content;
    let mut result = Ok(());
    let size = medium.size_bytes();
    let mut at = 0;
    for _ in 0..20 {
        let stretch = medium.stretch(at);
        assert!(size == 0 || stretch.end > at, "{at}: {stretch:?}");
        assert!(stretch.end <= size);
        at = if stretch.end < size { stretch.end } else { 0 };
    }
    let names: Vec<String> = medium.bitmaps().map(str::to_owned).collect();
    for name in names {
        if let Ok(dirty) = medium.dirty(&name) {
            assert!(dirty.iter().all(|range| range.end <= size));
        }
    }
    for start in (0..content.len() as u64).step_by(20_000) {
        let range = start..(start + 20_000).min(content.len() as u64);
        match read(&medium, range.clone()) {
            Ok(data) => {
                let right = &content[range.start as usize..range.end as usize];
                assert!(data == right, "wrong data at {range:?}");
            }
            Err(error) => result = Err(error.to_string()),
        }
    }
    result
}
