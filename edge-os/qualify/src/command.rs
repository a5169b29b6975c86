//! The command line of `skerry-qualify`, shared with `skerry qualify`.

use crate::judge::{Evidence, Verdict};
use crate::kconfig::{Config, Release};
use crate::live;
use crate::modules::Modules;
use crate::probe::{self, Autoload, Plan};
use crate::publish;
use crate::report::{self, Mode, Report, Subject};
use crate::sign;
use crate::table::Table;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "Says which networks and runtimes this box, or a kernel's configuration, can carry

Usage: skerry qualify [OPTIONS]              the running machine
       skerry qualify --config FILE          a kernel's configuration (.config, config.gz, defconfig, vmlinux)
       skerry qualify diff A B               two reports (JSON) or two configurations
       skerry qualify verify FILE --ca FILE  a report that a node has signed
       skerry qualify --node NAME [--again]  what a node of the cluster reported; judged anew (`skerry` only)

Options:
  --config FILE          judge this configuration, run nothing
  --modules DIR          lib/modules/<release>, or the root of a mounted image
  --kernel-version V     release of the kernel, when the configuration does not say
  --arch A               machine, when the configuration does not say: x86_64, arm64, …
  --profiles FILE        add your own profiles (TOML, the form of profiles.toml); may be given again
  --autoload WHICH       modules that probes may make the kernel load: none, known (default), all
  --state DIR            folder whose disk is timed (default: the current one)
  --require PROFILE      answer no unless this profile is qualified; may be given again
  --profile PROFILE      with `diff`: only what this profile needs counts; may be given again
  --ca FILE              with `verify`: certificates of the cluster's CA (PEM)
  --output FORM          text (default), json or html
  --explain ID           what a check asks, and what it found
  --list                 all checks and profiles
  -h, --help             this
";

#[derive(Default)]
struct Args {
    config: Option<PathBuf>,
    modules: Option<PathBuf>,
    release: Option<String>,
    arch: Option<String>,
    profiles: Vec<PathBuf>,
    require: Vec<String>,
    output: Output,
    explain: Option<String>,
    list: bool,
    diff: Option<(PathBuf, PathBuf)>,
    /// What counts in a difference.
    needed: Vec<String>,
    verify: Option<PathBuf>,
    ca: Option<PathBuf>,
    help: bool,
    autoload: Option<Autoload>,
    state: Option<PathBuf>,
    /// Of the probing child: its group, and the last probe that is done.
    probes: Option<probe::Part>,
    after: String,
}

#[derive(Default, PartialEq)]
enum Output {
    #[default]
    Text,
    Json,
    Html,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The arguments are wrong.
    #[error("{0}\nhint: `skerry qualify --help` shows the options")]
    Usage(String),
    /// A file cannot be read.
    #[error("could not read `{path}`: {source}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration is none.
    #[error("`{path}`: {source}")]
    Config {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        source: crate::kconfig::ConfigError,
    },
    /// The modules cannot be read.
    #[error(transparent)]
    Modules(#[from] crate::modules::ModulesError),
    /// A file of profiles is wrong.
    #[error(transparent)]
    Table(#[from] crate::table::TableError),
    /// A report is none.
    #[error("`{path}` is neither a report nor a configuration: {report}; {config}")]
    Neither {
        /// Which one.
        path: PathBuf,
        /// Why no report.
        report: String,
        /// Why no configuration.
        config: String,
    },
    /// Not a report.
    #[error("`{path}` is no report: {source}\nhint: `skerry qualify --output json` writes one")]
    NoReport {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// This program cannot find itself.
    #[error("could not find this program's own file: {0}")]
    Program(std::io::Error),
}

/// Runs the command with its arguments, the program's name left out. `prefix` is what makes this program this command
/// again: `qualify` in `skerry`, nothing in `skerry-qualify`.
pub fn run(prefix: &[&str], args: impl Iterator<Item = String>) -> ExitCode {
    match parse(args).and_then(|args| answer(prefix, args)) {
        Ok((text, code)) => {
            // A reader that went away is no failure of ours.
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, CommandError> {
    let mut parsed = Args::default();
    while let Some(arg) = args.next() {
        let (name, mut inline) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                (name.to_owned(), Some(value.to_owned()))
            }
            _ => (arg, None),
        };
        let mut value = || {
            let value = inline.take().or_else(|| args.next());
            value.ok_or_else(|| CommandError::Usage(format!("`{name}` needs a value")))
        };
        match name.as_str() {
            "--config" => parsed.config = Some(value()?.into()),
            "--modules" => parsed.modules = Some(value()?.into()),
            "--kernel-version" => parsed.release = Some(value()?),
            "--arch" => parsed.arch = Some(value()?),
            "--profiles" => parsed.profiles.push(value()?.into()),
            "--require" => parsed.require.push(value()?),
            "--profile" => parsed.needed.push(value()?),
            "--ca" => parsed.ca = Some(value()?.into()),
            "--explain" => parsed.explain = Some(value()?),
            "--output" => {
                parsed.output = match value()?.as_str() {
                    "text" => Output::Text,
                    "json" => Output::Json,
                    "html" => Output::Html,
                    other => {
                        let text = format!("`--output {other}`: expected text, json or html");
                        return Err(CommandError::Usage(text));
                    }
                }
            }
            "--autoload" => {
                parsed.autoload = Some(match value()?.as_str() {
                    "none" => Autoload::None,
                    "known" => Autoload::Known,
                    "all" => Autoload::All,
                    other => {
                        let text = format!("`--autoload {other}`: expected none, known or all");
                        return Err(CommandError::Usage(text));
                    }
                });
            }
            "--state" => parsed.state = Some(value()?.into()),
            "--probes" => {
                let text = value()?;
                let usage = || CommandError::Usage(format!("`--probes {text}` is no part of them"));
                parsed.probes = Some(probe::Part::parse(&text).ok_or_else(usage)?);
            }
            "--after" => parsed.after = value()?,
            "--list" => parsed.list = true,
            "-h" | "--help" => parsed.help = true,
            "diff" => {
                let two = (args.next(), args.next());
                let (Some(a), Some(b)) = two else {
                    return Err(CommandError::Usage("`diff` needs two files".into()));
                };
                parsed.diff = Some((a.into(), b.into()));
            }
            "verify" => {
                let file = args.next();
                let usage = || CommandError::Usage("`verify` needs a file".into());
                parsed.verify = Some(file.ok_or_else(usage)?.into());
            }
            other => return Err(CommandError::Usage(format!("`{other}` is no option"))),
        }
        if inline.is_some() {
            return Err(CommandError::Usage(format!("`{name}` takes no value")));
        }
    }
    Ok(parsed)
}

fn answer(prefix: &[&str], args: Args) -> Result<(String, u8), CommandError> {
    if args.help {
        return Ok((USAGE.into(), 0));
    }
    let mut table = Table::built_in();
    for path in &args.profiles {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CommandError::Read { path: path.clone(), source })?;
        table.add_profiles(&path.display().to_string(), &text)?;
    }
    let autoload = args.autoload.unwrap_or(Autoload::Known);
    let state = args.state.clone().unwrap_or_else(|| ".".into());
    if let Some(part) = args.probes {
        probe::child(&table, part, &args.after, autoload, &state);
        return Ok((String::new(), 0));
    }
    if args.list {
        return Ok((list(&table), 0));
    }
    if let Some(path) = &args.verify {
        return verify(path, &args);
    }
    for profile in args.require.iter().chain(&args.needed) {
        if table.profile(profile).is_none() {
            let ids: Vec<_> = table.profiles.iter().map(|p| p.id.as_str()).collect();
            let text = format!("there is no profile `{profile}`; there are {}", ids.join(", "));
            return Err(CommandError::Usage(text));
        }
    }
    if let Some((a, b)) = &args.diff {
        return Ok(difference(&table, &load(&table, a)?, &load(&table, b)?, &args));
    }
    let (report, volatile) = match &args.config {
        Some(path) => (from_config(&table, path, &args)?, None),
        None => {
            let program = std::env::current_exe().map_err(CommandError::Program)?;
            let prefix = prefix.iter().map(|word| (*word).into()).collect();
            let plan = Plan { program, prefix, autoload, state };
            let modules = args.modules.as_deref().map(Modules::read).transpose()?;
            let (report, volatile) = live::qualify(&table, &plan, modules);
            (report, Some(volatile))
        }
    };
    if let Some(id) = &args.explain {
        return explain(&table, &report, id);
    }
    let text = match args.output {
        Output::Text => report.text(&table),
        Output::Json => report.json_with(volatile.as_ref()),
        Output::Html => report.html(&table, volatile.as_ref()),
    };
    let short = args.require.iter().any(|p| report.verdict(p) != Some(Verdict::Qualified));
    Ok((text, u8::from(short)))
}

/// Judges a configuration file.
fn from_config(table: &Table, path: &Path, args: &Args) -> Result<Report, CommandError> {
    let bytes =
        std::fs::read(path).map_err(|source| CommandError::Read { path: path.into(), source })?;
    let config = Config::read(&bytes)
        .map_err(|source| CommandError::Config { path: path.into(), source })?;
    let release = match &args.release {
        Some(text) => Some(Release::parse(text).ok_or_else(|| {
            CommandError::Usage(format!(
                "`--kernel-version {text}`: expected a release such as 6.1"
            ))
        })?),
        None => config.release,
    };
    let arch = args.arch.clone().or_else(|| config.arch.clone());
    let modules = args.modules.as_deref().map(Modules::read).transpose()?;
    let settings: String =
        config.symbols().map(|(name, value)| format!("{name}={value}\n")).collect();
    let subject = Subject {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        kernel: args
            .release
            .clone()
            .or(release.map(|r| r.to_string()))
            .unwrap_or("of unknown release".into()),
        arch: arch.clone().unwrap_or_else(|| "unknown machine".into()),
        config_digest: Some(report::digest(settings.as_bytes())),
        ..Subject::default()
    };
    let evidence = Evidence { config: Some(config), modules, release, arch, ..Evidence::default() };
    Ok(Report::new(table, &evidence, Mode::Static, subject))
}

/// A report from a file: a report, or a configuration that is judged now.
fn load(table: &Table, path: &Path) -> Result<Report, CommandError> {
    let bytes =
        std::fs::read(path).map_err(|source| CommandError::Read { path: path.into(), source })?;
    let report = match serde_json::from_slice::<report::File>(&bytes) {
        Ok(file) => return Ok(file.report),
        Err(error) => error.to_string(),
    };
    from_config(table, path, &Args::default()).map_err(|error| CommandError::Neither {
        path: path.into(),
        report,
        config: error.to_string(),
    })
}

/// Whether a node has signed a report: 0 it has, 1 it has not.
fn verify(path: &Path, args: &Args) -> Result<(String, u8), CommandError> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|source| CommandError::Read { path: path.into(), source })
    };
    let Some(ca) = &args.ca else {
        return Err(CommandError::Usage("`verify` needs `--ca FILE`".into()));
    };
    let file: report::File = serde_json::from_str(&read(path)?)
        .map_err(|source| CommandError::NoReport { path: path.into(), source })?;
    let (json, text, code) = match sign::verify(&file, &read(ca)?) {
        Ok(signer) => {
            let (name, kernel) = (&signer.node, &file.report.subject.kernel);
            let at = file.signature.as_ref().map(|signature| publish::rfc3339(signature.at_s));
            let at = at.unwrap_or_default();
            let text = format!(
                "node `{name}` signed this report of Linux {kernel} at {at} (certificate {})\n",
                signer.serial
            );
            let json = serde_json::json!({"signed": true, "node": name, "serial": signer.serial,
                "digest": file.digest, "at": at});
            (json, text, 0)
        }
        Err(error) => {
            let hint = error.hint();
            let json =
                serde_json::json!({"signed": false, "reason": error.to_string(), "hint": hint});
            (json, format!("no: {error}\nhint: {hint}\n"), 1)
        }
    };
    match args.output {
        Output::Json => Ok((format!("{json}\n"), code)),
        Output::Text | Output::Html => Ok((text, code)),
    }
}

fn difference(table: &Table, a: &Report, b: &Report, args: &Args) -> (String, u8) {
    let changes = match args.needed.as_slice() {
        [] => report::diff(a, b),
        needed => report::lost(table, a, b, needed),
    };
    let worse = changes.iter().any(|change| change.regression);
    if args.output == Output::Json {
        let json = serde_json::to_string_pretty(&changes).expect("texts only") + "\n";
        return (json, u8::from(worse));
    }
    let mut out = String::new();
    if changes.is_empty() {
        let (a, b) = (&a.subject.name, &b.subject.name);
        let _ = match args.needed.as_slice() {
            [] => writeln!(out, "{a} and {b} can do the same"),
            needed => {
                writeln!(out, "{b} loses nothing that {} needs against {a}", needed.join(", "))
            }
        };
        return (out, 0);
    }
    let width = changes.iter().map(|change| change.id.len()).max().unwrap_or(0);
    let _ = writeln!(out, "{:<8} {:<width$}  {:<16}  {:<16}", "WHAT", "NAME", "BEFORE", "AFTER");
    for change in &changes {
        let mark = if change.regression { "  worse" } else { "" };
        let (of, id, before, after) = (change.of, &change.id, &change.before, &change.after);
        let line = format!("{of:<8} {id:<width$}  {before:<16}  {after:<16}{mark}");
        let _ = writeln!(out, "{}", line.trim_end());
    }
    (out, u8::from(worse))
}

fn explain(table: &Table, report: &Report, id: &str) -> Result<(String, u8), CommandError> {
    let mut out = String::new();
    if let Some(check) = table.checks.get(id) {
        let _ = writeln!(out, "{id}: {}\n  why     {}", check.what, check.why);
        let line = |out: &mut String, name: &str, text: Option<String>| {
            if let Some(text) = text {
                let _ = writeln!(out, "  {name:<7} {text}");
            }
        };
        line(&mut out, "probe", check.probe.as_ref().map(|words| words.join(" ")));
        line(&mut out, "config", check.config.as_ref().map(ToString::to_string));
        line(&mut out, "since", check.since.map(|since| since.to_string()));
        line(&mut out, "module", check.module_name());
        line(&mut out, "hint", check.hint.clone());
        if let Some(fact) = report.facts.get(id) {
            let _ = writeln!(out, "  here    {}: {}", fact.state.words(), fact.evidence);
        }
        return Ok((out, 0));
    }
    let judgement = report.profiles.iter().find(|judgement| judgement.profile == id);
    let Some((judgement, profile)) = judgement.zip(table.profile(id)) else {
        return Err(CommandError::Usage(format!("there is no check or profile `{id}`")));
    };
    let _ = writeln!(out, "{id}: {}, {}", profile.title, judgement.verdict.words());
    let state = |id: &str| report.facts.get(id).map_or("unknown", |fact| fact.state.words());
    for (word, expr) in profile
        .needs
        .iter()
        .map(|expr| ("needs", expr))
        .chain(profile.wants.iter().map(|want| ("wants", &want.expr)))
    {
        let states: Vec<_> =
            expr.names().iter().map(|name| format!("{name} {}", state(name))).collect();
        let _ = writeln!(out, "  {word}  {expr}: {}", states.join(", "));
    }
    Ok((out, 0))
}

fn list(table: &Table) -> String {
    let mut out = String::from("PROFILES\n");
    for profile in &table.profiles {
        let _ = writeln!(out, "  {:<28} {}", profile.id, profile.title);
    }
    let _ = writeln!(out, "\nCHECKS ({})", table.checks.len());
    for check in table.checks.values() {
        let _ = writeln!(out, "  {:<28} {}", check.id, check.what);
    }
    out
}
