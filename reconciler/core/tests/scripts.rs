//! Script in, text out: every file of `input/` is run and compared with the file of the same name in `output/`.
//! `UPDATE_GOLDEN=1` rewrites the outputs; the difference is what a review looks at.
//!
//! A script holds files and commands, read from the top:
//!
//! ```text
//! -- sites/a.yaml --      the lines up to the next `--` or `>` are this file from here on
//! -- sites/a.yaml gone -- the file is removed
//! > render                print objects and problems
//! > problems              print problems only
//! > sync                  print the plan against what earlier syncs applied, then take it as done
//! > resync                the same, but apply everything
//! > fail APP              from here on the API rejects this app's objects: its steps are printed, not done
//! ```

#![allow(clippy::disallowed_methods)] // the scripts are files

use skerry_reconciler_core::{
    Inventory, ReleaseKey, Rendered, Source, Step, plan, plan_removals, render, resync,
};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

#[test]
fn every_script_prints_what_its_output_file_says() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut names: Vec<_> = std::fs::read_dir(tests.join("input"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.is_empty());
    let mut different = Vec::new();
    for name in names {
        let output = run(&std::fs::read_to_string(tests.join("input").join(&name)).unwrap());
        let path = tests.join("output").join(&name);
        if update {
            std::fs::write(&path, &output).unwrap();
        } else if std::fs::read_to_string(&path).unwrap_or_default() != output {
            println!("==== {name} prints now\n{output}");
            different.push(name);
        }
    }
    assert!(different.is_empty(), "outputs differ: {different:?}; UPDATE_GOLDEN=1 rewrites them");
}

#[derive(Default)]
struct Fleet {
    source: Source,
    applied: BTreeMap<ReleaseKey, Inventory>,
    failing: Vec<String>,
    output: String,
}

fn run(script: &str) -> String {
    let mut fleet = Fleet::default();
    let mut file: Option<(String, String)> = None;
    for line in script.lines() {
        let header = line.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --"));
        let command = line.strip_prefix("> ");
        if (header.is_some() || command.is_some())
            && let Some((path, content)) = file.take()
        {
            fleet.source.insert(path, content.into_bytes().into()).unwrap();
        }
        match (header, command) {
            (Some(header), _) => match header.strip_suffix(" gone") {
                Some(path) => fleet.source.remove(path),
                None => file = Some((header.to_owned(), String::new())),
            },
            (_, Some(command)) => {
                writeln!(fleet.output, "> {command}").unwrap();
                fleet.execute(command);
            }
            _ => {
                if let Some((_, content)) = &mut file {
                    content.push_str(line);
                    content.push('\n');
                }
            }
        }
    }
    assert!(file.is_none(), "the script ends with a file, so nothing looks at it");
    fleet.output
}

impl Fleet {
    fn execute(&mut self, command: &str) {
        let rendered = render(&self.source);
        match command.split_whitespace().collect::<Vec<_>>()[..] {
            ["render"] => {
                self.output += &rendered.to_yaml();
                self.problems(&rendered);
            }
            ["problems"] => self.problems(&rendered),
            ["sync"] => self.sync(&rendered, false),
            ["resync"] => self.sync(&rendered, true),
            ["fail", app] => self.failing.push(app.to_owned()),
            _ => panic!("unknown command `{command}`"),
        }
    }

    fn problems(&mut self, rendered: &Rendered) {
        for problem in rendered.all_problems() {
            writeln!(self.output, "problem: {problem}").unwrap();
            if let Some(hint) = problem.hint {
                writeln!(self.output, "  hint: {hint}").unwrap();
            }
        }
        if rendered.roster.is_none() {
            writeln!(self.output, "names are incomplete: no site and no app counts as removed")
                .unwrap();
        }
    }

    fn sync(&mut self, rendered: &Rendered, everything: bool) {
        let mut idle = true;
        for (key, outcome) in &rendered.releases {
            let Ok(render) = outcome else {
                writeln!(self.output, "{key}: broken, left as it is").unwrap();
                idle = false;
                continue;
            };
            let inventory = self.applied.entry(key.clone()).or_default();
            let claimed = rendered.claimed(key);
            let steps = match everything {
                true => resync(render, inventory, &claimed),
                false => plan(render, inventory, &claimed),
            };
            let fails = self.failing.contains(&key.app);
            *inventory = inventory.with_planned(render);
            for step in &steps {
                idle = false;
                writeln!(
                    self.output,
                    "{key}: {}{}",
                    words(step),
                    if fails { " (rejected)" } else { "" }
                )
                .unwrap();
                if !fails {
                    inventory.record(step, Some(render));
                }
            }
        }
        let removals =
            rendered.roster.as_ref().map(|roster| plan_removals(roster, rendered, &self.applied));
        for removal in removals.into_iter().flatten().filter(|_| rendered.prune) {
            idle = false;
            for step in &removal.steps {
                writeln!(self.output, "{}: {}", removal.release, words(step)).unwrap();
            }
            writeln!(self.output, "{}: removed", removal.release).unwrap();
            self.applied.remove(&removal.release);
        }
        if idle {
            writeln!(self.output, "nothing to do").unwrap();
        }
    }
}

fn words(step: &Step) -> String {
    match step {
        Step::Apply(id) => format!("apply {id}"),
        Step::Prune { id, api_version } => format!("prune {id} ({api_version})"),
    }
}
