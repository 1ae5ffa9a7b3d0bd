//! The settings for pushing, from flags and OpenTelemetry's environment variables. Flags take precedence over variables, and the
//! variables of one signal over those of both.

use std::{env, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, ValueEnum};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;

use super::signal::Signal;
use crate::{failure::Failure, setting::HEADING};

/// Default timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Default interval between two pushes of metrics.
const INTERVAL: Duration = Duration::from_secs(60);

/// Default interval between two pushes of traces.
const DELAY: Duration = Duration::from_secs(1);

/// The usual port of collectors for gRPC.
const GRPC_PORT: u16 = 4317;

/// Arguments about pushing.
#[derive(Args, Clone, Debug)]
pub(crate) struct OtlpArguments {
    /// Push metrics and traces to the OpenTelemetry collector at this address, such as http://localhost:4318
    ///
    /// The variables OTEL_EXPORTER_OTLP_* have more settings: see "Pushing" below.
    #[arg(id = "otlp_endpoint", long = "otlp-endpoint", value_name = "URL", value_parser = collector_url, help_heading = HEADING)]
    pub(crate) endpoint: Option<String>,
    /// Protocol of the collector; default: OTEL_EXPORTER_OTLP_PROTOCOL, or http/protobuf
    #[arg(id = "otlp_protocol", long = "otlp-protocol", value_enum, value_name = "PROTOCOL", help_heading = HEADING)]
    pub(crate) protocol: Option<Protocol>,
}

/// Protocol of an OpenTelemetry collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// gRPC, usually on port 4317
    Grpc,
    /// HTTP with protobuf messages, usually on port 4318; paths such as /v1/metrics are appended to the URL
    #[value(name = "http/protobuf")]
    HttpProtobuf,
}

/// Names and values, as in the variables for headers and resource attributes.
pub(super) type Pairs = Vec<(String, String)>;

/// All settings for pushing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    /// The endpoint for metrics; `None` if metrics are not pushed.
    pub(super) metrics: Option<Endpoint>,
    /// Time between two pushes of metrics.
    pub(super) interval: Duration,
    /// The endpoint for traces; `None` if traces are not pushed.
    pub(super) traces: Option<Endpoint>,
    /// Time between two pushes of traces.
    pub(super) delay: Duration,
    /// Attributes of all resources.
    pub(super) attributes: Pairs,
    /// Service name of observer itself.
    pub(super) service_name: Option<String>,
}

/// The endpoint of one signal.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Endpoint {
    /// The path is ignored for gRPC.
    pub(super) uri: Uri,
    pub(super) protocol: Protocol,
    /// Sent with each request. Their values may be secret.
    pub(super) headers: HeaderMap,
    /// Limit of one attempt.
    pub(super) timeout: Duration,
    /// Whether requests are compressed.
    pub(super) gzip: bool,
    /// File of certificate authorities to trust instead of the system's.
    pub(super) certificate: Option<PathBuf>,
    /// Client certificate and key.
    pub(super) client: Option<(PathBuf, PathBuf)>,
    /// A likely mistake in these settings, appended to the message about a failure.
    pub(super) hint: &'static str,
}

/// Looks up an environment variable.
pub(crate) type Lookup<'l> = &'l dyn Fn(&str) -> Option<String>;

impl Settings {
    /// The settings from flags and this process's environment; `None` if nothing is pushed.
    pub(crate) fn find(arguments: &OtlpArguments) -> Result<Option<Self>, Failure> {
        Self::from(arguments, &|name| env::var(name).ok())
    }

    fn from(arguments: &OtlpArguments, lookup: Lookup<'_>) -> Result<Option<Self>, Failure> {
        // An empty variable counts as not set.
        let lookup: Lookup<'_> =
            &|name| Some(lookup(name)?.trim().to_owned()).filter(|value| !value.is_empty());
        let is_off = arguments.endpoint.is_none()
            && lookup("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        if is_off {
            return Ok(None);
        }
        let metrics = Endpoint::of(Signal::Metrics, arguments, lookup)?;
        let traces = Endpoint::of(Signal::Traces, arguments, lookup)?;
        if metrics.is_none() && traces.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            metrics,
            interval: milliseconds("OTEL_METRIC_EXPORT_INTERVAL", lookup)?.unwrap_or(INTERVAL),
            traces,
            delay: milliseconds("OTEL_BSP_SCHEDULE_DELAY", lookup)?.unwrap_or(DELAY),
            attributes: lookup("OTEL_RESOURCE_ATTRIBUTES").map_or_else(Vec::new, |text| pairs(&text)),
            service_name: lookup("OTEL_SERVICE_NAME"),
        }))
    }
}

impl Endpoint {
    /// The endpoint of a signal; `None` if none is configured, or if the signal is switched off.
    fn of(signal: Signal, arguments: &OtlpArguments, lookup: Lookup<'_>) -> Result<Option<Self>, Failure> {
        let prefix = signal.name().to_uppercase();
        let exporter = lookup(&format!("OTEL_{prefix}_EXPORTER"));
        if exporter.is_some_and(|exporter| exporter != "otlp") {
            return Ok(None);
        }
        let own = |name: &str| format!("OTEL_EXPORTER_OTLP_{prefix}_{name}");
        let find = |name: &str| -> Option<(String, String)> {
            [own(name), format!("OTEL_EXPORTER_OTLP_{name}")]
                .into_iter()
                .find_map(|variable| Some((lookup(&variable)?, variable)))
        };
        let given = arguments.endpoint.clone().map(|url| (url, "--otlp-endpoint".to_owned()));
        let Some((url, origin)) = given.or_else(|| find("ENDPOINT")) else { return Ok(None) };
        let protocol = match (arguments.protocol, find("PROTOCOL")) {
            (Some(protocol), _) => Some(protocol),
            (None, Some((name, variable))) => Some(protocol_of(&name, &variable)?),
            (None, None) => None,
        };
        let uri = uri(&url, &origin)?;
        let is_unlikely = protocol.is_none() && uri.port_u16() == Some(GRPC_PORT);
        let protocol = protocol.unwrap_or(Protocol::HttpProtobuf);
        // Only the endpoint variable of a single signal includes the path.
        let uri = if protocol == Protocol::Grpc || origin == own("ENDPOINT") {
            uri
        } else {
            below(&uri, signal.path())?
        };
        let file = |name: &str| find(name).map(|(path, _)| PathBuf::from(path));
        let client = match (file("CLIENT_CERTIFICATE"), file("CLIENT_KEY")) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                return Err(Failure::new(
                    "only one of OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY is set",
                    "set both or neither",
                ));
            }
        };
        let timeout = match find("TIMEOUT") {
            Some((_, variable)) => milliseconds(&variable, lookup)?,
            None => None,
        };
        Ok(Some(Self {
            uri,
            protocol,
            headers: find("HEADERS")
                .map_or_else(|| Ok(HeaderMap::new()), |(text, from)| headers(&text, &from))?,
            timeout: timeout.unwrap_or(TIMEOUT),
            gzip: find("COMPRESSION").map_or(Ok(false), |(name, variable)| is_gzip(&name, &variable))?,
            certificate: file("CERTIFICATE"),
            client,
            hint: if is_unlikely { "; 4317 is the usual port of gRPC: --otlp-protocol grpc" } else { "" },
        }))
    }
}

/// Asserts invariants of the settings for any variables, for the fuzz target.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn parse(lookup: Lookup<'_>) {
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: OtlpArguments,
    }

    let arguments = Line::parse_from(["observer"]).arguments;
    if let Ok(Some(settings)) = Settings::from(&arguments, lookup) {
        assert!(!settings.interval.is_zero() && !settings.delay.is_zero());
        assert!(settings.attributes.iter().all(|(name, _)| !name.is_empty()));
        for endpoint in settings.metrics.iter().chain(&settings.traces) {
            assert!(endpoint.headers.values().all(HeaderValue::is_sensitive) && !endpoint.timeout.is_zero());
            assert!(matches!(endpoint.uri.scheme_str(), Some("http" | "https")));
        }
    }
}

fn collector_url(text: &str) -> Result<String, String> {
    uri(text, "--otlp-endpoint").map(|_| text.to_owned()).map_err(|failure| failure.what)
}

/// Parses the URL of a collector; `origin` is the flag or variable that it comes from.
fn uri(url: &str, origin: &str) -> Result<Uri, Failure> {
    let uri = Uri::from_str(url).ok().filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
    uri.ok_or_else(|| {
        Failure::new(
            format!("{url:?} is not the URL of a collector ({origin})"),
            "give a URL, such as http://localhost:4318 or, for gRPC, http://localhost:4317",
        )
    })
}

/// Appends the path of a signal to the URL for both signals.
fn below(base: &Uri, path: &str) -> Result<Uri, Failure> {
    let mut parts = base.clone().into_parts();
    let whole = format!("{}/{path}", base.path().trim_end_matches('/'));
    parts.path_and_query = whole.parse().ok();
    Uri::from_parts(parts).map_err(|error| {
        Failure::new(
            format!("{base} is not the URL of a collector: {error}"),
            "give a URL such as http://localhost:4318",
        )
    })
}

fn protocol_of(name: &str, variable: &str) -> Result<Protocol, Failure> {
    match name {
        "grpc" => Ok(Protocol::Grpc),
        "http/protobuf" => Ok(Protocol::HttpProtobuf),
        _ => Err(Failure::new(
            format!("unknown protocol {name:?} ({variable})"),
            "choose grpc or http/protobuf",
        )),
    }
}

fn is_gzip(name: &str, variable: &str) -> Result<bool, Failure> {
    match name {
        "gzip" => Ok(true),
        "none" => Ok(false),
        _ => Err(Failure::new(format!("unknown compression {name:?} ({variable})"), "choose gzip or none")),
    }
}

fn milliseconds(variable: &str, lookup: Lookup<'_>) -> Result<Option<Duration>, Failure> {
    let Some(text) = lookup(variable) else { return Ok(None) };
    let given = text.parse().ok().filter(|&ms: &u64| ms > 0).map(Duration::from_millis);
    let wrong =
        || Failure::new(format!("{text:?} is not a time ({variable})"), "give milliseconds, such as 10000");
    given.map(Some).ok_or_else(wrong)
}

/// Parses `name=value,name=value`, with values encoded as in URLs. Pairs without a name are ignored.
pub(super) fn pairs(text: &str) -> Pairs {
    let decoded = |part: &str| percent_decode_str(part.trim()).decode_utf8_lossy().into_owned();
    let split = text.split(',').filter_map(|pair| pair.split_once('='));
    split.map(|(name, value)| (decoded(name), decoded(value))).filter(|(name, _)| !name.is_empty()).collect()
}

fn headers(text: &str, variable: &str) -> Result<HeaderMap, Failure> {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs(text) {
        // The value may be secret, so it is not in the message.
        let wrong =
            || Failure::new(format!("{name:?} is not a header ({variable})"), "give name=value,name=value");
        let mut value = HeaderValue::from_str(&value).map_err(|_| wrong())?;
        value.set_sensitive(true);
        headers.append(HeaderName::from_str(&name).map_err(|_| wrong())?, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    fn find(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Option<Settings>, Failure> {
        let all = ["observer", "--pid", "1"].iter().chain(arguments);
        let arguments = Cli::try_parse_from(all).unwrap().observe.output.otlp;
        Settings::from(&arguments, &|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[track_caller]
    fn metrics(arguments: &[&str], variables: &[(&str, &str)]) -> Endpoint {
        find(arguments, variables).unwrap().unwrap().metrics.unwrap()
    }

    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

    #[test]
    fn nothing_is_pushed_unless_somebody_says_where() {
        assert_eq!(find(&[], &[]).unwrap(), None);
        assert_eq!(find(&[], &[(ENDPOINT, "")]).unwrap(), None);
        let none = [("OTEL_METRICS_EXPORTER", "none"), ("OTEL_TRACES_EXPORTER", "none")];
        assert_eq!(find(&[], &[&[(ENDPOINT, "http://c")], &none[..]].concat()).unwrap(), None);
        assert_eq!(find(&["--otlp-endpoint", "http://c"], &none).unwrap(), None);
        assert_eq!(find(&[], &[(ENDPOINT, "http://c"), ("OTEL_SDK_DISABLED", "true")]).unwrap(), None);
    }

    #[test]
    fn each_signal_goes_its_own_way() {
        let told = |variables: &[(&str, &str)]| {
            let settings = find(&[], variables).unwrap().unwrap();
            [settings.metrics, settings.traces].map(|endpoint| endpoint.map(|found| found.uri.to_string()))
        };
        let both = [Some("http://c/v1/metrics".into()), Some("http://c/v1/traces".into())];
        assert_eq!(told(&[(ENDPOINT, "http://c")]), both);
        let without = [(ENDPOINT, "http://c"), ("OTEL_TRACES_EXPORTER", "none")];
        assert_eq!(told(&without), [both[0].clone(), None]);
        let alone = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t/in")];
        assert_eq!(told(&alone), [None, Some("http://t/in".into())]);
    }

    #[test]
    fn a_signal_has_its_path_below_the_address_for_all() {
        let uri = |variables: &[(&str, &str)]| metrics(&[], variables).uri.to_string();
        assert_eq!(uri(&[(ENDPOINT, "http://c:4318")]), "http://c:4318/v1/metrics");
        assert_eq!(uri(&[(ENDPOINT, "https://c/otlp/")]), "https://c/otlp/v1/metrics");
        let own = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://m:4318/in");
        assert_eq!(uri(&[(ENDPOINT, "http://c:4318"), own]), "http://m:4318/in");
        let grpc = [(ENDPOINT, "http://c:4317"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
        assert_eq!(uri(&grpc), "http://c:4317/");
    }

    #[test]
    fn flags_come_first_and_a_signals_own_variable_second() {
        let variables = [
            (ENDPOINT, "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "500"),
        ];
        let endpoint = metrics(&[], &variables);
        assert_eq!((endpoint.protocol, endpoint.timeout.as_millis()), (Protocol::HttpProtobuf, 500));
        let flags = ["--otlp-endpoint", "http://d:1", "--otlp-protocol", "grpc"];
        let endpoint = metrics(&flags, &variables);
        assert_eq!((endpoint.protocol, endpoint.uri.to_string().as_str()), (Protocol::Grpc, "http://d:1/"));
    }

    #[test]
    fn headers_are_decoded_and_kept_secret() {
        let given = "Authorization=Basic%20eA%3D%3D, x-tenant=a=b";
        let endpoint = metrics(&[], &[(ENDPOINT, "http://c"), ("OTEL_EXPORTER_OTLP_HEADERS", given)]);
        assert_eq!(endpoint.headers["authorization"], "Basic eA==");
        assert_eq!(endpoint.headers["x-tenant"], "a=b");
        assert!(!format!("{endpoint:?}").contains("eA=="));
    }

    #[test]
    fn what_makes_no_sense_is_a_failure() {
        let fails = |name: &str, value: &str| find(&[], &[(ENDPOINT, "http://c"), (name, value)]).is_err();
        assert!(find(&[], &[(ENDPOINT, "localhost:4317")]).is_err());
        assert!(Cli::try_parse_from(["observer", "--all", "--otlp-endpoint", "ftp://c"]).is_err());
        assert!(fails("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"));
        assert!(fails("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"));
        assert!(fails("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"));
        assert!(fails("OTEL_METRIC_EXPORT_INTERVAL", "0"));
        assert!(fails("OTEL_EXPORTER_OTLP_CLIENT_KEY", "key.pem"));
        assert!(fails("OTEL_EXPORTER_OTLP_HEADERS", "a b=c"));
        assert!(!fails("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"));
    }

    #[test]
    fn the_usual_port_of_grpc_is_remarked_on() {
        let hint = |arguments: &[&str]| metrics(arguments, &[(ENDPOINT, "http://c:4317")]).hint;
        assert!(hint(&[]).contains("--otlp-protocol grpc"));
        assert_eq!(hint(&["--otlp-protocol", "http/protobuf"]), "");
    }
}
