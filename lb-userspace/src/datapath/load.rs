//! From the embedded object to loaded programs and pinned maps.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{Program, ProgramError, ProgramFd};
use aya::{Btf, Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use lb_common::abi::{Edge, EdgeSourceKey, OwnMac, Routing};
use lb_common::flow::State;
use lb_common::maps::{MAPS, MapSpec, globals, programs};

use super::error::OpenError;
use super::features::Features;
use super::hooks::Hooks;
use super::idle::Idle;
use super::kernel_maps::{KernelMaps, typed};
use super::layout::{self, Verdict};
use super::migrate::Migration;
use super::options::{Options, SocketLb, SweepMode, TcMode};
use super::pins::{self, Lock, Pins};
use super::resize::Resize;
use super::sweeps::Sweeps;
use super::switch::StopAfter;
use crate::sys::poll::Readable;
use crate::sys::{bpf, capabilities, kernel, netns};

/// The kernel's own types.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// The programs, built by `cargo xtask build-ebpf`.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FAIRLEAD_BPF_OBJECT"));

/// CRC-32 of the object that the kernel programs come from: builds are told apart by it.
pub fn object_checksum() -> u32 {
    crc32fast::hash(OBJECT)
}

/// The loaded programs and their maps. Dropping it takes nothing off its hook.
pub struct Datapath {
    programs: Arc<Programs>,
    maps: BTreeMap<&'static str, OwnedFd>,
    features: Features,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    options: Options,
    pinned: Option<Pinned>,
    sweeps: Option<Arc<Sweeps>>,
}

#[derive(Debug)]
struct Pinned {
    pins: Pins,
    /// Holds other agents off until it is closed.
    _lock: Lock,
}

/// Loaded programs by name.
#[derive(Debug)]
pub struct Programs(BTreeMap<&'static str, OwnedFd>);

impl Programs {
    /// `name` is one of [`programs`].
    pub fn get(&self, name: &str) -> Option<BorrowedFd<'_>> {
        self.0.get(name).map(AsFd::as_fd)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        self.0.iter().map(|(name, fd)| (*name, fd.as_fd()))
    }
}

impl Datapath {
    /// Loads the programs over the pinned maps of `--bpffs`, which are made where they are missing. No hook
    /// is touched yet: see [`Self::hooks`].
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        check_privileges()?;
        check_kernel()?;
        pins::ensure_bpffs(&options.bpffs)?;
        let pins = Pins::of_version(&options.bpffs, options.layout.version);
        pins.create_root()?;
        let lock = pins
            .lock()
            .map_err(|source| OpenError::Pin { action: "lock", path: pins.root().to_owned(), source })?
            .ok_or_else(|| OpenError::Busy { path: options.bpffs.clone() })?;
        let migration = Migration::find(&pins, &options.layout)?;
        let mut resize = Resize::find(&pins)?;
        let sizes = adopt(&pins, options, &migration, &mut resize)?;
        migration.prepare()?;
        let path = |spec: &MapSpec| {
            Some(if migration.is_needed() { migration.place().map(spec.name) } else { resize.path(spec) })
        };
        let mut datapath = Self::load(options, &sizes, program_names(), path)?;
        for (name, program) in datapath.programs.iter() {
            replace_pin(program, &migration.place().programs(), name)?;
        }
        migration.run(&datapath.maps, &datapath.programs)?;
        resize.run(&datapath.maps, &datapath.programs, StopAfter(options.layout.stop_after))?;
        datapath.pinned = Some(Pinned { pins, _lock: lock });
        Ok(datapath)
    }

    /// Loads the programs over maps of their own: nothing is pinned, nothing can be attached, and all is
    /// gone when this is dropped. For tests and experiments.
    pub fn isolated(options: &Options) -> Result<Self, OpenError> {
        check_privileges()?;
        check_kernel()?;
        let sizes =
            MAPS.iter().map(|spec| (spec.name, options.sizes.wanted(spec.capacity).entries)).collect();
        Self::load(options, &sizes, program_names(), |_| None)
    }

    /// The service maps, for their writer.
    pub fn maps(&self) -> Result<KernelMaps, OpenError> {
        let mut maps = KernelMaps::new(|spec| self.map_data(spec))?;
        maps.complete_filter()?;
        Ok(maps)
    }

    /// The map of external edges, for [`crate::edges`].
    pub fn edges_map(&self) -> Result<HashMap<MapData, u32, Edge>, OpenError> {
        typed("EDGES", |spec| self.map_data(spec))
    }

    /// The map of their further sources.
    pub fn edge_sources_map(&self) -> Result<HashMap<MapData, EdgeSourceKey, Edge>, OpenError> {
        typed("EDGE_SOURCES", |spec| self.map_data(spec))
    }

    /// The Ethernet addresses of external edges.
    pub fn macs_map(&self) -> Result<Array<MapData, OwnMac>, OpenError> {
        typed("MACS", |spec| self.map_data(spec))
    }

    /// How long flows may believe what they know of their way, for [`crate::routing`].
    pub fn routing_map(&self) -> Result<Array<MapData, Routing>, OpenError> {
        typed("ROUTING", |spec| self.map_data(spec))
    }

    /// A handle of its own on a map.
    pub fn map_data(&self, spec: &'static MapSpec) -> Result<MapData, OpenError> {
        let missing = || OpenError::Missing { kind: "map", name: spec.name };
        let fd = self.maps.get(spec.name).ok_or_else(missing)?;
        let fd = fd.try_clone().map_err(|error| map_error(spec.name, error.into()))?;
        MapData::from_fd(fd).map_err(|error| map_error(spec.name, error))
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// What sweeps the flow tables inside the kernel; `None`: it cannot, or shall not.
    pub fn sweeps(&self) -> Option<&Arc<Sweeps>> {
        self.sweeps.as_ref()
    }

    /// Where the programs are put to work; `None` for an isolated datapath.
    pub fn hooks(&self) -> Option<Hooks> {
        let pinned = self.pinned.as_ref()?;
        Some(Hooks::new(pinned.pins.clone(), Arc::clone(&self.programs), self.tcx()))
    }

    /// Where it is pinned; `None` for an isolated datapath.
    pub fn pins(&self) -> Option<&Pins> {
        self.pinned.as_ref().map(|pinned| &pinned.pins)
    }

    fn tcx(&self) -> bool {
        self.features.tcx && self.options.tc == TcMode::Auto
    }

    pub fn features(&self) -> &Features {
        &self.features
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The kernel programs' log, once; `None` when its level is 0.
    pub fn take_logger(&mut self) -> Option<EbpfLogger<&'static dyn log::Log>> {
        self.logger.take()
    }

    /// Loads the programs of these names; `pin` says where a map is, or is to be, pinned.
    pub(super) fn load(
        options: &Options,
        sizes: &BTreeMap<&'static str, u32>,
        names: impl Iterator<Item = &'static str>,
        pin: impl Fn(&MapSpec) -> Option<PathBuf>,
    ) -> Result<Self, OpenError> {
        let mut features = Features::probe();
        let globals = Globals::new(options, features)?;

        let btf = Btf::from_sys_fs().ok();
        let mut loader = EbpfLoader::new();
        loader.btf(btf.as_ref());
        globals.set(&mut loader);
        for spec in &MAPS {
            if let Some(entries) = sizes.get(spec.name) {
                loader.map_max_entries(spec.name, *entries);
            }
            if let Some(path) = pin(spec) {
                loader.map_pin_path(spec.name, path);
            }
        }
        let mut ebpf = loader.load(OBJECT).map_err(|error| OpenError::Object(Box::new(error)))?;

        let programs = load_programs(&mut ebpf, options.idle, names)?;
        let mut maps = BTreeMap::new();
        for spec in &MAPS {
            maps.insert(spec.name, map_fd(&ebpf, spec.name)?);
        }
        let sweeps = match options.sweep {
            SweepMode::Auto if features.kernel_sweep => Sweeps::load(&mut ebpf, btf.as_ref(), &maps)
                .inspect_err(
                    |error| tracing::warn!(%error, "the agent sweeps the flow tables, not the kernel"),
                )
                .ok(),
            SweepMode::Auto | SweepMode::Agent => None,
        };
        features.kernel_sweep = sweeps.is_some();
        let features_text: Vec<String> =
            features.named().iter().map(|(name, has)| format!("{name}={has}")).collect();
        tracing::info!(features = features_text.join(" "), "kernel probed");
        let logger = (options.log_level > 0).then(|| EbpfLogger::init(&mut ebpf)).and_then(|logger| {
            logger.inspect_err(|error| tracing::warn!(%error, "the kernel programs' log cannot be read")).ok()
        });
        Ok(Self {
            programs: Arc::new(programs),
            maps,
            features,
            logger,
            options: options.clone(),
            pinned: None,
            sweeps: sweeps.map(Arc::new),
        })
    }
}

/// Passes what the kernel programs log on to the `log` crate, until an error.
pub async fn forward_log(mut logger: EbpfLogger<&'static dyn log::Log>) -> io::Result<()> {
    let buffer = Readable::new(logger.as_fd())?;
    loop {
        buffer.ready().await?;
        logger.flush();
    }
}

/// Every program of the object.
pub fn program_names() -> impl Iterator<Item = &'static str> {
    [programs::XDP_NIC, programs::TC_NIC_IN, programs::TC_NIC_OUT, programs::TC_POD_IN, programs::TC_POD_OUT]
        .into_iter()
        .chain(programs::SOCKETS)
}

/// Values of the load-time globals.
struct Globals {
    node_netns: u64,
    serves_pods: u8,
    admission: u8,
    masquerade_all: u8,
    set_retval: u8,
    coarse_clock: u8,
    csum_ipv6: u8,
    timeouts: [u64; State::ALL.len()],
    resets_removed: u8,
    tunnel_port: u16,
    sends_tunnelled: u8,
    log_level: u8,
}

impl Globals {
    fn new(options: &Options, features: Features) -> Result<Self, OpenError> {
        let cookie = netns::cookie().map_err(OpenError::NetnsCookie)?;
        let serves_pods = match options.socket_lb {
            SocketLb::All => true,
            SocketLb::Off => false,
            SocketLb::Host => {
                if cookie.is_none() {
                    tracing::warn!(
                        "this kernel does not tell the cookie of a network namespace (5.14); sockets of pods \
                         are translated too, as with --socket-lb=all"
                    );
                }
                cookie.is_none()
            }
        };
        Ok(Self {
            node_netns: cookie.unwrap_or(0),
            serves_pods: serves_pods.into(),
            admission: options.admission as u8,
            masquerade_all: options.masquerade_all.into(),
            set_retval: features.set_retval.into(),
            coarse_clock: features.coarse_clock.into(),
            csum_ipv6: features.csum_ipv6.into(),
            timeouts: State::ALL.map(|state| options.timeouts.of(state)),
            resets_removed: options.resets_removed.into(),
            tunnel_port: options.tunnel_port,
            sends_tunnelled: features.checks_mtu.into(),
            log_level: options.log_level,
        })
    }

    fn set<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader.override_global(globals::NODE_NETNS, &self.node_netns, true);
        loader.override_global(globals::SERVES_PODS, &self.serves_pods, true);
        loader.override_global(globals::ADMISSION, &self.admission, true);
        loader.override_global(globals::MASQUERADE_ALL, &self.masquerade_all, true);
        loader.override_global(globals::HAVE_SET_RETVAL, &self.set_retval, true);
        loader.override_global(globals::HAVE_COARSE_CLOCK, &self.coarse_clock, true);
        loader.override_global(globals::HAVE_CSUM_IPV6, &self.csum_ipv6, true);
        loader.override_global(globals::TIMEOUTS, self.timeouts.as_slice(), true);
        loader.override_global(globals::RESETS_REMOVED, &self.resets_removed, true);
        loader.override_global(globals::TUNNEL_PORT, &self.tunnel_port, true);
        loader.override_global(globals::SENDS_TUNNELLED, &self.sends_tunnelled, true);
        // Not in the object when no program logs.
        loader.override_global(globals::LOG_LEVEL, &self.log_level, false);
    }
}

/// Compares what is pinned with what is needed, and decides the size of every map.
fn adopt(
    pins: &Pins,
    options: &Options,
    migration: &Migration,
    resize: &mut Resize,
) -> Result<BTreeMap<&'static str, u32>, OpenError> {
    let mut sizes = BTreeMap::new();
    let mut changes: BTreeMap<&str, BTreeMap<&'static str, u32>> = BTreeMap::new();
    for spec in &MAPS {
        let wanted = options.sizes.wanted(spec.capacity);
        let path = pins.map(spec.name);
        let pinned = pinned_map(&path)?.map(|info| (path, info));
        let entries = match pinned.or_else(|| migration.shared(spec)) {
            None if wanted.explicit || wanted.flag.is_none() => wanted.entries,
            None => migration.former_size(spec).unwrap_or(wanted.entries),
            Some((path, info)) => match layout::judge(spec, wanted, &info) {
                Verdict::Use => wanted.entries,
                Verdict::Keep { entries } => {
                    tracing::warn!(
                        map = spec.name,
                        entries,
                        default = wanted.entries,
                        "the pinned map keeps its size; {} was not given",
                        wanted.flag.unwrap_or_default()
                    );
                    entries
                }
                Verdict::Resize { flag, entries } if migration.is_needed() => {
                    tracing::warn!(
                        map = spec.name,
                        entries,
                        "{flag} counts with the next start: the layout changes"
                    );
                    entries
                }
                Verdict::Resize { flag, entries } => {
                    changes.entry(flag).or_default().insert(spec.name, wanted.entries);
                    entries
                }
                Verdict::Refuse { difference } => {
                    return Err(OpenError::Layout { path, difference });
                }
            },
        };
        sizes.insert(spec.name, entries);
    }
    for (flag, wanted) in changes {
        if resize.resize(flag, &wanted)? {
            sizes.extend(wanted);
        }
    }
    Ok(sizes)
}

pub(super) fn pinned_map(path: &Path) -> Result<Option<bpf::MapInfo>, OpenError> {
    let fail = |source| OpenError::Pin { action: "open pinned map", path: path.to_owned(), source };
    let fd = match bpf::obj_get(path) {
        Ok(fd) => fd,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    if bpf::object_kind(fd.as_fd()).map_err(fail)? != bpf::ObjectKind::Map {
        return Err(OpenError::Layout { path: path.to_owned(), difference: "it is not a map".into() });
    }
    bpf::map_info(fd.as_fd()).map(Some).map_err(fail)
}

/// Pins a program in place of its predecessor, without a moment in which there is none.
fn replace_pin(program: BorrowedFd<'_>, dir: &Path, name: &str) -> Result<(), OpenError> {
    let path = dir.join(name);
    let new = dir.join(format!("{name}-new"));
    let pin = || {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        bpf::obj_pin(program, &new)?;
        fs::rename(&new, &path)
    };
    pin().map_err(|source| OpenError::Pin { action: "pin program", path: path.clone(), source })
}

/// Loads programs, each in a thread of its own: the verifier takes most of a cold start.
fn load_programs(
    ebpf: &mut Ebpf,
    idle: Idle,
    names: impl Iterator<Item = &'static str>,
) -> Result<Programs, OpenError> {
    let mut objects: BTreeMap<String, &mut Program> =
        ebpf.programs_mut().map(|(name, program)| (name.to_owned(), program)).collect();
    let mut found = Vec::new();
    for name in names {
        found.push((name, objects.remove(name).ok_or(OpenError::Missing { kind: "program", name })?));
    }
    thread::scope(|scope| {
        let loading: Vec<_> = found
            .into_iter()
            .map(|(name, program)| (name, scope.spawn(move || load_program(name, idle, program))))
            .collect();
        let mut loaded = BTreeMap::new();
        for (name, thread) in loading {
            let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            loaded.insert(name, result?);
        }
        Ok(Programs(loaded))
    })
}

fn load_program(name: &'static str, idle: Idle, program: &mut Program) -> Result<OwnedFd, OpenError> {
    if let Some(stand_in) = idle.stand_in(name) {
        let refused = |source| OpenError::Program { name, verdict: "of two instructions".to_owned(), source };
        return stand_in.map_err(refused);
    }
    let result = match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => return Err(OpenError::Missing { kind: "packet or socket program", name }),
    };
    loaded(name, result, || program.fd())
}

/// What the kernel made of a program.
pub(super) fn loaded<'a>(
    name: &'static str,
    result: Result<(), ProgramError>,
    fd: impl FnOnce() -> Result<&'a ProgramFd, ProgramError>,
) -> Result<OwnedFd, OpenError> {
    match result {
        Ok(()) => {}
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            tracing::debug!(program = name, %log, "verifier");
            return Err(OpenError::Program { name, verdict: verdict(&log), source: io_error });
        }
        Err(error) => return Err(OpenError::Aya { name, source: Box::new(error) }),
    }
    let aya = |error| OpenError::Aya { name, source: Box::new(error) };
    fd().map_err(aya)?.as_fd().try_clone_to_owned().map_err(|error| aya(error.into()))
}

/// The line of a verifier's log that says why.
fn verdict(log: &str) -> String {
    log.lines()
        .map(str::trim)
        .rfind(|line| {
            !line.is_empty()
                && !line.starts_with("processed ")
                && !line.starts_with("verification time")
                && !line.starts_with("stack depth")
        })
        .unwrap_or("no reason given")
        .to_owned()
}

fn map_fd(ebpf: &Ebpf, name: &'static str) -> Result<OwnedFd, OpenError> {
    let map = ebpf.map(name).ok_or(OpenError::Missing { kind: "map", name })?;
    let (Map::Array(data)
    | Map::HashMap(data)
    | Map::LpmTrie(data)
    | Map::LruHashMap(data)
    | Map::PerCpuArray(data)
    | Map::PerCpuHashMap(data)
    | Map::RingBuf(data)) = map
    else {
        return Err(OpenError::Missing { kind: "map of the right type named", name });
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|error| map_error(name, error.into()))
}

fn map_error(name: &'static str, error: aya::maps::MapError) -> OpenError {
    OpenError::Map { name, source: Box::new(error) }
}

pub(super) fn check_kernel() -> Result<(), OpenError> {
    if !Path::new(KERNEL_BTF).exists() {
        return Err(OpenError::NoKernelBtf);
    }
    // Before 5.11 maps count against this limit; later it does not matter.
    let unlimited = nix::sys::resource::RLIM_INFINITY;
    if let Err(error) =
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK, unlimited, unlimited)
    {
        tracing::debug!(%error, "the limit of locked memory stays as it is");
        if kernel::release().is_some_and(|release| release < (5, 11)) {
            tracing::warn!(
                "on kernels before 5.11 maps count against the limit of locked memory, which cannot be raised: \
                 give the process CAP_{}, or no such limit",
                capabilities::BEFORE_5_11
            );
        }
    }
    Ok(())
}

pub(super) fn check_privileges() -> Result<(), OpenError> {
    match capabilities::missing().as_slice() {
        [] => Ok(()),
        missing => Err(OpenError::Privileges { missing: capabilities::names(missing) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_last_line_that_says_something() {
        let log = "0: R1=ctx()\n; x\n12: (71) r0 = *(u8 *)(r1 +0)\ninvalid access to packet\n\
                   verification time 12 usec\nprocessed 9 insns (limit 1000000)\n\n";
        assert_eq!(verdict(log), "invalid access to packet");
        assert_eq!(verdict(""), "no reason given");
    }
}
