//! Running other programs. Every failure names the command line, so that it can be repeated by hand.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

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
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("/nonexistent/program")).unwrap_err();
        assert!(format!("{error:#}").starts_with("`/nonexistent/program` could not be started: "));
    }
}
