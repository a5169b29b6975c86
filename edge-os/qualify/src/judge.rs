//! From evidence to facts, and from facts to verdicts. Pure: nothing is read here.
//!
//! A proof on the running kernel beats its configuration, a configuration beats a release number: distributions
//! backport, vendors leave things out, and files can lie.

use crate::expr::Expr;
use crate::kconfig::{Config, Release, Setting};
use crate::modules::Modules;
use crate::table::{Check, Profile, Table};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is known of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It works, or is configured where nothing could be tried.
    Present,
    /// Its module is there and not loaded.
    Unloaded,
    /// The kernel was built without it.
    Missing,
    /// It is a module, and the module is not on this system.
    ModuleMissing,
    /// Its module is there, and the system forbids to load it.
    ModuleDenied,
    /// The one who asked may not ask.
    NotPermitted,
    /// A sysctl switches it off, or has another value than wanted.
    DisabledBySysctl,
    /// A boot option or the firmware switches it off.
    DisabledAtBoot,
    /// The kernel is older than it.
    TooOld,
    /// Nobody can say.
    Unknown,
    /// It cannot be judged from what there is: a file says nothing of hardware or settings.
    NotJudged,
}

impl State {
    /// Whether what asks for it gets it.
    pub fn good(self) -> bool {
        matches!(self, Self::Present | Self::Unloaded)
    }

    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Unloaded => "module not loaded",
            Self::Missing => "missing",
            Self::ModuleMissing => "module missing",
            Self::ModuleDenied => "module may not be loaded",
            Self::NotPermitted => "not permitted",
            Self::DisabledBySysctl => "disabled by sysctl",
            Self::DisabledAtBoot => "disabled at boot",
            Self::TooOld => "kernel too old",
            Self::Unknown => "unknown",
            Self::NotJudged => "not judged",
        }
    }
}

/// Where a fact comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// It was tried.
    Probe,
    /// The configuration says so.
    Config,
    /// The folder of modules says so.
    Modules,
    /// Only the release says so.
    Release,
    /// Nothing speaks.
    None,
}

/// One check's fact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// What is known.
    pub state: State,
    /// From where.
    pub source: Source,
    /// The evidence in one line.
    pub evidence: String,
}

/// What a probe saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It works.
    Works(String),
    /// The kernel answered as one without it.
    Absent(String),
    /// The hardware is not there; whether the kernel could drive it is another question.
    NoDevice(String),
    /// The kernel says that it is too old for the question.
    TooOld(String),
    /// The asker may not.
    NotPermitted(String),
    /// A setting says no.
    Sysctl(String),
    /// A boot option says no.
    Boot(String),
    /// Nothing can be said: the answer is none that is known, time ran out, the probe died.
    Unclear(String),
}

/// Everything that is known before it is judged.
#[derive(Debug, Default)]
pub struct Evidence {
    /// The configuration, when one was found.
    pub config: Option<Config>,
    /// The modules, when a folder was found.
    pub modules: Option<Modules>,
    /// Release of the kernel: of the running one, of the person who asks, or of the configuration's header.
    pub release: Option<Release>,
    /// Machine.
    pub arch: Option<String>,
    /// What the probes saw, by check id; empty when nothing runs.
    pub seen: BTreeMap<String, Seen>,
    /// Modules may not be loaded at all: `kernel.modules_disabled`, an empty `kernel.modprobe`, no right.
    pub modules_denied: Option<String>,
}

impl Evidence {
    /// The fact of one check.
    pub fn fact(&self, check: &Check) -> Fact {
        match self.seen.get(&check.id) {
            Some(seen) => self.probed(check, seen),
            None => self.read(check),
        }
    }

    /// Every check's fact.
    pub fn facts(&self, table: &Table) -> BTreeMap<String, Fact> {
        table.checks.values().map(|check| (check.id.clone(), self.fact(check))).collect()
    }

    fn probed(&self, check: &Check, seen: &Seen) -> Fact {
        let fact = |state, evidence: &str| Fact {
            state,
            source: Source::Probe,
            evidence: evidence.into(),
        };
        let configured = check.config.as_ref().zip(self.config.as_ref());
        let setting = configured.map(|(expr, config)| config.evaluate(expr));
        match seen {
            Seen::Works(text) if setting == Some(Setting::Off) => {
                fact(State::Present, &format!("{text}; the configuration says it is off"))
            }
            Seen::Works(text) => fact(State::Present, text),
            Seen::Sysctl(text) => fact(State::DisabledBySysctl, text),
            Seen::Boot(text) => fact(State::DisabledAtBoot, text),
            Seen::NotPermitted(text) => fact(State::NotPermitted, text),
            Seen::TooOld(text) => fact(State::TooOld, text),
            Seen::NoDevice(text) => fact(State::Missing, text),
            Seen::Unclear(text) => fact(State::Unknown, text),
            // The kernel answers the same without the symbol and without its module: the files tell them apart.
            Seen::Absent(text) => match (setting, &self.modules) {
                (Some(Setting::Module), Some(modules)) => {
                    let (state, more) = self.module(check, modules);
                    fact(state, &format!("{text}; {more}"))
                }
                (Some(Setting::Module), None) => {
                    fact(State::ModuleMissing, &format!("{text}; it is a module of this kernel"))
                }
                (Some(Setting::Builtin), _) => {
                    fact(State::DisabledAtBoot, &format!("{text}, though it is built in"))
                }
                (Some(Setting::Off | Setting::Unknown) | None, _) => fact(State::Missing, text),
            },
        }
    }

    fn module(&self, check: &Check, modules: &Modules) -> (State, String) {
        let Some(name) = check.module_name() else {
            return (State::Unloaded, "it is a module of this kernel".into());
        };
        match (modules.find(&name), &self.modules_denied) {
            (None, _) => {
                (State::ModuleMissing, format!("no module `{name}` in {}", modules.place()))
            }
            (Some(_), Some(why)) => {
                (State::ModuleDenied, format!("module `{name}` is there, but {why}"))
            }
            (Some(file), None) => (State::Unloaded, format!("module `{file}` is there")),
        }
    }

    fn read(&self, check: &Check) -> Fact {
        let fact = |state, source, evidence: String| Fact { state, source, evidence };
        let Some((expr, config)) = check.config.as_ref().zip(self.config.as_ref()) else {
            return self.by_release(check);
        };
        let setting = config.evaluate(expr);
        if let (Setting::Module | Setting::Builtin, Some(since), Some(release)) =
            (setting, check.since, self.release)
            && release < since
        {
            return fact(
                State::TooOld,
                Source::Release,
                format!("{release} is older than {since}"),
            );
        }
        match (setting, &self.modules) {
            (Setting::Off, _) => {
                let wanting = config.wanting(expr).join(", ");
                fact(State::Missing, Source::Config, format!("off in the configuration: {wanting}"))
            }
            (Setting::Unknown, _) => {
                let wanting = config.wanting(expr).join(", ");
                fact(
                    State::Unknown,
                    Source::Config,
                    format!("the configuration does not say: {wanting}"),
                )
            }
            (Setting::Builtin, _) => {
                fact(State::Present, Source::Config, format!("built in: {expr}"))
            }
            (Setting::Module, Some(modules)) => {
                let (state, evidence) = self.module(check, modules);
                fact(state, Source::Modules, evidence)
            }
            (Setting::Module, None) => {
                fact(State::Present, Source::Config, format!("module: {expr}"))
            }
        }
    }

    /// Nothing but the release speaks: it can say "too old", never "present".
    fn by_release(&self, check: &Check) -> Fact {
        let (state, evidence) = match (check.since, self.release, self.config.is_some()) {
            (Some(since), Some(release), _) if release < since => {
                (State::TooOld, format!("{release} is older than {since}"))
            }
            // What has no symbol is in every kernel from its release on.
            (Some(since), Some(_), true)
                if check.config.is_none() && check.id.starts_with("base.") =>
            {
                let evidence = format!("in every kernel since {since}");
                return Fact { state: State::Present, source: Source::Release, evidence };
            }
            (_, _, true) if check.config.is_none() => {
                (State::NotJudged, "a configuration says nothing of it".into())
            }
            _ => (State::Unknown, "neither tried nor configured".into()),
        };
        let source = if state == State::TooOld { Source::Release } else { Source::None };
        Fact { state, source, evidence }
    }
}

impl Check {
    /// The module that carries it: said, or as the kernel names modules of its kind.
    pub fn module_name(&self) -> Option<String> {
        if self.module.is_some() {
            return self.module.clone();
        }
        let words: Vec<&str> = self.probe.as_ref()?.iter().map(String::as_str).collect();
        let name = match words.as_slice() {
            ["link", kind] => kind.split('-').next()?.to_owned(),
            ["qdisc", "clsact" | "ingress"] => "sch_ingress".into(),
            ["qdisc", kind] => format!("sch_{kind}"),
            ["filter", "mirred"] => "act_mirred".into(),
            ["filter", kind] => format!("cls_{kind}"),
            ["filesystem", "iso9660"] => "isofs".into(),
            ["filesystem" | "mount", kind, ..] => (*kind).into(),
            ["overlay", ..] => "overlay".into(),
            ["xt", _, "MASQUERADE", _] => "xt_MASQUERADE".into(),
            ["xt", _, "DNAT" | "SNAT", _] => "xt_nat".into(),
            ["xt", _, "REJECT", _] => "ipt_REJECT".into(),
            ["xt", _, "rpfilter", _] => "ipt_rpfilter".into(),
            ["xt", _, "comment" | "mark" | "CT" | "LOG" | "NFLOG", _] | ["xt", _, _, _] => {
                format!("xt_{}", words[2])
            }
            ["nft-compat", ..] => "nft_compat".into(),
            ["nft-chain", _, "nat"] => "nft_chain_nat".into(),
            ["nft-chain", ..] => "nf_tables".into(),
            ["nft-expression", "reject"] => "nft_reject".into(),
            ["nft-expression", "fib"] => "nft_fib".into(),
            ["nft-expression", "counter"] => "nf_tables".into(),
            ["nft-expression", kind] => format!("nft_{kind}"),
            ["ipset", kind] => {
                format!("ip_set_{}", kind.replace([':', ','], "_").replace("hash_ip_", "hash_ip"))
            }
            _ => return None,
        };
        // ipset's modules have no separators after the first word.
        Some(match name.strip_prefix("ip_set_hash_") {
            Some(rest) => format!("ip_set_hash_{}", rest.replace('_', "")),
            None => name,
        })
    }
}

/// Whether a box carries a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Everything is there.
    Qualified,
    /// It runs, but something is lost.
    Degraded,
    /// It does not run.
    Unsupported,
    /// Nobody can say; never a "qualified" in disguise.
    Unknown,
}

impl Verdict {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Qualified => "qualified",
            Self::Degraded => "degraded",
            Self::Unsupported => "unsupported",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a profile is not qualified: one need or want that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lack {
    /// The expression over check ids.
    pub of: String,
    /// The worst state that decides it.
    pub state: State,
    /// The checks that would have to change.
    pub checks: Vec<String>,
    /// What is lost; nothing: the profile needs it.
    pub lost: Option<String>,
}

/// The verdict over one profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// The profile.
    pub profile: String,
    /// For people.
    pub title: String,
    /// The profiles of which this is a feature.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub part_of: Vec<String>,
    /// The verdict.
    pub verdict: Verdict,
    /// What lacks, needs first.
    pub lacks: Vec<Lack>,
    /// Other reasons: machine, release.
    pub notes: Vec<String>,
    /// What to take instead, when it is not qualified.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fallback: Vec<String>,
}

/// What an expression over facts comes to. Ordered: `And` is the least, `Or` the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Unknown,
    NotJudged,
    Yes,
}

fn truth(facts: &BTreeMap<String, Fact>, expr: &Expr) -> Truth {
    match expr {
        Expr::Name { name, .. } => match facts.get(name).map(|fact| fact.state) {
            Some(State::Present | State::Unloaded) => Truth::Yes,
            Some(State::NotJudged) => Truth::NotJudged,
            Some(State::Unknown | State::NotPermitted) | None => Truth::Unknown,
            Some(_) => Truth::No,
        },
        Expr::Not(inner) => match truth(facts, inner) {
            Truth::No => Truth::Yes,
            Truth::Yes => Truth::No,
            other => other,
        },
        Expr::All(parts) => parts.iter().map(|part| truth(facts, part)).min().unwrap_or(Truth::Yes),
        Expr::Any(parts) => parts.iter().map(|part| truth(facts, part)).max().unwrap_or(Truth::No),
    }
}

/// The checks that keep an expression from holding; of alternatives the one that lacks least.
fn lacking(facts: &BTreeMap<String, Fact>, expr: &Expr) -> Vec<String> {
    if truth(facts, expr) == Truth::Yes {
        return Vec::new();
    }
    match expr {
        Expr::Name { name, .. } => vec![name.clone()],
        Expr::Not(inner) => inner.names().into_iter().map(Into::into).collect(),
        Expr::All(parts) => parts.iter().flat_map(|part| lacking(facts, part)).collect(),
        Expr::Any(parts) => {
            parts.iter().map(|part| lacking(facts, part)).min_by_key(Vec::len).unwrap_or_default()
        }
    }
}

/// Judges one profile.
pub fn judge(
    facts: &BTreeMap<String, Fact>,
    profile: &Profile,
    release: Option<Release>,
    arch: Option<&str>,
) -> Judgement {
    let lack = |expr: &Expr, lost: Option<&String>| {
        let checks = lacking(facts, expr);
        let states = checks.iter().filter_map(|id| facts.get(id)).map(|fact| fact.state);
        // Missing decides before "not permitted".
        let state = states.min_by_key(|state| (state.good(), *state)).unwrap_or(State::Unknown);
        Lack { of: expr.to_string(), state, checks, lost: lost.cloned() }
    };
    let (mut lacks, mut notes) = (Vec::new(), Vec::new());
    let mut verdict = Verdict::Qualified;
    for expr in &profile.needs {
        match truth(facts, expr) {
            Truth::Yes => continue,
            Truth::No => verdict = Verdict::Unsupported,
            Truth::Unknown | Truth::NotJudged if verdict != Verdict::Unsupported => {
                verdict = Verdict::Unknown;
            }
            Truth::Unknown | Truth::NotJudged => {}
        }
        lacks.push(lack(expr, None));
    }
    for want in &profile.wants {
        // Of what a file cannot say nothing is lost as far as the file says.
        if matches!(truth(facts, &want.expr), Truth::Yes | Truth::NotJudged) {
            continue;
        }
        if verdict == Verdict::Qualified {
            verdict = Verdict::Degraded;
        }
        lacks.push(lack(&want.expr, Some(&want.lost)));
    }
    if let (Some(arch), false) = (arch, profile.arch.is_empty())
        && !profile.arch.iter().any(|known| known == arch)
    {
        notes.push(format!("supported on {}, this is {arch}", profile.arch.join(", ")));
        verdict = Verdict::Unsupported;
    }
    if let (Some(oldest), Some(release)) = (profile.kernel, release)
        && release < oldest
    {
        notes
            .push(format!("supported from kernel {}.{} on, this is {release}", oldest.0, oldest.1));
        if verdict == Verdict::Qualified {
            verdict = Verdict::Degraded;
        }
    }
    let fallback =
        if verdict == Verdict::Qualified { Vec::new() } else { profile.fallback.clone() };
    Judgement {
        profile: profile.id.clone(),
        title: profile.title.clone(),
        part_of: profile.part_of.clone(),
        verdict,
        lacks,
        notes,
        fallback,
    }
}

/// What to run on this box.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// Profile of the network; nothing: pods on the host's network only.
    pub cni: Option<String>,
    /// Its features that are qualified or degraded.
    pub features: Vec<String>,
    /// Who carries services.
    pub proxy: Option<String>,
    /// What is lost against the best.
    pub lost: Vec<String>,
}

/// Judges every profile; a feature is never better than what it is part of.
pub fn judge_all(
    table: &Table,
    facts: &BTreeMap<String, Fact>,
    release: Option<Release>,
    arch: Option<&str>,
) -> Vec<Judgement> {
    let mut judgements: Vec<Judgement> = Vec::new();
    for profile in &table.profiles {
        let mut own = judge(facts, profile, release, arch);
        let whole = |id: &String| judgements.iter().find(|other| &other.profile == id);
        // The best of what it is part of; the order of verdicts is from good to bad.
        let best = own.part_of.iter().filter_map(whole).map(|whole| whole.verdict).min();
        if let Some(best @ (Verdict::Unsupported | Verdict::Unknown)) = best
            && own.verdict != Verdict::Unsupported
        {
            own.notes.push(format!("what it is part of is {}", best.words()));
            own.verdict = best;
        }
        judgements.push(own);
    }
    judgements
}

/// The first rung of the ladder that holds.
pub fn advise(table: &Table, judgements: &[Judgement]) -> Advice {
    let runs = |id: &String| {
        let judgement = judgements.iter().find(|judgement| &judgement.profile == id);
        judgement.is_some_and(|j| matches!(j.verdict, Verdict::Qualified | Verdict::Degraded))
    };
    let rung = table.ladder.iter().find(|rung| {
        runs(&rung.cni) && rung.with.iter().all(&runs) && rung.proxy.as_ref().is_none_or(&runs)
    });
    let Some(rung) = rung else {
        return Advice {
            cni: None,
            features: Vec::new(),
            proxy: None,
            lost: vec!["pods have no network of their own: `hostNetwork` only".into()],
        };
    };
    let part = |j: &&Judgement| j.part_of.contains(&rung.cni) && runs(&j.profile);
    let features = judgements.iter().filter(part).map(|j| j.profile.clone()).collect();
    let own = judgements.iter().find(|judgement| judgement.profile == rung.cni);
    let lost =
        own.map(|own| own.lacks.iter().filter_map(|lack| lack.lost.clone()).collect::<Vec<_>>());
    let lost = rung.lost.iter().cloned().chain(lost.unwrap_or_default()).collect();
    Advice { cni: Some(rung.cni.clone()), features, proxy: rung.proxy.clone(), lost }
}
