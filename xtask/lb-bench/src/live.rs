//! Frames that XDP really sends: what each costs with all that the kernel does about it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Result;
use fairlead::datapath::Place;

use crate::asm::{Code, Reg, Size};
use crate::bpf::{self, ProgType};
use crate::frame::Family;
use crate::node::{Link, Node};
use crate::packet::{What, XDP_TX};
use crate::sender::{Sender, Traffic};
use crate::series::Series;

/// Frames to the wire, and the program that sends them there.
pub(crate) struct Live {
    what: &'static str,
    variant: &'static str,
    family: Family,
    sender: Sender,
    samples: Vec<f64>,
}

impl Live {
    pub(crate) fn new(
        link: &Link,
        what: &'static str,
        variant: &'static str,
        traffic: &Traffic,
        target: BorrowedFd<'_>,
    ) -> Result<Self> {
        let family = traffic.family;
        let sender = Sender::new(traffic, target, link.ifindex)?;
        Ok(Self { what, variant, family, sender, samples: Vec::new() })
    }

    /// A connection to a NodePort whose backend is elsewhere, beside the least that can be done with a frame.
    pub(crate) fn beside_swap(link: &Link, node: &Node, family: Family) -> Result<[Self; 2]> {
        let what = What::NodePortThere;
        let traffic = what.traffic(family, 1, 1)?;
        let mut swap = Code::default();
        swap_macs(&mut swap).exit(XDP_TX.cast_signed());
        let swap = bpf::prog_load(ProgType::Xdp, swap.insns())?;
        let name = "live-nodeport-there";
        Ok([
            Self::new(link, name, "swap-and-tx", &traffic, swap.as_fd())?,
            Self::new(link, name, "fairlead", &traffic, node.program(Place::Xdp)?)?,
        ])
    }

    pub(crate) fn measure(&mut self, packets: u32) -> Result<()> {
        self.samples.push(self.sender.send_live(packets)?.into());
        Ok(())
    }

    pub(crate) fn print(self, group: &'static str) -> Result<()> {
        let Self { what, variant, family, samples, .. } = self;
        let axes: BTreeMap<_, _> = [("family", family.name().to_owned()), ("flows", "1".to_owned())].into();
        Series { group, what: what.to_owned(), variant, unit: "ns", axes, samples }.print()
    }
}

/// Turns the Ethernet addresses of an XDP frame around. R1: the context; it is lost.
fn swap_macs(code: &mut Code) -> &mut Code {
    const XDP_DROP: i32 = 1;
    code.load(Size::Word, Reg::R2, Reg::R1, 0)
        .load(Size::Word, Reg::R3, Reg::R1, 4)
        .exit_if_shorter(14, XDP_DROP)
        .load(Size::Word, Reg::R0, Reg::R2, 0)
        .load(Size::Half, Reg::R1, Reg::R2, 4)
        .load(Size::Half, Reg::R4, Reg::R2, 6)
        .load(Size::Word, Reg::R6, Reg::R2, 8)
        .store(Size::Half, Reg::R2, 0, Reg::R4)
        .store(Size::Word, Reg::R2, 2, Reg::R6)
        .store(Size::Word, Reg::R2, 6, Reg::R0)
        .store(Size::Half, Reg::R2, 10, Reg::R1)
}
