//! Putting programs on their hooks, and taking over what a predecessor left there.
//!
//! Every attachment outlives the agent: links are pinned, clsact filters belong to the device. A restart
//! opens the pin and replaces the program in it, in one step that no packet sees.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use lb_common::maps::programs;

use super::clsact;
use super::error::AttachError;
use super::load::Programs;
use super::pins::{self, Pins};
use crate::sys::bpf::{self, AttachType, LinkTarget, Target};
use crate::sys::mount;

/// The hooks of one datapath.
#[derive(Debug)]
pub struct Hooks {
    pins: Pins,
    programs: Arc<Programs>,
    tcx: bool,
}

/// A hook of a device and the program that belongs there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    Xdp,
    NicIn,
    NicOut,
    PodIn,
    PodOut,
}

impl Place {
    pub const ALL: [Self; 5] = [Self::Xdp, Self::NicIn, Self::NicOut, Self::PodIn, Self::PodOut];

    /// Name of the program, of its pin, and of the filter where there are no links.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Xdp => programs::XDP_NIC,
            Self::NicIn => programs::TC_NIC_IN,
            Self::NicOut => programs::TC_NIC_OUT,
            Self::PodIn => programs::TC_POD_IN,
            Self::PodOut => programs::TC_POD_OUT,
        }
    }

    /// Which way packets go at a tc hook; `None` for XDP.
    pub const fn direction(self) -> Option<Direction> {
        match self {
            Self::Xdp => None,
            Self::NicIn | Self::PodIn => Some(Direction::Ingress),
            Self::NicOut | Self::PodOut => Some(Direction::Egress),
        }
    }

    /// The place whose program has this name.
    pub fn of_program(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|place| place.program() == name)
    }
}

/// Which way packets go at a tc hook.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Ingress,
    Egress,
}

/// How XDP runs on a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpKind {
    /// In the driver.
    Native,
    /// In the stack, for every driver.
    Generic,
}

/// What the kernel says about a device's XDP hook.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Observed {
    pub kind: XdpKind,
    pub prog_id: u32,
}

/// What an attachment came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A new link.
    Attached,
    /// The link of a predecessor has the new program.
    Replaced,
}

impl Hooks {
    pub(super) fn new(pins: Pins, programs: Arc<Programs>, tcx: bool) -> Self {
        Self { pins, programs, tcx }
    }

    /// Whether tc programs are attached through tcx links; otherwise as clsact filters.
    pub fn tcx(&self) -> bool {
        self.tcx
    }

    /// Puts the XDP program on a device; `observed` is what is there now.
    pub fn attach_xdp(
        &self,
        ifindex: u32,
        kind: XdpKind,
        observed: Option<Observed>,
    ) -> Result<Outcome, AttachError> {
        let flags = match kind {
            XdpKind::Native => bpf::XDP_DRV_MODE,
            XdpKind::Generic => bpf::XDP_SKB_MODE,
        };
        let on_hook = |info: &bpf::LinkInfo| {
            info.target == LinkTarget::Xdp { ifindex }
                && observed == Some(Observed { kind, prog_id: info.prog_id })
        };
        self.attach(
            programs::XDP_NIC,
            &self.pins.device_link(programs::XDP_NIC, ifindex),
            (Target::Device(ifindex), AttachType::Xdp, flags),
            on_hook,
        )
    }

    /// Puts a tc program on a device through tcx.
    ///
    /// Fairlead wants to be next to the wire or the pod: at ingress before, at egress after all others, so
    /// that they see real addresses.
    pub fn attach_tcx(&self, ifindex: u32, place: Place) -> Result<Outcome, AttachError> {
        let (attach_type, flags) = match place.direction() {
            Some(Direction::Egress) => (AttachType::TcxEgress, bpf::TCX_LAST),
            Some(Direction::Ingress) | None => (AttachType::TcxIngress, bpf::TCX_FIRST),
        };
        let target = Target::Device(ifindex);
        let on_hook = |info: &bpf::LinkInfo| {
            // A link whose device moved to another namespace keeps its interface index there.
            info.target == LinkTarget::Tcx { ifindex, attach_type: attach_type as u32 }
                && bpf::prog_query(target, attach_type).is_ok_and(|ids| ids.contains(&info.prog_id))
        };
        self.attach(
            place.program(),
            &self.pins.device_link(place.program(), ifindex),
            (target, attach_type, flags),
            on_hook,
        )
    }

    /// Puts a tc program on a device as a clsact filter. `true`: the qdisc was made for it, which cleanup
    /// needs to know.
    pub async fn attach_clsact(
        &self,
        netlink: &rtnetlink::Handle,
        ifindex: u32,
        place: Place,
    ) -> Result<bool, AttachError> {
        let program = self.program(place)?;
        let result = clsact::attach(netlink, ifindex, place, program).await;
        result.map_err(|error| netlink_error(place, ifindex, &error))
    }

    /// Takes our clsact filter off a device; fine if it is not there.
    pub async fn detach_clsact(
        &self,
        netlink: &rtnetlink::Handle,
        ifindex: u32,
        place: Place,
    ) -> Result<(), AttachError> {
        let result = clsact::detach(netlink, ifindex, place).await;
        result.map_err(|error| netlink_error(place, ifindex, &error))
    }

    /// Our clsact filters on the devices of this namespace.
    pub async fn filters(&self, netlink: &rtnetlink::Handle) -> Result<Vec<(Place, u32)>, AttachError> {
        let filters = clsact::filters(netlink).await;
        let filters = filters.map_err(|error| AttachError::Netlink {
            program: "tc filters",
            target: "all devices".into(),
            message: error.to_string(),
        })?;
        Ok(filters.into_iter().map(|(ifindex, place)| (place, ifindex)).collect())
    }

    /// Takes the link of a program off a device, if there is one.
    pub fn detach(&self, ifindex: u32, place: Place) -> Result<bool, AttachError> {
        let path = self.pins.device_link(place.program(), ifindex);
        remove_link(&path).map_err(|source| AttachError::Pin { path, source })
    }

    /// The device links that are pinned, of this agent and its predecessors.
    pub fn pinned(&self) -> Result<Vec<(Place, u32)>, AttachError> {
        let dir = self.pins.links();
        let names = pins::names(&dir).map_err(|source| AttachError::Pin { path: dir, source })?;
        Ok(names
            .iter()
            .filter_map(|name| {
                let (program, ifindex) = pins::parse_device_link(name)?;
                Some((Place::of_program(program)?, ifindex))
            })
            .collect())
    }

    /// Puts the socket programs on a cgroup: every process in it and below is served.
    pub fn attach_sockets(&self, cgroup_root: Option<&Path>) -> Result<(), AttachError> {
        let root = match cgroup_root {
            Some(root) => root.to_owned(),
            None => mount::cgroup2_root().ok().flatten().ok_or(AttachError::NoCgroup)?,
        };
        let fail = |source| AttachError::Cgroup { path: root.clone(), source };
        let cgroup = File::open(&root).map_err(fail)?;
        // The id of a cgroup is the number of its inode.
        let cgroup_id = cgroup.metadata().map_err(fail)?.ino();
        for (name, attach_type) in SOCKET_PROGRAMS {
            let on_hook = |info: &bpf::LinkInfo| {
                info.target == LinkTarget::Cgroup { id: cgroup_id, attach_type: attach_type as u32 }
            };
            self.attach(
                name,
                &self.pins.socket_link(name),
                (Target::Cgroup(cgroup.as_fd()), attach_type, 0),
                on_hook,
            )?;
        }
        tracing::info!(cgroup = %root.display(), "socket programs attached");
        Ok(())
    }

    /// Takes the socket programs of a predecessor off their cgroup (`--socket-lb=off`).
    pub fn detach_sockets(&self) -> Result<(), AttachError> {
        for (name, _) in SOCKET_PROGRAMS {
            let path = self.pins.socket_link(name);
            remove_link(&path).map_err(|source| AttachError::Pin { path, source })?;
        }
        Ok(())
    }

    /// The program that belongs to a place.
    pub fn program(&self, place: Place) -> Result<BorrowedFd<'_>, AttachError> {
        self.find(place.program())
    }

    fn find(&self, program: &'static str) -> Result<BorrowedFd<'_>, AttachError> {
        self.programs.get(program).ok_or_else(|| AttachError::Link {
            program,
            target: "its hook".into(),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        })
    }

    fn attach(
        &self,
        name: &'static str,
        path: &Path,
        (target, attach_type, flags): (Target<'_>, AttachType, u32),
        on_hook: impl Fn(&bpf::LinkInfo) -> bool,
    ) -> Result<Outcome, AttachError> {
        let program = self.find(name)?;
        if let Some(link) = open_link(path).map_err(|source| pin_error(path, source))? {
            let adopted = bpf::link_info(link.as_fd()).is_ok_and(|info| on_hook(&info))
                && bpf::link_update(link.as_fd(), program).is_ok();
            if adopted {
                return Ok(Outcome::Replaced);
            }
            // Its device or cgroup is gone, or another one has its number now.
            remove_link(path).map_err(|source| pin_error(path, source))?;
        }
        let link = bpf::link_create(program, target, attach_type, flags).map_err(|source| {
            let target = match target {
                Target::Device(ifindex) => device_name(ifindex),
                Target::Cgroup(_) => "cgroup".into(),
            };
            AttachError::Link { program: name, target, source }
        })?;
        bpf::obj_pin(link.as_fd(), path).map_err(|source| pin_error(path, source))?;
        Ok(Outcome::Attached)
    }
}

/// Socket programs and their hooks.
pub const SOCKET_PROGRAMS: [(&str, AttachType); 8] = {
    let [connect4, connect6, sendmsg4, sendmsg6, recvmsg4, recvmsg6, getpeer4, getpeer6] = programs::SOCKETS;
    [
        (connect4, AttachType::Inet4Connect),
        (connect6, AttachType::Inet6Connect),
        (sendmsg4, AttachType::Udp4Sendmsg),
        (sendmsg6, AttachType::Udp6Sendmsg),
        (recvmsg4, AttachType::Udp4Recvmsg),
        (recvmsg6, AttachType::Udp6Recvmsg),
        (getpeer4, AttachType::Inet4Getpeername),
        (getpeer6, AttachType::Inet6Getpeername),
    ]
};

/// What a program is attached to, for people and for `fairlead status`.
pub(crate) fn links(pins: &Pins) -> io::Result<BTreeMap<String, bpf::LinkInfo>> {
    let dir = pins.links();
    let mut links = BTreeMap::new();
    for name in pins::names(&dir)? {
        if let Some(link) = open_link(&dir.join(&name))? {
            links.insert(name, bpf::link_info(link.as_fd())?);
        }
    }
    Ok(links)
}

pub(super) fn open_link(path: &Path) -> io::Result<Option<OwnedFd>> {
    match bpf::obj_get(path) {
        Ok(fd) if bpf::object_kind(fd.as_fd())? == bpf::ObjectKind::Link => Ok(Some(fd)),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "not a link")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Detaches a pinned link and removes its pin; `false` if there is none.
pub(super) fn remove_link(path: &Path) -> io::Result<bool> {
    if let Ok(Some(link)) = open_link(path) {
        // A link whose device is gone cannot be detached, and need not be.
        let _ = bpf::link_detach(link.as_fd());
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn netlink_error(place: Place, ifindex: u32, error: &rtnetlink::Error) -> AttachError {
    let message = error.to_string();
    AttachError::Netlink { program: place.program(), target: device_name(ifindex), message }
}

fn pin_error(path: &Path, source: io::Error) -> AttachError {
    AttachError::Pin { path: path.to_owned(), source }
}

/// The name of a device, or its number.
pub(crate) fn device_name(ifindex: u32) -> String {
    nix::net::if_::if_indextoname(ifindex)
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| format!("device {ifindex}"))
}
