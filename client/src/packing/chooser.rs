//! Which encoding brings most through: pure, from what was seen of the line and of the processor.
//!
//! The line's rate is known only while it is what everything waits for, so the rule is a guess at first: the slower of line
//! and processor, for each encoding. Whether the guess was right is then measured: a step that brings nothing is taken back,
//! since a server that is slow with blocks looks like a slow line, and packing doesn't help it.

use janus_proto::pb::Encoding;

/// From the cheapest on.
pub(super) const ENCODINGS: [Encoding; 3] = [Encoding::None, Encoding::Lz4, Encoding::Zstd];
/// A line as fast as this is never worth packing for: unpacking and checking cost the server as much.
const FAST_LINE: f64 = 200.0 * MIB;
/// One that looks no faster than this is worth packing for at once.
const SLOW_LINE: f64 = 30.0 * MIB;
/// What a byte costs besides packing: reading, hashing, TLS. Measured at about a second for a GiB.
const OTHER_SECONDS: f64 = 1.0 / (1000.0 * MIB);
/// A dearer encoding must promise this much more.
const PROMISE: f64 = 1.2;
/// And keep this much.
const KEPT: f64 = 1.05;
/// A cheaper one must keep this much.
const KEPT_CHEAPER: f64 = 0.9;
/// The line is what is waited for when this share of the time goes there.
const WAITING: f64 = 0.5;
/// How fast a line of unknown rate is taken to be, compared with what goes through.
const ROOM: f64 = 1.5;
/// Stretches without a trial after one that failed, at first and at most.
const PAUSE: (u32, u32) = (8, 256);

const MIB: f64 = (1 << 20) as f64;

/// What an encoding does to the data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// Of one thread, for each byte.
    pub seconds: f64,
    /// What is left of a byte.
    pub share: f64,
}

/// What happened for a while.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stretch {
    /// Bytes of data for each second, before packing.
    pub raw_rate: f64,
    /// Share of the time in which the line was waited for.
    pub waiting: f64,
    /// Bytes for each second that went to the line.
    pub line_rate: f64,
}

#[derive(Debug, Clone, Copy)]
struct Trial {
    from: usize,
    raw_rate: f64,
}

/// Chooses, stretch by stretch.
#[derive(Debug)]
pub(super) struct Chooser {
    costs: [Cost; 3],
    allowed: [bool; 3],
    cores: f64,
    current: usize,
    line: f64,
    trial: Option<Trial>,
    pause: u32,
    next_pause: u32,
    was_slow: bool,
    has_decided: bool,
}

impl Chooser {
    pub(super) fn new(cores: usize) -> Self {
        // Of text and programs, until it is known.
        let cost =
            |mib_per_second: f64, share| Cost { seconds: 1.0 / (mib_per_second * MIB), share };
        Self {
            costs: [cost(1e6, 1.0), cost(700.0, 0.6), cost(350.0, 0.45)],
            allowed: [true; 3],
            cores: cores.max(1) as f64,
            current: 0,
            line: 0.0,
            trial: None,
            pause: 0,
            next_pause: PAUSE.0,
            was_slow: false,
            has_decided: false,
        }
    }

    /// Another line, which brought so many bytes a second through when it was used last.
    pub(super) fn expect_line(&mut self, rate: Option<f64>) {
        (self.trial, self.was_slow, self.has_decided) = (None, false, false);
        self.line = rate.unwrap_or_default();
        if rate.is_some() {
            self.current = self.best();
        }
    }

    /// What the line brings through, as far as that was seen. Of one that nothing waits for, at least so much. `None` also when it is
    /// waited for and packing doesn't help: then a slow server may only look like a slow line.
    pub(super) fn line(&self) -> Option<f64> {
        let is_doubtful = self.was_slow && self.current == 0;
        (self.has_decided && !is_doubtful).then_some(self.line)
    }

    /// True while nothing at all is known of the line.
    pub(super) fn is_new_to_line(&self) -> bool {
        !self.has_decided && self.line == 0.0
    }

    pub(super) fn current(&self) -> Encoding {
        ENCODINGS[self.current]
    }

    /// Which encodings the server can read.
    pub(super) fn allow(&mut self, known: &[Encoding]) {
        self.allowed = ENCODINGS.map(|encoding| known.contains(&encoding));
        self.allowed[0] = true;
        if !self.allowed[self.current] {
            (self.current, self.trial) = (0, None);
        }
    }

    /// A piece was packed, or a part of it for trying. Later ones count for more.
    pub(super) fn note(&mut self, encoding: Encoding, raw: usize, packed: usize, seconds: f64) {
        let Some(at) = ENCODINGS.iter().position(|known| *known == encoding) else { return };
        if raw == 0 || at == 0 {
            return;
        }
        const WEIGHT: f64 = 0.2;
        let cost = &mut self.costs[at];
        let mix = |old: &mut f64, new: f64| *old += WEIGHT * (new - *old);
        mix(&mut cost.seconds, seconds / raw as f64);
        mix(&mut cost.share, (packed as f64 / raw as f64).min(1.0));
    }

    /// Decides after a stretch.
    pub(super) fn decide(&mut self, seen: Stretch) -> Encoding {
        self.has_decided = true;
        let is_slow = seen.waiting >= WAITING && seen.line_rate > 0.0;
        let was_slow = std::mem::replace(&mut self.was_slow, is_slow);
        if let Some(trial) = self.trial.take() {
            let kept = if trial.from < self.current { KEPT } else { KEPT_CHEAPER };
            if seen.raw_rate < kept * trial.raw_rate {
                // Queues and bursts may have made the rate before look better than it was: the step back is on trial, too.
                self.trial = Some(Trial { from: self.current, raw_rate: seen.raw_rate });
                self.current = trial.from;
                self.pause = self.next_pause;
                self.next_pause = (self.next_pause * 2).min(PAUSE.1);
                return self.current();
            }
        }
        self.line = match is_slow {
            true => seen.line_rate,
            // Not what is waited for: it may be as fast as it likes.
            false => self.line.max(seen.raw_rate * self.costs[self.current].share * ROOM),
        };
        if self.pause > 0 {
            self.pause -= 1;
            return self.current();
        }
        let best = self.best();
        let is_cheaper = best < self.current;
        // What doesn't wait for the line has no use for a dearer one. At first the line fills buffers and looks faster than it
        // is: that is no rate to compare with, but a line that looks slow even so is slow.
        let is_sure = was_slow || seen.line_rate < SLOW_LINE;
        if best != self.current && (is_slow && is_sure || is_cheaper) {
            let trial = Trial { from: self.current, raw_rate: seen.raw_rate };
            self.trial = (was_slow || is_cheaper).then_some(trial);
            self.current = best;
        }
        self.current()
    }

    fn best(&self) -> usize {
        if self.line >= FAST_LINE {
            return 0;
        }
        let mut best = 0;
        for at in (1..ENCODINGS.len()).filter(|at| self.allowed[*at]) {
            if self.rate(at) > PROMISE * self.rate(best) {
                best = at;
            }
        }
        best
    }

    /// What goes through: the slower of line and processor.
    fn rate(&self, at: usize) -> f64 {
        let Cost { seconds, share } = self.costs[at];
        let processor = self.cores / (OTHER_SECONDS + seconds);
        (self.line / share.max(1e-3)).min(processor)
    }
}

/// For who can't measure on: what a line of so many bytes for each second is worth.
pub fn for_line(bytes_per_second: f64) -> Encoding {
    match bytes_per_second / MIB {
        rate if rate >= 200.0 => Encoding::None,
        rate if rate >= 60.0 => Encoding::Lz4,
        _ => Encoding::Zstd,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line, a processor and a server, as they truly are. MiB for each second.
    struct World {
        line: f64,
        server: f64,
        pack: [f64; 3],
        share: [f64; 3],
    }

    const TEXT: [f64; 3] = [1.0, 0.6, 0.45];
    const NOISE: [f64; 3] = [1.0, 1.0, 1.0];
    const CORES: f64 = 2.0;

    impl World {
        fn new(line: f64) -> Self {
            Self { line, server: 1e6, pack: [1e9, 700.0, 350.0], share: TEXT }
        }

        fn stretch(&self, at: usize) -> Stretch {
            let line = self.line / self.share[at];
            let processor = CORES / (1.0 / 1000.0 + 1.0 / self.pack[at]);
            let rate = line.min(processor).min(self.server);
            let waits = processor > 1.05 * rate;
            let line_rate = if waits { rate * self.share[at] * MIB } else { 0.0 };
            Stretch { raw_rate: rate * MIB, waiting: if waits { 0.9 } else { 0.0 }, line_rate }
        }

        /// Plays so many stretches; returns how often each encoding was used.
        fn play(&self, chooser: &mut Chooser, stretches: usize) -> [usize; 3] {
            let mut used = [0; 3];
            for _ in 0..stretches {
                for (at, encoding) in ENCODINGS.into_iter().enumerate().skip(1) {
                    let raw = 1 << 20;
                    let packed = (raw as f64 * self.share[at]) as usize;
                    // A stretch is several messages.
                    for _ in 0..4 {
                        chooser.note(encoding, raw, packed, 1.0 / self.pack[at]);
                    }
                }
                used[chooser.current] += 1;
                chooser.decide(self.stretch(chooser.current));
            }
            used
        }
    }

    fn settled(world: &World) -> [usize; 3] {
        let mut chooser = Chooser::new(CORES as usize);
        world.play(&mut chooser, 100)
    }

    #[test]
    fn thin_lines_get_the_best_encoding_and_fast_ones_none() {
        for (line, expected) in [(0.1, 2), (2.4, 2), (12.0, 2), (100.0, 2), (210.0, 0), (2000.0, 0)]
        {
            let used = settled(&World::new(line));
            println!("{line} MiB/s: {used:?}");
            assert!(used[expected] >= 98, "{line} MiB/s: {used:?}");
        }
    }

    #[test]
    fn a_slow_processor_gets_the_cheaper_encoding() {
        let world = World { pack: [1e9, 200.0, 30.0], ..World::new(60.0) };
        let used = settled(&world);
        assert!(used[1] >= 80, "{used:?}");
    }

    #[test]
    fn what_does_not_shrink_is_left_alone() {
        let used = settled(&World { share: NOISE, ..World::new(2.4) });
        assert!(used[0] >= 90, "{used:?}");
    }

    #[test]
    fn a_slow_server_is_no_slow_line_for_long() {
        let used = settled(&World { server: 120.0, ..World::new(1000.0) });
        assert!(used[0] >= 90, "{used:?}");
    }

    #[test]
    fn it_follows_a_line_that_changes() {
        let mut chooser = Chooser::new(CORES as usize);
        World::new(1000.0).play(&mut chooser, 20);
        assert_eq!(chooser.current(), Encoding::None);
        World::new(2.4).play(&mut chooser, 20);
        assert_eq!(chooser.current(), Encoding::Zstd);
        let used = World::new(1000.0).play(&mut chooser, 30);
        assert_eq!(chooser.current(), Encoding::None, "{used:?}");
    }

    #[test]
    fn what_a_line_was_is_where_the_next_backup_begins() {
        let mut chooser = Chooser::new(CORES as usize);
        assert_eq!(chooser.line(), None);
        World::new(2.4).play(&mut chooser, 20);
        let thin = chooser.line();
        let begin = |rate| {
            let mut chooser = Chooser::new(CORES as usize);
            chooser.expect_line(rate);
            assert_eq!(chooser.line(), None, "nothing was seen yet");
            chooser
        };
        assert_eq!(begin(thin).current(), Encoding::Zstd);
        assert_eq!(World::new(2.4).play(&mut begin(thin), 20), [0, 0, 20]);
        let used = World::new(1000.0).play(&mut begin(thin), 30);
        assert!(used[0] >= 25, "at home again: {used:?}");
        let used = World { share: NOISE, ..World::new(2.4) }.play(&mut begin(thin), 30);
        assert!(used[0] >= 25, "what doesn't shrink: {used:?}");

        let mut slow_server = Chooser::new(CORES as usize);
        World { server: 120.0, ..World::new(1000.0) }.play(&mut slow_server, 100);
        assert_eq!(slow_server.line(), None);

        World::new(1000.0).play(&mut chooser, 30);
        let fast = chooser.line();
        assert_eq!(begin(fast).current(), Encoding::None);
        let used = World::new(2.4).play(&mut begin(fast), 20);
        assert!(used[2] >= 16, "away from home: {used:?}");
    }

    #[test]
    fn only_what_the_server_reads_is_chosen() {
        let mut chooser = Chooser::new(2);
        chooser.allow(&[Encoding::None, Encoding::Lz4]);
        let used = World::new(2.4).play(&mut chooser, 20);
        assert_eq!(used, [1, 19, 0]);
        chooser.allow(&[]);
        assert_eq!(chooser.current(), Encoding::None);
    }
}
