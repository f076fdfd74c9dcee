//! Commands of `fairlead` that go on until they are told to stop, and what they write meanwhile.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use xtask::lab::eventually;

use crate::world::{SOON, World, agent};

/// `fairlead ARGS` on node-a, which may fail.
pub(crate) fn command(world: &World, args: &[&str]) -> Command {
    let mut command = Command::new(agent());
    command.args(args).arg("--bpffs").arg(world.lab().pins(world.node_a()));
    command
}

/// Waits for its end.
pub(crate) fn wait(child: &mut Child) -> Result<ExitStatus> {
    eventually(SOON, || child.try_wait()?.context("it does not end"))
}

pub(crate) fn signal(child: &Child, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(child.id().cast_signed()), signal)?)
}

/// A process whose lines are collected, and killed when it is dropped.
pub(crate) struct Lines {
    pub(crate) child: Child,
    pub(crate) written: mpsc::Receiver<String>,
    told: mpsc::Receiver<String>,
}

impl Lines {
    /// `fairlead ARGS` on node-a.
    pub(crate) fn spawn(world: &World, args: &[&str]) -> Result<Self> {
        let mut command = command(world, args);
        let mut child = world.node_a().ns.spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let written = collect(child.stdout.take().context("no pipe")?);
        let told = collect(child.stderr.take().context("no pipe")?);
        Ok(Self { child, written, told })
    }

    /// The next line of its standard output.
    pub(crate) fn next(&self) -> Result<String> {
        self.written.recv_timeout(SOON * 3).context("no line")
    }

    /// The same, as JSON.
    pub(crate) fn next_value(&self) -> Result<Value> {
        let line = self.next()?;
        serde_json::from_str(&line).context(line)
    }

    /// The next line of its standard error.
    pub(crate) fn told(&self) -> Result<String> {
        self.told.recv_timeout(SOON * 3).context("nothing is told")
    }

    /// The next event that is this one, as JSON.
    pub(crate) fn until(&self, event: &str) -> Result<Value> {
        loop {
            let told = self.next_value()?;
            if told["event"] == event {
                return Ok(told);
            }
        }
    }

    /// Tells it to end, which it must do well.
    pub(crate) fn end(&mut self, by: Signal) -> Result<()> {
        signal(&self.child, by)?;
        let status = wait(&mut self.child)?;
        anyhow::ensure!(status.success(), "{by}: {status}");
        Ok(())
    }
}

fn collect(from: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    let from = BufReader::new(from);
    thread::spawn(move || from.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
    lines
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
