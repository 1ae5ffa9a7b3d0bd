//! A module with all symbols that are known of it: its own, and those that were taken out of it and put into a file
//! for debuggers, which is looked for as they do: by what tells its build from all others, or by name and checksum.

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
    mappings::{Mappings, inside, open_under},
};

/// Where distributions put such files.
const FOLDER: &str = "/usr/lib/debug";

/// Size of the largest file that a checksum is made of, in bytes.
const LARGEST: u64 = 1 << 30;

/// How much of it is read at a time.
const PART: usize = 1 << 20;

/// The file behind a mapping.
pub(crate) struct Image {
    pub(crate) file: File,
    pub(crate) elf: Elf,
    debug: Option<Debug>,
}

/// Symbols that were taken out of a file.
struct Debug {
    elf: Elf,
    /// What to add to its addresses: whoever moves a library to another place (`prelink`) leaves this file as it is.
    shift: u64,
}

impl Image {
    /// Opens the file behind a mapping, and the one with its symbols if those were taken out of it.
    pub(crate) fn of(mappings: &Mappings, map: &MemoryMap) -> Result<Self> {
        let file = mappings.open(map)?;
        let elf = Elf::open(&file)?;
        let debug = if elf.has_symbols() { None } else { Debug::of(mappings.pid, map, &elf) };
        Ok(Self { file, elf, debug })
    }

    /// Address in the file of a symbol it defines.
    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        self.symbols(&[name])[0]
    }

    /// The same of any number of symbols.
    pub(crate) fn symbols(&self, names: &[&str]) -> Vec<Option<u64>> {
        let own = self.elf.all_symbols(names);
        match &self.debug {
            Some(debug) if own.contains(&None) => {
                let others = debug.elf.all_symbols(names).into_iter();
                let moved = others.map(|address| Some(address?.wrapping_add(debug.shift)));
                own.into_iter().zip(moved).map(|(own, other)| own.or(other)).collect()
            }
            _ => own,
        }
    }

    /// Addresses in the file of all functions it defines that this name stands for, in which a `*` stands for anything;
    /// each once.
    pub(crate) fn functions(&self, name: &str) -> Vec<u64> {
        let moved = self.debug.iter().flat_map(|debug| {
            let others = debug.elf.functions(name).into_iter();
            others.map(|address| address.wrapping_add(debug.shift))
        });
        let all: BTreeSet<_> = self.elf.functions(name).into_iter().chain(moved).collect();
        all.into_iter().collect()
    }
}

impl Debug {
    /// Looks for it where the process sees it, and else here.
    fn of(pid: u32, map: &MemoryMap, elf: &Elf) -> Option<Self> {
        let MMapPath::Path(path) = &map.pathname else { return None };
        let roots = [inside(pid, "/".as_ref()), "/".into()];
        let roots: Vec<_> = roots.iter().filter_map(|root| File::open(root).ok()).collect();
        let by_build = roots.iter().find_map(|root| by_build(root, elf).ok());
        let debug = by_build.or_else(|| roots.iter().find_map(|root| by_link(root, path, elf)))?;
        let shift = match (elf.start(), debug.start()) {
            (Some(own), Some(other)) => own.wrapping_sub(other),
            _ => 0,
        };
        Some(Self { elf: debug, shift })
    }
}

fn by_build(root: &File, elf: &Elf) -> Result<Elf> {
    let id = elf.build_id().context("it has no build id")?;
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let (folder, name) = digits.split_at_checked(2).context("its build id is too short")?;
    let path = format!("{FOLDER}/.build-id/{folder}/{name}.debug");
    let debug = Elf::of_symbols(&open_under(root, path.as_ref(), OFlag::empty())?)?;
    (debug.build_id() == Some(id)).then_some(debug).context("it is for another build")
}

/// `module` is the path of the file that it belongs to.
fn by_link(root: &File, module: &Path, elf: &Elf) -> Option<Elf> {
    let (name, checksum) = elf.debug_link()?;
    let name = OsStr::from_bytes(&name);
    let folder = module.parent().filter(|_| Path::new(name).file_name() == Some(name))?;
    let of_all = Path::new(FOLDER).join(folder.strip_prefix("/").ok()?);
    [folder.join(name), folder.join(".debug").join(name), of_all.join(name)].iter().find_map(|path| {
        let file = open_under(root, path, OFlag::empty()).ok()?;
        (checksum_of(&file).ok()? == checksum).then(|| Elf::of_symbols(&file).ok())?
    })
}

/// The CRC-32 of a file that is not too large.
fn checksum_of(file: &File) -> Result<u32> {
    ensure!(file.metadata()?.len() <= LARGEST, "it is too large");
    let mut part = vec![0; PART];
    let mut checksum = Crc::new();
    let mut at = 0;
    while at <= LARGEST {
        let length = file.read_at(&mut part, at)?;
        if length == 0 {
            return Ok(checksum.sum());
        }
        checksum.update(&part[..length]);
        at += length as u64;
    }
    bail!("it grows")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Command};

    use super::*;
    use crate::stacks::testing::{Program, find, run, source, wait_for};

    const CODE: &str = r#"
        #include <unistd.h>
        __attribute__((noinline)) static int hidden(int x) { return x * 0x1234567; }
        int exported(int x) { return hidden(x) + 1; }
    "#;

    /// A library at this address, its symbols in a file of its own, and `hidden` in it.
    struct Stripped {
        folder: tempfile::TempDir,
        objcopy: PathBuf,
        hidden: u64,
    }

    impl Stripped {
        /// `None` without a compiler.
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

        /// Has the library tell the name and the checksum of the file with its symbols.
        fn link(&self) {
            self.copy(&["--add-gnu-debuglink=libhiding.debug", "libhiding.so"]);
        }

        fn elf(&self) -> Elf {
            Elf::open(&File::open(self.folder.path().join("libhiding.so")).unwrap()).unwrap()
        }

        /// The same root for all, and where the library is in it.
        fn root(&self) -> File {
            File::open(&self.folder).unwrap()
        }

        /// Moves the file with the symbols to another folder.
        fn put(&self, path: &str) -> PathBuf {
            let place = self.folder.path().join(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::rename(self.folder.path().join("libhiding.debug"), &place).unwrap();
            place
        }

        fn by_link(&self) -> Option<u64> {
            by_link(&self.root(), "/opt/libhiding.so".as_ref(), &self.elf())?.symbols(["hidden"])[0]
        }
    }

    #[test]
    fn symbols_are_found_by_link_in_all_three_folders() {
        let test = "symbols_are_found_by_link";
        for place in
            ["opt/libhiding.debug", "opt/.debug/libhiding.debug", "usr/lib/debug/opt/libhiding.debug"]
        {
            let Some(stripped) = Stripped::new(test, "0") else { return };
            stripped.link();
            assert_eq!(stripped.elf().symbols(["hidden"]), [None]);
            assert_eq!(stripped.by_link(), None);
            let file = stripped.put(place);
            assert_eq!(stripped.by_link(), Some(stripped.hidden), "{place}");
            // It is not looked for elsewhere.
            let elsewhere = by_link(&stripped.root(), "/srv/libhiding.so".as_ref(), &stripped.elf());
            assert!(elsewhere.is_none(), "{place}");
            // One byte more, and it is another file.
            let mut bytes = fs::read(&file).unwrap();
            bytes.push(0);
            fs::write(&file, &bytes).unwrap();
            assert_eq!(stripped.by_link(), None, "{place}");
        }
    }

    #[test]
    fn symbols_are_found_by_build_but_not_those_of_another() {
        let test = "symbols_are_found_by_build";
        let Some(stripped) = Stripped::new(test, "0") else { return };
        let id = stripped.elf().build_id().unwrap();
        let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("usr/lib/debug/.build-id/{}/{}.debug", &digits[..2], &digits[2..]);
        assert!(by_build(&stripped.root(), &stripped.elf()).is_err());
        let place = stripped.put(&name);
        let found = by_build(&stripped.root(), &stripped.elf()).unwrap();
        assert_eq!(found.symbols(["hidden"]), [Some(stripped.hidden)]);
        let other = Stripped::new(test, "0x400000").unwrap();
        fs::copy(other.folder.path().join("libhiding.debug"), place).unwrap();
        assert!(by_build(&stripped.root(), &stripped.elf()).is_err());
    }

    #[test]
    fn links_lead_nowhere_out_of_a_root_and_to_nothing_but_files() {
        let Some(stripped) = Stripped::new("links_lead_nowhere_out_of_a_root", "0") else { return };
        stripped.link();
        let outside = tempfile::tempdir().unwrap();
        let debug = stripped.folder.path().join("libhiding.debug");
        let copy = outside.path().join("libhiding.debug");
        fs::copy(&debug, &copy).unwrap();
        fs::create_dir(stripped.folder.path().join("opt")).unwrap();
        let place = stripped.folder.path().join("opt/libhiding.debug");
        symlink(&copy, &place).unwrap();
        assert_eq!(stripped.by_link(), None);
        fs::remove_file(&place).unwrap();
        // As it is called inside.
        symlink("/libhiding.debug", &place).unwrap();
        assert_eq!(stripped.by_link(), Some(stripped.hidden));
        fs::remove_file(&place).unwrap();
        // Whoever opened that would wait for somebody to write to it.
        run(Command::new("mkfifo").arg(&place));
        assert_eq!(stripped.by_link(), None);
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
        // What is exported is in both.
        assert_eq!(image.functions("exp*"), [image.symbol("exported").unwrap()]);
        assert_eq!(stripped.hidden - before.hidden, 0x1000_0000);
        assert_eq!(image.symbols(&["none", "exported", "hidden"]).iter().flatten().count(), 2);
    }
}
