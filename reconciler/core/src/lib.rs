//! What a fleet repository means: read, render per site, plan, judge health. No I/O, no clock.
//!
//! ```text
//! Source ──► Repository ──► Rendered ──► plan(CompleteRender, Inventory) ──► Steps
//! (files)    (typed kinds)  (objects per site and app, or problems)           (applies, then prunes)
//! ```
//!
//! The reconciler's shell reads Git into a [`Source`] and executes [`Step`]s; `skerry render`, `diff` and `status` run
//! the same functions. An incomplete render cannot lead to a prune: [`plan`] takes a [`CompleteRender`], and
//! [`plan_removals`] takes a [`Roster`], and neither can be had while a file that they depend on is unread.

mod devices;
pub mod health;
pub mod network;
mod object;
pub mod os;
mod plan;
mod render;
mod repository;
mod source;
mod suggest;
mod typed;
mod vars;
mod workload;
pub mod yaml;

pub use devices::{DESIRED_ANNOTATION, RELEASE as DEVICES_RELEASE, has_wishes, keep_wishes};
pub use object::{Digest, InvalidObject, ObjectId, is_cluster_scoped};
pub use plan::{Inventory, InventoryItem, Removal, Step, plan, plan_removals, resync};
pub use render::{
    CompleteRender, ReleaseKey, Rendered, RenderedObject, RenderedSite, Roster, render,
};
pub use repository::{AppEntry, OFFLINE_BUDGET, Repository, SiteEntry};
pub use skerry_api::fleet::v1alpha1::Problem;
pub use source::{FILE_MAX, SOURCE_MAX, Source, SourceError};
