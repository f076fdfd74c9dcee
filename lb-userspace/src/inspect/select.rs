//! What of the maps is asked for: names, addresses and ports, as they stand on the command line.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::owner;

/// A filter that says nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SelectError {
    #[error("{0:?} is not ADDRESS[/PREFIX][:PORT], as 10.0.0.0/8, 10.96.0.1:443, [fd00::1]:53 or :443")]
    Endpoint(String),
    #[error("{0:?} is not [NAMESPACE/]NAME: lower-case letters, digits, - and .")]
    Name(String),
    #[error("{name} is in namespace {in_name}, and --namespace says {namespace}; leave one of them out")]
    TwoNamespaces { name: String, in_name: String, namespace: String },
}

/// `ADDRESS[/PREFIX][:PORT]`; a part that is missing is any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EndpointFilter {
    net: Option<IpNet>,
    port: Option<u16>,
}

impl EndpointFilter {
    pub fn matches(&self, addr: IpAddr, port: u16) -> bool {
        self.net.is_none_or(|net| net.contains(&addr)) && self.matches_port(port)
    }

    /// Of what has this port at every address.
    pub fn matches_port(&self, port: u16) -> bool {
        self.port.is_none_or(|wanted| wanted == port)
    }
}

impl FromStr for EndpointFilter {
    type Err = SelectError;

    fn from_str(text: &str) -> Result<Self, SelectError> {
        parse_endpoint(text).ok_or_else(|| SelectError::Endpoint(text.into()))
    }
}

fn parse_endpoint(text: &str) -> Option<EndpointFilter> {
    let (net, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (inside, rest) = rest.split_once(']')?;
            let (prefix, port) =
                rest.split_once(':').map_or((rest, None), |(prefix, port)| (prefix, Some(port)));
            (format!("{inside}{prefix}"), port)
        }
        // More than one colon: an IPv6 address, which has no port without brackets.
        None if text.matches(':').count() > 1 => (text.to_owned(), None),
        None => {
            let (net, port) = text.split_once(':').map_or((text, None), |(net, port)| (net, Some(port)));
            (net.to_owned(), port)
        }
    };
    let port = port.map(u16::from_str).transpose().ok()?;
    let net = match net.as_str() {
        "" => None,
        net if net.contains('/') => Some(net.parse().ok()?),
        addr => Some(IpNet::from(addr.parse::<IpAddr>().ok()?)),
    };
    (net.is_some() || port.is_some()).then_some(EndpointFilter { net, port })
}

/// `[NAMESPACE/]NAME` of a Service, or of a Pod with host ports; a part that is missing is any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NameFilter {
    namespace: Option<String>,
    /// As the maps have it.
    name: Option<String>,
}

impl NameFilter {
    /// A name and, or, `--namespace`; neither: everything.
    pub fn new(name: Option<Self>, namespace: Option<&str>) -> Result<Self, SelectError> {
        let mut filter = name.unwrap_or_default();
        match (&filter.namespace, namespace) {
            (Some(in_name), Some(namespace)) if in_name != namespace => Err(SelectError::TwoNamespaces {
                name: filter.name.unwrap_or_default(),
                in_name: in_name.clone(),
                namespace: namespace.into(),
            }),
            (None, Some(namespace)) => {
                filter.namespace = Some(part(namespace)?);
                Ok(filter)
            }
            _ => Ok(filter),
        }
    }

    pub fn is_any(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it is these, as the maps have them.
    pub fn matches(&self, namespace: &str, name: &str) -> bool {
        let is = |wanted: &Option<String>, it: &str| wanted.as_deref().is_none_or(|wanted| wanted == it);
        is(&self.namespace, namespace) && is(&self.name, name)
    }
}

impl std::fmt::Display for NameFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.namespace, &self.name) {
            (Some(namespace), Some(name)) => write!(f, "{namespace}/{name}"),
            (Some(namespace), None) => write!(f, "namespace {namespace}"),
            (None, Some(name)) => f.write_str(name),
            (None, None) => f.write_str("everything"),
        }
    }
}

impl FromStr for NameFilter {
    type Err = SelectError;

    fn from_str(text: &str) -> Result<Self, SelectError> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(part(namespace)?), name),
            None => (None, text),
        };
        Ok(Self { namespace, name: Some(owner::shortened(&part(name)?)) })
    }
}

fn part(name: &str) -> Result<String, SelectError> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if name.is_empty() || !name.chars().all(fits) {
        return Err(SelectError::Name(name.into()));
    }
    Ok(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ports() {
        let matches = |filter: &str, at: &str| {
            let at: std::net::SocketAddr = at.parse().unwrap();
            filter.parse::<EndpointFilter>().unwrap().matches(at.ip(), at.port())
        };
        for (filter, yes, no) in [
            ("10.0.0.1", "10.0.0.1:5", "10.0.0.2:5"),
            ("10.0.0.1:80", "10.0.0.1:80", "10.0.0.1:81"),
            ("10.0.0.0/8", "10.9.9.9:1", "11.0.0.0:1"),
            ("10.0.0.7/8:80", "10.9.9.9:80", "10.9.9.9:81"),
            (":443", "[fd00::1]:443", "10.0.0.1:80"),
            ("0.0.0.0/0", "10.0.0.1:1", "[fd00::1]:1"),
            ("fd00::1", "[fd00::1]:9", "[fd00::2]:9"),
            ("fd00::/16", "[fd00:1::2]:9", "[fe00::2]:9"),
            ("[fd00::1]:53", "[fd00::1]:53", "[fd00::1]:54"),
            ("[fd00::/16]:53", "[fd00::7]:53", "[fd00::7]:54"),
            ("[fd00::]/16:53", "[fd00::7]:53", "[fe00::7]:53"),
            ("[::1]", "[::1]:53", "[::2]:53"),
        ] {
            assert!(matches(filter, yes), "{filter} {yes}");
            assert!(!matches(filter, no), "{filter} {no}");
        }
        for wrong in [
            "",
            ":",
            "10.0.0",
            "10.0.0.1:",
            "10.0.0.1:x",
            "10.0.0.0/33",
            "10.0.0.1:65536",
            "[fd00::1",
            "[]",
            "web",
            "fd00::1/129",
            "10.0.0.1/8/8",
        ] {
            let error = wrong.parse::<EndpointFilter>().unwrap_err().to_string();
            assert!(error.contains("is not ADDRESS[/PREFIX][:PORT]") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn names_with_and_without_namespaces() {
        let filter = |name: Option<&str>, namespace| {
            NameFilter::new(name.map(|name| name.parse().unwrap()), namespace).unwrap()
        };
        assert!(filter(None, None).is_any() && filter(None, None).matches("a", "b"));
        assert!(filter(Some("web"), None).matches("shop", "web"));
        assert!(!filter(Some("web"), Some("shop")).matches("other", "web"));
        assert!(filter(Some("shop/web"), Some("shop")).matches("shop", "web"));
        assert!(filter(None, Some("shop")).matches("shop", "anything"));
        let two = NameFilter::new("shop/web".parse().ok(), Some("other"));
        assert!(matches!(two, Err(SelectError::TwoNamespaces { .. })));
        for wrong in ["", "/", "a/", "/a", "a/b/c", "Web", "a b"] {
            assert!(wrong.parse::<NameFilter>().is_err(), "{wrong}");
        }
        // The map has no room for the middle of this one.
        let long = format!("{}-x2v4p", "a".repeat(200));
        assert!(filter(Some(&long), None).matches("shop", &owner::shortened(&long)));
    }
}
