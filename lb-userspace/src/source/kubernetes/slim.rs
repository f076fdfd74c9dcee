//! What is left of a Kubernetes object once it has been read.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Deserializer};

use super::Watched;
use crate::source::budget::Budget;

/// Said of an object beyond its [`Budget`].
const TOO_LARGE: &str = "it is larger than any object of the API can be";

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
    /// Of an object in JSON. What is as the API says is read straight; the values of the rest are looked at one by one.
    pub(super) fn read(text: &str) -> serde_json::Result<Self> {
        if Budget::allows_object(text)
            && let Ok(object) = serde_json::from_str::<W::Object>(text)
        {
            let resource_version = object.meta().resource_version.clone();
            let metadata = ObjectMeta { resource_version, ..ObjectMeta::default() };
            return Ok(Self { metadata, content: Ok(W::convert(object)) });
        }
        serde_json::from_str(text)
    }

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
        let (value, whole) = Budget::read_object(deserializer)?;
        let text = |field: &str| value["metadata"][field].as_str().map(str::to_owned);
        let resource_version = text("resourceVersion");
        let object = if whole {
            W::Object::deserialize(&value).map_err(|error| error.to_string())
        } else {
            Err(TOO_LARGE.to_owned())
        };
        let content = match object {
            Ok(object) => Ok(W::convert(object)),
            Err(error) => {
                let mut empty = W::Object::default();
                *empty.meta_mut() =
                    ObjectMeta { name: text("name"), namespace: text("namespace"), ..ObjectMeta::default() };
                Err(Unreadable { nameplate: W::convert(empty), error })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Service;

    #[test]
    fn both_ways_of_reading_end_alike() {
        let many = "0,".repeat(1_500_000);
        let texts = [
            (
                r#"{"metadata": {"name": "a", "resourceVersion": "7"}, "spec": {"clusterIP": "10.0.0.1"}}"#
                    .into(),
                true,
            ),
            (
                r#"{"metadata": {"name": "a", "resourceVersion": "7"}, "spec": {"ports": [{"port": "x"}]}}"#
                    .into(),
                false,
            ),
            (r#"{"metadata": {"name": "a", "resourceVersion": 7}}"#.into(), false),
            (format!(r#"{{"metadata": {{"name": "a"}}, "spec": {{"x": [{many}0]}}}}"#), false),
            ("7".to_owned(), false),
        ];
        for (text, whole) in texts {
            let straight = Slim::<Service>::read(&text).unwrap();
            let long: Slim<Service> = serde_json::from_str(&text).unwrap();
            assert_eq!(straight.content.is_ok(), whole, "{text:.100}");
            assert_eq!(straight.version(), long.version(), "{text:.100}");
            let said = |slim: Slim<Service>| match slim.content {
                Ok(object) => (object, None),
                Err(unreadable) => (unreadable.nameplate, Some(unreadable.error)),
            };
            assert_eq!(said(straight), said(long), "{text:.100}");
        }
        assert!(Slim::<Service>::read("{").is_err());
    }
}
