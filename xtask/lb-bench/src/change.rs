//! How long a change takes to reach the map: manifests are replaced, or objects at an API server, and the frontend's entry is
//! read until it is another one.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fairlead::sys::bpf as kernel;

use super::apiserver;

/// How long an agent may take. Machines are shared and slow.
const PATIENCE: Duration = Duration::from_mins(1);
const TCP: u8 = 6;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The pinned map of frontends
    map: PathBuf,
    /// The ClusterIP of the first Service whose manifest is changed; the others' follow
    addr: Ipv4Addr,
    port: u16,
    /// Directory with the files `N.0.json`, `N.1.json`, which say what the Nth Service is in turns, and with `--rate` `N.2.json`, which
    /// says what it is at last
    versions: PathBuf,
    /// Where they are to be, as `NAME-N.json`
    manifests: PathBuf,
    /// What their files are called
    name: String,
    /// How many Services there are
    services: u32,
    /// How many changes
    count: u32,
    /// Changes per second; 0: the next as soon as the one before has arrived
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Tell this API server instead of replacing files
    #[arg(long, value_name = "ADDR")]
    server: Option<SocketAddr>,
}

/// Prints how long each change took, ms, one line each; with `--rate`, how long the last of each Service took.
pub(crate) fn run(args: &Args) -> Result<()> {
    let map = Frontends::open(&args.map)?;
    let mut last = Vec::new();
    let begin = Instant::now();
    for number in 0..args.count {
        let service = number % args.services;
        let before = map.read(args.addr, service, args.port)?;
        let is_last = args.rate != 0 && args.count - number <= args.services;
        // The files stand for what they say at the beginning. An agent that is behind may never have seen the version before the
        // last: it must not be the same as the one that it has written.
        let version = if is_last { 2 } else { (number / args.services + 1) % 2 };
        let from = args.versions.join(format!("{service}.{version}.json"));
        let changed = match args.server {
            Some(server) => {
                let list = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
                let changed = Instant::now();
                apiserver::put(server, &list)?;
                changed
            }
            None => args.replace(&from, service)?,
        };
        if args.rate == 0 {
            println!("{}", map.wait(args.addr, service, args.port, before.as_deref(), changed)?);
        } else {
            if is_last {
                last.push((service, before, changed));
            }
            let due = begin + Duration::from_secs(1) * (number + 1) / args.rate;
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    for (service, before, changed) in last {
        println!("{}", map.wait(args.addr, service, args.port, before.as_deref(), changed)?);
    }
    Ok(())
}

impl Args {
    /// Has `from` take the place of a Service's manifest; when it did.
    fn replace(&self, from: &Path, service: u32) -> Result<Instant> {
        let hidden = self.manifests.join(format!(".{}-{service}", self.name));
        let to = self.manifests.join(format!("{}-{service}.json", self.name));
        fs::copy(from, &hidden).with_context(|| format!("cannot copy {}", from.display()))?;
        let changed = Instant::now();
        fs::rename(&hidden, to).context("cannot replace a manifest")?;
        Ok(changed)
    }
}

struct Frontends {
    fd: OwnedFd,
    info: kernel::MapInfo,
}

impl Frontends {
    fn open(path: &Path) -> Result<Self> {
        let fd = kernel::obj_get(path).with_context(|| format!("cannot open {}", path.display()))?;
        let info = kernel::map_info(fd.as_fd())?;
        Ok(Self { fd, info })
    }

    /// The entry of a Service (`ServiceKey`: address, port, protocol).
    fn read(&self, first: Ipv4Addr, service: u32, port: u16) -> Result<Option<Vec<u8>>> {
        let addr = Ipv4Addr::from_bits(first.to_bits() + service);
        let mut key = addr.octets().to_vec();
        key.extend(port.to_ne_bytes());
        key.extend([TCP, 0]);
        kernel::map_lookup_bytes(self.fd.as_fd(), &self.info, &key)
            .context("cannot read the map of frontends")
    }

    /// Milliseconds from `changed` until the entry is another one.
    fn wait(
        &self,
        first: Ipv4Addr,
        service: u32,
        port: u16,
        before: Option<&[u8]>,
        changed: Instant,
    ) -> Result<f64> {
        loop {
            if self.read(first, service, port)?.as_deref() != before {
                return Ok(changed.elapsed().as_secs_f64() * 1e3);
            }
            if changed.elapsed() > PATIENCE {
                bail!("the change of Service {service} has not arrived after {PATIENCE:?}");
            }
            // Of two CPUs the agent needs one.
            thread::sleep(Duration::from_micros(20));
        }
    }
}
