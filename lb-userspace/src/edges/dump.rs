//! Reading devices and addresses from netlink.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
};
use rtnetlink::{Error, Handle};

use super::classify::{Address, Device};
use crate::datapath::{Observed, XdpKind};

/// Every device of this namespace with its addresses, in the order of interface indices.
pub(super) async fn devices(handle: &Handle) -> Result<Vec<Device>, Error> {
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    let mut devices: BTreeMap<u32, Device> =
        links.into_iter().map(|link| (link.header.index, device(link))).collect();
    for message in addresses {
        if let (Some(device), Some(address)) = (devices.get_mut(&message.header.index), address(&message)) {
            device.addresses.push(address);
        }
    }
    Ok(devices.into_values().collect())
}

fn device(link: LinkMessage) -> Device {
    let flags = link.header.flags;
    let mut device = Device {
        ifindex: link.header.index,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        ethernet: link.header.link_layer_type == LinkLayerType::Ether,
        ..Device::default()
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Controller(master) => device.master = Some(master),
            LinkAttribute::LinkInfo(info) => {
                for item in info {
                    if let LinkInfo::Kind(kind) = item {
                        device.kind = kind.to_string();
                    }
                }
            }
            LinkAttribute::Xdp(xdp) => device.xdp = observed(&xdp),
            _ => {}
        }
    }
    device
}

fn observed(xdp: &[LinkXdp]) -> Option<Observed> {
    let native = xdp.iter().find_map(|attribute| match attribute {
        LinkXdp::DrvProgId(prog_id) | LinkXdp::HwProgId(prog_id) => {
            Some(Observed { kind: XdpKind::Native, prog_id: *prog_id })
        }
        _ => None,
    });
    native.or_else(|| {
        xdp.iter().find_map(|attribute| match attribute {
            LinkXdp::SkbProgId(prog_id) => Some(Observed { kind: XdpKind::Generic, prog_id: *prog_id }),
            _ => None,
        })
    })
}

fn address(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut peer = None;
    let mut flags = None;
    for attribute in &message.attributes {
        match attribute {
            // On point-to-point links this is the other end; ours is IFA_LOCAL.
            AddressAttribute::Address(addr) => peer = Some(*addr),
            AddressAttribute::Local(addr) => local = Some(*addr),
            AddressAttribute::Flags(long) => flags = Some(*long),
            _ => {}
        }
    }
    let addr: IpAddr = local.or(peer)?;
    let has = |long: AddressFlags, short: AddressHeaderFlags| match flags {
        Some(flags) => flags.intersects(long),
        None => message.header.flags.intersects(short),
    };
    Some(Address {
        addr,
        prefix_len: message.header.prefix_len,
        global: message.header.scope == AddressScope::Universe && !addr.is_loopback(),
        // The same bit means "secondary" for IPv4 and "temporary" for IPv6.
        secondary: has(AddressFlags::Secondary, AddressHeaderFlags::Secondary),
        unsettled: has(
            AddressFlags::Tentative | AddressFlags::Deprecated | AddressFlags::Dadfailed,
            AddressHeaderFlags::Tentative | AddressHeaderFlags::Deprecated | AddressHeaderFlags::Dadfailed,
        ),
        permanent: has(AddressFlags::Permanent, AddressHeaderFlags::Permanent),
    })
}
