//! The checks and the profiles, as data: checks.toml and profiles.toml, parsed and checked once.
//!
//! A person's own profiles come from files of the same form ([`Table::add_profiles`]).

use crate::expr::{Expr, ExprError};
use crate::kconfig::Release;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// One thing that a kernel or a box can do or not.
#[derive(Debug, Clone)]
pub struct Check {
    /// Stable, dotted.
    pub id: String,
    /// Short name for people.
    pub what: String,
    /// What uses it.
    pub why: String,
    /// How the running kernel is asked: a word and its arguments; the words are those of [`crate::probe`].
    pub probe: Option<Vec<String>>,
    /// Which configuration carries it.
    pub config: Option<Expr>,
    /// First release that has it upstream.
    pub since: Option<Release>,
    /// Module that carries it.
    pub module: Option<String>,
    /// How to get it.
    pub hint: Option<String>,
}

/// A feature that is lost, but nothing else, when an expression does not hold.
#[derive(Debug, Clone)]
pub struct Want {
    /// Over check ids.
    pub expr: Expr,
    /// What is lost.
    pub lost: String,
}

/// What a network, a runtime or a feature needs.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Stable name; labels use it.
    pub id: String,
    /// For people.
    pub title: String,
    /// The profiles of which this is a feature; it is worth nothing where all of them are not.
    pub part_of: Vec<String>,
    /// Oldest release that the project supports.
    pub kernel: Option<Release>,
    /// Machines that the project supports; empty: all.
    pub arch: Vec<String>,
    /// Without one of these: unsupported.
    pub needs: Vec<Expr>,
    /// Without one of these: degraded.
    pub wants: Vec<Want>,
    /// What to take instead.
    pub fallback: Vec<String>,
}

/// One step of the advice, best first.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rung {
    /// Profile of the network.
    pub cni: String,
    /// Features that it must have.
    #[serde(default)]
    pub with: Vec<String>,
    /// Profile that carries services.
    pub proxy: Option<String>,
    /// What is lost against the best.
    pub lost: Option<String>,
}

/// A label of the Node that says whether a check is good.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// Behind the domain.
    pub name: String,
    /// Id of the check.
    pub check: String,
}

/// Everything that is asked and judged.
#[derive(Debug, Clone)]
pub struct Table {
    /// Sorted by id.
    pub checks: BTreeMap<String, Check>,
    /// In the order of the file.
    pub profiles: Vec<Profile>,
    /// Best first.
    pub ladder: Vec<Rung>,
    /// Labels that a node gets.
    pub labels: Vec<Label>,
    /// Release of the built-in rules.
    pub release: String,
    sets: BTreeMap<String, Expr>,
}

/// What is wrong with a file of checks or profiles.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Not TOML of this form.
    #[error("{file}: {source}")]
    Toml {
        /// Which file.
        file: String,
        /// What and where.
        source: Box<toml::de::Error>,
    },
    /// An expression is wrong.
    #[error("{file}: in `{of}`: {source}")]
    Expr {
        /// Which file.
        file: String,
        /// Check or profile.
        of: String,
        /// What and where.
        source: ExprError,
    },
    /// A name that stands nowhere.
    #[error(
        "{file}: `{of}` asks for `{name}`, which is no {kind}; hint: `skerry qualify --list` shows all"
    )]
    NoSuch {
        /// Which file.
        file: String,
        /// Check or profile.
        of: String,
        /// The name.
        name: String,
        /// What it should have been.
        kind: &'static str,
    },
    /// A name twice.
    #[error("{file}: `{name}` stands there twice")]
    Twice {
        /// Which file.
        file: String,
        /// The name.
        name: String,
    },
    /// A number that is none.
    #[error("{file}: in `{of}`: `{text}` is no release of Linux such as 5.10")]
    Release {
        /// Which file.
        file: String,
        /// Check or profile.
        of: String,
        /// What stands there.
        text: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChecksFile {
    group: Vec<GroupRow>,
    check: Vec<CheckRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupRow {
    id: String,
    why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckRow {
    id: String,
    what: String,
    why: Option<String>,
    probe: Option<String>,
    config: Option<String>,
    since: Option<String>,
    module: Option<String>,
    hint: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfilesFile {
    release: Option<String>,
    #[serde(default)]
    set: BTreeMap<String, String>,
    #[serde(default)]
    profile: Vec<ProfileRow>,
    #[serde(default)]
    ladder: Vec<Rung>,
    #[serde(default)]
    label: Vec<Label>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ProfileRow {
    id: String,
    title: String,
    #[serde(default)]
    part_of: Vec<String>,
    kernel: Option<String>,
    #[serde(default)]
    arch: Vec<String>,
    #[serde(default)]
    needs: Vec<String>,
    #[serde(default)]
    wants: Vec<WantRow>,
    #[serde(default)]
    fallback: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WantRow {
    check: String,
    lost: String,
}

const CHECKS: &str = include_str!("../checks.toml");
const PROFILES: &str = include_str!("../profiles.toml");

impl Table {
    /// The checks and profiles that are built in.
    pub fn built_in() -> Self {
        let file = "checks.toml";
        let rows = parse::<ChecksFile>(file, CHECKS).expect("a test reads the built-in checks");
        let why: BTreeMap<_, _> = rows.group.into_iter().map(|row| (row.id, row.why)).collect();
        let mut checks = BTreeMap::new();
        for row in rows.check {
            let group = row.id.split('.').next().unwrap_or_default();
            let why = row.why.or_else(|| why.get(group.trim_end_matches('1')).cloned());
            let check = Check {
                what: row.what,
                why: why.unwrap_or_default(),
                probe: row.probe.map(|text| text.split_whitespace().map(Into::into).collect()),
                config: row
                    .config
                    .map(|text| Expr::parse(&text).expect("a test reads the built-in checks")),
                since: row.since.as_deref().and_then(Release::parse),
                module: row.module,
                hint: row.hint,
                id: row.id.clone(),
            };
            checks.insert(row.id, check);
        }
        let mut table = Self {
            checks,
            profiles: Vec::new(),
            ladder: Vec::new(),
            labels: Vec::new(),
            release: String::new(),
            sets: BTreeMap::new(),
        };
        table.add_profiles("profiles.toml", PROFILES).expect("a test reads the built-in profiles");
        table
    }

    /// Adds the profiles of a file's `text`; `file` is named in errors. Nothing is added when anything is wrong.
    ///
    /// # Errors
    ///
    /// [`TableError`], the first mistake.
    pub fn add_profiles(&mut self, file: &str, text: &str) -> Result<(), TableError> {
        let rows: ProfilesFile = parse(file, text)?;
        let mut sets = self.sets.clone();
        for (name, text) in &rows.set {
            sets.insert(name.clone(), self.expr(file, name, text, &BTreeMap::new())?);
        }
        let mut known: BTreeSet<String> = self.profiles.iter().map(|p| p.id.clone()).collect();
        let mut profiles = Vec::new();
        for row in rows.profile {
            if !known.insert(row.id.clone()) {
                return Err(TableError::Twice { file: file.into(), name: row.id });
            }
            let expr = |text: &String| self.expr(file, &row.id, text, &sets);
            let needs = row.needs.iter().map(expr).collect::<Result<_, _>>()?;
            let wants = row.wants.iter().map(|want| {
                Ok(Want {
                    expr: self.expr(file, &row.id, &want.check, &sets)?,
                    lost: want.lost.clone(),
                })
            });
            let wants = wants.collect::<Result<_, TableError>>()?;
            let kernel =
                match row.kernel {
                    Some(text) => Some(Release::parse(&text).ok_or_else(|| {
                        TableError::Release { file: file.into(), of: row.id.clone(), text }
                    })?),
                    None => None,
                };
            profiles.push(Profile {
                id: row.id,
                title: row.title,
                part_of: row.part_of,
                kernel,
                arch: row.arch,
                needs,
                wants,
                fallback: row.fallback,
            });
        }
        let no_such = |of: &str, name: &String| TableError::NoSuch {
            file: file.into(),
            of: of.into(),
            name: name.clone(),
            kind: "profile",
        };
        for profile in &profiles {
            if let Some(whole) = profile.part_of.iter().find(|whole| !known.contains(*whole)) {
                return Err(no_such(&profile.id, whole));
            }
        }
        for rung in &rows.ladder {
            let mut names = rung.with.iter().chain(&rung.proxy).chain([&rung.cni]);
            if let Some(name) = names.find(|name| !known.contains(*name)) {
                return Err(no_such("ladder", name));
            }
        }
        if let Some(label) = rows.label.iter().find(|row| !self.checks.contains_key(&row.check)) {
            return Err(TableError::NoSuch {
                file: file.into(),
                of: label.name.clone(),
                name: label.check.clone(),
                kind: "check",
            });
        }
        self.sets = sets;
        self.labels.extend(rows.label);
        self.profiles.extend(profiles);
        // A person's own ladder goes before the built-in one.
        self.ladder.splice(0..0, rows.ladder);
        if let Some(release) = rows.release {
            self.release = release;
        }
        Ok(())
    }

    /// Parses an expression over check ids and puts sets in.
    fn expr(
        &self,
        file: &str,
        of: &str,
        text: &str,
        sets: &BTreeMap<String, Expr>,
    ) -> Result<Expr, TableError> {
        let expr = Expr::parse(text).map_err(|source| TableError::Expr {
            file: file.into(),
            of: of.into(),
            source,
        })?;
        self.resolve(file, of, expr, sets)
    }

    fn resolve(
        &self,
        file: &str,
        of: &str,
        expr: Expr,
        sets: &BTreeMap<String, Expr>,
    ) -> Result<Expr, TableError> {
        let each = |parts: Vec<Expr>| -> Result<Vec<Expr>, TableError> {
            parts.into_iter().map(|part| self.resolve(file, of, part, sets)).collect()
        };
        Ok(match expr {
            Expr::Not(inner) => Expr::Not(Box::new(self.resolve(file, of, *inner, sets)?)),
            Expr::All(parts) => Expr::All(each(parts)?),
            Expr::Any(parts) => Expr::Any(each(parts)?),
            Expr::Name { name, builtin } => match name.strip_prefix('@') {
                Some(set) => sets.get(set).cloned().ok_or_else(|| TableError::NoSuch {
                    file: file.into(),
                    of: of.into(),
                    name: name.clone(),
                    kind: "set",
                })?,
                None if self.checks.contains_key(&name) => Expr::Name { name, builtin },
                None => {
                    return Err(TableError::NoSuch {
                        file: file.into(),
                        of: of.into(),
                        name,
                        kind: "check",
                    });
                }
            },
        })
    }

    /// SHA-256 over the built-in checks and profiles: with another one, what was judged before is judged again.
    pub fn built_in_digest() -> String {
        crate::report::digest(format!("{CHECKS}\0{PROFILES}").as_bytes())
    }

    /// The profile with this id.
    pub fn profile(&self, id: &str) -> Option<&Profile> {
        self.profiles.iter().find(|profile| profile.id == id)
    }
}

fn parse<T: for<'de> Deserialize<'de>>(file: &str, text: &str) -> Result<T, TableError> {
    toml::from_str(text)
        .map_err(|source| TableError::Toml { file: file.into(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_is_whole() {
        let table = Table::built_in();
        assert!(table.checks.len() >= 150, "{} checks", table.checks.len());
        let rows: ChecksFile = parse("checks.toml", CHECKS).expect("checks");
        assert_eq!(rows.check.len(), table.checks.len(), "an id stands there twice");
        for row in &rows.check {
            assert!(row.probe.is_some() || row.config.is_some(), "{} is never judged", row.id);
            if let Some(since) = &row.since {
                assert!(Release::parse(since).is_some(), "{}", row.id);
            }
        }
        for check in table.checks.values() {
            assert!(!check.why.is_empty(), "{} says no why", check.id);
        }
        let used: BTreeSet<&str> = table
            .profiles
            .iter()
            .flat_map(|p| p.needs.iter().chain(p.wants.iter().map(|want| &want.expr)))
            .flat_map(Expr::names)
            .collect();
        assert!(used.len() >= 120, "only {} checks are used by a profile", used.len());
    }

    #[test]
    fn a_persons_own_profile_is_added_or_refused_with_its_name() {
        let mut table = Table::built_in();
        let own = "[[profile]]\nid = \"line-4\"\ntitle = \"Line 4\"\nneeds = [\"link.vcan & @iptables\"]\n";
        table.add_profiles("line-4.toml", own).expect("good");
        assert!(table.profile("line-4").is_some());
        for (wrong, word) in [
            (own.to_owned(), "twice"),
            (own.replace("line-4", "b").replace("link.vcan", "link.vacn"), "link.vacn"),
            (own.replace("line-4", "b").replace("@iptables", "@ipt"), "no set"),
            (own.replace("line-4", "b").replace("vcan &", "vcan"), "character"),
            ("profile = 3".into(), "line 1"),
        ] {
            let error = table.add_profiles("own.toml", &wrong).expect_err("wrong").to_string();
            assert!(error.contains(word) && error.contains("own.toml"), "{error}");
        }
        assert!(table.profile("b").is_none());
    }
}
