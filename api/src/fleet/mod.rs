//! `fleet.skerry.dev`: the fleet repository's kinds, and what the reconciler reports in a cluster.

pub mod os;
pub mod rules;
mod span;
pub mod v1alpha1;

pub use span::{ParseSpanError, Span};
