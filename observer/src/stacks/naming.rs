//! How to resolve the value that stands for a kind of deferred task to a name.

use observer_common::deferred::ClassKey;
use serde::Deserialize;

/// What the value of a kind is, and so how to resolve its name. The numbers are `ClassKey::naming` in the eBPF programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub(crate) enum Naming {
    /// Address of a CPython code object.
    PythonCode = 1,
    /// Address of a CPython type.
    PythonType = 2,
    /// A Ruby class.
    RubyClass = 3,
    /// Compiled Ruby code (`rb_iseq_t`).
    RubyBlock = 4,
    /// Address of a native function.
    Function = 5,
    /// Address of a table whose first entry is the address of a native function.
    Vtable = 6,
    /// Address of a C string.
    String = 7,
    /// No kind: the task is the continuation of the one that enqueued it, as the code after a wait is.
    SameWork = ClassKey::SAME_WORK,
}

impl Naming {
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

    /// Decodes the number that the eBPF programs report.
    pub(crate) fn of(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|naming| *naming as u32 == number)
    }

    /// Whether an interpreter's data are needed to resolve a name.
    pub(crate) const fn is_interpreted(self) -> bool {
        matches!(self, Self::PythonCode | Self::PythonType | Self::RubyClass | Self::RubyBlock)
    }
}
