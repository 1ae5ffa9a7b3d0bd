//! A mapped file with all of its symbols: those in the file itself, and those in its separate debug file, which is
//! found as debuggers do: by build id, or by debug link (name and checksum).

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::File,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use flate2::Crc;
use nix::fcntl::OFlag;
use procfs::process::{MMapPath, MemoryMap};

use super::{
    elf::Elf,
    mappings::{Mappings, inside, open_in_root},
};

/// Where distributions install debug files.
const DEBUG_FOLDER: &str = "/usr/lib/debug";

/// Size of the largest debug file whose checksum is computed, in bytes.
const CHECKSUM_SIZE_MAX: u64 = 1 << 30;

/// How much of it is read at a time, in bytes.
const CHUNK: usize = 1 << 20;

/// The file behind a mapping.
pub(crate) struct Image {
    pub(crate) file: File,
    pub(crate) elf: Elf,
    debug: Option<Debug>,
}

/// A separate debug file.
struct Debug {
    elf: Elf,
    /// Added to its addresses to get those in the mapped file. Not zero if `prelink` moved the library to another
    /// address, which leaves the debug file unchanged.
    shift: u64,
}

impl Image {
    /// Opens a mapped file, and its debug file if it has no symbol table.
    pub(crate) fn of(mappings: &Mappings, map: &MemoryMap) -> Result<Self> {
        let file = mappings.open(map)?;
        let elf = Elf::open(&file)?;
        let debug = if elf.has_symbols() { None } else { Debug::of(mappings.pid, map, &elf) };
        Ok(Self { file, elf, debug })
    }

    /// Address in the file of a symbol that it defines.
    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        self.symbols(&[name])[0]
    }

    /// Addresses in the file of symbols that it defines, in the order of `names`.
    pub(crate) fn symbols(&self, names: &[&str]) -> Vec<Option<u64>> {
        let own = self.elf.all_symbols(names);
        match &self.debug {
            Some(debug) if own.contains(&None) => {
                let in_debug = debug.elf.all_symbols(names).into_iter();
                let shifted = in_debug.map(|address| Some(address?.wrapping_add(debug.shift)));
                own.into_iter().zip(shifted).map(|(own, other)| own.or(other)).collect()
            }
            _ => own,
        }
    }

    /// Addresses in the file of all functions that it defines and whose names match `name`, in which `*` matches any
    /// characters; sorted and without duplicates.
    pub(crate) fn functions(&self, name: &str) -> Vec<u64> {
        let shifted = self.debug.iter().flat_map(|debug| {
            let in_debug = debug.elf.functions(name).into_iter();
            in_debug.map(|address| address.wrapping_add(debug.shift))
        });
        let all: BTreeSet<_> = self.elf.functions(name).into_iter().chain(shifted).collect();
        all.into_iter().collect()
    }
}

impl Debug {
    /// Finds the debug file of `elf` in the process's root, else in observer's own.
    fn of(pid: u32, map: &MemoryMap, elf: &Elf) -> Option<Self> {
        let MMapPath::Path(path) = &map.pathname else { return None };
        let roots = [inside(pid, "/".as_ref()), "/".into()];
        let roots: Vec<_> = roots.iter().filter_map(|root| File::open(root).ok()).collect();
        let by_build_id = roots.iter().find_map(|root| find_by_build_id(root, elf).ok());
        let debug =
            by_build_id.or_else(|| roots.iter().find_map(|root| find_by_debug_link(root, path, elf)))?;
        let shift = match (elf.start(), debug.start()) {
            (Some(own), Some(other)) => own.wrapping_sub(other),
            _ => 0,
        };
        Some(Self { elf: debug, shift })
    }
}

/// Opens the debug file with the same build id as `elf`.
fn find_by_build_id(root: &File, elf: &Elf) -> Result<Elf> {
    let id = elf.build_id().context("the file has no build id")?;
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let (folder, name) = digits.split_at_checked(2).context("the file's build id is too short")?;
    let path = format!("{DEBUG_FOLDER}/.build-id/{folder}/{name}.debug");
    let debug = Elf::open_symbols(&open_in_root(root, path.as_ref(), OFlag::empty())?)?;
    (debug.build_id() == Some(id)).then_some(debug).context("the debug file has another build id")
}

/// Opens the debug file that the debug link of `elf` names, if its checksum is right. `module` is the path of the file
/// that `elf` was read from.
fn find_by_debug_link(root: &File, module: &Path, elf: &Elf) -> Option<Elf> {
    let (name, checksum) = elf.debug_link()?;
    let name = OsStr::from_bytes(&name);
    let folder = module.parent().filter(|_| Path::new(name).file_name() == Some(name))?;
    let global = Path::new(DEBUG_FOLDER).join(folder.strip_prefix("/").ok()?);
    [folder.join(name), folder.join(".debug").join(name), global.join(name)].iter().find_map(|path| {
        let file = open_in_root(root, path, OFlag::empty()).ok()?;
        (checksum_of(&file).ok()? == checksum).then(|| Elf::open_symbols(&file).ok())?
    })
}

/// Computes the CRC-32 of a file. Fails if the file is larger than [`CHECKSUM_SIZE_MAX`], or becomes so while it is read.
fn checksum_of(file: &File) -> Result<u32> {
    ensure!(file.metadata()?.len() <= CHECKSUM_SIZE_MAX, "the debug file is too large");
    let mut chunk = vec![0; CHUNK];
    let mut checksum = Crc::new();
    let mut at = 0;
    while at <= CHECKSUM_SIZE_MAX {
        let length = file.read_at(&mut chunk, at)?;
        if length == 0 {
            return Ok(checksum.sum());
        }
        checksum.update(&chunk[..length]);
        at += length as u64;
    }
    bail!("the debug file grows while it is read")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Command};

    use super::*;
    use crate::binary::testing::{Program, find, run, source, wait_for};

    const CODE: &str = r#"
        #include <unistd.h>
        __attribute__((noinline)) static int hidden(int x) { return x * 0x1234567; }
        int exported(int x) { return hidden(x) + 1; }
    "#;

    /// A stripped library and its debug file, in a folder that also serves as the root.
    struct Stripped {
        folder: tempfile::TempDir,
        objcopy: PathBuf,
        /// Address of the function `hidden`, which only the debug file has.
        hidden: u64,
    }

    impl Stripped {
        /// Links the library to `address`; `None` without a compiler.
        fn new(test: &str, address: &str) -> Option<Self> {
            let (gcc, objcopy) = (find(test, "gcc")?, find(test, "objcopy")?);
            let folder = tempfile::tempdir().unwrap();
            let code = source(folder.path(), "code.c", CODE);
            let library = folder.path().join("libhiding.so");
            let address = format!("-Wl,--build-id,-Ttext-segment={address}");
            let options = ["-O2", "-shared", "-fPIC", &address, "-o"];
            run(Command::new(gcc).args(options).args([&library, &code]));
            let [hidden] = Elf::open(&File::open(&library).unwrap()).unwrap().symbols(["hidden"]);
            let stripped = Self { folder, objcopy, hidden: hidden.unwrap() };
            stripped.copy(&["--only-keep-debug", "libhiding.so", "libhiding.debug"]);
            stripped.copy(&["--strip-all", "libhiding.so"]);
            Some(stripped)
        }

        fn copy(&self, arguments: &[&str]) {
            run(Command::new(&self.objcopy).current_dir(&self.folder).args(arguments));
        }

        /// Adds a debug link to the library.
        fn link(&self) {
            self.copy(&["--add-gnu-debuglink=libhiding.debug", "libhiding.so"]);
        }

        fn elf(&self) -> Elf {
            Elf::open(&File::open(self.folder.path().join("libhiding.so")).unwrap()).unwrap()
        }

        fn root(&self) -> File {
            File::open(&self.folder).unwrap()
        }

        /// Moves the debug file.
        fn move_debug_file(&self, to: &str) -> PathBuf {
            let to = self.folder.path().join(to);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::rename(self.folder.path().join("libhiding.debug"), &to).unwrap();
            to
        }

        /// The address of `hidden` by the debug link of the library in `/opt`.
        fn hidden_by_link(&self) -> Option<u64> {
            let debug = find_by_debug_link(&self.root(), "/opt/libhiding.so".as_ref(), &self.elf())?;
            debug.symbols(["hidden"])[0]
        }
    }

    #[test]
    fn symbols_are_found_by_link_in_all_three_folders() {
        let test = "symbols_are_found_by_link";
        for path in ["opt/libhiding.debug", "opt/.debug/libhiding.debug", "usr/lib/debug/opt/libhiding.debug"]
        {
            let Some(stripped) = Stripped::new(test, "0") else { return };
            stripped.link();
            assert_eq!(stripped.elf().symbols(["hidden"]), [None]);
            assert_eq!(stripped.hidden_by_link(), None);
            let file = stripped.move_debug_file(path);
            assert_eq!(stripped.hidden_by_link(), Some(stripped.hidden), "{path}");
            // The folder of another library has no debug file.
            let elsewhere =
                find_by_debug_link(&stripped.root(), "/srv/libhiding.so".as_ref(), &stripped.elf());
            assert!(elsewhere.is_none(), "{path}");
            // One more byte changes the checksum.
            let mut bytes = fs::read(&file).unwrap();
            bytes.push(0);
            fs::write(&file, &bytes).unwrap();
            assert_eq!(stripped.hidden_by_link(), None, "{path}");
        }
    }

    #[test]
    fn symbols_are_found_by_build_but_not_those_of_another() {
        let test = "symbols_are_found_by_build";
        let Some(stripped) = Stripped::new(test, "0") else { return };
        let id = stripped.elf().build_id().unwrap();
        let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("usr/lib/debug/.build-id/{}/{}.debug", &digits[..2], &digits[2..]);
        assert!(find_by_build_id(&stripped.root(), &stripped.elf()).is_err());
        let file = stripped.move_debug_file(&name);
        let found = find_by_build_id(&stripped.root(), &stripped.elf()).unwrap();
        assert_eq!(found.symbols(["hidden"]), [Some(stripped.hidden)]);
        let other = Stripped::new(test, "0x400000").unwrap();
        fs::copy(other.folder.path().join("libhiding.debug"), file).unwrap();
        assert!(find_by_build_id(&stripped.root(), &stripped.elf()).is_err());
    }

    #[test]
    fn symbolic_links_stay_inside_the_root_and_lead_to_regular_files_only() {
        let Some(stripped) = Stripped::new("symbolic_links_stay_inside_the_root", "0") else { return };
        stripped.link();
        let outside = tempfile::tempdir().unwrap();
        let debug = stripped.folder.path().join("libhiding.debug");
        let copy = outside.path().join("libhiding.debug");
        fs::copy(&debug, &copy).unwrap();
        fs::create_dir(stripped.folder.path().join("opt")).unwrap();
        let link = stripped.folder.path().join("opt/libhiding.debug");
        symlink(&copy, &link).unwrap();
        assert_eq!(stripped.hidden_by_link(), None);
        fs::remove_file(&link).unwrap();
        // An absolute target is resolved inside the root.
        symlink("/libhiding.debug", &link).unwrap();
        assert_eq!(stripped.hidden_by_link(), Some(stripped.hidden));
        fs::remove_file(&link).unwrap();
        // Opening a FIFO would block until somebody writes to it.
        run(Command::new("mkfifo").arg(&link));
        assert_eq!(stripped.hidden_by_link(), None);
    }

    #[test]
    fn symbols_of_a_library_that_was_moved_are_moved() {
        let test = "symbols_of_a_library_that_was_moved";
        let Some(stripped) = Stripped::new(test, "0x10000000") else { return };
        let before = Stripped::new(test, "0").unwrap();
        fs::copy(
            before.folder.path().join("libhiding.debug"),
            stripped.folder.path().join("libhiding.debug"),
        )
        .unwrap();
        stripped.link();
        let gcc = find(test, "gcc").unwrap();
        let code = source(
            stripped.folder.path(),
            "main.c",
            "#include <unistd.h>\nint exported(int);\nint main(int c, char **v) { for (;;) { exported(c); pause(); } }",
        );
        let program = stripped.folder.path().join("program");
        let path = format!("-Wl,-rpath,{}", stripped.folder.path().display());
        let library = stripped.folder.path().join("libhiding.so");
        run(Command::new(gcc).args([&path, "-o"]).args([&program, &code, &library]));
        let process = Program::start(&mut Command::new(program));
        let image = wait_for("the library", || {
            let mappings = Mappings::of(process.pid()).ok()?;
            let map = mappings.modules_named("libhiding").next()?;
            Image::of(&mappings, map).ok()
        });
        assert_eq!(image.symbol("hidden"), Some(stripped.hidden));
        assert_eq!(image.functions("hid*n"), [stripped.hidden]);
        // An exported function is in the library and in its debug file.
        assert_eq!(image.functions("exp*"), [image.symbol("exported").unwrap()]);
        assert_eq!(stripped.hidden - before.hidden, 0x1000_0000);
        assert_eq!(image.symbols(&["none", "exported", "hidden"]).iter().flatten().count(), 2);
    }
}
