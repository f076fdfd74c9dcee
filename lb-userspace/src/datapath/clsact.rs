//! tc hooks on kernels without tcx: a clsact qdisc and `cls_bpf` filters in direct-action mode.
//!
//! Filters belong to their device and outlive the agent. Ours have a priority, a handle and a name of
//! their own, so that a restart replaces them in place and cleanup takes away nothing else.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use rtnetlink::{Error, Handle};

use super::hooks::{Direction, Place};

/// Handle of every filter of ours.
const HANDLE: u32 = 0xfa1;
/// At ingress before what others usually put there.
const PRIORITY_INGRESS: u16 = 7;
/// At egress after all others: automatic priorities count down from 0xc000.
const PRIORITY_EGRESS: u16 = 0xfff0;
/// Names of filters are this and the name of the program.
const NAME_PREFIX: &str = "fairlead/";

/// Puts a program on a device, in place of what was there from us. `true`: the qdisc was made for it.
pub(super) async fn attach(
    handle: &Handle,
    ifindex: u32,
    place: Place,
    program: BorrowedFd<'_>,
) -> Result<bool, Error> {
    let made = ensure_qdisc(handle, ifindex).await?;
    let mut message = filter(ifindex, place);
    let fd = u32::try_from(program.as_raw_fd()).unwrap_or_default();
    message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.into()));
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(fd)),
        TcOption::Bpf(TcFilterBpfOption::ProgName(format!("{NAME_PREFIX}{}", place.program()))),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    // Without NLM_F_EXCL an existing filter of this handle is changed in place.
    request(handle, RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE).await?;
    Ok(made)
}

/// Takes our filter off a device; fine if it is not there.
pub(super) async fn detach(handle: &Handle, ifindex: u32, place: Place) -> Result<(), Error> {
    let message = filter(ifindex, place);
    match request(handle, RouteNetlinkMessage::DelTrafficFilter(message), 0).await {
        Err(error) if !is_gone(&error) => Err(error),
        _ => Ok(()),
    }
}

/// [`filters`], with a socket of its own.
pub(crate) async fn all_filters() -> io::Result<Vec<(Place, u32)>> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let found = filters(&handle).await.map_err(io::Error::other);
    connection.abort();
    Ok(found?.into_iter().map(|(ifindex, place)| (place, ifindex)).collect())
}

/// Our filters on the devices of this namespace.
pub(super) async fn filters(handle: &Handle) -> Result<Vec<(u32, Place)>, Error> {
    let mut found = Vec::new();
    for ifindex in qdiscs(handle).await? {
        for direction in [Direction::Ingress, Direction::Egress] {
            for message in dump_filters(handle, ifindex, direction).await? {
                if let Some(place) = ours(&message) {
                    found.push((ifindex, place));
                }
            }
        }
    }
    Ok(found)
}

/// Takes the clsact qdisc off a device if no filter is left on it. `true`: it was.
pub(super) async fn remove_qdisc_if_empty(handle: &Handle, ifindex: u32) -> Result<bool, Error> {
    if !qdiscs(handle).await?.contains(&ifindex) {
        return Ok(false);
    }
    for direction in [Direction::Ingress, Direction::Egress] {
        if !dump_filters(handle, ifindex, direction).await?.is_empty() {
            return Ok(false);
        }
    }
    let message = qdisc(ifindex);
    match request(handle, RouteNetlinkMessage::DelQueueDiscipline(message), 0).await {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Devices of this namespace that have a clsact qdisc.
async fn qdiscs(handle: &Handle) -> Result<Vec<u32>, Error> {
    let messages: Vec<TcMessage> = handle.qdisc().get().execute().try_collect().await?;
    Ok(messages
        .iter()
        .filter(|message| message.attributes.contains(&TcAttribute::Kind("clsact".into())))
        .filter_map(|message| u32::try_from(message.header.index).ok())
        .collect())
}

async fn dump_filters(handle: &Handle, ifindex: u32, direction: Direction) -> Result<Vec<TcMessage>, Error> {
    let request = handle.traffic_filter(ifindex.cast_signed()).get();
    let request = match direction {
        Direction::Ingress => request.ingress(),
        Direction::Egress => request.egress(),
    };
    match request.execute().try_collect::<Vec<_>>().await {
        // Each classifier is listed by itself and, with a handle, for each of its filters.
        Ok(messages) => Ok(messages.into_iter().filter(|m| u32::from(m.header.handle) != 0).collect()),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

async fn ensure_qdisc(handle: &Handle, ifindex: u32) -> Result<bool, Error> {
    let mut message = qdisc(ifindex);
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    let made =
        request(handle, RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL).await;
    match made {
        Ok(()) => Ok(true),
        Err(Error::NetlinkError(error)) if code(&error) == libc::EEXIST => Ok(false),
        Err(error) => Err(error),
    }
}

fn qdisc(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message
}

fn filter(ifindex: u32, place: Place) -> TcMessage {
    let (minor, priority) = match place.direction() {
        Some(Direction::Egress) => (TcHandle::MIN_EGRESS, PRIORITY_EGRESS),
        Some(Direction::Ingress) | None => (TcHandle::MIN_INGRESS, PRIORITY_INGRESS),
    };
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = TcHandle { major: 0xffff, minor };
    message.header.handle = HANDLE.into();
    // The protocol is ETH_P_ALL in network byte order.
    message.header.info = u32::from(TcHandle { major: priority, minor: 0x0003_u16.to_be() });
    message
}

/// The place of a filter, if it is one of ours.
fn ours(message: &TcMessage) -> Option<Place> {
    if u32::from(message.header.handle) != HANDLE {
        return None;
    }
    message.attributes.iter().find_map(|attribute| {
        let TcAttribute::Options(options) = attribute else { return None };
        options.iter().find_map(|option| {
            let TcOption::Bpf(TcFilterBpfOption::ProgName(name)) = option else { return None };
            Place::of_program(name.strip_prefix(NAME_PREFIX)?)
        })
    })
}

async fn request(handle: &Handle, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut responses = handle.clone().request(message)?;
    while let Some(response) = responses.next().await {
        if let NetlinkPayload::Error(error) = response.payload
            && error.code.is_some()
        {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// The device, qdisc or filter is not there.
fn is_gone(error: &Error) -> bool {
    matches!(error, Error::NetlinkError(error)
        if [libc::ENOENT, libc::ENODEV, libc::EINVAL].contains(&code(error)))
}

fn code(error: &ErrorMessage) -> i32 {
    error.raw_code().unsigned_abs().cast_signed()
}
