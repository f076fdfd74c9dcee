//! A second instance of the programs that an agent has loaded, to try packets on: it reads what they read, and writes
//! nothing that they see.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use aya::maps::MapInfo;
use aya::programs::ProgramInfo;
use lb_common::flow::State;
use lb_common::maps::{MAPS, MapKind, globals};
use lb_common::tables::Admission;
use object::{Object, ObjectSection, ObjectSymbol};

use super::error::OpenError;
use super::hooks::Place;
use super::layout::{self, Verdict};
use super::load::{self, Datapath, OBJECT};
use super::options::{Options, SweepMode, Timeouts};
use super::pins::Pins;
use crate::sys::bpf;

/// What programs write: a twin has its own.
const WRITTEN: [&str; 15] = [
    "FLOWS4",
    "FLOWS6",
    "PENDING4",
    "PENDING6",
    "FRAGMENTS4",
    "FRAGMENTS6",
    "SOCKETS",
    "AFFINITY4",
    "AFFINITY6",
    "USAGE",
    "COUNTERS",
    "REFUSALS",
    "ROUTING",
    "SAMPLING",
    "SAMPLES",
];

/// Entries of its tables: kernels divide an LRU map among their CPUs.
const ROOM: u32 = 4096;

/// The section of the globals, and the map that the kernel has of it.
const GLOBALS: &str = ".rodata";

impl Datapath {
    /// Loads the programs for packets once more as the agent of `bpffs`, which need not run, has loaded them: with the same settings
    /// over the same maps, but for those that programs write. Nothing is pinned or attached.
    pub fn twin(bpffs: &Path) -> Result<Self, OpenError> {
        load::check_privileges()?;
        load::check_kernel()?;
        let pins = Pins::new(bpffs);
        let options = settings(bpffs)?;
        let mut sizes = BTreeMap::new();
        for spec in &MAPS {
            if WRITTEN.contains(&spec.name) {
                if spec.kind == MapKind::LruHash {
                    sizes.insert(spec.name, ROOM);
                }
                continue;
            }
            // The loader would make and pin what is missing.
            let path = pins.map(spec.name);
            let info =
                load::pinned_map(&path)?.ok_or(OpenError::Missing { kind: "pinned map", name: spec.name })?;
            let wanted = options.sizes.wanted(spec.capacity);
            if let Verdict::Refuse { difference } = layout::judge(spec, wanted, &info) {
                return Err(OpenError::Layout { path, difference });
            }
            sizes.insert(spec.name, info.max_entries);
        }
        let names = Place::ALL.into_iter().map(Place::program);
        let options = Options { sweep: SweepMode::Agent, ..options };
        let twin = Self::load(&options, &sizes, names, |map| {
            (!WRITTEN.contains(&map.name)).then(|| pins.map(map.name))
        })?;
        for place in Place::ALL {
            let path = pins.program(place.program());
            let fail = |source| OpenError::Pin { action: "examine", path: path.clone(), source };
            let running = bpf::obj_get(&path).and_then(|fd| bpf::prog_info(fd.as_fd())).map_err(fail)?;
            let own =
                twin.programs().get(place.program()).ok_or_else(|| fail(io::ErrorKind::NotFound.into()))?;
            if bpf::prog_info(own).map_err(fail)?.tag != running.tag {
                return Err(OpenError::OtherBuild { path });
            }
        }
        Ok(twin)
    }
}

/// What the programs of an agent were told when they were loaded, as far as it is about packets.
pub(crate) fn settings(bpffs: &Path) -> Result<Options, OpenError> {
    let path = Pins::new(bpffs).program(Place::PodIn.program());
    let globals = read_globals(&path).map_err(|source| OpenError::Pin {
        action: "read the settings of",
        path: path.clone(),
        source,
    })?;
    let options = globals.and_then(|globals| decode(&globals)).ok_or(OpenError::OtherBuild { path })?;
    Ok(Options { bpffs: bpffs.to_owned(), ..options })
}

/// The bytes of the globals of a pinned program.
fn read_globals(program: &Path) -> io::Result<Option<Vec<u8>>> {
    let info = ProgramInfo::from_pin(program).map_err(io::Error::other)?;
    for id in info.map_ids().map_err(io::Error::other)?.into_iter().flatten() {
        let map = MapInfo::from_id(id).map_err(io::Error::other)?;
        if map.name_as_str() == Some(GLOBALS) {
            return bpf::map_lookup_first(map.fd().map_err(io::Error::other)?.as_fd()).map(Some);
        }
    }
    Ok(None)
}

/// `None`: they are not those of this build's object.
fn decode(globals: &[u8]) -> Option<Options> {
    let object = object::File::parse(OBJECT).ok()?;
    if usize::try_from(object.section_by_name(GLOBALS)?.size()) != Ok(globals.len()) {
        return None;
    }
    let value = |name| {
        let symbol = object.symbol_by_name(name)?;
        let start = usize::try_from(symbol.address()).ok()?;
        globals.get(start..start + usize::try_from(symbol.size()).ok()?)
    };
    let flag = |name| value(name).map(|bytes| bytes.first().is_some_and(|byte| *byte != 0));
    let admission = *value(globals::ADMISSION)?.first()?;
    let timeouts = value(globals::TIMEOUTS)?;
    let timeout = |state: State| {
        let bytes = timeouts.chunks_exact(8).nth(state as usize)?.try_into().ok()?;
        Some(Duration::from_nanos(u64::from_ne_bytes(bytes)))
    };
    Some(Options {
        masquerade_all: flag(globals::MASQUERADE_ALL)?,
        resets_removed: flag(globals::RESETS_REMOVED)?,
        tunnel_port: u16::from_ne_bytes(value(globals::TUNNEL_PORT)?.try_into().ok()?),
        admission: [Admission::All, Admission::Opening, Admission::None]
            .into_iter()
            .find(|known| *known as u8 == admission)?,
        timeouts: Timeouts {
            tcp_established: timeout(State::Established)?,
            tcp_close_wait: timeout(State::HalfClosed)?,
            udp: timeout(State::Unanswered)?,
            udp_stream: timeout(State::Answered)?,
        },
        ..Options::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_says_where_its_settings_are() {
        let object = object::File::parse(OBJECT).unwrap();
        let size = object.section_by_name(GLOBALS).unwrap().size();
        let mut globals = vec![0; usize::try_from(size).unwrap()];
        let mut put = |name, bytes: &[u8]| {
            let start = usize::try_from(object.symbol_by_name(name).unwrap().address()).unwrap();
            globals[start..start + bytes.len()].copy_from_slice(bytes);
        };
        put(globals::MASQUERADE_ALL, &[1]);
        put(globals::ADMISSION, &[Admission::Opening as u8]);
        put(globals::TIMEOUTS, &[7_u64; 8].map(u64::to_ne_bytes).concat());
        let seven = Duration::from_nanos(7);
        let timeouts =
            Timeouts { tcp_established: seven, tcp_close_wait: seven, udp: seven, udp_stream: seven };
        let told =
            Options { masquerade_all: true, admission: Admission::Opening, timeouts, ..Options::default() };
        assert_eq!(decode(&globals), Some(told));
        assert_eq!(decode(&globals[1..]), None, "another build's");
    }

    #[test]
    fn a_twin_has_what_programs_write_for_itself() {
        for name in WRITTEN {
            assert!(MAPS.iter().any(|spec| spec.name == name), "{name}");
        }
        let lru = MAPS.iter().filter(|spec| spec.kind == MapKind::LruHash);
        for spec in lru {
            assert!(WRITTEN.contains(&spec.name), "{}", spec.name);
        }
    }
}
