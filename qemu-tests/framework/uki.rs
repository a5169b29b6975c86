//! The parts of a unified kernel image, so that QEMU can start it without firmware.
//!
//! Source of the facts: Microsoft's PE format, and the UAPI group's description of unified kernel images.

use anyhow::{Context, Result, ensure};

/// Kernel, initial file system and command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// bzImage.
    pub linux: Vec<u8>,
    /// cpio archive.
    pub initrd: Vec<u8>,
    /// Without an end.
    pub cmdline: String,
}

/// Takes a unified kernel image apart.
pub fn parts(image: &[u8]) -> Result<Parts> {
    let part = |name: &str| {
        section(image, name)?.with_context(|| format!("the UKI has no section `{name}`"))
    };
    let cmdline = String::from_utf8_lossy(part(".cmdline")?);
    let cmdline = cmdline.trim_end_matches(['\0', '\n']).to_owned();
    Ok(Parts { linux: part(".linux")?.into(), initrd: part(".initrd")?.into(), cmdline })
}

/// Replaces every occurrence of a text in a section by another one of the same length; returns how many there were.
pub fn replace(image: &mut [u8], name: &str, from: &str, to: &str) -> Result<usize> {
    ensure!(from.len() == to.len() && !from.is_empty(), "`{from}` and `{to}` differ in length");
    let range = place(image, name)?.with_context(|| format!("the UKI has no section `{name}`"))?;
    let part = &mut image[range];
    let mut count = 0;
    for at in 0..=part.len().saturating_sub(from.len()) {
        if part[at..].starts_with(from.as_bytes()) {
            part[at..at + to.len()].copy_from_slice(to.as_bytes());
            count += 1;
        }
    }
    Ok(count)
}

/// The content of a section, without padding.
pub fn section<'a>(image: &'a [u8], name: &str) -> Result<Option<&'a [u8]>> {
    Ok(place(image, name)?.map(|range| &image[range]))
}

/// Where the content of a section lies in the file.
fn place(image: &[u8], name: &str) -> Result<Option<std::ops::Range<usize>>> {
    let cut = "the file is no PE image";
    let u32_at = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context(cut)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("4 bytes")) as usize)
    };
    let u16_at = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 2).context(cut)?;
        Ok(usize::from(u16::from_le_bytes(bytes.try_into().expect("2 bytes"))))
    };
    ensure!(image.starts_with(b"MZ"), cut);
    let pe = u32_at(0x3c)?;
    ensure!(image.get(pe..pe + 4) == Some(b"PE\0\0"), cut);
    let table = pe + 24 + u16_at(pe + 20)?;
    for index in 0..u16_at(pe + 6)? {
        let header = table + 40 * index;
        let raw = image.get(header..header + 8).context(cut)?;
        let end = raw.iter().position(|byte| *byte == 0).unwrap_or(8);
        if &raw[..end] != name.as_bytes() {
            continue;
        }
        let (virtual_size, raw_size, at) =
            (u32_at(header + 8)?, u32_at(header + 16)?, u32_at(header + 20)?);
        let size = virtual_size.min(raw_size);
        ensure!(at + size <= image.len(), "a section lies behind the end");
        return Ok(Some(at..at + size));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PE file with nothing but sections.
    fn image(sections: &[(&str, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; 0x40];
        head[..2].copy_from_slice(b"MZ");
        head[0x3c] = 0x40;
        head.extend(b"PE\0\0");
        head.extend([0x64, 0x86, sections.len() as u8, 0]);
        head.extend([0; 16]);
        let mut data = Vec::new();
        for (name, content) in sections {
            let mut header = [0; 40];
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[8..12].copy_from_slice(&(content.len() as u32).to_le_bytes());
            header[16..20].copy_from_slice(&512u32.to_le_bytes());
            header[20..24].copy_from_slice(&(512 + data.len() as u32).to_le_bytes());
            head.extend(header);
            data.extend_from_slice(content);
            data.resize(data.len().next_multiple_of(512), 0);
        }
        head.resize(512, 0);
        [head, data].concat()
    }

    #[test]
    fn parts_come_out_without_padding() {
        let uki =
            image(&[(".cmdline", b"quiet a=b\0"), (".linux", b"kernel"), (".initrd", &[7; 600])]);
        // The table above gives each section one sector; the third is cut to it.
        let parts = parts(&uki).unwrap();
        assert_eq!(parts.cmdline, "quiet a=b");
        assert_eq!(parts.linux, b"kernel");
        assert_eq!(parts.initrd.len(), 512);
    }

    #[test]
    fn text_of_a_section_is_replaced_there_and_nowhere_else() {
        let mut uki = image(&[(".cmdline", b"a=1.0 b=1.0"), (".osrel", b"V=1.0")]);
        assert_eq!(replace(&mut uki, ".cmdline", "1.0", "2.0").unwrap(), 2);
        assert_eq!(section(&uki, ".cmdline").unwrap(), Some(&b"a=2.0 b=2.0"[..]));
        assert_eq!(section(&uki, ".osrel").unwrap(), Some(&b"V=1.0"[..]));
        assert!(replace(&mut uki, ".cmdline", "1.0", "10").is_err());
        assert!(replace(&mut uki, ".linux", "1.0", "2.0").is_err());
    }

    #[test]
    fn what_is_missing_or_foreign_is_told() {
        let error = parts(&image(&[(".linux", b"k")])).unwrap_err().to_string();
        assert_eq!(error, "the UKI has no section `.cmdline`");
        assert!(parts(b"no image").is_err());
        let mut cut = image(&[(".cmdline", b"x")]);
        cut.truncate(400);
        assert!(section(&cut, ".cmdline").is_err());
    }
}
