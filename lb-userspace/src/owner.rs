//! Whose frontends: a Service's, or those of the host ports of a Pod.

use std::fmt;
use std::sync::Arc;

use lb_common::abi::{NAME_LEN, OwnerName, owner_kind};
use serde::{Deserialize, Serialize};

use crate::entries::ServiceName;

/// Whom a frontend belongs to. A Service comes before a Pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Owner {
    Service(ServiceName),
    Pod(PodName),
}

impl Owner {
    /// The Service, if it is one.
    pub const fn service(&self) -> Option<&ServiceName> {
        match self {
            Self::Service(name) => Some(name),
            Self::Pod(_) => None,
        }
    }

    /// The Pod, if it is one.
    pub const fn pod(&self) -> Option<&PodName> {
        match self {
            Self::Service(_) => None,
            Self::Pod(name) => Some(name),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Pod(name) => write!(f, "Pod {name}"),
        }
    }
}

impl From<&Owner> for OwnerName {
    fn from(owner: &Owner) -> Self {
        let (kind, namespace, name) = match owner {
            Owner::Service(name) => (owner_kind::SERVICE, &name.namespace, &name.name),
            Owner::Pod(name) => (owner_kind::POD, &name.namespace, &name.name),
        };
        Self { kind, namespace: field(namespace), name: field(name) }
    }
}

/// Stands for the middle of a name that is too long.
const GAP: &str = "..";
/// Bytes of its end that stay: the generated parts of a Pod's name.
const END: usize = 24;

/// NUL-padded, with a NUL at the end.
fn field(text: &str) -> [i8; NAME_LEN] {
    const ROOM: usize = NAME_LEN - 1;

    let mut field = [0; NAME_LEN];
    let mut fill = |parts: &[&str]| {
        let bytes = parts.iter().flat_map(|part| part.bytes());
        for (to, from) in field.iter_mut().zip(bytes) {
            *to = from.cast_signed();
        }
    };
    if text.len() <= ROOM {
        fill(&[text]);
    } else {
        let head = &text[..text.floor_char_boundary(ROOM - END - GAP.len())];
        fill(&[head, GAP, &text[text.ceil_char_boundary(text.len() - END)..]]);
    }
    field
}

/// A name as [`OwnerName`] has it.
pub fn shortened(name: &str) -> String {
    text(&field(name))
}

/// The text in a field of [`OwnerName`].
pub fn text(field: &[i8; NAME_LEN]) -> String {
    let bytes = field.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

impl From<ServiceName> for Owner {
    fn from(name: ServiceName) -> Self {
        Self::Service(name)
    }
}

impl From<PodName> for Owner {
    fn from(name: PodName) -> Self {
        Self::Pod(name)
    }
}

/// Name of a Pod. Many places keep it; they share it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> OwnerName {
        OwnerName::from(&Owner::from(PodName { namespace: "ns".into(), name: name.into() }))
    }

    #[test]
    fn a_name_in_the_map_reads_as_it_was() {
        let service = ServiceName { namespace: "ns".into(), name: "x".repeat(63).into() };
        let name = OwnerName::from(&Owner::from(service));
        assert_eq!(name.kind, owner_kind::SERVICE);
        assert_eq!((text(&name.namespace), text(&name.name)), ("ns".into(), "x".repeat(63)));
        assert_eq!((&name.namespace[2..], name.name[63]), (&[0; 62][..], 0));
        assert_eq!((pod("p").kind, text(&pod("p").name)), (owner_kind::POD, "p".into()));
        assert_eq!(text(&pod("").name), "");
    }

    #[test]
    fn long_names_keep_what_tells_them_apart() {
        let name = |end: &str| text(&pod(&format!("{}-7d9c5b8f6d-{end}", "a".repeat(200))).name);
        assert_eq!(name("x2v4p"), format!("{}..aaaaaaa-7d9c5b8f6d-x2v4p", "a".repeat(37)));
        assert_ne!(name("x2v4p"), name("x2v4q"));
        assert_eq!(name("x2v4p").len(), 63);
        // No character is cut in two, whatever a manifest says.
        for n in 20..40 {
            let odd = format!("{}{}", "a".repeat(n), "ö".repeat(40));
            assert!(text(&pod(&odd).name).chars().all(|c| "aö.".contains(c)), "{odd}");
        }
    }
}
