//! Small text files that end in a line with the BLAKE3 sum of what stands before it.

use serde::de::DeserializeOwned;

/// Length of that line.
const LINE: usize = 65;

/// A text with the line that holds its sum.
pub fn with_sum(mut text: Vec<u8>) -> Vec<u8> {
    let sum = blake3::hash(&text);
    text.extend_from_slice(format!("{sum}\n").as_bytes());
    text
}

/// The text before the line with its sum.
///
/// # Errors
/// Says what is wrong: too short for a sum, or another sum.
pub fn checked(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let split = bytes.len().checked_sub(LINE).ok_or("too short")?;
    let (text, sum) = bytes.split_at(split);
    match sum.strip_suffix(b"\n") == Some(blake3::hash(text).to_string().as_bytes()) {
        true => Ok(text),
        false => Err("its sum is wrong"),
    }
}

/// Why a text isn't the JSON that was meant.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Its `format` is newer than what is known.
    Newer(u64),
    /// What is wrong with it.
    Damaged(String),
}

/// The value in such a text, which is JSON with a field `format`, of this one or an older one.
///
/// # Errors
/// As [`Unfit`] says.
pub fn parse<T: DeserializeOwned>(bytes: &[u8], known: u32) -> Result<T, Unfit> {
    let damaged = |error: serde_json::Error| Unfit::Damaged(error.to_string());
    let json = checked(bytes).map_err(|reason| Unfit::Damaged(reason.into()))?;
    let value: serde_json::Value = serde_json::from_slice(json).map_err(damaged)?;
    let format = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or_default();
    if format > u64::from(known) {
        return Err(Unfit::Newer(format));
    }
    serde_json::from_value(value).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_only_told_from_its_own_sum() {
        let mut bytes = with_sum(b"text\n".to_vec());
        assert_eq!(checked(&bytes), Ok(&b"text\n"[..]));
        bytes[0] ^= 1;
        assert_eq!(checked(&bytes), Err("its sum is wrong"));
        assert_eq!(checked(b"short"), Err("too short"));
    }
}
