//! Values of bounded size, whatever the text says: aliases in YAML may multiply, and few bytes are many values.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Values in one document: 10,000 Services with ten endpoints each are half of it. In memory at most 200 MB.
const VALUES: usize = 2_000_000;

/// Bytes of text in all values of one document.
const BYTES: usize = 64 << 20;

/// What a document may still have.
#[derive(Debug)]
pub(super) struct Budget {
    values: usize,
    bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { values: VALUES, bytes: BYTES }
    }
}

impl Budget {
    /// Reads one document.
    pub(super) fn read<'de, D: Deserializer<'de>>(mut self, document: D) -> Result<Value, D::Error> {
        Bounded(&mut self).deserialize(document)
    }

    fn take<E: Error>(&mut self, bytes: usize) -> Result<(), E> {
        match (self.values.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(values), Some(bytes)) => {
                *self = Self { values, bytes };
                Ok(())
            }
            _ => Err(E::custom(format_args!(
                "more than {VALUES} values, or {BYTES} bytes of text, in one document"
            ))),
        }
    }
}

struct Bounded<'a>(&'a mut Budget);

impl Bounded<'_> {
    fn value<E: Error>(&mut self, value: impl Into<Value>) -> Result<Value, E> {
        self.0.take(0)?;
        Ok(value.into())
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
        self.0.take(text.len())?;
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.0.take(0)?;
        let mut all = vec![];
        while let Some(item) = items.next_element_seed(Bounded(self.0))? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        self.0.take(0)?;
        let mut all = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            self.0.take(name.len())?;
            let value = fields.next_value_seed(Bounded(self.0))?;
            all.insert(name, value);
        }
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
            assert_eq!(read(text, Budget { values, bytes }).is_ok(), fits, "{values}, {bytes}");
        }
    }
}
