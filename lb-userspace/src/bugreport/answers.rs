//! What the agent answers over HTTP, if one runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{LIMIT, PATIENCE};

/// Where the agent answers by default.
pub const HEALTHZ: &str = "127.0.0.1:10256";
pub const METRICS: &str = "127.0.0.1:10249";

/// Where the agent with these settings listens: the value of `--flag=…`, `--flag …` or `flag: …`.
pub fn address(settings: &str, flag: &str, default: &str) -> String {
    let told = settings.lines().find_map(|line| {
        let value =
            line.trim().trim_start_matches("--").strip_prefix(flag)?.trim_start_matches([':', '=', ' ']);
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    });
    let Some(told) = told else { return default.to_owned() };
    match told.parse::<SocketAddr>() {
        // Everywhere is here, too.
        Ok(SocketAddr::V4(addr)) if addr.ip().is_unspecified() => at(Ipv4Addr::LOCALHOST, addr.port()),
        Ok(SocketAddr::V6(addr)) if addr.ip().is_unspecified() => at(Ipv6Addr::LOCALHOST, addr.port()),
        Ok(addr) => addr.to_string(),
        // An address without a port has the default one.
        Err(_) => {
            match (told.parse::<IpAddr>(), default.rsplit_once(':').and_then(|(_, port)| port.parse().ok())) {
                (Ok(addr), Some(port)) if !addr.is_unspecified() => at(addr, port),
                _ => default.to_owned(),
            }
        }
    }
}

fn at(addr: impl Into<IpAddr>, port: u16) -> String {
    SocketAddr::new(addr.into(), port).to_string()
}

/// The answer, headers included.
pub async fn get(address: &str, path: &str) -> Result<String> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(LIMIT as u64 + 1).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let Ok(answer) = timeout(PATIENCE, ask).await else { bail!("nothing answers at {address} in time") };
    let answer = answer.with_context(|| format!("nobody answers at {address}"))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_asked_where_its_settings_say() {
        let ask = |settings: &str| address(settings, "healthz-bind-address", HEALTHZ);
        assert_eq!(ask("run\n--device\neth0\n"), HEALTHZ);
        assert_eq!(ask("--healthz-bind-address=192.0.2.1:20256\n"), "192.0.2.1:20256");
        assert_eq!(ask("--healthz-bind-address 0.0.0.0:20256\n"), "127.0.0.1:20256");
        assert_eq!(ask("healthz-bind-address: \"[::]:20256\"\n"), "[::1]:20256");
        assert_eq!(ask("--healthz-bind-address=192.0.2.1\n"), "192.0.2.1:10256");
        assert_eq!(ask("--healthz-bind-address=0.0.0.0\n"), HEALTHZ);
        assert_eq!(ask("--healthz-bind-address=\n"), HEALTHZ);
    }
}
