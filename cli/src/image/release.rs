//! The verbs of `skerry image` about releases: keys, statements about keys, and stores that a hub serves.

use super::explain;
use crate::fault::hinted;
use crate::{Output, out, table};
use anyhow::{Context, Result};
use serde_json::json;
use skerry_image::publish::{self, By, Outcome, PublishError, Release};
use skerry_image::sign::{self, ReleaseKey, ReleaseKeyError};
use skerry_image::trust::{Key, KeySet, Statement};
use skerry_init::verity::hex;
use skerry_qualify::judge::Verdict;
use skerry_qualify::report;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct PublishArgs {
    /// The bundle that `skerry image build` wrote
    #[arg(long, value_name = "FILE")]
    bundle: PathBuf,
    /// Folder that the hub serves releases from; made when it is not there
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Ed25519 key (PEM) that signs an unsigned bundle, and must be the one that has signed another
    #[arg(long, value_name = "FILE", conflicts_with = "trust_keys")]
    release_key: Option<PathBuf>,
    /// Public key (PEM) by which the bundle must be signed; may be repeated
    #[arg(long = "trust-key", value_name = "FILE")]
    trust_keys: Vec<PathBuf>,
    /// Name of the OsRelease that is printed
    #[arg(long, default_value = "stable")]
    channel: String,
    /// What `skerry qualify --output json` says of this version's kernel (a booted appliance, or `--config`): it goes into
    /// the OsRelease, and a site whose network the kernel does not carry does not get the version
    #[arg(long, value_name = "FILE")]
    kernel_report: Option<PathBuf>,
    /// A statement of `skerry image trust`, with its signature beside it; it goes into the OsRelease, and so to the
    /// appliances
    #[arg(long, value_name = "FILE")]
    trust_statement: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct ExportArgs {
    /// Folder that `skerry image publish` has filled
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Version, or digest with or without `sha256:`
    release: String,
    /// The bundle; a stick with the label SKERRYCFG has it as `update.bundle`
    #[arg(long, value_name = "FILE", default_value = "update.bundle")]
    out: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct TrustArgs {
    /// Higher than that of the keys that the appliances trust now
    #[arg(long)]
    counter: u64,
    /// Public key (PEM) that is trusted from then on, instead of all of now; may be repeated
    #[arg(long = "key", value_name = "FILE", required = true)]
    keys: Vec<PathBuf>,
    /// Ed25519 key (PEM) that the appliances trust now
    #[arg(long, value_name = "FILE")]
    sign_with: PathBuf,
    /// The statement; its signature goes beside it, with `.sig`
    #[arg(long, value_name = "FILE", default_value = "release-keys.json")]
    out: PathBuf,
}

/// Which keys an image trusts: those given, and the public half of the one that signs it.
pub(super) fn key_set(
    counter: u64,
    own: Option<&ReleaseKey>,
    others: &[PathBuf],
) -> Result<Option<KeySet>> {
    let mut keys: Vec<Key> = own.map(ReleaseKey::public).into_iter().collect();
    for file in others {
        let key = sign::public_key(file).map_err(bad_key)?;
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    if keys.len() > skerry_image::trust::KEYS_MAX {
        let most = skerry_image::trust::KEYS_MAX;
        let what = format!("{} keys are given, an image trusts at most {most}", keys.len());
        return Err(hinted(what, "leave those out that sign nothing any more"));
    }
    Ok((!keys.is_empty()).then_some(KeySet { counter, keys }))
}

pub(super) fn bad_key(error: ReleaseKeyError) -> anyhow::Error {
    explain(&error, Some(error.hint()))
}

fn bad(error: PublishError) -> anyhow::Error {
    explain(&error, error.hint())
}

pub(super) fn publish(args: &PublishArgs, output: Output) -> Result<ExitCode> {
    if !publish::is_channel(&args.channel) {
        let what = format!("`{}` cannot be the name of a channel", args.channel);
        return Err(hinted(what, "at most 63 of a-z, 0-9 and -, for example `stable`"));
    }
    let key = args.release_key.as_deref().map(ReleaseKey::read).transpose().map_err(bad_key)?;
    let keys: Result<Vec<_>, _> =
        args.trust_keys.iter().map(|file| sign::public_key(file)).collect();
    let keys = keys.map_err(bad_key)?;
    let by = match (&key, keys.is_empty()) {
        (Some(key), _) => By::Key(key),
        (None, false) => By::Keys(&keys),
        (None, true) => By::Somebody,
    };
    let report = args.kernel_report.as_deref().map(kernel_report).transpose()?;
    let statement = args.trust_statement.as_deref().map(trust_lines).transpose()?;
    let (release, outcome) = publish::publish(&args.bundle, &args.store, by).map_err(bad)?;
    let mut yaml = publish::os_release(&release, &args.channel);
    if let Some((kernel, lines)) = report {
        let manifest = &release.manifest;
        if kernel != manifest.kernel {
            let what = format!(
                "the report is about kernel `{kernel}`, the version has `{}`",
                manifest.kernel
            );
            return Err(hinted(
                what,
                "judge the version's own kernel; the store has the version already",
            ));
        }
        yaml += &lines;
    }
    yaml += &statement.unwrap_or_default();
    if output == Output::Json {
        out::line(json!({
            "version": release.manifest.version,
            "counter": release.manifest.release_counter,
            "digest": format!("sha256:{}", release.digest),
            "folder": release.folder,
            "new": outcome == Outcome::New,
            "files": release.files.iter().map(|(name, bytes)| json!({"name": name, "bytes": bytes})).collect::<Vec<_>>(),
            "os_release": yaml,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    if matches!(by, By::Somebody) {
        eprintln!("note: who signed the bundle was not checked; --trust-key PUB does");
    }
    eprintln!("{}", words(&release, outcome));
    let rows = release.files.iter().map(|(name, bytes)| vec![name.clone(), bytes.to_string()]);
    for row in rows {
        eprintln!("  {:20}{:>12} bytes", row[0], row[1]);
    }
    eprintln!("the OsRelease that offers it:");
    out::text(&yaml)?;
    Ok(ExitCode::SUCCESS)
}

/// The kernel that a report is about, and its verdicts as lines of an OsRelease.
fn kernel_report(file: &Path) -> Result<(String, String)> {
    let text =
        std::fs::read(file).with_context(|| format!("could not read `{}`", file.display()))?;
    let report: report::File = serde_json::from_slice(&text).map_err(|error| {
        let what = format!("`{}` is no report: {error}", file.display());
        hinted(what, "`skerry qualify --output json` writes one")
    })?;
    let mut lines = String::from("  kernel:\n");
    for judgement in &report.report.profiles {
        if judgement.verdict != Verdict::Unknown {
            lines += &format!("    {}: {}\n", judgement.profile, judgement.verdict.words());
        }
    }
    Ok((report.report.subject.kernel, lines))
}

/// A key statement and its signature as lines of an OsRelease. JSON texts are texts of YAML.
fn trust_lines(file: &Path) -> Result<String> {
    let beside = PathBuf::from(format!("{}.sig", file.display()));
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("could not read `{}`", path.display()))
    };
    let (text, signature) = (read(file)?, read(&beside)?);
    let bad =
        |error: String| hinted(error, "`skerry image trust` makes a statement and its signature");
    Statement::parse(&text).map_err(|error| bad(error.to_string()))?;
    let text = String::from_utf8(text).map_err(|error| bad(error.to_string()))?;
    Ok(format!("  trust:\n    statement: {}\n    signature: {}\n", json!(text), hex(&signature)))
}

fn words(release: &Release, outcome: Outcome) -> String {
    let how = match outcome {
        Outcome::New => "is in the store",
        Outcome::AsItWas => "was in the store already",
        Outcome::SignedAnew => "was in the store; its signature is replaced",
    };
    let manifest = &release.manifest;
    format!(
        "version {}, release counter {}, digest sha256:{} {how}",
        manifest.version, manifest.release_counter, release.digest
    )
}

/// Shows what a store has.
pub(super) fn releases(store: &Path, output: Output) -> Result<ExitCode> {
    let found = publish::list(store).map_err(bad)?;
    if output == Output::Json {
        let rows = found.iter().map(|one| {
            json!({"version": one.manifest.version, "counter": one.manifest.release_counter,
                "arch": one.manifest.arch, "variant": one.manifest.variant,
                "digest": format!("sha256:{}", one.digest)})
        });
        out::line(serde_json::Value::from(rows.collect::<Vec<_>>()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<_> = found
        .iter()
        .map(|one| {
            let it = &one.manifest;
            let counter = it.release_counter.to_string();
            let digest = format!("sha256:{}", one.digest);
            vec![it.version.clone(), counter, it.arch.clone(), it.variant.clone(), digest]
        })
        .collect();
    table::print(&["VERSION", "COUNTER", "ARCH", "VARIANT", "DIGEST"], &rows)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn export(args: &ExportArgs, output: Output) -> Result<ExitCode> {
    let release = publish::find(&args.store, &args.release).map_err(bad)?;
    let bytes = publish::export(&release, &args.out).map_err(bad)?;
    match output {
        Output::Json => out::line(json!({
            "file": args.out, "bytes": bytes, "version": release.manifest.version,
            "counter": release.manifest.release_counter,
            "digest": format!("sha256:{}", release.digest),
        }))?,
        Output::Table => {
            eprintln!(
                "version {} is in `{}` ({bytes} bytes)",
                release.manifest.version,
                args.out.display()
            );
            eprintln!(
                "put it as `update.bundle` on a stick whose FAT volume has the label SKERRYCFG"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn release_key(file: &Path, output: Output) -> Result<ExitCode> {
    let key = ReleaseKey::make(file).map_err(bad_key)?;
    let public = format!("{}.pub", file.display());
    match output {
        Output::Json => {
            out::line(json!({"key": file, "public": public, "hex": hex(&key.public())}))?
        }
        Output::Table => eprintln!(
            "`{}` signs releases: keep it off every server; `{public}` is for --trust-key",
            file.display()
        ),
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn trust(args: &TrustArgs, output: Output) -> Result<ExitCode> {
    let signer = ReleaseKey::read(&args.sign_with).map_err(bad_key)?;
    let Some(set) = key_set(args.counter, None, &args.keys)? else {
        return Err(hinted("a statement needs a key", "give one with --key"));
    };
    let text = Statement::new(set.counter, &set.keys).to_json();
    let signature = signer.sign(text.as_bytes());
    let beside = PathBuf::from(format!("{}.sig", args.out.display()));
    for (path, bytes) in [(&args.out, text.as_bytes()), (&beside, &signature[..])] {
        std::fs::write(path, bytes)
            .with_context(|| format!("could not write `{}`", path.display()))?;
    }
    let keys: Vec<_> = set.keys.iter().map(|key| hex(key)).collect();
    match output {
        Output::Json => out::line(json!({
            "file": args.out, "signature": beside, "counter": set.counter, "keys": keys,
            "signed_by": hex(&signer.public()),
        }))?,
        Output::Table => eprintln!(
            "from counter {} on, {} keys are trusted; `{}` and `{}` go to the appliances",
            set.counter,
            keys.len(),
            args.out.display(),
            beside.display()
        ),
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statement_of_the_command_line_is_taken_by_who_trusts_its_signer() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["old", "new"] {
            release_key(&at(name), Output::Json).unwrap();
        }
        let args = TrustArgs {
            counter: 2,
            keys: vec![at("new.pub"), at("new.pub")],
            sign_with: at("old"),
            out: at("release-keys.json"),
        };
        trust(&args, Output::Json).unwrap();
        let old = ReleaseKey::read(&at("old")).unwrap();
        let known = key_set(1, Some(&old), &[]).unwrap().unwrap();
        let (text, signature) = (
            std::fs::read(at("release-keys.json")).unwrap(),
            std::fs::read(at("release-keys.json.sig")).unwrap(),
        );
        let after = known.after(&text, &signature).unwrap();
        let new = sign::public_key(&at("new.pub")).unwrap();
        assert_eq!(after, KeySet { counter: 2, keys: vec![new] });
        assert!(key_set(1, None, &[]).unwrap().is_none());
        // As lines of an OsRelease it is the same, byte for byte.
        let lines = trust_lines(&at("release-keys.json")).unwrap();
        let spec = format!(
            "version: a\ncounter: 1\ndigest: sha256:{}\n{}",
            "0".repeat(64),
            lines.replace("\n  ", "\n").trim_start()
        );
        let spec: skerry_api::fleet::os::OsReleaseSpec = serde_saphyr::from_str(&spec).unwrap();
        let told = spec.trust.unwrap();
        assert_eq!(told.statement.as_bytes(), text);
        assert_eq!(skerry_init::verity::unhex(&told.signature), Some(signature));
        let error = key_set(1, None, &[at("old")]).unwrap_err();
        assert!(format!("{error:#}").contains("old"), "{error:#}");
    }

    #[test]
    fn channel_is_checked_before_anything_is_read() {
        let args = PublishArgs {
            bundle: "none".into(),
            store: "none".into(),
            release_key: None,
            trust_keys: Vec::new(),
            channel: "Stable!".into(),
            kernel_report: None,
            trust_statement: None,
        };
        let error = publish(&args, Output::Table).unwrap_err();
        assert!(error.to_string().contains("`Stable!`"), "{error}");
        assert!(!Path::new("none").exists());
    }
}
