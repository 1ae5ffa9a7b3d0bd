//! Decides whether an untrusted ELF file is safe to pass to the symbolizer crate (`blazesym`). The crate trusts the
//! file: it allocates the size that a compressed section claims, and opens the debug file that the file names, even if
//! that is a FIFO without a writer.

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

/// Maximum size of all decompressed sections of a file together, in bytes.
const DECOMPRESSED_MAX: u64 = 256 << 20;

/// Sections that name another file by its full path. Distributions use them only in debug files.
const PATH_SECTIONS: [&[u8]; 2] = [b".gnu_debugaltlink", b".debug_sup"];

/// Whether the file at `path`, and the debug file beside it that it names, are safe to symbolize.
pub(crate) fn is_safe(elf: &Elf, path: &Path) -> bool {
    let Some((name, _)) = elf.debug_link() else { return has_safe_sections(elf) };
    let name = OsStr::from_bytes(&name);
    has_safe_sections(elf)
        && Path::new(name).file_name() == Some(name)
        && is_debug_file_safe(&beside(path, name))
}

/// Path of a file in the same folder as `path`, whose symbolic links are resolved first.
fn beside(path: &Path, name: &OsStr) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.into()).with_file_name(name)
}

/// Whether a debug file is safe to symbolize. One that does not exist is.
fn is_debug_file_safe(path: &Path) -> bool {
    match path.metadata() {
        Ok(metadata) if metadata.is_file() => {
            let elf = File::open(path).ok().and_then(|file| Elf::open(&file).ok());
            elf.is_some_and(|elf| has_safe_sections(&elf))
        }
        Ok(_) => false,
        Err(_) => true,
    }
}

/// Whether no section names another file by its path, and all compressed sections decompress within the limit.
fn has_safe_sections(elf: &Elf) -> bool {
    let file = elf.parsed();
    let mut left = DECOMPRESSED_MAX;
    file.sections().all(|section| {
        let names_other = section.name_bytes().is_ok_and(|name| PATH_SECTIONS.contains(&name));
        !names_other && decompresses_within(&section, &mut left)
    })
}

/// Whether a section, if it is compressed, decompresses to exactly the size that it claims. That size is deducted from
/// `left` and must not exceed it.
fn decompresses_within<'d>(section: &impl object::ObjectSection<'d>, left: &mut u64) -> bool {
    let Ok(compressed) = section.compressed_data() else { return false };
    let claimed = compressed.uncompressed_size;
    match compressed.format {
        CompressionFormat::None => true,
        CompressionFormat::Zlib => {
            let Some(rest) = left.checked_sub(claimed) else { return false };
            *left = rest;
            let decompressed = ZlibDecoder::new(compressed.data).take(claimed + 1);
            io::copy(&mut { decompressed }, &mut io::sink()).is_ok_and(|length| length == claimed)
        }
        // The symbolizer does not decompress other formats.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;
    use crate::binary::testing::{find, run, source};

    #[test]
    fn files_with_false_sizes_or_paths_are_refused() {
        let test = "files_with_false_sizes_or_paths";
        let (Some(gcc), Some(objcopy)) = (find(test, "gcc"), find(test, "objcopy")) else { return };
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let code = source(folder.path(), "code.c", "int f(int x) { return x + 1; }");
        run(Command::new(gcc).args(["-g", "-shared", "-fPIC", "-o"]).args([&path("plain"), &code]));
        let made = |option: &str, name: &str| {
            run(Command::new(&objcopy).arg(option).args([&path("plain"), &path(name)]));
            fs::read(path(name)).unwrap()
        };
        let accepts = |bytes: &[u8]| is_safe(&Elf::from_bytes(bytes).unwrap(), &path("module"));
        assert!(accepts(&fs::read(path("plain")).unwrap()));

        let compressed = made("--compress-debug-sections=zlib", "compressed");
        assert!(accepts(&compressed));
        // The header of a compressed section: its format, and its size when decompressed.
        let header = compressed
            .windows(16)
            .position(|bytes| bytes[..8] == [1, 0, 0, 0, 0, 0, 0, 0] && bytes[12..] == [0; 4]);
        let size = header.unwrap() + 8;
        for claimed in [1_u64, 1 << 40, u64::MAX] {
            let mut compressed = compressed.clone();
            compressed[size..size + 8].copy_from_slice(&claimed.to_le_bytes());
            assert!(!accepts(&compressed), "{claimed}");
        }

        fs::write(path("0123456789.debug"), made("--only-keep-debug", "debug")).unwrap();
        let link = format!("--add-gnu-debuglink={}", path("0123456789.debug").display());
        let linked = made(&link, "linked");
        assert!(accepts(&linked));
        let at = linked.windows(16).position(|bytes| bytes == b"0123456789.debug").unwrap();
        for name in [b"/tmp/789.debug\0\0", b"../456789.debug\0"] {
            let mut linked = linked.clone();
            linked[at..at + 16].copy_from_slice(name);
            assert!(!accepts(&linked));
        }
        // The debug file must be a regular file.
        fs::remove_file(path("0123456789.debug")).unwrap();
        fs::create_dir(path("0123456789.debug")).unwrap();
        assert!(!accepts(&linked));
    }
}
