use super::*;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A disk in memory.
#[derive(Debug)]
struct Memory(Vec<u8>);

impl Medium for Memory {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }

    fn stretch(&self, _offset: u64) -> Stretch {
        Stretch { end: self.size_bytes(), hole: false }
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut noise = vec![0; len];
    StdRng::seed_from_u64(5).fill(&mut noise[..]);
    noise
}

fn read(overlay: &Overlay) -> Vec<u8> {
    let mut all = vec![0; overlay.size_bytes() as usize];
    overlay.read_exact_at(&mut all, 0).unwrap();
    all
}

#[derive(Debug, Clone)]
enum Step {
    Write(u8),
    Zero(bool),
    Discard,
}

fn steps() -> impl Strategy<Value = Vec<(Step, usize, usize)>> {
    let step = prop_oneof![
        any::<u8>().prop_map(Step::Write),
        any::<bool>().prop_map(Step::Zero),
        Just(Step::Discard)
    ];
    prop::collection::vec((step, 0usize..50_000, 1usize..20_000), 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read_and_all_else_is_as_it_was(steps in steps(), odd in 0usize..3) {
        // Also a last block that is short.
        let mut model = noise(40_960 + odd * 512);
        let size = model.len();
        let folder = tempfile::tempdir().unwrap();
        let overlay = Overlay::create(Arc::new(Memory(model.clone())), &folder.path().join("s")).unwrap();
        for (step, start, len) in steps {
            let start = start % size;
            let end = (start + len).min(size);
            let range = start as u64..end as u64;
            match step {
                Step::Write(byte) => {
                    overlay.write(&vec![byte; end - start], range.start).unwrap();
                    model[start..end].fill(byte);
                }
                Step::Zero(may_punch) => {
                    overlay.zero(range, may_punch).unwrap();
                    model[start..end].fill(0);
                }
                Step::Discard => {
                    overlay.discard(range).unwrap();
                    let whole = start.next_multiple_of(4096);
                    let stop = if end == size { end } else { end / 4096 * 4096 };
                    if whole < stop {
                        model[whole..stop].fill(0);
                    }
                }
            }
            prop_assert!(read(&overlay) == model);
        }
        let mut at = 0;
        while at < size as u64 {
            let stretch = overlay.stretch(at);
            prop_assert!(stretch.end > at && stretch.end <= size as u64);
            if stretch.hole {
                prop_assert!(model[at as usize..stretch.end as usize].iter().all(|byte| *byte == 0));
            }
            at = stretch.end;
        }
    }
}

#[test]
fn parts_of_one_block_written_at_once_all_stay() {
    let content = noise(64 * 4096);
    let folder = tempfile::tempdir().unwrap();
    let overlay =
        Overlay::create(Arc::new(Memory(content.clone())), &folder.path().join("s")).unwrap();
    let mut model = content;
    // Eight writers, each with its eighth of every block.
    std::thread::scope(|scope| {
        for part in 0..8 {
            let overlay = &overlay;
            scope.spawn(move || {
                for block in 0..64 {
                    overlay.write(&[part as u8; 512], block * 4096 + part * 512).unwrap();
                }
            });
        }
    });
    for (at, byte) in model.iter_mut().enumerate() {
        *byte = (at % 4096 / 512) as u8;
    }
    assert!(read(&overlay) == model);
}

#[test]
fn a_scratch_file_is_new_private_sparse_and_goes_at_the_end() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scratch");
    let base = Arc::new(Memory(vec![7; 16 << 20]));
    let overlay = Overlay::create(base.clone(), &path).unwrap();
    assert!(matches!(Overlay::create(base, &path), Err(OverlayError::Exists { .. })));
    overlay.write(&[1; 8192], 4 << 20).unwrap();
    overlay.zero(8 << 20..16 << 20, true).unwrap();
    overlay.flush().unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (16 << 20, 0o600));
    assert!(meta.blocks() * 512 <= 64 << 10, "{} bytes", meta.blocks() * 512);
    assert_eq!(overlay.stretch(8 << 20), Stretch { end: 16 << 20, hole: true });
    drop(overlay);
    assert!(!path.exists());
}
