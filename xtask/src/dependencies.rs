//! Checks the dependencies: licences and sources must be allowed by `deny.toml`, and no crate may require a newer Rust
//! than observer does. Advisories are not checked, because the database has to be downloaded: run `cargo deny check
//! advisories` where it can be reached.

use anyhow::{Context, Result, ensure};
use cargo_metadata::MetadataCommand;
use cargo_metadata::semver::Version;
use duct::cmd;

use crate::report::Findings;
use crate::shell::{ask, run_quietly};
use crate::toolchain;
use crate::workspace::{host, plain_cargo, root};

/// Runs all checks of dependencies.
pub(crate) fn check(findings: &mut Findings) -> Result<()> {
    check_oldest_rust(findings)?;
    // The fuzzer is not a member of the workspace. Its own lock file must be up to date with observer's dependencies.
    let fuzzer = "metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml";
    run_quietly("reading fuzz/Cargo.lock", &plain_cargo(fuzzer.split(' ')))?;
    let path = format!("{}:{}", toolchain::deny()?, std::env::var("PATH")?);
    let deny = plain_cargo("deny --locked check bans licenses sources".split(' '));
    run_quietly("cargo deny", &deny.env("PATH", path))
}

/// Checks that no dependency requires a newer Rust than `rust-version`. Clippy checks the use of the standard library
/// (`incompatible_msrv`). A build with that exact Rust is the proof; if another one is installed, the check is reported
/// as skipped.
fn check_oldest_rust(findings: &mut Findings) -> Result<()> {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .other_options(["--locked".to_owned(), "--filter-platform".to_owned(), host()?])
        .exec()?;
    let oldest =
        metadata.workspace_packages().iter().filter_map(|package| package.rust_version.clone()).max();
    let oldest = oldest.context("Cargo.toml states no rust-version")?;
    let newer = metadata.packages.iter().filter(|package| package.rust_version.as_ref() > Some(&oldest));
    let newer: Vec<_> = newer.map(|package| format!("{} {}", package.name, package.version)).collect();
    ensure!(
        newer.is_empty(),
        "rust-version is {oldest}, but these crates require a newer one: {}",
        newer.join(", ")
    );

    let installed = ask(&cmd!("rustc", "--version")).context("cannot run rustc")?;
    let installed = installed
        .split(' ')
        .nth(1)
        .context("cannot find the version in the output of `rustc --version`")?
        .parse::<Version>()?;
    if (installed.major, installed.minor) != (oldest.major, oldest.minor) {
        findings.skipped.push(format!("building with Rust {oldest}: Rust {installed} is installed"));
    }
    Ok(())
}
