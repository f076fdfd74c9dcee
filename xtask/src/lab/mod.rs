//! The network lab: two nodes, their pods and two outside machines, made of network namespaces.
//!
//! ```text
//!   outside            far                       pods  a1 a2 …        pods  b1 b2 …
//!  192.0.2.100     198.51.100.100                10.244.1.x           10.244.2.x
//!       |               |                          |   |                |   |
//!       |               |                        cali… cali…          veth… veth…
//!       |               |                      (routed /32, /128)       cni0 (bridge)
//!       |               |                       node-a                node-b
//!       |               |                       192.0.2.1             192.0.2.2
//!       +------- switch (bridge, router .254) ----+---------------------+
//! ```
//!
//! Everything has an IPv6 address of the same shape (`2001:db8::…`, `fd00:10:244:N::…`). The outside machines
//! and the router know neither pods nor Services; the nodes know each other's pods. The nodes filter
//! strictly by reverse path (`rp_filter=1`), the harsher of the two common settings. Every link to the switch
//! behaves like a wire: checksums are complete on it, and it takes frames that XDP programs send.
//!
//! A namespace is entered by threads ([`Netns::run`]); what must be in a node's cgroup, because socket
//! programs attach there, is a process ([`Node`] is its caller).

pub mod agent;
pub mod cgroup;
pub mod client;
pub mod cluster;
pub mod container;
pub mod counters;
pub mod custody;
pub mod foreign;
pub mod jail;
pub mod manifests;
pub mod netns;
mod sctp;
pub mod server;
mod veth;
pub mod wire;

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::setup;

pub use self::agent::{Agent, AgentOptions, Xdp};
pub use self::client::{Call, Caller, Outcome};
pub use self::cluster::Cluster;
pub use self::counters::Counters;
pub use self::jail::Jail;
pub use self::manifests::{Endpoint, Manifests, Port, Service};
pub use self::wire::Protocol;

use self::cgroup::Cgroup;
use self::custody::{Custody, making};
use self::netns::Netns;
use self::server::{Site, Stop};

/// IP family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];
}

/// An address in each family.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Addrs {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Addrs {
    pub fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    pub fn with_port(self, port: u16) -> [SocketAddr; 2] {
        self.both().map(|addr| SocketAddr::new(addr, port))
    }
}

/// How a node's pods are connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cni {
    /// A host route to each veth, which answers ARP for everything, as Calico does.
    Routed,
    /// A bridge `cni0` with the veths as ports, as Flannel and the CNI bridge plugin do.
    Bridge,
}

const ROUTER: Addrs =
    Addrs { v4: Ipv4Addr::new(192, 0, 2, 254), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe) };
const OUTSIDE: Addrs =
    Addrs { v4: Ipv4Addr::new(192, 0, 2, 100), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100) };
const FAR_ROUTER: Addrs =
    Addrs { v4: Ipv4Addr::new(198, 51, 100, 254), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0xfe) };
const FAR: Addrs =
    Addrs { v4: Ipv4Addr::new(198, 51, 100, 100), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0x100) };
/// Where routed pods send everything; no device has it, the host's end of the veth answers for it.
const ROUTED_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// MAC address of the host's end of routed veths; its link-local address follows from it.
const ROUTED_MAC: &str = "ee:ee:ee:ee:ee:ee";
const ROUTED_GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xecee, 0xeeff, 0xfeee, 0xeeee);

/// MAC address of bridges. Without one of its own a bridge takes that of a port, and another one when ports come and
/// go, which its pods do not notice for seconds (the CNI bridge plugin sets it as well).
const BRIDGE_MAC: &str = "0a:58:0a:f4:00:01";

/// What is known about an address at once: no device waits for duplicate address detection.
const NO_DAD: [(&str, &str); 2] = [("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")];
const FORWARDING: [(&str, &str); 2] = [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];
const STRICT: [(&str, &str); 2] = [("ipv4/conf/all/rp_filter", "1"), ("ipv4/conf/default/rp_filter", "1")];

/// The lab. It gives everything back when it is dropped; pods are to be dropped before it.
pub struct Lab {
    pub node_a: Node,
    pub node_b: Node,
    /// A client on the nodes' own network.
    pub outside: Machine,
    /// A client behind a router.
    pub far: Machine,
    /// The switch that everybody is connected to, and the router between its networks.
    pub router: Netns,
    /// Agents and servers: not below the nodes' cgroups.
    processes: Cgroup,
    stop: Stop,
    /// This program, for the processes.
    xtask: PathBuf,
    // Last, so that threads and processes have ended when it takes everything down.
    custody: Custody,
}

/// A machine that is no node.
pub struct Machine {
    pub addrs: Addrs,
    pub ns: Netns,
    caller: Caller,
}

/// A node; as a caller it is a process in its cgroup.
pub struct Node {
    pub name: String,
    pub addrs: Addrs,
    pub cni: Cni,
    pub ns: Netns,
    pub cgroup: Cgroup,
    /// Pods have addresses in `10.244.{number}.0/24` and `fd00:10:244:{number}::/64`.
    number: u8,
    next_pod: AtomicU32,
    caller: Caller,
}

/// A pod, as a server and as a caller.
pub struct Pod {
    pub addrs: Addrs,
    pub node: String,
    pub ns: Netns,
    /// The host's end of its veth.
    pub device: String,
    caller: Caller,
}

impl Deref for Machine {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl Deref for Node {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl Deref for Pod {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl Lab {
    /// Makes a lab with a name of its own. `xtask` is this program's path, for the processes on nodes.
    pub fn new(xtask: &Path) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::with_prefix(xtask, &format!("flw-{}-{number}", std::process::id()))
    }

    /// Makes a lab in which everything is called `prefix` or `prefix-…`.
    pub fn with_prefix(xtask: &Path, prefix: &str) -> Result<Self> {
        let custody = Custody::claim(prefix)?;
        let _making = making();
        let stop = Stop::new()?;
        let names = ["switch", "outside", "far", "node-a", "node-b"].map(|name| format!("{prefix}-{name}"));
        let all = Netns::create(&names)?;
        let [switch, outside, far, node_a, node_b] = all.as_slice() else { bail!("five were made") };
        wire_up(switch, outside, far, [node_a, node_b], custody.dir())?;
        let cgroups = setup::cgroup2()?.join(prefix);
        let machine = |name: &str, ns: &Netns, addrs| -> Result<Machine> {
            Ok(Machine { addrs, ns: ns.clone(), caller: Caller::in_thread(name, ns, &stop)? })
        };
        let node = |name: &str, number, ns: &Netns, cni| -> Result<Node> {
            let cgroup = Cgroup::create(cgroups.join(name))?;
            let mut desk = Command::new(xtask);
            desk.arg("lab-desk").arg("--cgroup").arg(cgroup.path());
            let caller = Caller::in_process(name, ns, &mut desk)?;
            let node = Node {
                name: name.to_owned(),
                addrs: node_addrs(number),
                cni,
                ns: ns.clone(),
                cgroup,
                number,
                next_pod: AtomicU32::new(10),
                caller,
            };
            node.wire_up()?;
            Ok(node)
        };
        Ok(Self {
            node_a: node("node-a", 1, node_a, Cni::Routed)?,
            node_b: node("node-b", 2, node_b, Cni::Bridge)?,
            outside: machine("outside", outside, OUTSIDE)?,
            far: machine("far", far, FAR)?,
            router: switch.clone(),
            processes: Cgroup::create(cgroups.join("processes"))?,
            stop,
            xtask: xtask.to_owned(),
            custody,
        })
    }

    pub fn prefix(&self) -> &str {
        self.custody.prefix()
    }

    /// A directory for logs and manifests; removed with the lab.
    pub fn dir(&self) -> &Path {
        self.custody.dir()
    }

    /// Where the agent of `node` pins.
    pub fn pins(&self, node: &Node) -> PathBuf {
        Path::new(setup::BPFFS).join(format!("{}-{}", self.prefix(), node.name))
    }

    pub fn nodes(&self) -> [&Node; 2] {
        [&self.node_a, &self.node_b]
    }

    /// The way to networks through a node, for the router and for outside machines: as if they were announced.
    pub fn route_through(&self, node: &Node, networks: &[&str]) -> Result<()> {
        for network in networks {
            let via = node.addrs.of(if network.contains(':') { Family::V6 } else { Family::V4 });
            self.outside.add_route(network, via)?;
            self.router.ip(&format!("route replace {network} via {via}\n"))?;
        }
        Ok(())
    }

    /// The lab stays when it is dropped, for people to look at; what `agent` handles started does too.
    pub fn keep(&self) -> Result<()> {
        self.custody.keep()
    }

    /// Adds a pod to a node.
    pub fn add_pod(&self, node: &Node, name: &str) -> Result<Pod> {
        let _making = making();
        let number = node.next_pod.fetch_add(1, Ordering::Relaxed);
        let low = u8::try_from(number).context("a node has no more than 245 pods")?;
        let addrs = Addrs {
            v4: Ipv4Addr::new(10, 244, node.number, low),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, node.number.into(), 0, 0, 0, low.into()),
        };
        let ns = Netns::create(&[format!("{}-{name}", self.prefix())])?.remove(0);
        ns.sysctl(&NO_DAD)?;
        let device = match node.cni {
            Cni::Routed => format!("cali{number}"),
            Cni::Bridge => format!("veth{number}"),
        };
        let Addrs { v4, v6 } = addrs;
        let veth = format!("link add {device} type veth peer name eth0 netns {}\n", ns.name());
        match node.cni {
            Cni::Routed => {
                node.ns.ip(&format!(
                    "{veth}\
                     link set {device} address {ROUTED_MAC} up\n\
                     route add {v4}/32 dev {device}\n\
                     route add {v6}/128 dev {device}\n"
                ))?;
                node.ns.sysctl(&[
                    (&format!("ipv4/conf/{device}/proxy_arp"), "1"),
                    (&format!("ipv4/neigh/{device}/proxy_delay"), "0"),
                ])?;
                ns.ip(&format!(
                    "link set lo up\n\
                     link set eth0 up\n\
                     addr add {v4}/32 dev eth0\n\
                     addr add {v6}/128 dev eth0 nodad\n\
                     route add {ROUTED_GATEWAY} dev eth0 scope link\n\
                     route add default via {ROUTED_GATEWAY} dev eth0\n\
                     route add default via {ROUTED_GATEWAY6} dev eth0\n"
                ))?;
            }
            Cni::Bridge => {
                node.ns.ip(&format!("{veth}link set {device} master cni0 up\n"))?;
                let gateway = node.bridge_addrs();
                ns.ip(&format!(
                    "link set lo up\n\
                     link set eth0 up\n\
                     addr add {v4}/24 dev eth0\n\
                     addr add {v6}/64 dev eth0 nodad\n\
                     route add default via {} dev eth0\n\
                     route add default via {} dev eth0\n",
                    gateway.v4, gateway.v6
                ))?;
            }
        }
        let caller = Caller::in_thread(name, &ns, &self.stop)?;
        Ok(Pod { addrs, node: node.name.clone(), ns, device, caller })
    }

    /// Takes a node's uplink away and gives it another one of the same name and with the same addresses.
    pub fn replug(&self, node: &Node) -> Result<()> {
        let _making = making();
        self.router.ip(&format!("link del {}\n{}", node.name, port(&node.name, &node.ns)))?;
        veth::like_wires(&self.router, &[&node.name])?;
        veth::take_xdp_frames(&self.router, &[&node.name], self.dir())?;
        bring_up(&node.ns, node.addrs, ROUTER)?;
        // Nobody tells the neighbours of the new Ethernet address.
        self.router.ip("neigh flush dev br0\n")?;
        [&self.outside.ns, &self.node_a.ns, &self.node_b.ns]
            .into_iter()
            .try_for_each(|ns| ns.ip("neigh flush dev eth0\n"))?;
        node.ns.ip(&node.routes())
    }

    /// Makes the whole network of the nodes as wide as told.
    pub fn set_mtu(&self, mtu: u16) -> Result<()> {
        let all = [(&self.outside.ns, "outside"), (&self.node_a.ns, "node-a"), (&self.node_b.ns, "node-b")];
        all.into_iter().try_for_each(|(ns, port)| {
            self.router.ip(&format!("link set {port} mtu {mtu}\n"))?;
            ns.ip(&format!("link set eth0 mtu {mtu}\n"))
        })
    }

    /// Makes the link to `far` narrower than `far` tells its peers, so that they learn of it from the router alone.
    pub fn narrow_far(&self, mtu: u16) -> Result<()> {
        self.router.ip(&format!("link set far mtu {mtu}\n"))?;
        let Addrs { v4, v6 } = FAR_ROUTER;
        self.far.ns.ip(&format!(
            "link set eth0 mtu {mtu}\n\
             route change default via {v4} advmss 1460\n\
             route change default via {v6} advmss 1440\n"
        ))
    }

    /// Starts servers that go on when this process ends, for a lab that is kept.
    pub fn serve_by_itself(&self, sites: &[Site]) -> Result<()> {
        let mut command = Command::new(&self.xtask);
        command.arg("lab-sites").arg(serde_json::to_string(sites)?);
        // Not our standard error: whoever waits for its end would wait for the servers.
        let log = self.dir().join("servers.log");
        let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut servers = {
            let _making = making();
            let servers = self.outside.ns.spawn(&mut command)?;
            self.processes.adopt(servers.id())?;
            servers
        };
        let said = wire::read_line(servers.stdout.as_mut().context("no pipe from the servers")?);
        if !said.as_ref().is_ok_and(|said| said == server::SERVING) {
            bail!("the servers did not start: {said:?}, {:?}", servers.wait());
        }
        Ok(())
    }

    /// A process in a pod: in its namespace, and in the cgroup of its node as under a container runtime. The
    /// pod as a caller is a thread of this process, whose sockets no agent sees.
    pub fn process_in_pod(&self, node: &Node, pod: &Pod) -> Result<Caller> {
        let _making = making();
        let cgroup = Cgroup::create(node.cgroup.path().join(pod.name()))?;
        let mut desk = Command::new(&self.xtask);
        desk.arg("lab-desk").arg("--cgroup").arg(cgroup.path());
        Caller::in_process(pod.name(), &pod.ns, &mut desk)
    }

    /// Removes a pod: its namespace and both ends of its veth.
    pub fn remove_pod(&self, node: &Node, pod: Pod) -> Result<()> {
        node.ns.ip(&format!("link del {}\n", pod.device))?;
        let name = pod.ns.name().to_owned();
        drop(pod);
        netns::delete(&[name])
    }

    /// Ends the servers that threads of this process run.
    pub fn stop_servers(&self) {
        self.stop.give();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Sockets of server threads would keep the namespaces alive.
        self.stop.give();
    }
}

impl Machine {
    /// The way to a network through a node, as for a router that knows where Services live.
    pub fn add_route(&self, network: &str, via: IpAddr) -> Result<()> {
        self.ns.ip(&format!("route replace {network} via {via}\n"))
    }

    pub fn remove_route(&self, network: &str) -> Result<()> {
        self.ns.ip(&format!("route del {network}\n"))
    }
}

impl Node {
    /// `NodeIP:nodePort`.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.addrs.of(family), port)
    }

    /// Every address that its processes may send from.
    pub fn own_addrs(&self, family: Family) -> Vec<IpAddr> {
        let bridge = (self.cni == Cni::Bridge).then(|| self.bridge_addrs().of(family));
        bridge.into_iter().chain([self.addrs.of(family)]).collect()
    }

    /// Its pods' networks.
    pub fn pod_cidrs(&self) -> [String; 2] {
        [format!("10.244.{}.0/24", self.number), format!("fd00:10:244:{}::/64", self.number)]
    }

    fn bridge_addrs(&self) -> Addrs {
        Addrs {
            v4: Ipv4Addr::new(10, 244, self.number, 1),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, self.number.into(), 0, 0, 0, 1),
        }
    }

    /// The way to the other node's pods.
    fn routes(&self) -> String {
        let other = 3 - self.number;
        let Addrs { v4, v6 } = node_addrs(other);
        format!(
            "route replace 10.244.{other}.0/24 via {v4}\n\
             route replace fd00:10:244:{other}::/64 via {v6}\n"
        )
    }

    /// All its routes by the uplink, which the kernel takes away when that goes down.
    pub fn restore_routes(&self) -> Result<()> {
        let Addrs { v4, v6 } = ROUTER;
        let own = format!("route replace default via {v4}\nroute replace default via {v6}\n");
        self.ns.ip(&(own + &self.routes()))
    }

    /// What pods need on this side, and the way to the other node's pods.
    fn wire_up(&self) -> Result<()> {
        let bridge = match self.cni {
            Cni::Routed => String::new(),
            Cni::Bridge => {
                let Addrs { v4, v6 } = self.bridge_addrs();
                format!(
                    "link add cni0 address {BRIDGE_MAC} type bridge mcast_snooping 0\n\
                     addr add {v4}/24 dev cni0\n\
                     addr add {v6}/64 dev cni0 nodad\n\
                     link set cni0 up\n"
                )
            }
        };
        self.ns.ip(&(self.routes() + &bridge))
    }
}

impl Pod {
    /// `podIP:port`.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.addrs.of(family), port)
    }

    /// Starts a server on a port of both addresses; it calls itself by the pod's name.
    pub fn listen(&self, protocol: Protocol, port: u16) -> Result<()> {
        self.serve(protocol, &self.addrs.with_port(port))
    }
}

fn node_addrs(number: u8) -> Addrs {
    Addrs {
        v4: Ipv4Addr::new(192, 0, 2, number),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()),
    }
}

/// Makes a port of the switch, which is somebody's `eth0` at its other end.
fn port(name: &str, ns: &Netns) -> String {
    format!(
        "link add {name} type veth peer name eth0 netns {}\n\
         link set {name} master br0 up\n",
        ns.name()
    )
}

/// Makes somebody's `eth0` work.
fn bring_up(ns: &Netns, addrs: Addrs, router: Addrs) -> Result<()> {
    ns.ip(&format!(
        "link set lo up\n\
         link set eth0 up\n\
         addr add {}/24 dev eth0\n\
         addr add {}/64 dev eth0 nodad\n\
         route add default via {}\n\
         route add default via {}\n",
        addrs.v4, addrs.v6, router.v4, router.v6
    ))?;
    veth::like_wires(ns, &["eth0"])
}

/// Connects machines and nodes with the switch, which is also their router.
fn wire_up(switch: &Netns, outside: &Netns, far: &Netns, nodes: [&Netns; 2], scratch: &Path) -> Result<()> {
    switch.sysctl(&[NO_DAD, FORWARDING].concat())?;
    for machine in [outside, far] {
        machine.sysctl(&NO_DAD)?;
    }
    for node in nodes {
        node.sysctl(&[NO_DAD, FORWARDING, STRICT].concat())?;
    }
    switch.ip(&format!(
        "link set lo up\n\
         link add br0 type bridge mcast_snooping 0\n\
         addr add {}/24 dev br0\n\
         addr add {}/64 dev br0 nodad\n\
         link set br0 up\n\
         link add far type veth peer name eth0 netns {}\n\
         addr add {}/24 dev far\n\
         addr add {}/64 dev far nodad\n\
         link set far up\n\
         {}{}{}",
        ROUTER.v4,
        ROUTER.v6,
        far.name(),
        FAR_ROUTER.v4,
        FAR_ROUTER.v6,
        port("outside", outside),
        port("node-a", nodes[0]),
        port("node-b", nodes[1]),
    ))?;
    veth::like_wires(switch, &["outside", "far", "node-a", "node-b"])?;
    veth::take_xdp_frames(switch, &["node-a", "node-b"], scratch)?;
    let ends = [
        (outside, OUTSIDE, ROUTER),
        (far, FAR, FAR_ROUTER),
        (nodes[0], node_addrs(1), ROUTER),
        (nodes[1], node_addrs(2), ROUTER),
    ];
    ends.into_iter().try_for_each(|(ns, addrs, router)| bring_up(ns, addrs, router))
}

/// Tries until it works or `limit` has passed; the last error then.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(err) if Instant::now() > deadline => {
                return Err(err.context(format!("not within {} s", limit.as_secs())));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}
