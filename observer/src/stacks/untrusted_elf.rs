//! Whether a file of a process may be given to the crate that tells symbols. That believes what a file says of itself: it
//! takes the memory that a part of it claims to unpack to, and opens whatever has the name that its debug information is
//! said to have, be it a pipe that nobody writes to.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use flate2::read::ZlibDecoder;
use object::{CompressionFormat, Object as _, ObjectSection as _};

use super::elf::Elf;

/// Most bytes that all parts of a file may unpack to.
const UNPACKED: u64 = 256 << 20;

/// Sections that name another file by a whole path, which distributions use in files for debuggers alone.
const ELSEWHERE: [&[u8]; 2] = [b".gnu_debugaltlink", b".debug_sup"];

/// Whether the file with this path, and the one beside it that it names, do no harm.
pub(super) fn is_harmless(elf: &Elf, path: &Path) -> bool {
    let Some((name, _)) = elf.debug_link() else { return is_by_itself(elf) };
    let name = OsStr::from_bytes(&name);
    is_by_itself(elf) && Path::new(name).file_name() == Some(name) && is_other_harmless(&beside(path, name))
}

/// A file of that name in the folder that a file is in, also if it is known under another path.
fn beside(path: &Path, name: &OsStr) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.into()).with_file_name(name)
}

/// The same of a file that only debuggers read, which need not be there.
fn is_other_harmless(path: &Path) -> bool {
    match path.metadata() {
        Ok(metadata) if metadata.is_file() => {
            let elf = File::open(path).ok().and_then(|file| Elf::open(&file).ok());
            elf.is_some_and(|elf| is_by_itself(&elf))
        }
        Ok(_) => false,
        Err(_) => true,
    }
}

fn is_by_itself(elf: &Elf) -> bool {
    let file = elf.parsed();
    let mut left = UNPACKED;
    file.sections().all(|section| {
        let names_other = section.name_bytes().is_ok_and(|name| ELSEWHERE.contains(&name));
        !names_other && is_unpacked_within(&section, &mut left)
    })
}

/// Whether a section that is packed unpacks to what it claims, and to no more than that many bytes.
fn is_unpacked_within<'d>(section: &impl object::ObjectSection<'d>, left: &mut u64) -> bool {
    let Ok(packed) = section.compressed_data() else { return false };
    let claimed = packed.uncompressed_size;
    match packed.format {
        CompressionFormat::None => true,
        CompressionFormat::Zlib => {
            let Some(rest) = left.checked_sub(claimed) else { return false };
            *left = rest;
            let unpacked = ZlibDecoder::new(packed.data).take(claimed + 1);
            io::copy(&mut { unpacked }, &mut io::sink()).is_ok_and(|length| length == claimed)
        }
        // It is not unpacked at all.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;
    use crate::stacks::testing::{find, run, source};

    #[test]
    fn files_that_claim_or_name_too_much_are_not_read() {
        let test = "files_that_claim_or_name_too_much";
        let (Some(gcc), Some(objcopy)) = (find(test, "gcc"), find(test, "objcopy")) else { return };
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let code = source(folder.path(), "code.c", "int f(int x) { return x + 1; }");
        run(Command::new(gcc).args(["-g", "-shared", "-fPIC", "-o"]).args([&path("plain"), &code]));
        let made = |option: &str, name: &str| {
            run(Command::new(&objcopy).arg(option).args([&path("plain"), &path(name)]));
            fs::read(path(name)).unwrap()
        };
        let is_read = |bytes: &[u8]| is_harmless(&Elf::from_bytes(bytes).unwrap(), &path("module"));
        assert!(is_read(&fs::read(path("plain")).unwrap()));

        let packed = made("--compress-debug-sections=zlib", "packed");
        assert!(is_read(&packed));
        // The header of what is packed: its kind, and how large it is unpacked.
        let header = packed
            .windows(16)
            .position(|bytes| bytes[..8] == [1, 0, 0, 0, 0, 0, 0, 0] && bytes[12..] == [0; 4]);
        let size = header.unwrap() + 8;
        for claimed in [1_u64, 1 << 40, u64::MAX] {
            let mut packed = packed.clone();
            packed[size..size + 8].copy_from_slice(&claimed.to_le_bytes());
            assert!(!is_read(&packed), "{claimed}");
        }

        fs::write(path("0123456789.debug"), made("--only-keep-debug", "debug")).unwrap();
        let link = format!("--add-gnu-debuglink={}", path("0123456789.debug").display());
        let linked = made(&link, "linked");
        assert!(is_read(&linked));
        let at = linked.windows(16).position(|bytes| bytes == b"0123456789.debug").unwrap();
        for name in [b"/tmp/789.debug\0\0", b"../456789.debug\0"] {
            let mut linked = linked.clone();
            linked[at..at + 16].copy_from_slice(name);
            assert!(!is_read(&linked));
        }
        // What is no file may be a pipe that nobody writes to.
        fs::remove_file(path("0123456789.debug")).unwrap();
        fs::create_dir(path("0123456789.debug")).unwrap();
        assert!(!is_read(&linked));
    }
}
