//! What a Kubernetes API means, without a socket, a disk or a clock: resource catalogue, schemas, selectors, patches,
//! field ownership, validation, discovery, tables.
//!
//! Everything is schema-driven over [`serde_json::Value`]; there is no module per resource.

pub mod catalog;
pub mod crd;
pub mod defaults;
pub mod discovery;
pub mod events;
pub mod facts;
pub mod openapi;
pub mod ownership;
pub mod patch;
pub mod protobuf;
pub mod schema;
pub mod selector;
pub mod status;
pub mod structural;
pub mod table;
pub mod validation;
pub mod workloads;
