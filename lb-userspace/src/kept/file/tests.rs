use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::entries::{Algorithm, Family, Mode, Protocol, ServiceName};
use crate::model::{
    Endpoint, EndpointSlice, Hints, HostPort, Ignored, Node, Objects, Pod, Policy, Service, ServicePort,
    ServiceType, SliceName, SlicePort,
};
use crate::owner::PodName;

fn text() -> impl Strategy<Value = String> {
    ".{0,12}"
}

fn boxed() -> impl Strategy<Value = Box<str>> {
    text().prop_map(String::into_boxed_str)
}

fn names() -> impl Strategy<Value = (Arc<str>, Arc<str>)> {
    (text(), text()).prop_map(|(namespace, name)| (namespace.into(), name.into()))
}

fn nets() -> impl Strategy<Value = IpNet> {
    (any::<IpAddr>(), 0..=32_u8).prop_map(|(addr, len)| IpNet::new(addr, len).unwrap())
}

fn protocols() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

fn policies() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![Policy::Cluster, Policy::Local])
}

fn families() -> impl Strategy<Value = Family> {
    prop::sample::select(vec![Family::V4, Family::V6])
}

prop_compose! {
    fn service_ports()(name in text(), port: u16, protocol in protocols(), node_port: Option<u16>) -> ServicePort {
        ServicePort { name, port, protocol, node_port }
    }
}

prop_compose! {
    fn services()(
        (namespace, name) in names(),
        uid in boxed(),
        created: i64,
        kind in prop::sample::select(vec![
            ServiceType::ClusterIP, ServiceType::NodePort, ServiceType::LoadBalancer, ServiceType::ExternalName,
        ]),
        ignored in option::of(prop::sample::select(vec![
            Ignored::Headless, Ignored::ExternalName, Ignored::OtherProxy,
        ])),
        families in vec(families(), 0..3),
        [cluster_ips, external_ips, load_balancer_ips] in [
            vec(any::<IpAddr>(), 0..3), vec(any::<IpAddr>(), 0..3), vec(any::<IpAddr>(), 0..3),
        ],
        source_ranges in btree_map(families(), btree_set(nets(), 0..3), 0..2),
        ports in vec(service_ports(), 0..3),
        affinity: Option<u32>,
        [internal_policy, external_policy] in [policies(), policies()],
        (health_port, algorithm, mode) in (
            any::<Option<u16>>(), option::of(prop::sample::select(vec![Algorithm::Random, Algorithm::Maglev])),
            option::of(prop::sample::select(vec![Mode::Snat, Mode::Dsr, Mode::Hybrid])),
        ),
    ) -> Service {
        Service {
            uid, created, kind, ignored, families, cluster_ips, external_ips, load_balancer_ips, source_ranges, ports,
            affinity, internal_policy, external_policy, health_port, algorithm, mode,
            ..Service::named(ServiceName { namespace, name })
        }
    }
}

prop_compose! {
    fn endpoints()(
        addr: IpAddr, ready: bool, serving: bool, terminating: bool, node in option::of(boxed()),
        hints in option::of((vec(boxed(), 0..3), vec(boxed(), 0..3))),
    ) -> Endpoint {
        let hints = hints.map(|(zones, nodes)| Box::new(Hints { zones, nodes }));
        Endpoint { addr, ready, serving, terminating, node: node.map(Arc::from), hints }
    }
}

prop_compose! {
    fn slices()(
        (namespace, name) in names(),
        service in option::of(names()),
        ports in vec((text(), any::<u16>(), protocols()), 0..3),
        endpoints in vec(endpoints(), 0..4),
        triggered: Option<i64>,
    ) -> EndpointSlice {
        EndpointSlice {
            name: SliceName { namespace, name },
            service: service.map(|(namespace, name)| ServiceName { namespace, name }),
            ports: ports.into_iter().map(|(name, port, protocol)| SlicePort { name, port, protocol }).collect(),
            endpoints, triggered, findings: vec![],
        }
    }
}

prop_compose! {
    fn pods()(
        (namespace, name) in names(), created: i64, node in option::of(boxed()), addrs in vec(any::<IpAddr>(), 0..3),
        ports in vec((text(), any::<[u16; 2]>(), any::<Option<IpAddr>>(), protocols()), 0..3),
    ) -> Pod {
        let ports = ports.into_iter().map(|(name, [host_port, container_port], host_ip, protocol)| HostPort {
            name, host_port, host_ip, container_port, protocol,
        });
        Pod { created, node, addrs, ports: ports.collect(), ..Pod::named(PodName { namespace, name }) }
    }
}

prop_compose! {
    fn nodes()(
        name in text(), zone in option::of(text()), addresses in vec(any::<IpAddr>(), 0..3),
        pod_cidrs in vec(nets(), 0..3), deleting: bool, to_be_deleted: bool,
    ) -> Node {
        Node { name, zone, addresses, pod_cidrs, deleting, to_be_deleted }
    }
}

prop_compose! {
    fn everything()(
        node in text(), cluster: Option<u32>, saved: i64,
        services in vec(services().prop_map(Arc::new), 0..4),
        slices in vec(slices().prop_map(Arc::new), 0..4),
        pods in vec(pods().prop_map(Arc::new), 0..3),
        this_node in option::of(nodes()),
        peers in btree_map(text(), vec(any::<IpAddr>(), 0..3), 0..3),
        service_cidrs in option::of(vec((text(), vec(nets(), 0..3)), 0..3)),
    ) -> Kept {
        let objects = Objects { services, slices, pods, node: this_node, peers, service_cidrs };
        Kept { identity: Identity { node, cluster }, saved, objects }
    }
}

/// One of each.
fn sample() -> Kept {
    let name = |name: &str| ServiceName { namespace: "ns".into(), name: name.into() };
    let hints = Some(Box::new(Hints { zones: vec!["z1".into()], nodes: vec!["node-a".into()] }));
    let service = Service {
        uid: "u-1".into(),
        created: 1_700_000_000,
        kind: ServiceType::LoadBalancer,
        families: vec![Family::V4, Family::V6],
        cluster_ips: vec!["172.30.0.1".parse().unwrap(), "fd00:30::1".parse().unwrap()],
        source_ranges: [(Family::V4, ["10.0.0.0/8".parse().unwrap()].into())].into(),
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            node_port: Some(30_080),
        }],
        affinity: Some(10),
        external_policy: Policy::Local,
        health_port: Some(30_000),
        algorithm: Some(Algorithm::Maglev),
        mode: Some(Mode::Dsr),
        ..Service::named(name("a"))
    };
    let slice = EndpointSlice {
        name: SliceName { namespace: "ns".into(), name: "a-1".into() },
        service: Some(name("a")),
        ports: vec![SlicePort { name: "http".into(), port: 8080, protocol: Protocol::Tcp }],
        endpoints: vec![Endpoint {
            hints,
            node: Some("node-a".into()),
            ..Endpoint::ready([10, 0, 0, 1].into())
        }],
        triggered: Some(1_700_000_000_000),
        findings: vec![],
    };
    let pod_port = HostPort {
        name: "dns".into(),
        host_port: 53,
        host_ip: Some([192, 0, 2, 1].into()),
        container_port: 5353,
        protocol: Protocol::Udp,
    };
    let pod = Pod {
        created: 1,
        node: Some("node-a".into()),
        addrs: vec![[10, 0, 0, 7].into()],
        ports: vec![pod_port],
        ..Pod::named(PodName { namespace: "ns".into(), name: "p".into() })
    };
    let node = Node {
        zone: Some("z1".into()),
        addresses: vec![[192, 0, 2, 1].into()],
        pod_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
        ..Node::named("node-a")
    };
    Kept {
        identity: Identity { node: "node-a".into(), cluster: Some(7) },
        saved: 1_700_000_000,
        objects: Objects {
            services: vec![Arc::new(service)],
            slices: vec![Arc::new(slice)],
            pods: vec![Arc::new(pod)],
            node: Some(node),
            peers: [("node-b".into(), vec![[192, 0, 2, 2].into()])].into(),
            service_cidrs: Some(vec![("k".into(), vec!["172.30.0.0/16".parse().unwrap()])]),
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_kept_comes_back(kept in everything()) {
        prop_assert_eq!(decode(&encode(&kept).unwrap()).unwrap(), kept);
    }

    #[test]
    fn any_bytes_are_refused_in_peace(bytes in vec(any::<u8>(), 0..200), header: bool) {
        let mut file = if header { encode(&sample()).unwrap()[..HEADER].to_vec() } else { vec![] };
        file.extend(bytes);
        prop_assert!(decode(&file).is_err());
    }

    /// The checksum is right, and what it is of is not.
    #[test]
    fn any_content_is_refused_or_understood(bytes in vec(any::<u8>(), 0..200)) {
        let fields = [&crc32fast::hash(&bytes).to_le_bytes()[..], &(bytes.len() as u64).to_le_bytes()].concat();
        let _ = decode(&[&MAGIC[..], &VERSION.to_le_bytes(), &fields, &bytes].concat());
    }
}

#[test]
fn a_file_that_ends_early_or_late_is_refused() {
    let mut bytes = encode(&sample()).unwrap();
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
    }
    bytes.push(0);
    assert!(matches!(decode(&bytes), Err(Error::Damaged)));
}

#[test]
fn a_bit_that_flips_is_found() {
    let mut bytes = encode(&sample()).unwrap();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(decode(&bytes).unwrap(), sample());
}

#[test]
fn another_version_is_named() {
    let mut bytes = encode(&sample()).unwrap();
    bytes[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
    let error = decode(&bytes).unwrap_err().to_string();
    assert_eq!(error, "it has version 3 of the format, and this Fairlead knows 2");
}

/// Who sees this fail has changed what is kept: raise [`VERSION`], then note the new number here.
#[test]
fn a_version_is_one_format() {
    let bytes = encode(&sample()).unwrap();
    assert_eq!((VERSION, bytes.len(), crc32fast::hash(&bytes)), (2, 264, 2_295_774_515));
}

/// 10,000 Services with 100,000 endpoints.
#[test]
fn a_large_cluster_is_a_small_file() {
    let one = sample();
    let (service, slice) = (&one.objects.services[0], &one.objects.slices[0]);
    let uid: Box<str> = "a".repeat(36).into();
    let mut kept = one.clone();
    for n in 0..10_000 {
        let name = ServiceName { namespace: "default".into(), name: format!("service-{n}").into() };
        let service = Service { name: name.clone(), uid: uid.clone(), ..Service::clone(service) };
        let endpoint = |e: u8| Endpoint {
            node: Some(format!("node-{}", n % 100).into()),
            ..Endpoint::ready([10, 1, e, 1].into())
        };
        let slice_name = SliceName { namespace: "default".into(), name: format!("service-{n}-x7k2p").into() };
        let endpoints = (0..10).map(endpoint).collect();
        let slice =
            EndpointSlice { name: slice_name, service: Some(name), endpoints, ..EndpointSlice::clone(slice) };
        kept.objects.services.push(Arc::new(service));
        kept.objects.slices.push(Arc::new(slice));
    }
    let bytes = encode(&kept).unwrap();
    assert!((3 << 20..5 << 20).contains(&bytes.len()), "{}", bytes.len());
    assert_eq!(decode(&bytes).unwrap(), kept);
}

struct Place {
    dir: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lib/state");
    Place { dir, path }
}

fn error(path: &Path) -> String {
    read(path, &sample().identity).unwrap_err().to_string()
}

#[test]
fn a_file_is_replaced_as_a_whole() {
    let Place { dir, path } = place();
    assert_eq!(read(&path, &sample().identity).unwrap(), None);
    write(&path, &sample()).unwrap();
    let later = Kept { saved: 9, ..sample() };
    // What a crash has left behind, or somebody has put there.
    symlink(dir.path().join("elsewhere"), unfinished(&path)).unwrap();
    write(&path, &later).unwrap();
    assert_eq!(read(&path, &sample().identity).unwrap(), Some(later));
    assert!(!unfinished(&path).exists() && !dir.path().join("elsewhere").exists());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert!(remove(&path).unwrap() && !remove(&path).unwrap());
    assert_eq!(read(&path, &sample().identity).unwrap(), None);
}

#[test]
fn what_is_of_no_use_is_said() {
    let Place { dir, path } = place();
    write(&path, &sample()).unwrap();
    let other = |node: &str, cluster| Identity { node: node.into(), cluster };
    let error_for = |identity| read(&path, &identity).unwrap_err().to_string();
    assert_eq!(error_for(other("node-b", Some(7))), "it is of node \"node-a\"");
    assert_eq!(error_for(other("node-a", Some(8))), "it is of a cluster with another certificate authority");
    assert_eq!(error_for(other("node-a", None)), "it is of a cluster with another certificate authority");
    assert_eq!(error(dir.path()), "it is no file");
    fs::write(&path, b"nonsense").unwrap();
    assert_eq!(error(&path), "nothing of Fairlead's is in it");
    fs::write(&path, b"").unwrap();
    assert_eq!(error(&path), "nothing of Fairlead's is in it");
    File::options().write(true).open(&path).unwrap().set_len(LIMIT + 1).unwrap();
    assert_eq!(error(&path), format!("it has {} bytes, more than {LIMIT}", LIMIT + 1));
}

#[test]
fn a_place_that_takes_no_file_is_an_error_and_loses_nothing() {
    let Place { dir, path } = place();
    write(&path, &sample()).unwrap();
    // Root may write to a directory that nobody may write to: a directory in the way stops even root.
    fs::create_dir(unfinished(&path)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(write(&path, &Kept { saved: 9, ..sample() }).is_err());
    assert_eq!(read(&path, &sample().identity).unwrap(), Some(sample()));
    assert!(write(&path.join("below/a/file"), &sample()).is_err());
}
