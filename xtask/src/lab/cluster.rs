//! A lab with Kubernetes in it: manifests, and an agent on each node that follows them.

use std::cell::{Ref, RefCell};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Agent, AgentOptions, Lab, Manifests, Node};

/// A lab, the manifests that describe it, and its agents.
pub struct Cluster {
    pub manifests: Manifests,
    agents: RefCell<[Option<Agent>; 2]>,
    program: PathBuf,
    options: AgentOptions,
    // After the agents, so that they end first.
    pub lab: Lab,
}

impl Cluster {
    /// A cluster of two nodes without agents. `program` is the path of `fairlead`.
    pub fn new(lab: Lab, program: &Path, options: AgentOptions) -> Result<Self> {
        let manifests = Manifests::create(lab.dir().join("manifests"))?;
        for node in lab.nodes() {
            manifests.apply_node(node)?;
        }
        Ok(Self { manifests, agents: RefCell::default(), program: program.to_owned(), options, lab })
    }

    /// Starts the agents that do not run, and waits until they are ready.
    pub fn start(&self) -> Result<()> {
        for (node, agent) in self.lab.nodes().into_iter().zip(&mut *self.agents.borrow_mut()) {
            if agent.is_none() {
                *agent = Some(Agent::start(&self.lab, node, &self.program, &self.manifests, &self.options)?);
            }
        }
        Ok(())
    }

    /// The agent of a node.
    pub fn agent(&self, node: &Node) -> Result<Ref<'_, Agent>> {
        let index = usize::from(node.name != self.lab.node_a.name);
        Ref::filter_map(self.agents.borrow(), |agents| agents[index].as_ref())
            .ok()
            .with_context(|| format!("no agent runs on {}", node.name))
    }

    /// Takes the agents out, to stop or kill them.
    pub fn take_agents(&self) -> Vec<Agent> {
        self.agents.borrow_mut().iter_mut().filter_map(Option::take).collect()
    }

    /// Runs `fairlead SUBCOMMAND … --bpffs PINS` on a node, whether its agent runs or not.
    pub fn fairlead(&self, node: &Node, args: &[&str]) -> Result<String> {
        super::agent::fairlead(&self.program, &node.ns, &self.lab.pins(node), args)
    }

    /// Everything stays when this process ends.
    pub fn keep(self) -> Result<()> {
        self.take_agents().into_iter().for_each(Agent::leave);
        self.lab.keep()
    }
}
