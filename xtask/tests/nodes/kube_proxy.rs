//! What kube-proxy leaves on a node, removed by `fairlead cleanup --kube-proxy`, and nothing else.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::{Lab, Node};

use crate::world::{XTASK, agent};

const TOOLS: [&str; 4] = ["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"];

/// Of a container engine, a CNI plugin, kubelet and an administrator.
const OTHERS: &str = r#"*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-DROP - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "KUBE-SERVICES, \"not kubernetes \" -j KUBE-SERVICES" -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:KUBE-FIREWALL - [0:0]
:MY-KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes is not meant" -j MY-KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
COMMIT
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
"#;

/// As kube-proxy writes them in iptables mode: a Service with one endpoint, affinity, a load balancer and a node port.
const KUBE_PROXY: &str = r#"*nat
:KUBE-EXT-AQI2S6QIMU7PVVRP - [0:0]
:KUBE-FW-AQI2S6QIMU7PVVRP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-3JOIVZTXZZRGORX4 - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-AQI2S6QIMU7PVVRP - [0:0]
:KUBE-SVL-AQI2S6QIMU7PVVRP - [0:0]
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-EXT-AQI2S6QIMU7PVVRP -m comment --comment "masquerade traffic for ns/svc:p external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-AQI2S6QIMU7PVVRP -j KUBE-SVC-AQI2S6QIMU7PVVRP
-A KUBE-FW-AQI2S6QIMU7PVVRP -j KUBE-EXT-AQI2S6QIMU7PVVRP
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-NODEPORTS -p tcp -m comment --comment "ns/svc:p" -m tcp --dport 30001 -j KUBE-EXT-AQI2S6QIMU7PVVRP
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SEP-3JOIVZTXZZRGORX4 -p tcp -m comment --comment "ns/svc:p" -m tcp -j DNAT --to-destination :8080
-A KUBE-SERVICES -p tcp -m comment --comment "ns/svc:p cluster IP" -m tcp --dport 80 -j KUBE-SVC-AQI2S6QIMU7PVVRP
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-AQI2S6QIMU7PVVRP -m comment --comment "ns/svc:p -> 10.0.1.3:8080" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-3JOIVZTXZZRGORX4
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-I INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-I INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-I INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-I FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-I FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-NODEPORTS -p tcp -m comment --comment "ns/svc health check node port" -m tcp --dport 31000 -j ACCEPT
-A KUBE-SERVICES -p tcp -m comment --comment "ns/none has no endpoints" -m tcp --dport 81 -j REJECT
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"#;

const NFTABLES: &str = "\
    table ip kube-proxy { map service-ips { type ipv4_addr : verdict\n}
    chain services { ip daddr vmap @service-ips\n}
    chain nat-prerouting { type nat hook prerouting priority dstnat\njump services\n}\n}
    table ip6 kube-proxy { chain services {\n}\n}\n";

/// Tables whose names are nearly kube-proxy's.
const OTHER_TABLES: &str = "\
    table inet kube-proxy { chain mine {\n}\n}
    table ip kube-proxy-mine { chain mine {\n}\n}\n";

fn output(node: &Node, program: &str, args: &[&str], input: &str) -> Result<Output> {
    node.ns.run(|| -> Result<_> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| program.to_owned())?;
        child.stdin.take().context("no pipe")?.write_all(input.as_bytes())?;
        Ok(child.wait_with_output()?)
    })?
}

fn run(node: &Node, program: &str, args: &[&str], input: &str) -> Result<String> {
    let output = output(node, program, args, input)?;
    ensure!(output.status.success(), "{program}: {}\n{input}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn restore(node: &Node, rules: &str) -> Result<()> {
    for tool in TOOLS {
        run(node, &format!("{tool}-restore"), &["--noflush"], rules)?;
    }
    Ok(())
}

/// Every rule of the node, without counters and the dates in comments.
fn rules(node: &Node) -> Result<String> {
    let mut all = run(node, "nft", &["--stateless", "list", "ruleset"], "")?;
    for tool in TOOLS {
        let saved = run(node, &format!("{tool}-save"), &[], "")?;
        for line in saved.lines().filter(|line| !line.starts_with('#')) {
            let counted = line.starts_with(':').then(|| line.split_once(" [")).flatten();
            all.extend([counted.map_or(line, |(chain, _)| chain), "\n"]);
        }
    }
    Ok(all)
}

fn cleanup(node: &Node, args: &[&str]) -> Result<String> {
    let args = [&["cleanup", "--kube-proxy"], args].concat();
    run(node, agent().to_str().context("a path")?, &args, "")
}

#[test]
fn what_kube_proxy_leaves_is_removed_and_nothing_else() -> Result<()> {
    let lab = Lab::new(Path::new(XTASK))?;
    let node = &lab.node_a;
    ensure!(cleanup(node, &[])? == "nothing to remove\n", "a node that never had one");
    restore(node, OTHERS)?;
    run(node, "nft", &["-f", "-"], OTHER_TABLES)?;
    let before = rules(node)?;

    restore(node, KUBE_PROXY)?;
    run(node, "nft", &["-f", "-"], NFTABLES)?;
    node.ns.ip("link add kube-ipvs0 type veth peer name kube-ipvs1\n")?;
    let with_kube_proxy = rules(node)?;
    let told = cleanup(node, &["--dry-run"])?;
    ensure!(rules(node)? == with_kube_proxy, "--dry-run has removed something");
    ensure!(told.lines().all(|line| line.starts_with("would remove ")), "{told}");

    let removed = cleanup(node, &[])?;
    ensure!(told == removed.replace("removed ", "would remove "), "{told}\n---\n{removed}");
    let after = rules(node)?;
    ensure!(after == before, "before:\n{before}\nafter:\n{after}");
    ensure!(output(node, "ip", &["link", "show", "kube-ipvs0"], "")?.status.code() == Some(1), "its device");
    ensure!(cleanup(node, &[])? == "nothing to remove\n", "a second time");
    Ok(())
}

#[test]
fn what_others_use_of_kube_proxy_stays() -> Result<()> {
    let lab = Lab::new(Path::new(XTASK))?;
    let node = &lab.node_a;
    restore(node, KUBE_PROXY)?;
    // As the CNI plugin portmap does when it is told to.
    restore(node, "*nat\n-A PREROUTING -p tcp --dport 8080 -j KUBE-MARK-MASQ\nCOMMIT\n")?;
    let said = cleanup(node, &[])?;
    let line = "left alone: chain KUBE-MARK-MASQ of table nat: PREROUTING uses it (ip6tables-nft)";
    ensure!(said.lines().any(|said| said == line), "{said}");
    let after = rules(node)?;
    ensure!(!after.contains("KUBE-SVC") && !after.contains("KUBE-SERVICES"), "{after}");
    ensure!(after.contains("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000"), "{after}");
    Ok(())
}

#[test]
fn a_running_kube_proxy_keeps_its_rules() -> Result<()> {
    let lab = Lab::new(Path::new(XTASK))?;
    let node = &lab.node_a;
    run(node, "nft", &["-f", "-"], NFTABLES)?;
    let before = rules(node)?;
    // The kernel names a process after its file.
    let program = lab.dir().join("kube-proxy");
    fs::copy("/bin/sleep", &program)?;
    let mut kube_proxy = node.ns.spawn(Command::new(&program).arg("600"))?;
    let refused = output(node, agent().to_str().context("a path")?, &["cleanup", "--kube-proxy"], "");
    let after = rules(node);
    kube_proxy.kill()?;
    kube_proxy.wait()?;
    let refused = refused?;
    let said = String::from_utf8(refused.stderr)?;
    ensure!(refused.status.code() == Some(1) && said.lines().count() == 1, "{said}");
    ensure!(said.starts_with("fairlead: kube-proxy is running (process "), "{said}");
    ensure!(after? == before, "its rules are gone");
    Ok(())
}
