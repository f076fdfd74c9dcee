//! Whether a pinned map may be used again: aya takes what it finds without looking.

use lb_common::maps::MapSpec;

use super::options::Wanted;
use crate::sys::bpf::MapInfo;

/// What becomes of a pinned map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It is as it should be.
    Use,
    /// Its size is another than the default, and no flag says otherwise.
    Keep { entries: u32 },
    /// A flag asks for another size.
    Resize { flag: &'static str, entries: u32 },
    /// Keys, values or the kind of map differ.
    Refuse { difference: String },
}

/// Compares a pinned map with its specification.
pub(super) fn judge(spec: &MapSpec, wanted: Wanted, pinned: &MapInfo) -> Verdict {
    let fields = [
        ("type", spec.kind as u32, pinned.kind),
        ("key size", spec.key_size, pinned.key_size),
        ("value size", spec.value_size, pinned.value_size),
        ("flags", spec.flags, pinned.flags),
    ];
    for (field, want, have) in fields {
        if want != have {
            return Verdict::Refuse { difference: format!("{field} {have} instead of {want}") };
        }
    }
    if wanted.entries == pinned.max_entries {
        return Verdict::Use;
    }
    match wanted.flag {
        None => Verdict::Refuse {
            difference: format!("{} entries instead of {}", pinned.max_entries, wanted.entries),
        },
        Some(flag) if wanted.explicit => Verdict::Resize { flag, entries: pinned.max_entries },
        Some(_) => Verdict::Keep { entries: pinned.max_entries },
    }
}

#[cfg(test)]
mod tests {
    use lb_common::maps::MAPS;

    use super::super::options::Sizes;
    use super::*;

    fn spec(name: &str) -> &'static MapSpec {
        MAPS.iter().find(|spec| spec.name == name).unwrap()
    }

    fn as_specified(spec: &MapSpec, sizes: Sizes) -> MapInfo {
        MapInfo {
            id: 1,
            kind: spec.kind as u32,
            key_size: spec.key_size,
            value_size: spec.value_size,
            max_entries: sizes.wanted(spec.capacity).entries,
            flags: spec.flags,
        }
    }

    #[test]
    fn every_map_as_specified_is_used() {
        for sizes in [Sizes::default(), Sizes { flows: Some(8), services: Some(9), backends: Some(10) }] {
            for spec in &MAPS {
                let pinned = as_specified(spec, sizes);
                assert_eq!(judge(spec, sizes.wanted(spec.capacity), &pinned), Verdict::Use, "{}", spec.name);
            }
        }
    }

    #[test]
    fn another_layout_is_refused() {
        let spec = spec("FLOWS4");
        let wanted = Sizes::default().wanted(spec.capacity);
        let good = as_specified(spec, Sizes::default());
        for bad in [
            MapInfo { kind: 1, ..good },
            MapInfo { key_size: 12, ..good },
            MapInfo { value_size: 48, ..good },
            MapInfo { flags: 2, ..good },
        ] {
            assert!(matches!(judge(spec, wanted, &bad), Verdict::Refuse { .. }), "{bad:?}");
        }
    }

    #[test]
    fn another_size_is_kept_unless_a_flag_was_given() {
        let spec = spec("SLOTS");
        let pinned = as_specified(spec, Sizes { backends: Some(100), ..Sizes::default() });
        assert_eq!(pinned.max_entries, 1600);
        let default = Sizes::default().wanted(spec.capacity);
        assert_eq!(judge(spec, default, &pinned), Verdict::Keep { entries: 1600 });
        let given = Sizes { backends: Some(200), ..Sizes::default() }.wanted(spec.capacity);
        let resize = Verdict::Resize { flag: "--max-backends", entries: 1600 };
        assert_eq!(judge(spec, given, &pinned), resize);
    }

    #[test]
    fn a_fixed_size_is_part_of_the_layout() {
        let spec = spec("EDGES");
        let wanted = Sizes::default().wanted(spec.capacity);
        let pinned = MapInfo { max_entries: 7, ..as_specified(spec, Sizes::default()) };
        assert!(matches!(judge(spec, wanted, &pinned), Verdict::Refuse { .. }));
    }
}
