//! What the node's devices are, looked at once.

use std::io;

use super::classify::{Device, Role, Rules, classify};
use super::dump;
use super::xdp_features::Netdev;

/// A device, and what it would be.
#[derive(Clone, Debug)]
pub struct Surveyed {
    pub device: Device,
    pub role: Role,
    /// Whether its driver runs XDP programs; `None`: the kernel does not say (before 6.3).
    pub native_xdp: Option<bool>,
}

/// Every device of this network namespace.
pub async fn survey(rules: &Rules) -> io::Result<Vec<Surveyed>> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let devices = dump::devices(&handle).await.map_err(io::Error::other);
    connection.abort();
    let devices = devices?;
    let netdev = Netdev::open().ok();
    let roles = classify(&devices, rules);
    let surveyed = devices.into_iter().filter_map(|device| {
        let role = *roles.get(&device.ifindex)?;
        let features = netdev.as_ref().and_then(|netdev| netdev.features(device.ifindex).ok());
        Some(Surveyed { role, native_xdp: features.map(|features| features.basic), device })
    });
    Ok(surveyed.collect())
}
