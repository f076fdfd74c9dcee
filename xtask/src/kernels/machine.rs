//! One boot of a guest under QEMU.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::host;
use crate::process;

/// What a guest has.
const CPUS: &str = "2";
const MEMORY: &str = "2048M";

/// How a boot ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// QEMU ended by itself: the guest switched itself off, or its kernel gave up.
    Off,
    /// It took too long.
    TimedOut,
}

/// Boots `image` with `initramfs`, until it switches itself off. What the guest says goes to the file `said`, what its
/// kernel says to `console`; `echo` is given the former as it comes.
pub fn boot(
    image: &Path,
    initramfs: &Path,
    (console, said): (&Path, &Path),
    limit: Duration,
    echo: impl Fn(&str),
) -> Result<End> {
    for file in [console, said] {
        fs::write(file, "").with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut command = qemu(image, initramfs, console, said)?;
    let mut guest = Guest(command.spawn().with_context(|| format!("`{}`", process::show(&command)))?);
    let begin = Instant::now();
    let mut tail = Tail::of(said)?;
    loop {
        let ended = guest.0.try_wait().context("cannot wait for QEMU")?;
        tail.follow(&echo)?;
        if ended.is_some() {
            return Ok(End::Off);
        }
        if begin.elapsed() > limit {
            return Ok(End::TimedOut);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn qemu(image: &Path, initramfs: &Path, console: &Path, said: &Path) -> Result<Command> {
    let qemu = host::find("qemu-system-x86_64").context("qemu-system-x86_64 is gone")?;
    // The guest ends with us, however we end, and leaves the machine to others.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "nice", "-n", "10"]).arg(qemu);
    let serial = |file: &Path| format!("file:{}", file.display());
    command
        // KVM is not asked for: where it exists but cannot run these guests, QEMU does not fall back.
        .args(["-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-smp", CPUS, "-m", MEMORY, "-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-serial")
        .arg(serial(console))
        .arg("-serial")
        .arg(serial(said))
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs)
        // A panic switches off.
        .args(["-append", "console=ttyS0 loglevel=4 panic=-1"])
        .stdin(Stdio::null());
    Ok(command)
}

/// A running QEMU; killed when it is dropped.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file that grows.
struct Tail {
    file: File,
    at: u64,
}

impl Tail {
    fn of(path: &Path) -> Result<Self> {
        Ok(Self { file: File::open(path).with_context(|| format!("cannot read {}", path.display()))?, at: 0 })
    }

    fn follow(&mut self, echo: impl Fn(&str)) -> Result<()> {
        let mut new = Vec::new();
        self.file.seek(SeekFrom::Start(self.at)).context("cannot seek")?;
        self.at += self.file.read_to_end(&mut new).context("cannot read what the guest says")? as u64;
        if !new.is_empty() {
            echo(&String::from_utf8_lossy(&new));
        }
        Ok(())
    }
}

/// For `echo`: straight to standard error.
pub fn show(text: &str) {
    // A reader that has gone is no reason to stop.
    let _ = std::io::stderr().write_all(text.as_bytes());
}
