//! Running other programs. Every failure names the command line, so that it can be repeated by hand.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Runs `command` with our own stdin, stdout and stderr; anything but success is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("`{}` failed ({status})", show(command));
    }
    Ok(())
}

/// Runs `command` and gives back what it printed on stdout; a failure carries what it said on stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&stderr);
        bail!("`{}` failed ({status}): {}", show(command), said.trim());
    }
    String::from_utf8(stdout).with_context(|| format!("`{}` printed no UTF-8", show(command)))
}

/// What `command` printed on stdout and stderr, and how it ended; one that has not ended within `limit` is killed, and an error.
pub fn output_within(command: &mut Command, limit: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| cannot_start(command))?;
    let process = Pid::from_raw(child.id().cast_signed());
    let (ended, end) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let is_late = matches!(end.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Timeout));
            // If it has ended this moment, that is as well.
            is_late && kill(process, Signal::SIGKILL).is_ok()
        });
        let output = child.wait_with_output();
        drop(ended);
        let was_killed = watch.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let output = output.with_context(|| format!("`{}` cannot be waited for", show(command)))?;
        let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        ensure!(!was_killed, "`{}` did not end within {limit:?}:\n{out}{err}", show(command));
        Ok(output)
    })
}

/// Tells the user what is about to happen to the machine.
pub fn say(what: impl AsRef<str>) {
    eprintln!("xtask: {}", what.as_ref());
}

fn cannot_start(command: &Command) -> String {
    format!("`{}` could not be started", show(command))
}

/// The command line as one would type it in a shell, with the environment that was added to it (but for
/// PATH, which is long and seldom the reason).
pub fn show(command: &Command) -> String {
    let mut words = Vec::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value.filter(|_| name != "PATH") {
            words.push(format!("{}={}", name.to_string_lossy(), quote(value)));
        }
    }
    words.push(quote(command.get_program()));
    words.extend(command.get_args().map(quote));
    words.join(" ")
}

fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+,./:@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    // Cargo's encoded flags are separated by a control character that no terminal shows.
    format!("'{}'", word.replace('\'', r"'\''").replace('\u{1f}', "␟"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("cargo");
        command
            .args(["build", "--features", "a b", ""])
            .env("RUSTFLAGS", "-Cx='y'")
            .env("PATH", "/bin")
            .env_remove("HOME");
        assert_eq!(show(&command), r"RUSTFLAGS='-Cx='\''y'\''' cargo build --features 'a b' ''");
    }

    #[test]
    fn a_failure_names_the_command_and_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c 'echo reason >&2; exit 3'"), "{text}");
        assert!(text.contains("exit status: 3") && text.ends_with(": reason"), "{text}");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_and_what_it_said_is_told() {
        let begun = std::time::Instant::now();
        let late = output_within(
            Command::new("sh").args(["-c", "echo first; exec sleep 60"]),
            Duration::from_millis(300),
        );
        assert!(begun.elapsed() < Duration::from_secs(30));
        let text = format!("{:#}", late.unwrap_err());
        assert!(text.contains("did not end within 300ms") && text.ends_with(":\nfirst\n"), "{text}");
        let fine = output_within(
            Command::new("sh").args(["-c", "echo a; echo b >&2; exit 3"]),
            Duration::from_mins(1),
        );
        let fine = fine.unwrap();
        assert_eq!((&*fine.stdout, &*fine.stderr, fine.status.code()), (&b"a\n"[..], &b"b\n"[..], Some(3)));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("/nonexistent/program")).unwrap_err();
        assert!(format!("{error:#}").starts_with("`/nonexistent/program` could not be started: "));
    }
}
