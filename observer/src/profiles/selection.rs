//! Which profiles are in use: the built-in ones, files, and a library that the command line describes.

use std::{
    fs,
    path::Path,
    sync::{Arc, LazyLock},
};

use clap::Args;

use super::{
    generic::{self, OwnHook},
    profile::Profile,
};
use crate::{
    failure::{Failure, understand},
    setting::HEADING,
};

/// Names and contents of all files, as the build script finds them.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/profiles.rs"));

/// All profiles that are built in.
pub(crate) static PROFILES: LazyLock<Vec<Arc<Profile>>> = LazyLock::new(|| {
    let parsed =
        FILES.iter().map(|(name, text)| toml::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}")));
    parsed.map(Arc::new).collect()
});

/// How runtimes are recognised.
#[derive(Args, Debug)]
pub(crate) struct ProfileSelection {
    /// Recognise runtimes by these profiles: `auto` for all built-in ones, `none`, names, or files ending in .toml
    ///
    /// A profile says how a runtime is recognised, how its garbage collections can be watched, and which functions enqueue tasks; `observer
    /// profiles` lists the built-in ones. Other processes are not touched. With `auto`, the deferred tasks of a process are no longer
    /// followed after three seconds of more than 25,000 traps a second (about 5 % of a CPU). A profile that is named is followed at any
    /// cost.
    #[arg(
        long = "profile",
        value_name = "PROFILES",
        value_delimiter = ',',
        default_value = "auto",
        value_parser = known_profile,
        help_heading = HEADING
    )]
    pub(crate) profiles: Vec<String>,
    /// Function of your own library that enqueues a task
    ///
    /// LIBRARY is the beginning of the file name of the library or program. KEY identifies the task: an argument (arg0 to arg5) or a
    /// register, with pointers to follow from there, such as arg0->8. The origin of the task is the request that was being handled. A
    /// profile can say more, see --profile.
    #[arg(long, value_name = "LIBRARY:FUNCTION:KEY", requires = "restore")]
    pub(crate) snapshot: Option<OwnHook>,
    /// Function that runs a task; the task finishes at --forget or, without that, when its thread turns to something else
    #[arg(long, value_name = "LIBRARY:FUNCTION:KEY", requires = "snapshot")]
    pub(crate) restore: Option<OwnHook>,
    /// Function that frees a task
    #[arg(long, value_name = "LIBRARY:FUNCTION:KEY", requires = "snapshot")]
    pub(crate) forget: Option<OwnHook>,
}

/// The profiles that the command line asks for: `auto` for all that are built in, `none`, names, and files. Those of
/// files come first: they may describe better what is built in as well.
fn chosen(wanted: &[String]) -> Result<Vec<Arc<Profile>>, Failure> {
    let mut files = Vec::new();
    let mut named = Vec::new();
    for wanted in wanted {
        match wanted.as_str() {
            "auto" => named.extend(PROFILES.iter().cloned()),
            "none" => {}
            file if is_file(file) => {
                files.push(Arc::new(read(Path::new(file))?));
            }
            name => {
                let found = PROFILES.iter().find(|profile| profile.name.eq_ignore_ascii_case(name));
                named.push(Arc::clone(found.ok_or_else(|| {
                    Failure::new(
                        format!("there is no profile {name}"),
                        "`observer profiles` lists them; the name of a file ends in .toml",
                    )
                })?));
            }
        }
    }
    let built_in: Vec<_> =
        named.into_iter().filter(|profile| files.iter().all(|own| own.name != profile.name)).collect();
    files.extend(built_in);
    Ok(files)
}

/// What names a profile: what is in a file turns out when it is read.
fn known_profile(wanted: &str) -> Result<String, String> {
    if !is_file(wanted) {
        chosen(&[wanted.to_owned()]).map_err(|failure| format!("{}: {}", failure.what, failure.cure))?;
    }
    Ok(wanted.to_owned())
}

/// Whether a profile that is wanted is one of the user's own.
fn is_file(wanted: &str) -> bool {
    Path::new(wanted).extension().is_some_and(|extension| extension == "toml")
}

/// The profiles that a command line asks for, and a library of the user's own.
pub(crate) fn selected(known: &ProfileSelection) -> Result<Vec<Arc<Profile>>, Failure> {
    let mut chosen = chosen(&known.profiles)?;
    if let (Some(snapshot), Some(restore)) = (&known.snapshot, &known.restore) {
        chosen.push(Arc::new(Profile::of_own_library(snapshot, restore, known.forget.as_ref())));
    }
    Ok(chosen)
}

/// Whether those that are built in may fit or not.
pub(crate) fn are_automatic(known: &ProfileSelection) -> bool {
    known.profiles.iter().any(|profile| profile == "auto")
}

/// Whether somebody wants to hear that a profile fits nobody.
pub(crate) fn is_asked_for(profile: &Arc<Profile>, are_automatic: bool) -> bool {
    !are_automatic || !PROFILES.iter().any(|built_in| Arc::ptr_eq(built_in, profile))
}

/// What has a profile of this name followed at any cost.
pub(crate) fn insistence(name: &str) -> String {
    if name == generic::NAME {
        "`--profile none` beside the flags that describe it".into()
    } else if PROFILES.iter().any(|profile| profile.name == name) {
        format!("`--profile {name}`")
    } else {
        format!("`--profile` with the file of {name} alone")
    }
}

/// Reads a profile of the user's own.
fn read(file: &Path) -> Result<Profile, Failure> {
    let cure = "see docs/profiles.md for what a profile looks like";
    let told = |why: String| Failure::new(format!("the profile {}:{why}", file.display()), cure);
    let text = fs::read_to_string(file).map_err(|error| told(format!(" {error}")))?;
    understand(&text).map_err(told)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use observer_common::gc::PARTS;

    use super::*;
    use crate::profiles::{hook::Hook, profile::Collector};

    /// Forcing the list parses every file.
    #[test]
    fn every_file_is_understood() {
        assert!(FILES.iter().all(|(name, _)| name.ends_with(".toml")));
        let names: BTreeSet<_> = PROFILES.iter().map(|profile| profile.name.to_lowercase()).collect();
        assert_eq!(names.len(), FILES.len(), "a name tells one profile from all others");
        assert!(PROFILES.iter().all(|profile| profile.gc.is_some() || !profile.hooks.is_empty()));
    }

    /// Whole profiles are marked as TOML in the page that describes them.
    #[test]
    fn the_profiles_in_the_documentation_are_understood() {
        const PAGE: &str = include_str!("../../../docs/profiles.md");
        let blocks = PAGE.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
        let parsed =
            blocks.map(|text| toml::from_str::<Profile>(text).unwrap_or_else(|e| panic!("{text}: {e}")));
        let hooks: Vec<_> = parsed.flat_map(|profile| profile.hooks).collect();
        let verbs: BTreeSet<_> = hooks.iter().map(Hook::verb_name).collect();
        assert!(verbs.len() >= 5 && hooks.len() >= 10, "{verbs:?}");
    }

    /// What is built in has a chapter.
    #[test]
    fn the_documentation_tells_of_every_profile_and_verb() {
        const PAGE: &str = include_str!("../../../docs/profiles.md");
        for profile in PROFILES.iter() {
            let has_chapter =
                PAGE.lines().any(|line| line.starts_with("### ") && line.contains(&profile.name));
            assert!(has_chapter, "{}", profile.name);
        }
        for verb in ["snapshot", "restore", "leave", "forget", "clear", "detach"] {
            assert!(PAGE.contains(&format!("| `{verb}` |")), "{verb}");
        }
    }

    #[test]
    fn totals_are_known_by_the_beginning_of_the_version() {
        let totals = PROFILES.iter().find_map(|profile| match &profile.gc {
            Some(Collector::Totals(totals)) => Some(totals),
            _ => None,
        });
        let totals = totals.unwrap();
        assert_eq!(totals.nanoseconds_of("3.1.2"), Some(&[0x20][..]));
        assert_eq!(totals.nanoseconds_of("3.10.0"), None);
        assert_eq!(totals.nanoseconds_of("3"), None);
        assert!(totals.nanoseconds.values().all(|parts| (1..=PARTS).contains(&parts.len())));
    }

    #[test]
    fn a_malformed_profile_is_told_by_its_fault() {
        let fault = |text: &str| toml::from_str::<Profile>(text).unwrap_err().to_string();
        let head = "name = 'X'\nabout = 'a test'\nmarker = 'x'\n";
        assert!(toml::from_str::<Profile>(head).is_ok());
        assert!(fault(&format!("{head}[gc.usdt]\nprovider = 'x'\nstart = 'a'\n")).contains("done"));
        assert!(fault(&format!("{head}[gc.kprobes]\nstart = 'a'\n")).contains("kprobes"));
        assert!(fault(&format!("{head}colour = 'red'\n")).contains("colour"));
        let key = fault(&format!("{head}[[hook]]\nverb = 'snapshot'\nfunction = 'f'\nkey = 'arg9'\n"));
        assert!(key.contains("line 7") && key.contains("arg9"), "{key}");
        let both = format!(
            "{head}[[hook]]\nverb = 'clear'\nfunction = 'f'\ntable = {{ symbol = 't', path = [8] }}\n"
        );
        assert!(fault(&both).contains("either"), "{}", fault(&both));
        let no_key = fault(&format!("{head}[[hook]]\nverb = 'restore'\nfunction = 'f'\n"));
        assert!(no_key.contains("key"), "{no_key}");
    }

    /// What is advised is understood, and asks for nothing but what is named.
    #[test]
    fn what_has_a_profile_followed_at_any_cost_can_be_asked_for() {
        let hook: OwnHook = "libtask.so:task_enqueue:arg0".parse().unwrap();
        let own = Profile::of_own_library(&hook, &hook, None);
        assert_eq!(insistence(&own.name), "`--profile none` beside the flags that describe it");
        for profile in PROFILES.iter() {
            let advice = insistence(&profile.name);
            let wanted = advice.strip_prefix("`--profile ").and_then(|rest| rest.strip_suffix('`')).unwrap();
            assert!(Arc::ptr_eq(&chosen(&[wanted.to_owned()]).unwrap()[0], profile));
        }
        assert_eq!(insistence("libtask"), "`--profile` with the file of libtask alone");
    }

    #[test]
    fn profiles_are_chosen_by_name_and_by_file() {
        let names = |wanted: &[&str]| {
            let wanted: Vec<_> = wanted.iter().map(|&name| name.to_owned()).collect();
            chosen(&wanted).map(|profiles| profiles.len())
        };
        assert_eq!(names(&["auto"]).unwrap(), PROFILES.len());
        assert_eq!(names(&["none"]).unwrap(), 0);
        assert_eq!(names(&["Ruby", "node"]).map_err(|e| e.to_string()).unwrap_or(0), 2);
        assert!(names(&["cobol"]).is_err());
        assert!(names(&["generic"]).is_err());
        assert!(names(&["/no/such/profile.toml"]).is_err());
    }
}
