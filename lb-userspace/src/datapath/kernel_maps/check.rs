//! Comparing the service maps in the kernel with what they should hold, entry by entry.

use std::net::IpAddr;

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, MapError as AyaError};
use ipnet::IpNet;
use lb_common::abi::{self, AddressInfo, MemberKey, Network, OwnerName, ServiceKey, Source};
use lb_common::{V4, V6};

use super::{
    KernelMaps, PRESENT, backend, fd, frontend_key, network_entry, octets4, octets6, of_services,
    place_entry, read_error, service_key, source_key, source_net, source_value,
};
use crate::datapath::{MapError, Position};
use crate::entries::{BackendEntry, Family, Op, Table};
use crate::sys::bpf::{self, Cursor};

/// Entries, each as the operation that removes it, and where to go on in the same map.
type Part = (Vec<Op>, Option<Cursor>);

impl KernelMaps {
    /// Whether a write would change nothing.
    pub(super) fn has(&self, write: &Op) -> Result<bool, MapError> {
        let map = write.map();
        match write {
            Op::SetBackend { family, id, entry } => {
                let addr = entry.addr.ip();
                match family {
                    Family::V4 => {
                        equal(map, self.backends4.get(id, 0), octets4(addr).map(|a| backend(entry, a)))
                    }
                    Family::V6 => {
                        equal(map, self.backends6.get(id, 0), octets6(addr).map(|a| backend(entry, a)))
                    }
                }
            }
            Op::WriteSlots { base, slots } | Op::MendSlots { base, slots } => {
                let len = u32::try_from(slots.len()).unwrap_or(u32::MAX);
                Ok(self.read_window(*base, len)? == *slots)
            }
            Op::SetFrontend { key, entry } => match (octets4(key.addr), octets6(key.addr)) {
                (Some(addr), _) => equal(map, self.services4.get(&service_key(*key, addr), 0), Some(*entry)),
                (_, Some(addr)) => equal(map, self.services6.get(&service_key(*key, addr), 0), Some(*entry)),
                (None, None) => Ok(true),
            },
            Op::AddMember { window, backend } => {
                let key = MemberKey { window: *window, backend: *backend };
                equal(map, self.members.get(&key, 0), Some(PRESENT))
            }
            Op::SetNetwork { family, index, network } => {
                let stands = match family {
                    Family::V4 => equal(map, self.networks4.get(index, 0), network_entry(*network, octets4)),
                    Family::V6 => equal(map, self.networks6.get(index, 0), network_entry(*network, octets6)),
                }?;
                match network.as_ref().and_then(of_services) {
                    Some(net) => Ok(stands && self.filter.has_network(*net)?),
                    None => Ok(stands),
                }
            }
            Op::SetSource { service, net } => match (octets4(net.addr()), octets6(net.addr())) {
                (Some(addr), _) => {
                    let found = self.sources4.get(&source_key(*service, *net, addr), 0);
                    equal(map, found, Some(source_value(*net)))
                }
                (_, Some(addr)) => {
                    let found = self.sources6.get(&source_key(*service, *net, addr), 0);
                    equal(map, found, Some(source_value(*net)))
                }
                (None, None) => Ok(true),
            },
            Op::SetName { service, owner } => {
                equal(map, self.names.get(service, 0), Some(OwnerName::from(owner)))
            }
            Op::SetAddress { addr, flags } => {
                let info = Some(AddressInfo { flags: *flags });
                match (octets4(*addr), octets6(*addr)) {
                    (Some(addr), _) => {
                        Ok(equal(map, self.addresses4.get(&addr, 0), info)?
                            && self.filter.has::<V4>(&addr)?)
                    }
                    (_, Some(addr)) => {
                        Ok(equal(map, self.addresses6.get(&addr, 0), info)?
                            && self.filter.has::<V6>(&addr)?)
                    }
                    (None, None) => Ok(true),
                }
            }
            Op::SetPlace { key, place } => match (octets4(key.addr), octets6(key.addr)) {
                (Some(addr), _) => {
                    let found = self.places4.get(&service_key(*key, addr), 0);
                    equal(map, found, place_entry(*place, octets4))
                }
                (_, Some(addr)) => {
                    let found = self.places6.get(&service_key(*key, addr), 0);
                    equal(map, found, place_entry(*place, octets6))
                }
                (None, None) => Ok(true),
            },
            Op::RemoveFrontend { .. }
            | Op::RemovePlace { .. }
            | Op::RemoveMember { .. }
            | Op::RemoveSource { .. }
            | Op::RemoveName { .. }
            | Op::RemoveAddress { .. } => Ok(false),
        }
    }

    pub(super) fn entries_from(
        &self,
        table: Table,
        from: Option<Position>,
        count: usize,
    ) -> Result<(Vec<Op>, Option<Position>), MapError> {
        let Position { family, cursor } = from.unwrap_or(Position { family: Family::V4, cursor: None });
        let (ops, next) = match family {
            Family::V4 => self.entries4(table, cursor, count)?,
            Family::V6 => self.entries6(table, cursor, count)?,
        };
        let next = match (next, table, family) {
            (Some(next), ..) => Some(Position { family, cursor: Some(next) }),
            (None, Table::Slots | Table::Members | Table::Names, _) | (None, _, Family::V6) => None,
            (None, _, Family::V4) => Some(Position { family: Family::V6, cursor: None }),
        };
        Ok((ops, next))
    }

    /// Of IPv4, or of a table that both families share.
    fn entries4(&self, table: Table, cursor: Option<Cursor>, count: usize) -> Result<Part, MapError> {
        match table {
            Table::Backends => {
                array("BACKENDS4", &self.backends4, cursor, count, |id, old: abi::Backend<_>| {
                    unused(Family::V4, id, old.generation)
                })
            }
            Table::Slots => Ok((vec![], None)),
            Table::Members => hash("MEMBERS", &self.members, cursor, count, |key: MemberKey| {
                Some(Op::RemoveMember { window: key.window, backend: key.backend })
            }),
            Table::Sources => trie("SOURCES4", &self.sources4, cursor, count, |source: Source<_>, len| {
                foreign_source(source.service, source.addr.octets.into(), len)
            }),
            Table::Names => {
                hash("NAMES", &self.names, cursor, count, |service| Some(Op::RemoveName { service }))
            }
            Table::Networks => {
                array("NETWORKS4", &self.networks4, cursor, count, |index, old: Network<_>| {
                    end_of_networks(Family::V4, index, old.flags)
                })
            }
            Table::Frontends => hash("SERVICES4", &self.services4, cursor, count, |key: ServiceKey<_>| {
                let key = frontend_key(&key, key.addr.octets.into())?;
                Some(Op::RemoveFrontend { key })
            }),
            Table::Places => hash("PLACES4", &self.places4, cursor, count, |key: ServiceKey<_>| {
                let key = frontend_key(&key, key.addr.octets.into())?;
                Some(Op::RemovePlace { key })
            }),
            Table::Addresses => hash("ADDRESSES4", &self.addresses4, cursor, count, |addr: abi::Addr4| {
                Some(Op::RemoveAddress { addr: addr.octets.into() })
            }),
        }
    }

    fn entries6(&self, table: Table, cursor: Option<Cursor>, count: usize) -> Result<Part, MapError> {
        match table {
            Table::Backends => {
                array("BACKENDS6", &self.backends6, cursor, count, |id, old: abi::Backend<_>| {
                    unused(Family::V6, id, old.generation)
                })
            }
            Table::Sources => trie("SOURCES6", &self.sources6, cursor, count, |source: Source<_>, len| {
                foreign_source(source.service, source.addr.octets.into(), len)
            }),
            Table::Networks => {
                array("NETWORKS6", &self.networks6, cursor, count, |index, old: Network<_>| {
                    end_of_networks(Family::V6, index, old.flags)
                })
            }
            Table::Frontends => hash("SERVICES6", &self.services6, cursor, count, |key: ServiceKey<_>| {
                let key = frontend_key(&key, key.addr.octets.into())?;
                Some(Op::RemoveFrontend { key })
            }),
            Table::Places => hash("PLACES6", &self.places6, cursor, count, |key: ServiceKey<_>| {
                let key = frontend_key(&key, key.addr.octets.into())?;
                Some(Op::RemovePlace { key })
            }),
            Table::Addresses => hash("ADDRESSES6", &self.addresses6, cursor, count, |addr: abi::Addr6| {
                Some(Op::RemoveAddress { addr: addr.octets.into() })
            }),
            Table::Slots | Table::Members | Table::Names => Ok((vec![], None)),
        }
    }
}

/// Whether the map has what it should have.
fn equal<V: Pod + PartialEq>(
    map: &'static str,
    found: Result<V, AyaError>,
    wanted: Option<V>,
) -> Result<bool, MapError> {
    match found {
        Ok(found) => Ok(Some(found) == wanted),
        Err(AyaError::KeyNotFound) => Ok(false),
        Err(error) => Err(read_error(map)(std::io::Error::other(error))),
    }
}

fn hash<K: Pod, V: Pod>(
    name: &'static str,
    map: &HashMap<MapData, K, V>,
    cursor: Option<Cursor>,
    count: usize,
    removal: impl Fn(K) -> Option<Op>,
) -> Result<Part, MapError> {
    let (entries, next) = bpf::map_lookup_batch::<K, V>(fd(map), cursor, count).map_err(read_error(name))?;
    Ok((entries.into_iter().filter_map(|(key, _)| removal(key)).collect(), next))
}

fn array<V: Pod>(
    name: &'static str,
    map: &Array<MapData, V>,
    cursor: Option<Cursor>,
    count: usize,
    removal: impl Fn(u32, V) -> Option<Op>,
) -> Result<Part, MapError> {
    let (entries, next) =
        bpf::map_lookup_batch::<u32, V>(fd(map), cursor, count).map_err(read_error(name))?;
    Ok((entries.into_iter().filter_map(|(index, value)| removal(index, value)).collect(), next))
}

/// Tries are read in batches only since 5.13: one by one.
fn trie<K: Pod>(
    name: &'static str,
    map: &LpmTrie<MapData, K, u32>,
    mut cursor: Option<Cursor>,
    count: usize,
    removal: impl Fn(K, u32) -> Option<Op>,
) -> Result<Part, MapError> {
    let mut ops = vec![];
    for _ in 0..count {
        let next = bpf::map_next_key::<Key<K>>(fd(map), cursor).map_err(read_error(name))?;
        let Some((key, next)) = next else { return Ok((ops, None)) };
        ops.extend(removal(key.data(), key.prefix_len()));
        cursor = Some(next);
    }
    Ok((ops, cursor))
}

fn unused(family: Family, id: u32, generation: u32) -> Option<Op> {
    (generation != 0).then(|| Op::SetBackend { family, id, entry: BackendEntry::unused(family) })
}

fn end_of_networks(family: Family, index: u32, flags: u32) -> Option<Op> {
    (flags != 0).then_some(Op::SetNetwork { family, index, network: None })
}

fn foreign_source(service: u32, addr: IpAddr, prefix_len: u32) -> Option<Op> {
    let net: IpNet = source_net(addr, prefix_len)?;
    Some(Op::RemoveSource { service, net })
}
