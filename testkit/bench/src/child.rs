//! Programs that run beside the bench: asked by a line on their standard input, they answer with a line of JSON.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

/// A running program; it is ended with the value.
pub(crate) struct Child {
    child: std::process::Child,
    questions: Option<ChildStdin>,
    answers: Option<BufReader<ChildStdout>>,
}

impl Child {
    /// This program itself, with other arguments.
    pub(crate) fn of_self(arguments: &[&str]) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let questions = child.stdin.take();
        let answers = child.stdout.take().map(BufReader::new);
        Ok(Self { child, questions, answers })
    }

    /// A program, with its output in a file.
    pub(crate) fn of_program(program: &Path, arguments: &[&str], log: &Path) -> Result<Self> {
        let log = File::create(log)?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start `{}`", program.display()))?;
        Ok(Self { child, questions: None, answers: None })
    }

    /// Id of its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A program in another network namespace, with its output in a file.
    pub(crate) fn in_namespace(
        namespace: &str,
        program: &Path,
        arguments: &[&str],
        log: &Path,
    ) -> Result<Self> {
        let log = File::create(log)?;
        // `ip netns exec` becomes the program, so its process is the program's.
        let child = Command::new("ip")
            .args(["netns", "exec", namespace])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start `{}`", program.display()))?;
        Ok(Self { child, questions: None, answers: None })
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask(&mut self, question: &str) -> Result<Value> {
        let questions = self.questions.as_mut().context("this program is not asked anything")?;
        writeln!(questions, "{question}")?;
        questions.flush()?;
        self.answer().with_context(|| format!("no answer to `{question}`"))
    }

    /// The next line of its output.
    pub(crate) fn answer(&mut self) -> Result<Value> {
        let answers = self.answers.as_mut().context("this program does not answer")?;
        let mut line = String::new();
        ensure!(answers.read_line(&mut line)? > 0, "the program has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Resident bytes.
    pub(crate) fn rss(&self) -> Result<u64> {
        self.status("VmRSS:")
    }

    /// Most resident bytes since the start or the last [`Self::forget_peak`].
    pub(crate) fn rss_peak(&self) -> Result<u64> {
        self.status("VmHWM:")
    }

    /// The peak is what it is now.
    pub(crate) fn forget_peak(&self) -> Result<()> {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")
            .context("could not reset the peak of the memory")
    }

    fn status(&self, name: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().split(' ').next());
        Ok(kib.with_context(|| format!("no {name}"))?.parse::<u64>()? * 1024)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
