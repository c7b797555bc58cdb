//! AES-256 in XTS mode (IEEE 1619-2018), for data of whole units of 16 bytes: our blocks have 4096, a short last one a multiple of
//! 512, so that nothing is stolen here.
//!
//! Our own, since the crate `xts-mode` (0.6) encrypts unit after unit, and a processor can have several in work: 3230 MiB/s on one core
//! instead of 254. The cipher itself is that of `aes`; the vectors are those of the standard, and a test compares with `xts-mode`.

use aes::{
    Aes256, Block,
    cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit},
};

/// Bytes of a key for each of both ciphers.
pub(super) const KEY_BYTES: usize = 32;
/// Units that the cipher gets at once.
const TOGETHER: usize = 64;

/// Both ciphers; their round keys are wiped when it goes.
pub(super) struct Xts {
    data: Aes256,
    tweak: Aes256,
}

impl Xts {
    pub(super) fn new(data: &[u8; KEY_BYTES], tweak: &[u8; KEY_BYTES]) -> Self {
        Self { data: Aes256::new(data.into()), tweak: Aes256::new(tweak.into()) }
    }

    /// Encrypts a block by its number.
    pub(super) fn encrypt(&self, number: u64, bytes: &mut [u8]) {
        self.apply(number, bytes, |units| self.data.encrypt_blocks(units));
    }

    /// Decrypts it.
    pub(super) fn decrypt(&self, number: u64, bytes: &mut [u8]) {
        self.apply(number, bytes, |units| self.data.decrypt_blocks(units));
    }

    fn apply(&self, number: u64, bytes: &mut [u8], cipher: impl Fn(&mut [Block])) {
        let mut first = Block::from(u128::from(number).to_le_bytes());
        self.tweak.encrypt_block(&mut first);
        let mut tweak = u128::from_le_bytes(first.0);
        let (units, rest) = Block::slice_as_chunks_mut(bytes);
        debug_assert!(rest.is_empty(), "sizes are checked where the disk's key is made");
        let mut tweaks = [0; TOGETHER];
        for group in units.chunks_mut(TOGETHER) {
            for (unit, own) in group.iter_mut().zip(&mut tweaks) {
                *own = tweak;
                xor(unit, tweak);
                tweak = doubled(tweak);
            }
            cipher(group);
            group.iter_mut().zip(&tweaks).for_each(|(unit, own)| xor(unit, *own));
        }
    }
}

fn xor(unit: &mut Block, tweak: u128) {
    unit.0 = (u128::from_le_bytes(unit.0) ^ tweak).to_le_bytes();
}

/// Times the primitive element of GF(2^128), by the polynomial x^128 + x^7 + x^2 + x + 1.
fn doubled(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xts_mode::{Xts128, get_tweak_default};

    use super::*;

    fn bytes<const N: usize>(hex_digits: &str) -> [u8; N] {
        let digits: String = hex_digits.split_whitespace().collect();
        hex::decode(digits).unwrap().try_into().unwrap()
    }

    const KEYS: [&str; 2] = [
        "2718281828459045235360287471352662497757247093699959574966967627",
        "3141592653589793238462643383279502884197169399375105820974944592",
    ];
    /// Vector 10, unit number 0xff.
    const VECTOR_10: &str = "
        1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44
        680a86ac35adfc3345befecb4bb188fd5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0
        c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca2a3e7a7d7df7b10355165c8b9a6d0a7d
        e8b062c4500dc4cd120c0f7418dae3d0b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f
        93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6
        dc3966380ad8fecb17b6ba02469a020a84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1
        505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae9be69a2ffeceb1bec9de244fbe15992b
        11b77c040f12bd8f6a975a44a0f90c29a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac
        6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493
        c27b3429eaedb4ed5376441a77ed43851ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa
        773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151
    ";
    /// The beginning of vector 14, unit number 0xffffffffff.
    const VECTOR_14: &str = "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23";

    /// IEEE 1619-2018, annex B, those of XTS-AES-256: each encrypts the bytes 0 to 255, twice.
    #[test]
    fn vectors_of_the_standard() {
        let clear: [u8; 512] = std::array::from_fn(|at| at as u8);
        let [data, tweak] = KEYS.map(bytes);
        let xts = Xts::new(&data, &tweak);
        let mut sealed = clear;
        xts.encrypt(0xff, &mut sealed);
        assert_eq!(sealed, bytes::<512>(VECTOR_10));
        xts.decrypt(0xff, &mut sealed);
        assert_eq!(sealed, clear);
        xts.encrypt(0xff_ffff_ffff, &mut sealed);
        assert_eq!(sealed[..32], bytes::<32>(VECTOR_14));
    }

    proptest! {
        #[test]
        fn the_same_as_another_implementation(
            keys in any::<([u8; 32], [u8; 32])>(),
            number in any::<u64>(),
            units in 1..=256usize,
            seed in any::<u8>(),
        ) {
            let clear: Vec<u8> = (0..units * 16).map(|at| (at as u8).wrapping_mul(seed)).collect();
            let (mut ours, mut theirs) = (clear.clone(), clear.clone());
            let xts = Xts::new(&keys.0, &keys.1);
            xts.encrypt(number, &mut ours);
            let other = Xts128::new(Aes256::new(&keys.0.into()), Aes256::new(&keys.1.into()));
            other.encrypt_sector(&mut theirs, get_tweak_default(number.into()));
            prop_assert_eq!(&ours, &theirs);
            xts.decrypt(number, &mut ours);
            prop_assert_eq!(ours, clear);
        }
    }
}
