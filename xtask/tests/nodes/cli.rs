//! What operators read: `fairlead services`, `backends`, `flows`, `status` and `top`, while the agent runs and when it is
//! gone.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::ttyname;
use serde_json::Value;
use xtask::lab::{Call, Family, eventually};
use xtask::process;

use crate::lines::{Lines, command, signal, wait};
use crate::world::{PORT, SOON, TARGET_PORT, World, at_vip, node_port, options, service, until};

/// Service 1 has pods on both nodes, 2 one on the other node, 3 none.
fn world() -> Result<World> {
    World::with_services(options(), |world| {
        vec![service(1, [&world.a1, &world.b1]), service(2, [&world.b1]), service(3, [])]
    })
}

fn read(world: &World, args: &[&str]) -> Result<Value> {
    let text = world.cluster.fairlead(world.node_a(), &[args, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

fn kill_agents(world: &World) -> Result<()> {
    for agent in world.cluster.take_agents() {
        agent.kill()?;
    }
    Ok(())
}

/// Once with agents, once without.
fn twice(world: &World, check: impl Fn(&World) -> Result<()>) -> Result<()> {
    check(world).context("with an agent")?;
    kill_agents(world)?;
    check(world).context("without an agent")
}

#[test]
fn services_and_backends_are_found_by_name() -> Result<()> {
    twice(&world()?, |world| {
        let services = read(world, &["services", "service-1", "-n", "default", "--proto", "tcp"])?;
        let services = services.as_array().context("a list")?;
        // ClusterIP and nodePort, of both families.
        ensure!(services.len() == 4, "{services:#?}");
        let is_ours = |it: &Value| it["name"] == "service-1" && it["service_port"] == PORT;
        ensure!(services.iter().all(is_ours), "{services:#?}");
        let table =
            world.cluster.fairlead(world.node_a(), &["services", "default/service-2", "-o", "wide"])?;
        ensure!(table.contains("default/service-2:80") && table.contains("maglev"), "{table}");
        ensure!(!table.contains("service-1"), "{table}");

        let backends = read(world, &["backends", "service-1"])?;
        let addresses: Vec<_> =
            backends.as_array().context("a list")?.iter().map(|it| &it["address"]).collect();
        // One for each protocol.
        ensure!(addresses.len() == 8, "{backends:#}");
        let table = world.cluster.fairlead(world.node_a(), &["backends", "service-2"])?;
        let b1 = world.b1.at(Family::V4, TARGET_PORT).to_string();
        let line = table.lines().find(|line| line.starts_with(&b1)).with_context(|| table.clone())?;
        ensure!(line.contains("elsewhere") && line.contains("default/service-2:80"), "{line}");

        for (args, status, text) in [
            (&["services", "nobody"][..], 1, "no such frontend of nobody"),
            (&["backends", "nobody"], 1, "no frontend of nobody"),
            (&["flows", "--service", "nobody"], 1, "no frontend of nobody"),
            (&["flows", "--client", "10.0.0"], 2, "is not ADDRESS[/PREFIX][:PORT]"),
        ] {
            let mut command = command(world, args);
            let output = world.node_a().ns.run(|| command.output())??;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(status) && said.lines().count() == 1, "{args:?}: {said}");
            ensure!(said.contains(text), "{args:?}: {said}");
        }
        Ok(())
    })
}

#[test]
fn flows_are_found_by_any_part_of_their_tuple() -> Result<()> {
    let world = world()?;
    let target = world.node_a().at(Family::V4, node_port(2));
    let outside = &world.lab().outside;
    let (session, outcome) = outside.open(Call::tcp(target).from_port(41000))?;
    ensure!(outcome.server() == Some("b1"), "{outcome}");
    session.again()?;
    let backend = world.b1.at(Family::V4, TARGET_PORT).to_string();
    let frontend = format!("{target}");
    twice(&world, |world| {
        for args in [
            &["--client", ":41000"][..],
            &["--frontend", &frontend, "--state", "established"],
            &["--backend", &backend, "--proto", "TCP", "--client", ":41000,:41001"],
            &["--service", "default/service-2", "--part", "request"],
            &["--service", "service-2", "-n", "default", "--address", ":41000", "--limit", "1"],
            &["--client", ":41000", "--sort", "recent", "--limit", "1"],
        ] {
            let flows = read(world, &[&["flows"], args].concat())?;
            let flows = flows.as_array().context("a list")?;
            ensure!((1..=2).contains(&flows.len()), "{args:?}: {flows:#?}");
            for flow in flows {
                let told =
                    [&flow["client_port"], &flow["frontend_port"], &flow["name"], &flow["service_port"]];
                let expected = [41000.into(), node_port(2).into(), Value::from("service-2"), PORT.into()];
                ensure!(told.into_iter().eq(&expected), "{args:?}: {flow:#}");
                ensure!(flow["state"] == "established", "{flow:#}");
            }
        }
        for args in [["--proto", "udp"], ["--state", "pending,closed"], ["--backend", "192.0.2.255"]] {
            let flows = read(world, &[&["flows", "--client", ":41000"][..], &args].concat())?;
            ensure!(flows == serde_json::json!([]), "{args:?}: {flows:#}");
        }
        let table = world.cluster.fairlead(world.node_a(), &["flows", "--client", ":41000", "-o", "wide"])?;
        ensure!(table.lines().count() == 3 && table.contains("default/service-2:80"), "{table}");
        ensure!(session.again()?.server() == Some("b1"), "the connection is cut");
        Ok(())
    })
}

#[test]
fn flows_are_followed_from_their_first_packet_to_their_end() -> Result<()> {
    let world = world()?;
    let target = world.node_a().at(Family::V4, node_port(2));
    let outside = &world.lab().outside;
    let args = ["flows", "--follow", "--interval", "0.2", "--proto", "tcp", "--service", "service-2"];
    let mut table = Lines::spawn(&world, &args)?;
    ensure!(table.next()?.starts_with("AT "), "no header");
    let mut json = Lines::spawn(&world, &[&args[..], &["-o", "json"]].concat())?;
    // Until it has seen what was there before.
    let mut port = 41000;
    let told = eventually(SOON, || {
        port += 1;
        let (session, outcome) = outside.open(Call::tcp(target).from_port(port).abrupt())?;
        ensure!(outcome.server() == Some("b1"), "{outcome}");
        thread::sleep(Duration::from_secs(1));
        drop(session);
        let told = json.written.try_iter().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        told.into_iter().find(|told| told["event"] == "new").context("nothing new is told")
    })?;
    ensure!(told["name"] == "service-2" && told["reply"] == false, "{told:#}");
    ensure!(told["at"].as_str().is_some_and(|at| at.ends_with('Z')), "{told:#}");
    let told = json.until("changed")?;
    ensure!(told["client_port"].as_u64() > Some(41000), "{told:#}");
    // The agent sweeps what a RST has ended.
    let told = json.until("ended")?;
    ensure!(told["state"] == "closed", "{told:#}");
    while !table.next()?.contains("  new ") {}
    table.end(Signal::SIGINT)?;
    json.end(Signal::SIGTERM)?;
    // Without a reader it ends, also if nothing happens.
    kill_agents(&world)?;
    let mut child = world.node_a().ns.spawn(command(&world, &args).stdout(Stdio::piped()))?;
    let mut stdout = BufReader::new(child.stdout.take().context("no pipe")?);
    stdout.read_line(&mut String::new())?;
    drop(stdout);
    let status = wait(&mut child)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Codes of the warnings.
fn warnings(status: &Value) -> Vec<&str> {
    let warnings = status["warnings"].as_array().map(Vec::as_slice).unwrap_or_default();
    warnings.iter().filter_map(|warning| warning["code"].as_str()).collect()
}

#[test]
fn status_tells_of_the_agent_while_it_runs_and_when_it_is_gone() -> Result<()> {
    let world = world()?;
    // Its nodePort belongs to an older Service.
    let mut taken = service(4, [&world.a1]);
    for port in &mut taken.ports {
        port.node_port = Some(node_port(1));
    }
    world.cluster.manifests.apply(&taken)?;
    until(world.node_a(), &Call::tcp(at_vip(3, Family::V4, PORT)), |outcome| outcome.server().is_none())?;
    let alive = eventually(SOON, || {
        let status = read(&world, &["status"])?;
        let findings = status["findings"].as_array().context("no findings")?;
        let is_taken = |it: &Value| it["name"] == "service-4" && it["kind"] == "Taken";
        ensure!(findings.iter().any(is_taken), "{status:#}");
        let drops = status["drops"]["reasons"].as_array().context("no drops")?;
        ensure!(drops.iter().any(|drop| drop["reason"] == "no_endpoints"), "{status:#}");
        Ok(status)
    })?;
    ensure!(alive["agent_pid"].is_u64() && alive["agent"]["runs"] == true, "{alive:#}");
    ensure!(alive["agent"]["same_programs"] == true && alive["agent"]["node"] == "node-a", "{alive:#}");
    ensure!(alive["source"]["kind"] == "manifests" && alive["source"]["freshness"] == "current", "{alive:#}");
    ensure!(alive["source"]["last_change"].is_string() && alive["drops"]["from"] == "agent", "{alive:#}");
    let edges = alive["edges"].as_array().context("no edges")?;
    ensure!(
        !edges.is_empty() && edges.iter().all(|it| it["xdp"] == "native" && it["tc"].is_string()),
        "{alive:#}"
    );
    ensure!(
        alive["missing"] == serde_json::json!([]) && alive["pod_devices"].as_u64() >= Some(2),
        "{alive:#}"
    );
    ensure!(warnings(&alive) == ["findings"], "{alive:#}");

    kill_agents(&world)?;
    let links = world.lab().pins(world.node_a()).join("v1/links");
    let names = std::fs::read_dir(&links)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let xdp = names.collect::<Result<Vec<_>>>()?.into_iter().find(|name| name.starts_with("xdp_nic-"));
    std::fs::remove_file(links.join(xdp.context("no link of XDP")?))?;
    // For some time what the agent has counted is of use.
    let dead = eventually(SOON, || {
        let status = read(&world, &["status", "--interval", "0.5"])?;
        ensure!(status["drops"]["from"] == "sample", "{status:#}");
        Ok(status)
    })?;
    ensure!(dead["agent_pid"].is_null() && dead["agent"]["runs"] == false, "{dead:#}");
    ensure!(dead["findings_total"] == alive["findings_total"], "{dead:#}");
    ensure!(dead["missing"][0]["program"] == "xdp_nic", "{dead:#}");
    ensure!(warnings(&dead) == ["agent-not-running", "not-attached", "findings"], "{dead:#}");
    let table = world.cluster.fairlead(world.node_a(), &["status"])?;
    for part in
        ["agent     not running; the last one was version", "default/service-4", "warning  no agent runs"]
    {
        ensure!(table.contains(part), "{part}: {table}");
    }
    world.cluster.start()?;
    eventually(SOON, || {
        let status = read(&world, &["status"])?;
        ensure!(warnings(&status) == ["findings"], "{status:#}");
        Ok(())
    })
}

/// Somebody who asks for Service 1 all the time, until it is dropped.
struct Load(Arc<AtomicBool>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `work` while the machine outside asks for Service 1.
fn under_load<T>(world: &World, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let target = world.node_a().at(Family::V4, node_port(1));
    let done = Arc::new(AtomicBool::new(false));
    let outside = &world.lab().outside;
    thread::scope(|scope| {
        let stop = Load(Arc::clone(&done));
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let _ = outside.ask_many(Call::tcp(target), 4);
            }
        });
        let outcome = work();
        drop(stop);
        outcome
    })
}

#[test]
fn top_prints_rates_for_scripts() -> Result<()> {
    twice(&world()?, |world| {
        under_load(world, || {
            let told = read(world, &["top", "--once", "--interval", "1"])?;
            let first = &told["services"][0];
            ensure!(first["name"] == "service-1" && first["namespace"] == "default", "{told:#}");
            for rate in ["packets", "bytes", "connections"] {
                ensure!(first["rates"][rate].as_f64() > Some(0.0), "{rate}: {told:#}");
            }
            ensure!(told["seconds"].as_f64() >= Some(1.0), "{told:#}");
            let table = world.cluster.fairlead(world.node_a(), &["top", "service-1", "--interval", "0.5"])?;
            ensure!(table.starts_with("SERVICE ") && table.lines().count() == 2, "{table}");
            Ok(())
        })
    })
}

/// A terminal, as far as it takes to read what stands on it.
#[derive(Default)]
struct Screen {
    cells: BTreeMap<(u16, u16), char>,
    row: u16,
    column: u16,
    /// Everything that was written.
    written: String,
    /// Of a sequence that is not complete.
    rest: String,
}

impl Screen {
    fn take(&mut self, text: &str) {
        self.written += text;
        let text = std::mem::take(&mut self.rest) + text;
        let mut left = text.as_str();
        while let Some(c) = left.chars().next() {
            let Some(sequence) = left.strip_prefix("\x1b[") else {
                self.put(c);
                left = &left[c.len_utf8()..];
                continue;
            };
            let Some(end) = sequence.find(|c: char| ('@'..='~').contains(&c)) else {
                self.rest = left.into();
                return;
            };
            self.control(&sequence[..end], &sequence[end..=end]);
            left = &sequence[end + 1..];
        }
    }

    fn put(&mut self, c: char) {
        if !c.is_control() {
            self.cells.insert((self.row, self.column), c);
            self.column += 1;
        }
    }

    fn control(&mut self, arguments: &str, kind: &str) {
        match kind {
            "H" => {
                let mut numbers = arguments.split(';').map(|number| number.parse::<u16>().unwrap_or(1) - 1);
                self.row = numbers.next().unwrap_or(0);
                self.column = numbers.next().unwrap_or(0);
            }
            "J" => self.cells.clear(),
            _ => {}
        }
    }

    fn line(&self, part: &str) -> Option<String> {
        (0..50).map(|row| self.row(row)).find(|line| line.contains(part))
    }

    fn row(&self, row: u16) -> String {
        (0..200).map(|column| self.cells.get(&(row, column)).copied().unwrap_or(' ')).collect()
    }
}

/// `fairlead top` on a terminal of its own.
struct Terminal {
    child: Child,
    keys: std::fs::File,
    /// Our hold on the end that it uses.
    slave: OwnedFd,
    before: Termios,
    screen: Arc<Mutex<Screen>>,
}

impl Terminal {
    fn open(world: &World) -> Result<Self> {
        let size = Winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None)?;
        let before = tcgetattr(&pty.slave)?;
        let mut command = command(world, &["top", "--interval", "0.3"]);
        command.env("TERM", "xterm-256color");
        command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).stderr(pty.slave.try_clone()?);
        let child = world.node_a().ns.spawn(&mut command)?;
        let screen = Arc::new(Mutex::new(Screen::default()));
        let mut output = std::fs::File::from(pty.master.try_clone()?);
        let shared = Arc::clone(&screen);
        thread::spawn(move || {
            let mut bytes = vec![0; 65536];
            let mut left = vec![];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                left.extend_from_slice(&bytes[..count]);
                let valid = match std::str::from_utf8(&left) {
                    Ok(text) => text.len(),
                    Err(error) => error.valid_up_to(),
                };
                let text = String::from_utf8_lossy(&left[..valid]).into_owned();
                left.drain(..valid);
                shared.lock().unwrap_or_else(PoisonError::into_inner).take(&text);
            }
        });
        Ok(Self { child, keys: pty.master.into(), slave: pty.slave, before, screen })
    }

    fn until(&self, part: &str, holds: impl Fn(&str) -> bool) -> Result<()> {
        eventually(SOON, || {
            let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
            let line = screen.line(part);
            let all = || (0..24).map(|row| screen.row(row).trim_end().to_owned() + "\n").collect::<String>();
            ensure!(line.is_some_and(|line| holds(&line)), "{part:?} is not there:\n{}", all());
            Ok(())
        })
    }

    /// As a window does that is dragged: it is told to whoever has the terminal.
    fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let mut stty = Command::new("stty");
        stty.arg("--file").arg(ttyname(&self.slave)?);
        stty.args(["rows", &rows.to_string(), "columns", &columns.to_string()]);
        process::output(&mut stty)?;
        // It is nobody's controlling terminal, of which the kernel would tell.
        signal(&self.child, Signal::SIGWINCH)
    }

    /// The last line is this one, and nothing stands below.
    fn until_foot_is(&self, row: u16) -> Result<()> {
        eventually(SOON, || {
            let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
            let rows: Vec<String> = (0..50).map(|row| screen.row(row).trim_end().to_owned()).collect();
            let last = rows.iter().rposition(|row| !row.is_empty());
            ensure!(last == Some(row.into()) && rows[usize::from(row)].starts_with("q quit"), "{rows:#?}");
            Ok(())
        })
    }

    /// It ends well, and the terminal is as it was.
    fn ends(mut self) -> Result<()> {
        let status = wait(&mut self.child)?;
        ensure!(status.success(), "{status}");
        let after = tcgetattr(&self.slave)?;
        ensure!(after == self.before, "{after:?} is not {:?}", self.before);
        eventually(SOON, || {
            let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
            let left = screen.written.rfind("\x1b[?1049l") > screen.written.rfind("\x1b[?1049h");
            let cursor = screen.written.rfind("\x1b[?25h") > screen.written.rfind("\x1b[?25l");
            ensure!(left && cursor, "{:?}", screen.written);
            Ok(())
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the first rate of this line is one.
fn has_rate(line: &str) -> bool {
    let rate = line.split_whitespace().nth(1).unwrap_or("-");
    rate.starts_with(|c: char| ('1'..='9').contains(&c))
}

#[test]
fn top_shows_live_rates_and_gives_the_terminal_back() -> Result<()> {
    let world = world()?;
    kill_agents(&world)?;
    under_load(&world, || {
        let mut terminal = Terminal::open(&world)?;
        terminal.until("default/service-1 ", has_rate)?;
        terminal.until("default/service-2 ", |line| !has_rate(line))?;
        let backend: SocketAddr = world.a1.at(Family::V4, TARGET_PORT);
        terminal.keys.write_all(b"\r")?;
        terminal.until("backends of default/service-1", |_| true)?;
        terminal.until(&format!("{backend} "), |line| line.contains("active"))?;
        terminal.keys.write_all(b"\x7f/service-2\r")?;
        terminal.until("/service-2 ", |_| true)?;
        // Another size, and everything fits it.
        terminal.resize(10, 60)?;
        terminal.until_foot_is(9)?;
        terminal.keys.write_all(b"q")?;
        terminal.ends()?;
        let mut terminal = Terminal::open(&world)?;
        terminal.until("default/service-1 ", |_| true)?;
        terminal.keys.write_all(b"\x03")?;
        terminal.ends()?;
        for end in [Signal::SIGTERM, Signal::SIGINT] {
            let terminal = Terminal::open(&world)?;
            terminal.until("default/service-1 ", |_| true)?;
            ensure!(tcgetattr(&terminal.slave)? != terminal.before, "it reads keys");
            signal(&terminal.child, end)?;
            terminal.ends()?;
        }
        Ok(())
    })
}
