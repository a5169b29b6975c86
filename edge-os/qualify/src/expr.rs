//! Boolean expressions over names, as checks.toml and profiles.toml write them: `A & (B | C) & !D`, `A=y`.
//!
//! The same small language serves configuration symbols and check ids; what a name is worth is the caller's business.

use std::fmt;

/// A parsed expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// A name; `builtin` when it was written `NAME=y`.
    Name {
        /// The name.
        name: String,
        /// Only built in counts.
        builtin: bool,
    },
    /// Not.
    Not(Box<Expr>),
    /// All of these.
    All(Vec<Expr>),
    /// Any of these.
    Any(Vec<Expr>),
}

/// Why a text is no expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExprError {
    /// Something else was expected.
    #[error("expected {expected} at character {at} of `{text}`")]
    Expected {
        /// What would have been right.
        expected: &'static str,
        /// Where, counted from 1.
        at: usize,
        /// The whole expression.
        text: String,
    },
    /// Brackets inside brackets inside brackets.
    #[error("`{0}` has more than {MAX_DEPTH} levels of brackets")]
    TooDeep(String),
}

/// Most levels of brackets and negations.
const MAX_DEPTH: usize = 16;

impl Expr {
    /// Parses `text`.
    ///
    /// # Errors
    ///
    /// [`ExprError`], with the place.
    pub fn parse(text: &str) -> Result<Self, ExprError> {
        let mut parser = Parser { text, at: 0 };
        let expr = parser.any(0)?;
        parser.space();
        match parser.at == text.len() {
            true => Ok(expr),
            false => Err(parser.expected("`&`, `|` or the end")),
        }
    }

    /// Every name in it, in order.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Self::Name { name, .. } => vec![name],
            Self::Not(inner) => inner.names(),
            Self::All(parts) | Self::Any(parts) => parts.iter().flat_map(Self::names).collect(),
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |f: &mut fmt::Formatter<'_>, parts: &[Self], between: &str| {
            for (i, part) in parts.iter().enumerate() {
                if i > 0 {
                    f.write_str(between)?;
                }
                match part {
                    Self::All(_) | Self::Any(_) => write!(f, "({part})")?,
                    _ => write!(f, "{part}")?,
                }
            }
            Ok(())
        };
        match self {
            Self::Name { name, builtin: false } => f.write_str(name),
            Self::Name { name, builtin: true } => write!(f, "{name}=y"),
            Self::Not(inner) => {
                f.write_str("!")?;
                joined(f, std::slice::from_ref(inner), "")
            }
            Self::All(parts) => joined(f, parts, " & "),
            Self::Any(parts) => joined(f, parts, " | "),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn eat(&mut self, what: char) -> bool {
        self.space();
        let found = self.rest().starts_with(what);
        if found {
            self.at += what.len_utf8();
        }
        found
    }

    fn expected(&self, expected: &'static str) -> ExprError {
        ExprError::Expected { expected, at: self.at + 1, text: self.text.into() }
    }

    fn any(&mut self, depth: usize) -> Result<Expr, ExprError> {
        let mut parts = vec![self.all(depth)?];
        while self.eat('|') {
            parts.push(self.all(depth)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expr::Any(parts) })
    }

    fn all(&mut self, depth: usize) -> Result<Expr, ExprError> {
        let mut parts = vec![self.one(depth)?];
        while self.eat('&') {
            parts.push(self.one(depth)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expr::All(parts) })
    }

    fn one(&mut self, depth: usize) -> Result<Expr, ExprError> {
        if depth > MAX_DEPTH {
            return Err(ExprError::TooDeep(self.text.into()));
        }
        if self.eat('!') {
            return Ok(Expr::Not(Box::new(self.one(depth + 1)?)));
        }
        if self.eat('(') {
            let inner = self.any(depth + 1)?;
            return match self.eat(')') {
                true => Ok(inner),
                false => Err(self.expected("`)`")),
            };
        }
        self.space();
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_.-@".contains(c);
        let len = self.rest().find(|c| !is_name(c)).unwrap_or(self.rest().len());
        if len == 0 {
            return Err(self.expected("a name, `!` or `(`"));
        }
        let name = self.rest()[..len].to_owned();
        self.at += len;
        let builtin = self.rest().starts_with("=y");
        if builtin {
            self.at += 2;
        }
        Ok(Expr::Name { name, builtin })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn and_binds_closer_than_or() {
        let expr = Expr::parse("a & b | !(c|d=y) & e").expect("valid");
        assert_eq!(expr.to_string(), "(a & b) | (!(c | d=y) & e)");
        assert_eq!(expr.names(), ["a", "b", "c", "d", "e"]);
    }

    #[test]
    fn mistakes_name_the_place() {
        let error = Expr::parse("a & ").expect_err("incomplete");
        assert!(error.to_string().contains("character 5"), "{error}");
        assert!(
            Expr::parse("(a").is_err() && Expr::parse("a b").is_err() && Expr::parse("").is_err()
        );
        assert!(matches!(Expr::parse(&"!".repeat(99)), Err(ExprError::TooDeep(_))));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_an_expression_or_an_error(text in "[a-d&|!() =y.]{0,40}") {
            if let Ok(expr) = Expr::parse(&text) {
                proptest::prop_assert!(!expr.names().is_empty());
            }
        }
    }
}
