//! The configuration file of `--config`: process selectors and settings. The settings are the command-line arguments under
//! [`HEADING`]; the command line takes precedence. Errors state line and column.

use std::{collections::BTreeMap, fmt, fs, num::NonZero};

use clap::{Arg, Command, CommandFactory as _};
use glob::Pattern;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, Visitor},
};
use toml::Value;

use crate::{
    cli::{Cli, CommandLine, Observe},
    failure::{Failure, parse_toml},
    process::criteria::Criteria,
    setting::HEADING,
};

/// Names of the setting for observing children, in the file and on the command line, which can only turn it off.
const FOLLOW: (&str, &str) = ("follow", "no_follow");

/// Contents of a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Config {
    /// Selectors of processes to observe, in addition to those of the command line.
    pub(crate) include: Selectors,
    /// Selectors of processes not to observe.
    pub(crate) exclude: Selectors,
    /// Settings by name, each as the equivalent command-line arguments.
    settings: BTreeMap<String, Vec<String>>,
}

/// A table of process selectors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Selectors {
    all: bool,
    comm: Vec<String>,
    #[serde(deserialize_with = "patterns")]
    exe: Vec<Pattern>,
    port: Vec<NonZero<u16>>,
    cgroup: Vec<String>,
}

impl Selectors {
    /// Adds these selectors to `criteria`.
    pub(crate) fn and(&self, mut criteria: Criteria) -> Criteria {
        criteria.all |= self.all;
        criteria.names.extend_from_slice(&self.comm);
        criteria.executables.extend_from_slice(&self.exe);
        criteria.ports.extend(self.port.iter().copied().map(NonZero::get));
        criteria.cgroups.extend_from_slice(&self.cgroup);
        criteria
    }
}

fn patterns<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Pattern>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let patterns = texts.iter().map(|text| Pattern::new(text).map_err(|error| format!("{text}: {error}")));
    patterns.collect::<Result<_, _>>().map_err(D::Error::custom)
}

impl Config {
    /// Reads the file that the command line names; empty without one. An error states file, line and column.
    pub(crate) fn of(observe: &Observe) -> Result<Self, Failure> {
        let Some(file) = &observe.which.config else { return Ok(Self::default()) };
        let failed = |what: String| Failure::new(what, "see docs/configuration.md for what it may contain");
        let text = fs::read_to_string(file)
            .map_err(|error| failed(format!("cannot read {}: {error}", file.display())))?;
        parse_toml(&text).map_err(|why| failed(format!("{}:{why}", file.display())))
    }

    /// The arguments of the command line, with those settings of the file that the command line does not override.
    pub(crate) fn complete(&self, line: &CommandLine) -> Observe {
        let command = Cli::command();
        let given: Vec<_> = command.get_arguments().filter(|arg| line.has(arg.get_id().as_str())).collect();
        // Neither the setting nor an argument that conflicts with it is on the command line.
        let is_free = |name: &str| {
            let name = if name == FOLLOW.0 { FOLLOW.1 } else { name };
            !given.iter().any(|arg| {
                let mut excluded = command.get_arg_conflicts_with(arg).into_iter();
                arg.get_id() == name || excluded.any(|other| other.get_id() == name)
            })
        };
        let words = self.settings.iter().filter(|(name, _)| is_free(name)).flat_map(|(_, words)| words);
        line.with(words.cloned())
    }

    /// Names of the settings that differ from those of another file. They need a restart: a reload applies only
    /// selectors.
    pub(crate) fn settings_changed_from<'s>(&'s self, other: &'s Self) -> Vec<&'s str> {
        let names = self
            .settings
            .keys()
            .chain(other.settings.keys().filter(|&name| !self.settings.contains_key(name)));
        names
            .filter(|&name| self.settings.get(name) != other.settings.get(name))
            .map(String::as_str)
            .collect()
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(ConfigVisitor(Cli::command()))
    }
}

/// Deserializes a file. The command declares which settings it may have.
struct ConfigVisitor(Command);

impl<'de> Visitor<'de> for ConfigVisitor {
    type Value = Config;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("settings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Config, A::Error> {
        let mut config = Config::default();
        while let Some(name) = map.next_key_seed(Name(&self.0))? {
            match name.as_str() {
                "include" => config.include = map.next_value()?,
                "exclude" => config.exclude = map.next_value()?,
                _ => {
                    let words = map.next_value_seed(Setting { command: &self.0, name: &name })?;
                    config.settings.insert(name, words);
                }
            }
        }
        Ok(config)
    }
}

/// The command-line arguments that may be set in a file.
fn settings(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| arg.get_help_heading() == Some(HEADING))
}

/// Deserializes the name of a field; rejects unknown ones.
struct Name<'c>(&'c Command);

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<String, D::Error> {
        let name = String::deserialize(from)?;
        let mut known = vec!["include", "exclude", FOLLOW.0];
        known.extend(settings(self.0).map(|arg| arg.get_id().as_str()));
        if known.contains(&name.as_str()) {
            return Ok(name);
        }
        Err(D::Error::custom(format!("unknown field `{name}` (known: {})", known.join(", "))))
    }
}

/// Deserializes the value of a setting into the equivalent command-line arguments.
struct Setting<'c> {
    command: &'c Command,
    name: &'c str,
}

impl<'de> DeserializeSeed<'de> for Setting<'_> {
    type Value = Vec<String>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Vec<String>, D::Error> {
        if self.name == FOLLOW.0 {
            return Ok(if bool::deserialize(from)? { Vec::new() } else { vec!["--no-follow".into()] });
        }
        let value = Value::deserialize(from)?;
        let arg = settings(self.command).find(|arg| arg.get_id() == self.name);
        let flag = arg.and_then(Arg::get_long).ok_or_else(|| D::Error::custom("no such setting"))?;
        let values = match value {
            Value::Array(values) => values,
            value => vec![value],
        };
        let words = values.into_iter().map(|value| match value {
            Value::String(text) => Ok(format!("--{flag}={text}")),
            Value::Integer(number) => Ok(format!("--{flag}={number}")),
            other => Err(D::Error::custom(format!("{} does not take a {}", self.name, other.type_str()))),
        });
        let words: Vec<String> = words.collect::<Result<_, _>>()?;
        // Validated as a complete command line, which needs at least one selector.
        let line = ["observer".to_owned(), "--all".to_owned()].into_iter().chain(words.iter().cloned());
        self.command.clone().try_get_matches_from(line).map_err(|error| D::Error::custom(reason(&error)))?;
        Ok(words)
    }
}

/// The message of a command-line error, on one line.
fn reason(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
    lines.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page that users copy from is the test's input.
    const PAGE: &str = include_str!("../../docs/configuration.md");

    fn example() -> &'static str {
        PAGE.split("```toml\n").nth(1).unwrap().split("```").next().unwrap()
    }

    #[test]
    fn the_documented_example_has_every_setting() {
        let config: Config = parse_toml(example()).unwrap();
        let table: toml::Table = example().parse().unwrap();
        let names = |table: &toml::Table| table.keys().cloned().collect::<Vec<_>>();
        let command = Cli::command();
        let mut all: Vec<_> = settings(&command).map(|arg| arg.get_id().as_str()).collect();
        all.extend(["include", "exclude", FOLLOW.0]);
        all.sort_unstable();
        assert!(all.len() > 10, "{all:?}");
        assert_eq!(names(&table), all);
        assert_eq!(names(table["include"].as_table().unwrap()), ["all", "cgroup", "comm", "exe", "port"]);
        assert_eq!(config.include.port, [NonZero::new(8080).unwrap()]);
        assert_eq!(config.settings["stall_threshold"], ["--stall-threshold=50ms"]);
        assert_eq!(parse_toml::<Config>("").unwrap(), Config::default());
    }

    #[test]
    fn errors_state_line_and_column() {
        for (text, place, why) in [
            ("[include]\ncom = [\"nginx\"]\n", "2:1: ", "unknown field `com`"),
            ("[include]\nport = [80, 70000]\n", "2:13: ", ""),
            ("[exclude]\nport = [80, 0]\n", "2:13: ", "integer `0`"),
            ("attach_per_second = 0\n", "1:21: ", "--attach-per-second"),
            ("follow = true\nprofiles = [\"auto\", \"perl\"]\n", "2:12: ", "unknown profile perl"),
            ("otlp_endpoint = \"localhost:4318\"\n", "1:17: ", "is not the URL of a collector"),
            ("follow = maybe\n", "1:10: ", ""),
            ("\nstall_threshold = \"10us\"\n", "2:19: ", "at least 1ms"),
            ("\nstall_threshold = 1.5\n", "2:19: ", "float"),
            ("[exclude]\nexe = [\"[a\"]\n", "2:7: ", "[a: "),
            ("reactor_calls = [\"kqueue\"]\n", "1:17: ", "possible values: epoll, io_uring, poll, select"),
            ("listen = \"localhost\"\n", "1:10: ", "localhost"),
            ("capacity = -1\n", "1:12: ", "16 to 65536"),
            ("resolution = 3\n", "1:14: ", "1, 2, 4 or 8"),
            ("all = true\n", "1:1: ", "unknown field `all`"),
        ] {
            let error = parse_toml::<Config>(text).unwrap_err();
            assert!(
                error.starts_with(place) && error.contains(why) && !error.contains('\n'),
                "{error} for {text}"
            );
        }
    }

    #[test]
    fn the_command_line_comes_first() {
        let config: Config = parse_toml(example()).unwrap();
        let complete = |words: &[&str]| {
            let words = ["observer", "--all"].iter().chain(words).map(Into::into);
            config.complete(&CommandLine::parse(words).unwrap().0)
        };
        let all_of_file = complete(&[]);
        assert_eq!(all_of_file.kill_switch.unwrap().to_str(), Some("/run/observer.off"));
        assert_eq!(all_of_file.output.otlp.endpoint.as_deref(), Some("http://localhost:4318"));
        let given = complete(&["--otlp-endpoint", "http://b:1", "--stall-threshold", "5ms", "--no-listen"]);
        assert_eq!(given.output.otlp.endpoint.as_deref(), Some("http://b:1"));
        assert_eq!(given.stall_threshold.as_millis(), 5);
        assert!(given.output.no_listen);
        let children: Config = parse_toml("follow = false\n").unwrap();
        let line = CommandLine::parse(["observer", "--all"].map(Into::into).into_iter()).unwrap().0;
        assert!(children.complete(&line).no_follow);
    }

    #[test]
    fn settings_that_have_changed_are_named() {
        let config = |text: &str| parse_toml::<Config>(text).unwrap();
        let before = config("follow = true\n[include]\nall = true\n");
        let (selection, children) =
            (config("follow = true\n[exclude]\ncomm = [\"sshd\"]\n"), config("follow = false\n"));
        assert_eq!(selection.settings_changed_from(&before), [""; 0]);
        assert_eq!(children.settings_changed_from(&before), ["follow"]);
        assert_eq!(config("").settings_changed_from(&config("capacity = 16\n")), ["capacity"]);
    }
}
