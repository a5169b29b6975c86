//! The kernel as one program of the firmware: systemd's stub with more sections behind its own.
//!
//! [`Uki::write`] is a linker for one case: the stub stays as it is, each part becomes a section with a header in the
//! room that the stub leaves. What the firmware checks (Secure Boot) and what the stub reads are the same bytes. Each
//! part begins at a multiple of [`ALIGN`] in the file, so that a kernel or an initramfs which did not change has the same
//! blocks in the next version, and an update need not carry them.
//! Called by [`crate::build`].
//!
//! Source: Microsoft's PE format; the UAPI group's specification of unified kernel images.

/// What goes into the image. Sections are written in the order of the fields.
#[derive(Debug, Clone, Copy)]
pub struct Uki<'a> {
    /// `os-release`: the loader shows and sorts by it.
    pub os_release: &'a str,
    /// The kernel command line.
    pub cmdline: &'a str,
    /// `uname -r` of the kernel.
    pub uname: &'a str,
    /// A cpio archive with microcode.
    pub microcode: Option<&'a [u8]>,
    /// The initramfs, compressed.
    pub initrd: &'a [u8],
    /// The kernel, `bzImage`.
    pub linux: &'a [u8],
}

/// Why there is no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeError {
    /// It ends before what its header promises.
    #[error("the program of the firmware is cut short")]
    Short,
    /// Not a PE32+ program.
    #[error("this is no program of the firmware: {0}")]
    Format(&'static str),
    /// No room for another section.
    #[error("the stub has no room for section `{0}`")]
    Full(&'static str),
    /// Offsets have 32 bits.
    #[error("the image is larger than 4 GiB")]
    Large,
    /// It carries a signature already, which covers what would change.
    #[error("the program is signed already")]
    Signed,
}

impl Uki<'_> {
    /// Puts the parts behind `stub`.
    ///
    /// # Errors
    ///
    /// [`PeError`] when the stub is none or has no room.
    pub fn write(&self, stub: &[u8]) -> Result<Vec<u8>, PeError> {
        let mut image = Pe::parse(stub)?;
        if image.certificates() != (0, 0) {
            return Err(PeError::Signed);
        }
        let sections = [
            (".osrel", Some(self.os_release.as_bytes()), DATA),
            (".cmdline", Some(self.cmdline.as_bytes()), DATA),
            (".uname", Some(self.uname.as_bytes()), DATA),
            (".ucode", self.microcode, DATA),
            (".initrd", Some(self.initrd), DATA),
            (".linux", Some(self.linux), CODE),
        ];
        for (name, content, flags) in sections {
            if let Some(content) = content {
                image.append(name, content, flags)?;
            }
        }
        Ok(image.bytes)
    }
}

/// Parts begin at multiples of this in the file: the block of [`crate::blocks`].
pub const ALIGN: u32 = crate::blocks::BLOCK as u32;
/// Initialised data, readable.
const DATA: u32 = 0x4000_0040;
/// Code, readable and executable.
const CODE: u32 = 0x6000_0020;

/// A PE32+ program, with what has to be known of its header.
#[derive(Debug, Clone)]
pub(crate) struct Pe {
    pub(crate) bytes: Vec<u8>,
    /// Where the COFF header begins.
    coff: usize,
    /// Where the optional header begins.
    optional: usize,
    /// Where the section table begins.
    table: usize,
}

/// One section, as its header says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section {
    pub(crate) name: [u8; 8],
    pub(crate) virtual_size: u32,
    virtual_address: u32,
    pub(crate) raw_size: u32,
    pub(crate) raw_offset: u32,
}

impl Pe {
    /// Checks what the other functions rely on.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, PeError> {
        let at = |at: usize, len: usize| bytes.get(at..at + len).ok_or(PeError::Short);
        if at(0, 2)? != b"MZ" {
            return Err(PeError::Format("it has no DOS header"));
        }
        let pe = u32::from_le_bytes(at(0x3c, 4)?.try_into().expect("4 bytes")) as usize;
        if pe > bytes.len() || at(pe, 4)? != b"PE\0\0" {
            return Err(PeError::Format("it has no PE header"));
        }
        let coff = pe + 4;
        let optional = coff + 20;
        let optional_len =
            u16::from_le_bytes(at(coff + 16, 2)?.try_into().expect("2 bytes")) as usize;
        if at(optional, 2)? != [0x0b, 0x02] {
            return Err(PeError::Format("it is not of 64 bits"));
        }
        let image = Self { bytes: bytes.to_vec(), coff, optional, table: optional + optional_len };
        at(optional, optional_len)?;
        if optional_len < 112 + 5 * 8 || image.u32(optional + 108) < 5 {
            return Err(PeError::Format("it has no place for a signature"));
        }
        let headers = image.headers_len();
        let table_end = image.table + SECTION_BYTES * image.section_count();
        if table_end > headers || headers > bytes.len() {
            return Err(PeError::Short);
        }
        let align = |value: u32| value.is_power_of_two() && (512..=1 << 20).contains(&value);
        let (file, section) = (image.u32(optional + 36), image.u32(optional + 32));
        if !align(file) || !align(section) {
            return Err(PeError::Format("its sections are not aligned to 512 bytes or more"));
        }
        for section in image.sections() {
            let end = u64::from(section.raw_offset) + u64::from(section.raw_size);
            if section.raw_size != 0 && end > bytes.len() as u64 {
                return Err(PeError::Short);
            }
        }
        Ok(image)
    }

    pub(crate) fn sections(&self) -> impl Iterator<Item = Section> {
        (0..self.section_count()).map(|number| {
            let at = self.table + SECTION_BYTES * number;
            let mut name = [0; 8];
            name.copy_from_slice(&self.bytes[at..at + 8]);
            Section {
                name,
                virtual_size: self.u32(at + 8),
                virtual_address: self.u32(at + 12),
                raw_size: self.u32(at + 16),
                raw_offset: self.u32(at + 20),
            }
        })
    }

    /// Length of the headers, with the padding behind them.
    pub(crate) fn headers_len(&self) -> usize {
        self.u32(self.optional + 60) as usize
    }

    /// Where the checksum is.
    pub(crate) fn checksum_at(&self) -> usize {
        self.optional + 64
    }

    /// Where offset and length of the signatures are.
    pub(crate) fn certificates_at(&self) -> usize {
        self.optional + 112 + 4 * 8
    }

    /// Offset and length of the signatures; zeros without any.
    pub(crate) fn certificates(&self) -> (u32, u32) {
        (self.u32(self.certificates_at()), self.u32(self.certificates_at() + 4))
    }

    pub(crate) fn set_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn section_count(&self) -> usize {
        usize::from(u16::from_le_bytes([self.bytes[self.coff + 2], self.bytes[self.coff + 3]]))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes([
            self.bytes[at],
            self.bytes[at + 1],
            self.bytes[at + 2],
            self.bytes[at + 3],
        ])
    }

    /// Lengthens the last section in the file to a whole number of `align`: bytes between sections would be no part of
    /// what a signature covers.
    fn fill_up(&mut self, align: u32) {
        let (len, wanted) = (self.bytes.len(), self.bytes.len().next_multiple_of(align as usize));
        let last = self.sections().position(|one| {
            one.raw_size > 0 && one.raw_offset as usize + one.raw_size as usize == len
        });
        let (Some(last), Ok(more)) = (last, u32::try_from(wanted - len)) else { return };
        let at = self.table + SECTION_BYTES * last + 16;
        let size = self.u32(at);
        self.set_u32(at, size + more);
        self.bytes.resize(wanted, 0);
    }

    fn append(&mut self, name: &'static str, content: &[u8], flags: u32) -> Result<(), PeError> {
        let header = self.table + SECTION_BYTES * self.section_count();
        let file_align = self.u32(self.optional + 36).max(ALIGN);
        self.fill_up(file_align);
        let section_align = self.u32(self.optional + 32);
        let mut padded = [0; 8];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        if self.sections().any(|section| section.name == padded) {
            return Err(PeError::Format("it has a section of ours already"));
        }
        let room = header + SECTION_BYTES <= self.headers_len();
        if !room || self.bytes[header..header + SECTION_BYTES].iter().any(|byte| *byte != 0) {
            return Err(PeError::Full(name));
        }
        let up = |value: u64, align: u32| {
            u32::try_from(value.next_multiple_of(u64::from(align))).map_err(|_| PeError::Large)
        };
        let end = self
            .sections()
            .map(|one| u64::from(one.virtual_address) + u64::from(one.virtual_size))
            .max();
        let address = up(end.unwrap_or(0), section_align)?;
        let size = u32::try_from(content.len()).map_err(|_| PeError::Large)?;
        let offset = up(self.bytes.len() as u64, file_align)?;
        let raw_size = up(content.len() as u64, file_align)?;
        let image_size = up(u64::from(address) + u64::from(size), section_align)?;
        self.bytes.resize(offset as usize, 0);
        self.bytes.extend_from_slice(content);
        self.bytes.resize(offset as usize + raw_size as usize, 0);
        self.bytes[header..header + 8].copy_from_slice(&padded);
        self.set_u32(header + 8, size);
        self.set_u32(header + 12, address);
        self.set_u32(header + 16, raw_size);
        self.set_u32(header + 20, offset);
        self.set_u32(header + 36, flags);
        let count = self.section_count() as u16 + 1;
        self.bytes[self.coff + 2..self.coff + 4].copy_from_slice(&count.to_le_bytes());
        self.set_u32(self.optional + 56, image_size);
        self.set_u32(self.checksum_at(), 0);
        Ok(())
    }
}

const SECTION_BYTES: usize = 40;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small PE32+ program with one section of 700 bytes, and room for nine more.
    pub(crate) fn stub() -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[..2].copy_from_slice(b"MZ");
        bytes[0x3c] = 0x40;
        bytes[0x40..0x44].copy_from_slice(b"PE\0\0");
        bytes[0x44..0x46].copy_from_slice(&[0x64, 0x86]);
        bytes[0x46] = 1;
        bytes[0x54] = 240;
        bytes[0x56..0x58].copy_from_slice(&[0x0e, 0x02]);
        let optional = 0x58;
        let mut put =
            |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(optional, 0x020b);
        put(optional + 16, 0x1000);
        put(optional + 32, 4096);
        put(optional + 36, 512);
        put(optional + 56, 0x2000);
        put(optional + 60, 1024);
        // Subsystem: a program of the firmware.
        put(optional + 68, 10);
        put(optional + 108, 16);
        let table = optional + 240;
        put(table + 8, 700);
        put(table + 12, 0x1000);
        put(table + 16, 1024);
        put(table + 20, 1024);
        put(table + 36, CODE);
        bytes[table..table + 5].copy_from_slice(b".text");
        bytes.resize(1024 + 700, 0xc3);
        bytes.resize(2048, 0);
        bytes
    }

    fn parts() -> Uki<'static> {
        Uki {
            os_release: "ID=skerry\n",
            cmdline: "quiet",
            uname: "6.12",
            microcode: None,
            initrd: &[7; 5000],
            linux: &[9; 4097],
        }
    }

    #[test]
    fn parts_are_found_again_under_their_names() {
        let image = parts().write(&stub()).unwrap();
        let pe = Pe::parse(&image).unwrap();
        let found: Vec<_> = pe
            .sections()
            .map(|one| {
                let name = String::from_utf8(one.name.to_vec()).unwrap();
                let content = &image[one.raw_offset as usize..][..one.virtual_size as usize];
                let ours = name != ".text\0\0\0";
                assert_eq!((one.raw_size % 512, one.virtual_address % 4096), (0, 0));
                assert!(one.raw_offset.is_multiple_of(if ours { ALIGN } else { 512 }), "{name}");
                (name.trim_end_matches('\0').to_owned(), content.to_vec())
            })
            .collect();
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [".text", ".osrel", ".cmdline", ".uname", ".initrd", ".linux"]);
        assert_eq!(found[2].1, b"quiet");
        assert_eq!(found[4].1, [7; 5000]);
        let ends: Vec<_> =
            pe.sections().map(|one| one.virtual_address + one.virtual_size).collect();
        assert!(ends.is_sorted(), "no section lies over another one");
        let mut raw: Vec<_> = pe.sections().map(|one| (one.raw_offset, one.raw_size)).collect();
        raw.sort_unstable();
        let gapless = raw.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0);
        assert!(gapless && raw[0].0 == 1024, "{raw:?}");
        assert_eq!(raw.last().map(|(at, len)| (at + len) as usize), Some(image.len()));
        assert_eq!(pe.u32(pe.optional + 56), ends.last().unwrap().next_multiple_of(4096));
        assert!(image == parts().write(&stub()).unwrap());
        assert!(matches!(parts().write(&image), Err(PeError::Format(_))), "a UKI is no stub");
    }

    #[test]
    fn microcode_comes_before_the_initrd() {
        let image = Uki { microcode: Some(&[1; 10]), ..parts() }.write(&stub()).unwrap();
        let pe = Pe::parse(&image).unwrap();
        let names: Vec<_> = pe.sections().map(|one| one.name).collect();
        let place = |name: &[u8]| names.iter().position(|other| other.starts_with(name)).unwrap();
        assert_eq!(place(b".ucode") + 1, place(b".initrd"));
    }

    #[test]
    fn foreign_and_cut_programs_are_refused_and_never_panic() {
        let stub = stub();
        assert_eq!(Pe::parse(b"#!/bin/sh").unwrap_err(), PeError::Format("it has no DOS header"));
        for length in 0..stub.len() {
            assert!(Pe::parse(&stub[..length]).is_err(), "{length}");
        }
        let mut word = 0x1234_5677_u32;
        for _ in 0..4000 {
            word = word.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            let mut bytes = stub.clone();
            bytes[(word >> 4) as usize % 0x178] = (word >> 20) as u8;
            let _ = parts().write(&bytes);
        }
        let mut full = stub.clone();
        let table = 0x58 + 240;
        full[table + 40..1024].fill(1);
        assert_eq!(parts().write(&full).unwrap_err(), PeError::Full(".osrel"));
    }

    #[test]
    fn objdump_reads_the_sections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("uki.efi");
        std::fs::write(&path, parts().write(&stub()).unwrap()).unwrap();
        let Ok(output) = std::process::Command::new("objdump").arg("-h").arg(&path).output() else {
            eprintln!("not compared: there is no objdump here");
            return;
        };
        let told = String::from_utf8_lossy(&output.stdout);
        for name in [".osrel", ".cmdline", ".uname", ".initrd", ".linux"] {
            assert!(told.contains(name), "{told}{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
