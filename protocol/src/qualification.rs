//! What a node says of its kernel, for a hub that announced [`crate::capability::QUALIFY`].
//!
//! The message is an `update` of `null/nodequalification/<node>`, answered with `"OK"`; its content is the status of the
//! node's NodeQualification. A hub takes it for the node's own name only. To others nothing is said beyond labels,
//! annotations and a condition of the Node.

/// Resource type of the message.
pub const KIND: &str = "nodequalification";
/// The longest content that a hub takes, in bytes. A report has about 400 lines of 150 bytes, twice.
pub const CONTENT_LEN_MAX: usize = 512 * 1024;

/// Resource of the message of `node`.
pub fn resource(node: &str) -> String {
    format!("null/{KIND}/{node}")
}
