//! `fairlead top`: what goes through Services now. [`model`] is what is shown, [`read`] where it comes from, [`draw`] the
//! screen; here is the loop that brings them together, and the terminal.

mod draw;
pub mod model;
mod plain;
mod read;

use std::io::{self, IsTerminal};
use std::panic;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use crossterm::cursor::Show;
use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::execute;
use futures::StreamExt;
use ratatui::DefaultTerminal;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use self::model::{Key, Model, Sort, View};
use self::read::Reader;
use crate::inspect::NameFilter;
use crate::show::To;

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    pub bpffs: PathBuf,
    pub only: NameFilter,
    pub sort: Sort,
    /// Between two readings.
    pub interval: Duration,
}

/// Whether there is somebody who can press keys.
pub fn is_interactive() -> bool {
    io::stdout().is_terminal() && io::stdin().is_terminal()
}

/// One table of what goes through in one interval.
pub async fn once(to: &mut To<'_>, options: &Options) -> Result<()> {
    let reader = Reader::open(&options.bpffs, options.only.clone())?;
    let mut model = Model::new(options.sort, String::new());
    let first = reader.sample()?;
    let start = first.at;
    model.take(first);
    tokio::time::sleep(options.interval).await;
    let second = reader.sample()?;
    let seconds = second.at.saturating_sub(start).as_secs_f64();
    model.take(second);
    plain::print(to, &model, (seconds * 1000.0).round() / 1000.0)
}

/// The screen, until somebody quits, or SIGINT, SIGTERM or SIGHUP. The terminal is as it was afterwards, also after a panic.
pub async fn live(options: &Options) -> Result<()> {
    let mut signals = Signals::new()?;
    // What can fail without a screen comes first.
    let reader = Reader::open(&options.bpffs, options.only.clone())?;
    let mut model = Model::new(options.sort, String::new());
    model.take(reader.sample()?);
    let mut screen = Screen::open()?;
    let mut events = EventStream::new();
    let mut ticks = tokio::time::interval(options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    while !model.quit {
        let mut page = 0;
        screen.0.draw(|frame| {
            page = draw::page(frame.area());
            draw::draw(frame, &model);
        })?;
        tokio::select! {
            () = signals.any() => return Ok(()),
            event = events.next() => match event {
                Some(Ok(event)) => heed(&mut model, &event, page, &reader),
                // The terminal is gone.
                Some(Err(_)) | None => return Ok(()),
            },
            _ = ticks.tick() => read(&mut model, &reader),
        }
    }
    Ok(())
}

/// Keys; after a change of size the screen is drawn again anyway.
fn heed(model: &mut Model, event: &Event, page: usize, reader: &Reader) {
    let Event::Key(KeyEvent { code, modifiers, kind, .. }) = event else { return };
    if *kind == KeyEventKind::Release {
        return;
    }
    if modifiers.contains(KeyModifiers::CONTROL) {
        model.quit |= matches!(code, KeyCode::Char('c' | 'd'));
        return;
    }
    let Some(key) = key(*code) else { return };
    let before = model.view();
    model.press(key, page);
    if model.view() != before {
        look_into(model, reader);
    }
}

fn key(code: KeyCode) -> Option<Key> {
    Some(match code {
        KeyCode::Char(c) => Key::Char(c),
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Backspace => Key::Backspace,
        _ => return None,
    })
}

/// What cannot be read is said, and tried again.
fn read(model: &mut Model, reader: &Reader) {
    match reader.sample() {
        Ok(sample) => {
            model.take(sample);
            look_into(model, reader);
        }
        Err(error) => model.trouble = Some(error.to_string()),
    }
}

fn look_into(model: &mut Model, reader: &Reader) {
    let View::Backends(service) = model.view() else { return };
    match reader.backends(service) {
        Ok(backends) => model.take_backends(service, backends),
        Err(error) => model.trouble = Some(error.to_string()),
    }
}

/// The terminal in our hands; it is given back when this is dropped, and before a panic is reported.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> Result<Self> {
        let terminal = ratatui::try_init().context("the terminal cannot be used; try --once")?;
        // ratatui's own hook leaves the cursor to the destructor, and where a panic aborts there is none.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let _ = execute!(io::stdout(), Show);
            hook(info);
        }));
        Ok(Self(terminal))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

struct Signals([Signal; 3]);

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("signals cannot be received");
        Ok(Self([
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::io::Read as _;
    use std::process::{self, Command};
    use std::thread;

    use nix::pty::openpty;
    use nix::sys::termios::tcgetattr;

    use super::*;

    /// Tells this test that it is the one with the terminal.
    const CHILD: &str = "FAIRLEAD_TEST_PANICS_ON_TERMINAL";

    /// As in a release, where a panic ends the process before anything is dropped.
    fn panic_on_terminal() -> ! {
        panic::set_hook(Box::new(|info| {
            eprintln!("{info}");
            process::exit(70);
        }));
        let mut screen = Screen::open().unwrap();
        screen.0.draw(|_| {}).unwrap();
        panic!("something is broken");
    }

    #[test]
    fn a_panic_gives_the_terminal_back() {
        if env::var_os(CHILD).is_some() {
            panic_on_terminal();
        }
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let name = "top::tests::a_panic_gives_the_terminal_back";
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture"]).env(CHILD, "1").env("TERM", "xterm-256color");
        let end = || pty.slave.try_clone().unwrap();
        let mut child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        drop(command);
        let mut master = File::from(pty.master);
        let reader = thread::spawn(move || {
            let (mut written, mut bytes) = (vec![], [0; 4096]);
            // EIO when the other end is closed.
            while let Ok(count @ 1..) = master.read(&mut bytes) {
                written.extend_from_slice(&bytes[..count]);
            }
            String::from_utf8(written).unwrap()
        });
        let status = child.wait().unwrap();
        let after = tcgetattr(&pty.slave).unwrap();
        drop(pty.slave);
        let written = reader.join().unwrap();
        assert_eq!(status.code(), Some(70), "{written:?}");
        assert_eq!(after, before, "raw mode is off");
        let place = |part| written.rfind(part);
        assert!(place("\x1b[?1049h").is_some() && place("\x1b[?25l").is_some(), "{written:?}");
        assert!(place("\x1b[?1049l") > place("\x1b[?1049h"), "the other screen is left: {written:?}");
        assert!(place("\x1b[?25h") > place("\x1b[?25l"), "the cursor is shown: {written:?}");
        assert!(place("something is broken") > place("\x1b[?1049l"), "and then it is told why: {written:?}");
    }
}
