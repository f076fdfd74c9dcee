//! Servers: threads inside a namespace that answer what [`wire`](super::wire) describes.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::netns::Netns;
use super::sctp;
use super::wire::{self, Frame, Introduction, Protocol, Sender};

/// A peer that is silent for so long in the middle of a transfer is gone.
const SILENCE: Duration = Duration::from_mins(1);

/// Ends servers: once it is given, everything that waits for it returns.
#[derive(Clone, Debug)]
pub struct Stop(Arc<EventFd>);

impl Stop {
    pub fn new() -> Result<Self> {
        Ok(Self(Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).context("cannot make an eventfd")?)))
    }

    pub fn give(&self) {
        // Nobody reads the number, so that it wakes all, now and later.
        let _ = self.0.write(1);
    }

    /// Waits until there is something to read: true; or the stop is given: false.
    pub(super) fn readable(&self, socket: &impl AsFd) -> bool {
        loop {
            let stop = PollFd::new(self.0.as_fd(), PollFlags::POLLIN);
            let mut both = [stop, PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut both, PollTimeout::NONE) {
                Ok(_) => return !both[0].any().unwrap_or(true),
                Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Starts a server on each of `addrs`, in the namespace of the calling thread. It listens when this returns
/// and runs until the stop is given.
pub fn serve(name: &str, protocol: Protocol, addrs: &[SocketAddr], stop: &Stop) -> Result<()> {
    for addr in addrs {
        let (name, stop) = (name.to_owned(), stop.clone());
        let doing = || format!("{name} cannot serve {protocol} at {addr}");
        match protocol {
            Protocol::Tcp => {
                let listener = listen(*addr).with_context(doing)?;
                thread::spawn(move || accept(&name, &listener, &stop));
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(addr).with_context(doing)?;
                let at = *addr;
                thread::spawn(move || answer_datagrams(&name, at, &socket, &stop));
            }
            Protocol::Sctp => sctp::serve(&name, *addr, &stop).with_context(doing)?,
        }
    }
    Ok(())
}

/// A server of a process that outlives the one that started it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Site {
    pub ns: Netns,
    pub name: String,
    pub protocol: Protocol,
    pub addrs: Vec<SocketAddr>,
}

/// Servers of a lab that is kept, until the process is killed.
#[derive(clap::Args)]
pub struct SitesArgs {
    /// What to serve, as JSON
    sites: String,
}

/// Runs servers in their namespaces, says so on standard output, and goes on until it is killed.
pub fn run_sites(args: &SitesArgs) -> Result<()> {
    let sites: Vec<Site> = serde_json::from_str(&args.sites).context("cannot read what to serve")?;
    let stop = Stop::new()?;
    for site in sites {
        site.ns.run(|| serve(&site.name, site.protocol, &site.addrs, &stop))??;
    }
    println!("{SERVING}");
    loop {
        thread::park();
    }
}

/// What [`run_sites`] says when every server listens.
pub(super) const SERVING: &str = "serving";

/// Like [`TcpListener::bind`], with room for a burst of connections.
fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn accept(name: &str, listener: &TcpListener, stop: &Stop) {
    while stop.readable(listener) {
        let Ok((connection, saw)) = listener.accept() else { continue };
        let (name, stop) = (name.to_owned(), stop.clone());
        // A connection that breaks is its client's to report.
        thread::spawn(move || converse(name, connection, saw, &stop));
    }
}

fn converse(server: String, mut connection: TcpStream, saw: SocketAddr, stop: &Stop) -> Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(SILENCE))?;
    connection.set_write_timeout(Some(SILENCE))?;
    let introduction = Introduction { server, at: connection.local_addr()?, saw };
    while stop.readable(&connection) {
        let line = wire::read_line(&mut connection)?;
        if line.starts_with("GET ") {
            let head = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close";
            write!(connection, "{head}\r\n\r\n{introduction}\n")?;
            // Closing with unread input would reset the connection: take the rest of the request.
            connection.shutdown(std::net::Shutdown::Write)?;
            connection.read_to_end(&mut Vec::new())?;
            break;
        }
        connection.write_all(format!("{introduction}\n").as_bytes())?;
        if let Some(len) = wire::bulk_len(&line)? {
            let mut out = connection.try_clone()?;
            let sending = thread::spawn(move || wire::send_stream(&mut out, Sender::Server, len));
            let first_wrong = wire::receive_stream(&mut connection, Sender::Client, len)?;
            sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            let verdict = first_wrong.map_or("same".to_owned(), |at| format!("different at byte {at}"));
            connection.write_all(format!("{verdict}\n").as_bytes())?;
        }
    }
    Ok(())
}

fn answer_datagrams(name: &str, at: SocketAddr, socket: &UdpSocket, stop: &Stop) {
    let mut buffer = vec![0; 65536];
    while stop.readable(socket) {
        // Errors are of earlier answers (ICMP) and say nothing about the next request.
        let Ok((len, saw)) = socket.recv_from(&mut buffer) else { continue };
        let datagram = &buffer[..len];
        let answer = match Frame::check(Sender::Client, datagram) {
            Ok(Some(frame)) => Frame { sender: Sender::Server, ..frame }.bytes(),
            Ok(None) => {
                let nonce = String::from_utf8_lossy(datagram);
                let nonce = nonce.trim_start_matches("who").trim();
                let introduction = Introduction { server: name.to_owned(), at, saw };
                format!("{nonce} {introduction}").into_bytes()
            }
            Err(err) => format!("! {err}").into_bytes(),
        };
        let _ = socket.send_to(&answer, saw);
    }
}
