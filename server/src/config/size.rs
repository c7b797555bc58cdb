//! Amounts of space in settings: `500 GiB`, `1.5TiB`, `100MB`, `0`, and where it makes sense `2%`.

/// Bytes, or a part of a file system.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// So many bytes.
    Bytes(u64),
    /// So much of the whole.
    Percent(f64),
}

impl Size {
    /// Reads a size.
    ///
    /// # Errors
    /// Says what a size looks like.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size such as \"500 GiB\" or \"2%\"");
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..end], text[end..].trim());
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let factor = match unit.to_ascii_lowercase().as_str() {
            "%" if number <= 100.0 => return Ok(Self::Percent(number)),
            "" | "b" => 1.0,
            "kib" => 1024.0,
            "mib" => 1024f64.powi(2),
            "gib" => 1024f64.powi(3),
            "tib" => 1024f64.powi(4),
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            _ => return Err(wrong()),
        };
        // A product beyond the range becomes the largest number.
        Ok(Self::Bytes((number * factor) as u64))
    }

    /// As bytes, of a whole of `total_bytes`.
    pub fn of(self, total_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (total_bytes as f64 * percent / 100.0) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1.5 KiB", 1536),
            ("2GiB", 2 << 30),
            ("3 tib", 3 << 40),
            ("1 MB", 1_000_000),
        ] {
            assert_eq!(Size::parse(text), Ok(Size::Bytes(bytes)), "{text}");
        }
        assert_eq!(Size::parse("2%").unwrap().of(5000), 100);
        assert_eq!(Size::parse("0.5 %").unwrap().of(1000), 5);
        for bad in ["", "GiB", "-1", "1 XiB", "101%", "1.2.3", "1e9"] {
            assert!(Size::parse(bad).is_err(), "{bad}");
        }
    }
}
