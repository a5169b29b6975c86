//! From what is there to what should be there, as steps that leave the executor nothing to choose.

use crate::object::{Digest, InvalidObject, ObjectId};
use crate::render::{CompleteRender, ReleaseKey, Rendered, Roster};
use skerry_api::fleet::v1alpha1::InventoryEntry;
use std::collections::{BTreeMap, BTreeSet};

/// What a release has put into the cluster; the only objects that a prune may touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// By identity.
    pub objects: BTreeMap<ObjectId, InventoryItem>,
}

/// One object of an [`Inventory`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InventoryItem {
    /// `apiVersion` it was applied with.
    pub api_version: String,
    /// Digest of what was applied; empty before it was.
    pub digest: Digest,
}

/// One thing to do to one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the object what the render says.
    Apply(ObjectId),
    /// Delete the object, if it still carries our labels.
    Prune {
        /// Which.
        id: ObjectId,
        /// `apiVersion` to delete it through.
        api_version: String,
    },
}

/// Steps that take the cluster from `inventory` to `render`: applies first, then prunes in the opposite order.
///
/// `claimed` are objects of the site's other releases: one that moved to another app is theirs now and is not pruned.
/// An empty plan means that the cluster is as desired.
pub fn plan(
    render: &CompleteRender,
    inventory: &Inventory,
    claimed: &BTreeSet<ObjectId>,
) -> Vec<Step> {
    let changed = |id: &ObjectId, digest: &Digest| {
        inventory.objects.get(id).is_none_or(|item| item.digest != *digest)
    };
    let applies = render
        .objects()
        .iter()
        .filter(|(id, object)| changed(id, &object.digest))
        .map(|(id, _)| Step::Apply(id.clone()));
    let gone = inventory
        .objects
        .iter()
        .rev()
        .filter(|(id, _)| !render.objects().contains_key(id) && !claimed.contains(id))
        .map(|(id, item)| Step::Prune { id: id.clone(), api_version: item.api_version.clone() });
    applies.chain(gone).collect()
}

/// Steps that apply every object again, changed or not: what undoes a change made by somebody else.
pub fn resync(
    render: &CompleteRender,
    inventory: &Inventory,
    claimed: &BTreeSet<ObjectId>,
) -> Vec<Step> {
    let applies = render.objects().keys().cloned().map(Step::Apply);
    let prunes = plan(render, inventory, claimed)
        .into_iter()
        .filter(|step| matches!(step, Step::Prune { .. }));
    applies.chain(prunes).collect()
}

/// A release that left the commit, and the steps that remove what it owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Which.
    pub release: ReleaseKey,
    /// Prunes, workloads first.
    pub steps: Vec<Step>,
}

/// Releases in the cluster that are not in `roster`, with what they own. Objects that another release of the same site
/// claims by now stay.
pub fn plan_removals(
    roster: &Roster,
    rendered: &Rendered,
    existing: &BTreeMap<ReleaseKey, Inventory>,
) -> Vec<Removal> {
    existing
        .iter()
        .filter(|(release, _)| !roster.has_release(release))
        .map(|(release, inventory)| {
            let claimed = rendered.claimed(release);
            let gone = inventory.objects.iter().rev().filter(|(id, _)| !claimed.contains(id));
            let steps = gone.map(|(id, item)| Step::Prune {
                id: id.clone(),
                api_version: item.api_version.clone(),
            });
            Removal { release: release.clone(), steps: steps.collect() }
        })
        .collect()
}

impl Rendered {
    /// Objects that the other releases of the same site define.
    pub fn claimed(&self, release: &ReleaseKey) -> BTreeSet<ObjectId> {
        let first = ReleaseKey { site: release.site.clone(), app: String::new() };
        let site = self.releases.range(first..).take_while(|(key, _)| key.site == release.site);
        site.filter(|(key, _)| *key != release)
            .filter_map(|(_, outcome)| outcome.as_ref().ok())
            .flat_map(|render| render.objects().keys().cloned())
            .collect()
    }
}

impl Inventory {
    /// Reads what a Release's status holds.
    ///
    /// # Errors
    ///
    /// [`InvalidObject`] if an entry lacks kind or name; nothing may be pruned from such an inventory.
    pub fn from_entries(entries: &[InventoryEntry]) -> Result<Self, InvalidObject> {
        let mut inventory = Self::default();
        for entry in entries {
            for (field, text) in
                [("apiVersion", &entry.api_version), ("kind", &entry.kind), ("name", &entry.name)]
            {
                if text.is_empty() {
                    return Err(InvalidObject(field));
                }
            }
            let id = ObjectId::new(&entry.api_version, &entry.kind, &entry.namespace, &entry.name);
            let item = InventoryItem {
                api_version: entry.api_version.clone(),
                digest: Digest::stored(&entry.digest),
            };
            inventory.objects.insert(id, item);
        }
        Ok(inventory)
    }

    /// As a Release's status holds it.
    pub fn entries(&self) -> Vec<InventoryEntry> {
        let entry = |(id, item): (&ObjectId, &InventoryItem)| InventoryEntry {
            api_version: item.api_version.clone(),
            kind: id.kind.clone(),
            namespace: id.namespace.clone(),
            name: id.name.clone(),
            digest: item.digest.as_str().to_owned(),
        };
        self.objects.iter().map(entry).collect()
    }

    /// This inventory and everything that `render` is about to create. Stored before the first apply, so that an
    /// object is never in the cluster without being in an inventory, whenever we are stopped.
    pub fn with_planned(&self, render: &CompleteRender) -> Self {
        let mut inventory = self.clone();
        for (id, object) in render.objects() {
            let api_version = object.value["apiVersion"].as_str().unwrap_or_default().to_owned();
            let item = InventoryItem { api_version, digest: Digest::stored("") };
            inventory.objects.entry(id.clone()).or_insert(item);
        }
        inventory
    }

    /// Notes that `step` was done.
    pub fn record(&mut self, step: &Step, render: Option<&CompleteRender>) {
        match step {
            Step::Apply(id) => {
                if let Some(object) = render.and_then(|render| render.objects().get(id)) {
                    let api_version =
                        object.value["apiVersion"].as_str().unwrap_or_default().to_owned();
                    self.objects.insert(
                        id.clone(),
                        InventoryItem { api_version, digest: object.digest.clone() },
                    );
                }
            }
            Step::Prune { id, .. } => {
                self.objects.remove(id);
            }
        }
    }
}
