//! What Helm makes of the chart, for the functions that it uses.

use std::fs;
use std::path::{Path, PathBuf};

use gtmpl::{Context, Func, FuncError, Template, Value as Item};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{deploy, documents_of};

const FUNCTIONS: [(&str, Func); 9] = [
    ("default", default),
    ("fail", fail),
    ("filesGet", files_get),
    ("fromYaml", from_yaml),
    ("hasKey", has_key),
    ("nindent", nindent),
    ("quote", quote),
    ("sha256sum", digest),
    ("toYaml", to_yaml),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Chart {
    pub api_version: String,
    pub name: String,
    #[expect(dead_code, reason = "known, and nothing depends on it")]
    description: String,
    #[serde(rename = "type")]
    pub type_: String,
    pub version: String,
    pub app_version: String,
    pub kube_version: String,
}

pub fn dir() -> PathBuf {
    deploy().join("helm/fairlead")
}

pub fn chart() -> Chart {
    serde_yaml_ng::from_str(&read(&dir().join("Chart.yaml"))).expect("Chart.yaml")
}

pub fn values() -> Value {
    serde_yaml_ng::from_str(&read(&dir().join("values.yaml"))).expect("values.yaml")
}

/// The objects of the chart, in namespace kube-system, with these values over the default ones.
pub fn render(given: &Value) -> Vec<Value> {
    try_render(given).unwrap_or_else(|e| panic!("{e}"))
}

pub fn try_render(given: &Value) -> Result<Vec<Value>, String> {
    let context = context(given);
    let mut files: Vec<PathBuf> = fs::read_dir(dir().join("templates"))
        .expect("templates")
        .map(|e| e.expect("a file").path())
        .collect();
    files.sort();
    let mut objects = Vec::new();
    for path in files {
        let text = render_text(&read(&path), &context).map_err(|e| format!("{}: {e}", path.display()))?;
        if path.extension().is_some_and(|extension| extension == "yaml") {
            objects.extend(documents_of(&text, &path).into_iter().filter(|object| !object.is_null()));
        } else {
            assert!(path.ends_with("NOTES.txt") && !text.contains("{{"), "{}", path.display());
        }
    }
    Ok(objects)
}

fn context(given: &Value) -> Value {
    let mut values = values();
    overlay(&mut values, given);
    let release = json!({ "Name": "fairlead", "Namespace": "kube-system" });
    json!({ "Values": values, "Release": release, "Chart": { "AppVersion": chart().app_version } })
}

/// As `--values` does.
fn overlay(values: &mut Value, given: &Value) {
    match (values, given) {
        (Value::Object(values), Value::Object(given)) => {
            for (name, value) in given {
                overlay(values.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (values, given) => *values = given.clone(),
    }
}

fn render_text(text: &str, context: &Value) -> Result<String, String> {
    // Methods with arguments are the one thing that this engine lacks.
    let text = text.replace(".Files.Get", "filesGet");
    let mut template = Template::default();
    template.add_funcs(&FUNCTIONS);
    template.parse(text).map_err(|e| e.to_string())?;
    template.render(&Context::from(item(context))).map_err(|e| e.to_string())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn item(value: &Value) -> Item {
    match value {
        Value::Null => Item::Nil,
        Value::Bool(value) => Item::Bool(*value),
        Value::Number(number) => match number.as_i64() {
            Some(number) => Item::from(number),
            None => Item::from(number.as_f64().expect("a number")),
        },
        Value::String(text) => Item::String(text.clone()),
        Value::Array(items) => Item::Array(items.iter().map(item).collect()),
        Value::Object(fields) => {
            Item::Map(fields.iter().map(|(name, value)| (name.clone(), item(value))).collect())
        }
    }
}

fn value(item: &Item) -> Value {
    match item {
        Item::Bool(value) => (*value).into(),
        Item::String(text) => text.clone().into(),
        Item::Number(number) => match number.as_i64() {
            Some(number) => number.into(),
            None => number.as_f64().into(),
        },
        Item::Array(items) => items.iter().map(value).collect(),
        Item::Map(fields) | Item::Object(fields) => Value::Object(
            fields.iter().map(|(name, item)| (name.clone(), value(item))).collect::<Map<_, _>>(),
        ),
        Item::NoValue | Item::Nil | Item::Function(_) => Value::Null,
    }
}

fn wrong(what: &str) -> FuncError {
    FuncError::Generic(what.to_owned())
}

fn text(arguments: &[Item], index: usize) -> Result<&str, FuncError> {
    match arguments.get(index) {
        Some(Item::String(text)) => Ok(text),
        other => Err(wrong(&format!("{other:?} is no text"))),
    }
}

fn default(arguments: &[Item]) -> Result<Item, FuncError> {
    let [default, given] = arguments else { return Err(wrong("default takes two")) };
    let empty =
        matches!(given, Item::NoValue | Item::Nil) || matches!(given, Item::String(text) if text.is_empty());
    Ok(if empty { default.clone() } else { given.clone() })
}

fn fail(arguments: &[Item]) -> Result<Item, FuncError> {
    Err(wrong(text(arguments, 0)?))
}

fn files_get(arguments: &[Item]) -> Result<Item, FuncError> {
    Ok(read(&dir().join(text(arguments, 0)?)).into())
}

fn from_yaml(arguments: &[Item]) -> Result<Item, FuncError> {
    let parsed: Value = serde_yaml_ng::from_str(text(arguments, 0)?).map_err(|e| wrong(&e.to_string()))?;
    Ok(item(&parsed))
}

fn has_key(arguments: &[Item]) -> Result<Item, FuncError> {
    match arguments {
        [Item::Map(fields), Item::String(name)] => Ok(fields.contains_key(name).into()),
        _ => Err(wrong("hasKey takes a map and a name")),
    }
}

fn nindent(arguments: &[Item]) -> Result<Item, FuncError> {
    let Some(Item::Number(width)) = arguments.first() else {
        return Err(wrong("nindent takes a number first"));
    };
    let width =
        width.as_u64().and_then(|width| usize::try_from(width).ok()).ok_or_else(|| wrong("a width"))?;
    let lines = text(arguments, 1)?.split('\n').map(|line| format!("\n{}{line}", " ".repeat(width)));
    Ok(lines.collect::<String>().into())
}

fn quote(arguments: &[Item]) -> Result<Item, FuncError> {
    match arguments {
        [Item::String(text)] => Ok(format!("{text:?}").into()),
        [other] => Ok(format!("\"{other}\"").into()),
        _ => Err(wrong("quote takes one")),
    }
}

/// Any digest tells here what Helm's does.
fn digest(arguments: &[Item]) -> Result<Item, FuncError> {
    Ok(format!("{:08x}", crc32fast::hash(text(arguments, 0)?.as_bytes())).into())
}

fn to_yaml(arguments: &[Item]) -> Result<Item, FuncError> {
    let text = serde_yaml_ng::to_string(&value(&arguments[0])).map_err(|e| wrong(&e.to_string()))?;
    Ok(text.trim_end().to_owned().into())
}
