use std::{ops::Range, path::PathBuf, thread::JoinHandle};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    nbd::{Limits, NbdMedium, Uri},
    source::Stretch,
};
use janus_proto::ranges::Ranges;

mod protocol;
#[allow(dead_code, unreachable_pub)] // Whole-system tests have the rest.
mod raw;

const SIZE: usize = (5 << 20) + 512;

/// A disk in memory, with holes, and blocks that can't be read.
#[derive(Debug)]
pub(super) struct Disk {
    content: Vec<u8>,
    holes: Ranges,
    bad: Range<u64>,
    is_near: bool,
}

impl Disk {
    fn new() -> Self {
        let mut content = vec![0; SIZE];
        StdRng::seed_from_u64(3).fill(&mut content[..]);
        let holes: Ranges =
            [8192..20_480, 1 << 20..3 << 20, SIZE as u64 - 4608..SIZE as u64].into_iter().collect();
        for hole in holes.iter() {
            content[hole.start as usize..hole.end as usize].fill(0);
        }
        Self { content, holes, bad: 0..0, is_near: false }
    }
}

impl Medium for Disk {
    fn size_bytes(&self) -> u64 {
        self.content.len() as u64
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        if offset < self.bad.end && self.bad.start < end {
            return Err(io::Error::other("this block is lost"));
        }
        buffer.copy_from_slice(&self.content[offset as usize..end as usize]);
        Ok(())
    }

    fn stretch(&self, offset: u64) -> Stretch {
        let next = self.holes.behind(offset).next();
        match next {
            Some(hole) if hole.start <= offset => Stretch { end: hole.end, hole: true },
            Some(hole) => Stretch { end: hole.start, hole: false },
            None => Stretch { end: self.size_bytes(), hole: false },
        }
    }

    fn is_near(&self, _range: Range<u64>) -> bool {
        self.is_near
    }
}

/// A server on a socket of its own, until it is dropped.
pub(super) struct Served {
    pub(super) path: PathBuf,
    pub(super) stop: CancellationToken,
    runs: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Served {
    pub(super) fn new(export: Export) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let stop = CancellationToken::new();
        let (at, ended) = (At::Socket(path.clone()), stop.clone());
        let (open, opened) = std::sync::mpsc::channel();
        let runs = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let door = Door::open(&at).unwrap();
                open.send(()).unwrap();
                Server { export: Arc::new(export), door }.run(&ended).await;
            });
        });
        opened.recv().unwrap();
        Self { path, stop, runs: Some(runs), _folder: folder }
    }

    fn of(disk: Disk) -> Self {
        Self::new(Export::read_only("disk", "a test", Arc::new(disk)))
    }

    fn writable(disk: Disk) -> Self {
        let scratch = tempfile::tempdir().unwrap().keep().join("scratch");
        let overlay = Overlay::create(Arc::new(disk), &scratch).unwrap();
        Self::new(Export::writable("disk", "a test", Arc::new(overlay)))
    }

    fn client(&self) -> NbdMedium {
        NbdMedium::open(Uri::of_socket(self.path.clone()), Limits::default()).unwrap()
    }

    /// Waits until all has ended.
    pub(super) fn end(&mut self) {
        self.stop.cancel();
        if let Some(runs) = self.runs.take() {
            runs.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

fn holes(medium: &dyn Medium) -> Ranges {
    let (mut at, mut found) = (0, Ranges::new());
    while at < medium.size_bytes() {
        let stretch = medium.stretch(at);
        if stretch.hole {
            found.push(at..stretch.end);
        }
        at = stretch.end;
    }
    found
}

#[test]
fn our_own_client_reads_what_is_served_and_its_holes() {
    for is_near in [true, false] {
        let disk = Disk { is_near, ..Disk::new() };
        let (content, expected) = (disk.content.clone(), disk.holes.clone());
        let served = Served::of(disk);
        let client = served.client();
        assert!(client.is_read_only());
        assert_eq!((client.size_bytes(), holes(&client)), (SIZE as u64, expected));
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let (client, content) = (&client, &content);
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(thread);
                    for _ in 0..100 {
                        let start = random.random_range(0..SIZE);
                        let most = if random.random() { 5000 } else { SIZE };
                        let end = random.random_range(start..=SIZE.min(start + most));
                        let mut got = vec![1; end - start];
                        client.read_exact_at(&mut got, start as u64).unwrap();
                        assert!(got == content[start..end], "{start}..{end}");
                    }
                });
            }
        });
    }
}

#[test]
fn lost_blocks_are_errors_and_all_else_is_read() {
    let disk = Disk { bad: 40_960..45_056, ..Disk::new() };
    let content = disk.content.clone();
    let served = Served::of(disk);
    let client = served.client();
    let mut got = vec![0; 4096];
    let error = client.read_exact_at(&mut got, 40_960).unwrap_err().to_string();
    assert!(error.contains("error 5"), "{error}");
    client.read_exact_at(&mut got, 45_056).unwrap();
    assert!(got == content[45_056..49_152]);
}

#[test]
fn the_end_answers_what_is_under_way_and_takes_the_socket_along() {
    let mut served = Served::of(Disk::new());
    let mut idle = raw::Raw::ready(&served.path, true);
    let mut half = raw::Raw::greeted(&served.path);
    let mut busy = raw::Raw::ready(&served.path, false);
    (0..100).for_each(|cookie| busy.request(raw::READ, cookie, 0, 512));
    let began = std::time::Instant::now();
    // A first answer: the requests have arrived.
    let first = busy.simple();
    assert_eq!(first.0, 0);
    busy.take(512).unwrap();
    served.end();
    assert!(began.elapsed() < limits::LEAVING, "{:?}", began.elapsed());
    assert!(!served.path.exists());
    assert!(idle.is_ended() && half.is_ended());
    // Each of the rest is answered or refused.
    for _ in 1..100 {
        match busy.simple().0 {
            0 => drop(busy.take(512).unwrap()),
            errno => assert_eq!(errno, 108),
        }
    }
    assert!(busy.is_ended());
}

#[test]
fn a_client_that_takes_no_answers_cannot_hold_the_end_up() {
    let mut served = Served::of(Disk::new());
    let mut greedy = raw::Raw::ready(&served.path, true);
    (0..64).for_each(|cookie| greedy.request(raw::READ, cookie, 0, 5 << 20));
    std::thread::sleep(std::time::Duration::from_millis(200));
    let began = std::time::Instant::now();
    served.end();
    assert!(began.elapsed() < limits::LEAVING * 2, "{:?}", began.elapsed());
}
