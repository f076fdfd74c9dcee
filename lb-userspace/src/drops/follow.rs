//! `fairlead drops --follow`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, MapData, RingBuf};
use lb_common::abi::Sampling;
use tokio::signal::unix::{SignalKind, signal};

use super::Filter;
use super::sample::{SampleView, decode};
use crate::datapath::pins::Pins;
use crate::datapath::{device_name, typed};
use crate::entries::Snapshot;
use crate::inspect::{Inspector, monotonic_nanoseconds};
use crate::show::To;
use crate::sys::poll::Readable;

/// How often the programs are told that somebody reads, and what has changed is read.
const TICK: Duration = Duration::from_secs(1);
/// For how long they believe it.
const TRUST: Duration = Duration::from_secs(3);

/// Writes a line for each packet and call that is lost from now on, until somebody asks to stop.
pub async fn follow(to: &mut To<'_>, filter: &Filter) -> Result<()> {
    let inspector = Inspector::open(to.bpffs)?;
    let mut ring: RingBuf<MapData> = typed("SAMPLES", |spec| inspector.map_data(spec))?;
    let readable = Readable::new(ring.as_fd())?;
    let map = typed("SAMPLING", |spec| inspector.map_data(spec))?;
    let _alone = alone(to.bpffs)?;
    // What an earlier reader has left.
    while ring.next().is_some() {}
    let mut switch = Switch(map);
    switch.on()?;
    eprintln!("following what is dropped and refused on this node; Ctrl-C ends");
    let mut snapshot = inspector.snapshot()?;
    let mut tick = tokio::time::interval(TICK);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    loop {
        tokio::select! {
            ready = readable.ready() => {
                ready?;
                write(to, filter, &mut ring, &snapshot)?;
            }
            _ = tick.tick() => {
                let lost = switch.on()?;
                // What came while the programs were not woken to tell of it.
                write(to, filter, &mut ring, &snapshot)?;
                if lost > 0 {
                    eprintln!("{lost} more came too fast to be shown");
                }
                snapshot = inspector.snapshot()?;
            }
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
    }
}

/// The ring buffer has one reader: two would take each other's packets.
fn alone(bpffs: &Path) -> Result<File> {
    let pins = Pins::new(bpffs);
    let dir = File::open(pins.dir()).with_context(|| format!("cannot open {}", pins.dir().display()))?;
    if dir.try_lock().is_err() {
        bail!("somebody else follows the drops of this node already; only one can");
    }
    Ok(dir)
}

/// `SAMPLING`; off when this is dropped, and by itself soon after the process is killed.
struct Switch(Array<MapData, Sampling>);

impl Switch {
    /// Has the programs tell for a while. Answers how many samples have found no room since the last time.
    fn on(&mut self) -> Result<u64> {
        let Sampling { lost, .. } = self.0.get(&0, 0)?;
        let trust = u64::try_from(TRUST.as_nanos()).unwrap_or(u64::MAX);
        self.0.set(0, Sampling { until: monotonic_nanoseconds().saturating_add(trust), lost: 0 }, 0)?;
        Ok(lost)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // If it fails, it is off soon.
        let _ = self.0.set(0, Sampling::default(), 0);
    }
}

fn write(to: &mut To<'_>, filter: &Filter, ring: &mut RingBuf<MapData>, snapshot: &Snapshot) -> Result<()> {
    while let Some(bytes) = ring.next() {
        let Some(view) = decode(&bytes).and_then(|sample| SampleView::new(&sample, snapshot, device_name))
        else {
            continue;
        };
        if !filter.shows(view.reason, view.namespace.as_deref(), view.name.as_deref()) {
            continue;
        }
        if to.json {
            serde_json::to_writer(&mut to.out, &view)?;
            writeln!(to.out)?;
        } else {
            writeln!(to.out, "{view}")?;
        }
    }
    Ok(to.out.flush()?)
}
