//! Compiles the eBPF programs, with the toolchain that `cargo xtask setup` recorded or else with nightly; and lists
//! the profiles, so that they are all embedded.

use std::{env, ffi::OsString, fs, path::Path};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain, build_ebpf};

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    list_profiles()?;
    // What one of the tests' servers publishes has to be found by its name.
    println!("cargo:rustc-link-arg-examples=-Wl,--export-dynamic-symbol=otel_thread_ctx_v1");
    let record = root.join("target/ebpf-toolchain");
    println!("cargo:rerun-if-changed={}", record.display());
    println!("cargo:rerun-if-changed={}", root.join("observer-common/src").display());

    let record = fs::read_to_string(record).unwrap_or_default();
    let recorded = |key: &str| {
        record.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).filter(|v| !v.is_empty())
    };
    if recorded("bootstrap") == Some("1") {
        set_env("RUSTC_BOOTSTRAP", "1".into());
    }
    if let Some(dir) = recorded("path") {
        let mut path = OsString::from(dir);
        path.push(":");
        path.push(env::var_os("PATH").unwrap_or_default());
        set_env("PATH", path);
    }
    // Where the sources are would come out in the object, which the program has in it. Its cargo is one with unstable features.
    set_env("CARGO_UNSTABLE_TRIM_PATHS", "true".into());
    set_env("CARGO_PROFILE_RELEASE_TRIM_PATHS", "all".into());
    // Whatever the inner cargo says would come out as a warning.
    set_env("CARGO_TERM_QUIET", "true".into());
    let programs = root.join("observer-ebpf");
    build_ebpf(
        [Package {
            name: "observer-ebpf",
            root_dir: programs.to_str().context("a path in UTF-8")?,
            no_default_features: false,
            features: &[],
        }],
        recorded("toolchain").map_or(Toolchain::Nightly, Toolchain::Custom),
    )
    .context("building the eBPF programs failed; `cargo xtask setup` finds or installs what that takes")
}

/// Writes the expression that `profiles/mod.rs` includes: names and contents of all files in `profiles`, sorted.
fn list_profiles() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
    println!("cargo:rerun-if-changed={}", folder.display());
    let files = fs::read_dir(&folder).context("the profiles")?;
    let mut files = files.map(|file| Ok(file?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    let entries = files
        .iter()
        .map(|path| format!("({:?}, include_str!({path:?})),", path.file_name().unwrap_or_default()));
    let out = env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?;
    fs::write(Path::new(&out).join("profiles.rs"), format!("&[{}]", entries.collect::<String>()))?;
    Ok(())
}

fn set_env(name: &str, value: OsString) {
    // SAFETY: a build script with a single thread.
    unsafe { env::set_var(name, value) };
}
