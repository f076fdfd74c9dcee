//! What `Datapath::open` is told.

use std::path::PathBuf;
use std::time::Duration;

use lb_common::flow::State;
use lb_common::maps::{
    Capacity, DEFAULT_MAX_BACKENDS, DEFAULT_MAX_FLOWS, DEFAULT_MAX_SERVICES, MAX_ADDRESSES,
    SLOTS_PER_BACKEND, max_pending,
};
use lb_common::tables::Admission;

use super::idle::Idle;
use super::migrate::Layout;

/// Default of `--bpffs`.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/fairlead";

/// How the datapath is opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// `--bpffs`: the pin directory; each agent on a machine has its own.
    pub bpffs: PathBuf,
    pub sizes: Sizes,
    pub socket_lb: SocketLb,
    /// `--masquerade-all`: backends see this node in place of all clients, unless a policy Local keeps them.
    pub masquerade_all: bool,
    pub tc: TcMode,
    pub sweep: SweepMode,
    /// `--takeover` and `--drain`: which connections are begun while another Service proxy is there.
    pub admission: Admission,
    pub timeouts: Timeouts,
    /// `--tcp-to-removed-backend=reset`.
    pub resets_removed: bool,
    /// `--tunnel-port`: where nodes take packets of each other for direct server return; 0: there is none.
    pub tunnel_port: u16,
    /// Programs that will be on no hook.
    pub idle: Idle,
    /// Level of the kernel programs' log: 0 off (the verifier removes every line), 1 error to 5 trace.
    pub log_level: u8,
    /// How the maps are laid out; another one than this build's only to rehearse upgrades.
    pub layout: Layout,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bpffs: DEFAULT_BPFFS.into(),
            sizes: Sizes::default(),
            socket_lb: SocketLb::default(),
            masquerade_all: false,
            tc: TcMode::default(),
            sweep: SweepMode::default(),
            admission: Admission::default(),
            timeouts: Timeouts::default(),
            resets_removed: false,
            tunnel_port: 0,
            idle: Idle::default(),
            log_level: 0,
            layout: Layout::OURS,
        }
    }
}

/// `--max-flows`, `--max-services`, `--max-backends`; `None`: not given, so what is pinned is kept, else
/// the default.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sizes {
    pub flows: Option<u32>,
    pub services: Option<u32>,
    pub backends: Option<u32>,
}

/// How many entries a map shall have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    pub entries: u32,
    /// The flag that decides it; `None`: it is fixed.
    pub flag: Option<&'static str>,
    /// The flag was given.
    pub explicit: bool,
}

impl Sizes {
    pub fn wanted(&self, capacity: Capacity) -> Wanted {
        let flows = self.flows.unwrap_or(DEFAULT_MAX_FLOWS);
        let services = self.services.unwrap_or(DEFAULT_MAX_SERVICES);
        let backends = self.backends.unwrap_or(DEFAULT_MAX_BACKENDS);
        let (entries, flag, explicit) = match capacity {
            Capacity::Fixed(entries) => return Wanted { entries, flag: None, explicit: false },
            Capacity::Flows => (flows, "--max-flows", self.flows.is_some()),
            Capacity::PendingFlows => (max_pending(flows), "--max-flows", self.flows.is_some()),
            Capacity::Services => (services, "--max-services", self.services.is_some()),
            Capacity::Backends => (backends, "--max-backends", self.backends.is_some()),
            Capacity::Addresses => {
                (backends.saturating_add(MAX_ADDRESSES), "--max-backends", self.backends.is_some())
            }
            Capacity::Slots => {
                (backends.saturating_mul(SLOTS_PER_BACKEND), "--max-backends", self.backends.is_some())
            }
        };
        Wanted { entries: entries.max(1), flag: Some(flag), explicit }
    }
}

/// `--conntrack-*-timeout-*`: after how long without a packet flows are over; zero: the default.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timeouts {
    pub tcp_established: Duration,
    pub tcp_close_wait: Duration,
    pub udp: Duration,
    pub udp_stream: Duration,
}

impl Timeouts {
    /// That of flows in a state, in nanoseconds.
    pub fn of(&self, state: State) -> u64 {
        let configured = match state {
            State::Established => self.tcp_established,
            State::HalfClosed => self.tcp_close_wait,
            State::Unanswered => self.udp,
            State::Answered => self.udp_stream,
            State::Opening | State::Closed | State::Reset | State::Associated => Duration::ZERO,
        };
        match nanoseconds(configured) {
            0 => state.default_timeout(),
            timeout => timeout,
        }
    }
}

/// As the kernel counts; what does not fit is for ever.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// `--socket-lb`: whose sockets are translated when they connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SocketLb {
    /// Processes in the node's network namespace.
    #[default]
    Host,
    /// Pods too.
    All,
    Off,
}

/// How programs get on the tc hooks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TcMode {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// clsact, whatever the kernel has.
    Clsact,
}

impl TcMode {
    /// What the environment variable `FAIRLEAD_TC` asks for: `clsact`, for tests of old kernels' way on
    /// new ones.
    pub fn from_env() -> Self {
        match std::env::var("FAIRLEAD_TC") {
            Ok(value) if value == "clsact" => Self::Clsact,
            _ => Self::Auto,
        }
    }
}

/// Who removes flows that are over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SweepMode {
    /// Programs in the kernel where it takes them (5.9), else the agent.
    #[default]
    Auto,
    /// The agent, whatever the kernel takes.
    Agent,
}

impl SweepMode {
    /// What the environment variable `FAIRLEAD_SWEEP` asks for: `agent`, for tests of the way without programs.
    pub fn from_env() -> Self {
        match std::env::var("FAIRLEAD_SWEEP") {
            Ok(value) if value == "agent" => Self::Agent,
            _ => Self::Auto,
        }
    }
}
