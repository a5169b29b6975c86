//! Running programs: echo, output, and errors that name the command.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The top folder of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository").into()
}

/// Says what is going on, on standard error.
pub(crate) fn say(text: impl AsRef<str>) {
    eprintln!("xtask: {}", text.as_ref());
}

/// Runs a command with its output on standard error; a failure names the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    say(line(command));
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("could not start `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output; a failure carries its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("could not start `{}`", line(command)))?;
    if !done.status.success() {
        bail!(
            "`{}` failed ({}): {}{}",
            line(command),
            done.status,
            String::from_utf8_lossy(&done.stderr).trim(),
            String::from_utf8_lossy(&done.stdout).trim(),
        );
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// The first program of that name on `PATH` or in the usual system folders.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"])
        .map(|folder| Path::new(folder).join(program))
        .find(|file| file.is_file())
}

/// Asks until the answer is `Some`, or says what was waited for.
///
/// The pause between two questions is 20 ms: short beside anything that is waited for here.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    let mut told = start;
    loop {
        let answer = question();
        if let Ok(Some(answer)) = answer {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            let last = answer.err().map(|error| format!("; last error: {error:#}"));
            bail!("no {what} after {} s{}", limit.as_secs(), last.unwrap_or_default());
        }
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            say(format!("waiting for {what} ({} s)", start.elapsed().as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Cargo, as a person would start it: without what the Cargo that runs us says of this crate. Build scripts that look
/// at it (ring's does) would run anew, and everything above them be built anew.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    cargo
}
