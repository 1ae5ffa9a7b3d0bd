//! How the value that stands for a kind of deferred task becomes a name.

use observer_common::deferred::ClassKey;
use serde::Deserialize;

/// What stands for a kind of work, and so how to make a name of it. Numbers are what the programs pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub(crate) enum Naming {
    /// A code object of CPython.
    PythonCode = 1,
    /// A type of CPython.
    PythonType = 2,
    /// A class of Ruby.
    RubyClass = 3,
    /// A piece of Ruby code, as its compiler leaves it (`rb_iseq_t`).
    RubyBlock = 4,
    /// A function.
    Function = 5,
    /// A table that begins with a function.
    Vtable = 6,
    /// A C string.
    String = 7,
    /// It is no kind: what put it off goes on in it, as code that waited does.
    SameWork = ClassKey::SAME_WORK,
}

impl Naming {
    /// All of them.
    const ALL: [Self; 8] = [
        Self::PythonCode,
        Self::PythonType,
        Self::RubyClass,
        Self::RubyBlock,
        Self::Function,
        Self::Vtable,
        Self::String,
        Self::SameWork,
    ];

    /// The one the programs passed on.
    pub(crate) fn of(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|naming| *naming as u32 == number)
    }

    /// Whether it takes an interpreter's own data to make a name of it.
    pub(crate) const fn is_interpreted(self) -> bool {
        matches!(self, Self::PythonCode | Self::PythonType | Self::RubyClass | Self::RubyBlock)
    }
}
