//! Which rules and chains of iptables are kube-proxy's, and how to remove them and nothing else.

use std::collections::{BTreeMap, BTreeSet};

/// Chains of kube-proxy's modes iptables and IPVS. Kubelet's are not among them: `KUBE-FIREWALL`,
/// `KUBE-MARK-DROP`, `KUBE-IPTABLES-HINT`, `KUBE-KUBELET-CANARY`.
const CHAINS: [&str; 13] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

/// Chains of Services and endpoints begin so.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-XLB-"];

/// All of kube-proxy's jumps from other chains say so.
const COMMENT: &str = "--comment \"kubernetes ";

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Plan {
    /// For `iptables-restore --noflush`; empty: there is nothing to do.
    pub(super) script: String,
    /// What it removes, a line each.
    pub(super) removes: Vec<String>,
    /// What of kube-proxy's has to stay, and why, a line each.
    pub(super) leaves: Vec<String>,
}

/// Plans the removal from what `iptables-save` prints.
pub(super) fn plan(saved: &str) -> Plan {
    let mut plan = Plan::default();
    for table in tables(saved) {
        table.plan(&mut plan);
    }
    plan
}

#[derive(Debug, Default)]
struct Table<'a> {
    name: &'a str,
    ours: BTreeSet<&'a str>,
    rules: Vec<Rule<'a>>,
}

#[derive(Debug)]
struct Rule<'a> {
    chain: &'a str,
    /// Without `-A CHAIN`.
    rest: &'a str,
    target: Option<&'a str>,
}

fn tables(saved: &str) -> Vec<Table<'_>> {
    let mut tables: Vec<Table<'_>> = vec![];
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { name, ..Table::default() });
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(chain) = line.strip_prefix(':').and_then(|line| line.split(' ').next()) {
            if is_ours(chain) {
                table.ours.insert(chain);
            }
        } else if let Some((chain, rest)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
            table.rules.push(Rule { chain, rest, target: target(rest) });
        }
    }
    tables
}

fn is_ours(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// The chain that a rule jumps or goes to. Comments are quoted, and may say anything.
fn target(rest: &str) -> Option<&str> {
    let mut quoted = false;
    let mut escaped = false;
    let mut words = rest.split(' ');
    while let Some(word) = words.next() {
        if !quoted && matches!(word, "-j" | "-g") {
            return words.next();
        }
        for c in word.chars() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => quoted = !quoted,
                _ => {}
            }
        }
    }
    None
}

impl<'a> Table<'a> {
    fn plan(&self, plan: &mut Plan) {
        let (jumps, used) = self.jumps();
        let kept = self.closure(&used);
        for chain in &kept {
            let user = used.get(chain).map_or("a chain that stays", |user| user);
            plan.leaves.push(format!("chain {chain} of table {}: {user} uses it", self.name));
        }
        let removed: Vec<&str> = self.ours.difference(&kept).copied().collect();
        if removed.is_empty() && jumps.is_empty() {
            return;
        }
        let mut script = format!("*{}\n", self.name);
        // This empties them.
        script.extend(removed.iter().flat_map(|chain| [":", chain, " - [0:0]\n"]));
        script.extend(jumps.iter().flat_map(|rule| ["-D ", rule.chain, " ", rule.rest, "\n"]));
        script.extend(removed.iter().flat_map(|chain| ["-X ", chain, "\n"]));
        plan.script += &script;
        plan.script += "COMMIT\n";
        let rules =
            jumps.iter().map(|rule| format!("rule {} {} of table {}", rule.chain, rule.rest, self.name));
        plan.removes.extend(rules);
        plan.removes.extend(removed.iter().map(|chain| format!("chain {chain} of table {}", self.name)));
    }

    /// kube-proxy's rules in chains of others, and those of its chains that others use, with one that does.
    fn jumps(&self) -> (Vec<&Rule<'a>>, BTreeMap<&'a str, &'a str>) {
        let mut jumps = vec![];
        let mut used = BTreeMap::new();
        for rule in self.rules.iter().filter(|rule| !self.ours.contains(rule.chain)) {
            match rule.target.filter(|target| self.ours.contains(target)) {
                Some(_) if rule.rest.contains(COMMENT) => jumps.push(rule),
                Some(target) => {
                    used.insert(target, rule.chain);
                }
                None => {}
            }
        }
        (jumps, used)
    }

    /// These chains, and those of kube-proxy that they lead to.
    fn closure(&self, used: &BTreeMap<&'a str, &'a str>) -> BTreeSet<&'a str> {
        let mut kept = BTreeSet::new();
        let mut next: Vec<&str> = used.keys().copied().collect();
        while let Some(chain) = next.pop() {
            if kept.insert(chain) {
                let rules = self.rules.iter().filter(|rule| rule.chain == chain);
                next.extend(rules.filter_map(|rule| rule.target).filter(|target| self.ours.contains(target)));
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = r#"# Generated by iptables-save v1.8.9
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [1:60]
:DOCKER - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m comment --comment "not \" -j KUBE-SERVICES" -j DOCKER
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j KUBE-SVC-BBBBBBBBBBBBBBBB
-A KUBE-SVC-BBBBBBBBBBBBBBBB -j KUBE-SEP-AAAAAAAAAAAAAAAA
COMMIT
*filter
:INPUT DROP [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
COMMIT
"#;

    #[test]
    fn only_kube_proxys_are_removed() {
        let plan = plan(SAVED);
        assert_eq!(
            plan.script,
            "*nat\n\
             :KUBE-MARK-MASQ - [0:0]\n\
             :KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]\n\
             :KUBE-SERVICES - [0:0]\n\
             :KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]\n\
             -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -X KUBE-MARK-MASQ\n\
             -X KUBE-SEP-AAAAAAAAAAAAAAAA\n\
             -X KUBE-SERVICES\n\
             -X KUBE-SVC-BBBBBBBBBBBBBBBB\n\
             COMMIT\n"
        );
        assert_eq!(plan.removes.len(), 5);
        assert_eq!(plan.leaves, [""; 0]);
    }

    #[test]
    fn what_others_use_stays_with_all_it_leads_to() {
        let saved = SAVED
            .replace("-A KUBE-MARK-MASQ", "-A DOCKER -p tcp -g KUBE-SVC-BBBBBBBBBBBBBBBB\n-A KUBE-MARK-MASQ");
        let plan = plan(&saved);
        assert_eq!(
            plan.leaves,
            [
                "chain KUBE-SEP-AAAAAAAAAAAAAAAA of table nat: a chain that stays uses it",
                "chain KUBE-SVC-BBBBBBBBBBBBBBBB of table nat: DOCKER uses it"
            ]
        );
        assert!(!plan.script.contains("KUBE-SEP") && !plan.script.contains("KUBE-SVC"), "{}", plan.script);
        assert!(plan.script.contains("-X KUBE-SERVICES\n"), "{}", plan.script);
    }

    #[test]
    fn a_node_without_kube_proxy_is_left_alone() {
        let lines: Vec<&str> = SAVED.lines().filter(|line| !line.contains("KUBE-")).collect();
        assert_eq!(plan(&lines.join("\n")), Plan::default());
        assert_eq!(plan(""), Plan::default());
    }
}
