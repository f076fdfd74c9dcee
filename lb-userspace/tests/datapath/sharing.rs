//! Other programs on the same hooks: they stay where they are, and what somebody takes off comes back.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use fairlead::datapath::{Datapath, Options, TcMode, XdpKind};
use fairlead::edges::XdpMode;
use fairlead::sys::bpf::{self, AttachType, Insn, LinkTarget, ProgType, Target};
use lb_common::maps::programs;

use crate::edges::{links, run_cleanup, start, start_on, uplink};
use crate::support::{TempBpffs, TempCgroup, eventually, has_tcx, in_new_netns, ip, run};

/// Number of the uplink.
const UPLINK: u32 = 100;

/// `r0 = verdict; exit`.
fn always(verdict: i32, kind: ProgType, attach_type: Option<AttachType>) -> OwnedFd {
    let insn = |code, imm| Insn { code, regs: 0, off: 0, imm };
    bpf::prog_load(kind, attach_type, &[insn(0xb7, verdict), insn(0x95, 0)]).unwrap()
}

fn id(program: &OwnedFd) -> u32 {
    bpf::prog_info(program.as_fd()).unwrap().id
}

fn on_hook(ifindex: u32, attach_type: AttachType) -> Vec<u32> {
    bpf::prog_query(Target::Device(ifindex), attach_type).unwrap()
}

fn prog_of(pin: &Path) -> u32 {
    bpf::link_info(bpf::obj_get(pin).unwrap().as_fd()).unwrap().prog_id
}

#[test]
fn what_is_detached_comes_back() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        uplink();
        ip("link add vethpod index 200 type veth peer name eth0p");
        ip("link set vethpod up");
        let datapath = Datapath::open(&bpffs.options()).unwrap();
        let agent = start_on(&bpffs, datapath, &[], XdpMode::Native, Some(&cgroup.path));
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        let pins = bpffs.pins().join("v1/links");
        let all = links(&bpffs);
        let mut taken = vec![programs::XDP_NIC, programs::SOCKETS[0]];
        let mut detached = vec!["xdp_nic-100".to_owned(), programs::SOCKETS[0].to_owned()];
        if has_tcx("tcx links that are detached") {
            detached.push("tc_nic_in-100".into());
            // Nothing but its pin keeps this one.
            std::fs::remove_file(pins.join("tc_pod_out-200")).unwrap();
            taken.extend([programs::TC_NIC_IN, programs::TC_POD_OUT]);
        }
        for name in &detached {
            bpf::link_detach(bpf::obj_get(&pins.join(name)).unwrap().as_fd()).unwrap();
        }
        eventually("they are counted", || taken.iter().all(|program| agent.reattached(program) == 1));
        eventually("they are back", || {
            detached.iter().all(|name| {
                let link = bpf::obj_get(&pins.join(name));
                link.is_ok_and(|link| match bpf::link_info(link.as_fd()).unwrap().target {
                    LinkTarget::Xdp { ifindex } | LinkTarget::Tcx { ifindex, .. } => ifindex == UPLINK,
                    LinkTarget::Cgroup { id, .. } => id != 0,
                    LinkTarget::Other { .. } => false,
                })
            })
        });
        eventually("every link is there", || links(&bpffs) == all);
        assert_eq!(agent.view().edges[0].xdp, Some(XdpKind::Native));
        assert_eq!(agent.reattached(programs::TC_NIC_OUT), 0, "it was left alone");
    });
}

#[test]
fn filters_and_qdiscs_that_are_deleted_come_back() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        let agent = start(&bpffs, TcMode::Clsact, &[], XdpMode::Auto);
        agent.settle_on(&["eth0 external"]);
        let filters = |direction: &str| run("tc", &format!("filter show dev eth0 {direction}"));
        eventually("the filters", || filters("egress").contains("fairlead/tc_nic_out"));
        run("tc", "qdisc del dev eth0 clsact");
        eventually("both filters are back", || {
            filters("ingress").contains("fairlead/tc_nic_in")
                && filters("egress").contains("fairlead/tc_nic_out")
        });
        run("tc", "filter del dev eth0 ingress prio 7");
        eventually("the filter is back", || filters("ingress").contains("fairlead/tc_nic_in"));
        assert_eq!(agent.reattached(programs::TC_NIC_IN), 2);
        assert_eq!(agent.reattached(programs::TC_NIC_OUT), 1);
        drop(agent);
        run_cleanup(&bpffs.pins());
    });
}

#[test]
fn a_number_that_is_given_out_again_is_another_device() {
    if !has_tcx("links of devices with used numbers") {
        return;
    }
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        ip("link add vethpod index 200 type veth peer name eth0p");
        ip("link set vethpod up");
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Native);
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        let batch = bpffs.pins().with_extension("batch");
        let batch = std::env::temp_dir().join(format!(
            "{}-{}",
            std::process::id(),
            batch.file_name().unwrap().display()
        ));
        // The uplink and a pod, each in one breath, so that nobody sees them missing.
        let again = "link del eth0\nlink add eth0 index 100 type veth peer name far0\nlink set far0 up\n\
                     link set eth0 up\naddr add 192.0.2.7/24 dev eth0\n\
                     link del vethpod\nlink add vethpod index 200 type veth peer name eth0p\nlink set vethpod up\n";
        std::fs::write(&batch, again).unwrap();
        for round in 0..10 {
            ip(&format!("-batch {}", batch.display()));
            for (ifindex, attach_type) in [
                (UPLINK, AttachType::TcxIngress),
                (UPLINK, AttachType::TcxEgress),
                (200, AttachType::TcxIngress),
                (200, AttachType::TcxEgress),
            ] {
                eventually(&format!("round {round}: {attach_type:?} of {ifindex}"), || {
                    on_hook(ifindex, attach_type).len() == 1
                });
            }
            eventually(&format!("round {round}: XDP"), || ip("-d link show eth0").contains("prog/xdp"));
        }
        std::fs::remove_file(batch).unwrap();
        // Nobody took anything off.
        assert!(programs::SOCKETS.iter().all(|program| agent.reattached(program) == 0));
        assert_eq!(agent.reattached(programs::TC_POD_IN), 0);
    });
}

#[test]
fn tcx_programs_of_others_keep_their_places() {
    if !has_tcx("other programs on tcx hooks") {
        return;
    }
    in_new_netns(|| {
        const NEXT: i32 = -1;
        let bpffs = TempBpffs::new();
        uplink();
        let other = || always(NEXT, ProgType::SchedCls, None);
        let (early, late) = (other(), other());
        let put = |program: &OwnedFd, attach_type, flags| {
            bpf::link_create(program.as_fd(), Target::Device(UPLINK), attach_type, flags).unwrap()
        };
        let hooks = [AttachType::TcxIngress, AttachType::TcxEgress];
        let before = hooks.map(|hook| put(&early, hook, 0));
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Off);
        agent.settle_on(&["eth0 external"]);
        let pins = bpffs.pins().join("v1/links");
        let ours = ["tc_nic_in-100", "tc_nic_out-100"].map(|name| prog_of(&pins.join(name)));
        // Next to the wire: first of what comes in, last of what goes out.
        assert_eq!(on_hook(UPLINK, hooks[0]), [ours[0], id(&early)]);
        assert_eq!(on_hook(UPLINK, hooks[1]), [id(&early), ours[1]]);
        // Who comes later says where; nobody is moved.
        let after = [put(&late, hooks[0], bpf::TCX_LAST), put(&late, hooks[1], bpf::TCX_FIRST)];
        assert_eq!(on_hook(UPLINK, hooks[0]), [ours[0], id(&early), id(&late)]);
        assert_eq!(on_hook(UPLINK, hooks[1]), [id(&late), id(&early), ours[1]]);
        // A new agent takes the places of the old one.
        drop(agent);
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Off);
        agent.settle_on(&["eth0 external"]);
        let ours = ["tc_nic_in-100", "tc_nic_out-100"].map(|name| prog_of(&pins.join(name)));
        assert_eq!(on_hook(UPLINK, hooks[0]), [ours[0], id(&early), id(&late)]);
        assert_eq!(on_hook(UPLINK, hooks[1]), [id(&late), id(&early), ours[1]]);
        drop(agent);
        run_cleanup(&bpffs.pins());
        assert_eq!(on_hook(UPLINK, hooks[0]), [id(&early), id(&late)]);
        assert_eq!(on_hook(UPLINK, hooks[1]), [id(&late), id(&early)]);
        drop((before, after));
    });
}

#[test]
fn an_xdp_program_of_somebody_else_stays_and_is_named() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        // Any program that is not the agent's will do.
        let other = Datapath::isolated(&Options { ..bpffs.options() }).unwrap();
        let other = other.programs().get(programs::XDP_NIC).unwrap().try_clone_to_owned().unwrap();
        let pin = bpffs.pins().with_file_name("other");
        bpf::obj_pin(other.as_fd(), &pin).unwrap();
        ip(&format!("link set dev eth0 xdpdrv pinned {}", pin.display()));
        let theirs = format!("prog/xdp id {} ", id(&other));
        for mode in [XdpMode::Native, XdpMode::Generic] {
            let agent = start(&bpffs, TcMode::Auto, &[], mode);
            agent.settle_on(&["eth0 external"]);
            let view = agent.view();
            let note = view.edges[0].note.clone().unwrap_or_default();
            let line = format!("XDP on eth0 is taken by program {} (xdp_nic)", id(&other));
            assert!(note.starts_with(&line) && !note.contains('\n'), "{mode:?}: {note}");
            assert_eq!(view.edges[0].xdp, None);
            assert_eq!(agent.entries()[&UPLINK].flags, 0, "tc is told that it is on its own");
            assert!(ip("-d link show eth0").contains(&theirs), "{}", ip("-d link show eth0"));
        }
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Native);
        agent.settle_on(&["eth0 external"]);
        drop(agent);
        run_cleanup(&bpffs.pins());
        assert!(ip("-d link show eth0").contains(&theirs), "{}", ip("-d link show eth0"));

        // Once there is room, it is used.
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Native);
        agent.settle_on(&["eth0 external"]);
        ip("link set dev eth0 xdpdrv off");
        eventually("ours", || agent.view().edges[0].xdp == Some(XdpKind::Native));
        drop(agent);
        run_cleanup(&bpffs.pins());
        std::fs::remove_file(pin).unwrap();
    });
}

#[test]
fn socket_programs_share_a_cgroup_with_those_who_share() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        let dir = std::fs::File::open(&cgroup.path).unwrap();
        let hook = AttachType::Inet4Connect;
        let other = always(1, ProgType::CgroupSockAddr, Some(hook));
        let pin = bpffs.pins().with_file_name("other");
        bpf::obj_pin(other.as_fd(), &pin).unwrap();
        let bpftool = |what: &str, flags: &str| {
            let target = format!("{} connect4 pinned {}", cgroup.path.display(), pin.display());
            run("bpftool", &format!("cgroup {what} {target} {flags}"))
        };
        let there = || bpf::prog_query(Target::Cgroup(dir.as_fd()), hook).unwrap();
        bpftool("attach", "multi");
        let datapath = Datapath::open(&bpffs.options()).unwrap();
        let hooks = datapath.hooks().unwrap();
        hooks.attach_sockets(Some(&cgroup.path)).unwrap();
        assert_eq!(there().len(), 2);
        hooks.detach_sockets().unwrap();
        assert_eq!(there(), [id(&other)], "the other one stays");
        bpftool("detach", "");

        // One that shares with nobody.
        bpftool("attach", "");
        let refused = hooks.attach_sockets(Some(&cgroup.path)).unwrap_err().to_string();
        assert!(refused.contains("another program does not share the hook"), "{refused}");
        assert_eq!(there(), [id(&other)]);
        bpftool("detach", "");
        std::fs::remove_file(pin).unwrap();
    });
}
