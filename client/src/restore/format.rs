//! What a disk is restored as.

use std::path::Path;

use janus_proto::image::Format;

/// The kind of a restored file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetFormat {
    /// Byte for byte, as a device or a file.
    Raw,
    /// A VHDX or VHD.
    Image(Format),
    /// A qcow2, made by `qemu-img`.
    Qcow2,
}

/// Their names on the command line.
pub const FORMATS: [&str; 4] = ["raw", "vhdx", "vhd", "qcow2"];

impl TargetFormat {
    /// The format of this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "vhdx" => Some(Self::Image(Format::Vhdx)),
            "vhd" => Some(Self::Image(Format::Vhd)),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// The one that a file's name ends with; raw where it says nothing.
    pub fn of_path(path: &Path) -> Self {
        let extension = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
        Self::named(&extension.to_ascii_lowercase()).unwrap_or(Self::Raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_what_its_name_says() {
        let of = |path: &str| TargetFormat::of_path(Path::new(path));
        assert_eq!(of("/x/disk.VHDX"), TargetFormat::Image(Format::Vhdx));
        assert_eq!(of("disk.qcow2"), TargetFormat::Qcow2);
        for raw in ["/dev/sda", "disk.img", "vhdx", "disk.vhdx.old"] {
            assert_eq!(of(raw), TargetFormat::Raw, "{raw}");
        }
        assert!(FORMATS.iter().all(|name| TargetFormat::named(name).is_some()));
    }
}
