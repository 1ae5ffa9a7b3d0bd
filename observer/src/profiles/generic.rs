//! A library of the user's own, described on the command line.

use std::str::FromStr;

use observer_common::deferred::Verb;

use super::{
    expression::Path,
    hook::{At, Hook, Names, Site},
    profile::Profile,
};

/// What its profile is called, which nobody can ask for by that name.
pub(super) const NAME: &str = "generic";

/// A function and what its work is known by: `libtask.so:task_enqueue:arg0`.
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
            return Err("it has the form LIBRARY:FUNCTION:KEY, such as libtask.so:task_enqueue:arg0".into());
        };
        if module.is_empty() || function.is_empty() {
            return Err("it names no library or no function".into());
        }
        Ok(Self { module: module.to_owned(), function: function.to_owned(), key: key.parse()? })
    }
}

impl OwnHook {
    /// In the library `home`, whose other copies have hooks of their own, or in another one.
    fn as_hook(&self, home: &str, verb: Verb, once: bool) -> Hook {
        Hook {
            verb,
            site: Site::Named(vec![self.function.clone()]),
            module: (self.module != home).then(|| self.module.clone()),
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
    /// Describes a library by its functions.
    pub(crate) fn of_own_library(snapshot: &OwnHook, restore: &OwnHook, forget: Option<&OwnHook>) -> Self {
        let home = &snapshot.module;
        let mut hooks = vec![
            snapshot.as_hook(home, Verb::Snapshot, false),
            restore.as_hook(home, Verb::Restore, forget.is_none()),
        ];
        hooks.extend(forget.map(|forget| forget.as_hook(home, Verb::Forget, false)));
        Self {
            name: NAME.into(),
            about: "a library of one's own".into(),
            marker: Names::One(snapshot.function.clone()),
            home: Some(home.clone()),
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
