//! Repeatable pseudo-random bytes: a failed run can be repeated from the seed it printed.

/// A small generator (splitmix64, S. Vigna): good enough for test data, not for secrets.
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// The generator of `seed`: the same seed gives the same bytes.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed that differs from run to run; print it.
    pub fn fresh_seed() -> u64 {
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32).number()
    }

    /// The next 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`; 0 when `limit` is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        if limit == 0 { 0 } else { self.number() % limit }
    }

    /// A place in a list of so many; 0 when it is empty.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            piece.copy_from_slice(&self.number().to_le_bytes()[..piece.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_bytes() {
        let (mut first, mut second) = ([0; 33], [0; 33]);
        Noise::new(7).fill(&mut first);
        Noise::new(7).fill(&mut second);
        assert_eq!(first, second);
        assert_ne!(first, [0; 33]);
    }
}
