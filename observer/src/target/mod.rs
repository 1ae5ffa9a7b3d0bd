//! The processes under observation, as `/proc` and the kernel's socket tables show them.

pub(crate) mod calls;
pub(crate) mod choice;
pub(crate) mod connections;
pub(crate) mod container;
pub(crate) mod context;
pub(crate) mod criteria;
pub(crate) mod drops;
pub(crate) mod hooks;
pub(crate) mod identity;
pub(crate) mod outlook;
pub(crate) mod pod;
pub(crate) mod process;
pub(crate) mod runtime;
