//! The file of `--config`: whom to observe and whom not to, and the settings of a service. What the command line says comes
//! before it. Errors have line and column.

use std::{fs, net::SocketAddr, num::NonZero, path::PathBuf, str::FromStr, time::Duration};

use clap::ValueEnum;
use glob::Pattern;
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::export::otlp::settings::Protocol;
use crate::{
    cli::{self, Observe},
    export::otlp::settings::uri,
    failure::{Failure, understand},
    model::histogram::Resolution,
    process::criteria::Criteria,
    process::wait_call::WaitCall,
    profiles,
    read::capacity::Capacity,
};

/// Everything that the file may say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Whom to observe, besides those that the command line names.
    pub(crate) include: Selectors,
    /// Whom not to observe.
    pub(crate) exclude: Selectors,
    follow: Option<bool>,
    #[serde(deserialize_with = "values")]
    reactor_calls: Option<Vec<WaitCall>>,
    #[serde(deserialize_with = "stall_threshold")]
    stall_threshold: Option<Duration>,
    #[serde(deserialize_with = "number")]
    capacity: Option<Capacity>,
    #[serde(deserialize_with = "known_profiles")]
    profiles: Option<Vec<String>>,
    #[serde(deserialize_with = "parsed")]
    listen: Option<SocketAddr>,
    #[serde(deserialize_with = "number")]
    resolution: Option<Resolution>,
    #[serde(deserialize_with = "endpoint")]
    otlp_endpoint: Option<String>,
    #[serde(deserialize_with = "value")]
    otlp_protocol: Option<Protocol>,
    kill_switch: Option<PathBuf>,
    attach_per_second: Option<NonZero<u32>>,
}

/// How processes are told from others.
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
    /// These and those.
    pub(crate) fn and(&self, mut criteria: Criteria) -> Criteria {
        criteria.all |= self.all;
        criteria.names.extend_from_slice(&self.comm);
        criteria.executables.extend_from_slice(&self.exe);
        criteria.ports.extend(self.port.iter().copied().map(NonZero::get));
        criteria.cgroups.extend_from_slice(&self.cgroup);
        criteria
    }
}

fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: ToString>>(from: D) -> Result<Option<T>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(|error: T::Err| D::Error::custom(error.to_string()))
}

fn number<'de, D: Deserializer<'de>, T: FromStr<Err: ToString>>(from: D) -> Result<Option<T>, D::Error> {
    let text = i64::deserialize(from)?.to_string();
    text.parse().map(Some).map_err(|error: T::Err| D::Error::custom(error.to_string()))
}

fn value<'de, D: Deserializer<'de>, T: ValueEnum>(from: D) -> Result<Option<T>, D::Error> {
    T::from_str(&String::deserialize(from)?, false).map(Some).map_err(D::Error::custom)
}

fn values<'de, D: Deserializer<'de>, T: ValueEnum>(from: D) -> Result<Option<Vec<T>>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    let values = names.iter().map(|name| T::from_str(name, false).map_err(|why| format!("{name}: {why}")));
    values.collect::<Result<_, _>>().map(Some).map_err(D::Error::custom)
}

fn stall_threshold<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    cli::stall_threshold(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

/// Names must be known; what is in a file, whoever reads it finds out.
fn known_profiles<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    for name in names.iter().filter(|name| !profiles::is_file(name)) {
        profiles::chosen(std::slice::from_ref(name)).map_err(|failure| D::Error::custom(failure.what))?;
    }
    Ok(Some(names))
}

fn endpoint<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let url = String::deserialize(from)?;
    uri(&url, "otlp_endpoint").map_err(|failure| D::Error::custom(failure.what))?;
    Ok(Some(url))
}

fn patterns<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Pattern>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let patterns = texts.iter().map(|text| Pattern::new(text).map_err(|error| format!("{text}: {error}")));
    patterns.collect::<Result<_, _>>().map_err(D::Error::custom)
}

impl Config {
    /// Reads the file that the command line names; without one, nothing is said.
    pub(crate) fn of(observe: &Observe) -> Result<Self, Failure> {
        let Some(file) = &observe.which.config else { return Ok(Self::default()) };
        let failed = |what: String| Failure::new(what, "docs/configuration.md tells what may be in it");
        let text = fs::read_to_string(file)
            .map_err(|error| failed(format!("cannot read {}: {error}", file.display())))?;
        understand(&text).map_err(|why| failed(format!("{}:{why}", file.display())))
    }

    /// Takes over each setting that the command line does not have; `is_given` tells whether it has one of that name.
    pub(crate) fn apply(&self, observe: &mut Observe, is_given: impl Fn(&str) -> bool) {
        fn take<T: Clone>(setting: &Option<T>, is_given: bool, into: &mut T) {
            if let Some(value) = setting.as_ref().filter(|_| !is_given) {
                *into = value.clone();
            }
        }
        let leave_children = self.follow.map(|follow| !follow);
        take(&leave_children, is_given("no_follow"), &mut observe.no_follow);
        take(&self.reactor_calls, is_given("reactor_calls"), &mut observe.reactor_calls);
        take(&self.stall_threshold, is_given("stall_threshold"), &mut observe.stall_threshold);
        take(&self.capacity, is_given("capacity"), &mut observe.capacity);
        take(&self.profiles, is_given("profiles"), &mut observe.known.profiles);
        take(&self.attach_per_second, is_given("attach_per_second"), &mut observe.attach_per_second);
        let output = &mut observe.output;
        take(&self.listen, is_given("listen") || is_given("no_listen"), &mut output.listen);
        take(&self.resolution, is_given("resolution"), &mut output.resolution);
        let endpoint = self.otlp_endpoint.clone().map(Some);
        take(&endpoint, is_given("otlp_endpoint"), &mut output.otlp.endpoint);
        take(&self.otlp_protocol.map(Some), is_given("otlp_protocol"), &mut output.otlp.protocol);
        let kill_switch = self.kill_switch.clone().map(Some);
        take(&kill_switch, is_given("kill_switch"), &mut observe.kill_switch);
    }

    /// Names of the settings that differ. They are taken at the start: the selection alone can change while observer runs.
    pub(crate) fn settings_changed_from(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            include: _,
            exclude: _,
            follow,
            reactor_calls,
            stall_threshold,
            capacity,
            profiles,
            listen,
            resolution,
            otlp_endpoint,
            otlp_protocol,
            kill_switch,
            attach_per_second,
        } = self;
        let settings = [
            ("follow", *follow == other.follow),
            ("reactor_calls", *reactor_calls == other.reactor_calls),
            ("stall_threshold", *stall_threshold == other.stall_threshold),
            ("capacity", *capacity == other.capacity),
            ("profiles", *profiles == other.profiles),
            ("listen", *listen == other.listen),
            ("resolution", *resolution == other.resolution),
            ("otlp_endpoint", *otlp_endpoint == other.otlp_endpoint),
            ("otlp_protocol", *otlp_protocol == other.otlp_protocol),
            ("kill_switch", *kill_switch == other.kill_switch),
            ("attach_per_second", *attach_per_second == other.attach_per_second),
        ];
        settings.into_iter().filter(|(_, is_same)| !is_same).map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page that people copy from is the test's input.
    const PAGE: &str = include_str!("../../docs/configuration.md");

    fn example() -> &'static str {
        PAGE.split("```toml\n").nth(1).unwrap().split("```").next().unwrap()
    }

    #[test]
    fn the_documented_example_says_everything() {
        let config: Config = understand(example()).unwrap();
        let table: toml::Table = example().parse().unwrap();
        let told = |table: &toml::Table| table.keys().cloned().collect::<Vec<_>>();
        let all = [
            "attach_per_second",
            "capacity",
            "exclude",
            "follow",
            "include",
            "kill_switch",
            "listen",
            "otlp_endpoint",
            "otlp_protocol",
            "profiles",
            "reactor_calls",
            "resolution",
            "stall_threshold",
        ];
        assert_eq!(told(&table), all);
        assert_eq!(told(table["include"].as_table().unwrap()), ["all", "cgroup", "comm", "exe", "port"]);
        assert_eq!(config.include.port, [NonZero::new(8080).unwrap()]);
        assert_eq!(config.stall_threshold, Some(Duration::from_millis(50)));
        assert_eq!(understand::<Config>("").unwrap(), Config::default());
    }

    #[test]
    fn what_is_wrong_has_a_line_and_a_column() {
        for (text, why) in [
            ("[include]\ncom = [\"nginx\"]\n", "2:1: unknown field `com`"),
            ("[include]\nport = [80, 70000]\n", "2:13: "),
            ("[exclude]\nport = [80, 0]\n", "2:13: invalid value: integer `0`, expected a nonzero u16"),
            ("attach_per_second = 0\n", "1:21: invalid value: integer `0`, expected a nonzero u32"),
            ("follow = true\nprofiles = [\"auto\", \"perl\"]\n", "2:12: there is no profile perl"),
            ("otlp_endpoint = \"localhost:4318\"\n", "1:17: \"localhost:4318\" is no address of a collector"),
            ("follow = maybe\n", "1:10: "),
            ("\nstall_threshold = \"10us\"\n", "2:19: at least 1ms"),
            ("[exclude]\nexe = [\"[a\"]\n", "2:7: [a: "),
            ("reactor_calls = [\"kqueue\"]\n", "1:17: kqueue: "),
            ("listen = \"localhost\"\n", "1:10: "),
            ("capacity = -1\n", "1:12: from "),
            ("resolution = 3\n", "1:14: 1, 2, 4 or 8"),
            ("all = true\n", "1:1: unknown field `all`"),
        ] {
            let error = understand::<Config>(text).unwrap_err();
            assert!(error.starts_with(why) && !error.contains('\n'), "{error} for {text}");
        }
    }

    #[test]
    fn settings_that_have_changed_are_named() {
        let config = |text: &str| understand::<Config>(text).unwrap();
        let before = config("follow = true\n[include]\nall = true\n");
        let changed = |text: &str| config(text).settings_changed_from(&before);
        assert_eq!(changed("follow = true\n[exclude]\ncomm = [\"sshd\"]\n"), [""; 0]);
        assert_eq!(changed("follow = false\n[include]\nall = true\n"), ["follow"]);
        // Whatever it is: none of those of the example is what it was.
        let all: toml::Table = example().parse().unwrap();
        let mut names = changed(&example().replace("follow = true", "follow = false"));
        names.sort_unstable();
        assert_eq!(
            names,
            all.keys().filter(|name| *name != "include" && *name != "exclude").collect::<Vec<_>>()
        );
    }
}
