//! File names of parents, as children carry them.

use super::ImageError;

/// Longest file name, in characters and in bytes.
pub(super) const MAX_NAME: usize = 255;

/// Refuses a name that not every reader understands: a chain lies in one folder, and readers disagree about the encoding of
/// what is not ASCII.
pub(super) fn check_plain(name: &str) -> Result<(), ImageError> {
    let plain = |c: char| c.is_ascii_graphic() && !r#"\/:*?"<>|"#.contains(c);
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.chars().all(plain)
    {
        return Err(ImageError::impossible(format!("{name:?} as the parent's file name")));
    }
    Ok(())
}

/// The last part of a path of any system: a chain lives in one folder.
pub(super) fn file_name(path: &str) -> Result<String, ImageError> {
    let name = path.rsplit(['\\', '/', ':']).next().unwrap_or_default();
    if matches!(name, "" | "." | "..") || name.contains('\0') || name.len() > MAX_NAME {
        return Err(ImageError::damaged(format!("parent path {:?} names no file", shorten(path))));
    }
    Ok(name.to_owned())
}

/// Text from UTF-16 units, which may be hostile.
pub(super) fn utf16(units: impl Iterator<Item = u16>) -> Result<String, ImageError> {
    char::decode_utf16(units)
        .collect::<Result<_, _>>()
        .map_err(|_| ImageError::damaged("the parent's name is not UTF-16"))
}

/// The beginning of a foreign text, for a message.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_part_of_a_path_counts() {
        for path in
            ["a.vhd", r".\a.vhd", r"C:\x\a.vhd", "../y/a.vhd", r"\\host\share\a.vhd", "C:a.vhd"]
        {
            assert_eq!(file_name(path).unwrap(), "a.vhd");
        }
        for path in ["", r".\", "..", "a/..", "a\0", &"x".repeat(256)] {
            file_name(path).unwrap_err();
        }
    }

    #[test]
    fn names_that_some_reader_does_not_understand_are_not_written() {
        check_plain("sda-0001.vhdx").unwrap();
        for name in ["", "..", "a/b", "a\\b", "C:x", "ä.vhdx", "a\0", "a b", &"x".repeat(256)] {
            check_plain(name).unwrap_err();
        }
    }
}
