//! The programs that sweep the flow tables inside the kernel, each on its table. Nothing of them is pinned: without an agent
//! nobody sweeps.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::programs::Program;
use aya::{Btf, Ebpf};
use lb_common::maps::programs::SWEEPS;

use super::error::OpenError;
use super::load::loaded;
use crate::sys::bpf;

/// The iterators of `bpf_map_elem` (kernel/bpf/map_iter.c).
const KIND: &str = "bpf_map_elem";

/// Loaded programs, and the table that each is on.
#[derive(Debug)]
pub struct Sweeps(BTreeMap<&'static str, Sweep>);

#[derive(Debug)]
struct Sweep {
    program: OwnedFd,
    link: OwnedFd,
}

impl Sweeps {
    /// Loads the programs, and puts each on its table; `maps` as the kernel knows them.
    pub(super) fn load(
        ebpf: &mut Ebpf,
        btf: Option<&Btf>,
        maps: &BTreeMap<&'static str, OwnedFd>,
    ) -> Result<Self, OpenError> {
        let btf = btf.ok_or(OpenError::NoKernelBtf)?;
        let mut sweeps = BTreeMap::new();
        for (name, map) in SWEEPS {
            let missing = OpenError::Missing { kind: "iterator", name };
            let Some(Program::Iter(program)) = ebpf.program_mut(name) else { return Err(missing) };
            let result = program.load(KIND, btf);
            let program = loaded(name, result, || program.fd())?;
            let map_fd = maps.get(map).ok_or(OpenError::Missing { kind: "map", name: map })?;
            let link = bpf::map_iter_link_create(program.as_fd(), map_fd.as_fd())
                .map_err(|source| OpenError::Sweep { name, map, source })?;
            sweeps.insert(map, Sweep { program, link });
        }
        Ok(Self(sweeps))
    }

    /// Begins a walk over a table: each byte that is read is what has become of one entry
    /// ([`lb_common::sweep::Finding`]), and so the length of a read bounds what it costs.
    pub fn walk(&self, map: &str) -> io::Result<File> {
        let sweep = self.0.get(map).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        bpf::iter_create(sweep.link.as_fd())
    }

    /// Each program, by its name.
    pub fn programs(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        SWEEPS.into_iter().filter_map(|(name, map)| Some((name, self.0.get(map)?.program.as_fd())))
    }
}
