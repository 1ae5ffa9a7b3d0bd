//! Targets for the data of interpreters in the memory of observed processes.

use super::input::{choice, file, number};
use crate::{
    binary::memory::ProcessMemory,
    model::frame::Frame,
    stacks::{
        python::{self, Python},
        ruby::{self, Ruby},
        unwind::DEPTH_MAX,
    },
};

/// Asserts that frames are not too many and have printable text.
fn check(frames: &[Frame]) {
    assert!(frames.len() <= DEPTH_MAX);
    for frame in frames {
        check_text(&frame.function);
        frame.file.iter().for_each(|file| check_text(file));
    }
}

fn check_text(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

/// CPython: its minor version, followed by its memory from address 0 on, where the runtime is.
pub(super) fn python(data: &[u8]) {
    let (minor, content) = choice(data);
    let memory = ProcessMemory::of_file(file(content));
    let _ = python::version(&memory, u64::from(minor));
    let version = (3, 11 + minor % 3);
    if let Ok(python) = Python::new(&memory, 0, version) {
        check(&python.frames(&memory, 77).unwrap_or_default());
        for object in [0, 0x100, number(content).0] {
            python.code_name(&memory, object).iter().for_each(|name| check_text(name));
            python.type_name(&memory, object).iter().for_each(|name| check_text(name));
        }
    }
    // The content as a location table: no code unit beyond its end has a line.
    let (unit, table) = choice(content);
    let end = (table.len() as u64 + 1) * 8;
    assert!(python::line(table, u32::MAX, u64::from(unit)).is_none() || u64::from(unit) < end);
}

/// Ruby: a byte that selects the thread, followed by the memory from address 0 on, where the pointers to the virtual
/// machine and to the names are.
pub(super) fn ruby(data: &[u8]) {
    let (thread, content) = choice(data);
    let memory = ProcessMemory::of_file(file(content));
    let _ = ruby::version(&memory, u64::from(thread));
    for version in ["3.1.2", "3.3.8"] {
        let ruby = Ruby::at(0, Some(8), version).expect("a supported version");
        check(&ruby.frames(&memory, 77, thread & 1 == 0).unwrap_or_default());
        for object in [0x100, number(content).0] {
            ruby.class_name(&memory, object).iter().for_each(|name| check_text(name));
            ruby.block_name(&memory, object).iter().for_each(|name| check_text(name));
        }
    }
}
