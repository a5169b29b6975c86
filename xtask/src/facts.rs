//! Writes the table of Kubernetes type facts that the API server's core carries (`apiserver/core/facts/`).
//!
//! A person runs this when the supported Kubernetes version changes; builds and tests only read the committed result.
//! It never downloads anything: both inputs are files that the caller fetched.
//!
//! Inputs: `_definitions.json` of the Python package `kubernetes-validate` (official OpenAPI definitions, with
//! every optional type written as `[T, "null"]`), and the sources of the crate `k8s-pb` (protobuf field numbers as
//! prost attributes). The output holds names, types, list and patch keys and field numbers, and no descriptions; its
//! format is described in `apiserver/core/src/facts.rs`, which reads it.

use anyhow::{Context, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

/// Groups (as in definition names) that are served or that served types refer to.
const GROUPS: &[&str] = &[
    "apps",
    "authentication",
    "authorization",
    "autoscaling",
    "batch",
    "certificates",
    "coordination",
    "core",
    "discovery",
    "events",
    "networking",
    "node",
    "policy",
    "rbac",
    "scheduling",
    "storage",
];

/// Kinds that are in every group; the reader knows them by name instead of a list of sixty groups.
const META_PREFIX: &str = "io.k8s.apimachinery.";

/// Reads `definitions` and the crate sources under `k8s_pb`, and writes the compressed table to `output`.
///
/// Prints one line of figures, and the protobuf fields that have no JSON counterpart, to standard error.
pub(crate) fn run(definitions: &Path, k8s_pb: &Path, output: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(definitions)
        .with_context(|| format!("could not read `{}`", definitions.display()))?;
    let document: Value = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is not JSON", definitions.display()))?;
    let all = document["$defs"].as_object().context("no `$defs` in the definitions file")?;
    let messages = Messages::read(k8s_pb)?;

    let mut table = String::from("skerry-facts 1\n");
    let mut kept = 0;
    let mut unmatched = BTreeSet::new();
    for (name, definition) in all.iter().filter(|(name, _)| is_kept(name)) {
        kept += 1;
        write_definition(&mut table, name, definition, &messages, &mut unmatched)
            .with_context(|| format!("definition `{name}`"))?;
    }
    if kept == 0 {
        bail!("no definition of a served group in `{}`", definitions.display());
    }

    let mut gzip = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::best());
    gzip.write_all(table.as_bytes())?;
    let bytes = gzip.finish()?;
    if let Some(folder) = output.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(output, &bytes)
        .with_context(|| format!("could not write `{}`", output.display()))?;
    eprintln!("{kept} definitions, {} bytes, {} compressed", table.len(), bytes.len());
    for field in unmatched {
        eprintln!("no JSON field for protobuf field {field}");
    }
    Ok(())
}

/// Whether a definition belongs in the table: stable versions of the served groups, and what they share.
fn is_kept(name: &str) -> bool {
    if name.ends_with("List") && !name.ends_with("APIResourceList") {
        return false; // lists are made by the server and never parsed
    }
    if let Some(rest) = name.strip_prefix("io.k8s.api.") {
        let mut parts = rest.split('.');
        let (group, version) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        return GROUPS.contains(&group) && !version.contains("alpha") && !version.contains("beta");
    }
    name.starts_with(META_PREFIX) || name.starts_with("io.k8s.apiextensions-apiserver.")
}

fn write_definition(
    table: &mut String,
    name: &str,
    definition: &Value,
    messages: &Messages,
    unmatched: &mut BTreeSet<String>,
) -> anyhow::Result<()> {
    write!(table, "D\t{name}")?;
    let properties = definition["properties"].as_object();
    if properties.is_none() {
        write!(table, "\t{}", special_type(name))?;
    }
    table.push('\n');
    if !name.starts_with(META_PREFIX) {
        let kinds = definition["x-kubernetes-group-version-kind"].as_array();
        for kind in kinds.into_iter().flatten() {
            let part = |key: &str| kind[key].as_str().unwrap_or("").to_owned();
            writeln!(table, "G\t{}\t{}\t{}", part("group"), part("version"), part("kind"))?;
        }
    }
    let Some(properties) = properties else { return Ok(()) };
    let required: BTreeSet<&str> =
        definition["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let numbers = messages.numbers(name, properties.keys().map(String::as_str), unmatched);
    for (field, schema) in properties {
        write!(table, "F\t{field}\t{}", shape(schema)?)?;
        if required.contains(field.as_str()) {
            table.push_str("\tr");
        }
        if let Some(number) = numbers.get(field.as_str()) {
            write!(table, "\t#{number}")?;
        }
        match schema["x-kubernetes-list-type"].as_str() {
            Some("map") => table.push_str("\tlm"),
            Some("set") => table.push_str("\tls"),
            _ => {}
        }
        for key in schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten() {
            write!(table, "\tk={}", key.as_str().context("list map key is not a string")?)?;
        }
        let map_type = schema["x-kubernetes-map-type"].as_str();
        if map_type == Some("atomic") {
            table.push_str("\tma");
        }
        if let Some(strategy) = schema["x-kubernetes-patch-strategy"].as_str() {
            for word in strategy.split(',') {
                match word.trim() {
                    "merge" => table.push_str("\tpm"),
                    "retainKeys" => table.push_str("\tpr"),
                    "replace" => {}
                    other => bail!("patch strategy `{other}` of field `{field}` is unknown"),
                }
            }
        }
        if let Some(key) = schema["x-kubernetes-patch-merge-key"].as_str() {
            write!(table, "\tpk={key}")?;
        }
        table.push('\n');
    }
    if definition["x-kubernetes-map-type"].as_str() == Some("atomic") {
        table.push_str("A\n");
    }
    Ok(())
}

/// Type of a definition that has no fields.
fn special_type(name: &str) -> &'static str {
    match name.rsplit('.').next().unwrap_or("") {
        "Quantity" => "quantity",
        "IntOrString" => "intstr",
        "Time" => "time",
        "MicroTime" => "microtime",
        "JSON" | "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" => "any",
        "JSONSchemaPropsOrStringArray" => "any",
        _ => "object",
    }
}

/// One word for a field's type: `string`, `int32`, `@name`, `[]int32`, `{}@name`, `object`, `any`, ….
fn shape(schema: &Value) -> anyhow::Result<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.strip_prefix("#/$defs/").context("reference outside `$defs`")?;
        return Ok(format!("@{name}"));
    }
    let ty = match &schema["type"] {
        Value::String(ty) => ty.as_str(),
        Value::Array(types) => {
            types.iter().filter_map(Value::as_str).find(|ty| *ty != "null").unwrap_or("any")
        }
        _ => "any",
    };
    let format = schema["format"].as_str();
    Ok(match (ty, format) {
        ("array", _) => format!("[]{}", shape(&schema["items"])?),
        ("object", _) if schema["additionalProperties"].is_object() => {
            format!("{{}}{}", shape(&schema["additionalProperties"])?)
        }
        ("object", _) => "object".into(),
        ("string", Some("byte")) => "byte".into(),
        ("string", Some("date-time")) => "time".into(),
        ("string", _) => "string".into(),
        ("integer", Some("int32")) => "int32".into(),
        ("integer", _) => "int64".into(),
        ("number", _) => "double".into(),
        ("boolean", _) => "bool".into(),
        ("any", _) => "any".into(),
        (other, _) => bail!("type `{other}` is unknown"),
    })
}

struct PbField {
    name: String,
    number: u32,
    /// Last word of the Rust type, such as `VolumeSource` or `String`.
    ty: String,
}

/// The structs of `k8s-pb`, by module (as a definition prefix) and name, both in lower case.
#[derive(Default)]
struct Messages(BTreeMap<String, Vec<PbField>>);

impl Messages {
    fn read(root: &Path) -> anyhow::Result<Self> {
        let source = root.join("src");
        let mut messages = Self::default();
        let mut folders = vec![source.clone()];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder)
                .with_context(|| format!("could not list `{}`", folder.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.file_name().is_some_and(|name| name == "mod.rs") {
                    let relative = folder.strip_prefix(&source)?.to_string_lossy();
                    let module = format!("io.k8s.{}", relative.replace('/', "."));
                    messages.read_module(&module, &std::fs::read_to_string(&path)?);
                }
            }
        }
        if messages.0.is_empty() {
            bail!("no prost structs under `{}`", source.display());
        }
        Ok(messages)
    }

    fn read_module(&mut self, module: &str, text: &str) {
        let mut current = None;
        let mut number = None;
        let mut lines = text.lines().map(str::trim);
        while let Some(line) = lines.next() {
            if let Some(name) = line.strip_prefix("pub struct ") {
                let name = name.trim_end_matches([' ', '{', '}']);
                let key = normal(&format!("{module}.{name}"));
                self.0.insert(key.clone(), Vec::new());
                current = Some(key);
            } else if line.starts_with("#[prost(") {
                let attribute = joined(line, &mut lines, ")]");
                number = attribute
                    .rsplit_once("tag = \"")
                    .and_then(|(_, rest)| rest.split('"').next()?.parse::<u32>().ok());
            } else if let (Some(field), Some(number), Some(current)) =
                (line.strip_prefix("pub "), number.take(), &current)
            {
                let field = joined(field, &mut lines, ",");
                let Some((name, ty)) = field.split_once(": ") else { continue };
                let ty = ty.trim_end_matches([',', '>', ' ']);
                let ty = ty.rsplit([':', '<', ' ']).next().unwrap_or(ty).to_owned();
                let name = name.trim_start_matches("r#").to_owned();
                let fields = self.0.entry(current.clone()).or_default();
                fields.push(PbField { name, number, ty });
            }
        }
    }

    /// Field numbers of the definition `name`, by JSON field; empty when there is no such message.
    ///
    /// `7`, or `2.5` for field 5 of the message that is field 2 and has no name in JSON.
    fn numbers<'a>(
        &self,
        name: &str,
        json_fields: impl Iterator<Item = &'a str>,
        unmatched: &mut BTreeSet<String>,
    ) -> BTreeMap<&'a str, String> {
        let by_normal: BTreeMap<String, &str> =
            json_fields.map(|field| (normal(field), field)).collect();
        let mut numbers = BTreeMap::new();
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        if let Some(fields) = self.0.get(&normal(name)) {
            self.collect(module, fields, "", &by_normal, &mut numbers, name, unmatched);
        }
        numbers
    }

    #[expect(clippy::too_many_arguments)] // one recursion, called from one place
    fn collect<'a>(
        &self,
        module: &str,
        fields: &[PbField],
        prefix: &str,
        json: &BTreeMap<String, &'a str>,
        numbers: &mut BTreeMap<&'a str, String>,
        owner: &str,
        unmatched: &mut BTreeSet<String>,
    ) {
        for field in fields {
            let path = format!("{prefix}{}", field.number);
            if let Some(json_name) = json_name(&field.name, json) {
                numbers.insert(json_name, path);
                continue;
            }
            match self.0.get(&normal(&format!("{module}.{}", field.ty))) {
                Some(inner) if prefix.is_empty() => {
                    let prefix = format!("{path}.");
                    self.collect(module, inner, &prefix, json, numbers, owner, unmatched);
                }
                _ => {
                    unmatched.insert(format!("{owner}: {} = {path} ({})", field.name, field.ty));
                }
            }
        }
    }
}

/// `first` and the lines after it up to the one that ends with `end`; rustfmt breaks long items.
fn joined<'a>(first: &str, lines: &mut impl Iterator<Item = &'a str>, end: &str) -> String {
    let mut text = first.to_owned();
    // The last line of a broken generic type is `>,`; arguments before it end with a comma too.
    let closed =
        |text: &str| text.ends_with(end) && text.matches('<').count() == text.matches('>').count();
    while !closed(&text) {
        let Some(line) = lines.next() else { break };
        text.push(' ');
        text.push_str(line);
    }
    text
}

fn json_name<'a>(field: &str, json: &BTreeMap<String, &'a str>) -> Option<&'a str> {
    let field = normal(field);
    // `JSONSchemaProps` has `$ref` and `$schema`, and writes its extensions with dashes.
    let spellings =
        [field.clone(), format!("${field}"), field.replacen("xkubernetes", "x-kubernetes-", 1)];
    spellings.iter().find_map(|name| json.get(name.as_str())).copied()
}

/// Lower case without underscores, and without dashes except in `x-kubernetes-`.
fn normal(name: &str) -> String {
    let lower = name.to_ascii_lowercase().replace('_', "");
    match lower.strip_prefix("x-kubernetes-") {
        Some(rest) => format!("x-kubernetes-{}", rest.replace('-', "")),
        None => lower.replace('-', ""),
    }
}
