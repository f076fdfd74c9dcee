//! Both ends of the traffic of group `sockets`: plain blocking sockets, so that the kernel's part is most of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

/// Connections that are served at the same time.
const SERVERS: usize = 4;
/// Datagrams on their way.
const WINDOW: usize = 16;
/// Bytes of a small datagram.
const SMALL: usize = 64;
/// When a datagram is taken for lost.
const LOST: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Mode {
    /// Connections with one byte each way, one after the other, per second
    Connect,
    /// One byte there and back on one connection, per second
    Request,
    /// Megabits per second
    Stream,
    /// Small datagrams there and back, sixteen on their way, per second
    Datagram,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServeArgs {
    addr: SocketAddr,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LoadArgs {
    #[arg(value_enum)]
    mode: Mode,
    target: SocketAddr,
    millis: u64,
}

/// Serves until it is killed. A line on stdout: it does.
pub(crate) fn serve(args: &ServeArgs) -> Result<()> {
    let listener = TcpListener::bind(args.addr).with_context(|| format!("cannot listen on {}", args.addr))?;
    let socket = UdpSocket::bind(args.addr).with_context(|| format!("cannot listen on {}", args.addr))?;
    println!("serving");
    thread::scope(|scope| {
        for _ in 0..SERVERS {
            scope.spawn(|| {
                for stream in listener.incoming() {
                    // Whoever has left is nobody's loss.
                    let _ = stream.and_then(answer);
                }
            });
        }
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    Ok(())
}

/// The first byte says what the client wants.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    match &wish {
        b"c" => stream.write_all(b"c"),
        b"s" => {
            let mut buffer = vec![0; 1 << 18];
            while stream.read(&mut buffer)? > 0 {}
            Ok(())
        }
        _ => loop {
            stream.write_all(&wish)?;
            stream.read_exact(&mut wish)?;
        },
    }
}

/// Waits for a line on stdin, does what it is told for so long, and prints how much that was.
pub(crate) fn load(args: &LoadArgs) -> Result<()> {
    std::io::stdin().read_line(&mut String::new()).context("no word to begin")?;
    let time = Duration::from_millis(args.millis);
    let begin = Instant::now();
    let done = match args.mode {
        Mode::Connect => connect(args.target, time),
        Mode::Request => request(args.target, time),
        Mode::Stream => stream(args.target, time),
        Mode::Datagram => datagrams(args.target, time),
    }
    .with_context(|| format!("{:?} with {}", args.mode, args.target))?;
    println!("{}", done / begin.elapsed().as_secs_f64());
    Ok(())
}

fn open(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The server closes first, so that the client's port is free again.
fn connect(target: SocketAddr, time: Duration) -> Result<f64> {
    let end = Instant::now() + time;
    let mut count = 0.0;
    let mut answer = Vec::new();
    while Instant::now() < end {
        let mut stream = open(target)?;
        stream.write_all(b"c")?;
        answer.clear();
        stream.read_to_end(&mut answer)?;
        ensure!(answer == b"c", "another answer: {answer:?}");
        count += 1.0;
    }
    Ok(count)
}

fn request(target: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = open(target)?;
    let end = Instant::now() + time;
    let mut count = 0.0;
    let mut byte = *b"r";
    while Instant::now() < end {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        count += 1.0;
    }
    Ok(count)
}

/// Megabits.
fn stream(target: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = open(target)?;
    stream.write_all(b"s")?;
    let end = Instant::now() + time;
    let buffer = vec![0; 1 << 17];
    let mut megabits = 0.0;
    while Instant::now() < end {
        stream.write_all(&buffer)?;
        megabits += f64::from(1 << 20) / 1e6;
    }
    Ok(megabits)
}

fn datagrams(target: SocketAddr, time: Duration) -> Result<f64> {
    let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    socket.set_read_timeout(Some(LOST))?;
    let mut buffer = [0; SMALL];
    let fill = |socket: &UdpSocket| (0..WINDOW).try_for_each(|_| socket.send(&[0; SMALL]).map(drop));
    fill(&socket)?;
    let end = Instant::now() + time;
    let mut count = 0.0;
    while Instant::now() < end {
        if socket.recv(&mut buffer).is_ok() {
            count += 1.0;
            socket.send(&buffer)?;
        } else {
            fill(&socket)?;
        }
    }
    ensure!(count > 0.0, "no answer");
    Ok(count)
}
