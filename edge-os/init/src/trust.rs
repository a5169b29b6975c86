//! Which keys may sign an update, and how they are replaced.
//!
//! The verified root carries a set of Ed25519 keys with a counter ([`ROOT_KEYS`]). A *key statement*, signed by a key
//! that is trusted now and with a higher counter, replaces the set; it is kept on the state ([`KEPT`]) and checked again
//! at each read, because the state is not verified: a statement holds only if the root's set has signed it, or a
//! statement that the root's set has signed. A longer chain would be worth no more than its first link, so the next one
//! waits for an image that carries the newer keys. Used by PID 1 and by `skerry image`; no private key is ever here.

use crate::kernel::Kernel;
use crate::manifest::PRODUCT;
use crate::verity::{hex, unhex};
use serde::{Deserialize, Serialize};
use std::io;

/// The keys of the running image.
pub const ROOT_KEYS: &str = "/usr/share/skerry/release-keys.json";
/// Statements that have come since, with their signatures, oldest first.
pub const KEPT: &str = "/state/boot/release-keys.json";
/// Value of [`Statement::format`].
pub const FORMAT: u32 = 1;
/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;
/// Most keys in a set.
pub const KEYS_MAX: usize = 16;
/// Longest set or statement.
pub const BYTES_MAX: usize = 8 * 1024;
/// Statements in a chain; see the head of this file.
pub const CHAIN_MAX: usize = 2;

/// An Ed25519 public key.
pub type Key = [u8; KEY_BYTES];

/// Keys that are trusted, with the counter of what said so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySet {
    /// A set with a higher one replaces it.
    pub counter: u64,
    /// At least one.
    pub keys: Vec<Key>,
}

/// A signed word about which keys are trusted from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// [`PRODUCT`].
    pub product: String,
    /// [`FORMAT`].
    pub format: u32,
    /// Higher than that of the set which it replaces.
    pub counter: u64,
    /// The keys, 64 hexadecimal digits each.
    pub keys: Vec<String>,
}

/// A statement as it is kept: its exact text, and who says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    /// The text that was signed.
    pub statement: String,
    /// Ed25519, hexadecimal.
    pub signature: String,
}

/// Why keys are not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The image has no keys.
    #[error("this image trusts no release key, so it takes no update")]
    NoKeys,
    /// The file is not what it should be.
    #[error("the set of release keys cannot be read: {0}")]
    Form(String),
    /// For something else.
    #[error("the key statement is for `{0}`, not for `{PRODUCT}`")]
    Product(String),
    /// Signed by nobody who is trusted now.
    #[error("the key statement is not signed by a key that is trusted now")]
    Signature,
    /// Its counter is not higher.
    #[error("the key statement has counter {found}, the keys that are trusted now have {known}")]
    Counter {
        /// Of the statement.
        found: u64,
        /// Of the set.
        known: u64,
    },
    /// Two statements have come since the image was made.
    #[error("{CHAIN_MAX} key statements have come since this image was built")]
    Chain,
    /// The state cannot be written.
    #[error("the key statement could not be kept")]
    Keep(#[source] io::Error),
}

impl TrustError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoKeys => {
                "build the image with `skerry image build --release-key KEY` or `--trust-key PUB`, and flash it"
            }
            Self::Form(_) => "build the image again; `skerry image trust` makes statements",
            Self::Product(_) => "take a statement that `skerry image trust` made",
            Self::Signature => {
                "sign it with a key that the appliance trusts now: `skerry image trust --sign-with KEY`"
            }
            Self::Counter { .. } => "make the statement again with a higher --counter",
            Self::Chain => {
                "update to an image that carries the newer keys (--trust-key, --trust-counter) first"
            }
            Self::Keep(_) => "the state partition is full or cannot be written",
        }
    }
}

/// Whether one of the keys has signed the message.
pub fn is_signed(keys: &[Key], message: &[u8], signature: &[u8]) -> bool {
    let good = |key: &Key| {
        let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key);
        key.verify(message, signature).is_ok()
    };
    keys.iter().any(good)
}

impl KeySet {
    /// The file of the image.
    pub fn to_json(&self) -> String {
        let keys: Vec<_> = self.keys.iter().map(|key| hex(key)).collect();
        format!("{}\n", serde_json::json!({"counter": self.counter, "keys": keys}))
    }

    /// Reads the file of the image.
    ///
    /// # Errors
    ///
    /// [`TrustError::Form`].
    pub fn parse(bytes: &[u8]) -> Result<Self, TrustError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            counter: u64,
            keys: Vec<String>,
        }
        if bytes.len() > BYTES_MAX {
            return Err(TrustError::Form(format!("it has more than {BYTES_MAX} bytes")));
        }
        let file: File =
            serde_json::from_slice(bytes).map_err(|error| TrustError::Form(error.to_string()))?;
        Ok(Self { counter: file.counter, keys: keys(&file.keys)? })
    }

    /// The set after a statement.
    ///
    /// # Errors
    ///
    /// [`TrustError`]: not signed by one of these keys, not newer, or no statement.
    pub fn after(&self, statement: &[u8], signature: &[u8]) -> Result<Self, TrustError> {
        if statement.len() > BYTES_MAX {
            return Err(TrustError::Form(format!("it has more than {BYTES_MAX} bytes")));
        }
        if !is_signed(&self.keys, statement, signature) {
            return Err(TrustError::Signature);
        }
        let statement = Statement::parse(statement)?;
        if statement.counter <= self.counter {
            return Err(TrustError::Counter { found: statement.counter, known: self.counter });
        }
        Ok(Self { counter: statement.counter, keys: keys(&statement.keys)? })
    }
}

impl Statement {
    /// A statement about these keys.
    pub fn new(counter: u64, keys: &[Key]) -> Self {
        let keys = keys.iter().map(|key| hex(key)).collect();
        Self { product: PRODUCT.into(), format: FORMAT, counter, keys }
    }

    /// The text that is signed.
    pub fn to_json(&self) -> String {
        format!("{}\n", serde_json::to_string(self).expect("numbers and texts"))
    }

    /// Reads a statement, which says nothing about who made it.
    ///
    /// # Errors
    ///
    /// [`TrustError::Product`], [`TrustError::Form`].
    pub fn parse(bytes: &[u8]) -> Result<Self, TrustError> {
        let form = |what: String| TrustError::Form(what);
        let statement: Self =
            serde_json::from_slice(bytes).map_err(|error| form(error.to_string()))?;
        if statement.product != PRODUCT {
            return Err(TrustError::Product(statement.product.chars().take(64).collect()));
        }
        if statement.format != FORMAT {
            return Err(form(format!("format {}, known is {FORMAT}", statement.format)));
        }
        keys(&statement.keys)?;
        Ok(statement)
    }
}

fn keys(texts: &[String]) -> Result<Vec<Key>, TrustError> {
    if texts.is_empty() || texts.len() > KEYS_MAX {
        return Err(TrustError::Form(format!(
            "it has {} keys, 1 to {KEYS_MAX} are right",
            texts.len()
        )));
    }
    let key = |text: &String| unhex(text).and_then(|bytes| Key::try_from(bytes).ok());
    let keys: Option<Vec<_>> = texts.iter().map(key).collect();
    keys.ok_or_else(|| TrustError::Form("a key is not 64 hexadecimal digits".into()))
}

/// The keys that are trusted now. What is kept on the state and does not hold is passed over.
///
/// # Errors
///
/// [`TrustError::NoKeys`], or the image's own set cannot be read.
pub fn current(kernel: &dyn Kernel) -> Result<KeySet, TrustError> {
    let root = root(kernel)?;
    let kept = kept(kernel);
    Ok(follow(&root, &kept).unwrap_or(root))
}

/// Takes a statement and keeps it; returns the set that is trusted from now on.
///
/// # Errors
///
/// [`TrustError`]; nothing was changed then.
pub fn take(kernel: &dyn Kernel, statement: &[u8], signature: &[u8]) -> Result<KeySet, TrustError> {
    let root = root(kernel)?;
    let mut chain = kept(kernel);
    let known = match follow(&root, &chain) {
        Some(known) => known,
        None => {
            chain.clear();
            root.clone()
        }
    };
    let new = known.after(statement, signature)?;
    let text =
        std::str::from_utf8(statement).map_err(|error| TrustError::Form(error.to_string()))?;
    // What the image knows already is no link any more, and its own word needs none before it.
    chain.retain(|link| !is_known(&root, link));
    if root.after(statement, signature).is_ok() {
        chain.clear();
    }
    if chain.len() >= CHAIN_MAX {
        return Err(TrustError::Chain);
    }
    chain.push(Signed { statement: text.into(), signature: hex(signature) });
    let bytes = serde_json::to_vec(&chain).expect("texts");
    kernel.write(KEPT, &bytes, 0o600).map_err(TrustError::Keep)?;
    Ok(new)
}

fn root(kernel: &dyn Kernel) -> Result<KeySet, TrustError> {
    match kernel.read(ROOT_KEYS, BYTES_MAX) {
        Ok(bytes) => KeySet::parse(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(TrustError::NoKeys),
        Err(error) => Err(TrustError::Form(error.to_string())),
    }
}

fn kept(kernel: &dyn Kernel) -> Vec<Signed> {
    // Two texts of at most BYTES_MAX, each byte escaped at worst as six.
    let bytes = kernel.read(KEPT, 16 * BYTES_MAX).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// The set at the end of the chain; `None` when a link does not hold. A link that the image has overtaken is passed over.
fn follow(root: &KeySet, chain: &[Signed]) -> Option<KeySet> {
    if chain.len() > CHAIN_MAX {
        return None;
    }
    chain.iter().filter(|link| !is_known(root, link)).try_fold(root.clone(), |set, link| {
        set.after(link.statement.as_bytes(), &unhex(&link.signature)?).ok()
    })
}

/// Whether the image's own set is as new as this statement.
fn is_known(root: &KeySet, link: &Signed) -> bool {
    let statement = Statement::parse(link.statement.as_bytes());
    statement.is_ok_and(|statement| statement.counter <= root.counter)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::recorder::Machine;
    use ring::signature::{Ed25519KeyPair, KeyPair};

    pub(crate) fn pair(seed: u8) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
    }

    pub(crate) fn public(seed: u8) -> Key {
        pair(seed).public_key().as_ref().try_into().unwrap()
    }

    fn set(counter: u64, seeds: &[u8]) -> KeySet {
        KeySet { counter, keys: seeds.iter().map(|seed| public(*seed)).collect() }
    }

    fn statement(counter: u64, seeds: &[u8], by: u8) -> (String, Vec<u8>) {
        let text = Statement::new(counter, &set(0, seeds).keys).to_json();
        let signature = pair(by).sign(text.as_bytes()).as_ref().to_vec();
        (text, signature)
    }

    fn machine(root: &KeySet) -> Machine {
        let machine = Machine::new();
        machine.file(ROOT_KEYS, root.to_json().as_bytes());
        machine
    }

    fn give(machine: &Machine, counter: u64, seeds: &[u8], by: u8) -> Result<KeySet, TrustError> {
        let (text, signature) = statement(counter, seeds, by);
        take(machine, text.as_bytes(), &signature)
    }

    #[test]
    fn image_without_keys_trusts_nobody_and_says_how_to_build_one_that_does() {
        let error = current(&Machine::new()).unwrap_err();
        assert!(matches!(error, TrustError::NoKeys) && error.hint().contains("--release-key"));
    }

    #[test]
    fn keys_are_replaced_by_who_is_trusted_now_and_by_nobody_else() {
        let machine = machine(&set(1, &[1, 2]));
        assert!(matches!(give(&machine, 2, &[9], 9), Err(TrustError::Signature)));
        assert!(matches!(
            give(&machine, 1, &[3], 1),
            Err(TrustError::Counter { found: 1, known: 1 })
        ));
        assert_eq!(current(&machine).unwrap(), set(1, &[1, 2]));
        assert_eq!(give(&machine, 2, &[3], 2).unwrap(), set(2, &[3]));
        assert_eq!(current(&machine).unwrap(), set(2, &[3]));
        // The old key is not trusted any more, the new one is, once.
        assert!(matches!(give(&machine, 3, &[1], 1), Err(TrustError::Signature)));
        assert_eq!(give(&machine, 5, &[4], 3).unwrap(), set(5, &[4]));
        assert_eq!(current(&machine).unwrap(), set(5, &[4]));
        assert!(matches!(give(&machine, 6, &[5], 4), Err(TrustError::Chain)));
        // An image that carries the keys in between knows the first link, and trusts what came after it.
        machine.file(ROOT_KEYS, set(2, &[3]).to_json().as_bytes());
        assert_eq!(current(&machine).unwrap(), set(5, &[4]));
        // One that carries the newest starts a new chain.
        machine.file(ROOT_KEYS, set(5, &[4]).to_json().as_bytes());
        assert_eq!(current(&machine).unwrap(), set(5, &[4]));
        assert_eq!(give(&machine, 6, &[5], 4).unwrap(), set(6, &[5]));
        assert_eq!(current(&machine).unwrap(), set(6, &[5]));
    }

    #[test]
    fn what_somebody_wrote_onto_the_state_is_worth_nothing_without_a_signature() {
        let root = set(1, &[1]);
        let machine = machine(&root);
        let (text, _) = statement(2, &[9], 1);
        let signature = pair(9).sign(text.as_bytes());
        let link = Signed { statement: text, signature: hex(signature.as_ref()) };
        for kept in ["[]".to_owned(), "{".into(), serde_json::to_string(&[link]).unwrap()] {
            machine.file(KEPT, kept.as_bytes());
            assert_eq!(current(&machine).unwrap(), root);
        }
        machine.fail("write /state/boot/release-keys.json", 28);
        assert!(matches!(give(&machine, 2, &[2], 1), Err(TrustError::Keep(_))));
        assert_eq!(current(&machine).unwrap(), root);
    }

    #[test]
    fn foreign_and_broken_statements_are_named() {
        let root = set(1, &[1]);
        let refused = |text: &str| {
            let signature = pair(1).sign(text.as_bytes());
            root.after(text.as_bytes(), signature.as_ref()).unwrap_err().to_string()
        };
        let good = statement(2, &[2], 1).0;
        assert!(refused(&good.replace(PRODUCT, "toaster")).contains("toaster"));
        assert!(refused(&good.replace("\"format\":1", "\"format\":2")).contains("format 2"));
        assert!(refused(&good.replace('{', "{\"more\":1,")).contains("more"));
        let none = Statement::new(2, &[]).to_json();
        assert!(refused(&none).contains("0 keys"));
        let many = Statement::new(2, &[[1; 32]; KEYS_MAX + 1]).to_json();
        assert!(refused(&many).contains("17 keys"));
        assert!(refused(&good.replace(&hex(&public(2)), "abc")).contains("64 hexadecimal"));
        assert!(refused(&" ".repeat(BYTES_MAX + 1)).contains("more than"));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_keys_or_an_error(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
            at in proptest::num::usize::ANY, byte in proptest::num::u8::ANY,
        ) {
            let _ = (KeySet::parse(&bytes), Statement::parse(&bytes));
            let machine = machine(&set(1, &[1]));
            machine.file(KEPT, &bytes);
            proptest::prop_assert_eq!(current(&machine).unwrap(), set(1, &[1]));
            let (text, signature) = statement(2, &[2], 1);
            let mut changed = text.into_bytes();
            let at = at % changed.len();
            let same = std::mem::replace(&mut changed[at], byte) == byte;
            proptest::prop_assert_eq!(set(1, &[1]).after(&changed, &signature).is_ok(), same);
        }
    }
}
