//! Debian packages: which ones each subcommand needs, and the installation of missing ones.

use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use duct::cmd;

use crate::pins::DEBIAN_LLVM;
use crate::shell::{find, is_root, run_quietly};

/// Servers that the tests observe, and tools whose results they compare with.
const TESTS: &[&str] = &[
    "nginx-light",
    "redis-server",
    "haproxy",
    "python3-gunicorn",
    "python3-uvloop",
    "runc",
    "busybox-static",
    "wrk",
    "bpftool",
    "python3",
    "ruby",
    "ruby-async",
    "tmux",
    "iproute2",
    "man-db",
    "prometheus",
    "python3-pip",
    "libpython3-dev",
    "openssl",
    "util-linux",
];

/// Servers of the zoo that no other test needs.
const ZOO: &[&str] = &[
    "apache2-bin",
    "beanstalkd",
    "caddy",
    "dnsmasq-base",
    "erlang-base",
    "erlang-inets",
    "etcd-server",
    "golang-go",
    "h2o",
    "lighttpd",
    "memcached",
    "mosquitto",
    "nats-server",
    "nghttp2-proxy",
    "pgbouncer",
    "postgresql",
    "puma",
    "python3-cheroot",
    "python3-daphne",
    "python3-gevent",
    "python3-hypercorn",
    "python3-tornado",
    "python3-twisted",
    "python3-uvicorn",
    "python3-waitress",
    "sslh",
    "stunnel4",
    "thin",
    "tinyproxy",
    "unbound",
    "unicorn",
    "uwsgi-core",
    "uwsgi-plugin-python3",
    "varnish",
];

/// Tools that only `xtask bench` runs.
const COMPARISON: &[&str] = &["bpftrace", "libbpf-tools", "bpfcc-tools"];

/// Unpacks and boots the kernels of `xtask vm` and `xtask test`.
const EMULATOR: &[&str] = &["qemu-system-x86", "xz-utils"];

/// Debian's current Rust with the source of the standard library, and the LLVM that it was built with.
pub(crate) fn for_ebpf() -> Vec<String> {
    let mut names = ["rustc-web", "cargo-web", "rust-web-src"].map(str::to_owned).to_vec();
    names.push(format!("llvm-{DEBIAN_LLVM}-dev"));
    names.push(format!("libpolly-{DEBIAN_LLVM}-dev"));
    if find("c++").is_none() {
        names.push("g++".to_owned());
    }
    names
}

pub(crate) fn for_tests() -> Vec<String> {
    let mut names: Vec<_> = TESTS.iter().map(|&name| name.to_owned()).collect();
    // Any Node.js works, and Debian's package conflicts with others.
    if find("node").is_none() {
        names.push("nodejs".to_owned());
    }
    names
}

pub(crate) fn for_zoo() -> Vec<String> {
    ZOO.iter().map(|&name| name.to_owned()).chain(for_tests()).collect()
}

pub(crate) fn for_bench() -> Vec<String> {
    COMPARISON.iter().map(|&name| name.to_owned()).chain(for_tests()).collect()
}

/// Guests contain the programs of the tests.
pub(crate) fn for_guests() -> Vec<String> {
    EMULATOR.iter().map(|&name| name.to_owned()).chain(for_tests()).collect()
}

/// Whether this is Debian, where the package names above are valid.
pub(crate) fn is_debian() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    release.lines().any(|line| line == "ID=debian") && find("apt-get").is_some()
}

/// Installs the packages that are missing.
pub(crate) fn install(names: &[String]) -> Result<()> {
    let names = missing(names)?;
    if names.is_empty() {
        return Ok(());
    }
    let list = names.join(" ");
    if !is_debian() || !is_root() {
        bail!("these Debian packages are missing: {list}\nby hand: as root, apt-get install {list}");
    }
    eprintln!("setup: installing {list}");
    let by_hand = |error| anyhow!("{error:#}\nby hand: as root, apt-get install {list}");
    run_quietly("apt-get update", &cmd!("apt-get", "update", "-q")).map_err(by_hand)?;
    let mut args = vec!["install", "-q", "--yes", "--no-install-recommends"];
    args.extend(policy());
    let install = cmd("apt-get", args.into_iter().chain(names.iter().map(String::as_str)));
    run_quietly("apt-get install", &install.env("DEBIAN_FRONTEND", "noninteractive")).map_err(by_hand)
}

/// Options that keep apt from starting installed servers as services of this machine. apt itself creates and removes
/// the `policy-rc.d` that prevents it, so that neither a failure nor Ctrl-C leaves the file behind.
fn policy() -> &'static [&'static str] {
    if Path::new("/usr/sbin/policy-rc.d").exists() {
        return &[];
    }
    &[
        "-oDPkg::Pre-Invoke::=printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d",
        "-oDPkg::Pre-Invoke::=chmod +x /usr/sbin/policy-rc.d",
        "-oDPkg::Post-Invoke::=rm -f /usr/sbin/policy-rc.d",
    ]
}

fn missing(names: &[String]) -> Result<Vec<String>> {
    // dpkg-query fails if a name is unknown, but still lists the others.
    let format = ["-W".to_owned(), "-f=${Package} ${db:Status-Status}\n".to_owned()];
    let query = cmd("dpkg-query", format.iter().chain(names)).stderr_null().unchecked();
    let known = if find("dpkg-query").is_some() { query.read()? } else { String::new() };
    let is_installed = |name: &&String| known.lines().any(|line| line == format!("{name} installed"));
    Ok(names.iter().filter(|name| !is_installed(name)).cloned().collect())
}
