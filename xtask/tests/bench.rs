//! That `cargo xtask bench` measures what it says: every group runs with next to no packets, and each row has samples.
//! How large they are is nobody's business here. Needs root.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use xtask::bench::results::Series;
use xtask::bench::{Group, Programs, Scale, run};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

fn programs() -> Programs {
    let beside = |name: &str| Path::new(XTASK).with_file_name(name);
    let programs = Programs {
        agent: std::env::var_os("FAIRLEAD_BIN").map_or_else(|| beside("fairlead"), PathBuf::from),
        bench: beside("lb-bench"),
        xtask: XTASK.into(),
        kube_proxy: None,
    };
    for program in [&programs.agent, &programs.bench] {
        assert!(program.exists(), "there is no {}: run `cargo xtask test`", program.display());
    }
    programs
}

/// Measures a group; every series has samples, and they are numbers.
fn measure(group: Group) -> Vec<Series> {
    measure_with(group, &programs())
}

fn measure_with(group: Group, programs: &Programs) -> Vec<Series> {
    let all = run(group, Scale::Smoke, programs).unwrap_or_else(|error| panic!("{error:?}"));
    for series in &all {
        assert!(!series.samples.is_empty() && series.samples.iter().all(|s| s.is_finite()), "{series:?}");
        assert!(series.summary().is_some());
    }
    all
}

fn whats(all: &[Series], variant: &str) -> BTreeSet<String> {
    all.iter().filter(|series| series.variant == variant).map(|series| series.what.clone()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn packets_are_measured_above_their_floor() {
    let all = measure(Group::Packet);
    let (measured, floors) = (whats(&all, "fairlead"), whats(&all, "floor"));
    assert!(floors.is_subset(&measured) && floors.len() == 17, "{floors:?}");
    assert_eq!(&measured - &floors, set(&["live-nodeport-there"]));
    assert_eq!(whats(&all, "swap-and-tx"), set(&["live-nodeport-there"]));
    for (family, flows, services) in [("IPv4", "100", "1"), ("IPv6", "1", "10")] {
        let is_there = |series: &&Series| {
            series.what == "nodeport-here"
                && (series.axis("family"), series.axis("flows"), series.axis("services"))
                    == (family, flows, services)
        };
        // And its floor.
        assert_eq!(all.iter().filter(is_there).count(), 2, "{family} {flows} {services}");
    }
}

#[test]
fn flows_begin_until_their_table_is_full_and_beyond() {
    let all = measure(Group::Flows);
    assert_eq!(whats(&all, "fairlead"), set(&["handshake", "sweep-time", "sweep-cpu"]));
    assert_eq!(all.iter().filter(|series| series.axis("flows") == "beyond").count(), 2);
}

#[test]
fn programs_like_those_of_others_are_measured_beside_ours() {
    let all = measure(Group::Compare);
    assert_eq!(whats(&all, "katran-like"), set(&["nodeport-there", "live-nodeport-there"]));
    assert_eq!(whats(&all, "fairlead"), set(&["nodeport-here", "nodeport-there", "live-nodeport-there"]));
}

#[test]
fn kinds_of_maps_are_measured_on_one_cpu_and_on_all() {
    let all = measure(Group::Maps);
    assert_eq!(whats(&all, "lru"), set(&["lookup", "touch", "insert", "insert-full"]));
    assert_eq!(whats(&all, "lru-list-per-cpu"), set(&["insert", "insert-full"]));
    for kind in ["array", "hash", "lpm-trie"] {
        assert!(whats(&all, kind).contains("lookup"), "{kind}");
    }
    let is_alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
    let at_once = all.iter().filter(|series| series.axis("cpus") != "1").count();
    assert!(at_once == 7 || (is_alone && at_once == 0), "{all:?}");
}

#[test]
fn sockets_are_measured_with_every_proxy() {
    let all = measure(Group::Sockets);
    let every = set(&["connect", "request", "stream", "datagram", "stream-no-offloads"]);
    let rules = ["nftables-1", "nftables-10", "iptables-1", "iptables-10"];
    let proxies = [&["direct", "tc", "tc-10", "socket-lb", "socket-lb-10"][..], &rules].concat();
    for proxy in &proxies {
        assert_eq!(whats(&all, proxy), every, "{proxy}");
    }
    for family in ["IPv4", "IPv6"] {
        let of_family = all.iter().filter(|series| series.axis("family") == family);
        let outside = of_family.filter(|series| series.axis("way") == "outside");
        assert_eq!(outside.count(), (proxies.len() - 2) * 4, "{family}");
    }
    let answered_directly: Vec<&Series> = all.iter().filter(|series| series.variant == "tc-dsr").collect();
    assert!(answered_directly.iter().all(|series| series.axis("way") == "outside, other node"), "{all:?}");
    assert_eq!(answered_directly.len(), 2 * 4);
    assert!(all.iter().all(|series| series.samples.iter().all(|sample| *sample > 0.0)), "{all:?}");
}

/// Writes its arguments to a file, and has rules as kube-proxy's would end up. Pods have addresses in their order.
const KUBE_PROXY: &str = r#"#!/bin/sh
echo "$@" > "$0.arguments"
rules() {
    echo "table $1 kube-proxy {
        chain nat-prerouting {
            type nat hook prerouting priority dstnat;
            $1 daddr $2 meta l4proto { tcp, udp } th dport 80 dnat to $4:8080
            $1 daddr $3 meta l4proto { tcp, udp } th dport 80 dnat to $5:8080
            fib daddr type local meta l4proto { tcp, udp } th dport 30001 dnat to $4:8080
            fib daddr type local meta l4proto { tcp, udp } th dport 30002 dnat to $5:8080
        }
        chain nat-postrouting { type nat hook postrouting priority srcnat; ct status dnat masquerade; }
    }"
}
rules ip6 fd00:10:96::1 fd00:10:96::2 '[fd00:10:244:1::b]' '[fd00:10:244:2::a]' | nft -f - || exit
rules ip 10.96.0.1 10.96.0.2 10.244.1.11 10.244.2.10 | nft -f - || exit
exec sleep 3600
"#;

fn kube_proxy(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("kube-proxy");
    fs::write(&path, text).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    path
}

#[test]
fn a_kube_proxy_is_measured_beside_fairlead() {
    let dir = tempfile::tempdir().unwrap();
    let path = kube_proxy(dir.path(), KUBE_PROXY);
    let all = measure_with(Group::Compare, &Programs { kube_proxy: Some(path.clone()), ..programs() });
    let every = set(&["connect", "request", "stream", "datagram", "stream-no-offloads"]);
    assert_eq!(whats(&all, "kube-proxy"), every);
    assert_eq!(whats(&all, "tc"), every);
    assert!(!whats(&all, "katran-like").is_empty());
    assert!(all.iter().all(|series| series.group == "compare"));
    let arguments = fs::read_to_string(path.with_extension("arguments")).unwrap();
    assert!(
        arguments.contains("--proxy-mode=nftables") && arguments.contains("--master=http://"),
        "{arguments}"
    );
}

#[test]
fn a_kube_proxy_that_does_not_start_is_one_message() {
    let dir = tempfile::tempdir().unwrap();
    let broken = kube_proxy(dir.path(), "#!/bin/sh\necho starting\necho unknown flag >&2\nexit 3\n");
    let missing = dir.path().join("missing");
    for (path, why) in
        [(broken, "has ended (exit status: 3); it said last: unknown flag"), (missing, "cannot be started")]
    {
        let programs = Programs { kube_proxy: Some(path.clone()), ..programs() };
        let error = run(Group::Compare, Scale::Smoke, &programs).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn the_agent_is_measured_with_many_services() {
    let all = measure(Group::Control);
    for source in ["manifests", "API"] {
        let all: Vec<_> = all.iter().filter(|series| series.axis("source") == source).cloned().collect();
        let measured = whats(&all, "fairlead");
        for what in ["cold start", "start with full maps", "one endpoint changed, p99", "memory of the maps"]
        {
            assert!(measured.contains(what), "{source}, {what}: {measured:?}");
        }
        let rolled = all.iter().find(|series| series.what.starts_with("1,000 endpoints rolled over, a step"));
        assert_eq!(rolled.map(|series| series.samples.len()), Some(100));
    }
}
