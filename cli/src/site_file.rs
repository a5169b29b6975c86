//! `skerry site`: the file that tells an appliance who it is and where its hub is.

use crate::fault::hinted;
use crate::{Output, cluster, out, token};
use anyhow::{Context, Result};
use clap::Subcommand;
use serde_json::{Map, Value, json};
use skerry_init::site::{self, Site};
use skerry_reconciler_core::{Repository, Source};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Write a site.toml with a join token
    New(NewArgs),
    /// Tell everything that is wrong with a site.toml; exit code 1 when something is
    Check {
        /// The file
        #[arg(default_value = "site.toml")]
        file: PathBuf,
    },
    /// Print the JSON Schema of site.toml, for editors
    Schema,
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("who").required(true).args(["node", "name_from"])))]
pub(crate) struct NewArgs {
    /// Name of the node
    #[arg(long)]
    node: Option<String>,
    /// Let each machine name itself after its `serial`, `mac` or `machine-id`; one file for many machines
    #[arg(long, value_name = "WHAT", value_parser = ["serial", "mac", "machine-id"])]
    name_from: Option<String>,
    /// What such names begin with
    #[arg(long, requires = "name_from", default_value = "")]
    prefix: String,
    /// The hub: a name or address for the usual ports, or wss://host:port (may be repeated) with --enrol
    #[arg(long, value_name = "ADDR")]
    hub: Vec<String>,
    /// The enrolment listener, https://host:port
    #[arg(long, value_name = "URL")]
    enrol: Option<String>,
    /// The fleet's folder: the node has to be in one of its sites, and `spec.vars.appliance` of fleet and site are taken
    #[arg(long, value_name = "DIR")]
    repo: Option<PathBuf>,
    /// The site in that folder; needed with --name-from
    #[arg(long, requires = "repo")]
    site: Option<String>,
    /// A join token, or `-` for standard input, or `none`; without it one is made in the cluster
    #[arg(long)]
    token: Option<String>,
    /// Time until a token that is made here expires: a number and s, m, h or d
    #[arg(long, default_value = "24h", value_parser = token::span)]
    ttl: Duration,
    /// How many machines may use a token that is made here, with --name-from
    #[arg(long, default_value_t = 1, requires = "name_from", value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// A file with a higher one replaces what the machine has
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    revision: u64,
    /// Where to write it, readable by its owner only; `-` is standard output
    #[arg(long, default_value = "site.toml")]
    out: PathBuf,
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    match verb {
        Verb::New(args) => new(args, kubeconfig, output).await,
        Verb::Check { file } => check(&file, output),
        Verb::Schema => {
            out::text(site::SCHEMA)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn new(args: NewArgs, kubeconfig: Option<PathBuf>, output: Output) -> Result<ExitCode> {
    let mut tables = match &args.repo {
        Some(folder) => from_fleet(folder, args.node.as_deref(), args.site.as_deref())?,
        None => Map::new(),
    };
    merge(&mut tables, from_arguments(&args)?);
    // Everything but the token is checked before a token is made.
    let file = site_of(&tables)?;
    let secret = match args.token.as_deref() {
        Some("none") => None,
        Some("-") => {
            Some(std::io::read_to_string(std::io::stdin()).context("could not read the token")?)
        }
        Some(token) => Some(token.to_owned()),
        None => Some(create_token(&args, kubeconfig).await?),
    };
    let file = match secret {
        None => file,
        Some(secret) => {
            let mut hub = Map::new();
            hub.insert("token".into(), secret.trim().into());
            merge(&mut tables, Map::from_iter([("hub".to_owned(), Value::Object(hub))]));
            site_of(&tables)?
        }
    };
    let text = file.to_toml();
    if args.out == Path::new("-") {
        out::text(&text)?;
        return Ok(ExitCode::SUCCESS);
    }
    crate::up::write_secret(&args.out, text.as_bytes())?;
    match output {
        Output::Table => {
            eprintln!(
                "wrote `{}`; it holds a secret until the machine has joined",
                args.out.display()
            );
            eprintln!(
                "embed it with `skerry image build --site`, or copy it to a USB stick labelled SKERRYCFG"
            );
        }
        Output::Json => out::line(json!({"file": args.out, "revision": file.revision}))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create_token(args: &NewArgs, kubeconfig: Option<PathBuf>) -> Result<String> {
    let client = cluster::connect(kubeconfig).await?;
    let (pattern, uses) = match &args.node {
        Some(node) => (node.clone(), 1),
        None => (format!("{}*", args.prefix), args.uses),
    };
    let made = skerry_cloudcore::create_batch_token(&client, &pattern, uses, args.ttl).await;
    Ok(made.map_err(|error| token::explain(&pattern, &error))?.token.to_string())
}

/// The tables of site.toml that follow from the command line.
fn from_arguments(args: &NewArgs) -> Result<Map<String, Value>> {
    let mut tables = json!({"revision": args.revision, "node": {}});
    match (&args.node, &args.name_from) {
        (Some(node), _) => tables["node"]["name"] = json!(node),
        (None, source) => tables["node"] = json!({"name-from": source, "prefix": args.prefix}),
    }
    let plain = |hub: &&String| !hub.contains("://");
    match args.hub.iter().filter(plain).count() {
        0 if args.hub.is_empty() => {}
        0 => tables["hub"] = json!({"address": args.hub}),
        _ if args.hub.len() == 1 => tables["hub"] = hub_at(&args.hub[0]),
        _ => {
            let hint = "give each of them as wss://host:port, and --enrol https://host:port";
            return Err(hinted("more than one --hub, and not all are addresses with a port", hint));
        }
    }
    if let Some(enrol) = &args.enrol {
        tables["hub"]["enrol"] = json!(enrol);
    }
    let Value::Object(tables) = tables else { unreachable!("it was made as a map above") };
    Ok(tables)
}

/// The listeners of a hub on their usual ports.
fn hub_at(host: &str) -> Value {
    let host = match host.parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]"),
        Err(_) => host.to_owned(),
    };
    json!({
        "address": [format!("wss://{host}:10000")],
        "enrol": format!("https://{host}:10002"),
        "tunnel": format!("wss://{host}:10004"),
    })
}

/// `spec.vars.appliance` of the fleet, and over it that of the site which has the node.
fn from_fleet(folder: &Path, node: Option<&str>, site: Option<&str>) -> Result<Map<String, Value>> {
    let repository = Repository::read(&read_sites(folder)?);
    if let Some(problem) = repository
        .problems
        .iter()
        .find(|problem| problem.file.starts_with("sites/") || problem.file == "fleet.yaml")
    {
        let hint =
            problem.hint.clone().unwrap_or_else(|| "`skerry render` shows all of them".into());
        return Err(hinted(format!("{}: {}", problem.file, problem.message), hint));
    }
    let known = || {
        let names = repository.sites.iter().map(|entry| entry.site.metadata.name.as_str());
        names.collect::<Vec<_>>().join(", ")
    };
    let entry = repository.sites.iter().find(|entry| match (site, node) {
        (Some(site), _) => entry.site.metadata.name == site,
        (None, Some(node)) => entry.site.spec.nodes.iter().any(|name| name == node),
        (None, None) => false,
    });
    let Some(entry) = entry else {
        let (what, hint) = match (site, node) {
            (Some(site), _) => {
                (format!("the fleet has no site `{site}`"), format!("it has: {}", known()))
            }
            (None, Some(node)) => (
                format!("no site of the fleet has the node `{node}`"),
                format!("add it to `spec.nodes` of its site first; sites: {}", known()),
            ),
            (None, None) => {
                ("the site is not known".into(), format!("name it with --site: {}", known()))
            }
        };
        return Err(hinted(what, hint));
    };
    if let Some(node) = node.filter(|node| !entry.site.spec.nodes.iter().any(|name| name == node)) {
        let what = format!("site `{}` has no node `{node}`", entry.site.metadata.name);
        return Err(hinted(what, format!("add it to `spec.nodes` in `{}` first", entry.file)));
    }
    let fleet = repository.fleet.as_ref().map(|fleet| &fleet.spec);
    let mut tables = Map::new();
    let sources = [
        ("fleet.yaml", fleet.map(|spec| &spec.vars)),
        (entry.file.as_str(), Some(&entry.site.spec.vars)),
    ];
    for (file, vars) in sources {
        match vars.and_then(|vars| vars.get("appliance")) {
            None => {}
            Some(Value::Object(found)) => merge(&mut tables, found.clone()),
            Some(_) => {
                let hint = "it holds the tables of site.toml: hub, network, clock, console, update";
                return Err(hinted(format!("{file}: `spec.vars.appliance` is not a map"), hint));
            }
        }
    }
    let channel = entry.site.spec.os_channel.as_ref();
    let channel = channel.or(fleet.and_then(|spec| spec.defaults.os_channel.as_ref()));
    if let (Some(channel), None) = (channel, tables.get("update")) {
        tables.insert("update".into(), json!({"channel": channel}));
    }
    Ok(tables)
}

/// `fleet.yaml` and the files of `sites/`.
fn read_sites(folder: &Path) -> Result<Source> {
    let mut source = Source::default();
    let mut add = |name: &str| -> Result<()> {
        let path = folder.join(name);
        let bytes =
            std::fs::read(&path).with_context(|| format!("could not read `{}`", path.display()))?;
        source.insert(name, bytes.into()).map_err(anyhow::Error::new)?;
        Ok(())
    };
    add("fleet.yaml")
        .map_err(|error| hinted(format!("{error:#}"), "name the fleet's folder with --repo"))?;
    let sites = folder.join("sites");
    let entries = std::fs::read_dir(&sites)
        .with_context(|| format!("could not read `{}`", sites.display()))?;
    for entry in entries {
        let name = format!("sites/{}", entry?.file_name().to_string_lossy());
        if Source::wants(&name) {
            add(&name)?;
        }
    }
    Ok(source)
}

/// Puts `over` on top: maps are joined, everything else is replaced.
fn merge(under: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Object(under)), Value::Object(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// Checks the tables with the parser of the appliance itself.
fn site_of(tables: &Map<String, Value>) -> Result<Site> {
    let text = toml::to_string(tables).context("the values cannot be written as TOML")?;
    Site::parse(&text).map_err(|error| {
        let whats: Vec<_> = error.mistakes.iter().map(|mistake| mistake.what.as_str()).collect();
        let hints: Vec<_> = error.mistakes.iter().map(|mistake| mistake.hint.as_str()).collect();
        let missing_hub = !tables.contains_key("hub");
        let hint = match missing_hub {
            true => "name the hub with --hub, or in `spec.vars.appliance.hub` of fleet.yaml".into(),
            false => hints.join("; "),
        };
        hinted(format!("this makes no site.toml: {}", whats.join("; ")), hint)
    })
}

fn check(file: &Path, output: Output) -> Result<ExitCode> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("could not read `{}`", file.display()))?;
    let mistakes = Site::parse(&text).err().map(|error| error.mistakes).unwrap_or_default();
    match output {
        Output::Json => {
            let told = mistakes.iter();
            let told =
                told.map(|one| json!({"line": one.line, "what": one.what, "hint": one.hint}));
            out::line(json!({"file": file, "mistakes": told.collect::<Vec<_>>()}))?;
        }
        Output::Table => {
            for one in &mistakes {
                out::line(format_args!(
                    "{}:{}: {}\n  hint: {}",
                    file.display(),
                    one.line,
                    one.what,
                    one.hint
                ))?;
            }
            if mistakes.is_empty() {
                eprintln!("`{}` is good", file.display());
            }
        }
    }
    Ok(if mistakes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
    }

    fn args(words: &str) -> NewArgs {
        match Line::try_parse_from(words.split(' ')).map(|line| line.verb) {
            Ok(Verb::New(args)) => args,
            Ok(_) => panic!("another verb"),
            Err(error) => panic!("{error}"),
        }
    }

    const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff.a.b.c";

    async fn make(words: &str, dir: &Path) -> Result<Site, String> {
        let out = dir.join("site.toml");
        let args = args(&format!("t new {words} --out {}", out.display()));
        new(args, None, Output::Table).await.map_err(|error| format!("{error:#}"))?;
        Ok(Site::parse(&std::fs::read_to_string(out).expect("it was written")).expect("it is good"))
    }

    fn fleet(dir: &Path) -> String {
        let sites = dir.join("fleet/sites");
        std::fs::create_dir_all(&sites).unwrap();
        let head = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: ";
        let fleet = format!(
            "{head}Fleet\nmetadata:\n  name: f\nspec:\n  vars:\n    appliance:\n      hub:\n        address: [wss://hub.example:10000]\n        enrol: https://hub.example:10002\n      clock:\n        ntp: [a.example]\n  defaults:\n    osChannel: slow\n"
        );
        let site = format!(
            "{head}Site\nmetadata:\n  name: lisbon\nspec:\n  nodes: [lisbon-a]\n  vars:\n    appliance:\n      clock:\n        ntp: [b.example]\n      network:\n        interface:\n          - match: {{name: eth0}}\n            method: static\n            address: [10.0.2.15/24]\n"
        );
        std::fs::write(dir.join("fleet/fleet.yaml"), fleet).unwrap();
        std::fs::write(sites.join("lisbon.yaml"), site).unwrap();
        dir.join("fleet").display().to_string()
    }

    #[tokio::test]
    async fn file_for_a_node_has_the_usual_ports_and_the_token() {
        let dir = tempfile::tempdir().unwrap();
        let site =
            make(&format!("--node a --hub hub.example --token {TOKEN}"), dir.path()).await.unwrap();
        assert_eq!(site.hub.addresses, ["wss://hub.example:10000"]);
        assert_eq!(site.hub.enrol, "https://hub.example:10002");
        assert_eq!(site.token(), Some(TOKEN));
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(dir.path().join("site.toml")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "it holds a secret");
        let site = make("--node a --hub 2001:db8::1 --token none", dir.path()).await.unwrap();
        assert_eq!((site.hub.enrol.as_str(), site.token()), ("https://[2001:db8::1]:10002", None));
    }

    #[tokio::test]
    async fn fleet_says_what_the_command_line_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let repo = fleet(dir.path());
        let site =
            make(&format!("--node lisbon-a --repo {repo} --token none"), dir.path()).await.unwrap();
        assert_eq!(site.hub.addresses, ["wss://hub.example:10000"]);
        assert_eq!((site.ntp, site.channel.as_str()), (vec!["b.example".to_owned()], "slow"));
        assert_eq!(site.network.interfaces.len(), 1);
        let words = format!(
            "--name-from mac --prefix lisbon- --site lisbon --repo {repo} --hub other --token none"
        );
        let site = make(&words, dir.path()).await.unwrap();
        assert_eq!(site.hub.addresses, ["wss://other:10000"], "the command line is stronger");
        let error = make(&format!("--node porto-a --repo {repo} --token none"), dir.path())
            .await
            .unwrap_err();
        assert!(error.contains("no site of the fleet has the node `porto-a`"), "{error}");
        let words = format!("--node porto-a --site lisbon --repo {repo} --token none");
        let error = make(&words, dir.path()).await.unwrap_err();
        assert!(error.contains("site `lisbon` has no node `porto-a`"), "{error}");
    }

    #[tokio::test]
    async fn mistakes_are_told_before_a_token_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let error = make("--node A_b --hub hub.example", dir.path()).await.unwrap_err();
        assert!(error.contains("`A_b` is not a node name"), "{error}");
        let error = make("--node a", dir.path()).await.unwrap_err();
        assert!(error.contains("`hub` of the file is missing"), "{error}");
        let error = make("--node a --hub x --hub y", dir.path()).await.unwrap_err();
        assert!(error.contains("more than one --hub"), "{error}");
        assert!(!dir.path().join("site.toml").exists());
        assert!(Line::try_parse_from("t new --node a --name-from mac".split(' ')).is_err());
        assert!(Line::try_parse_from("t new --hub x".split(' ')).is_err());
    }
}
