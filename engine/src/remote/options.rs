//! How the servers of a pool are spoken to.

use onpolicy_plugin_api::{EngineError, PauseMode};
use serde::{Deserialize, Serialize};
use std::{fmt, time::Duration};

/// Which API a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaks {
    /// It is asked.
    #[default]
    Auto,
    /// vLLM's, which is this project's own too.
    Vllm,
    /// SGLang's.
    Sglang,
}

/// Limits and habits of a pool of servers. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RemoteOptions {
    /// Which API the servers speak.
    pub dialect: Speaks,
    /// Environment variable that holds the key of the generating routes; no key if not given.
    pub api_key_env: Option<String>,
    /// Environment variable that holds the key of the control routes; that of the generating
    /// routes if not given.
    pub control_key_env: Option<String>,
    /// What running samples do while weights are changed. Samples that are aborted are drawn anew.
    pub pause: PauseMode,
    /// Longest time for a connection.
    pub connect_timeout_seconds: f64,
    /// Longest time for one try of a request.
    pub timeout_seconds: f64,
    /// Longest time for a request, with all tries and with waiting for a server.
    pub deadline_seconds: f64,
    /// Longest time for a server to take new weights.
    pub update_timeout_seconds: f64,
    /// Pause between two looks at a server.
    pub health_period_seconds: f64,
    /// Longest time for a server to say how it is.
    pub health_timeout_seconds: f64,
    /// A server that fails this often in a row gets no more requests until it is well again.
    pub max_failures: u32,
    /// Further tries of a request whose server failed.
    pub retries: u32,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            dialect: Speaks::Auto,
            api_key_env: None,
            control_key_env: None,
            pause: PauseMode::Keep,
            connect_timeout_seconds: 5.0,
            timeout_seconds: 300.0,
            deadline_seconds: 600.0,
            update_timeout_seconds: 300.0,
            health_period_seconds: 2.0,
            health_timeout_seconds: 5.0,
            max_failures: 3,
            retries: 3,
        }
    }
}

impl RemoteOptions {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming the first option that is out of range.
    pub fn validate(&self) -> Result<(), EngineError> {
        let seconds = [
            ("connect_timeout_seconds", self.connect_timeout_seconds),
            ("timeout_seconds", self.timeout_seconds),
            ("deadline_seconds", self.deadline_seconds),
            ("update_timeout_seconds", self.update_timeout_seconds),
            ("health_period_seconds", self.health_period_seconds),
            ("health_timeout_seconds", self.health_timeout_seconds),
        ];
        for (name, value) in seconds {
            if !(0.01..=604_800.0).contains(&value) {
                return Err(EngineError::invalid(name, "must be between 0.01 and 604800"));
            }
        }
        if !(1..=1000).contains(&self.max_failures) {
            return Err(EngineError::invalid("max_failures", "must be between 1 and 1000"));
        }
        if self.retries > 1000 {
            return Err(EngineError::invalid("retries", "must be at most 1000"));
        }
        Ok(())
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.connect_timeout_seconds)
    }

    pub(super) fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }

    pub(super) fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }

    pub(super) fn update_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.update_timeout_seconds)
    }

    pub(super) fn health_period(&self) -> Duration {
        Duration::from_secs_f64(self.health_period_seconds)
    }

    pub(super) fn health_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.health_timeout_seconds)
    }
}

/// The address of a server without its end: `http://host:port`, with `/v1` or without.
///
/// # Errors
/// Says what is wrong with it.
pub fn base_url(url: &str) -> Result<String, String> {
    let parsed = reqwest::Url::parse(url.trim()).map_err(|error| error.to_string())?;
    if !matches!(parsed.scheme(), "http" | "https") {
        return Err("must begin with http:// or https://".into());
    }
    if parsed.host_str().is_none() || parsed.query().is_some() || parsed.fragment().is_some() {
        return Err("must be of the form http://host:port".into());
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err("must not hold a password; see api_key_env".into());
    }
    let base = parsed.as_str().trim_end_matches('/');
    Ok(base.strip_suffix("/v1").unwrap_or(base).trim_end_matches('/').to_string())
}

/// Whether an address is one of this machine.
pub fn is_local(url: &str) -> bool {
    let host = reqwest::Url::parse(url).ok().and_then(|url| url.host_str().map(String::from));
    let host = host.unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for Speaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lose_their_end() {
        assert_eq!(base_url("http://a:8000").unwrap(), "http://a:8000");
        assert_eq!(base_url(" http://a:8000/v1/ ").unwrap(), "http://a:8000");
        assert_eq!(base_url("https://a/vllm/v1").unwrap(), "https://a/vllm");
        for bad in ["a:8000", "ftp://a", "http://", "http://u:p@a", "http://a?x=1", "a"] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_of_this_machine() {
        for local in ["http://localhost:1", "http://127.0.0.2:80", "http://[::1]:9"] {
            assert!(is_local(local), "{local}");
        }
        assert!(!is_local("http://10.0.0.1:80") && !is_local("http://localhost.example.com"));
    }

    #[test]
    fn options_are_checked_by_name() {
        assert_eq!(RemoteOptions::default().validate(), Ok(()));
        let refused = |change: fn(&mut RemoteOptions)| {
            let mut options = RemoteOptions::default();
            change(&mut options);
            options.validate().unwrap_err().to_string()
        };
        assert!(refused(|o| o.timeout_seconds = 0.0).starts_with("timeout_seconds"));
        assert!(refused(|o| o.health_period_seconds = f64::NAN).starts_with("health_period"));
        assert!(refused(|o| o.max_failures = 0).starts_with("max_failures"));
    }
}
