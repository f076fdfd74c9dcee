//! What the kernel says about devices and ways, message by message: netlink knows more than any table shows.

use std::fmt::{Debug, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use futures::{Stream, TryStreamExt as _};
use rtnetlink::{Error, Handle, IpVersion, RouteMessageBuilder};
use tokio::time::timeout;

use super::PATIENCE;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Table {
    Links,
    Addresses,
    Routes,
    Rules,
    Qdiscs,
    Filters,
}

/// The files that they go to.
pub const TABLES: [(&str, Table); 6] = [
    ("netlink-links.txt", Table::Links),
    ("netlink-addresses.txt", Table::Addresses),
    ("netlink-routes.txt", Table::Routes),
    ("netlink-rules.txt", Table::Rules),
    ("netlink-qdiscs.txt", Table::Qdiscs),
    ("netlink-filters.txt", Table::Filters),
];

/// One message in a line.
pub async fn dump(table: Table) -> Result<String> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open netlink")?;
    let connection = tokio::spawn(connection);
    let found = timeout(PATIENCE, ask(&handle, table)).await.context("netlink does not answer")?;
    connection.abort();
    found.context("netlink refuses")
}

async fn ask(handle: &Handle, table: Table) -> Result<String, Error> {
    match table {
        Table::Links => lines(handle.link().get().execute()).await,
        Table::Addresses => lines(handle.address().get().execute()).await,
        Table::Routes => {
            let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
            let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
            Ok(lines(handle.route().get(v4).execute()).await?
                + &lines(handle.route().get(v6).execute()).await?)
        }
        Table::Rules => {
            let v4 = lines(handle.rule().get(IpVersion::V4).execute()).await?;
            Ok(v4 + &lines(handle.rule().get(IpVersion::V6).execute()).await?)
        }
        Table::Qdiscs => lines(handle.qdisc().get().execute()).await,
        Table::Filters => filters(handle).await,
    }
}

/// Of both directions of each device.
async fn filters(handle: &Handle) -> Result<String, Error> {
    let links: Vec<_> = handle.link().get().execute().try_collect().await?;
    let mut text = String::new();
    for index in links.into_iter().filter_map(|link| i32::try_from(link.header.index).ok()) {
        for at in [handle.traffic_filter(index).get().ingress(), handle.traffic_filter(index).get().egress()]
        {
            // A device without a classifier is an error to some kernels.
            text += &lines(at.execute()).await.unwrap_or_default();
        }
    }
    Ok(text)
}

async fn lines<T: Debug>(messages: impl Stream<Item = Result<T, Error>>) -> Result<String, Error> {
    let messages: Vec<T> = messages.try_collect().await?;
    let mut text = String::new();
    for message in messages {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{message:?}");
    }
    Ok(text)
}
