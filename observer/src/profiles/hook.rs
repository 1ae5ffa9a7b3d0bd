//! One `[[hook]]` of a profile: a function, what a call of it means, and how to read its arguments.

use observer_common::deferred::{CLASS_STEPS, KEY_STEPS, REQUEST_ID_STEPS, Verb};
use serde::Deserialize;

use super::expression::{Path, Test};
use crate::stacks::naming::Naming;

/// A validated hook.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "RawHook")]
pub(crate) struct Hook {
    /// What a call means for a task.
    pub(crate) verb: Verb,
    /// The function.
    pub(crate) site: Site,
    /// Prefix of the module's file name; `None` for the module that defines the marker.
    pub(crate) module: Option<String>,
    /// Whether the function may be missing.
    pub(crate) optional: bool,
    /// Functions whose presence makes this hook unnecessary.
    pub(crate) unless: Vec<String>,
    /// Position in the function.
    pub(crate) at: At,
    /// Conditions; if one fails, the call is ignored.
    pub(crate) when: Vec<Test>,
    /// The key of the task; `None` for the task that the thread is running.
    pub(crate) key: Option<Path>,
    /// Cases that determine the kind of the task; the first that applies is used.
    pub(crate) class: Vec<Case>,
    /// The runtime's id of the request that is the origin of a task.
    pub(crate) request_id: Option<RequestId>,
    /// First version with this hook.
    pub(crate) since: Option<String>,
    /// First version without this hook.
    pub(crate) until: Option<String>,
    /// Key space: equal keys in different spaces are different tasks.
    pub(crate) space: String,
    /// Whether the task ends at its thread's next `leave`, `clear`, `restore` or wait for events.
    pub(crate) once: bool,
    /// Whether a task of unknown origin takes the request that its thread has just read as its origin.
    pub(crate) takes_over: bool,
}

/// The function of a hook.
#[derive(Clone, Debug)]
pub(crate) enum Site {
    /// The first of these names that is defined. A name with `*`, which matches any characters, stands for all functions
    /// that match.
    Named(Vec<String>),
    /// The function that a function of this name jumps to.
    BehindJump(Vec<String>),
    /// The function that a pointer in the process's memory leads to.
    InTable(Table),
}

/// A path through the process's memory to a function.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Table {
    /// Symbol of a structure.
    pub(crate) symbol: String,
    /// Offsets in bytes. The word at each offset is a pointer to the next structure, the last one to the function.
    pub(crate) path: Vec<u64>,
}

/// Position in a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum At {
    /// At its first instruction.
    #[default]
    Entry,
    /// At each of its returns.
    Return,
}

/// A case that determines the kind of a task.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    /// Conditions.
    #[serde(default)]
    pub(crate) when: Vec<Test>,
    /// The value that identifies the kind.
    pub(crate) is: Path,
    /// How the value becomes a name.
    pub(crate) named: Naming,
}

/// The id of a request: a C string, read if conditions hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestId {
    /// Conditions.
    #[serde(default)]
    pub(crate) when: Vec<Test>,
    /// Address of the C string.
    pub(crate) is: Path,
}

/// A hook as written in a profile, before validation.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHook {
    verb: RawVerb,
    function: Option<Names>,
    through: Option<Through>,
    table: Option<Table>,
    module: Option<String>,
    #[serde(default)]
    optional: bool,
    #[serde(default)]
    unless: Vec<String>,
    #[serde(default)]
    at: At,
    #[serde(default)]
    when: Vec<Test>,
    key: Option<Path>,
    #[serde(default)]
    class: Vec<Case>,
    request_id: Option<RequestId>,
    since: Option<String>,
    until: Option<String>,
    #[serde(default)]
    space: String,
    #[serde(default)]
    once: bool,
    #[serde(default)]
    takes_over: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawVerb {
    Snapshot,
    Restore,
    Leave,
    Forget,
    Clear,
    Detach,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Through {
    Jump,
}

/// One name, or several of which the first that is defined is used. A `*` matches anything.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Names {
    /// A single name.
    One(String),
    /// Names in order of preference.
    Several(Vec<String>),
}

impl Names {
    /// All names, in order.
    pub(crate) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }
}

impl TryFrom<RawHook> for Hook {
    type Error = String;

    fn try_from(raw: RawHook) -> Result<Self, String> {
        let verb = match raw.verb {
            RawVerb::Snapshot => Verb::Snapshot,
            RawVerb::Restore => Verb::Restore,
            RawVerb::Leave => Verb::Leave,
            RawVerb::Forget => Verb::Forget,
            RawVerb::Clear => Verb::Clear,
            RawVerb::Detach => Verb::Detach,
        };
        raw.check(verb)?;
        let names = raw.function.map(|names| names.as_slice().to_vec());
        let site = match (names, raw.table, raw.through) {
            (Some(names), None, None) => Site::Named(names),
            (Some(names), None, Some(Through::Jump)) => Site::BehindJump(names),
            (None, Some(table), None) if !table.path.is_empty() => Site::InTable(table),
            (None, Some(_), None) => {
                return Err("the `path` of a `table` is empty (at least one offset)".into());
            }
            _ => {
                return Err(
                    "a hook needs either a `function`, optionally with `through`, or a `table`".into()
                );
            }
        };
        Ok(Self {
            verb,
            site,
            module: raw.module,
            optional: raw.optional,
            unless: raw.unless,
            at: raw.at,
            when: raw.when,
            key: raw.key,
            class: raw.class,
            request_id: raw.request_id,
            since: raw.since,
            until: raw.until,
            space: raw.space,
            once: raw.once,
            takes_over: raw.takes_over,
        })
    }
}

impl RawHook {
    /// Rejects fields that the verb does not take, and paths with too many steps for the programs.
    fn check(&self, verb: Verb) -> Result<(), String> {
        match (verb, &self.key) {
            (Verb::Snapshot | Verb::Restore, None) => return Err("this verb requires a `key`".into()),
            (Verb::Clear | Verb::Detach, Some(_)) => return Err("this verb allows no `key`".into()),
            (_, None) if !self.when.is_empty() => return Err("`when` requires a `key`".into()),
            // The final step, which takes the value, counts as well.
            (_, Some(key))
                if steps(key) + self.when.iter().map(Test::steps).sum::<usize>() + 1 > KEY_STEPS =>
            {
                return Err(format!("`key` and `when` need more than {} steps", KEY_STEPS - 1));
            }
            _ => {}
        }
        let has_class = matches!(verb, Verb::Snapshot | Verb::Restore);
        if self.takes_over && verb != Verb::Restore {
            return Err("`takes_over` is only allowed with `restore`".into());
        }
        if !has_class && (!self.class.is_empty() || self.once) {
            return Err("`class` and `once` are only allowed with `snapshot` and `restore`".into());
        }
        let needed: usize = self.class.iter().map(Case::steps).sum();
        if needed > CLASS_STEPS {
            return Err(format!("`class` needs {needed} steps (at most {CLASS_STEPS})"));
        }
        if let Some(request_id) = &self.request_id {
            if verb != Verb::Snapshot {
                return Err("`request_id` is only allowed with `snapshot`".into());
            }
            let needed = request_id.steps();
            if needed > REQUEST_ID_STEPS {
                return Err(format!("`request_id` needs {needed} steps (at most {REQUEST_ID_STEPS})"));
            }
        }
        Ok(())
    }
}

/// Number of steps that compute the value of a path.
fn steps(path: &Path) -> usize {
    1 + path.hops.len()
}

impl Test {
    fn steps(&self) -> usize {
        steps(&self.path) + 1
    }
}

impl Case {
    /// Number of steps of the case, its first and its last one included.
    fn steps(&self) -> usize {
        2 + self.when.iter().map(Test::steps).sum::<usize>() + steps(&self.is)
    }
}

impl RequestId {
    /// Number of steps of the id, its last one included.
    fn steps(&self) -> usize {
        1 + self.when.iter().map(Test::steps).sum::<usize>() + steps(&self.is)
    }
}

impl Hook {
    /// Whether a version has the hook. If the version is unknown, only hooks of all versions apply.
    pub(crate) fn is_in(&self, version: Option<&str>) -> bool {
        let number =
            |version: &str| -> Vec<u32> { version.split('.').map_while(|part| part.parse().ok()).collect() };
        match version.map(number) {
            None => self.since.is_none() && self.until.is_none(),
            Some(version) => {
                self.since.as_deref().is_none_or(|since| version >= number(since))
                    && self.until.as_deref().is_none_or(|until| version < number(until))
            }
        }
    }

    /// Numbers of the registers that the hook reads.
    pub(crate) fn registers(&self) -> Vec<u64> {
        let classes = self.class.iter().map(|case| (&case.when, &case.is));
        let request_id = self.request_id.iter().map(|id| (&id.when, &id.is));
        let guarded =
            classes.chain(request_id).flat_map(|(when, is)| when.iter().map(|test| &test.path).chain([is]));
        let own = self.when.iter().map(|test| &test.path).chain(&self.key);
        own.chain(guarded).map(|path| path.register).collect()
    }

    /// Whether the hook determines the kind of a task that was enqueued earlier.
    pub(crate) fn tells_later(&self) -> bool {
        self.verb == Verb::Restore && self.class.iter().any(|case| case.named != Naming::SameWork)
    }

    /// Display name of the function.
    pub(crate) fn place(&self) -> String {
        match &self.site {
            Site::Named(names) | Site::BehindJump(names) => names.join(" or "),
            Site::InTable(table) => format!("a function in {}", table.symbol),
        }
    }

    /// Display text of the versions that have the hook; empty if all have it.
    pub(crate) fn versions(&self) -> String {
        match (&self.since, &self.until) {
            (Some(since), Some(until)) => format!(" (from {since}, before {until})"),
            (Some(since), None) => format!(" (from {since})"),
            (None, Some(until)) => format!(" (before {until})"),
            (None, None) => String::new(),
        }
    }

    /// Name of the verb, as in profiles.
    pub(crate) const fn verb_name(&self) -> &'static str {
        match self.verb {
            Verb::Snapshot => "snapshot",
            Verb::Restore => "restore",
            Verb::Leave => "leave",
            Verb::Forget => "forget",
            Verb::Clear => "clear",
            Verb::Detach => "detach",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(more: &str) -> Result<Hook, String> {
        toml::from_str(&format!("verb = 'restore'\nkey = 'arg0'\n{more}")).map_err(|error| error.to_string())
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let hook = hook("function = 'f'\nsince = '3.9'\nuntil = '3.13'").unwrap();
        for (version, expected) in [
            ("3.8.1", false),
            ("3.9", true),
            ("3.11.2", true),
            ("3.12.9rc", true),
            ("3.13.0", false),
            ("4", false),
        ] {
            assert_eq!(hook.is_in(Some(version)), expected, "{version}");
        }
        assert!(!hook.is_in(None));
    }

    #[test]
    fn invalid_hooks_are_refused() {
        assert!(hook("function = ['f', 'g']\nthrough = 'jump'").is_ok());
        assert!(hook("table = { symbol = 't', path = [48] }").is_ok());
        assert!(hook("table = { symbol = 't', path = [] }").is_err());
        assert!(hook("").is_err());
        assert!(hook("function = 'f'\nthrough = 'call'").is_err());
        let long = "{ when = ['arg0->0->0->0->0->0->0->0 == 1'], is = 'arg0->0->0->0->0', named = 'string' }";
        assert!(hook(&format!("function = 'f'\nclass = [{long}, {long}]")).is_ok());
        assert!(hook("function = 'f'\nwhen = ['arg0 == 1']").is_ok());
        assert!(hook("function = 'f'\nwhen = ['arg0+8->0->0->0->0->0->0->0->0 == 1']").is_err());
        let error = hook(&format!("function = 'f'\nclass = [{long}, {long}, {long}, {long}]")).unwrap_err();
        assert!(error.contains("steps"), "{error}");
        let snapshot = |more: &str| {
            toml::from_str::<Hook>(&format!("verb = 'snapshot'\nfunction = 'f'\nkey = 'arg0'\n{more}"))
        };
        let long = "'arg0->0->0->0->0->0->0->0 == 1'";
        assert!(snapshot("request_id = { is = 'arg0->8+24' }").is_ok());
        assert!(snapshot(&format!("request_id = {{ when = [{long}, {long}], is = 'arg0->8' }}")).is_ok());
        assert!(
            snapshot(&format!("request_id = {{ when = [{long}, {long}, {long}], is = 'arg0' }}")).is_err()
        );
        assert!(hook("function = 'f'\nrequest_id = { is = 'arg0->8' }").is_err());
    }
}
