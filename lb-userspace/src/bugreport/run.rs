//! Subcommands of this program, each in a process of its own.

use std::env;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use super::{LIMIT, PATIENCE};

/// What `fairlead ARGS` prints, and how it ends if not well.
pub async fn subcommand(args: &[&str], bpffs: &Path) -> Result<String> {
    let mut command = Command::new("/proc/self/exe");
    // What is in the environment is no part of any answer, but where other programs are.
    command
        .args(args)
        .arg("--bpffs")
        .arg(bpffs)
        .env_clear()
        .envs(env::var_os("PATH").map(|path| ("PATH", path)));
    command.kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start myself")?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read = async { tokio::join!(beginning(stdout), beginning(stderr)) };
    let Ok((printed, complained)) = timeout(PATIENCE, read).await else {
        bail!("`fairlead {}` took longer than {} s", args.join(" "), PATIENCE.as_secs());
    };
    let (mut text, complained) = (printed?, complained?);
    if text.len() > LIMIT {
        // It still writes, and is killed now; the rest is cut off.
        return Ok(text);
    }
    let status =
        timeout(PATIENCE, child.wait()).await.context("it does not end")?.context("cannot wait for it")?;
    if !status.success() {
        ensure!(!text.is_empty(), "{}", complained.trim());
        text = format!("{text}\n[{status}] {complained}");
    }
    Ok(text)
}

/// As much as may be kept, and a byte more.
async fn beginning(pipe: Option<impl AsyncRead + Unpin>) -> Result<String> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(LIMIT as u64 + 1).read_to_end(&mut bytes).await.context("cannot read what it prints")?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
