//! What is left of a Kubernetes object once it has been read.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::Watched;

/// The model's object, and the resource version that a watch goes on from.
#[derive(Clone, Debug)]
pub(super) struct Slim<W> {
    metadata: ObjectMeta,
    pub(super) content: Result<W, Unreadable<W>>,
}

/// An object that is not what the API says it is. Only its name is known.
#[derive(Clone, Debug)]
pub(super) struct Unreadable<W> {
    /// Empty but for its name.
    pub(super) nameplate: W,
    pub(super) error: String,
}

impl<W: Watched> Slim<W> {
    /// Empty: the object does not say.
    pub(super) fn version(&self) -> &str {
        self.metadata.resource_version.as_deref().unwrap_or_default()
    }

    pub(super) fn name(&self) -> W::Name {
        match &self.content {
            Ok(object) => object.name(),
            Err(unreadable) => unreadable.nameplate.name(),
        }
    }
}

/// Never fails for an object: one that is broken shall not take the list along that it comes in.
impl<'de, W: Watched> Deserialize<'de> for Slim<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let text = |field: &str| value["metadata"][field].as_str().map(str::to_owned);
        let resource_version = text("resourceVersion");
        let content = match W::Object::deserialize(&value) {
            Ok(object) => Ok(W::convert(object)),
            Err(error) => {
                let mut empty = W::Object::default();
                *empty.meta_mut() =
                    ObjectMeta { name: text("name"), namespace: text("namespace"), ..ObjectMeta::default() };
                Err(Unreadable { nameplate: W::convert(empty), error: error.to_string() })
            }
        };
        Ok(Self { metadata: ObjectMeta { resource_version, ..ObjectMeta::default() }, content })
    }
}

impl<W: Watched> Resource for Slim<W> {
    type DynamicType = ();
    type Scope = <W::Object as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        W::Object::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        W::Object::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        W::Object::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        W::Object::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
