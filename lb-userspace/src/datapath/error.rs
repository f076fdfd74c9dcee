//! What can go wrong between the agent and the kernel: what failed, on what object, and what to do.

use std::io;
use std::path::PathBuf;

/// The datapath cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("not enough privileges: {missing} missing; run as root, or give the process these capabilities")]
    Privileges { missing: String },
    #[error(
        "this kernel has no type information ({path}); use a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        path = super::load::KERNEL_BTF
    )]
    NoKernelBtf,
    #[error(
        "--bpffs {path}: not on a BPF file system; run `mount -t bpf bpf /sys/fs/bpf`, or name a directory \
         under one"
    )]
    NotBpffs { path: PathBuf },
    #[error("cannot mount a BPF file system at {path}: {source}; run `mount -t bpf bpf {path}` before", path = path.display())]
    MountBpffs { path: PathBuf, source: io::Error },
    #[error("another agent is running with --bpffs {path}; stop it, or give this one its own directory", path = path.display())]
    Busy { path: PathBuf },
    #[error("{action} {path}: {source}", path = path.display())]
    Pin { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "pinned map {path} has another layout than this version needs ({difference}); nothing was changed; \
         run `fairlead cleanup` to start afresh, or the version that made it",
        path = path.display()
    )]
    Layout { path: PathBuf, difference: String },
    #[error("map {map}: cannot be brought to its new size: {source}; leave the --max-* flags as they were")]
    Resize { map: &'static str, source: io::Error },
    #[error(
        "{path} has maps of a layout that this version does not know (its own is v{ours}); nothing was changed, and \
         traffic goes on; run the version that made them, or `fairlead cleanup` to start afresh",
        path = path.display()
    )]
    UnknownLayout { path: PathBuf, ours: u32 },
    #[error(
        "map {map} cannot be carried over to the one that takes its place: {source}; start again to go on"
    )]
    Carry { map: &'static str, source: io::Error },
    #[error("tc filters cannot be given to the new programs: {0}; start again to go on")]
    Filters(String),
    #[error("told to stop after the step {0:?}")]
    Stopped(super::Step),
    #[error("cannot read the cookie of the node's network namespace: {0}")]
    NetnsCookie(io::Error),
    #[error("the kernel refused the program object: {0}; is the agent's build complete?")]
    Object(Box<aya::EbpfError>),
    #[error("the object has no {kind} {name}; build it again with `cargo xtask build-ebpf`")]
    Missing { kind: &'static str, name: &'static str },
    #[error("program {name}: the kernel's verifier refused it: {source}: {verdict}")]
    Program { name: &'static str, verdict: String, source: io::Error },
    #[error(
        "{path} is of another build of Fairlead than this one: use the program that the agent runs",
        path = path.display()
    )]
    OtherBuild { path: PathBuf },
    #[error("program {name}: {source}")]
    Aya { name: &'static str, source: Box<aya::programs::ProgramError> },
    #[error("program {name} on map {map}: {source}")]
    Sweep { name: &'static str, map: &'static str, source: io::Error },
    #[error(transparent)]
    Maps(#[from] super::MapError),
    #[error("map {name}: {source}")]
    Map { name: &'static str, source: Box<aya::maps::MapError> },
}

/// A program cannot be put on, or taken off, its hook.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("{program} on {target}: {source}{}", advice(source))]
    Link { program: &'static str, target: String, source: io::Error },
    #[error(
        "XDP on {target} is taken by program {prog_id} ({name}): the hook has room for one, and Fairlead replaces \
         nobody's and joins no dispatcher (libxdp); `ip link set {target} xdp off` makes room"
    )]
    XdpTaken { target: String, prog_id: u32, name: String },
    #[error("{program} on {target}: {message}")]
    Netlink { program: &'static str, target: String, message: String },
    #[error("pin {path}: {source}", path = path.display())]
    Pin { path: PathBuf, source: io::Error },
    #[error("no cgroup2 file system is mounted; mount one, or name it with --cgroup-root")]
    NoCgroup,
    #[error("--cgroup-root {path}: {source}", path = path.display())]
    Cgroup { path: PathBuf, source: io::Error },
}

/// What the usual refusals mean to an operator.
fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => " (another program is on this hook; see `bpftool net` and `bpftool link`)",
        Some(libc::EOPNOTSUPP) => " (the driver does not support it)",
        Some(libc::EPERM) => " (capability missing, or another program does not share the hook)",
        _ => "",
    }
}

/// The maps, programs and links of a directory cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error("an agent is running with --bpffs {path}; stop it first", path = path.display())]
    Busy { path: PathBuf },
    #[error("remove {path}: {source}", path = path.display())]
    Remove { path: PathBuf, source: io::Error },
    #[error("tc filters: {0}")]
    Netlink(String),
    #[error("{name}: {source}")]
    Sysctl { name: &'static str, source: io::Error },
}
