//! What the builder wants to know of an ELF file: which libraries it needs, which loader, and a section's bytes.
//!
//! Only 64-bit little-endian files are read, which both of our architectures use. Called by [`crate::root`] for the
//! closure of libraries and by [`crate::modules`] for `.modinfo`. Any bytes are safe to be given.
//!
//! Source: System V ABI, chapters 4 and 5 (ELF header, section and program headers, dynamic section).

/// Strings, entries and headers of one file at most; more is a broken file.
pub const ENTRIES_MAX: usize = 4096;

/// Why a file could not be read.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ElfError {
    #[error("not a 64-bit little-endian ELF file")]
    NotElf,
    /// An offset or a length of the file leads outside.
    #[error("the {0} of the ELF file lies outside of it")]
    Outside(&'static str),
}

/// Machine types that we build for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    X86_64,
    Aarch64,
    /// The number in the header.
    Other(u16),
}

/// What the dynamic loader has to do for a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    pub machine: Machine,
    /// Names of libraries, as they stand in the file.
    pub needed: Vec<String>,
    /// Path of the dynamic loader; `None` for libraries and static programs.
    pub loader: Option<String>,
}

/// Whether these are the first bytes of an ELF file.
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Reads machine, loader and needed libraries.
///
/// # Errors
///
/// See [`ElfError`].
pub fn links(bytes: &[u8]) -> Result<Links, ElfError> {
    let machine = header(bytes)?;
    let headers =
        table(bytes, u64_at(bytes, 0x20)?, u16_at(bytes, 0x36)?, u16_at(bytes, 0x38)?, 56)
            .ok_or(ElfError::Outside("program headers"))?;
    let mut loads = Vec::new();
    let mut dynamic: &[u8] = &[];
    let mut loader = None;
    for head in headers {
        let (offset, address, size) = (u64_at(head, 8)?, u64_at(head, 16)?, u64_at(head, 32)?);
        match u32_at(head, 0)? {
            PT_LOAD => loads.push((offset, address, size)),
            PT_DYNAMIC => {
                dynamic = slice(bytes, offset, size).ok_or(ElfError::Outside("dynamic section"))?;
            }
            PT_INTERP => {
                let text = slice(bytes, offset, size).ok_or(ElfError::Outside("loader's name"))?;
                loader = Some(string(text).ok_or(ElfError::Outside("loader's name"))?);
            }
            _ => {}
        }
    }
    let mut strings_at = None;
    let mut names = Vec::new();
    for entry in dynamic.chunks_exact(16).take(ENTRIES_MAX) {
        match u64_at(entry, 0)? {
            DT_NULL => break,
            DT_NEEDED => names.push(u64_at(entry, 8)?),
            DT_STRTAB => strings_at = Some(u64_at(entry, 8)?),
            _ => {}
        }
    }
    let outside = ElfError::Outside("name of a library");
    let mut needed = Vec::new();
    for name in names {
        // The table is given by its address in memory.
        let address = strings_at.and_then(|at| at.checked_add(name)).ok_or(outside.clone())?;
        let text = loads
            .iter()
            .find_map(|(offset, start, size)| {
                let inside = address.checked_sub(*start).filter(|inside| inside < size)?;
                slice(bytes, offset.checked_add(inside)?, size - inside)
            })
            .ok_or(outside.clone())?;
        needed.push(string(text).ok_or(outside.clone())?);
    }
    Ok(Links { machine, needed, loader })
}

/// The bytes of the section called `name`; `None` when the file has none of that name.
///
/// # Errors
///
/// See [`ElfError`].
pub fn section<'a>(bytes: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, ElfError> {
    header(bytes)?;
    let outside = || ElfError::Outside("section headers");
    let headers =
        table(bytes, u64_at(bytes, 0x28)?, u16_at(bytes, 0x3a)?, u16_at(bytes, 0x3c)?, 64)
            .ok_or_else(outside)?;
    let names = headers.get(usize::from(u16_at(bytes, 0x3e)?)).ok_or_else(outside)?;
    let names = slice(bytes, u64_at(names, 24)?, u64_at(names, 32)?).ok_or_else(outside)?;
    for head in &headers {
        let start = u32_at(head, 0)? as usize;
        let is_it = names.get(start..).is_some_and(|text| {
            text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
        });
        if is_it && u32_at(head, 4)? != SHT_NOBITS {
            let found = slice(bytes, u64_at(head, 24)?, u64_at(head, 32)?);
            return found.map(Some).ok_or(ElfError::Outside("section"));
        }
    }
    Ok(None)
}

fn header(bytes: &[u8]) -> Result<Machine, ElfError> {
    // Class 2 is 64 bit, data 1 little-endian.
    if bytes.len() < 64 || !is_elf(bytes) || bytes[4] != 2 || bytes[5] != 1 {
        return Err(ElfError::NotElf);
    }
    Ok(match u16_at(bytes, 0x12)? {
        62 => Machine::X86_64,
        183 => Machine::Aarch64,
        other => Machine::Other(other),
    })
}

fn table(bytes: &[u8], offset: u64, size: u16, count: u16, least: usize) -> Option<Vec<&[u8]>> {
    let (size, count) = (usize::from(size), usize::from(count));
    if count == 0 {
        return Some(Vec::new());
    }
    if size < least || count > ENTRIES_MAX {
        return None;
    }
    let all = slice(bytes, offset, (size * count) as u64)?;
    Some(all.chunks_exact(size).collect())
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

fn string(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&bytes[..end]).ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], ElfError> {
    let found = bytes.get(at..at + N).ok_or(ElfError::Outside("header"))?;
    Ok(found.try_into().expect("the slice has N bytes"))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, ElfError> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, ElfError> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, ElfError> {
    number(bytes, at).map(u64::from_le_bytes)
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const SHT_NOBITS: u32 = 8;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// Files made up for tests, here and in other modules.
#[cfg(test)]
pub(crate) mod testing {
    fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn head(machine: u16) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        put(&mut bytes, 0, b"\x7fELF\x02\x01\x01");
        put(&mut bytes, 0x12, &machine.to_le_bytes());
        bytes
    }

    /// A program that needs `needed` and, when there is one, `loader`; it could not run.
    pub(crate) fn program(machine: u16, needed: &[&str], loader: Option<&str>) -> Vec<u8> {
        const BASE: u64 = 0x40_0000;
        let mut bytes = head(machine);
        let count: u16 = if loader.is_some() { 3 } else { 2 };
        put(&mut bytes, 0x20, &64_u64.to_le_bytes());
        put(&mut bytes, 0x36, &56_u16.to_le_bytes());
        put(&mut bytes, 0x38, &count.to_le_bytes());
        bytes.resize(64 + 56 * usize::from(count), 0);
        let strings_at = bytes.len() as u64;
        bytes.push(0);
        let mut offsets = Vec::new();
        for name in needed {
            offsets.push(bytes.len() as u64 - strings_at);
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(0);
        }
        let loader_at = bytes.len() as u64;
        bytes.extend_from_slice(loader.unwrap_or_default().as_bytes());
        bytes.push(0);
        let dynamic_at = bytes.len() as u64;
        for (tag, value) in offsets.iter().map(|o| (1, *o)).chain([(5, BASE + strings_at), (0, 0)])
        {
            bytes.extend_from_slice(&u64::to_le_bytes(tag));
            bytes.extend_from_slice(&u64::to_le_bytes(value));
        }
        let len = bytes.len() as u64;
        let mut heads = vec![(1_u32, 0, len), (2, dynamic_at, len - dynamic_at)];
        if let Some(loader) = loader {
            heads.push((3, loader_at, loader.len() as u64 + 1));
        }
        for (n, (kind, offset, size)) in heads.into_iter().enumerate() {
            let at = 64 + 56 * n;
            put(&mut bytes, at, &kind.to_le_bytes());
            put(&mut bytes, at + 8, &offset.to_le_bytes());
            put(&mut bytes, at + 16, &(BASE + offset).to_le_bytes());
            put(&mut bytes, at + 32, &size.to_le_bytes());
        }
        bytes
    }

    /// A file with one section, for example a kernel module with its `.modinfo`.
    pub(crate) fn with_section(machine: u16, name: &str, content: &[u8]) -> Vec<u8> {
        let mut bytes = head(machine);
        let content_at = bytes.len() as u64;
        bytes.extend_from_slice(content);
        let names_at = bytes.len() as u64;
        bytes.push(0);
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        let heads_at = bytes.len() as u64;
        let names_len = heads_at - names_at;
        for (name, kind, offset, size) in [
            (0_u32, 0_u32, 0, 0),
            (1, 1, content_at, content.len() as u64),
            (0, 3, names_at, names_len),
        ] {
            let mut section = vec![0; 64];
            put(&mut section, 0, &name.to_le_bytes());
            put(&mut section, 4, &kind.to_le_bytes());
            put(&mut section, 24, &u64::to_le_bytes(offset));
            put(&mut section, 32, &u64::to_le_bytes(size));
            bytes.extend_from_slice(&section);
        }
        put(&mut bytes, 0x28, &heads_at.to_le_bytes());
        put(&mut bytes, 0x3a, &64_u16.to_le_bytes());
        put(&mut bytes, 0x3c, &3_u16.to_le_bytes());
        put(&mut bytes, 0x3e, &2_u16.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{program, with_section};
    use super::*;

    #[test]
    fn needed_libraries_and_the_loader_are_found() {
        let found = links(&program(62, &["libc.so.6", "libm.so.6"], Some("/lib64/ld.so"))).unwrap();
        assert_eq!(found.machine, Machine::X86_64);
        assert_eq!(found.needed, ["libc.so.6", "libm.so.6"]);
        assert_eq!(found.loader.as_deref(), Some("/lib64/ld.so"));
        assert_eq!(links(&program(183, &[], None)).unwrap().machine, Machine::Aarch64);
    }

    #[test]
    fn a_section_is_found_by_its_whole_name() {
        let file = with_section(62, ".modinfo", b"a=b\0");
        assert_eq!(section(&file, ".modinfo").unwrap(), Some(&b"a=b\0"[..]));
        assert_eq!(section(&file, ".mod").unwrap(), None);
    }

    #[test]
    fn this_test_itself_needs_the_c_library() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(links(&bytes).unwrap().needed.iter().any(|name| name.starts_with("libc.so")));
        assert!(section(&bytes, ".text").unwrap().is_some());
    }

    #[test]
    fn any_bytes_are_safe() {
        let samples = [
            program(62, &["libc.so.6", "libm.so.6"], Some("/lib64/ld.so")),
            with_section(62, ".modinfo", b"name=x\0"),
        ];
        for sample in &samples {
            for len in 0..sample.len() {
                drop(links(&sample[..len]));
                drop(section(&sample[..len], ".modinfo"));
            }
            let mut state = 7_u64;
            for _ in 0..20_000 {
                let mut mangled = sample.clone();
                for _ in 0..2 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = (state >> 20) as usize % mangled.len();
                    mangled[at] = (state >> 50) as u8;
                }
                drop(links(&mangled));
                drop(section(&mangled, ".modinfo"));
            }
        }
        assert_eq!(links(b"text"), Err(ElfError::NotElf));
    }
}
