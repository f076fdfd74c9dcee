//! The objects of one file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::iter;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::entries::ServiceName;
use crate::model::{Change, EndpointSlice, Node, Pod, Service, SliceName};
use crate::owner::PodName;
use crate::source::budget::Budget;
use crate::source::convert::{self, ServiceCidr};

/// An object's kind and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Key {
    Service(ServiceName),
    Slice(SliceName),
    Pod(PodName),
    Node(String),
    ServiceCidr(String),
}

impl Key {
    /// The object is gone.
    pub(super) fn gone(self) -> Change {
        match self {
            Self::Service(name) => Change::ServiceGone(name),
            Self::Slice(name) => Change::SliceGone(name),
            Self::Pod(name) => Change::PodGone(name),
            Self::Node(name) => Change::NodeGone(name),
            Self::ServiceCidr(name) => Change::ServiceCidrGone(name),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Slice(name) => write!(f, "EndpointSlice {name}"),
            Self::Pod(name) => write!(f, "Pod {name}"),
            Self::Node(name) => write!(f, "Node {name}"),
            Self::ServiceCidr(name) => write!(f, "ServiceCIDR {name}"),
        }
    }
}

/// An object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Object {
    Service(Arc<Service>),
    Slice(Arc<EndpointSlice>),
    Pod(Arc<Pod>),
    Node(Box<Node>),
    ServiceCidr(ServiceCidr),
}

impl Object {
    pub(super) fn key(&self) -> Key {
        match self {
            Self::Service(service) => Key::Service(service.name.clone()),
            Self::Slice(slice) => Key::Slice(slice.name.clone()),
            Self::Pod(pod) => Key::Pod(pod.name.clone()),
            Self::Node(node) => Key::Node(node.name.clone()),
            Self::ServiceCidr(cidr) => Key::ServiceCidr(cidr.name.clone()),
        }
    }

    /// The object is there, and this is what it is.
    pub(super) fn changed(self) -> Change {
        match self {
            Self::Service(service) => Change::Service(service),
            Self::Slice(slice) => Change::Slice(slice),
            Self::Pod(pod) => Change::Pod(pod),
            Self::Node(node) => Change::Node(node),
            Self::ServiceCidr(cidr) => Change::ServiceCidr(cidr.name, cidr.nets),
        }
    }
}

/// Bytes of a file, and of a YAML document: that is held several times while it is read.
const FILE_BYTES: u64 = 32 << 20;
const YAML_BYTES: usize = 4 << 20;

/// Brackets within brackets in a YAML document: the parser looks at all that are open for every word.
const NESTING: usize = 200;

/// Documents in a file.
const DOCUMENTS: usize = 100_000;

/// Lines in the log about one file.
const SAID: usize = 10;

/// What a file says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Parsed {
    pub(super) objects: BTreeMap<Key, Object>,
    pub(super) problems: Problems,
}

impl Parsed {
    fn insert(&mut self, object: Object) {
        let key = object.key();
        if self.objects.insert(key.clone(), object).is_some() {
            self.problems.push(format!("{key} is defined twice; the last counts"));
        }
    }
}

/// What could not be read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Problems {
    pub(super) count: usize,
    first: Vec<String>,
}

impl Problems {
    pub(super) fn push(&mut self, problem: String) {
        self.count += 1;
        if self.first.len() < SAID {
            self.first.push(problem);
        }
    }

    /// Says it in the log.
    pub(super) fn log(&self, path: &Path) {
        for problem in &self.first {
            tracing::warn!(file = %path.display(), "{problem}; what it said before stays");
        }
        if self.count > self.first.len() {
            let more = self.count - self.first.len();
            tracing::warn!(file = %path.display(), "{more} more problems; what it said before stays");
        }
    }
}

/// Reads a file. It was a regular one a moment ago.
pub(super) fn file(path: &Path) -> Parsed {
    match read(path) {
        Err(error) => failed(&error),
        Ok(text) => parse(path, &text),
    }
}

/// What a file of this name says.
fn parse(path: &Path, text: &str) -> Parsed {
    if path.extension().is_some_and(|extension| extension == "json") {
        documents(unread(text).map(|document| document.map(Document::Text)))
    } else {
        documents(yaml(text).map(|document| document.map(Document::Value)))
    }
}

/// What to think of a file that cannot be read.
pub(super) fn failed(error: &io::Error) -> Parsed {
    let mut parsed = Parsed::default();
    parsed.problems.push(error.to_string());
    parsed
}

fn read(path: &Path) -> io::Result<String> {
    // A pipe that is there now shall not make us wait for a writer.
    text(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
}

/// All of a file, which may grow while it is read.
pub(super) fn text(file: impl io::Read) -> io::Result<String> {
    let mut text = String::new();
    file.take(FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES {
        let error = format!("larger than {} MiB; divide it into several files", FILE_BYTES >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, error));
    }
    Ok(text)
}

/// The documents of a JSON file, one after the other.
pub(super) fn json(text: &str) -> impl Iterator<Item = Result<Value, String>> {
    let mut document = serde_json::Deserializer::from_str(text);
    let mut over = false;
    iter::from_fn(move || {
        if over || document.end().is_ok() {
            return None;
        }
        let value = Budget::default().read(&mut document).map_err(|error| error.to_string());
        // Nobody knows where the next one begins.
        over = value.is_err();
        Some(value)
    })
}

/// The same, told apart and no more.
fn unread(text: &str) -> impl Iterator<Item = Result<&str, String>> {
    let documents = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    documents.map(|document| document.map(RawValue::get).map_err(|error| error.to_string()))
}

/// The documents of a YAML file. They are told apart before they are parsed, so that one that is broken does
/// not take those after it along: `---` at the start of a line is nothing else in YAML.
pub(super) fn yaml(text: &str) -> impl Iterator<Item = Result<Value, String>> {
    let mut rest = text;
    let mut next_line = 1;
    let texts = iter::from_fn(move || {
        let mut lines = rest.split_inclusive('\n');
        // A separator here belongs to this document.
        let mut length = lines.next()?.len();
        let mut count = 1;
        for line in lines.take_while(|line| !is_separator(line)) {
            length += line.len();
            count += 1;
        }
        let (document, after) = rest.split_at(length);
        let line = next_line;
        (rest, next_line) = (after, line + count);
        Some((line, document))
    });
    let texts = texts.filter(|(_, text)| !text.trim_start_matches("---").trim().is_empty());
    texts.map(|(line, text)| yaml_document(text).map_err(|error| format!("document at line {line}: {error}")))
}

fn yaml_document(text: &str) -> Result<Value, String> {
    if text.len() > YAML_BYTES {
        return Err(format!("larger than {} MiB; divide it into several documents", YAML_BYTES >> 20));
    }
    if nesting(text) > NESTING {
        return Err(format!("more than {NESTING} brackets are open"));
    }
    let value = serde_yaml_ng::Deserializer::from_str(text).next();
    let value = value.map(|document| Budget::default().read(document));
    value.unwrap_or(Ok(Value::Null)).map_err(|error| error.to_string())
}

/// How many brackets are open at most, those in texts included.
fn nesting(text: &str) -> usize {
    let (mut open, mut most) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

fn is_separator(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// A document of a file, or an item of a list.
enum Document<'a> {
    /// JSON that nobody has looked at.
    Text(&'a str),
    Value(Value),
}

impl Document<'_> {
    fn read<O: DeserializeOwned>(self) -> Result<O, String> {
        match self {
            Self::Text(text) => serde_json::from_str(text),
            Self::Value(value) => serde_json::from_value(value),
        }
        .map_err(|error| error.to_string())
    }
}

fn documents<'a>(documents: impl Iterator<Item = Result<Document<'a>, String>>) -> Parsed {
    let mut parsed = Parsed::default();
    for (number, document) in documents.enumerate() {
        match document {
            _ if number == DOCUMENTS => {
                parsed
                    .problems
                    .push(format!("more than {DOCUMENTS} documents; divide it into several files"));
                break;
            }
            Ok(Document::Value(value)) => object(value, &mut parsed),
            Ok(Document::Text(text)) if straight(text, &mut parsed) => {}
            Ok(Document::Text(text)) => with_values(text, &mut parsed),
            Err(problem) => parsed.problems.push(problem),
        }
    }
    parsed
}

#[derive(Deserialize)]
struct Head {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    kind: String,
    #[serde(default)]
    metadata: Meta,
}

#[derive(Deserialize, Default)]
struct Meta {
    #[serde(default)]
    name: String,
}

/// Reads JSON as what it says it is, without all of its values in between: they take several times as long, and as much
/// memory. `false`: it is not as it should be, or too large; nothing of it has been taken.
fn straight(text: &str, parsed: &mut Parsed) -> bool {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        items: Vec<&'a RawValue>,
    }
    if !Budget::default().allows(text) {
        return false;
    }
    let Ok(head) = serde_json::from_str::<Head>(text) else { return false };
    if head.kind != "List" {
        return straight_object(&head, text, parsed);
    }
    let Ok(List { items }) = serde_json::from_str(text) else { return false };
    for item in items.into_iter().map(RawValue::get) {
        let head = serde_json::from_str(item);
        if !head.is_ok_and(|head| straight_object(&head, item, parsed)) {
            with_values(item, parsed);
        }
    }
    true
}

fn straight_object(head: &Head, text: &str, parsed: &mut Parsed) -> bool {
    match convert(head, Document::Text(text)) {
        Some(Ok(object)) => parsed.insert(object),
        Some(Err(_)) => return false,
        None => {}
    }
    true
}

/// Reads JSON that is not as it should be, and says why.
fn with_values(text: &str, parsed: &mut Parsed) {
    for document in json(text) {
        match document {
            Ok(value) => object(value, parsed),
            Err(problem) => parsed.problems.push(problem),
        }
    }
}

fn object(document: Value, parsed: &mut Parsed) {
    if document.is_null() {
        return;
    }
    let head = match Head::deserialize(&document) {
        Ok(head) => head,
        Err(error) => {
            parsed.problems.push(format!("not a Kubernetes object: {error}"));
            return;
        }
    };
    if head.kind.ends_with("List") {
        match items(document) {
            Ok(items) => items.into_iter().for_each(|item| object(item, parsed)),
            Err(problem) => parsed.problems.push(problem),
        }
        return;
    }
    match convert(&head, Document::Value(document)) {
        Some(Ok(object)) => parsed.insert(object),
        Some(Err(error)) => {
            parsed.problems.push(format!("{} {:?}: {error}", head.kind, head.metadata.name));
        }
        None => {}
    }
}

/// The object of a document; `None`: it is none of ours.
fn convert(head: &Head, document: Document<'_>) -> Option<Result<Object, String>> {
    let converted = match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", "Service") => {
            document.read().map(|object| Object::Service(Arc::new(convert::service(object))))
        }
        ("v1", "Pod") => document.read().map(|object| Object::Pod(Arc::new(convert::pod(object)))),
        ("v1", "Node") => document.read().map(|object| Object::Node(Box::new(convert::node(object)))),
        ("networking.k8s.io/v1", "ServiceCIDR") => {
            document.read().map(|object| Object::ServiceCidr(convert::service_cidr(object)))
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            document.read().map(|object| Object::Slice(Arc::new(convert::slice(object))))
        }
        (version, "Service" | "Pod" | "Node" | "EndpointSlice") => Err(format!(
            "apiVersion {version:?} is not known; use v1, or discovery.k8s.io/v1 for EndpointSlices"
        )),
        (_, kind) if kind.ends_with("List") => Err("lists are no objects".to_owned()),
        (_, kind) => {
            tracing::debug!(kind, name = head.metadata.name, "passed over");
            return None;
        }
    };
    let is_named = !head.metadata.name.is_empty();
    Some(
        converted.and_then(
            |object| if is_named { Ok(object) } else { Err("metadata.name is missing".to_owned()) },
        ),
    )
}

/// A `List`, or a `ServiceList` and the like, whose items need not say what they are.
pub(super) fn items(mut list: Value) -> Result<Vec<Value>, String> {
    let [api_version, kind] =
        ["apiVersion", "kind"].map(|field| list[field].as_str().unwrap_or_default().to_owned());
    let Some(Value::Array(mut items)) = list.get_mut("items").map(Value::take) else {
        return Err(format!("{kind}: no items"));
    };
    let kind = kind.trim_end_matches("List");
    for item in &mut items {
        if let (Value::Object(item), false) = (item, kind.is_empty()) {
            item.entry("kind").or_insert_with(|| kind.into());
            item.entry("apiVersion").or_insert_with(|| api_version.clone().into());
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(name: &str, text: &str) -> (Vec<String>, Vec<String>) {
        let parsed = parse(Path::new(name), text);
        (parsed.objects.keys().map(ToString::to_string).collect(), parsed.problems.first)
    }

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: NAME}\nspec: {clusterIP: 10.0.0.1}\n";

    fn service(name: &str) -> String {
        SERVICE.replace("NAME", name)
    }

    #[test]
    fn documents_lists_and_other_kinds() {
        let text = format!(
            "# a comment only\n---\n{}---\n{}--- # the third\n{}",
            service("a"),
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n",
            "apiVersion: v1\nkind: List\nitems:\n\
             - {apiVersion: v1, kind: Node, metadata: {name: n}}\n\
             - {apiVersion: v1, kind: Pod, metadata: {name: p}}\n\
             - {apiVersion: v1, kind: ServiceList, items: [{metadata: {name: b, namespace: x}}]}\n\
             - {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {name: s}}\n",
        );
        let expected =
            ["Service default/a", "Service x/b", "EndpointSlice default/s", "Pod default/p", "Node n"];
        assert_eq!(keys("f.yaml", &text), (expected.map(Into::into).to_vec(), vec![]));
        assert_eq!(keys("f.yaml", ""), (vec![], vec![]));
        assert_eq!(keys("f.yaml", "---\n---\n\n---"), (vec![], vec![]));
    }

    #[test]
    fn json_documents() {
        let one = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}"#;
        let (found, problems) = keys("f.json", &format!("{one}\n{}", one.replace("\"a\"", "\"b\"")));
        assert_eq!((found.len(), problems.len()), (2, 0));
        let (found, problems) = keys("f.json", &format!("{one} {{"));
        assert_eq!(found.len(), 1);
        assert_eq!(problems, ["EOF while parsing an object at line 1 column 68"]);
    }

    /// Of JSON most is read straight, and whatever is not as it should be the long way: the outcome is one.
    #[test]
    fn json_says_the_same_as_yaml_does() {
        let service = |name: &str, more: &str| {
            format!(r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "{name}"}}{more}}}"#)
        };
        let list = |kind: &str, items: &[String]| {
            format!(r#"{{"items": [{}], "apiVersion": "v1", "kind": "{kind}"}}"#, items.join(", "))
        };
        let bad = service("bad", r#", "spec": {"ports": [{"port": "http"}]}"#);
        let texts = [
            (list("List", &[service("a", ""), service("b", "")]), 2, 0),
            (list("List", &[service("a", ""), bad.clone(), service("b", "")]), 2, 1),
            (list("List", &[service("a", ""), list("List", &[service("b", ""), bad.clone()])]), 2, 1),
            (
                list("List", &[r#"{"kind": "Deployment"}"#.to_owned(), "null".to_owned(), "7".to_owned()]),
                0,
                1,
            ),
            (list("ServiceList", &[r#"{"metadata": {"name": "a"}}"#.to_owned()]), 1, 0),
            (list("List", &[service("a", ""), service("a", "")]), 1, 1),
            (r#"{"apiVersion": "v1", "kind": "List", "items": {}}"#.to_owned(), 0, 1),
            (r#"{"apiVersion": "v1", "kind": "List"}"#.to_owned(), 0, 1),
            (r#"{"apiVersion": "v2", "kind": "Service", "metadata": {"name": "a"}}"#.to_owned(), 0, 1),
            (service("", ""), 0, 1),
            (bad, 0, 1),
            (r#"["v1", "Service", {"name": "a"}]"#.to_owned(), 0, 1),
        ];
        for (text, objects, problems) in texts {
            let (straight, long) = (parse(Path::new("f.json"), &text), parse(Path::new("f.yaml"), &text));
            assert_eq!((straight.objects.len(), straight.problems.count), (objects, problems), "{text}");
            let without_line = |problem: &String| problem.replace("document at line 1: ", "");
            let long_problems: Vec<_> = long.problems.first.iter().map(without_line).collect();
            assert_eq!((straight.objects, straight.problems.first), (long.objects, long_problems), "{text}");
        }
    }

    #[test]
    fn what_is_as_it_should_be_is_read_straight() {
        let service = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}"#;
        let list = format!(r#"{{"apiVersion": "v1", "items": [{service}], "kind": "List"}}"#);
        for text in [service, &list] {
            let mut parsed = Parsed::default();
            assert!(straight(text, &mut parsed) && parsed.objects.len() == 1, "{text}");
        }
        let few_bytes = service.replace("}}", &format!("}}, \"spec\": [{}0]}}", "0,".repeat(2_000_000)));
        let mut parsed = Parsed::default();
        assert!(!straight(&few_bytes, &mut parsed) && parsed == Parsed::default());
        assert!(
            parse(Path::new("f.json"), &few_bytes).problems.first[0].starts_with("more than 2000000 values")
        );
    }

    #[test]
    fn a_broken_document_does_not_take_the_others_along() {
        let text = format!("{}---\nkind: [\n---\n{}", service("a"), service("b"));
        let (found, problems) = keys("f.yaml", &text);
        assert_eq!(found, ["Service default/a", "Service default/b"]);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("document at line 5: "), "{problems:?}");
    }

    #[test]
    fn what_is_no_object_is_named() {
        let problem = |text: &str| {
            let (found, problems) = keys("f.yaml", text);
            assert_eq!((found.len(), problems.len()), (0, 1), "{text}: {problems:?}");
            problems.into_iter().next().unwrap()
        };
        assert!(problem("just text").starts_with("not a Kubernetes object: "));
        assert!(problem("metadata: {name: a}").contains("missing field `kind`"));
        assert_eq!(problem("apiVersion: v1\nkind: Service"), "Service \"\": metadata.name is missing");
        assert!(problem("apiVersion: v2\nkind: Service\nmetadata: {name: a}").contains("apiVersion \"v2\""));
        assert!(problem("apiVersion: v1\nkind: List").contains("no items"));
        let wrong = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: http}]}";
        assert!(problem(wrong).starts_with("Service \"a\": "));
    }

    #[test]
    fn an_object_defined_twice_is_named() {
        let (found, problems) = keys("f.yaml", &format!("{}---\n{}", service("a"), service("a")));
        assert_eq!(found.len(), 1);
        assert_eq!(problems, ["Service default/a is defined twice; the last counts"]);
    }

    #[test]
    fn three_dashes_inside_a_line_are_no_separator() {
        let text = format!("{}  # --- \n", service("a").replace("10.0.0.1", "\"---\""));
        assert_eq!(keys("f.yaml", &text).0.len(), 1);
        assert!(is_separator("---") && is_separator("--- a\n") && is_separator("---\r\n"));
        assert!(!is_separator("----") && !is_separator(" ---") && !is_separator("---a"));
    }
}
