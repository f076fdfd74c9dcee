//! What a starting agent finds, takes over, or refuses; and what cleanup leaves.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use aya::maps::HashMap;
use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, OpenError, Options, Place, SOCKET_PROGRAMS, Sizes, XdpKind, cleanup};
use fairlead::datapath::{node, program_names};
use fairlead::sys::bpf::{self, AttachType, LinkTarget, Target};
use fairlead::sys::sysctl;
use lb_common::maps::MAPS;

use crate::support::{OtherNetns, TempBpffs, TempCgroup, has_tcx, in_new_netns, ip};

fn run_cleanup(path: &Path) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(cleanup(path)).unwrap()
}

fn link(path: &Path) -> bpf::LinkInfo {
    bpf::link_info(bpf::obj_get(path).unwrap().as_fd()).unwrap()
}

#[test]
fn pins_have_the_names_of_the_specification_and_belong_to_root_alone() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let datapath = Datapath::open(&bpffs.options()).unwrap();
        let mut expected: Vec<String> = MAPS.iter().map(|spec| format!("agent/v1/{}", spec.name)).collect();
        expected.extend(program_names().map(|name| format!("agent/v1/progs/{name}")));
        expected.sort();
        assert_eq!(bpffs.files(), expected);
        let mode = |path: &str| {
            let path = bpffs.pins().parent().unwrap().join(path);
            fs::metadata(path).unwrap().permissions().mode() & 0o777
        };
        for file in &expected {
            assert_eq!(mode(file), 0o600, "{file}");
        }
        for dir in ["agent", "agent/v1", "agent/v1/progs", "agent/v1/links"] {
            assert_eq!(mode(dir), 0o700, "{dir}");
        }
        for (name, program) in datapath.programs().iter() {
            let info = bpf::prog_info(program).unwrap();
            assert!(name.starts_with(info.name.as_str()) && !info.name.is_empty(), "{name} {info:?}");
        }
    });
}

#[test]
fn only_one_agent_at_a_time() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let first = Datapath::open(&bpffs.options()).unwrap();
        assert!(matches!(Datapath::open(&bpffs.options()), Err(OpenError::Busy { .. })));
        drop(first);
        Datapath::open(&bpffs.options()).unwrap();
    });
}

#[test]
fn another_layout_is_refused_and_left_alone() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        fs::create_dir_all(bpffs.pins().join("v1")).unwrap();
        let other = HashMap::<_, u32, u32>::create(256, 1).unwrap();
        other.pin(bpffs.pins().join("v1/SERVICES4")).unwrap();
        let error = Datapath::open(&bpffs.options()).err().unwrap().to_string();
        assert!(error.contains("SERVICES4") && error.contains("key size 4 instead of 8"), "{error}");
        assert!(!error.contains('\n'), "{error}");
        assert_eq!(bpffs.files(), ["agent/v1/SERVICES4"]);
    });
}

#[test]
fn another_size_is_kept_unless_it_was_asked_for() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        drop(Datapath::open(&bpffs.options()).unwrap());
        let flags = |services| Sizes { services, flows: None, backends: None };
        let kept = Datapath::open(&Options { sizes: flags(None), ..bpffs.options() }).unwrap();
        let limits = fairlead::datapath::Maps::limits(&kept.maps().unwrap());
        assert_eq!((limits.services, limits.backends, limits.slots), (256, 256, 4096));
        drop(kept);
        let asked = Datapath::open(&Options { sizes: flags(Some(512)), ..bpffs.options() }).unwrap();
        let limits = fairlead::datapath::Maps::limits(&asked.maps().unwrap());
        assert_eq!((limits.services, limits.backends, limits.slots), (512, 256, 4096));
        drop(asked);
        let same = Datapath::open(&Options { sizes: flags(Some(256)), ..bpffs.options() });
        same.unwrap();
    });
}

#[test]
fn a_restart_replaces_programs_in_their_links() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        ip("link add nic0 type veth peer name far0");
        ip("link set nic0 up");
        let ifindex = index("nic0");
        let tcx = has_tcx("programs in tcx links");
        let attach = || {
            let datapath = Datapath::open(&bpffs.options()).unwrap();
            let hooks = datapath.hooks().unwrap();
            let observed = None;
            if tcx {
                hooks.attach_tcx(ifindex, Place::NicIn).unwrap();
                hooks.attach_tcx(ifindex, Place::NicOut).unwrap();
            }
            hooks.attach_xdp(ifindex, XdpKind::Native, observed).unwrap();
            hooks.attach_sockets(Some(&cgroup.path)).unwrap();
            hooks
        };
        let links = bpffs.pins().join("v1/links");
        let tc: &[&str] = if tcx { &["tc_nic_in", "tc_nic_out"] } else { &[] };
        let names: Vec<String> = tc
            .iter()
            .map(|program| format!("{program}-{ifindex}"))
            .chain(SOCKET_PROGRAMS.iter().map(|(name, _)| (*name).to_owned()))
            .collect();
        let infos = || names.iter().map(|name| link(&links.join(name))).collect::<Vec<_>>();
        drop(attach());
        let before = infos();
        drop(attach());
        let after = infos();
        for (name, (before, after)) in names.iter().zip(before.iter().zip(&after)) {
            assert_eq!((before.id, before.target), (after.id, after.target), "{name}");
            assert_ne!(before.prog_id, after.prog_id, "{name}");
        }
        for attach_type in [AttachType::TcxIngress, AttachType::TcxEgress].into_iter().filter(|_| tcx) {
            let programs = bpf::prog_query(Target::Device(ifindex), attach_type).unwrap();
            assert_eq!(programs.len(), 1, "{attach_type:?}");
        }
    });
}

#[test]
fn a_link_whose_target_is_another_one_now_is_made_anew() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let datapath = Datapath::open(&bpffs.options()).unwrap();
        let hooks = datapath.hooks().unwrap();
        let links = bpffs.pins().join("v1/links");

        let (first, second) = (TempCgroup::new(), TempCgroup::new());
        hooks.attach_sockets(Some(&first.path)).unwrap();
        let before = link(&links.join("sock_connect4"));
        drop(first);
        hooks.attach_sockets(Some(&second.path)).unwrap();
        let after = link(&links.join("sock_connect4"));
        assert_ne!(before.target, after.target);
        assert!(matches!(after.target, LinkTarget::Cgroup { .. }));

        hooks.detach_sockets().unwrap();
        assert!(!links.join("sock_connect4").exists());

        if !has_tcx("tcx links") {
            return;
        }
        ip("link add nic0 index 77 type veth peer name far0");
        hooks.attach_tcx(77, Place::PodIn).unwrap();
        let before = link(&links.join("tc_pod_in-77"));
        ip("link del nic0");
        ip("link add nic1 index 77 type veth peer name far1");
        hooks.attach_tcx(77, Place::PodIn).unwrap();
        let after = link(&links.join("tc_pod_in-77"));
        assert_ne!(before.id, after.id);
        assert!(matches!(after.target, LinkTarget::Tcx { ifindex: 77, .. }));

        // The device took its program along into another namespace; its number is given out again here.
        let elsewhere = OtherNetns::new();
        elsewhere.take("nic1");
        ip("link add nic2 index 77 type veth peer name far2");
        hooks.attach_tcx(77, Place::PodIn).unwrap();
        assert_ne!(link(&links.join("tc_pod_in-77")).id, after.id);
        let here = bpf::prog_query(Target::Device(77), AttachType::TcxIngress).unwrap();
        assert_eq!(here.len(), 1);
        drop(elsewhere);
    });
}

#[test]
fn cleanup_leaves_nothing_and_may_be_repeated() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        ip("link add nic0 type veth peer name far0");
        let ifindex = index("nic0");
        let before = sysctl::read(sysctl::RESERVED_PORTS).unwrap();
        sysctl::write(sysctl::RESERVED_PORTS, "100,12288-12300").unwrap();
        {
            let datapath = Datapath::open(&bpffs.options()).unwrap();
            let hooks = datapath.hooks().unwrap();
            if has_tcx("cleanup of tcx links") {
                hooks.attach_tcx(ifindex, Place::NicIn).unwrap();
            }
            hooks.attach_xdp(ifindex, XdpKind::Generic, None).unwrap();
            hooks.attach_sockets(Some(&cgroup.path)).unwrap();
            let state = node::StateFile::new(&bpffs.pins());
            node::reserve_ports(&state).unwrap();
            // A second start must not forget what the first one added.
            node::reserve_ports(&state).unwrap();
            assert_eq!(sysctl::read(sysctl::RESERVED_PORTS).unwrap(), "100,12288-28671");
            let error = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(cleanup(&bpffs.pins()));
            assert!(error.unwrap_err().to_string().contains("stop it first"));
        }
        let done = run_cleanup(&bpffs.pins());
        let attached = if has_tcx("") { "tc_nic_in" } else { "xdp_nic" };
        assert!(done.iter().any(|line| line.contains(attached)), "{done:?}");
        assert_eq!(bpffs.files(), Vec::<String>::new());
        assert!(!bpffs.pins().exists());
        assert_eq!(sysctl::read(sysctl::RESERVED_PORTS).unwrap(), "100,12288-12300");
        assert!(!ip("-d link show nic0").contains("xdp"));
        assert_eq!(run_cleanup(&bpffs.pins()), Vec::<String>::new());
        assert_eq!(sysctl::read(sysctl::RESERVED_PORTS).unwrap(), "100,12288-12300");
        sysctl::write(sysctl::RESERVED_PORTS, &before).unwrap();
    });
}

#[test]
fn every_packet_program_can_be_run_on_a_packet_of_ours() {
    in_new_netns(|| {
        ip("link add nic0 type veth peer name far0");
        ip("link set nic0 up");
        let datapath = Datapath::isolated(&Options { sizes: crate::support::small(), ..Options::default() });
        let datapath = datapath.unwrap();
        // Not IP: passes untouched everywhere.
        let mut frame = [0_u8; 64];
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        for place in Place::ALL {
            let pass = if place == Place::Xdp { 2 } else { u32::MAX };
            for ifindex in [0, index("nic0")] {
                if place == Place::Xdp && ifindex != 0 {
                    // A veth has receive queues for XDP only while it has an XDP program.
                    continue;
                }
                let input = Input { ifindex, mark: 5, repeat: 3, ..Input::new(&frame) };
                let output = test_run(datapath.programs(), place, input).unwrap();
                assert!(output.verdict == pass || output.verdict == 0, "{place:?}: {output:?}");
                assert_eq!(output.frame, frame, "{place:?}");
            }
        }
    });
}

fn index(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}
