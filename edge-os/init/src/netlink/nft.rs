//! nf_tables: batches of tables, chains, rules, sets and their elements.
//!
//! A [`Batch`] is taken or refused by the kernel as a whole. Rules are lists of [`Expr`], which
//! work on 32-bit registers; only the expressions that Skerry uses are here. Called by
//! `cni::firewall`, which also says what the table looks like.
//!
//! Source: Linux, include/uapi/linux/netfilter/{nf_tables,nfnetlink}.h.

use super::{
    Family, NLM_F_CREATE, NetlinkError, Request, Socket, attribute, attributes, number_be, text,
};
use std::net::IpAddr;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFPROTO_INET: u8 = 1;
/// `meta nfproto` and the family of a translation: IPv4.
pub const NFPROTO_IPV4: u8 = 2;
/// `meta nfproto` and the family of a translation: IPv6.
pub const NFPROTO_IPV6: u8 = 10;

const MSG_NEWTABLE: u16 = 0;
const MSG_DELTABLE: u16 = 2;
const MSG_NEWCHAIN: u16 = 3;
const MSG_DELCHAIN: u16 = 5;
const MSG_NEWRULE: u16 = 6;
const MSG_DELRULE: u16 = 8;
const MSG_NEWSET: u16 = 9;
const MSG_NEWSETELEM: u16 = 12;
const MSG_GETSETELEM: u16 = 13;
const MSG_DELSETELEM: u16 = 14;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LEN: u16 = 7;
const SET_ID: u16 = 10;
const SET_MAP: u32 = 8;
const ELEM_LIST_TABLE: u16 = 1;
const ELEM_LIST_SET: u16 = 2;
const ELEM_LIST_ELEMENTS: u16 = 3;
const ELEM_KEY: u16 = 1;
const ELEM_DATA: u16 = 2;
const ELEM_USERDATA: u16 = 6;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const VERDICT_TYPE: u32 = 0xffff_ff00;
/// The first of the 32-bit registers.
const REGISTER_0: u32 = 8;
/// Type of the comment within the user data of an element, as `nft` shows it.
const UDATA_COMMENT: u8 = 0;
/// Longest comment of an element, in bytes; what `nft` can show.
pub const COMMENT_MAX: usize = 127;

/// Where a chain hooks in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Packets that arrive, before the routing decision.
    Prerouting = 0,
    /// Packets of this host's own programs.
    Output = 3,
    /// Packets that leave, after the routing decision.
    Postrouting = 4,
}

/// What a chain is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// Lets pass or drops.
    Filter,
    /// Translates addresses; sees the first packet of a connection only.
    Nat,
}

/// What a key or a value of a set is made of; it decides the length and what `nft` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datum {
    /// 4 bytes.
    Ipv4,
    /// 16 bytes.
    Ipv6,
    /// TCP or UDP, 1 byte, padded to 4.
    Protocol,
    /// A port, 2 bytes, padded to 4.
    Port,
    /// Name of an interface, 16 bytes.
    InterfaceName,
}

impl Datum {
    /// Number of `nft`'s own type.
    fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::InterfaceName => 41,
        }
    }

    fn len(self) -> u32 {
        match self {
            Self::Ipv4 | Self::Protocol | Self::Port => 4,
            Self::Ipv6 | Self::InterfaceName => 16,
        }
    }
}

fn type_of(parts: &[Datum]) -> u32 {
    parts.iter().fold(0, |sum, part| sum << 6 | part.number())
}

fn len_of(parts: &[Datum]) -> u32 {
    parts.iter().map(|part| part.len()).sum()
}

/// What a set holds beside its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values<'a> {
    /// Nothing.
    None,
    /// A value for each key.
    Data(&'a [Datum]),
    /// The chain to go to for each key.
    Verdict,
}

/// An entry of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// Key, padded as [`key`] does.
    pub key: Vec<u8>,
    /// Value, if the set has values.
    pub value: Option<Value>,
    /// Whose it is; at most [`COMMENT_MAX`] bytes, `nft` shows it.
    pub comment: String,
}

/// Value of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Bytes, padded as [`key`] does.
    Data(Vec<u8>),
    /// Continue in this chain and do not come back.
    Goto(String),
}

/// A part of a key or of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part<'a> {
    /// An address.
    Ip(IpAddr),
    /// A number of an IP protocol.
    Protocol(u8),
    /// A port.
    Port(u16),
    /// Name of an interface.
    Interface(&'a str),
}

/// Puts the parts of a key (or of a value) one after the other, each padded to whole registers.
pub fn key(parts: &[Part<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Ip(ip) => bytes.extend(super::route::octets(*ip)),
            Part::Protocol(number) => bytes.extend([*number, 0, 0, 0]),
            Part::Port(port) => {
                bytes.extend(port.to_be_bytes());
                bytes.extend([0, 0]);
            }
            Part::Interface(name) => bytes.extend(interface_name(name)),
        }
    }
    bytes
}

/// Returns the name as the kernel compares it.
pub fn interface_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let len = name.len().min(15);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}

/// What a `meta` expression reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meta {
    /// Mark of the packet, in the host's byte order.
    Mark = 3,
    /// Name of the interface it came in by.
    InName = 6,
    /// IPv4 or IPv6 in tables for both.
    NfProto = 15,
    /// TCP, UDP, …
    L4Proto = 16,
}

/// One step of a rule. Registers are counted in 32-bit words from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Reads a property of the packet into a register.
    Meta(Meta, u32),
    /// Sets the mark of the packet from a register.
    SetMark(u32),
    /// Reads `len` bytes of the network header at `offset`.
    Network { register: u32, offset: u32, len: u32 },
    /// Reads `len` bytes of the transport header at `offset`.
    Transport { register: u32, offset: u32, len: u32 },
    /// Reads the status bits of the connection, in the host's byte order.
    CtStatus(u32),
    /// Reads the type of the destination address: 2 is one of this host's own.
    DestinationType(u32),
    /// Computes `register & mask ^ xor`.
    Bitwise { register: u32, mask: Vec<u8>, xor: Vec<u8> },
    /// Goes on if the register equals `value`.
    Equal { register: u32, value: Vec<u8> },
    /// Goes on if the register does not equal `value`.
    NotEqual { register: u32, value: Vec<u8> },
    /// Goes on if the key in `register` is in the set.
    InSet { set: &'static str, register: u32 },
    /// Goes on with the value for the key in `into`.
    Map { set: &'static str, register: u32, into: u32 },
    /// Goes to the chain for the key.
    VerdictMap { set: &'static str, register: u32 },
    /// Sends the connection to the address and port in the registers.
    Dnat { family: u8, address: u32, port: u32 },
    /// Gives the connection this host's own address of the interface that it leaves by.
    Masquerade,
    /// Ends this chain, the packet passes on.
    Return,
    /// Drops the packet.
    Drop,
    /// Goes through another chain of the same table.
    Jump(String),
}

impl Expr {
    fn name(&self) -> &'static str {
        match self {
            Self::Meta(..) | Self::SetMark(_) => "meta",
            Self::Network { .. } | Self::Transport { .. } => "payload",
            Self::CtStatus(_) => "ct",
            Self::DestinationType(_) => "fib",
            Self::Bitwise { .. } => "bitwise",
            Self::Equal { .. } | Self::NotEqual { .. } => "cmp",
            Self::InSet { .. } | Self::Map { .. } | Self::VerdictMap { .. } => "lookup",
            Self::Dnat { .. } => "nat",
            Self::Masquerade => "masq",
            Self::Return | Self::Drop | Self::Jump(_) => "immediate",
        }
    }

    fn write(&self, data: &mut Request) {
        match self {
            Self::Meta(key, register) => {
                data.number_be(1, REGISTER_0 + register).number_be(2, *key as u32);
            }
            Self::SetMark(register) => {
                data.number_be(2, Meta::Mark as u32).number_be(3, REGISTER_0 + register);
            }
            Self::Network { register, offset, len } => {
                data.number_be(1, REGISTER_0 + register).number_be(2, 1);
                data.number_be(3, *offset).number_be(4, *len);
            }
            Self::Transport { register, offset, len } => {
                data.number_be(1, REGISTER_0 + register).number_be(2, 2);
                data.number_be(3, *offset).number_be(4, *len);
            }
            Self::CtStatus(register) => {
                data.number_be(1, REGISTER_0 + register).number_be(2, 2);
            }
            Self::DestinationType(register) => {
                // result: type of the address (3), of: the destination (2)
                data.number_be(1, REGISTER_0 + register).number_be(2, 3).number_be(3, 2);
            }
            Self::Bitwise { register, mask, xor } => {
                data.number_be(1, REGISTER_0 + register).number_be(2, REGISTER_0 + register);
                data.number_be(3, mask.len() as u32);
                data.nest(4, |value| _ = value.attribute(DATA_VALUE, mask));
                data.nest(5, |value| _ = value.attribute(DATA_VALUE, xor));
            }
            Self::Equal { register, value } => compare(data, *register, 0, value),
            Self::NotEqual { register, value } => compare(data, *register, 1, value),
            Self::InSet { set, register } => {
                data.text(1, set).number_be(2, REGISTER_0 + register);
            }
            Self::Map { set, register, into } => {
                data.text(1, set).number_be(2, REGISTER_0 + register);
                data.number_be(3, REGISTER_0 + into);
            }
            Self::VerdictMap { set, register } => {
                data.text(1, set).number_be(2, REGISTER_0 + register).number_be(3, 0);
            }
            Self::Dnat { family, address, port } => {
                data.number_be(1, 1).number_be(2, u32::from(*family));
                data.number_be(3, REGISTER_0 + address).number_be(5, REGISTER_0 + port);
            }
            Self::Masquerade => {}
            Self::Return => verdict(data, -5, None),
            Self::Drop => verdict(data, 0, None),
            Self::Jump(chain) => verdict(data, -3, Some(chain)),
        }
    }
}

fn compare(data: &mut Request, register: u32, operator: u32, value: &[u8]) {
    data.number_be(1, REGISTER_0 + register).number_be(2, operator);
    data.nest(3, |inner| _ = inner.attribute(DATA_VALUE, value));
}

fn verdict(data: &mut Request, code: i32, chain: Option<&str>) {
    data.number_be(1, 0);
    data.nest(2, |inner| write_verdict(inner, code, chain));
}

fn write_verdict(data: &mut Request, code: i32, chain: Option<&str>) {
    data.nest(DATA_VERDICT, |inner| {
        inner.attribute(VERDICT_CODE, &code.to_be_bytes());
        if let Some(chain) = chain {
            inner.text(VERDICT_CHAIN, chain);
        }
    });
}

/// Changes to one table that take effect together.
#[derive(Debug)]
pub struct Batch {
    table: &'static str,
    requests: Vec<Request>,
    sets: u32,
}

impl Batch {
    /// Starts a batch for `table` of the family for both IP versions.
    pub fn new(table: &'static str) -> Self {
        let begin = Request::new(BATCH_BEGIN, 0, &header_of(0, SUBSYSTEM));
        Self { table, requests: vec![begin], sets: 0 }
    }

    /// Whether nothing would change.
    pub fn is_empty(&self) -> bool {
        self.requests.len() == 1
    }

    fn message(&mut self, kind: u16, flags: u16) -> &mut Request {
        let header = header_of(NFPROTO_INET, 0);
        self.requests.push(Request::new(SUBSYSTEM << 8 | kind, flags, &header));
        self.requests.last_mut().expect("one was pushed")
    }

    /// Makes the table unless it exists.
    pub fn table(&mut self) {
        let table = self.table;
        self.message(MSG_NEWTABLE, NLM_F_CREATE).text(TABLE_NAME, table);
    }

    /// Removes the table with all that is in it.
    pub fn delete_table(&mut self) {
        let table = self.table;
        self.message(MSG_DELTABLE, 0).text(TABLE_NAME, table);
    }

    /// Makes a chain unless it exists, empties it and fills it with `rules`.
    pub fn chain(&mut self, name: &str, hook: Option<(ChainKind, Hook, i32)>, rules: &[Vec<Expr>]) {
        let table = self.table;
        let message = self.message(MSG_NEWCHAIN, NLM_F_CREATE);
        message.text(CHAIN_TABLE, table).text(CHAIN_NAME, name);
        if let Some((kind, hook, priority)) = hook {
            message.nest(CHAIN_HOOK, |inner| {
                inner.number_be(HOOK_NUMBER, hook as u32);
                inner.attribute(HOOK_PRIORITY, &priority.to_be_bytes());
            });
            message.number_be(CHAIN_POLICY, 1);
            let kind = match kind {
                ChainKind::Filter => "filter",
                ChainKind::Nat => "nat",
            };
            message.text(CHAIN_TYPE, kind);
        }
        self.message(MSG_DELRULE, 0).text(RULE_TABLE, table).text(RULE_CHAIN, name);
        for rule in rules {
            // Rules are inserted in front without this flag.
            let message = self.message(MSG_NEWRULE, NLM_F_CREATE | super::NLM_F_APPEND);
            message.text(RULE_TABLE, table).text(RULE_CHAIN, name);
            message.nest(RULE_EXPRESSIONS, |list| {
                for expr in rule {
                    list.nest(LIST_ELEM, |inner| {
                        inner.text(EXPR_NAME, expr.name());
                        inner.nest(EXPR_DATA, |data| expr.write(data));
                    });
                }
            });
        }
    }

    /// Removes a chain without hook; refused while something leads to it.
    pub fn delete_chain(&mut self, name: &str) {
        let table = self.table;
        self.message(MSG_DELRULE, 0).text(RULE_TABLE, table).text(RULE_CHAIN, name);
        self.message(MSG_DELCHAIN, 0).text(CHAIN_TABLE, table).text(CHAIN_NAME, name);
    }

    /// Makes a set unless it exists.
    pub fn set(&mut self, name: &str, key: &[Datum], values: Values<'_>) {
        let table = self.table;
        self.sets += 1;
        let id = self.sets;
        let message = self.message(MSG_NEWSET, NLM_F_CREATE);
        message.text(SET_TABLE, table).text(SET_NAME, name);
        let flags = if values == Values::None { 0 } else { SET_MAP };
        message.number_be(SET_FLAGS, flags);
        message.number_be(SET_KEY_TYPE, type_of(key)).number_be(SET_KEY_LEN, len_of(key));
        match values {
            Values::None => {}
            Values::Data(parts) => {
                message.number_be(SET_DATA_TYPE, type_of(parts));
                message.number_be(SET_DATA_LEN, len_of(parts));
            }
            Values::Verdict => _ = message.number_be(SET_DATA_TYPE, VERDICT_TYPE),
        }
        message.number_be(SET_ID, id);
    }

    /// Puts elements into a set; one that is there with the same value is fine, with another value
    /// the batch is refused (`EEXIST`).
    pub fn add_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(MSG_NEWSETELEM, NLM_F_CREATE, set, elements, true);
    }

    /// Takes elements out of a set by their keys; the batch is refused if one is not there.
    pub fn delete_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(MSG_DELSETELEM, 0, set, elements, false);
    }

    fn elements(&mut self, kind: u16, flags: u16, set: &str, elements: &[Element], whole: bool) {
        if elements.is_empty() {
            return;
        }
        let table = self.table;
        let message = self.message(kind, flags);
        message.text(ELEM_LIST_TABLE, table).text(ELEM_LIST_SET, set);
        message.nest(ELEM_LIST_ELEMENTS, |list| {
            for element in elements {
                list.nest(LIST_ELEM, |inner| {
                    inner.nest(ELEM_KEY, |key| _ = key.attribute(DATA_VALUE, &element.key));
                    match &element.value {
                        Some(Value::Data(bytes)) if whole => {
                            inner.nest(ELEM_DATA, |data| _ = data.attribute(DATA_VALUE, bytes));
                        }
                        Some(Value::Goto(chain)) if whole => {
                            inner.nest(ELEM_DATA, |data| write_verdict(data, -4, Some(chain)));
                        }
                        _ => {}
                    }
                    if whole && !element.comment.is_empty() {
                        inner.attribute(ELEM_USERDATA, &comment(&element.comment));
                    }
                });
            }
        });
    }

    /// Hands the batch to the kernel.
    pub fn commit(mut self, socket: &mut Socket, what: &str) -> Result<(), NetlinkError> {
        if self.is_empty() {
            return Ok(());
        }
        self.requests.push(Request::new(BATCH_END, 0, &header_of(0, SUBSYSTEM)));
        socket.execute_batch(what, self.requests)
    }
}

/// Returns the elements of a set; none when the table or the set does not exist.
pub fn elements(socket: &mut Socket, table: &str, set: &str) -> Result<Vec<Element>, NetlinkError> {
    let header = header_of(NFPROTO_INET, 0);
    let mut request = Request::new(SUBSYSTEM << 8 | MSG_GETSETELEM, 0, &header);
    request.text(ELEM_LIST_TABLE, table).text(ELEM_LIST_SET, set);
    let mut found: Vec<Element> = Vec::new();
    let result = socket.dump(&format!("list set `{set}`"), request, |message| {
        for element in read_elements(message.payload) {
            if !found.contains(&element) {
                found.push(element);
            }
        }
    });
    match result {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(found),
    }
}

/// Opens a socket for batches and lists.
pub fn open() -> Result<Socket, NetlinkError> {
    Socket::open(Family::Netfilter)
}

fn read_elements(payload: &[u8]) -> Vec<Element> {
    let body = payload.get(4..).unwrap_or_default();
    let list = attribute(body, ELEM_LIST_ELEMENTS).unwrap_or_default();
    attributes(list).filter_map(|(_, element)| read_element(element)).collect()
}

fn read_element(element: &[u8]) -> Option<Element> {
    let key = attribute(attribute(element, ELEM_KEY)?, DATA_VALUE)?.to_vec();
    let value = attribute(element, ELEM_DATA).and_then(|data| {
        if let Some(bytes) = attribute(data, DATA_VALUE) {
            return Some(Value::Data(bytes.to_vec()));
        }
        let verdict = attribute(data, DATA_VERDICT)?;
        let is_goto = attribute(verdict, VERDICT_CODE).and_then(number_be)? == (-4_i32) as u32;
        is_goto.then(|| attribute(verdict, VERDICT_CHAIN).map(text).map(Value::Goto))?
    });
    let comment = attribute(element, ELEM_USERDATA).map(read_comment).unwrap_or_default();
    Some(Element { key, value, comment })
}

/// User data is a list of type, length, value; a text ends with a zero byte.
fn comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(COMMENT_MAX)];
    let mut bytes = vec![UDATA_COMMENT, text.len() as u8 + 1];
    bytes.extend_from_slice(text);
    bytes.push(0);
    bytes
}

fn read_comment(mut bytes: &[u8]) -> String {
    while let [kind, len, rest @ ..] = bytes {
        let Some(value) = rest.get(..usize::from(*len)) else { break };
        if *kind == UDATA_COMMENT {
            return text(value);
        }
        bytes = &rest[usize::from(*len)..];
    }
    String::new()
}

/// `nfgenmsg`: family, version, resource in network order.
fn header_of(family: u8, resource: u16) -> [u8; 4] {
    let resource = resource.to_be_bytes();
    [family, 0, resource[0], resource[1]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::messages;

    #[test]
    fn elements_read_back_as_they_were_written() {
        let elements = [
            Element {
                key: key(&[Part::Protocol(6), Part::Port(8080)]),
                value: Some(Value::Data(key(&[Part::Ip([10, 0, 0, 2].into()), Part::Port(80)]))),
                comment: "a-container/eth0".to_owned(),
            },
            Element {
                key: vec![10, 0, 0, 2],
                value: Some(Value::Goto("masq".to_owned())),
                comment: String::new(),
            },
        ];
        let mut batch = Batch::new("t");
        batch.add_elements("s", &elements);
        let bytes = batch.requests.pop().expect("one message").finish(1);
        let payload = messages(&bytes).next().expect("whole").payload;
        assert_eq!(read_elements(payload), elements);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                messages(&broken).for_each(|message| drop(read_elements(message.payload)));
            }
            messages(&bytes[..at]).for_each(|message| drop(read_elements(message.payload)));
        }
    }

    #[test]
    fn comments_are_cut_to_what_fits() {
        let long = "x".repeat(300);
        assert_eq!(read_comment(&comment(&long)).len(), COMMENT_MAX);
        assert_eq!(read_comment(&[0, 200, 1]), "");
        assert_eq!(read_comment(&[5, 1, 0, 0, 2, b'a', 0]), "a");
    }
}
