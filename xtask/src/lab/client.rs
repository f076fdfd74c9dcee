//! Clients: what a pod, an outside machine or a process of a node asks for, and what comes back.
//!
//! [`Desk`] does the work in whatever namespace and cgroup its thread or process is in. [`Caller`] passes
//! tasks to a desk: in a thread inside a namespace, or in a process of its own where the cgroup matters.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::cgroup::Cgroup;
use super::netns::Netns;
use super::sctp;
use super::server::{Stop, serve};
use super::wire::{self, Frame, Introduction, Protocol, Sender};

/// How long a call waits for its answer. Machines are shared and slow.
const PATIENCE: Duration = Duration::from_secs(10);
/// Size of the datagrams of a bulk transfer: they fit any MTU from IPv6's 1280 bytes up, and are no multiple of 8.
const DATAGRAM: usize = 1202;
/// Bytes of these datagrams that are on their way at the same time.
const WINDOW: usize = 16 * DATAGRAM;
/// When a datagram of a bulk transfer is sent again.
const RESEND: Duration = Duration::from_millis(500);

/// One call: whom, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    pub protocol: Protocol,
    pub target: SocketAddr,
    /// Source port; any if absent.
    pub from_port: Option<u16>,
    /// UDP: whether the socket is connected to its target.
    pub connected: bool,
    /// UDP: bytes of each datagram of a bulk transfer.
    pub datagram: usize,
    /// TCP: closing resets the connection, so that its port is free at once.
    pub abrupt: bool,
    pub patience: Duration,
}

impl Call {
    pub fn new(protocol: Protocol, target: SocketAddr) -> Self {
        Self {
            protocol,
            target,
            from_port: None,
            connected: true,
            datagram: DATAGRAM,
            abrupt: false,
            patience: PATIENCE,
        }
    }

    pub fn tcp(target: SocketAddr) -> Self {
        Self::new(Protocol::Tcp, target)
    }

    pub fn udp(target: SocketAddr) -> Self {
        Self::new(Protocol::Udp, target)
    }

    #[must_use]
    pub fn from_port(self, port: u16) -> Self {
        Self { from_port: Some(port), ..self }
    }

    /// UDP: the socket names its target with each datagram.
    #[must_use]
    pub fn unconnected(self) -> Self {
        Self { connected: false, ..self }
    }

    /// UDP: a bulk transfer goes in datagrams of so many bytes, in both directions; those beyond the MTU in fragments.
    #[must_use]
    pub fn datagram(self, bytes: usize) -> Self {
        Self { datagram: bytes, ..self }
    }

    /// TCP: the connection ends with a reset.
    #[must_use]
    pub fn abrupt(self) -> Self {
        Self { abrupt: true, ..self }
    }

    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// The same target, named by an IPv6 socket (`::ffff:a.b.c.d`).
    #[must_use]
    pub fn mapped(self) -> Self {
        match self.target.ip() {
            IpAddr::V4(addr) => {
                let target = SocketAddr::new(addr.to_ipv6_mapped().into(), self.target.port());
                Self { target, ..self }
            }
            IpAddr::V6(_) => self,
        }
    }

    /// Like [`UdpSocket::bind`] and [`TcpStream::connect`], as the call wants it.
    fn connect(&self) -> io::Result<Socket> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_connect() {
                // A process that another thread is starting holds what was closed just now, until its exec.
                Err(err)
                    if err.kind() == ErrorKind::AddrNotAvailable
                        && self.from_port.is_some()
                        && Instant::now() < deadline =>
                {
                    thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }

    fn try_connect(&self) -> io::Result<Socket> {
        let kind = match self.protocol {
            Protocol::Tcp => Type::STREAM,
            Protocol::Udp => Type::DGRAM,
            Protocol::Sctp => return sctp::connect(self.target),
        };
        let socket = Socket::new(Domain::for_address(self.target), kind, None)?;
        if self.from_port.is_some() || self.protocol == Protocol::Udp {
            let any = match self.target {
                SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
            };
            // Of UDP sockets that allow it, two may be given one port, and one of them the answers of both.
            socket.set_reuse_address(self.from_port.is_some())?;
            socket.bind(&SocketAddr::new(any, self.from_port.unwrap_or(0)).into())?;
        }
        if self.abrupt {
            socket.set_linger(Some(Duration::ZERO))?;
        }
        match self.protocol {
            Protocol::Tcp => socket.connect_timeout(&self.target.into(), self.patience)?,
            Protocol::Udp if self.connected => socket.connect(&self.target.into())?,
            Protocol::Udp | Protocol::Sctp => {}
        }
        socket.set_read_timeout(Some(self.patience))?;
        socket.set_write_timeout(Some(self.patience))?;
        Ok(socket)
    }
}

/// What came back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    Answer(Answer),
    /// TCP RST in answer to the SYN, ICMP port unreachable, or `ECONNREFUSED` from `connect` itself.
    Refused,
    /// The connection was reset after it was made.
    Reset,
    /// Silence.
    TimedOut,
    /// No way there: the error.
    Unreachable(String),
    /// Anything else, in words.
    Failed(String),
}

/// An answer, with both ends' views of the connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// What the server says.
    pub introduction: Introduction,
    /// The client's own address.
    pub local: SocketAddr,
    /// Where the client believes the answer to come from: `getpeername`, or the source of the datagram.
    pub peer: SocketAddr,
}

impl Outcome {
    /// Name of the server that answered.
    pub fn server(&self) -> Option<&str> {
        match self {
            Self::Answer(answer) => Some(&answer.introduction.server),
            _ => None,
        }
    }

    /// The client's address, as the server saw it.
    pub fn seen_as(&self) -> Option<SocketAddr> {
        match self {
            Self::Answer(answer) => Some(answer.introduction.saw),
            _ => None,
        }
    }

    fn of_error(err: &io::Error) -> Self {
        match err.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::Reset,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::TimedOut,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Self::Unreachable(err.to_string()),
            _ => Self::Failed(err.to_string()),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(answer) => write!(f, "{}", answer.introduction),
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::TimedOut => f.write_str("no answer"),
            Self::Unreachable(err) | Self::Failed(err) => f.write_str(err),
        }
    }
}

/// What became of many calls.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Answers by server.
    pub answers: BTreeMap<String, u32>,
    /// Everything else, by what it was.
    pub failures: BTreeMap<String, u32>,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        for (into, from) in [(&mut self.answers, other.answers), (&mut self.failures, other.failures)] {
            for (what, count) in from {
                *into.entry(what).or_default() += count;
            }
        }
    }
}

/// A bulk transfer that came through whole, in both directions.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Transfer {
    pub server: String,
    /// Datagrams that had to be sent again.
    pub resent: u32,
}

/// What a desk can be asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Task {
    Ask(Call),
    Many(Call, u32),
    Bulk(Call, u64),
    Open(Call),
    Again(u32),
    Close(u32),
    Serve(String, Protocol, Vec<SocketAddr>),
    Get(SocketAddr, String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Report {
    Outcome(Outcome),
    Tally(Tally),
    Transfer(Transfer),
    Opened(u32, Outcome),
    Page(u16, String),
    Done,
    /// The task could not be done, which says nothing about the network.
    Error(String),
}

/// Does tasks, one after the other.
struct Desk {
    stop: Stop,
    sessions: BTreeMap<u32, Session>,
    next_session: u32,
    next_nonce: u64,
}

/// A connection that stays open, or a UDP socket that keeps its port.
struct Session {
    call: Call,
    socket: Socket,
}

impl Desk {
    fn new(stop: Stop) -> Self {
        Self { stop, sessions: BTreeMap::new(), next_session: 1, next_nonce: 1 }
    }

    fn perform(&mut self, task: Task) -> Report {
        self.try_perform(task).unwrap_or_else(|err| Report::Error(format!("{err:#}")))
    }

    fn try_perform(&mut self, task: Task) -> Result<Report> {
        Ok(match task {
            Task::Ask(call) => Report::Outcome(self.ask(&call)),
            Task::Many(call, count) => {
                let mut tally = Tally::default();
                for _ in 0..count {
                    match self.ask(&call) {
                        Outcome::Answer(answer) => {
                            *tally.answers.entry(answer.introduction.server).or_default() += 1;
                        }
                        other => *tally.failures.entry(other.to_string()).or_default() += 1,
                    }
                }
                Report::Tally(tally)
            }
            Task::Bulk(call, len) => Report::Transfer(match call.protocol {
                Protocol::Tcp => bulk_over_tcp(&call, len)?,
                Protocol::Udp => bulk_over_udp(&call, len)?,
                Protocol::Sctp => bail!("SCTP is spoken for single calls only"),
            }),
            Task::Open(call) => {
                let id = self.next_session;
                self.next_session += 1;
                match call.connect() {
                    Ok(socket) => self.sessions.insert(id, Session { call, socket }),
                    Err(err) => return Ok(Report::Opened(id, Outcome::of_error(&err))),
                };
                Report::Opened(id, self.again(id)?)
            }
            Task::Again(id) => Report::Outcome(self.again(id)?),
            Task::Close(id) => {
                self.sessions.remove(&id);
                Report::Done
            }
            Task::Serve(name, protocol, addrs) => {
                serve(&name, protocol, &addrs, &self.stop)?;
                Report::Done
            }
            Task::Get(addr, path) => get(addr, &path)?,
        })
    }

    fn ask(&mut self, call: &Call) -> Outcome {
        let nonce = self.nonce();
        let answer = call.connect().and_then(|socket| introduce(call, &socket, nonce));
        answer.unwrap_or_else(|err| Outcome::of_error(&err))
    }

    fn again(&mut self, id: u32) -> Result<Outcome> {
        let nonce = self.nonce();
        let Session { call, socket } = self.sessions.get(&id).context("there is no such session")?;
        Ok(introduce(call, socket, nonce).unwrap_or_else(|err| Outcome::of_error(&err)))
    }

    fn nonce(&mut self) -> u64 {
        self.next_nonce += 1;
        self.next_nonce
    }
}

/// Asks `who` on a socket of `call`.
fn introduce(call: &Call, socket: &Socket, nonce: u64) -> io::Result<Outcome> {
    let (line, peer) = match call.protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::from(socket.try_clone()?);
            stream.write_all(b"who\n")?;
            (wire::read_line(&mut stream)?, stream.peer_addr()?)
        }
        Protocol::Udp => {
            let socket = UdpSocket::from(socket.try_clone()?);
            let request = format!("who {nonce}").into_bytes();
            if call.connected {
                socket.send(&request)?
            } else {
                socket.send_to(&request, call.target)?
            };
            let (line, from) = receive_answer(&socket, nonce, call.patience)?;
            (line, if call.connected { socket.peer_addr()? } else { from })
        }
        Protocol::Sctp => return sctp::introduce(call, socket, nonce),
    };
    let local = TcpStream::from(socket.try_clone()?).local_addr()?;
    if peer != call.target {
        return Ok(Outcome::Failed(format!("{} answers as {peer}: {line}", call.target)));
    }
    Ok(match line.parse() {
        Ok(introduction) => Outcome::Answer(Answer { introduction, local, peer }),
        Err(err) => Outcome::Failed(format!("{err:#}")),
    })
}

/// The answer to request `nonce`, and where it came from. Late answers to earlier requests are skipped.
fn receive_answer(socket: &UdpSocket, nonce: u64, patience: Duration) -> io::Result<(String, SocketAddr)> {
    let deadline = Instant::now() + patience;
    let mut buffer = [0; 512];
    while Instant::now() < deadline {
        let (len, from) = socket.recv_from(&mut buffer)?;
        let answer = String::from_utf8_lossy(&buffer[..len]);
        if let Some(introduction) = answer.strip_prefix(&format!("{nonce} ")) {
            return Ok((introduction.to_owned(), from));
        }
    }
    Err(ErrorKind::TimedOut.into())
}

fn bulk_over_tcp(call: &Call, len: u64) -> Result<Transfer> {
    let mut stream = TcpStream::from(call.connect().context("cannot connect")?);
    stream.write_all(format!("bulk {len}\n").as_bytes())?;
    let introduction: Introduction = wire::read_line(&mut stream)?.parse()?;
    let mut out = stream.try_clone()?;
    let sending = thread::spawn(move || wire::send_stream(&mut out, Sender::Client, len));
    let first_wrong = wire::receive_stream(&mut stream, Sender::Server, len).context("receiving")?;
    sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("sending")?;
    let server_says = wire::read_line(&mut stream).context("waiting for the server's word")?;
    match (first_wrong, server_says.as_str()) {
        (None, "same") => Ok(Transfer { server: introduction.server, resent: 0 }),
        (Some(at), _) => bail!("what the server sent arrived with byte {at} changed"),
        (None, _) => bail!("what the client sent arrived {server_says}"),
    }
}

fn bulk_over_udp(call: &Call, len: u64) -> Result<Transfer> {
    let socket = call.connect().context("cannot connect")?;
    let server = match introduce(call, &socket, 0)? {
        Outcome::Answer(answer) => answer.introduction.server,
        other => bail!("no server: {other}"),
    };
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(RESEND))?;
    let count = u32::try_from(len.div_ceil(call.datagram as u64)).context("too long")?;
    let window = (WINDOW / call.datagram).max(1);
    let send = |number| -> io::Result<()> {
        let bytes = Frame { number, sender: Sender::Client, len: call.datagram }.bytes();
        if call.connected { socket.send(&bytes) } else { socket.send_to(&bytes, call.target) }.map(drop)
    };
    let mut waiting = BTreeMap::new();
    let (mut next, mut resent) = (0, 0);
    let mut buffer = vec![0; 65536];
    let mut last_answer = Instant::now();
    while next < count || !waiting.is_empty() {
        while next < count && waiting.len() < window {
            send(next)?;
            waiting.insert(next, Instant::now());
            next += 1;
        }
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                if from != call.target {
                    bail!("{} answers as {from}", call.target);
                }
                let datagram = &buffer[..len];
                let frame = Frame::check(Sender::Server, datagram)?
                    .ok_or_else(|| anyhow!("the server says: {}", String::from_utf8_lossy(datagram)))?;
                waiting.remove(&frame.number);
                last_answer = Instant::now();
            }
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(err) => bail!(err),
        }
        if last_answer.elapsed() > call.patience {
            bail!("no answer any more, after {} of {count} datagrams", next as usize - waiting.len());
        }
        for (number, sent) in waiting.iter_mut().filter(|(_, sent)| sent.elapsed() > RESEND) {
            send(*number)?;
            *sent = Instant::now();
            resent += 1;
        }
    }
    Ok(Transfer { server, resent })
}

/// A plain HTTP GET: the status and the body.
fn get(addr: SocketAddr, path: &str) -> Result<Report> {
    let mut stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {addr}\r\n\r\n").as_bytes())?;
    let answer = io::read_to_string(stream)?;
    let status = answer.split_whitespace().nth(1).and_then(|status| status.parse().ok());
    let (_, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    Ok(Report::Page(status.context("not an HTTP answer")?, body.to_owned()))
}

/// Somebody who can call: a pod, an outside machine, a process on a node.
pub struct Caller {
    name: String,
    line: Mutex<Line>,
}

enum Line {
    Thread { tasks: mpsc::Sender<Task>, reports: mpsc::Receiver<Report>, thread: Option<JoinHandle<()>> },
    Process { child: Child, tasks: Option<ChildStdin>, reports: BufReader<ChildStdout> },
}

impl Caller {
    /// A caller that is a thread of this process inside `ns`.
    pub fn in_thread(name: &str, ns: &Netns, stop: &Stop) -> Result<Self> {
        let (tasks, inbox) = mpsc::channel();
        let (outbox, reports) = mpsc::channel();
        let stop = stop.clone();
        let thread = ns.run(|| {
            // A thread is born where its parent is.
            thread::spawn(move || {
                let mut desk = Desk::new(stop);
                while let Ok(task) = inbox.recv() {
                    if outbox.send(desk.perform(task)).is_err() {
                        break;
                    }
                }
            })
        })?;
        let line = Line::Thread { tasks, reports, thread: Some(thread) };
        Ok(Self { name: name.to_owned(), line: Mutex::new(line) })
    }

    /// A caller that is a process: `command` runs [`run_desk`], in the cgroup that it should be in.
    pub fn in_process(name: &str, ns: &Netns, command: &mut Command) -> Result<Self> {
        let mut child = ns.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let tasks = child.stdin.take();
        let reports = BufReader::new(child.stdout.take().context("no pipe from the process")?);
        let line = Line::Process { child, tasks, reports };
        Ok(Self { name: name.to_owned(), line: Mutex::new(line) })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// One call.
    pub fn ask(&self, call: Call) -> Result<Outcome> {
        match self.perform(Task::Ask(call))? {
            Report::Outcome(outcome) => Ok(outcome),
            other => bail!("unexpected report: {other:?}"),
        }
    }

    /// `count` calls, one after the other, each with a socket of its own.
    pub fn ask_many(&self, call: Call, count: u32) -> Result<Tally> {
        match self.perform(Task::Many(call, count))? {
            Report::Tally(tally) => Ok(tally),
            other => bail!("unexpected report: {other:?}"),
        }
    }

    /// Sends `len` bytes and receives as many at the same time; an error if one of them is not as it was sent.
    pub fn transfer(&self, call: Call, len: u64) -> Result<Transfer> {
        match self.perform(Task::Bulk(call, len))? {
            Report::Transfer(transfer) => Ok(transfer),
            other => bail!("unexpected report: {other:?}"),
        }
    }

    /// A connection that stays open, and what its server said first.
    pub fn open(&self, call: Call) -> Result<(OpenCall<'_>, Outcome)> {
        match self.perform(Task::Open(call))? {
            Report::Opened(id, outcome) => Ok((OpenCall { caller: self, id }, outcome)),
            other => bail!("unexpected report: {other:?}"),
        }
    }

    /// Starts a server where the caller is.
    pub fn serve(&self, protocol: Protocol, addrs: &[SocketAddr]) -> Result<()> {
        match self.perform(Task::Serve(self.name.clone(), protocol, addrs.to_vec()))? {
            Report::Done => Ok(()),
            other => bail!("unexpected report: {other:?}"),
        }
    }

    /// HTTP GET: status and body.
    pub fn get(&self, addr: SocketAddr, path: &str) -> Result<(u16, String)> {
        match self.perform(Task::Get(addr, path.to_owned()))? {
            Report::Page(status, body) => Ok((status, body)),
            other => bail!("unexpected report: {other:?}"),
        }
    }

    fn perform(&self, task: Task) -> Result<Report> {
        let report = self.pass_on(task).with_context(|| format!("{} is gone", self.name))?;
        match report {
            Report::Error(err) => bail!("{}: {err}", self.name),
            report => Ok(report),
        }
    }

    fn pass_on(&self, task: Task) -> Result<Report> {
        match &mut *self.line.lock().unwrap_or_else(PoisonError::into_inner) {
            Line::Thread { tasks, reports, .. } => {
                tasks.send(task)?;
                Ok(reports.recv()?)
            }
            Line::Process { tasks, reports, .. } => {
                let tasks = tasks.as_mut().context("its input is closed")?;
                writeln!(tasks, "{}", serde_json::to_string(&task)?)?;
                let mut line = String::new();
                reports.read_line(&mut line)?;
                Ok(serde_json::from_str(&line)?)
            }
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        match self.line.get_mut().unwrap_or_else(PoisonError::into_inner) {
            Line::Thread { tasks, thread, .. } => {
                *tasks = mpsc::channel().0;
                // It may be a caller's own panic that ends it.
                let _ = thread.take().map(JoinHandle::join);
            }
            Line::Process { child, tasks, .. } => {
                *tasks = None;
                let _ = child.wait();
            }
        }
    }
}

/// A connection that stays open, or a UDP socket that keeps its port.
pub struct OpenCall<'a> {
    caller: &'a Caller,
    id: u32,
}

impl OpenCall<'_> {
    /// Asks once more on the same socket.
    pub fn again(&self) -> Result<Outcome> {
        match self.caller.perform(Task::Again(self.id))? {
            Report::Outcome(outcome) => Ok(outcome),
            other => bail!("unexpected report: {other:?}"),
        }
    }
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        // If the caller is gone, so is the socket.
        let _ = self.caller.perform(Task::Close(self.id));
    }
}

/// A process on a node of the lab, which calls for it.
#[derive(clap::Args)]
pub struct DeskArgs {
    /// Where it lives
    #[arg(long)]
    cgroup: PathBuf,
}

/// The other end of [`Caller::in_process`]: tasks come in on standard input, one per line, and their reports
/// go out the same way, until the input ends. First of all it moves to its cgroup: sockets belong to the cgroup
/// that they were made in.
pub fn run_desk(args: &DeskArgs) -> Result<()> {
    Cgroup::create(args.cgroup.clone())?.adopt(std::process::id())?;
    let stop = Stop::new()?;
    let mut desk = Desk::new(stop);
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let report = desk.perform(serde_json::from_str(&line?)?);
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    }
    Ok(())
}
