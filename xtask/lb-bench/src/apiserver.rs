//! An API server for the agent and for kube-proxy: the double of the tests, with the objects of a directory.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use fairlead::source::manifests;
use lb_double::Double;

/// How long an answer may take. Machines are shared and slow.
const PATIENCE: Duration = Duration::from_mins(1);

/// Objects in one answer, as the agent asks for them.
const PAGE: usize = 200;

/// How an answer begins.
const OK: &[u8; 12] = b"HTTP/1.1 200";

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it listens
    port: u16,
    /// Directory with manifests of them
    objects: PathBuf,
}

/// Serves until it is killed; says so when it does.
pub(crate) fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("cannot start tokio")?.block_on(async {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, args.port));
        let double = Double::at(&addr.to_string(), PAGE).await;
        double.be_tireless();
        for name in manifests::names_in(&args.objects).context("no objects")? {
            let path = args.objects.join(name);
            let read = File::open(&path).and_then(manifests::documents);
            for object in read.with_context(|| format!("cannot read {}", path.display()))? {
                double.apply(object.map_err(anyhow::Error::msg)?);
            }
            double.forget();
        }
        println!("serving");
        std::future::pending().await
    })
}

/// Creates or changes the objects of a list.
pub(crate) fn put(server: SocketAddr, list: &[u8]) -> Result<()> {
    let mut stream = TcpStream::connect(server).with_context(|| format!("no API server at {server}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let length = list.len();
    let mut request =
        format!("PUT / HTTP/1.1\r\nHost: {server}\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    request.extend_from_slice(list);
    stream.write_all(&request).context("cannot ask the API server")?;
    let mut answer = [0; OK.len()];
    stream.read_exact(&mut answer).context("the API server does not answer")?;
    if answer != *OK {
        bail!("the API server refuses a list: {}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}
