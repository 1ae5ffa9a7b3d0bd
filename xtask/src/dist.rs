//! `xtask dist`: what is handed out. An archive with the static program and all that is read or applied beside it, a bill of
//! materials, and checksums. The same sources make the same archive.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use duct::cmd;
use object::elf::{DT_NEEDED, FileHeader64, PT_INTERP};
use object::endian::Endianness;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use walkdir::WalkDir;

use crate::shell::{ask, quietly};
use crate::workspace::{host, kept, plain_cargo, root};
use crate::{observer, toolchain};

/// What goes along with the program, as it is in the repository.
const ALONG: [&str; 7] =
    ["CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "README.md", "dashboards", "deploy", "docs"];

/// `xtask dist`.
pub(crate) fn make() -> Result<()> {
    let binary = observer::build()?;
    ensure_static(&binary)?;
    let answer = ask(&cmd!(&binary, "--version")).context("the program does not tell its version")?;
    let version = answer.strip_prefix("observer ").context("the program has another name")?;
    let target = host()?;
    let architecture = target.split('-').next().unwrap_or_default();
    let name = format!("observer-{version}-{architecture}-linux");

    let out = kept("dist");
    let folder = out.join(&name);
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&folder)?;
    fs::copy(&binary, folder.join("observer"))?;
    for path in ALONG {
        copy(Path::new(path), &folder)?;
    }
    let materials = format!("{name}.cdx.json");
    bill_of_materials(&target, &out.join(&materials))?;
    fs::copy(out.join(&materials), folder.join("observer.cdx.json"))?;

    let archive = format!("{name}.tar.gz");
    pack(&out, &name, &archive)?;
    let sums = cmd!("sha256sum", &archive, &materials, format!("{name}/observer")).dir(&out).read()?;
    fs::write(out.join("SHA256SUMS"), sums + "\n")?;
    for file in [&archive, &materials, "SHA256SUMS"] {
        println!("{}", out.join(file).display());
    }
    println!("another architecture: not built here; docs/deployment.md tells what is known of aarch64");
    Ok(())
}

/// A program that needs nothing of the machine it is taken to.
fn ensure_static(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary)?;
    let header = FileHeader64::<Endianness>::parse(&*bytes)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, &*bytes)? {
        ensure!(segment.p_type(endian) != PT_INTERP, "{} asks for a dynamic loader", binary.display());
        let entries = segment.dynamic(endian, &*bytes)?.unwrap_or_default();
        let needs = entries.iter().any(|entry| entry.d_tag(endian) == DT_NEEDED);
        ensure!(!needs, "{} asks for libraries", binary.display());
    }
    Ok(())
}

/// Copies a file or folder of the repository to the same place under a folder.
fn copy(path: &Path, folder: &Path) -> Result<()> {
    for entry in WalkDir::new(root().join(path)) {
        let entry = entry?;
        let place = folder.join(entry.path().strip_prefix(root())?);
        if entry.file_type().is_dir() {
            fs::create_dir_all(place)?;
        } else {
            fs::copy(entry.path(), place)?;
        }
    }
    Ok(())
}

/// What the program is made of, in CycloneDX: each crate that is in it, with version, licence and checksum.
fn bill_of_materials(target: &str, to: &Path) -> Result<()> {
    let bin = toolchain::bill_of_materials()?;
    // It writes beside each package's manifest, and nowhere else.
    let name = "bill-of-materials";
    let made = |package: &str| root().join(package).join(name).with_extension("json");
    let path = format!("{bin}:{}", std::env::var("PATH")?);
    let args = ["cyclonedx", "--format", "json", "--spec-version", "1.5", "--override-filename", name];
    let command = plain_cargo(args.into_iter().chain(["--target", target])).env("PATH", path);
    let outcome = quietly("cargo cyclonedx", &command.env("SOURCE_DATE_EPOCH", commit_time()?));
    let copied = outcome.and_then(|()| Ok(fs::copy(made("observer"), to).map(drop)?));
    for package in ["observer", "observer-common", "observer-ebpf", "xtask"] {
        let _not_made = fs::remove_file(made(package));
    }
    copied
}

/// Packs a folder, reproducibly.
fn pack(out: &Path, name: &str, archive: &str) -> Result<()> {
    let time = format!("--mtime=@{}", commit_time()?);
    let how = ["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=go-w", &time];
    let what = ["--use-compress-program=gzip -n -9", "-cf", archive, name];
    quietly("tar", &cmd("tar", how.into_iter().chain(what)).dir(out))
}

/// When the sources were committed, in seconds since 1970.
fn commit_time() -> Result<String> {
    let time = ask(&cmd!("git", "log", "-1", "--format=%ct").dir(root()));
    time.context("git does not tell when this was committed\nby hand: make it in a clone of the repository")
}
