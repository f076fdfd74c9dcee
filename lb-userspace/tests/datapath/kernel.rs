//! What this kernel has of what Fairlead uses. `cargo xtask kernels` reads the lines that this prints.

use std::path::Path;

use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Features, Place, XdpKind};
use fairlead::sys::netns;

use crate::support::{TempBpffs, TempCgroup, in_new_netns, ip};

/// Prints `feature NAME yes|no` for each, on lines of their own, and gives back which there are not.
fn print(features: &[(&str, bool)]) -> Vec<String> {
    println!();
    for (name, there) in features {
        println!("feature {name} {}", if *there { "yes" } else { "no" });
    }
    features.iter().filter(|(_, there)| !there).map(|(name, _)| (*name).to_owned()).collect()
}

#[test]
fn the_kernel_has_what_fairlead_cannot_do_without() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        ip("link add nic0 index 77 type veth peer name far0");
        ip("link set nic0 up");
        let datapath = Datapath::open(&bpffs.options()).unwrap();
        let hooks = datapath.hooks().unwrap();
        let missing = print(&[
            ("btf", Path::new("/sys/kernel/btf/vmlinux").exists()),
            ("xdp_link", hooks.attach_xdp(77, XdpKind::Native, None).is_ok()),
            ("cgroup_links", hooks.attach_sockets(Some(&cgroup.path)).is_ok()),
        ]);
        assert_eq!(missing, Vec::<String>::new());
        print(&datapath.features().named());
        let input = Input { ifindex: 77, ..Input::new(&[0; 64]) };
        print(&[
            ("netns_cookie", netns::cookie().unwrap().is_some()),
            ("xdp_test_device", test_run(datapath.programs(), Place::Xdp, input).is_ok()),
        ]);
        assert_eq!(*datapath.features(), Features::probe(), "probing is repeatable");
    });
}
