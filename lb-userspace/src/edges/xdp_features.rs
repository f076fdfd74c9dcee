//! What a device's driver can do with XDP, from the generic netlink family `netdev` (6.3, commit
//! d3d854fd6a1d). It also tells what cannot be seen otherwise: that a veth's peer, in whatever namespace,
//! receives what XDP sends.

use std::io;

use rtnetlink::packet_core::{Emitable, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NlasIterator};
use rtnetlink::sys::protocols::NETLINK_GENERIC;
use rtnetlink::sys::{Socket, SocketAddr};

/// Bits of `NETDEV_A_DEV_XDP_FEATURES`.
mod bits {
    /// `NETDEV_XDP_ACT_BASIC`: pass, drop, abort, send back.
    pub(super) const BASIC: u64 = 1 << 0;
    /// `NETDEV_XDP_ACT_NDO_XMIT`: other devices may redirect to it.
    pub(super) const TRANSMIT: u64 = 1 << 2;
}

/// What a driver can do with XDP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct XdpFeatures {
    /// It runs XDP programs.
    pub basic: bool,
    /// What XDP sends through it arrives.
    pub transmit: bool,
}

/// A connection to the family `netdev`.
#[derive(Debug)]
pub(super) struct Netdev {
    socket: Socket,
    family: u16,
}

impl Netdev {
    /// `NotFound`: the kernel does not have the family.
    pub(super) fn open() -> io::Result<Self> {
        /// `GENL_ID_CTRL`, which knows the numbers of all families.
        const CONTROLLER: u16 = 16;
        const CTRL_CMD_GETFAMILY: u8 = 3;
        const CTRL_ATTR_FAMILY_ID: u16 = 1;
        const CTRL_ATTR_FAMILY_NAME: u16 = 2;
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        let name = (CTRL_ATTR_FAMILY_NAME, b"netdev\0".as_slice());
        let answer = ask(&socket, CONTROLLER, CTRL_CMD_GETFAMILY, name)?;
        let family = attribute(&answer, CTRL_ATTR_FAMILY_ID)
            .and_then(|value| value.try_into().ok())
            .map(u16::from_ne_bytes)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { socket, family })
    }

    pub(super) fn features(&self, ifindex: u32) -> io::Result<XdpFeatures> {
        const NETDEV_CMD_DEV_GET: u8 = 1;
        const NETDEV_A_DEV_IFINDEX: u16 = 1;
        const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
        let device = ifindex.to_ne_bytes();
        let answer = ask(&self.socket, self.family, NETDEV_CMD_DEV_GET, (NETDEV_A_DEV_IFINDEX, &device))?;
        let features = attribute(&answer, NETDEV_A_DEV_XDP_FEATURES)
            .and_then(|value| value.try_into().ok())
            .map(u64::from_ne_bytes)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(XdpFeatures { basic: features & bits::BASIC != 0, transmit: features & bits::TRANSMIT != 0 })
    }
}

/// Sends a request with one attribute; the attributes of the answer.
fn ask(socket: &Socket, family: u16, command: u8, (kind, value): (u16, &[u8])) -> io::Result<Vec<u8>> {
    /// `NLMSG_ERROR`.
    const ERROR: u16 = 2;
    const HEADER: usize = 16;
    const GENERIC_HEADER: usize = 4;
    let attribute_len = 4 + value.len();
    let len = HEADER + GENERIC_HEADER + attribute_len.next_multiple_of(4);
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(len).map_err(io::Error::other)?;
    header.message_type = family;
    header.flags = NLM_F_REQUEST;
    let mut request = vec![0; HEADER];
    header.emit(&mut request);
    request.extend([command, 1, 0, 0]);
    request.extend(u16::try_from(attribute_len).map_err(io::Error::other)?.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(value);
    request.resize(len, 0);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;

    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkBuffer::new_checked(answer.as_slice()).map_err(io::Error::other)?;
    let payload = answer.payload();
    if answer.message_type() == ERROR {
        let code = payload.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
        return Err(io::Error::from_raw_os_error(-code));
    }
    Ok(payload.get(GENERIC_HEADER..).unwrap_or_default().to_vec())
}

fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == kind)
        .map(|attribute| attribute.value().to_vec())
}
