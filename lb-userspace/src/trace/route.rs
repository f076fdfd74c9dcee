//! Where the node's routing table leads.

use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteType};

use super::TraceError;

/// The way to an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Way {
    pub(super) ifindex: u32,
    /// `None`: the address is on the link.
    pub(super) gateway: Option<IpAddr>,
    /// The address is this node's.
    pub(super) local: bool,
}

/// Asks the kernel, in the caller's network namespace; `None`: it knows no way.
pub(super) fn way_to(addr: IpAddr) -> Result<Option<Way>, TraceError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(TraceError::Netlink)?.block_on(ask(addr))
}

async fn ask(addr: IpAddr) -> Result<Option<Way>, TraceError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(TraceError::Netlink)?;
    let connection = tokio::spawn(connection);
    let bits = if addr.is_ipv4() { 32 } else { 128 };
    let request = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(addr, bits)
        .map_err(|error| TraceError::Netlink(std::io::Error::other(error)))?
        .build();
    let routes = handle.route().get(request).execute().try_next().await;
    connection.abort();
    // Whatever it says against the address: nothing can be sent there.
    let Ok(Some(route)) = routes else { return Ok(None) };
    let mut way = Way { ifindex: 0, gateway: None, local: route.header.kind == RouteType::Local };
    for attribute in route.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => way.ifindex = ifindex,
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => way.gateway = Some(gateway.into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => way.gateway = Some(gateway.into()),
            _ => {}
        }
    }
    Ok((way.ifindex != 0).then_some(way))
}
