//! What each reason means to somebody who looks for a packet, and what to do about it.

use lb_common::Reason;

/// A sentence or two without a full stop.
pub const fn meaning(reason: Reason) -> &'static str {
    match reason {
        Reason::NotOurs => {
            "no frontend answers there: the packet goes on untouched; see `fairlead services` for those there are"
        }
        Reason::Translated => "rewritten; the node's stack, the pod or the client takes it from here",
        Reason::Forwarded => "both addresses are rewritten, and it is sent on without the node's stack",
        Reason::Hairpinned => "the pod is its own backend: sent back to it, from the frontend",
        Reason::NotIp => "neither IPv4 nor IPv6, or of a VLAN, whose own device sees it next",
        Reason::UnknownProtocol => "a protocol without the ports that Services have",
        Reason::Truncated => "it ends before its headers do",
        Reason::IpOptions => "IPv4 options: such packets pass untouched",
        Reason::ExtensionHeader => {
            "an IPv6 extension header that cannot be walked: such packets pass untouched"
        }
        Reason::Fragment => "a fragment whose first fragment was not translated",
        Reason::NoEndpoints => {
            "the Service has no usable endpoint for this client: TCP is reset, the rest gets a port unreachable; look at \
             the readiness of its pods"
        }
        Reason::NoLocalEndpoints => {
            "the traffic policy is Local and every endpoint is on another node: ask a node that has one, or set the \
             policy to Cluster"
        }
        Reason::UnknownPort => "the address is a Service's, but no Service has this port and protocol there",
        Reason::BrokenWindow => {
            "the maps name a backend that is not there: a fault of ours; restart the agent, and report it"
        }
        Reason::PortsExhausted => {
            "no source port is left towards this backend: too many connections at a time; add endpoints or \
             --source-addresses"
        }
        Reason::FlowTableFull => "the flow table takes no entry: raise --max-flows",
        Reason::StrayReset => "it ends a connection that nobody knows: it passes untouched",
        Reason::NoNextHop => "the next hop cannot be had at this hook; the one behind it sends the packet",
        Reason::NoRoute => {
            "no route to the backend, forwarding is off, or the device it leaves by has no address: see `ip route get`"
        }
        Reason::TtlExceeded => "its TTL or hop limit is used up: the sender is told",
        Reason::PacketTooBig => "larger than the MTU towards the backend: the sender is told",
        Reason::RewriteFailed => "the kernel refused to change the packet: a fault of ours; report it",
        Reason::OtherNamespace => {
            "the socket is of a namespace that is not served at its sockets, but at its device"
        }
        Reason::SourceNotAllowed => {
            "loadBalancerSourceRanges does not name this client; see SOURCES of `fairlead services`"
        }
        Reason::NoSuchService => "an address of a ServiceCIDR that no Service has",
        Reason::StrayFragment => "a fragment to a Service whose first fragment was not seen",
        Reason::UnservedProtocol => "a protocol without ports, to an address that only a Service has",
        Reason::OtherHost => "a frame for another Ethernet address than the device's",
        Reason::LeftToOthers => {
            "another Service proxy has this connection (--takeover), or shall have it (--drain)"
        }
        Reason::Direct => {
            "the client asks for a backend itself: known, so that no other flow takes its ports, not changed"
        }
        Reason::BackendRemoved => {
            "the connection's backend is no endpoint any more, and --tcp-to-removed-backend=reset"
        }
        Reason::Tunnelled => {
            "sent on as it is, in a tunnel to the node of its backend, which answers the client itself (--mode)"
        }
        Reason::TunnelTooBig => {
            "larger than the MTU towards the backend's node, less what the tunnel takes: the sender is told"
        }
        Reason::TunnelStranger => {
            "it says that it comes out of a tunnel, and its sender is no node of the cluster as far as is known here"
        }
        Reason::TunnelBroken => "out of a tunnel of another node, with headers that Fairlead does not write",
        Reason::NoSuchBackend => {
            "another node has chosen an endpoint that is not on this one (any more); look at nodeName in its EndpointSlice"
        }
        Reason::FlowLost => {
            "of a connection whose flow is gone and whose backend was chosen at random: it is reset"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_words_of_its_own() {
        let words: BTreeSet<_> = Reason::ALL.into_iter().map(meaning).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for words in words {
            assert!(words.len() > 20 && !words.ends_with('.') && !words.contains('\n'), "{words}");
            assert!(!words.contains("  "), "{words}");
        }
    }
}
