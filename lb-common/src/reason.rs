//! What became of a packet: one enum that is counter index, metric label and event code at once.

/// A place where the datapath sees packets or sockets.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Hook {
    Xdp = 0,
    NicIn = 1,
    NicOut = 2,
    PodIn = 3,
    PodOut = 4,
    Connect = 5,
    Sendmsg = 6,
    Recvmsg = 7,
    Getpeername = 8,
}

impl Hook {
    /// Every hook, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Xdp,
        Self::NicIn,
        Self::NicOut,
        Self::PodIn,
        Self::PodOut,
        Self::Connect,
        Self::Sendmsg,
        Self::Recvmsg,
        Self::Getpeername,
    ];

    /// Label of metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::NicIn => "nic_in",
            Self::NicOut => "nic_out",
            Self::PodIn => "pod_in",
            Self::PodOut => "pod_out",
            Self::Connect => "connect",
            Self::Sendmsg => "sendmsg",
            Self::Recvmsg => "recvmsg",
            Self::Getpeername => "getpeername",
        }
    }
}

/// What the program does with a packet for a [`Reason`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// The packet goes on untouched.
    Pass,
    /// The packet was rewritten and goes where its flow says.
    Carry,
    /// The packet is discarded in silence.
    Drop,
    /// The packet is answered: TCP RST for TCP, ICMP port unreachable for the rest; sockets get
    /// `ECONNREFUSED`.
    Reject,
    /// The packet is answered with ICMP time exceeded.
    Expire,
    /// The packet is answered with ICMP fragmentation needed / packet too big.
    Shrink,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $value:literal, $name:literal, $action:ident;)*) => {
        /// Why a packet went the way it went.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Reason {
            $($(#[$doc])* $variant = $value,)*
        }

        impl Reason {
            /// Every reason, in the order of their numbers.
            pub const ALL: [Self; REASONS as usize] = [$(Self::$variant,)*];

            /// Label of metrics and events.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What the program does.
            pub const fn action(self) -> Action {
                match self { $(Self::$variant => Action::$action,)* }
            }
        }

        /// Number of reasons.
        pub const REASONS: u32 = 0 $(+ { let _ = $value; 1 })*;
    };
}

reasons! {
    /// The packet or socket address is no frontend of ours.
    NotOurs = 0, "not_ours", Pass;
    /// Rewritten; the node's stack, the pod or the client takes it from here.
    Translated = 1, "translated", Carry;
    /// Rewritten on both sides and sent on without the stack.
    Forwarded = 2, "forwarded", Carry;
    /// Sent back to the pod it came from, which is its own backend.
    Hairpinned = 3, "hairpinned", Carry;
    /// Neither IPv4 nor IPv6, or of a VLAN: its own device is an edge of its own.
    NotIp = 4, "not_ip", Pass;
    /// A protocol without ports that we translate.
    UnknownProtocol = 5, "unknown_protocol", Pass;
    /// The packet ends before its headers do, or a length field lies.
    Truncated = 6, "truncated", Pass;
    /// IPv4 options.
    IpOptions = 7, "ip_options", Pass;
    /// An IPv6 extension header that cannot be walked.
    ExtensionHeader = 8, "extension_header", Pass;
    /// A fragment whose first fragment was not translated, or has not come yet.
    Fragment = 9, "fragment", Pass;
    /// The frontend has no usable endpoint.
    NoEndpoints = 10, "no_endpoints", Reject;
    /// The policy is Local and every endpoint is on another node.
    NoLocalEndpoints = 11, "no_local_endpoints", Drop;
    /// A port of a Service address that no frontend owns.
    UnknownPort = 12, "unknown_port", Reject;
    /// The window names a slot or backend that does not exist: a fault of ours.
    BrokenWindow = 13, "broken_window", Drop;
    /// No source port left for this backend.
    PortsExhausted = 14, "ports_exhausted", Reject;
    /// The flow table refused an entry.
    FlowTableFull = 15, "flow_table_full", Drop;
    /// A TCP RST for a connection we do not know, an SCTP ABORT or SHUTDOWN COMPLETE for such an association.
    StrayReset = 16, "stray_reset", Pass;
    /// The next hop is not known here; the hook after this one, or the stack, resolves it.
    NoNextHop = 17, "no_next_hop", Pass;
    /// No route to the backend.
    NoRoute = 18, "no_route", Drop;
    /// TTL or hop limit is used up.
    TtlExceeded = 19, "ttl_exceeded", Expire;
    /// Larger than the MTU of the way to the backend.
    PacketTooBig = 20, "packet_too_big", Shrink;
    /// The kernel refused to change the packet: a fault of ours.
    RewriteFailed = 21, "rewrite_failed", Drop;
    /// A socket of a namespace that is not ours to serve.
    OtherNamespace = 22, "other_namespace", Pass;
    /// `loadBalancerSourceRanges` does not name the client.
    SourceNotAllowed = 23, "source_not_allowed", Drop;
    /// An address of a ServiceCIDR that no Service has.
    NoSuchService = 24, "no_such_service", Drop;
    /// The same, to an address that only a Service has: nobody waits for it there.
    StrayFragment = 25, "stray_fragment", Drop;
    /// A protocol without ports that we translate, to an address that only a Service has.
    UnservedProtocol = 26, "unserved_protocol", Reject;
    /// A connection that another Service proxy has (`--takeover`) or shall have (`--drain`).
    LeftToOthers = 27, "left_to_others", Pass;
    /// Of a flow between a client and a backend that it asks for itself: known, not changed.
    Direct = 28, "direct", Pass;
    /// A TCP connection whose backend is no endpoint any more (`--tcp-to-removed-backend=reset`).
    BackendRemoved = 29, "backend_removed", Reject;
    /// Of a TCP connection whose flow is gone, and whose backend was chosen at random: no other shall get it.
    FlowLost = 30, "flow_lost", Reject;
    /// A frame for another Ethernet address than the device's: a switch floods it, or somebody listens to everything.
    OtherHost = 31, "other_host", Pass;
    /// Sent on unchanged in a tunnel to the backend's node, which answers the client.
    Tunnelled = 32, "tunnelled", Carry;
    /// Larger than the MTU of the way to the backend's node, less what the tunnel takes.
    TunnelTooBig = 33, "tunnel_too_big", Shrink;
    /// Says that it comes out of a tunnel of ours, and comes from nobody we know as a node of the cluster.
    TunnelStranger = 34, "tunnel_stranger", Drop;
    /// From another node through a tunnel, with headers that we do not write.
    TunnelBroken = 35, "tunnel_broken", Drop;
    /// Another node has chosen a backend that is not here (any more), for a connection that is not known here.
    NoSuchBackend = 36, "no_such_backend", Drop;
}

/// Number of entries of `COUNTERS`.
pub const COUNTERS: u32 = REASONS * Hook::ALL.len() as u32;

/// Index in `COUNTERS`.
pub const fn counter_index(hook: Hook, reason: Reason) -> u32 {
    hook as u32 * REASONS + reason as u32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_are_dense_and_names_unique() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        for (i, hook) in Hook::ALL.iter().enumerate() {
            assert_eq!(*hook as usize, i);
        }
        let names: BTreeSet<_> = Reason::ALL.iter().map(|r| r.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        let indices: BTreeSet<_> =
            Hook::ALL.iter().flat_map(|h| Reason::ALL.iter().map(|r| counter_index(*h, *r))).collect();
        assert_eq!(indices.len() as u32, COUNTERS);
        assert_eq!(indices.last(), Some(&(COUNTERS - 1)));
    }
}
