//! From maps to others that take their place, while packets go through both: of another size (`resize.rs`), or of another
//! layout (`migrate.rs`). The new ones are made and the programs loaded over them; then
//!
//! 1. what the old maps hold is carried over, and again what changed meanwhile;
//! 2. the new maps get their names;
//! 3. links and filters get the new programs, device by device: both directions of most flows are met at the same device, so
//!    that they are as good as always on either side of this step. What programs write to the old maps until then is carried
//!    all the time;
//! 4. it is carried once more when no program writes there any more.
//!
//! Then nobody needs the old ones. No agent runs meanwhile, so that the service maps stand still.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use super::carry::{Carrier, Way};
use super::clsact;
use super::error::OpenError;
use super::hooks::{Direction, Place, open_link, remove_link};
use super::load::Programs;
use super::pins;
use crate::sys::bpf::{self, AttachType, LinkTarget, Target};

/// What has been done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Maps that are the same are in both directories.
    Shared,
    /// The other maps are made, and the programs loaded.
    Loaded,
    /// The other maps are filled.
    Carried,
    /// They have their names; the links' pins are where the new programs' belong.
    Moved,
    /// The links of one device have their new programs.
    Begun,
    /// All programs are the new ones.
    Switched,
    /// What came meanwhile has been carried after.
    Settled,
    /// The old maps are of no use any more.
    Retired,
}

/// Where a switch ends early with an error, as if the agent were killed there; for tests.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct StopAfter(pub(super) Option<Step>);

impl StopAfter {
    pub(super) fn done(self, step: Step) -> Result<(), OpenError> {
        if self.0 == Some(step) { Err(OpenError::Stopped(step)) } else { Ok(()) }
    }
}

/// Takes all the steps. `take_place` gives the new maps their names; `links` is where links are pinned then.
pub(super) fn switch(
    ways: Vec<Way>,
    programs: &Programs,
    links: &Path,
    take_place: impl FnOnce() -> Result<(), OpenError>,
    stop: StopAfter,
) -> Result<(), OpenError> {
    let begun = Instant::now();
    let mut carrier = Carrier::new(ways);
    let mut entries = carrier.fill()?;
    stop.done(Step::Carried)?;
    take_place()?;
    stop.done(Step::Moved)?;
    let switching = Instant::now();
    entries += carrier.during(|carried| {
        replace_links(links, programs, carried, stop)?;
        replace_filters(programs)
    })?;
    let switched = switching.elapsed();
    stop.done(Step::Switched)?;
    entries += carrier.settle()?;
    stop.done(Step::Settled)?;
    tracing::info!(entries, took = ?begun.elapsed(), ?switched, "the maps are replaced");
    Ok(())
}

/// Puts the new programs into the links. Where tcx lets both run, answers are met by both for a while, each of which knows
/// its own flows; the old one goes when the new one knows everything.
fn replace_links(
    dir: &Path,
    programs: &Programs,
    carried: &dyn Fn(),
    stop: StopAfter,
) -> Result<(), OpenError> {
    // All are opened before the first is replaced.
    let mut links = vec![];
    for name in pins::names(dir).map_err(pin("read", dir))? {
        let path = dir.join(&name);
        let (program, ifindex) = pins::parse_device_link(&name).unwrap_or((&name, 0));
        match (open_link(&path).map_err(pin("open", &path))?, programs.get(program)) {
            (Some(link), Some(new)) => {
                let place = Place::of_program(program);
                links.push(Link { ifindex, place, path, old: link, program: new, successor: None });
            }
            // A program that there is no more, or a successor that has not taken its place.
            (Some(_), None) => drop(remove_link(&path).map_err(pin("remove", &path))?),
            (None, _) => {}
        }
    }
    // Nobody begins a flow whose answer is not known.
    for direction in [Direction::Egress, Direction::Ingress] {
        let there = |link: &&mut Link<'_>| link.place.and_then(Place::direction) == Some(direction);
        links.iter_mut().filter(there).for_each(Link::join);
    }
    links.sort_by_key(|link| link.ifindex);
    for device in links.chunk_by(|a, b| a.ifindex == b.ifindex) {
        // At once: each waits for a lock of the kernel (RTNL, of cgroups) that others may hold for long.
        thread::scope(|scope| {
            for link in device.iter().filter(|link| link.successor.is_none()) {
                scope.spawn(|| {
                    // Its device or cgroup may be gone. Whoever attaches next makes a new link then.
                    if let Err(error) = bpf::link_update(link.old.as_fd(), link.program) {
                        tracing::debug!(link = %link.path.display(), %error, "not replaced");
                    }
                });
            }
        });
        stop.done(Step::Begun)?;
    }
    carried();
    links.into_iter().try_for_each(Link::succeed)
}

/// A link with an old program, and the new one.
struct Link<'a> {
    ifindex: u32,
    place: Option<Place>,
    path: PathBuf,
    old: OwnedFd,
    program: BorrowedFd<'a>,
    /// One that has the new program, beside the old one on the same hook. Gone with the process, until it is pinned.
    successor: Option<OwnedFd>,
}

impl Link<'_> {
    /// Has the new program run beside the old one: behind it where nothing begins, before it where answers of flows that were
    /// sent on come in with what begins. At other hooks answers of old flows never come.
    fn join(&mut self) {
        let (attach_type, flags) = match self.place {
            Some(Place::NicOut | Place::PodOut) => (AttachType::TcxEgress, bpf::TCX_LAST),
            Some(Place::NicIn) => (AttachType::TcxIngress, bpf::TCX_FIRST),
            _ => return,
        };
        let Ok(LinkTarget::Tcx { ifindex: 1.., .. }) =
            bpf::link_info(self.old.as_fd()).map(|info| info.target)
        else {
            return;
        };
        let made = bpf::link_create(self.program, Target::Device(self.ifindex), attach_type, flags);
        let made =
            made.inspect_err(|error| tracing::debug!(link = %self.path.display(), %error, "none beside it"));
        self.successor = made.ok();
    }

    /// The successor takes the place of the link.
    fn succeed(self) -> Result<(), OpenError> {
        let Some(successor) = self.successor else { return Ok(()) };
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let new = self.path.with_file_name(format!("{name}-new"));
        bpf::obj_pin(successor.as_fd(), &new).map_err(pin("pin", &new))?;
        fs::rename(&new, &self.path).map_err(pin("move", &new))?;
        if let Err(error) = bpf::link_detach(self.old.as_fd()) {
            // Nobody else has it open, so that it goes now.
            tracing::debug!(link = %self.path.display(), %error, "not detached");
        }
        Ok(())
    }
}

fn pin(action: &'static str, path: &Path) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::Pin { action, path: path.to_owned(), source }
}

/// Puts the new programs into our clsact filters of this namespace, one after the other and each in place.
fn replace_filters(programs: &Programs) -> Result<(), OpenError> {
    let replace = async || -> Result<(), String> {
        let (connection, netlink, _) = rtnetlink::new_connection().map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let mut filters = clsact::filters(&netlink).await.map_err(|error| error.to_string())?;
        filters.sort_unstable();
        for (ifindex, place) in filters {
            let Some(program) = programs.get(place.program()) else { continue };
            let replaced = clsact::attach(&netlink, ifindex, place, program).await;
            replaced.map_err(|error| format!("{} on device {ifindex}: {error}", place.program()))?;
        }
        connection.abort();
        Ok(())
    };
    // A thread is born in the namespace of its parent; the caller may be in a runtime already.
    let replaced = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(|error| error.to_string())?.block_on(replace())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    replaced.map_err(OpenError::Filters)
}
