//! What the kernel command line tells PID 1.
//!
//! The line is a part of the signed UKI, so it is trusted and complete: a key that is missing is a mistake of the
//! builder, and the boot does not go on. Called by both stages; pure.

use crate::verity::{Verity, VerityParseError};

/// The keys of ours on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// `skerry.version`: what runs. Never taken from the loader's variables, which can lie.
    pub version: String,
    /// `skerry.verity`: how the root is verified.
    pub verity: Verity,
    /// `skerry.variant=debug`: shell on the console, plain errors instead of a panic on a corrupted root.
    pub debug: bool,
}

/// Why the command line is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandLineError {
    /// A required key is not there.
    #[error("the kernel command line has no `{0}`")]
    Missing(&'static str),
    /// The key is there twice, and it is not clear which one holds.
    #[error("the kernel command line has `{0}` twice")]
    Twice(&'static str),
    /// The root cannot be verified with this.
    #[error("the kernel command line has a wrong `skerry.verity`")]
    Verity(#[from] VerityParseError),
    /// A variant that this program does not know.
    #[error("the kernel command line has the unknown variant `{0}`")]
    Variant(String),
}

impl CommandLine {
    /// Reads the text of /proc/cmdline.
    ///
    /// # Errors
    ///
    /// [`CommandLineError`] when a key is missing, wrong or there twice.
    pub fn parse(text: &str) -> Result<Self, CommandLineError> {
        let required = |key| value(text, key)?.ok_or(CommandLineError::Missing(key));
        let version = required("skerry.version")?.to_owned();
        let verity = required("skerry.verity")?.parse()?;
        let debug = match value(text, "skerry.variant")? {
            None => false,
            Some("debug") => true,
            Some(other) => return Err(CommandLineError::Variant(other.into())),
        };
        Ok(Self { version, verity, debug })
    }
}

fn value<'a>(text: &'a str, key: &'static str) -> Result<Option<&'a str>, CommandLineError> {
    let mut found = text
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .filter(|value| !value.is_empty());
    match (found.next(), found.next()) {
        (value, None) => Ok(value),
        _ => Err(CommandLineError::Twice(key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERITY: &str = "2,2,0101010101010101010101010101010101010101010101010101010101010101,aa";

    #[test]
    fn all_keys_are_read_and_the_others_passed_over() {
        let text = format!("console=ttyS0 quiet skerry.version=1.2 skerry.verity={VERITY}\n");
        // The hash cannot start where data is.
        assert!(CommandLine::parse(&text).is_err());
        let text = text.replace("2,2,", "2,3,");
        let line = CommandLine::parse(&text).expect("complete");
        assert_eq!((line.version.as_str(), line.debug), ("1.2", false));
        let debug = format!("{text} skerry.variant=debug");
        assert!(CommandLine::parse(&debug).expect("complete").debug);
    }

    #[test]
    fn line_without_a_required_key_with_one_twice_or_with_an_unknown_variant_is_refused() {
        let missing = CommandLine::parse("quiet skerry.version=1");
        assert_eq!(missing, Err(CommandLineError::Missing("skerry.verity")));
        let twice = CommandLine::parse("skerry.version=1 skerry.version=2");
        assert_eq!(twice, Err(CommandLineError::Twice("skerry.version")));
        let verity = VERITY.replace("2,2,", "2,3,");
        let text = format!("skerry.version=1 skerry.verity={verity} skerry.variant=fast");
        let variant = CommandLine::parse(&text);
        assert_eq!(variant, Err(CommandLineError::Variant("fast".into())));
    }
}
