//! A place in a runtime and what it means: one `[[hook]]` of a profile.

use observer_common::deferred::{CLASS_STEPS, KEY_STEPS, REQUEST_ID_STEPS, Verb};
use serde::Deserialize;

use super::expression::{Path, Test};
use crate::stacks::naming::Naming;

/// A place and its meaning, checked.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Written")]
pub(crate) struct Hook {
    /// What it means to come there.
    pub(crate) verb: Verb,
    /// Where it is.
    pub(crate) site: Site,
    /// How the name of the module begins that it is in; `None` for the one with the marker.
    pub(crate) module: Option<String>,
    /// Whether there may be no such function.
    pub(crate) optional: bool,
    /// Functions whose presence makes it needless.
    pub(crate) unless: Vec<String>,
    /// Where in the function.
    pub(crate) at: At,
    /// What must hold there; else it means nothing.
    pub(crate) when: Vec<Test>,
    /// What the work is known by; `None` where that is whatever the thread works on.
    pub(crate) key: Option<Path>,
    /// How its kind is told, by the first case that fits; none if it is not.
    pub(crate) class: Vec<Case>,
    /// What the runtime itself calls the request that a piece of work is due to.
    pub(crate) request_id: Option<Told>,
    /// First version that has it.
    pub(crate) since: Option<String>,
    /// First version that no longer has it.
    pub(crate) until: Option<String>,
    /// Keys of different spaces never meet.
    pub(crate) space: String,
    /// Whether the work ends where its thread turns to something else.
    pub(crate) once: bool,
    /// Whether work of unknown origin goes on here for what its thread has just read.
    pub(crate) takes_over: bool,
}

/// A function.
#[derive(Clone, Debug)]
pub(crate) enum Site {
    /// By its name: the first of these that is defined. One with a `*` in it stands for all that are like it.
    Named(Vec<String>),
    /// The one that a function of this name jumps to.
    BehindJump(Vec<String>),
    /// The one that a pointer in the process's memory leads to.
    InTable(Table),
}

/// A pointer to a function in the process's memory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Table {
    /// Symbol of a structure.
    pub(crate) symbol: String,
    /// Offsets in bytes: the words there are pointers, each to the next, the last to the function.
    pub(crate) path: Vec<u64>,
}

/// Where in a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum At {
    /// Where it begins.
    #[default]
    Entry,
    /// Wherever it returns.
    Return,
}

/// A way to tell the kind of work.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    /// What must hold.
    #[serde(default)]
    pub(crate) when: Vec<Test>,
    /// What then stands for the kind.
    pub(crate) is: Path,
    /// How to make a name of it.
    pub(crate) named: Naming,
}

/// A C string that is told if conditions hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Told {
    /// What must hold.
    #[serde(default)]
    pub(crate) when: Vec<Test>,
    /// Its address.
    pub(crate) is: Path,
}

/// A hook as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    verb: WrittenVerb,
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
    request_id: Option<Told>,
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
enum WrittenVerb {
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

/// One name, or several of which the first that is there counts. A `*` in them stands for anything.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Names {
    /// Just one.
    One(String),
    /// In order.
    Several(Vec<String>),
}

impl Names {
    /// All of them.
    pub(crate) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }
}

impl TryFrom<Written> for Hook {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let names = written.function.map(|names| names.as_slice().to_vec());
        let site = match (names, written.table, written.through) {
            (Some(names), None, None) => Site::Named(names),
            (Some(names), None, Some(Through::Jump)) => Site::BehindJump(names),
            (None, Some(table), None) if !table.path.is_empty() => Site::InTable(table),
            (None, Some(_), None) => return Err("the path of a table has no offset".into()),
            _ => return Err("a hook has either a `function`, perhaps `through` a jump, or a `table`".into()),
        };
        let verb = match written.verb {
            WrittenVerb::Snapshot => Verb::Snapshot,
            WrittenVerb::Restore => Verb::Restore,
            WrittenVerb::Leave => Verb::Leave,
            WrittenVerb::Forget => Verb::Forget,
            WrittenVerb::Clear => Verb::Clear,
            WrittenVerb::Detach => Verb::Detach,
        };
        match (verb, &written.key) {
            (Verb::Snapshot | Verb::Restore, None) => return Err("this verb takes a `key`".into()),
            (Verb::Clear | Verb::Detach, Some(_)) => return Err("this verb takes no `key`".into()),
            (_, None) if !written.when.is_empty() => return Err("a condition takes a `key`".into()),
            // The answer is a step as well.
            (_, Some(key))
                if steps(key) + written.when.iter().map(Test::steps).sum::<usize>() + 1 > KEY_STEPS =>
            {
                return Err(format!("key and conditions take more than {} steps", KEY_STEPS - 1));
            }
            _ => {}
        }
        let tells = matches!(verb, Verb::Snapshot | Verb::Restore);
        if written.takes_over && verb != Verb::Restore {
            return Err("only `restore` has `takes_over`".into());
        }
        if !tells && (!written.class.is_empty() || written.once) {
            return Err("only `snapshot` and `restore` have a `class` or are `once`".into());
        }
        let needed: usize = written.class.iter().map(Case::steps).sum();
        if needed > CLASS_STEPS {
            return Err(format!("the class takes {needed} steps, and {CLASS_STEPS} are the most"));
        }
        if let Some(told) = &written.request_id {
            if verb != Verb::Snapshot {
                return Err("only `snapshot` has a `request_id`".into());
            }
            let needed = told.steps();
            if needed > REQUEST_ID_STEPS {
                return Err(format!(
                    "the request id takes {needed} steps, and {REQUEST_ID_STEPS} are the most"
                ));
            }
        }
        Ok(Self {
            verb,
            site,
            module: written.module,
            optional: written.optional,
            unless: written.unless,
            at: written.at,
            when: written.when,
            key: written.key,
            class: written.class,
            request_id: written.request_id,
            since: written.since,
            until: written.until,
            space: written.space,
            once: written.once,
            takes_over: written.takes_over,
        })
    }
}

/// How many steps the programs take to a value.
fn steps(path: &Path) -> usize {
    1 + path.hops.len()
}

impl Test {
    fn steps(&self) -> usize {
        steps(&self.path) + 1
    }
}

impl Case {
    /// How many steps the programs need for it, its beginning and the answer included.
    fn steps(&self) -> usize {
        2 + self.when.iter().map(Test::steps).sum::<usize>() + steps(&self.is)
    }
}

impl Told {
    /// The same of this, which is one case.
    fn steps(&self) -> usize {
        1 + self.when.iter().map(Test::steps).sum::<usize>() + steps(&self.is)
    }
}

impl Hook {
    /// Whether a version has it. Without a version only what all have is had.
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

    /// Numbers of the registers that it begins at.
    pub(crate) fn registers(&self) -> Vec<u64> {
        let classes = self.class.iter().map(|case| (&case.when, &case.is));
        let told = self.request_id.iter().map(|told| (&told.when, &told.is));
        let guarded =
            classes.chain(told).flat_map(|(when, is)| when.iter().map(|test| &test.path).chain([is]));
        let own = self.when.iter().map(|test| &test.path).chain(&self.key);
        own.chain(guarded).map(|path| path.register).collect()
    }

    /// Whether it tells the kind of work that has been put off before.
    pub(crate) fn tells_later(&self) -> bool {
        self.verb == Verb::Restore && self.class.iter().any(|case| case.named != Naming::SameWork)
    }

    /// What people call the place.
    pub(crate) fn place(&self) -> String {
        match &self.site {
            Site::Named(names) | Site::BehindJump(names) => names.join(" or "),
            Site::InTable(table) => format!("a function in {}", table.symbol),
        }
    }

    /// Which versions have it, for people; empty if all have.
    pub(crate) fn versions(&self) -> String {
        match (&self.since, &self.until) {
            (Some(since), Some(until)) => format!(" (from {since}, before {until})"),
            (Some(since), None) => format!(" (from {since})"),
            (None, Some(until)) => format!(" (before {until})"),
            (None, None) => String::new(),
        }
    }

    /// What it means, in a word.
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
    fn versions_are_numbers() {
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
    fn what_makes_no_sense_is_refused() {
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
