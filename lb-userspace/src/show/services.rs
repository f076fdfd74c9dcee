//! `fairlead services` and `fairlead backends`.

use std::net::SocketAddr;

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::To;
use crate::entries::{FrontendKind, Protocol};
use crate::inspect::{
    BackendView, EndpointFilter, Inspector, NameFilter, ScopeView, ServiceView, UsageView, UsedBackendView,
    UserView,
};
use crate::table::Table;

/// Which frontends are asked for; an empty list is any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceFilter {
    pub name: NameFilter,
    pub kinds: Vec<FrontendKind>,
    pub frontend: Vec<EndpointFilter>,
    pub protocols: Vec<Protocol>,
}

impl ServiceFilter {
    fn matches(&self, view: &ServiceView) -> bool {
        let named = self.name.is_any()
            || view
                .namespace
                .as_deref()
                .zip(view.name.as_deref())
                .is_some_and(|(namespace, name)| self.name.matches(namespace, name));
        // At every address of the node means at whichever is asked for.
        let is_at = |filter: &EndpointFilter| match view.address {
            Some(addr) => filter.matches(addr, view.port),
            None => filter.matches_port(view.port),
        };
        named
            && (self.kinds.is_empty() || self.kinds.iter().any(|kind| kind.to_string() == view.kind))
            && (self.protocols.is_empty()
                || self.protocols.iter().any(|protocol| protocol.to_string() == view.protocol))
            && (self.frontend.is_empty() || self.frontend.iter().any(is_at))
    }
}

/// `fairlead services`.
pub fn services(to: &mut To<'_>, filter: &ServiceFilter) -> Result<()> {
    let mut services = Inspector::open(to.bpffs)?.services()?;
    services.retain(|view| filter.matches(view));
    if services.is_empty() && !filter.name.is_any() {
        bail!("no such frontend of {} is programmed here; see `fairlead services`", filter.name);
    }
    if to.json {
        return to.json(&services);
    }
    let table = if to.wide { wide(&services) } else { narrow(&services) };
    Ok(table.print(&mut to.out)?)
}

fn narrow(services: &[ServiceView]) -> Table {
    let mut table = Table::new([
        "NAME",
        "KIND",
        "FRONTEND",
        "PROTOCOL",
        "FROM INSIDE",
        "FROM OUTSIDE",
        "CONNECTIONS",
        "PACKETS",
        "BYTES",
        "REFUSED",
    ]);
    for service in services {
        table.row([
            UserView::from(service).text(),
            service.kind.clone(),
            frontend(service),
            service.protocol.clone(),
            scope(&service.internal),
            outside(service),
            usage(service, |usage| usage.connections),
            usage(service, |usage| usage.packets),
            usage(service, |usage| usage.bytes),
            usage(service, |usage| usage.refused),
        ]);
    }
    table
}

fn wide(services: &[ServiceView]) -> Table {
    let mut table = Table::new([
        "NAME",
        "OWNER",
        "NUMBER",
        "KIND",
        "FRONTEND",
        "PROTOCOL",
        "ALGORITHM",
        "MODE",
        "AFFINITY",
        "SOURCES",
        "INTERNAL POLICY",
        "EXTERNAL POLICY",
        "WINDOW INSIDE",
        "WINDOW OUTSIDE",
        "FROM INSIDE",
        "FROM OUTSIDE",
        "CONNECTIONS",
        "PACKETS",
        "BYTES",
        "REFUSED",
    ]);
    for service in services {
        let affinity = match service.affinity_seconds {
            0 => "-".into(),
            seconds => format!("{seconds} s"),
        };
        table.row([
            UserView::from(service).text(),
            service.owner.unwrap_or("-").into(),
            service.service.to_string(),
            service.kind.clone(),
            frontend(service),
            service.protocol.clone(),
            service.algorithm.into(),
            service.mode.into(),
            affinity,
            sources(service),
            service.internal.policy.into(),
            service.external.policy.into(),
            window(&service.internal),
            window(&service.external),
            scope(&service.internal),
            outside(service),
            usage(service, |usage| usage.connections),
            usage(service, |usage| usage.packets),
            usage(service, |usage| usage.bytes),
            usage(service, |usage| usage.refused),
        ]);
    }
    table
}

fn usage(service: &ServiceView, count: fn(&UsageView) -> u64) -> String {
    service.usage.as_ref().map_or_else(|| "-".into(), |usage| count(usage).to_string())
}

fn outside(service: &ServiceView) -> String {
    if service.internal == service.external { "the same".into() } else { scope(&service.external) }
}

/// First slot, and how many.
fn window(scope: &ScopeView) -> String {
    if scope.slots == 0 { "-".into() } else { format!("{}+{}", scope.window, scope.slots) }
}

/// Who may ask.
fn sources(service: &ServiceView) -> String {
    match service.source_ranges.as_deref() {
        None => "all".into(),
        Some([]) => "nobody".into(),
        Some(nets) => some_of(nets.iter().cloned()),
    }
}

fn frontend(service: &ServiceView) -> String {
    match service.address {
        Some(addr) => SocketAddr::new(addr, service.port).to_string(),
        None => format!("node ({}):{}", service.family, service.port),
    }
}

fn scope(scope: &ScopeView) -> String {
    if scope.backends.is_empty() {
        return format!("none: {}", scope.when_empty);
    }
    some_of(scope.backends.iter().map(|backend| match backend.address {
        Some(addr) => SocketAddr::new(addr, backend.port).to_string(),
        None => format!("missing backend {}", backend.id),
    }))
}

/// The first few; of more the number is given.
fn some_of(items: impl ExactSizeIterator<Item = String>) -> String {
    const NAMED: usize = 4;

    let more = items.len().saturating_sub(NAMED);
    let text = items.take(NAMED).collect::<Vec<_>>().join(" ");
    match more {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// Which backends are asked for; an empty list is any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackendFilter {
    pub name: NameFilter,
    pub address: Vec<EndpointFilter>,
    /// Empty: those in use.
    pub states: Vec<BackendState>,
    /// Also ids that are not in use.
    pub all: bool,
}

/// What a backend takes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendState {
    /// New connections, or it keeps every flow it has
    Active,
    /// Only the connections it has
    Terminating,
    /// Nothing: the id is free
    Unused,
}

impl BackendState {
    const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Terminating => "terminating",
            Self::Unused => "unused",
        }
    }
}

impl BackendFilter {
    fn matches(&self, view: &UsedBackendView) -> bool {
        let backend = &view.backend;
        let is_used = backend.state != "unused";
        let state = if self.states.is_empty() {
            self.all || is_used
        } else {
            self.states.iter().any(|state| state.name() == backend.state)
        };
        let has = |user: &UserView| {
            user.namespace
                .as_deref()
                .zip(user.name.as_deref())
                .is_some_and(|(namespace, name)| self.name.matches(namespace, name))
        };
        state
            && (self.address.is_empty()
                || self.address.iter().any(|filter| filter.matches(backend.address, backend.port)))
            && (self.name.is_any() || view.services.iter().any(has))
    }
}

/// `fairlead backends`.
pub fn backends(to: &mut To<'_>, filter: &BackendFilter) -> Result<()> {
    let inspector = Inspector::open(to.bpffs)?;
    let mut backends = inspector.used_backends()?;
    backends.retain(|backend| filter.matches(backend));
    if backends.is_empty() && !filter.name.is_any() && inspector.labels()?.numbers(&filter.name).is_empty() {
        bail!("no frontend of {} is programmed here; see `fairlead services`", filter.name);
    }
    if to.json {
        return to.json(&backends);
    }
    Ok(table(&backends, to.wide).print(&mut to.out)?)
}

fn table(backends: &[UsedBackendView], is_wide: bool) -> Table {
    let users = |view: &UsedBackendView| {
        if view.services.is_empty() {
            "-".to_owned()
        } else {
            some_of(view.services.iter().map(UserView::text))
        }
    };
    // An entry is of one, and does not say which.
    let protocol = |view: &UsedBackendView| {
        view.services.first().map_or_else(|| "-".to_owned(), |user| user.protocol.clone())
    };
    let place = |backend: &BackendView| if backend.local { "this node" } else { "elsewhere" }.to_owned();
    if !is_wide {
        let mut table = Table::new(["BACKEND", "PROTOCOL", "STATE", "WHERE", "SERVICES"]);
        for view in backends {
            let backend = &view.backend;
            table.row([address(backend), protocol(view), backend.state.into(), place(backend), users(view)]);
        }
        return table;
    }
    let mut table =
        Table::new(["FAMILY", "ID", "BACKEND", "PROTOCOL", "STATE", "WHERE", "GENERATION", "SERVICES"]);
    for view in backends {
        let backend = &view.backend;
        table.row([
            backend.family.into(),
            backend.id.to_string(),
            address(backend),
            protocol(view),
            backend.state.into(),
            place(backend),
            backend.generation.to_string(),
            users(view),
        ]);
    }
    table
}

fn address(backend: &BackendView) -> String {
    if backend.state == "unused" {
        return "-".into();
    }
    SocketAddr::new(backend.address, backend.port).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::ShareView;

    fn share(id: u32, addr: Option<&str>) -> ShareView {
        ShareView { id, address: addr.map(|addr| addr.parse().unwrap()), port: 8080, slots: 1 }
    }

    fn one_scope(when_empty: &'static str, backends: Vec<ShareView>) -> ScopeView {
        let slots = u32::try_from(backends.len()).unwrap();
        ScopeView { policy: "Cluster", when_empty, window: 7, slots, backends }
    }

    fn service(kind: &str, address: Option<&str>, port: u16) -> ServiceView {
        ServiceView {
            address: address.map(|addr| addr.parse().unwrap()),
            family: "IPv4",
            port,
            protocol: "TCP".into(),
            kind: kind.into(),
            service: 9,
            owner: Some("Service"),
            namespace: Some("shop".into()),
            name: Some("web".into()),
            service_port: Some(80),
            algorithm: "maglev",
            mode: "snat",
            affinity_seconds: 0,
            source_ranges: None,
            internal: one_scope("reject", vec![share(1, Some("10.1.0.1"))]),
            external: one_scope("reject", vec![share(1, Some("10.1.0.1"))]),
            usage: Some(UsageView { connections: 1, packets: 2, bytes: 300, refused: 4 }),
        }
    }

    fn two() -> [ServiceView; 2] {
        let plain = service("ClusterIP", Some("10.96.0.1"), 80);
        let mut special = service("NodePort", None, 30080);
        special.affinity_seconds = 600;
        special.source_ranges = Some(vec!["10.0.0.0/8".into()]);
        special.external = ScopeView { policy: "Local", ..one_scope("drop", vec![]) };
        (special.owner, special.namespace, special.name, special.usage) = (None, None, None, None);
        [plain, special]
    }

    fn printed(table: &Table) -> String {
        let mut out = vec![];
        table.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_tables_of_services() {
        assert_eq!(
            printed(&narrow(&two())),
            "\
NAME         KIND       FRONTEND           PROTOCOL  FROM INSIDE    FROM OUTSIDE  CONNECTIONS  PACKETS  BYTES  REFUSED
shop/web:80  ClusterIP  10.96.0.1:80       TCP       10.1.0.1:8080  the same      1            2        300    4
number 9:80  NodePort   node (IPv4):30080  TCP       10.1.0.1:8080  none: drop    -            -        -      -
"
        );
        assert_eq!(
            printed(&wide(&two())),
            "\
NAME         OWNER    NUMBER  KIND       FRONTEND           PROTOCOL  ALGORITHM  MODE  AFFINITY  SOURCES     INTERNAL POLICY  EXTERNAL POLICY  WINDOW INSIDE  WINDOW OUTSIDE  FROM INSIDE    FROM OUTSIDE  CONNECTIONS  PACKETS  BYTES  REFUSED
shop/web:80  Service  9       ClusterIP  10.96.0.1:80       TCP       maglev     snat  -         all         Cluster          Cluster          7+1            7+1             10.1.0.1:8080  the same      1            2        300    4
number 9:80  -        9       NodePort   node (IPv4):30080  TCP       maglev     snat  600 s     10.0.0.0/8  Cluster          Local            7+1            -               10.1.0.1:8080  none: drop    -            -        -      -
"
        );
    }

    #[test]
    fn the_json_of_services() {
        super::super::tests::assert_documented(&serde_json::to_value(two()).unwrap());
        let scope = serde_json::json!({
            "policy": "Cluster", "when_empty": "reject", "window": 7, "slots": 1,
            "backends": [{ "id": 1, "address": "10.1.0.1", "port": 8080, "slots": 1 }],
        });
        assert_eq!(
            serde_json::to_value(&two()[0]).unwrap(),
            serde_json::json!({
                "address": "10.96.0.1", "family": "IPv4", "port": 80, "protocol": "TCP", "kind": "ClusterIP",
                "service": 9, "owner": "Service", "namespace": "shop", "name": "web", "service_port": 80,
                "algorithm": "maglev", "mode": "snat", "affinity_seconds": 0, "source_ranges": null,
                "internal": scope, "external": scope,
                "usage": { "connections": 1, "packets": 2, "bytes": 300, "refused": 4 },
            })
        );
    }

    #[test]
    fn services_are_picked_by_name_kind_frontend_and_protocol() {
        let [plain, special] = two();
        let filter = |name: &str| ServiceFilter { name: name.parse().unwrap(), ..ServiceFilter::default() };
        let picks = |filter: &ServiceFilter| [filter.matches(&plain), filter.matches(&special)];
        assert_eq!(picks(&ServiceFilter::default()), [true, true]);
        assert_eq!(picks(&filter("shop/web")), [true, false]);
        assert_eq!(picks(&filter("other/web")), [false, false]);
        let kinds = ServiceFilter { kinds: vec![FrontendKind::NodePort], ..ServiceFilter::default() };
        assert_eq!(picks(&kinds), [false, true]);
        let at =
            |text: &str| ServiceFilter { frontend: vec![text.parse().unwrap()], ..ServiceFilter::default() };
        assert_eq!(picks(&at("10.96.0.0/16")), [true, true]);
        assert_eq!(picks(&at("10.96.0.1:80")), [true, false]);
        assert_eq!(picks(&at("192.0.2.1:30080")), [false, true]);
        let udp = ServiceFilter { protocols: vec![Protocol::Udp], ..ServiceFilter::default() };
        assert_eq!(picks(&udp), [false, false]);
    }

    #[test]
    fn a_scope_in_a_few_words() {
        let show = |backends| scope(&one_scope("drop", backends));
        assert_eq!(show(vec![]), "none: drop");
        assert_eq!(show(vec![share(1, Some("10.0.0.1")), share(2, None)]), "10.0.0.1:8080 missing backend 2");
        let many = (1..=6).map(|id| share(id, Some("fd00::1"))).collect();
        assert_eq!(show(many), "[fd00::1]:8080 [fd00::1]:8080 [fd00::1]:8080 [fd00::1]:8080 and 2 more");
    }

    #[test]
    fn backends_with_their_services() {
        let backend = |id, state, services: &[&ServiceView]| UsedBackendView {
            backend: BackendView {
                id,
                family: "IPv4",
                address: "10.1.0.1".parse().unwrap(),
                port: 8080,
                state,
                local: id == 1,
                generation: 5,
            },
            services: services.iter().map(|view| UserView::from(*view)).collect(),
        };
        let [plain, special] = two();
        let views = [
            backend(1, "active", &[&plain, &special]),
            backend(2, "terminating", &[]),
            backend(3, "unused", &[]),
        ];
        let picks = |filter: &BackendFilter| views.each_ref().map(|view| filter.matches(view));
        assert_eq!(picks(&BackendFilter::default()), [true, true, false]);
        assert_eq!(picks(&BackendFilter { all: true, ..BackendFilter::default() }), [true; 3]);
        let states = vec![BackendState::Terminating];
        assert_eq!(picks(&BackendFilter { states, ..BackendFilter::default() }), [false, true, false]);
        let name: NameFilter = "web".parse().unwrap();
        assert_eq!(picks(&BackendFilter { name, ..BackendFilter::default() }), [true, false, false]);
        let address = vec![":80".parse().unwrap()];
        assert_eq!(picks(&BackendFilter { address, ..BackendFilter::default() }), [false; 3]);
        assert_eq!(
            printed(&table(&views, false)),
            "\
BACKEND        PROTOCOL  STATE        WHERE      SERVICES
10.1.0.1:8080  TCP       active       this node  shop/web:80 number 9:80
10.1.0.1:8080  -         terminating  elsewhere  -
-              -         unused       elsewhere  -
"
        );
        assert_eq!(
            printed(&table(&views, true)),
            "\
FAMILY  ID  BACKEND        PROTOCOL  STATE        WHERE      GENERATION  SERVICES
IPv4    1   10.1.0.1:8080  TCP       active       this node  5           shop/web:80 number 9:80
IPv4    2   10.1.0.1:8080  -         terminating  elsewhere  5           -
IPv4    3   -              -         unused       elsewhere  5           -
"
        );
        super::super::tests::assert_documented(&serde_json::to_value(&views).unwrap());
        assert_eq!(
            serde_json::to_value(&views[0]).unwrap()["services"][0],
            serde_json::json!({
                "service": 9, "owner": "Service", "namespace": "shop", "name": "web", "service_port": 80,
                "protocol": "TCP",
            })
        );
    }
}
