//! What observer is made of: crates whose licences and sources `deny.toml` allows, none of which asks for a newer Rust than
//! observer does. Advisories are left out, for they come from elsewhere: `cargo deny check advisories` where that can be reached.

use anyhow::{Context, Result, ensure};
use cargo_metadata::MetadataCommand;
use cargo_metadata::semver::Version;
use duct::cmd;

use crate::report::Findings;
use crate::shell::{ask, quietly};
use crate::toolchain;
use crate::workspace::{host, plain_cargo, root};

/// Finds fault with what should not be there.
pub(crate) fn check(findings: &mut Findings) -> Result<()> {
    check_oldest_rust(findings)?;
    // The fuzzer is no member of the workspace and has a lock file of its own, which must know observer's dependencies.
    let fuzzer = "metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml";
    quietly("reading fuzz/Cargo.lock", &plain_cargo(fuzzer.split(' ')))?;
    let path = format!("{}:{}", toolchain::deny()?, std::env::var("PATH")?);
    let deny = plain_cargo("deny --locked check bans licenses sources".split(' '));
    quietly("cargo deny", &deny.env("PATH", path))
}

/// That observer can be built with the Rust that its manifest states: what it uses of the standard library clippy compares
/// (`incompatible_msrv`), what crates say of themselves is compared here, and where this is that Rust, the builds prove it.
fn check_oldest_rust(findings: &mut Findings) -> Result<()> {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .other_options(["--locked".to_owned(), "--filter-platform".to_owned(), host()?])
        .exec()?;
    let ours = metadata.workspace_packages().iter().filter_map(|package| package.rust_version.clone()).max();
    let ours = ours.context("Cargo.toml states no rust-version")?;
    let newer = metadata.packages.iter().filter(|package| package.rust_version.as_ref() > Some(&ours));
    let newer: Vec<_> = newer.map(|package| format!("{} {}", package.name, package.version)).collect();
    ensure!(newer.is_empty(), "rust-version is {ours}, but newer is asked for by {}", newer.join(", "));

    let here = ask(&cmd!("rustc", "--version")).context("rustc cannot be run")?;
    let here = here.split(' ').nth(1).context("rustc tells no version")?.parse::<Version>()?;
    if (here.major, here.minor) != (ours.major, ours.minor) {
        findings.skipped.push(format!("building with Rust {ours}, for this is {here}"));
    }
    Ok(())
}
