//! A master key that people can write down: nine groups of eight letters and digits.
//!
//! ```text
//! group 1 to 8   4 bytes of the key, and a check byte of the group and its place
//! group 9        version, 3 bytes of the key's sum, and a check byte
//! ```
//!
//! In Crockford's base 32, which has no letters that look like digits; what is read for one is taken for it. A mistyped group is
//! named, with a chance of 255 in 256, and what passes is seen by the sum.

use zeroize::{Zeroize, Zeroizing};

use super::key::{BYTES, MasterKey, Secret};

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const VERSION: u8 = 1;
const GROUPS: usize = 9;
const GROUP_LETTERS: usize = 8;
/// Bytes of a group without its check.
const GROUP_BYTES: usize = 4;
/// Letters of all groups.
pub(super) const LETTERS: usize = GROUPS * GROUP_LETTERS;

/// Why a text is no recovery key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// Too much or too little.
    #[error(
        "a recovery key has {GROUPS} groups of {GROUP_LETTERS} letters and digits, {LETTERS} in all, and this has {0}"
    )]
    Length(usize),
    /// What no key has.
    #[error("group {group} has a {letter:?}, which no recovery key has")]
    Letter {
        /// From 1.
        group: usize,
        /// As it was typed.
        letter: char,
    },
    /// A group that isn't as it was printed.
    #[error("group {0} is mistyped, or not in its place")]
    Group(usize),
    /// All groups are right, and together they aren't.
    #[error("the groups are not those of one recovery key")]
    Sum,
    /// Of a newer program.
    #[error("this recovery key is of format {0}, which this program doesn't know: use a newer one")]
    Newer(u8),
}

/// A key for people. Wiped from memory when it goes.
pub struct RecoveryKey(Secret);

impl std::fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RecoveryKey")
    }
}

impl RecoveryKey {
    pub(super) fn of(key: &Secret) -> Self {
        Self(key.clone())
    }

    /// The key that it is.
    pub fn master(&self) -> MasterKey {
        MasterKey::new(self.0.clone())
    }

    /// As it is printed, once: three lines of three groups.
    pub fn shown(&self) -> Zeroizing<String> {
        // With room for all of it, so that it doesn't move in memory and leave copies.
        let mut text = Zeroizing::new(String::with_capacity(2 * LETTERS));
        let last = last_group(&self.0);
        let groups = self.0.chunks_exact(GROUP_BYTES).chain([&last[..]]);
        for (at, group) in groups.enumerate() {
            if at > 0 {
                text.push_str(if at % 3 == 0 { "\n" } else { "  " });
            }
            let mut bits = Zeroizing::new(0u64);
            for byte in group.iter().chain([&check(at, group)]) {
                *bits = *bits << 8 | u64::from(*byte);
            }
            for letter in (0..GROUP_LETTERS).rev() {
                let value = (*bits >> (5 * letter)) as usize % ALPHABET.len();
                text.push(char::from(ALPHABET[value]));
                if letter == GROUP_LETTERS / 2 {
                    text.push('-');
                }
            }
        }
        text
    }

    /// Reads what somebody typed, or a file holds: spaces, dashes, and lines that begin with `#` don't count, nor does case.
    ///
    /// # Errors
    /// Says which group is wrong.
    pub fn parse(text: &str) -> Result<Self, RecoveryError> {
        let counted = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let counted = counted.flat_map(str::chars).filter(|letter| counts(*letter));
        let mut values = Zeroizing::new([0u8; LETTERS]);
        let mut count = 0;
        for letter in counted {
            if let Some(place) = values.get_mut(count) {
                let group = count / GROUP_LETTERS + 1;
                *place = value(letter).ok_or(RecoveryError::Letter { group, letter })?;
            }
            count += 1;
        }
        if count != LETTERS {
            return Err(RecoveryError::Length(count));
        }
        let mut bytes = Zeroizing::new([0u8; GROUPS * GROUP_BYTES]);
        let groups = values.chunks_exact(GROUP_LETTERS).zip(bytes.chunks_exact_mut(GROUP_BYTES));
        for (at, (letters, group)) in groups.enumerate() {
            let bits = letters.iter().fold(0u64, |bits, value| bits << 5 | u64::from(*value));
            let [_, _, _, known @ .., sum] = bits.to_be_bytes();
            group.copy_from_slice(&known);
            if check(at, group) != sum {
                return Err(RecoveryError::Group(at + 1));
            }
        }
        let (key, last) = bytes.split_at(BYTES);
        let mut known = Secret::default();
        known.copy_from_slice(key);
        match last.first() {
            Some(&VERSION) if last == last_group(&known) => Ok(Self(known)),
            Some(&version) if version > VERSION => Err(RecoveryError::Newer(version)),
            _ => Err(RecoveryError::Sum),
        }
    }

    /// True when a text has as many letters as a whole key.
    pub fn is_complete(text: &str) -> bool {
        text.chars().filter(|letter| counts(*letter)).count() >= LETTERS
    }
}

fn counts(letter: char) -> bool {
    !letter.is_whitespace() && !matches!(letter, '-' | '–' | '—')
}

fn value(letter: char) -> Option<u8> {
    let letter = match letter.to_ascii_uppercase() {
        'O' => '0',
        'I' | 'L' => '1',
        other => other,
    };
    let at = ALPHABET.iter().position(|known| char::from(*known) == letter)?;
    u8::try_from(at).ok()
}

/// Sums are of what is secret, and as short as they are they tell little of it.
fn check(at: usize, group: &[u8]) -> u8 {
    let mut hasher = blake3::Hasher::new_derive_key("janus-backup 2026-11 recovery keys: group");
    hasher.update(&[at as u8]).update(group);
    let sum = hasher.finalize().as_bytes()[0];
    hasher.zeroize();
    sum
}

fn last_group(key: &[u8; BYTES]) -> [u8; GROUP_BYTES] {
    let mut hasher = blake3::Hasher::new_derive_key("janus-backup 2026-11 recovery keys: whole");
    let [one, two, three, ..] = *hasher.update(key).finalize().as_bytes();
    hasher.zeroize();
    [VERSION, one, two, three]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(bytes: [u8; 32]) -> RecoveryKey {
        RecoveryKey(Box::new(Zeroizing::new(bytes)))
    }

    fn same(text: &str, bytes: [u8; 32]) -> bool {
        RecoveryKey::parse(text).is_ok_and(|parsed| **parsed.0 == bytes)
    }

    #[test]
    fn it_is_read_however_it_was_typed() {
        let bytes = std::array::from_fn(|at| (at * 37) as u8);
        let shown = key(bytes).shown();
        assert_eq!(shown.lines().count(), 3, "{}", *shown);
        assert!(same(&shown, bytes));
        assert!(same(&shown.to_lowercase(), bytes));
        assert!(same(&shown.replace(['-', ' ', '\n'], ""), bytes));
        assert!(same(&shown.replace('0', "o").replace('1', "l"), bytes));
        assert!(same(&format!("# of web1\n  {}\r\n", shown.replace('\n', "\r\n")), bytes));
        assert!(RecoveryKey::is_complete(&shown) && !RecoveryKey::is_complete(&shown[..70]));
        assert_eq!(format!("{:?}", key(bytes)), "RecoveryKey");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let shown = key([0x5A; 32]).shown();
        let fails = |text: &str| RecoveryKey::parse(text).unwrap_err();
        assert_eq!(fails(""), RecoveryError::Length(0));
        assert_eq!(fails(&shown[..shown.len() - 1]), RecoveryError::Length(71));
        assert_eq!(fails(&format!("{}7", *shown)), RecoveryError::Length(73));
        let mut groups: Vec<&str> = shown.split_whitespace().collect();
        groups[3] = "UUUU-0000";
        assert_eq!(fails(&groups.join(" ")), RecoveryError::Letter { group: 4, letter: 'U' });
        let (one, other) = (key([1; 32]).shown(), key([2; 32]).shown());
        let mixed: Vec<&str> =
            one.split_whitespace().take(8).chain(other.split_whitespace().skip(8)).collect();
        assert_eq!(fails(&mixed.join(" ")), RecoveryError::Sum);
    }

    proptest! {
        #[test]
        fn all_keys_come_back_and_no_mistake_does(
            bytes in any::<[u8; 32]>(),
            at in 0..LETTERS,
            other in 0..32usize,
            swapped in 0..8usize,
        ) {
            let shown = key(bytes).shown();
            prop_assert!(same(&shown, bytes));
            let mut letters: Vec<char> = shown.chars().filter(|letter| counts(*letter)).collect();
            let typed = char::from(ALPHABET[other]);
            if letters[at] != typed {
                letters[at] = typed;
                let text: String = letters.iter().collect();
                prop_assert!(!same(&text, bytes) && RecoveryKey::parse(&text).is_err());
            }
            let mut groups: Vec<&str> = shown.split_whitespace().collect();
            if groups[swapped] != groups[8 - swapped] {
                groups.swap(swapped, 8 - swapped);
                prop_assert!(RecoveryKey::parse(&groups.join("")).is_err());
            }
        }

        #[test]
        fn no_text_is_a_panic(text in "\\PC{0,200}") {
            let _ = RecoveryKey::parse(&text);
        }
    }
}
