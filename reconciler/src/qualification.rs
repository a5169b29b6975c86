//! What nodes reported of their kernels, for the gate of sites: the shell around `skerry_reconciler_core::network`.
//!
//! A node's word is its NodeQualification; on a cloud that keeps none, the labels on its Node. A report of another kernel than
//! the one that the node runs now counts as none. The fleet's own profiles (`profiles/*.toml`) are judged here, over the
//! checks of the node's report, so that no node has to know them.

use crate::live::Live;
use kube::ResourceExt;
use kube::api::DynamicObject;
use skerry_api::fleet::v1alpha1::{GROUP, NodeQualificationStatus};
use skerry_qualify::judge::{self, Fact, Source, State};
use skerry_qualify::kconfig::Release;
use skerry_qualify::publish::PREFIX;
use skerry_qualify::table::Table;
use skerry_reconciler_core::network::{AUTO, Choice, Node, Row, Rung, Verdict, choose};
use skerry_reconciler_core::{ObjectId, Problem, Rendered, RenderedSite};
use std::collections::BTreeMap;

/// Kind of the objects.
pub(crate) const KIND: &str = "NodeQualification";
/// Where [`slim`] leaves the checks of a report.
const CHECKS: &str = "checks";

/// The profiles and the order of preference of one commit.
pub(crate) struct Profiles {
    table: Table,
    /// Profiles of the commit's own, in the table's order.
    own: Vec<String>,
    ladder: Vec<Rung>,
}

impl Profiles {
    /// The built-in ones and those of the commit; what is wrong with the latter is added to its problems, and so is every
    /// site that asks for a network which does not exist.
    pub(crate) fn new(rendered: &mut Rendered) -> Self {
        let mut table = Table::built_in();
        let built_in = table.profiles.len();
        for (path, text) in &rendered.profiles {
            if let Err(error) = table.add_profiles(path, text) {
                rendered.problems.push(Problem {
                    file: path.clone(),
                    // The file's name is in front of it already.
                    message: error.to_string().trim_start_matches(&format!("{path}: ")).to_owned(),
                    hint: Some("docs/qualification.md shows the form; the profiles of this file are not there".into()),
                    ..Problem::default()
                });
            }
        }
        for (name, site) in &rendered.sites {
            let Some(cni) = site.spec.cni.as_deref().filter(|cni| *cni != AUTO) else { continue };
            if table.profile(cni).is_none() {
                rendered.problems.push(Problem {
                    message: format!("site `{name}` asks for network `{cni}`, which is no profile"),
                    hint: Some(
                        "`skerry qualify --list` shows all profiles; `auto` takes the best".into(),
                    ),
                    site: Some(name.clone()),
                    ..Problem::default()
                });
            }
        }
        let own = table.profiles[built_in..].iter().map(|profile| profile.id.clone()).collect();
        let ladder = table
            .ladder
            .iter()
            .map(|rung| Rung {
                cni: rung.cni.clone(),
                with: rung.with.clone(),
                proxy: rung.proxy.clone(),
                lost: rung.lost.clone(),
            })
            .collect();
        Self { table, own, ladder }
    }

    /// What a site gets on its nodes; nothing when it asks for no network.
    pub(crate) fn choose(
        &self,
        site: &RenderedSite,
        live: &Live,
        rendered: &Rendered,
    ) -> Option<Choice> {
        site.spec.cni.as_ref()?;
        let nodes: Vec<Node> = site
            .spec
            .nodes
            .iter()
            .map(|name| Node { name: name.clone(), profiles: self.rows(name, live) })
            .collect();
        let known = |id: &str| self.table.profile(id).is_some();
        choose(site.spec.cni.as_deref(), &nodes, &self.ladder, known, rendered.unknown_nodes)
    }

    /// What a node says of its present kernel.
    fn rows(&self, name: &str, live: &Live) -> Option<BTreeMap<String, Row>> {
        let node = live.get(&ObjectId::new("v1", "Node", "", name)).ok().flatten()?;
        let kernel = node.data["status"]["nodeInfo"]["kernelVersion"].as_str().unwrap_or_default();
        let api_version = skerry_api::fleet::v1alpha1::API_VERSION;
        let said = live.get(&ObjectId::new(api_version, KIND, "", name)).ok().flatten();
        let status = said.as_deref().map(|said| &said.data["status"]);
        if let Some(status) = status.filter(|status| status["kernel"] == kernel) {
            let checks = status[CHECKS].as_str().unwrap_or_default().to_owned();
            let read = serde_json::from_value::<NodeQualificationStatus>(status.clone());
            if let Ok(status) = read {
                let rows = status.profiles.into_iter().map(|row| {
                    let verdict = Verdict::parse(&row.verdict);
                    (row.profile, Row { verdict, missing: row.missing, hint: row.hint })
                });
                let mut rows: BTreeMap<String, Row> = rows.collect();
                rows.extend(self.own_rows(&checks, &status.kernel, &status.arch));
                return Some(rows);
            }
        }
        labelled(&node)
    }

    /// The fleet's own profiles, over a node's checks.
    fn own_rows(&self, checks: &str, kernel: &str, arch: &str) -> BTreeMap<String, Row> {
        if self.own.is_empty() {
            return BTreeMap::new();
        }
        let facts: BTreeMap<String, Fact> = checks
            .lines()
            .filter_map(|line| {
                let (id, state) = line.split_once(' ')?;
                let state: State = serde_json::from_value(state.into()).ok()?;
                Some((id.to_owned(), Fact { state, source: Source::None, evidence: String::new() }))
            })
            .collect();
        let judged = judge::judge_all(&self.table, &facts, Release::parse(kernel), Some(arch));
        let own = judged.into_iter().filter(|judgement| self.own.contains(&judgement.profile));
        own.map(|judgement| {
            let lacks = judgement.lacks.iter().flat_map(|lack| {
                lack.checks.iter().map(|id| format!("{id} {}", lack.state.words()))
            });
            let missing =
                judgement.notes.iter().cloned().chain(lacks).collect::<Vec<_>>().join("; ");
            let hint = judgement
                .lacks
                .iter()
                .flat_map(|lack| &lack.checks)
                .find_map(|id| self.table.checks.get(id)?.hint.clone());
            let verdict = Verdict::parse(judgement.verdict.words());
            (judgement.profile, Row { verdict, missing, hint: hint.unwrap_or_default() })
        })
        .collect()
    }
}

/// The labels that a node puts on its Node; nothing when it has none.
fn labelled(node: &DynamicObject) -> Option<BTreeMap<String, Row>> {
    let rows: BTreeMap<String, Row> = node
        .labels()
        .iter()
        .filter_map(|(key, word)| {
            let profile = key.strip_prefix(PREFIX)?.strip_prefix('/')?;
            let missing = match Verdict::parse(word) {
                Verdict::Qualified => String::new(),
                _ => format!("its label says {word}"),
            };
            Some((
                profile.to_owned(),
                Row { verdict: Verdict::parse(word), missing, hint: String::new() },
            ))
        })
        .collect();
    (!rows.is_empty()).then_some(rows)
}

/// Whether this is the kind of the reports.
pub(crate) fn is_report(group: &str, kind: &str) -> bool {
    group == GROUP && kind == KIND
}

/// Keeps of a report what the gate reads: the profiles, and of each check its state. 500 reports are 50 MB otherwise.
pub(crate) fn slim(object: &mut DynamicObject) {
    let Some(status) = object.data.get_mut("status").and_then(|status| status.as_object_mut())
    else {
        return;
    };
    status.remove("signature");
    let report = status.remove("report").unwrap_or_default();
    let facts = report["facts"].as_object();
    let line = |(id, fact): (&String, &serde_json::Value)| {
        Some(format!("{id} {}\n", fact["state"].as_str()?))
    };
    let checks: String = facts.into_iter().flatten().filter_map(line).collect();
    status.insert(CHECKS.into(), checks.into());
}
