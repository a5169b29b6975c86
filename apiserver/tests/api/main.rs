//! The embedded API as clients see it: through kube's client, in this process and over TLS.

mod access;
mod apply;
mod custom;
mod identity;
mod lifecycle;
mod objects;
mod support;
mod watches;
