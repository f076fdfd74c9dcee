//! The agent against a real API server, where `KUBEBUILDER_ASSETS` names a directory with `kube-apiserver` and
//! `etcd`; elsewhere these tests are listed as ignored. What they do is tried against the double everywhere.
#![expect(clippy::unwrap_used, reason = "in tests, helpers included, a panic is the report")]

mod launch;
mod memory;
mod scenarios;

use std::path::PathBuf;

use libtest_mimic::{Arguments, Trial};

use scenarios::{Server, an_api_server_that_restarts, services_of_every_kind};

const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// Both programs are there; otherwise why the tests that need them are not run.
fn assets() -> Result<PathBuf, String> {
    let Some(dir) = std::env::var_os(ASSETS).map(PathBuf::from) else {
        return Err(format!("{ASSETS} is not set"));
    };
    let missing = ["kube-apiserver", "etcd"].into_iter().find(|name| !dir.join(name).is_file());
    missing.map_or(Ok(dir), |name| Err(format!("no {name} in {ASSETS}")))
}

fn run(scenario: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(scenario);
}

/// The scenario with the double, and with the real thing.
macro_rules! scenario {
    ($scenario:ident) => {
        [
            Trial::test(concat!("double::", stringify!($scenario)), || {
                run(async { $scenario(Server::double().await).await });
                Ok(())
            }),
            real(concat!("real::", stringify!($scenario)), || {
                let assets = assets()?;
                run(async { $scenario(Server::real(&assets).await).await });
                Ok(())
            }),
        ]
    };
}

fn real(name: &str, test: fn() -> Result<(), libtest_mimic::Failed>) -> Trial {
    let trial = Trial::test(name, test);
    match assets() {
        Ok(_) => trial,
        Err(reason) => trial.with_ignored_flag(true).with_kind(reason),
    }
}

fn check(name: &str, check: fn()) -> Trial {
    Trial::test(name, move || {
        check();
        Ok(())
    })
}

fn main() {
    if let Ok(master) = std::env::var(memory::MASTER) {
        return run(memory::follow(master));
    }
    let mut trials = vec![
        check(
            "launch::a_server_that_ends_is_named_with_its_log",
            launch::a_server_that_ends_is_named_with_its_log,
        ),
        check(
            "launch::a_server_that_never_listens_is_given_up_and_ended",
            launch::a_server_that_never_listens_is_given_up_and_ended,
        ),
        check(
            "launch::keys_tokens_and_the_kubeconfig_are_made",
            launch::keys_tokens_and_the_kubeconfig_are_made,
        ),
    ];
    trials.extend(scenario!(services_of_every_kind));
    trials.extend(scenario!(an_api_server_that_restarts));
    trials.push(check("memory::of_a_large_cluster_is_bounded", || {
        run(memory::of_a_large_cluster_is_bounded());
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
