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
    let claimed = packed.uncompressed_size as u64;
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
