//! Types of the built-in kinds: fields, list and patch keys, protobuf field numbers.
//!
//! The catalogue, the OpenAPI documents and the protobuf decoder read [`facts`]; nothing else does. The table is
//! `facts/kubernetes-1.36.gz`, written by `cargo xtask facts` and committed; it is parsed once, on first use, and
//! takes about half a megabyte afterwards. Descriptions are left out on purpose.
//!
//! Format: gzip over lines of tab-separated words, the first line being `skerry-facts 1`:
//!
//! ```text
//! D <definition> [<type>]          starts a definition; the type only when it has no fields
//! G <group> <version> <kind>       the definition is this kind
//! F <field> <type> [<flag>…]       a field, with the flags below
//! A                                the definition is an atomic map for server-side apply
//!
//! types  string byte time int32 int64 double bool object any, @<definition>, []<type>, {}<type>
//! flags  r required; #<n>[.<m>] protobuf number (.m: inside the unnamed message n); lm, ls list type map, set;
//!        k=<field> list map key; ma atomic map; pm, pr patch strategy merge, retainKeys; pk=<field> merge key
//! ```
//!
//! Source: the official OpenAPI definitions of Kubernetes 1.36 and the field numbers of its `generated.proto` files.

use crate::schema::{ListType, Node, Schema, Schemas, Type};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::sync::{Arc, LazyLock};

/// Definition name of `metav1.ObjectMeta`.
pub const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
/// Definition name of `metav1.ListMeta`.
pub const LIST_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";
/// Prefix of the definitions that are in every group, such as `DeleteOptions`.
pub const META_V1: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// The committed table, compressed.
pub(crate) const TABLE: &[u8] = include_bytes!("../facts/kubernetes-1.36.gz");

/// Upper bound on the decompressed table; the committed one has 0.1 MB.
const TABLE_LEN_MAX: u64 = 4 << 20;

/// All definitions.
#[derive(Debug)]
pub struct Facts {
    definitions: Vec<Definition>,
    by_name: HashMap<Arc<str>, usize>,
    by_kind: HashMap<(Arc<str>, Arc<str>, Arc<str>), usize>,
}

/// One named type.
#[derive(Debug)]
pub struct Definition {
    /// Such as `io.k8s.api.core.v1.Pod`.
    pub name: Arc<str>,
    /// Group, version and kind; empty unless the definition is a kind of one group.
    pub kinds: Vec<(Arc<str>, Arc<str>, Arc<str>)>,
    /// `None`: the type is an object with [`Self::fields`].
    pub shape: Option<Shape>,
    /// Fields by name.
    pub fields: Vec<Field>,
    /// Server-side apply treats the object as one value.
    pub atomic: bool,
}

/// One field of a definition.
#[derive(Debug)]
pub struct Field {
    /// JSON name.
    pub name: Arc<str>,
    /// Type of the value.
    pub shape: Shape,
    /// Protobuf number; 0 when there is none.
    pub number: u16,
    /// Number of the unnamed message around the field; 0 when the field is directly in its own message.
    pub outer: u16,
    /// The field has to be set.
    pub required: bool,
    /// How server-side apply merges the list.
    pub list: ListType,
    /// Keys of a list of type map.
    pub list_map_keys: Vec<Arc<str>>,
    /// The field's object is one value for server-side apply.
    pub atomic_map: bool,
    /// Patch strategy `merge`.
    pub patch_merge: bool,
    /// Patch strategy `retainKeys`.
    pub patch_retain_keys: bool,
    /// Key of the patch strategy `merge`.
    pub patch_merge_key: Option<Arc<str>>,
}

/// Type of a value as the facts table names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Text.
    String,
    /// Bytes, in base64.
    Bytes,
    /// RFC 3339 with seconds.
    Time,
    /// RFC 3339 with microseconds.
    MicroTime,
    /// 32-bit integer.
    Int32,
    /// 64-bit integer.
    Int64,
    /// Floating point.
    Double,
    /// Boolean.
    Bool,
    /// `resource.Quantity`.
    Quantity,
    /// Integer or string.
    IntOrString,
    /// Object with unknown fields.
    Object,
    /// Any JSON value.
    Any,
    /// Another definition.
    Ref(Arc<str>),
    /// List.
    List(Box<Shape>),
    /// Map with string keys.
    Map(Box<Shape>),
}

/// The committed facts, parsed on first use.
pub fn facts() -> &'static Facts {
    static FACTS: LazyLock<Facts> = LazyLock::new(|| {
        let mut text = String::new();
        flate2::read::GzDecoder::new(TABLE)
            .take(TABLE_LEN_MAX)
            .read_to_string(&mut text)
            .expect("the committed facts table is gzip over UTF-8");
        Facts::parse(&text).expect("the committed facts table is well-formed")
    });
    &FACTS
}

/// Schemas of all built-in definitions, built on first use and shared by every catalogue.
pub fn schemas() -> &'static Arc<Schemas> {
    static SCHEMAS: LazyLock<Arc<Schemas>> = LazyLock::new(|| Arc::new(facts().to_schemas()));
    &SCHEMAS
}

/// Why a facts table could not be read.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the facts table: {problem}")]
pub struct FactsError {
    line: usize,
    problem: String,
}

impl Facts {
    /// Parses a decompressed table.
    pub fn parse(text: &str) -> Result<Self, FactsError> {
        let mut definitions: Vec<Definition> = Vec::new();
        let mut words = Words::default();
        let mut lines = text.lines().enumerate();
        let at = |line: usize, problem: String| FactsError { line: line + 1, problem };
        if lines.next().map(|(_, line)| line) != Some("skerry-facts 1") {
            return Err(at(0, "not a `skerry-facts 1` table".into()));
        }
        for (number, line) in lines {
            let mut cells = line.split('\t');
            let tag = cells.next().unwrap_or("");
            let mut cell = || cells.next().ok_or_else(|| at(number, "too few words".to_owned()));
            if tag == "D" {
                let name = words.intern(cell()?);
                let shape = cells.next().map(|word| Shape::parse(word, &mut words)).transpose();
                let shape = shape.map_err(|problem| at(number, problem))?;
                let (kinds, fields) = (Vec::new(), Vec::new());
                definitions.push(Definition { name, kinds, shape, fields, atomic: false });
                continue;
            }
            let Some(definition) = definitions.last_mut() else {
                return Err(at(number, format!("`{tag}` before the first definition")));
            };
            match tag {
                "G" => {
                    let kind =
                        (words.intern(cell()?), words.intern(cell()?), words.intern(cell()?));
                    definition.kinds.push(kind);
                }
                "F" => {
                    let (name, shape) = (words.intern(cell()?), cell()?);
                    let field = Field::parse(name, shape, cells, &mut words);
                    definition.fields.push(field.map_err(|problem| at(number, problem))?);
                }
                "A" => definition.atomic = true,
                other => return Err(at(number, format!("unknown tag `{other}`"))),
            }
        }
        let indexed = definitions.iter().enumerate();
        let by_name = indexed.clone().map(|(index, one)| (one.name.clone(), index)).collect();
        let by_kind = indexed
            .flat_map(|(index, one)| one.kinds.iter().map(move |kind| (kind.clone(), index)))
            .collect();
        Ok(Self { definitions, by_name, by_kind })
    }

    /// The definition called `name`.
    pub fn definition(&self, name: &str) -> Option<&Definition> {
        self.by_name.get(name).map(|index| &self.definitions[*index])
    }

    /// The definition of a kind; `DeleteOptions` and its like are found in every group.
    pub fn kind(&self, group: &str, version: &str, kind: &str) -> Option<&Definition> {
        let key = (group.into(), version.into(), kind.into());
        match self.by_kind.get(&key) {
            Some(index) => Some(&self.definitions[*index]),
            None => match kind {
                "DeleteOptions" | "Status" => self.definition(&format!("{META_V1}{kind}")),
                _ => None,
            },
        }
    }

    /// All definitions.
    pub fn definitions(&self) -> &[Definition] {
        &self.definitions
    }

    /// Definitions that a user's wishes are made of: all that kinds lead to other than through their `status`.
    fn wanted(&self) -> HashSet<Arc<str>> {
        fn reference(shape: &Shape) -> Option<&Arc<str>> {
            match shape {
                Shape::Ref(name) => Some(name),
                Shape::List(inner) | Shape::Map(inner) => reference(inner),
                _ => None,
            }
        }
        let mut wanted = HashSet::new();
        let kinds = self.definitions.iter().filter(|one| !one.kinds.is_empty());
        let mut next: Vec<&Definition> = kinds.collect();
        while let Some(definition) = next.pop() {
            if !wanted.insert(definition.name.clone()) {
                continue;
            }
            let is_kind = !definition.kinds.is_empty();
            let fields = definition.fields.iter().filter(|f| !(is_kind && &*f.name == "status"));
            next.extend(fields.filter_map(|f| self.definition(reference(&f.shape)?)));
        }
        wanted
    }

    fn to_schemas(&self) -> Schemas {
        let mut build = SchemaBuild { facts: self, wanted: self.wanted(), plain: HashMap::new() };
        let definitions = self
            .definitions
            .iter()
            .map(|definition| (definition.name.clone(), Arc::new(build.definition(definition))))
            .collect();
        Schemas { definitions }
    }
}

impl Field {
    fn parse<'a>(
        name: Arc<str>,
        shape: &str,
        flags: impl Iterator<Item = &'a str>,
        words: &mut Words,
    ) -> Result<Self, String> {
        let mut field = Self {
            name,
            shape: Shape::parse(shape, words)?,
            number: 0,
            outer: 0,
            required: false,
            list: ListType::Atomic,
            list_map_keys: Vec::new(),
            atomic_map: false,
            patch_merge: false,
            patch_retain_keys: false,
            patch_merge_key: None,
        };
        for flag in flags {
            match flag {
                "r" => field.required = true,
                "lm" => field.list = ListType::Map,
                "ls" => field.list = ListType::Set,
                "ma" => field.atomic_map = true,
                "pm" => field.patch_merge = true,
                "pr" => field.patch_retain_keys = true,
                _ => {
                    if let Some(key) = flag.strip_prefix("k=") {
                        field.list_map_keys.push(words.intern(key));
                    } else if let Some(key) = flag.strip_prefix("pk=") {
                        field.patch_merge_key = Some(words.intern(key));
                    } else if let Some(path) = flag.strip_prefix('#') {
                        let (outer, number) = path.split_once('.').unwrap_or(("0", path));
                        let parse = |text: &str| {
                            text.parse().map_err(|_| format!("bad protobuf number `{path}`"))
                        };
                        (field.outer, field.number) = (parse(outer)?, parse(number)?);
                    } else {
                        return Err(format!("unknown flag `{flag}`"));
                    }
                }
            }
        }
        Ok(field)
    }
}

impl Shape {
    fn parse(word: &str, words: &mut Words) -> Result<Self, String> {
        if let Some(rest) = word.strip_prefix("[]") {
            return Ok(Self::List(Box::new(Self::parse(rest, words)?)));
        }
        if let Some(rest) = word.strip_prefix("{}") {
            return Ok(Self::Map(Box::new(Self::parse(rest, words)?)));
        }
        if let Some(name) = word.strip_prefix('@') {
            return Ok(Self::Ref(words.intern(name)));
        }
        Ok(match word {
            "string" => Self::String,
            "byte" => Self::Bytes,
            "time" => Self::Time,
            "microtime" => Self::MicroTime,
            "int32" => Self::Int32,
            "int64" => Self::Int64,
            "double" => Self::Double,
            "bool" => Self::Bool,
            "quantity" => Self::Quantity,
            "intstr" => Self::IntOrString,
            "object" => Self::Object,
            "any" => Self::Any,
            other => return Err(format!("unknown type `{other}`")),
        })
    }

    /// OpenAPI type and format of a scalar; `None` for the others.
    pub fn openapi(&self) -> Option<(&'static str, Option<&'static str>)> {
        Some(match self {
            Self::String | Self::Quantity => ("string", None),
            Self::Bytes => ("string", Some("byte")),
            Self::Time | Self::MicroTime => ("string", Some("date-time")),
            Self::Int32 => ("integer", Some("int32")),
            Self::Int64 => ("integer", Some("int64")),
            Self::Double => ("number", Some("double")),
            Self::Bool => ("boolean", None),
            Self::IntOrString => ("string", Some("int-or-string")),
            Self::Object => ("object", None),
            Self::Any | Self::Ref(_) | Self::List(_) | Self::Map(_) => return None,
        })
    }
}

/// Strings that occur many times, once in memory.
#[derive(Default)]
struct Words(HashSet<Arc<str>>);

impl Words {
    fn intern(&mut self, word: &str) -> Arc<str> {
        if let Some(known) = self.0.get(word) {
            return known.clone();
        }
        let new: Arc<str> = word.into();
        self.0.insert(new.clone());
        new
    }
}

/// Makes schemas, sharing equal ones: most of the 3,000 fields are one of a dozen scalars.
struct SchemaBuild<'a> {
    facts: &'a Facts,
    /// Only in these is `required` enforced. In a status it says how Go prints a field, not that a writer has to
    /// set it: a node that reports half of its `nodeInfo` is a good node.
    wanted: HashSet<Arc<str>>,
    plain: HashMap<Shape, Arc<Schema>>,
}

impl SchemaBuild<'_> {
    fn definition(&mut self, definition: &Definition) -> Schema {
        if let Some(shape) = &definition.shape {
            return self.bare(shape);
        }
        let fields = definition.fields.iter();
        let enforced = self.wanted.contains(&definition.name);
        let required =
            fields.clone().filter(|f| enforced && f.required).map(|f| f.name.clone()).collect();
        let properties: BTreeMap<_, _> =
            fields.map(|field| (field.name.clone(), self.field(&definition.name, field))).collect();
        let atomic_map = definition.atomic;
        Schema { ty: Type::Object, properties, atomic_map, required, ..Schema::default() }
    }

    fn field(&mut self, owner: &str, field: &Field) -> Node {
        let default = merge_key_default(owner, &field.name);
        let decorated = field.list != ListType::Atomic
            || field.atomic_map
            || field.patch_merge
            || field.patch_retain_keys
            || default.is_some();
        if !decorated {
            return self.node(&field.shape);
        }
        let mut schema = self.bare(&field.shape);
        schema.list = field.list;
        schema.list_map_keys = field.list_map_keys.clone();
        schema.atomic_map |= field.atomic_map;
        schema.patch_merge = field.patch_merge;
        schema.patch_retain_keys = field.patch_retain_keys;
        schema.patch_merge_key = field.patch_merge_key.clone();
        schema.default = default;
        Node::Inline(Arc::new(schema))
    }

    fn node(&mut self, shape: &Shape) -> Node {
        if let Shape::Ref(name) = shape {
            return Node::Ref(name.clone());
        }
        if let Some(known) = self.plain.get(shape) {
            return Node::Inline(known.clone());
        }
        let schema = Arc::new(self.bare(shape));
        self.plain.insert(shape.clone(), schema.clone());
        Node::Inline(schema)
    }

    fn bare(&mut self, shape: &Shape) -> Schema {
        let of = |ty| Schema { ty, ..Schema::default() };
        let anything = Schema { preserve_unknown: true, ..Schema::default() };
        match shape {
            Shape::String | Shape::Bytes | Shape::Time | Shape::MicroTime => of(Type::String),
            Shape::Int32 | Shape::Int64 => of(Type::Integer),
            Shape::Double => of(Type::Number),
            Shape::Bool => of(Type::Boolean),
            Shape::IntOrString => of(Type::IntOrString),
            // A quantity may also be written as a fraction (`cpu: 0.5`), which no type here allows.
            Shape::Quantity | Shape::Any => anything,
            Shape::Object => Schema { preserve_unknown: true, ..of(Type::Object) },
            Shape::List(items) => Schema { items: Some(self.node(items)), ..of(Type::Array) },
            Shape::Map(values) => {
                Schema { additional: Some(self.node(values)), ..of(Type::Object) }
            }
            // Only for a field with keys or strategies of its own: the definition is copied for it.
            Shape::Ref(name) => match self.facts.definition(name) {
                Some(definition) => self.definition(definition),
                None => anything,
            },
        }
    }
}

/// Default of a field that identifies list items, so that items which leave it out are matched all the same.
fn merge_key_default(owner: &str, field: &str) -> Option<serde_json::Value> {
    let ports = ["io.k8s.api.core.v1.ContainerPort", "io.k8s.api.core.v1.ServicePort"];
    (field == "protocol" && ports.contains(&owner)).then(|| "TCP".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_of_a_served_kind_is_in_the_table() {
        fn refs(shape: &Shape, found: &mut Vec<Arc<str>>) {
            match shape {
                Shape::Ref(name) => found.push(name.clone()),
                Shape::List(inner) | Shape::Map(inner) => refs(inner, found),
                _ => {}
            }
        }
        for definition in facts().definitions() {
            for field in &definition.fields {
                let mut found = Vec::new();
                refs(&field.shape, &mut found);
                for name in found {
                    assert!(facts().definition(&name).is_some(), "{} -> {name}", definition.name);
                }
            }
        }
    }

    #[test]
    fn container_list_is_a_map_by_name_and_merges_by_name() {
        let schemas = schemas();
        let spec = &schemas.definitions["io.k8s.api.core.v1.PodSpec"];
        let containers = schemas.resolve(&spec.properties["containers"]);

        assert_eq!(containers.ty, Type::Array);
        assert_eq!(containers.list, ListType::Map);
        assert_eq!(containers.list_map_keys, ["name".into()]);
        assert!(containers.patch_merge);
        assert_eq!(containers.patch_merge_key.as_deref(), Some("name"));
        assert!(spec.required.contains(&"containers".into()));
        let item = schemas.resolve(containers.items.as_ref().unwrap());
        assert!(item.properties.contains_key("image"));
    }

    #[test]
    fn deployment_strategy_retains_keys_and_selectors_are_atomic() {
        let schemas = schemas();
        let spec = &schemas.definitions["io.k8s.api.apps.v1.DeploymentSpec"];
        let strategy = schemas.resolve(&spec.properties["strategy"]);

        assert!(strategy.patch_retain_keys);
        assert!(strategy.properties.contains_key("rollingUpdate"));
        assert!(schemas.resolve(&spec.properties["selector"]).atomic_map);
    }

    #[test]
    fn a_status_may_leave_out_what_go_always_prints() {
        let required = |name: &str| schemas().definitions[name].required.clone();
        assert_eq!(required("io.k8s.api.core.v1.NodeSystemInfo"), []);
        assert_eq!(required("io.k8s.api.core.v1.ContainerStatus"), []);
        assert_eq!(required("io.k8s.api.core.v1.EnvVar"), ["name".into()]);
    }

    #[test]
    fn protobuf_numbers_include_those_of_unnamed_messages() {
        let volume = facts().definition("io.k8s.api.core.v1.Volume").unwrap();
        let number = |name: &str| {
            let field = volume.fields.iter().find(|field| &*field.name == name).unwrap();
            (field.outer, field.number)
        };
        assert_eq!(number("name"), (0, 1));
        assert_eq!(number("hostPath"), (2, 1));
        assert_eq!(number("configMap"), (2, 19));
    }

    #[test]
    fn malformed_tables_are_refused_with_the_line() {
        for (table, expected) in [
            ("", "line 1 of the facts table: not a `skerry-facts 1` table"),
            (
                "skerry-facts 1\nF\ta\tstring",
                "line 2 of the facts table: `F` before the first definition",
            ),
            ("skerry-facts 1\nD\ta\nF\tb\ttext", "line 3 of the facts table: unknown type `text`"),
            ("skerry-facts 1\nD\ta\nF\tb", "line 3 of the facts table: too few words"),
            (
                "skerry-facts 1\nD\ta\nF\tb\tbool\t#x",
                "line 3 of the facts table: bad protobuf number `x`",
            ),
        ] {
            assert_eq!(Facts::parse(table).unwrap_err().to_string(), expected);
        }
    }
}
