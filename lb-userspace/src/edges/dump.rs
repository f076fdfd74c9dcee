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
    let mut devices = by_index(links);
    for message in addresses {
        if let (Some(device), Some(address)) = (devices.get_mut(&message.header.index), address(&message)) {
            device.addresses.push(address);
        }
    }
    Ok(devices.into_values().collect())
}

fn by_index(links: Vec<LinkMessage>) -> BTreeMap<u32, Device> {
    let mut devices = BTreeMap::new();
    let mut under_vlans = Vec::new();
    for link in links {
        let lower = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Link(lower) => Some(*lower),
            _ => None,
        });
        let device = device(link);
        under_vlans.extend(lower.filter(|_| device.kind == "vlan"));
        devices.insert(device.ifindex, device);
    }
    for lower in under_vlans {
        if let Some(device) = devices.get_mut(&lower) {
            device.vlans = true;
        }
    }
    devices
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
            LinkAttribute::Address(address) => device.mac = address.try_into().ok(),
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

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::InfoKind;

    use super::*;

    fn link(ifindex: u32, name: &str, kind: Option<InfoKind>, more: &[LinkAttribute]) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        message.header.flags = LinkFlags::Up;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes = vec![LinkAttribute::IfName(name.into())];
        message.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        message.attributes.extend_from_slice(more);
        message
    }

    /// What kernels with these devices say; not every kernel that runs the tests has them.
    #[test]
    fn bonds_and_vlans_are_told_by_their_messages() {
        let lower = |ifindex| [LinkAttribute::Link(ifindex)];
        let devices = by_index(vec![
            link(2, "eth0", None, &[LinkAttribute::Controller(4)]),
            link(4, "bond0", Some(InfoKind::Bond), &[]),
            link(5, "bond0.7", Some(InfoKind::Vlan), &lower(4)),
            link(6, "mac0", Some(InfoKind::MacVlan), &lower(7)),
            link(7, "eth1", None, &[]),
            // Its peer's index, in another namespace.
            link(8, "veth1", Some(InfoKind::Veth), &lower(7)),
        ]);
        let told: Vec<_> =
            devices.values().map(|it| (it.name.as_str(), it.kind.as_str(), it.master, it.vlans)).collect();
        assert_eq!(
            told,
            [
                ("eth0", "", Some(4), false),
                ("bond0", "bond", None, true),
                ("bond0.7", "vlan", None, false),
                ("mac0", "macvlan", None, false),
                ("eth1", "", None, false),
                ("veth1", "veth", None, false),
            ]
        );
    }
}
