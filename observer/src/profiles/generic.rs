//! A profile for a user's library, from hooks given on the command line.

use std::str::FromStr;

use observer_common::deferred::Verb;

use super::{
    expression::Path,
    hook::{At, Hook, Names, Site},
    profile::Profile,
};

/// Name of the profile. It cannot be selected with `--profile`.
pub(super) const NAME: &str = "generic";

/// A hook given on the command line: library, function and key, such as `libtask.so:task_enqueue:arg0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnHook {
    module: String,
    function: String,
    key: Path,
}

impl FromStr for OwnHook {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (Some(module), Some(function), Some(key), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("expected LIBRARY:FUNCTION:KEY, such as libtask.so:task_enqueue:arg0".into());
        };
        if module.is_empty() || function.is_empty() {
            return Err("LIBRARY and FUNCTION must not be empty (expected LIBRARY:FUNCTION:KEY)".into());
        }
        Ok(Self { module: module.to_owned(), function: function.to_owned(), key: key.parse()? })
    }
}

impl OwnHook {
    /// Converts to a hook of the profile of library `library`. In that library, each loaded copy has its own hook.
    fn as_hook(&self, library: &str, verb: Verb, once: bool) -> Hook {
        Hook {
            verb,
            site: Site::Named(vec![self.function.clone()]),
            module: (self.module != library).then(|| self.module.clone()),
            optional: false,
            unless: Vec::new(),
            at: At::Entry,
            when: Vec::new(),
            key: Some(self.key.clone()),
            class: Vec::new(),
            request_id: None,
            since: None,
            until: None,
            space: String::new(),
            once,
            takes_over: false,
        }
    }
}

impl Profile {
    /// The profile of a library with these functions.
    pub(crate) fn of_own_library(snapshot: &OwnHook, restore: &OwnHook, forget: Option<&OwnHook>) -> Self {
        let library = &snapshot.module;
        let mut hooks = vec![
            snapshot.as_hook(library, Verb::Snapshot, false),
            restore.as_hook(library, Verb::Restore, forget.is_none()),
        ];
        hooks.extend(forget.map(|forget| forget.as_hook(library, Verb::Forget, false)));
        Self {
            name: NAME.into(),
            about: "a library described on the command line".into(),
            marker: Names::One(snapshot.function.clone()),
            library: Some(library.clone()),
            needs: None,
            version: None,
            gc: None,
            hooks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_a_library_a_function_and_a_key() {
        let hook: OwnHook = "libtask.so:task_enqueue:arg0->8".parse().unwrap();
        assert_eq!((hook.module.as_str(), hook.function.as_str()), ("libtask.so", "task_enqueue"));
        for wrong in ["", "libtask.so", "libtask.so:f", ":f:arg0", "l::arg0", "l:f:arg9", "l:f:arg0:x"] {
            assert!(wrong.parse::<OwnHook>().is_err(), "{wrong}");
        }
    }
}
