//! Contents of a test guest: the programs that the tests observe, observer itself, the sources of the repository (tests
//! read files there) and a minimal user space.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use duct::cmd;

use crate::image::Image;
use crate::kernel::Kernel;
use crate::shell::{ask, find};
use crate::workspace::root;

const PROGRAMS: &[&str] = &[
    "nginx",
    "redis-server",
    "redis-benchmark",
    "haproxy",
    "runc",
    "wrk",
    "bpftool",
    "node",
    "ss",
    "nstat",
    "taskset",
    "nsenter",
    "unshare",
    "setpriv",
    "mountpoint",
    "prlimit",
];

/// Debian's Python: one that a version manager installed is spread over many folders.
const PYTHON: &str = "/usr/bin/python3";

/// Debian's gunicorn with its dependency, and uvloop. The servers of the tests need no other installed package.
const PYTHON_PACKAGES: &[&str] = &[
    "/usr/lib/python3/dist-packages/gunicorn",
    "/usr/lib/python3/dist-packages/pkg_resources",
    "/usr/lib/python3/dist-packages/uvloop",
];

/// Debian's Ruby, and the folders of its libraries and gems.
const RUBY: &str = "/usr/bin/ruby";
const RUBY_LIBRARIES: &[&str] = &[
    "/usr/lib/ruby",
    "/usr/lib/x86_64-linux-gnu/ruby",
    "/usr/lib/x86_64-linux-gnu/rubygems-integration",
    "/usr/share/rubygems-integration",
];

const PASSWD: &str = "root:x:0:0:root:/tmp:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
redis:x:110:110:redis:/var/lib/redis:/bin/false
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
";

const GROUP: &str = "root:x:0:\nwww-data:x:33:\nredis:x:110:\nnogroup:x:65534:\n";

/// Builds the image of a guest with what tests need. It boots to a shell; `set_command` makes it run a command instead.
pub(crate) fn image(observer: &Path, kernel: &Kernel) -> Result<Image> {
    let mut image = base(observer, kernel)?;
    for program in PROGRAMS {
        add_installed(&mut image, program)?;
    }
    add_python(&mut image)?;
    image.add_program(Path::new(RUBY));
    for folder in RUBY_LIBRARIES.iter().chain(&["/etc/nginx", "/usr/lib/nginx", "/usr/share/nginx"]) {
        image.add_tree(Path::new(folder), &[]);
    }

    image.add_tree(root(), &["target", ".git"].map(OsStr::new));
    for folder in ["/var/log/nginx", "/var/lib/nginx"] {
        image.add_folder(folder, 0o755);
    }
    Ok(image)
}

/// Builds the image of a guest with observer and a minimal user space.
pub(crate) fn base(observer: &Path, kernel: &Kernel) -> Result<Image> {
    let mut image = Image::default();
    for link in ["/bin", "/sbin", "/lib", "/lib64"] {
        image.add(Path::new(link));
    }
    add_installed(&mut image, "busybox")?;
    image.add(root());
    image.add_program(observer);
    let call = shlex::try_quote(observer.to_str().context("observer's path is not UTF-8")?)?;
    image.add_text("/usr/bin/observer", 0o755, format!("#!/bin/sh\nexec {call} \"$@\"\n"));
    for folder in ["/dev", "/proc", "/run", "/sys", "/var", "/var/log", "/var/lib"] {
        image.add_folder(folder, 0o755);
    }
    for folder in ["/tmp", "/var/tmp"] {
        image.add_folder(folder, 0o1777);
    }
    let mut modules = String::new();
    for module in &kernel.modules {
        image.add(module);
        modules.push_str(module.to_str().context("a module's path is not UTF-8")?);
        modules.push('\n');
    }
    image.add_text("/modules", 0o644, modules);
    image.add_text("/etc/passwd", 0o644, PASSWD);
    image.add_text("/etc/group", 0o644, GROUP);
    image.add_text("/etc/hosts", 0o644, "127.0.0.1 localhost guest\n::1 localhost\n");
    image.add_text("/init", 0o755, include_str!("init.sh"));
    Ok(image)
}

/// Adds an installed program.
fn add_installed(image: &mut Image, program: &str) -> Result<()> {
    let path = find(program).ok_or_else(|| {
        anyhow!(
            "a guest needs {program}, which is not installed\nby hand: install {program}, or put it on PATH"
        )
    })?;
    image.add_program(&path);
    Ok(())
}

/// Makes the guest run shell commands, in the repository, instead of a shell. If they write `file`, the guest sends it
/// back before it powers off.
pub(crate) fn set_command(image: &mut Image, commands: &str, file: Option<&Path>) -> Result<()> {
    let root = root().to_str().context("the repository's path is not UTF-8")?;
    let text = format!("cd {}\n{commands}\n", shlex::try_quote(root)?);
    image.add_text("/command", 0o755, text);
    if let Some(file) = file {
        image.add_text("/handed-out", 0o644, format!("{root}/{}\n", file.display()));
    }
    Ok(())
}

/// Adds Python and its standard library, without the parts that no server uses.
fn add_python(image: &mut Image) -> Result<()> {
    let places = "from sysconfig import *; print(get_path('stdlib'), get_config_var('LIBPL'))";
    let places = ask(&cmd!(PYTHON, "-c", places)).context("Debian's python3 does not run")?;
    let (library, link_folder) =
        places.split_once(' ').context("python3 did not print the folders of its library")?;
    let link_folder = Path::new(link_folder).file_name().unwrap_or_default();
    let without = ["dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter"];
    image.add_program(Path::new(PYTHON));
    image.add_tree(Path::new(library), &[&without.map(OsStr::new)[..], &[link_folder]].concat());
    for package in PYTHON_PACKAGES {
        image.add_tree(Path::new(package), &[]);
    }
    Ok(())
}
