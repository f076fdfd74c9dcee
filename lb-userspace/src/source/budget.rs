//! Values of bounded size, whatever the text says: aliases in YAML may multiply, and few bytes are many values, in JSON too.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Values in one document: 10,000 Services with ten endpoints each are half of it. In memory at most 200 MB.
const VALUES: usize = 2_000_000;

/// Bytes of text in all values of one document.
const BYTES: usize = 64 << 20;

/// Values and bytes of text in an object of the API server, which has at most 1.5 MiB of JSON (`--max-request-bytes` of etcd).
const OBJECT: Budget = Budget { values: 1_000_000, bytes: 4 << 20, lavish: false, goes_on: true };

/// What a document or an object may still have.
#[derive(Debug)]
pub(super) struct Budget {
    values: usize,
    bytes: usize,
    /// It has had more.
    lavish: bool,
    /// What is too much is passed over to the end, instead of being an error at once: something else follows.
    goes_on: bool,
}

impl Default for Budget {
    fn default() -> Self {
        Self { values: VALUES, bytes: BYTES, lavish: false, goes_on: false }
    }
}

impl Budget {
    /// Reads one document.
    pub(super) fn read<'de, D: Deserializer<'de>>(mut self, document: D) -> Result<Value, D::Error> {
        Bounded(&mut self).deserialize(document)
    }

    /// Whether everything in a text of JSON has room, at the first glance: in front of every value and name but the first
    /// stands one of these. They may stand in strings, too.
    pub(super) fn allows(&self, text: &str) -> bool {
        let values = text.bytes().filter(|byte| matches!(byte, b',' | b':' | b'[' | b'{')).count();
        values < self.values && text.len() <= self.bytes
    }

    /// Whether [`Self::read_object`] has room for everything in a text of JSON, at the first glance.
    pub(super) fn allows_object(text: &str) -> bool {
        OBJECT.allows(text)
    }

    /// Reads one of many objects, as far as there is room for it; `false`: there was not for all of it.
    pub(super) fn read_object<'de, D: Deserializer<'de>>(object: D) -> Result<(Value, bool), D::Error> {
        let mut budget = OBJECT;
        let value = Bounded(&mut budget).deserialize(object)?;
        Ok((value, !budget.lavish))
    }

    /// `false`: there is no room.
    fn take<E: Error>(&mut self, bytes: usize) -> Result<bool, E> {
        match (self.values.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(values), Some(bytes)) if !self.lavish => (self.values, self.bytes) = (values, bytes),
            _ if self.goes_on => self.lavish = true,
            _ => {
                return Err(E::custom(format_args!(
                    "more than {VALUES} values, or {BYTES} bytes of text, in one document"
                )));
            }
        }
        Ok(!self.lavish)
    }
}

struct Bounded<'a>(&'a mut Budget);

impl Bounded<'_> {
    fn value<E: Error>(&mut self, value: impl Into<Value>) -> Result<Value, E> {
        Ok(if self.0.take(0)? { value.into() } else { Value::Null })
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has")
    }

    fn visit_bool<E: Error>(mut self, value: bool) -> Result<Value, E> {
        self.value(value)
    }

    fn visit_i64<E: Error>(mut self, value: i64) -> Result<Value, E> {
        self.value(value)
    }

    fn visit_u64<E: Error>(mut self, value: u64) -> Result<Value, E> {
        self.value(value)
    }

    fn visit_f64<E: Error>(mut self, value: f64) -> Result<Value, E> {
        self.value(value)
    }

    fn visit_unit<E: Error>(mut self) -> Result<Value, E> {
        self.value(Value::Null)
    }

    fn visit_none<E: Error>(mut self) -> Result<Value, E> {
        self.value(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(if self.0.take(text.len())? { text.into() } else { Value::Null })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.0.take(0)?;
        let mut all = vec![];
        while !self.0.lavish {
            let Some(item) = items.next_element_seed(Bounded(self.0))? else { return Ok(Value::Array(all)) };
            all.push(item);
        }
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        self.0.take(0)?;
        let mut all = Map::new();
        while !self.0.lavish {
            let Some(name) = fields.next_key::<String>()? else { return Ok(Value::Object(all)) };
            self.0.take(name.len())?;
            let value = fields.next_value_seed(Bounded(self.0))?;
            all.insert(name, value);
        }
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, budget: Budget) -> Result<Value, String> {
        let document = serde_yaml_ng::Deserializer::from_str(text);
        budget.read(document).map_err(|error| error.to_string())
    }

    #[test]
    fn what_fits_is_read_as_it_is() {
        let text = "{a: [1, -1, 1.5, x, true, null], b: {c: \"y\"}}";
        let value = read(text, Budget::default()).unwrap();
        assert_eq!(value, serde_json::json!({"a": [1, -1, 1.5, "x", true, null], "b": {"c": "y"}}));
    }

    #[test]
    fn every_value_and_byte_counts() {
        // Two lists, an object, its name, and seven values beside.
        let text = "[[1, -1, 1.5, x, true, null], {abc: xyz}]";
        for (values, bytes, fits) in [(11, 7, true), (10, 7, false), (11, 6, false)] {
            assert_eq!(
                read(text, Budget { values, bytes, ..Budget::default() }).is_ok(),
                fits,
                "{values}, {bytes}"
            );
        }
    }

    #[test]
    fn what_is_allowed_at_a_glance_can_be_read() {
        for text in ["1", "[]", "[1, 2]", "{\"a\": 1}", "{\"a\": {}, \"b\": [1, {\"c\": 2}]}", "\"a,b\""] {
            for values in 0..10 {
                let budget = || Budget { values, bytes: text.len(), ..Budget::default() };
                assert!(!budget().allows(text) || read(text, budget()).is_ok(), "{text}, {values}");
            }
            let budget = |bytes| Budget { values: 20, bytes, ..Budget::default() };
            assert!(budget(text.len()).allows(text) && !budget(text.len() - 1).allows(text), "{text}");
        }
    }

    #[test]
    fn an_object_that_is_too_large_is_passed_over_and_the_next_is_read() {
        struct Objects(Vec<(Value, bool)>);
        impl<'de> serde::Deserialize<'de> for Objects {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Each;
                impl<'de> Visitor<'de> for Each {
                    type Value = Objects;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("objects")
                    }
                    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Objects, A::Error> {
                        struct One;
                        impl<'de> DeserializeSeed<'de> for One {
                            type Value = (Value, bool);
                            fn deserialize<D: Deserializer<'de>>(
                                self,
                                one: D,
                            ) -> Result<Self::Value, D::Error> {
                                Budget::read_object(one)
                            }
                        }
                        let mut all = vec![];
                        while let Some(one) = items.next_element_seed(One)? {
                            all.push(one);
                        }
                        Ok(Objects(all))
                    }
                }
                deserializer.deserialize_seq(Each)
            }
        }
        let many = "0,".repeat(2_000_000);
        let long = "x".repeat(5 << 20);
        let text = format!(
            "[{{\"a\": 1, \"b\": [{{\"c\": [{many}0]}}, [{many}0]], \"d\": 2}}, {{\"t\": \"{long}\"}}, {{\"e\": 3}}]"
        );
        let Objects(all) = serde_json::from_str(&text).unwrap();
        assert_eq!(all.iter().map(|(_, whole)| *whole).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!((&all[0].0["a"], &all[2].0["e"]), (&1.into(), &3.into()));
        assert_eq!(all[0].0.get("d"), None);
    }
}
