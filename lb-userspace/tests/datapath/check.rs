//! `fairlead check` on hooks where somebody else's programs are.

use std::os::fd::AsFd as _;

use fairlead::check::{self, Node, State};
use fairlead::edges::Rules;
use fairlead::sys::bpf::{self, AttachType, Insn, ProgType, Target};

use crate::support::{TempBpffs, TempCgroup, has_tcx, in_new_netns, ip};

#[test]
fn programs_of_others_are_named() {
    in_new_netns(|| {
        if !has_tcx("programs of others at tcx") {
            return;
        }
        let (bpffs, cgroup) = (TempBpffs::new(), TempCgroup::new());
        ip("link add veth0 index 77 type veth peer name far0");
        ip("link set veth0 up");
        let return_one =
            [Insn { code: 0xb7, regs: 0, off: 0, imm: 1 }, Insn { code: 0x95, regs: 0, off: 0, imm: 0 }];
        let load = |kind, attach_type| bpf::prog_load(kind, attach_type, &return_one).unwrap();
        let tc = load(ProgType::SchedCls, None);
        let _link = bpf::link_create(tc.as_fd(), Target::Device(77), AttachType::TcxEgress, 0).unwrap();
        let connect = AttachType::Inet4Connect;
        let socket = load(ProgType::CgroupSockAddr, Some(connect));
        let directory = std::fs::File::open(&cgroup.path).unwrap();
        let _link = bpf::link_create(socket.as_fd(), Target::Cgroup(directory.as_fd()), connect, 0).unwrap();

        let node = Node {
            bpffs: bpffs.pins(),
            cgroup_root: Some(cgroup.path.clone()),
            rules: Rules::new(&[], &[]).unwrap(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let findings = runtime.block_on(check::look(&node));
        let warned: Vec<&str> = findings
            .iter()
            .filter(|finding| finding.check == "hooks" && finding.state == State::Warn)
            .map(|finding| finding.found.as_str())
            .collect();
        assert_eq!(warned.len(), 2, "{findings:?}");
        assert!(warned[0].ends_with("at TcxEgress of veth0"), "{warned:?}");
        assert!(warned[1].contains("at connect() of "), "{warned:?}");
    });
}
