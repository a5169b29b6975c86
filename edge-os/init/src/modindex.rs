//! The index of kernel modules: which module a device's alias asks for, and what has to be loaded before it.
//!
//! The builder of the image calls [`encode`] and puts the result at `lib/modules/<uname>/skerry.index`; PID 1 and the
//! `modprobe` applet read that file whole and call [`Index::decode`]. Nothing here touches a file or the kernel.
//!
//! kmod's text files are not used because parsing them cost PID 1 hundreds of milliseconds on a small machine, and
//! its binary tries because there is no need for eight of them. Here the alias patterns are sorted by their literal
//! beginning, so that a lookup narrows one range byte by byte and only the few patterns that are left are matched.
//!
//! Layout, integers little-endian; `off` counts from the start of the strings, which end the file:
//!
//! ```text
//! header     magic "SKMODIX1", then u32: modules, patterns, steps, built-in names, length of the strings
//! modules    name off u32, name len u16, path len u16, path off u32, first step u32, steps u16, 0 u16   by name
//! patterns   off u32, len u16, literal len u16, module u16, 0 u16                                      by pattern
//! steps      module u16, its highest bit set when the step may fail; one run per module, itself included
//! built-in   off u32, len u16, 0 u16                                                                   by name
//! strings    UTF-8
//! ```
//!
//! Source of the rules: kmod, libkmod/libkmod-module.c (order of soft dependencies) and shared/util.c
//! (`alias_normalize`: a dash is an underscore outside of brackets).

use std::collections::{BTreeMap, BTreeSet};

/// First bytes of an index; the last one is the version.
pub const MAGIC: &[u8; 8] = b"SKMODIX1";
/// Name of the index's file inside of `lib/modules/<uname>`.
pub const FILE_NAME: &str = "skerry.index";
/// Modules of one index; the steps have fifteen bits for a module. Debian's kernel has 4,230.
pub const MODULES_MAX: usize = 0x7fff;
/// Bytes of an index, decoded or encoded: several times what all modules of a distribution need.
pub const INDEX_MAX: usize = 16 << 20;

/// What the builder knows about one module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Module {
    /// Name as the kernel shows it, for example `nf_tables`; dashes are taken for underscores.
    pub name: String,
    /// Path below `lib/modules/<uname>`, for example `kernel/net/netfilter/nf_tables.ko`. A path that ends in `.xz`
    /// is a compressed file that the kernel unpacks.
    pub path: String,
    /// Modules without which this one cannot be loaded.
    pub depends: Vec<String>,
    /// Modules to be tried before this one (`softdep: pre`), already resolved to names of modules.
    pub before: Vec<String>,
    /// Modules to be tried after this one (`softdep: post`), already resolved to names of modules.
    pub after: Vec<String>,
    /// Patterns of the aliases that ask for this module.
    pub aliases: Vec<String>,
}

/// Why an index could not be written.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum EncodeError {
    /// A name that a module needs, softly or not, is neither in the set nor built in.
    #[error(
        "module `{module}` needs `{needs}`, which is neither in the set nor built into the kernel"
    )]
    Missing { module: String, needs: String },
    /// Two modules have one name.
    #[error("module `{0}` is there twice")]
    Twice(String),
    /// More modules or text than the format can hold.
    #[error("too much for one index: {0}")]
    TooLarge(&'static str),
}

/// Why bytes are not an index.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// Another file, or another version of the format.
    #[error("not a module index of this version")]
    Magic,
    /// Longer than [`INDEX_MAX`].
    #[error("{0} bytes are too long for a module index")]
    TooLong(usize),
    /// The counts of the header do not give the length of the file.
    #[error(
        "the module index is cut or too long: its header asks for {wanted} bytes, there are {present}"
    )]
    Length { wanted: u64, present: usize },
    /// Something points outside of its table.
    #[error("entry {entry} of the {table} of the module index points outside")]
    Outside { table: &'static str, entry: usize },
    /// A table is not sorted, so that lookups in it would miss.
    #[error("entry {entry} of the {table} of the module index is not in order")]
    Order { table: &'static str, entry: usize },
    /// The strings are not text.
    #[error("the strings of the module index are not UTF-8")]
    Text,
}

/// One module of one index; never mixed between indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(u16);

/// One file to be loaded, see [`Index::load_order`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What to load.
    pub module: ModuleId,
    /// Whether the load goes on when this step fails: it was only wished for.
    pub optional: bool,
}

/// A checked index over its bytes.
#[derive(Debug, Clone)]
pub struct Index {
    bytes: Vec<u8>,
    modules: usize,
    patterns: usize,
    built_in: usize,
    patterns_at: usize,
    steps_at: usize,
    built_in_at: usize,
    strings_at: usize,
}

/// A dash is an underscore outside of brackets, in names, patterns and questions.
pub fn normalize(text: &str) -> String {
    let mut inside = false;
    text.chars()
        .map(|c| match c {
            '[' => {
                inside = true;
                c
            }
            ']' => {
                inside = false;
                c
            }
            '-' if !inside => '_',
            _ => c,
        })
        .collect()
}

/// Whether `text` as a whole matches `pattern`, with `*`, `?` and `[…]` (ranges, `!` or `^` for "not").
///
/// Time is bounded by the product of both lengths.
pub fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(b'?') => {
                p += 1;
                t += 1;
                continue;
            }
            Some(b'[') => {
                if let Some((true, after)) = class(&pattern[p..], text[t]) {
                    p += after;
                    t += 1;
                    continue;
                }
            }
            Some(byte) if *byte == text[t] => {
                p += 1;
                t += 1;
                continue;
            }
            _ => {}
        }
        match retry {
            Some((star, from)) => {
                retry = Some((star, from + 1));
                p = star;
                t = from + 1;
            }
            None => return false,
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Whether the class that `pattern` begins with contains `byte`, and the length of the class; `None` without an end.
fn class(pattern: &[u8], byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
    let first = if negated { 2 } else { 1 };
    let end = first + 1 + pattern.get(first + 1..)?.iter().position(|b| *b == b']')?;
    let body = &pattern[first..end];
    let mut hit = false;
    let mut at = 0;
    while at < body.len() {
        if at + 2 < body.len() && body[at + 1] == b'-' {
            hit |= (body[at]..=body[at + 2]).contains(&byte);
            at += 3;
        } else {
            hit |= body[at] == byte;
            at += 1;
        }
    }
    Some((hit != negated, end + 1))
}

/// Length of the part of a pattern before its first wildcard.
fn literal_len(pattern: &str) -> usize {
    pattern.bytes().position(|b| matches!(b, b'*' | b'?' | b'[')).unwrap_or(pattern.len())
}

/// Writes the index of `modules`; the order of the arguments does not matter.
///
/// `built_in` are the names of what the kernel has inside: they satisfy dependencies and are never loaded.
///
/// # Errors
///
/// See [`EncodeError`]; nothing is dropped silently.
pub fn encode(modules: &[Module], built_in: &[String]) -> Result<Vec<u8>, EncodeError> {
    if modules.len() > MODULES_MAX {
        return Err(EncodeError::TooLarge("modules"));
    }
    let mut by_name: BTreeMap<String, &Module> = BTreeMap::new();
    for module in modules {
        let name = normalize(&module.name);
        if by_name.insert(name.clone(), module).is_some() {
            return Err(EncodeError::Twice(name));
        }
    }
    let inside: BTreeSet<String> = built_in.iter().map(|name| normalize(name)).collect();
    let names: Vec<&str> = by_name.keys().map(String::as_str).collect();
    let graph = Graph::new(&by_name, &names, &inside)?;

    let mut strings = String::new();
    let mut module_table = Vec::new();
    let mut step_table = Vec::new();
    let mut patterns: BTreeSet<(String, u16)> = BTreeSet::new();
    for (id, (name, module)) in by_name.iter().enumerate() {
        let id = u16::try_from(id).expect("there are at most MODULES_MAX modules");
        let steps = graph.order(id);
        let first = u32::try_from(step_table.len() / 2)
            .map_err(|_| EncodeError::TooLarge("steps of loading"))?;
        let count =
            u16::try_from(steps.len()).map_err(|_| EncodeError::TooLarge("steps of a module"))?;
        for step in steps {
            let bits = step.module.0 | if step.optional { 0x8000 } else { 0 };
            step_table.extend_from_slice(&bits.to_le_bytes());
        }
        let (name_off, name_len) = put(&mut strings, name)?;
        let (path_off, path_len) = put(&mut strings, &module.path)?;
        module_table.extend_from_slice(&name_off.to_le_bytes());
        module_table.extend_from_slice(&name_len.to_le_bytes());
        module_table.extend_from_slice(&path_len.to_le_bytes());
        module_table.extend_from_slice(&path_off.to_le_bytes());
        module_table.extend_from_slice(&first.to_le_bytes());
        module_table.extend_from_slice(&count.to_le_bytes());
        module_table.extend_from_slice(&[0, 0]);
        for alias in &module.aliases {
            patterns.insert((normalize(alias), id));
        }
    }
    let mut pattern_table = Vec::new();
    let mut sorted: Vec<&(String, u16)> = patterns.iter().collect();
    sorted.sort_by(|a, b| order_key(&a.0).cmp(&order_key(&b.0)).then(a.1.cmp(&b.1)));
    for (pattern, id) in sorted {
        let literal =
            u16::try_from(literal_len(pattern)).map_err(|_| EncodeError::TooLarge("an alias"))?;
        let (off, len) = put(&mut strings, pattern)?;
        pattern_table.extend_from_slice(&off.to_le_bytes());
        pattern_table.extend_from_slice(&len.to_le_bytes());
        pattern_table.extend_from_slice(&literal.to_le_bytes());
        pattern_table.extend_from_slice(&id.to_le_bytes());
        pattern_table.extend_from_slice(&[0, 0]);
    }
    let mut built_in_table = Vec::new();
    for name in &inside {
        let (off, len) = put(&mut strings, name)?;
        built_in_table.extend_from_slice(&off.to_le_bytes());
        built_in_table.extend_from_slice(&len.to_le_bytes());
        built_in_table.extend_from_slice(&[0, 0]);
    }

    let counts =
        [by_name.len(), patterns.len(), step_table.len() / STEP_LEN, inside.len(), strings.len()];
    let mut bytes = MAGIC.to_vec();
    for count in counts {
        let count = u32::try_from(count).map_err(|_| EncodeError::TooLarge("a table"))?;
        bytes.extend_from_slice(&count.to_le_bytes());
    }
    for part in [module_table, pattern_table, step_table, built_in_table, strings.into_bytes()] {
        bytes.extend_from_slice(&part);
    }
    if bytes.len() > INDEX_MAX {
        return Err(EncodeError::TooLarge("bytes"));
    }
    Ok(bytes)
}

/// Patterns are ordered by their literal beginning, so that one byte more of a question leaves one range.
fn order_key(pattern: &str) -> (&str, &str) {
    pattern.split_at(literal_len(pattern))
}

fn put(strings: &mut String, text: &str) -> Result<(u32, u16), EncodeError> {
    let off = u32::try_from(strings.len()).map_err(|_| EncodeError::TooLarge("the strings"))?;
    let len = u16::try_from(text.len()).map_err(|_| EncodeError::TooLarge("a name"))?;
    strings.push_str(text);
    Ok((off, len))
}

/// Dependencies by number, for walking.
struct Graph {
    depends: Vec<Vec<u16>>,
    before: Vec<Vec<u16>>,
    after: Vec<Vec<u16>>,
}

impl Graph {
    fn new(
        by_name: &BTreeMap<String, &Module>,
        names: &[&str],
        inside: &BTreeSet<String>,
    ) -> Result<Self, EncodeError> {
        let numbers = |module: &Module, wanted: &[String]| {
            let mut found = Vec::new();
            for needs in wanted {
                let needs = normalize(needs);
                match names.binary_search(&needs.as_str()) {
                    Ok(id) => found.push(u16::try_from(id).expect("at most MODULES_MAX modules")),
                    Err(_) if inside.contains(&needs) => {}
                    Err(_) => {
                        return Err(EncodeError::Missing { module: module.name.clone(), needs });
                    }
                }
            }
            Ok(found)
        };
        let mut graph = Self { depends: Vec::new(), before: Vec::new(), after: Vec::new() };
        for module in by_name.values() {
            graph.depends.push(numbers(module, &module.depends)?);
            graph.before.push(numbers(module, &module.before)?);
            graph.after.push(numbers(module, &module.after)?);
        }
        Ok(graph)
    }

    /// What to load for `id`, in order: what it needs, itself, what it wishes for afterwards.
    fn order(&self, id: u16) -> Vec<Step> {
        let mut needed = BTreeSet::from([id]);
        let mut open = vec![id];
        while let Some(next) = open.pop() {
            open.extend(self.depends[usize::from(next)].iter().filter(|id| needed.insert(**id)));
        }
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        self.visit(id, &mut seen, &mut order);
        let step = |id| Step { module: ModuleId(id), optional: !needed.contains(&id) };
        order.into_iter().map(step).collect()
    }

    /// Depth first; a circle of soft dependencies ends where it began. The depth is that of the kernel's
    /// dependencies, which is below twenty.
    fn visit(&self, id: u16, seen: &mut BTreeSet<u16>, order: &mut Vec<u16>) {
        if !seen.insert(id) {
            return;
        }
        let at = usize::from(id);
        for next in self.depends[at].iter().chain(&self.before[at]) {
            self.visit(*next, seen, order);
        }
        order.push(id);
        for next in &self.after[at] {
            self.visit(*next, seen, order);
        }
    }
}

const HEADER_LEN: usize = 28;
const MODULE_LEN: usize = 20;
const PATTERN_LEN: usize = 12;
const STEP_LEN: usize = 2;
const BUILT_IN_LEN: usize = 8;

impl Index {
    /// Checks everything that a lookup relies on; afterwards no lookup can fail or read outside.
    ///
    /// # Errors
    ///
    /// See [`DecodeError`]. Any bytes are safe to be given.
    pub fn decode(bytes: Vec<u8>) -> Result<Self, DecodeError> {
        if bytes.len() > INDEX_MAX {
            return Err(DecodeError::TooLong(bytes.len()));
        }
        if bytes.len() < HEADER_LEN || !bytes.starts_with(MAGIC) {
            return Err(DecodeError::Magic);
        }
        let count = |n: usize| u64::from(u32_at(&bytes, 8 + 4 * n));
        let [modules, patterns, steps, built_in, strings] =
            [count(0), count(1), count(2), count(3), count(4)];
        let at = |start: u64, entries: u64, len: usize| start + entries * len as u64;
        let patterns_at = at(HEADER_LEN as u64, modules, MODULE_LEN);
        let steps_at = at(patterns_at, patterns, PATTERN_LEN);
        let built_in_at = at(steps_at, steps, STEP_LEN);
        let strings_at = at(built_in_at, built_in, BUILT_IN_LEN);
        let wanted = strings_at + strings;
        if wanted != bytes.len() as u64 {
            return Err(DecodeError::Length { wanted, present: bytes.len() });
        }
        // Every count and start is below the length of the file from here on.
        let narrow = |n: u64| usize::try_from(n).expect("at most INDEX_MAX");
        let index = Self {
            modules: narrow(modules),
            patterns: narrow(patterns),
            built_in: narrow(built_in),
            patterns_at: narrow(patterns_at),
            steps_at: narrow(steps_at),
            built_in_at: narrow(built_in_at),
            strings_at: narrow(strings_at),
            bytes,
        };
        index.check(narrow(steps))?;
        Ok(index)
    }

    fn check(&self, steps: usize) -> Result<(), DecodeError> {
        let text =
            std::str::from_utf8(&self.bytes[self.strings_at..]).map_err(|_| DecodeError::Text)?;
        let string = |off: u32, len: u16, table, entry| {
            let off = off as usize;
            text.get(off..off + usize::from(len)).ok_or(DecodeError::Outside { table, entry })
        };
        if self.modules > MODULES_MAX {
            return Err(DecodeError::Outside { table: "modules", entry: self.modules });
        }
        let mut last: Option<&str> = None;
        for entry in 0..self.modules {
            let table = "modules";
            let at = self.module_at(entry);
            let b = &self.bytes;
            let name = string(u32_at(b, at), u16_at(b, at + 4), table, entry)?;
            string(u32_at(b, at + 8), u16_at(b, at + 6), table, entry)?;
            let first = u64::from(u32_at(b, at + 12));
            if first + u64::from(u16_at(b, at + 16)) > steps as u64 {
                return Err(DecodeError::Outside { table, entry });
            }
            if last.is_some_and(|last| last >= name) {
                return Err(DecodeError::Order { table, entry });
            }
            last = Some(name);
        }
        for entry in 0..steps {
            let module = u16_at(&self.bytes, self.steps_at + entry * STEP_LEN) & 0x7fff;
            if usize::from(module) >= self.modules {
                return Err(DecodeError::Outside { table: "steps", entry });
            }
        }
        let mut last: Option<&str> = None;
        for entry in 0..self.patterns {
            let table = "patterns";
            let at = self.patterns_at + entry * PATTERN_LEN;
            let b = &self.bytes;
            let pattern = string(u32_at(b, at), u16_at(b, at + 4), table, entry)?;
            let literal = usize::from(u16_at(b, at + 6));
            if literal != literal_len(pattern) || usize::from(u16_at(b, at + 8)) >= self.modules {
                return Err(DecodeError::Outside { table, entry });
            }
            if last.is_some_and(|last| order_key(last) > order_key(pattern)) {
                return Err(DecodeError::Order { table, entry });
            }
            last = Some(pattern);
        }
        let mut last: Option<&str> = None;
        for entry in 0..self.built_in {
            let table = "built-in names";
            let at = self.built_in_at + entry * BUILT_IN_LEN;
            let name = string(u32_at(&self.bytes, at), u16_at(&self.bytes, at + 4), table, entry)?;
            if last.is_some_and(|last| last >= name) {
                return Err(DecodeError::Order { table, entry });
            }
            last = Some(name);
        }
        Ok(())
    }

    /// Number of modules.
    pub fn len(&self) -> usize {
        self.modules
    }

    /// Whether there is no module.
    pub fn is_empty(&self) -> bool {
        self.modules == 0
    }

    /// All modules, by name.
    pub fn modules(&self) -> impl Iterator<Item = ModuleId> + use<> {
        (0..self.modules).map(|id| ModuleId(id as u16))
    }

    /// The module's name, with underscores.
    pub fn name(&self, id: ModuleId) -> &str {
        let at = self.module_at(usize::from(id.0));
        self.string(u32_at(&self.bytes, at), u16_at(&self.bytes, at + 4))
    }

    /// The module's file below `lib/modules/<uname>`; `.xz` at its end means that the kernel has to unpack it.
    pub fn path(&self, id: ModuleId) -> &str {
        let at = self.module_at(usize::from(id.0));
        self.string(u32_at(&self.bytes, at + 8), u16_at(&self.bytes, at + 6))
    }

    /// The module of this name, dashes and underscores being the same.
    pub fn by_name(&self, name: &str) -> Option<ModuleId> {
        let name = normalize(name);
        let range = partition(0, self.modules, |n| self.name(ModuleId(n as u16)) < name.as_str());
        let id = ModuleId(u16::try_from(range).ok()?);
        (range < self.modules && self.name(id) == name).then_some(id)
    }

    /// Whether the kernel has this module inside, so that there is nothing to load.
    pub fn is_built_in(&self, name: &str) -> bool {
        let name = normalize(name);
        let at = partition(0, self.built_in, |n| self.built_in_name(n) < name.as_str());
        at < self.built_in && self.built_in_name(at) == name
    }

    /// Modules that have a pattern for `alias`, for example for a device's `MODALIAS`; sorted, each once.
    pub fn by_alias(&self, alias: &str) -> Vec<ModuleId> {
        let alias = normalize(alias);
        let bytes = alias.as_bytes();
        let (mut low, mut high) = (0, self.patterns);
        let mut found = BTreeSet::new();
        for depth in 0..=bytes.len() {
            // In low..high all literals begin with the first `depth` bytes; those that end here come first.
            let ends = partition(low, high, |n| self.literal(n).len() <= depth);
            for n in low..ends {
                let (pattern, id) = self.pattern(n);
                if glob(&pattern.as_bytes()[depth..], &bytes[depth..]) {
                    found.insert(id);
                }
            }
            let Some(byte) = bytes.get(depth) else { break };
            low = partition(ends, high, |n| self.literal(n)[depth] < *byte);
            high = partition(low, high, |n| self.literal(n)[depth] <= *byte);
            if low == high {
                break;
            }
        }
        found.into_iter().collect()
    }

    /// What `modprobe` means by a word: the module of that name, else all whose alias it is.
    pub fn resolve(&self, word: &str) -> Vec<ModuleId> {
        match self.by_name(word) {
            Some(id) => vec![id],
            None => self.by_alias(word),
        }
    }

    /// What to load for a module, in order, itself included.
    ///
    /// A module that is loaded already is passed over by the kernel (`EEXIST`); when a step that is not optional
    /// fails, the module cannot be loaded.
    pub fn load_order(&self, id: ModuleId) -> impl Iterator<Item = Step> + '_ {
        let at = self.module_at(usize::from(id.0));
        let first = u32_at(&self.bytes, at + 12) as usize;
        let count = usize::from(u16_at(&self.bytes, at + 16));
        (first..first + count).map(|n| {
            let bits = u16_at(&self.bytes, self.steps_at + n * STEP_LEN);
            Step { module: ModuleId(bits & 0x7fff), optional: bits & 0x8000 != 0 }
        })
    }

    fn module_at(&self, id: usize) -> usize {
        HEADER_LEN + id * MODULE_LEN
    }

    fn pattern(&self, n: usize) -> (&str, ModuleId) {
        let at = self.patterns_at + n * PATTERN_LEN;
        let text = self.string(u32_at(&self.bytes, at), u16_at(&self.bytes, at + 4));
        (text, ModuleId(u16_at(&self.bytes, at + 8)))
    }

    fn literal(&self, n: usize) -> &[u8] {
        let at = self.patterns_at + n * PATTERN_LEN;
        let text = self.string(u32_at(&self.bytes, at), u16_at(&self.bytes, at + 6));
        text.as_bytes()
    }

    fn built_in_name(&self, n: usize) -> &str {
        let at = self.built_in_at + n * BUILT_IN_LEN;
        self.string(u32_at(&self.bytes, at), u16_at(&self.bytes, at + 4))
    }

    fn string(&self, off: u32, len: u16) -> &str {
        let from = self.strings_at + off as usize;
        std::str::from_utf8(&self.bytes[from..from + usize::from(len)])
            .expect("decode checked that each string is text")
    }
}

/// First number of `low..high` for which `before` is false.
fn partition(mut low: usize, mut high: usize, before: impl Fn(usize) -> bool) -> usize {
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str], aliases: &[&str]) -> Module {
        let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Module {
            name: name.to_owned(),
            path: format!("kernel/{name}.ko"),
            depends: strings(depends),
            aliases: strings(aliases),
            ..Module::default()
        }
    }

    fn sample() -> Vec<Module> {
        vec![
            module("e1000e", &["ptp"], &["pci:v00008086d000015B8sv*sd*bc*sc*i*"]),
            module("ptp", &["pps_core"], &[]),
            module("pps-core", &[], &[]),
            module("nvme", &[], &["pci:v*d*sv*sd*bc01sc08i02*"]),
            Module { before: vec!["realtek".into()], ..module("r8169", &["libphy"], &[]) },
            module("realtek", &["libphy"], &[]),
            module("libphy", &["builtin_thing"], &[]),
            module("crc32c_generic", &[], &["crypto-crc32c", "crc32c"]),
            module(
                "crc32c_intel",
                &[],
                &["crypto-crc32c", "cpu:type:x86,ven*fam*mod*:feature:*0094*"],
            ),
            module("nft_chain_nat", &[], &["nft-chain-2-nat", "nft-chain-10-nat"]),
            module("evdev", &[], &["input:b*v*p*e*-e*k*r*a*m*l*s*f*w*"]),
        ]
    }

    fn index() -> Index {
        let bytes = encode(&sample(), &["builtin-thing".into()]).expect("the sample is complete");
        Index::decode(bytes).expect("what was encoded decodes")
    }

    fn check(alias: &str, expected: &[&str]) {
        let index = index();
        let found: Vec<&str> = index.by_alias(alias).iter().map(|id| index.name(*id)).collect();
        assert_eq!(found, expected, "{alias}");
    }

    fn order(index: &Index, name: &str) -> Vec<String> {
        let id = index.by_name(name).expect("is in the sample");
        let show = |step: Step| {
            format!("{}{}", index.name(step.module), if step.optional { "?" } else { "" })
        };
        index.load_order(id).map(show).collect()
    }

    #[test]
    fn a_device_finds_its_driver_by_pattern_and_a_request_by_exact_alias() {
        check("pci:v00008086d000015B8sv00001028sd000006B9bc02sc00i00", &["e1000e"]);
        check("pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02", &["nvme"]);
        check("pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc06i01", &[]);
        check("crypto-crc32c", &["crc32c_generic", "crc32c_intel"]);
        check("crypto_crc32c", &["crc32c_generic", "crc32c_intel"]);
        check("nft-chain-2-nat", &["nft_chain_nat"]);
        check("nft-chain-2-na", &[]);
        check("nft-chain-2-natx", &[]);
        check("", &[]);
        check("cpu:type:x86,ven0000fam0006mod009E:feature:,0000,0094,00A1", &["crc32c_intel"]);
        check("input:b0019v0000p0001e0000-e0,1,k74,ramlsfw", &["evdev"]);
    }

    #[test]
    fn dependencies_come_first_and_soft_ones_may_fail() {
        let index = index();
        assert_eq!(order(&index, "e1000e"), ["pps_core", "ptp", "e1000e"]);
        assert_eq!(order(&index, "r8169"), ["libphy", "realtek?", "r8169"]);
        assert_eq!(index.path(index.by_name("pps_core").unwrap()), "kernel/pps-core.ko");
        assert!(index.is_built_in("builtin-thing") && !index.is_built_in("nvme"));
        assert_eq!(index.by_name("builtin_thing"), None);
    }

    #[test]
    fn what_is_needed_hard_stays_so_when_it_is_also_wished_for_and_circles_end() {
        let a = Module { before: vec!["b".into()], ..module("a", &["b"], &[]) };
        let b = Module { after: vec!["a".into(), "c".into()], ..module("b", &[], &[]) };
        let c = Module { before: vec!["c".into()], ..module("c", &[], &[]) };
        let index = Index::decode(encode(&[a, b, c], &[]).unwrap()).unwrap();
        assert_eq!(order(&index, "a"), ["b", "c?", "a"]);
        assert_eq!(order(&index, "c"), ["c"]);
    }

    #[test]
    fn a_missing_dependency_and_a_double_name_are_refused() {
        let missing = encode(&[module("a", &["gone"], &[])], &[]);
        let expected = EncodeError::Missing { module: "a".into(), needs: "gone".into() };
        assert_eq!(missing, Err(expected));
        let twice = encode(&[module("a-b", &[], &[]), module("a_b", &[], &[])], &[]);
        assert_eq!(twice, Err(EncodeError::Twice("a_b".into())));
    }

    #[test]
    fn the_order_of_the_input_does_not_matter() {
        let mut reversed = sample();
        reversed.reverse();
        let built_in = ["builtin_thing".to_owned()];
        assert_eq!(encode(&sample(), &built_in), encode(&reversed, &built_in));
    }

    #[test]
    fn an_empty_index_answers_every_question_with_nothing() {
        let index = Index::decode(encode(&[], &[]).unwrap()).unwrap();
        assert!(index.is_empty() && index.resolve("anything").is_empty());
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_an_error_or_still_safe_to_ask() {
        let bytes = encode(&sample(), &["builtin_thing".into()]).unwrap();
        for len in 0..bytes.len() {
            assert!(Index::decode(bytes[..len].to_vec()).is_err(), "cut at {len}");
        }
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for at in 0..bytes.len() {
            for _ in 0..4 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let mut changed = bytes.clone();
                changed[at] ^= (state >> 33) as u8 | 1;
                let Ok(index) = Index::decode(changed) else { continue };
                for id in index.modules() {
                    index.by_alias(index.name(id));
                    assert!(index.load_order(id).count() < 1 << 16);
                    index.path(id);
                }
                index.by_alias("pci:v00008086d000015B8sv0sd0bc0sc0i0");
                index.is_built_in("x");
            }
        }
    }

    #[test]
    fn glob_knows_stars_questions_and_classes() {
        for (pattern, text, expected) in [
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("*", "", true),
            ("?", "", false),
            ("d[0-3]", "d2", true),
            ("d[0-3]", "d4", false),
            ("d[!0-3]x", "d4x", true),
            ("d[]x]", "d]", true),
            ("d[0-3", "d0", false),
            ("*a*b*a", "xxabyba", true),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }
}
