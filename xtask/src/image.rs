//! Builds an initramfs from files of this machine. Files keep their paths, so that programs that were built and
//! configured for this machine run unchanged in a guest. Files are copied only into the archive.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::{Builder, trailer};
use duct::cmd;
use walkdir::WalkDir;

use crate::workspace::target_path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// The entries of an archive.
#[derive(Default)]
pub(crate) struct Image {
    /// Sorted, so that a folder comes before its contents.
    entries: BTreeMap<PathBuf, Source>,
    /// Programs and libraries whose shared libraries have to be added.
    dynamic: BTreeSet<PathBuf>,
}

enum Source {
    /// Read from this machine when the archive is written; symbolic links stay links.
    Machine,
    Folder(u32),
    Text(u32, String),
}

impl Image {
    /// Adds a file or folder, its parent folders and the targets of all symbolic links on the way.
    pub(crate) fn add(&mut self, path: &Path) {
        let mut at = PathBuf::new();
        for component in path.components() {
            if component == Component::ParentDir {
                at.pop();
                continue;
            }
            at.push(component);
            let is_new = !self.entries.contains_key(&at);
            if is_new && at.symlink_metadata().is_ok() {
                self.entries.insert(at.clone(), Source::Machine);
            }
            if let Ok(target) = fs::read_link(&at) {
                at.pop();
                let target = at.join(target);
                if is_new {
                    self.add(&target);
                }
                at = fs::canonicalize(&target).unwrap_or(target);
            }
        }
    }

    /// Adds a program and the shared libraries that it is linked to.
    pub(crate) fn add_program(&mut self, path: &Path) {
        self.add(path);
        self.dynamic.insert(path.to_owned());
    }

    /// Adds a folder and its contents, except files and folders with one of the names in `without`.
    pub(crate) fn add_tree(&mut self, folder: &Path, without: &[&OsStr]) {
        let walk = WalkDir::new(folder).into_iter();
        for entry in walk.filter_entry(|entry| !without.contains(&entry.file_name())).flatten() {
            self.add(entry.path());
            if entry.path().extension().is_some_and(|end| end == "so") {
                self.dynamic.insert(entry.path().to_owned());
            }
        }
    }

    /// Adds a file with this content instead of the file that this machine has at that path.
    pub(crate) fn add_text(&mut self, path: &str, mode: u32, content: impl Into<String>) {
        self.entries.insert(path.into(), Source::Text(REGULAR | mode, content.into()));
    }

    /// Adds an empty folder.
    pub(crate) fn add_folder(&mut self, path: &str, mode: u32) {
        self.entries.insert(path.into(), Source::Folder(DIRECTORY | mode));
    }

    /// Writes the archive to an unnamed temporary file. It is not compressed, because an emulated CPU takes longer to
    /// decompress it than QEMU takes to load it.
    pub(crate) fn write(mut self) -> Result<File> {
        for library in libraries(&self.dynamic)? {
            self.add(&library);
        }
        let mut out = BufWriter::new(tempfile::tempfile_in(target_path(""))?);
        for (path, source) in &self.entries {
            match source {
                Source::Machine => write_file(&mut out, path),
                Source::Folder(mode) => write_entry(&mut out, Builder::new(&name(path)).mode(*mode), &[]),
                Source::Text(mode, text) => {
                    write_entry(&mut out, Builder::new(&name(path)).mode(*mode), text.as_bytes())
                }
            }
            .with_context(|| format!("cannot pack {}", path.display()))?;
        }
        Ok(trailer(out)?.into_inner()?)
    }
}

/// Shared libraries that the dynamic loader would load for these files. One call of `ldd` for all of them, because it
/// is a slow shell script.
fn libraries(files: &BTreeSet<PathBuf>) -> Result<Vec<PathBuf>> {
    // ldd fails for static programs, but still lists the libraries of the others.
    let answer = cmd("ldd", files).stderr_null().unchecked().read().context("cannot run ldd")?;
    let words = answer.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':'));
    Ok(words.map(PathBuf::from).collect())
}

fn write_file(out: &mut impl Write, path: &Path) -> Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    // Python recompiles a module whose modification time has changed.
    let builder = Builder::new(&name(path)).mode(metadata.mode()).mtime(u32::try_from(metadata.mtime())?);
    if metadata.is_symlink() {
        write_entry(out, builder, fs::read_link(path)?.as_os_str().as_bytes())
    } else if metadata.is_file() {
        let mut writer = builder.write(out, u32::try_from(metadata.len())?);
        io::copy(&mut File::open(path)?, &mut writer)?;
        writer.finish()?;
        Ok(())
    } else {
        write_entry(out, builder, &[])
    }
}

fn write_entry(out: &mut impl Write, builder: Builder, content: &[u8]) -> Result<()> {
    let mut writer = builder.write(out, u32::try_from(content.len())?);
    writer.write_all(content)?;
    writer.finish()?;
    Ok(())
}

/// Name of an entry: relative to the root, which is called `.`.
fn name(path: &Path) -> String {
    let relative = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
    if relative.is_empty() { ".".to_owned() } else { relative.into_owned() }
}
