//! HTTP proxies: connections that a proxy carries by CONNECT. What it carries is TLS, so it learns no more than where we go.
//!
//! Names and passwords of proxies appear in no text that is made here.

use std::{fmt, io, sync::Arc, time::Duration};

use hyper_util::{
    client::{
        legacy::connect::proxy::Tunnel,
        proxy::matcher::{Intercept, Matcher},
    },
    rt::TokioIo,
};
use tokio::{net::TcpStream, time::timeout};
use tower::ServiceExt;

use super::{
    ConnectError, ConnectOptions, Dial, Dialing, Stream, Target,
    connect::{connect_tcp, greet_within},
};
use crate::{ids::ServerId, proof::Statement, tls::Identity};

/// Why a proxy can't be used. The text doesn't repeat the setting: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "is not an HTTP proxy; write http://HOST:PORT, http://USER:PASSWORD@HOST:PORT with %40 for an @ in the password, or none"
)]
pub struct NoProxy;

/// Which proxy carries a connection, by where it goes.
#[derive(Clone, Default)]
pub struct Proxies(Option<Arc<Matcher>>);

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Proxies" } else { "no Proxies" })
    }
}

impl Proxies {
    /// As a setting says it: a URL; `none`; or, when it is empty, what `https_proxy`, `all_proxy` and `no_proxy` of the
    /// environment say. `no_proxy` counts for a URL, too.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(setting: &str) -> Result<Self, NoProxy> {
        match setting.trim() {
            "none" => Ok(Self::default()),
            "" if no_proxy().trim() == "*" => Ok(Self::default()),
            "" => Ok(Self(Some(Arc::new(Matcher::from_env())))),
            _ if no_proxy().trim() == "*" => Ok(Self::default()),
            url => Self::one(url, &no_proxy()),
        }
    }

    fn one(url: &str, except: &str) -> Result<Self, NoProxy> {
        // One @, and no path: else a part of a password with such characters would be taken for the host.
        let place = url.strip_prefix("http://").map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        let is_place = place.is_some_and(|place| {
            place.matches('@').count() <= 1 && !place.contains(['/', '#', '?'])
        });
        let anywhere = http::Uri::from_static("https://janus.invalid");
        let matcher = Matcher::builder().https(url.to_owned()).build();
        let port = matcher.intercept(&anywhere).and_then(|proxy| proxy.uri().port_u16());
        if !is_place || port.is_none() {
            return Err(NoProxy);
        }
        let matcher = Matcher::builder().https(url.to_owned()).no(except.to_owned());
        Ok(Self(Some(Arc::new(matcher.build()))))
    }

    /// TCP to `target`, by a proxy where there is one for it.
    pub(super) async fn connect(
        &self,
        target: &Target,
        limit: Duration,
    ) -> Result<TcpStream, ConnectError> {
        match self.of(target) {
            None => connect_tcp(target, limit).await,
            Some(proxy) => connect_by(&proxy, target, limit).await,
        }
    }

    fn of(&self, target: &Target) -> Option<Intercept> {
        let uri: http::Uri = target.to_string().parse().ok()?;
        self.0.as_ref()?.intercept(&uri)
    }
}

fn no_proxy() -> String {
    let value = |name| std::env::var(name).ok();
    value("NO_PROXY").or_else(|| value("no_proxy")).unwrap_or_default()
}

/// Makes connections through a proxy where there is one for the target.
#[derive(Debug, Clone)]
pub struct Proxied {
    /// Who we are.
    pub identity: Identity,
    /// Which proxies there are.
    pub proxies: Proxies,
}

impl Dial for Proxied {
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let tcp = self.proxies.connect(target, options.connect_timeout).await?;
            let (stream, peer) = greet_within(target, &self.identity, options, tcp).await?;
            Ok((Box::new(stream) as Stream, peer))
        })
    }

    fn prove(&self, statement: &Statement, server: Option<&ServerId>) -> Option<String> {
        self.identity.prove(statement, server)
    }
}

async fn connect_by(
    proxy: &Intercept,
    target: &Target,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    // Its host and port: what it was parsed from is without name and password.
    let name = proxy.uri().authority().map_or_else(String::new, ToString::to_string);
    let failed = |reason: String| ConnectError::Proxy {
        target: target.to_string(),
        proxy: name.clone(),
        reason,
    };
    if proxy.uri().scheme_str() != Some("http") {
        return Err(failed("is none that is reached by http://".into()));
    }
    let place =
        Target::at(proxy.uri().host().unwrap_or_default(), proxy.uri().port_u16().unwrap_or(80));
    let tcp = connect_tcp(&place, limit).await;
    let tcp = tcp.map_err(|error| failed(format!("can't be reached: {}", error.reason())))?;
    let mut tcp = Some(TokioIo::new(tcp));
    let connector = tower::service_fn(move |_: http::Uri| {
        std::future::ready(tcp.take().ok_or(io::Error::from(io::ErrorKind::NotConnected)))
    });
    let mut tunnel = Tunnel::new(proxy.uri().clone(), connector);
    if let Some(auth) = proxy.basic_auth() {
        tunnel = tunnel.with_auth(auth.clone());
    }
    let to: http::Uri =
        target.to_string().parse().map_err(|_| failed("can't be asked for this host".into()))?;
    match timeout(limit, tunnel.oneshot(to)).await {
        Ok(Ok(stream)) => Ok(TokioIo::into_inner(stream)),
        Ok(Err(error)) => Err(failed(refusal(&error.to_string(), proxy.basic_auth().is_some()))),
        Err(_) => Err(failed(format!("did not answer CONNECT within {limit:?}"))),
    }
}

/// What a failed CONNECT means; its error has only a text.
fn refusal(text: &str, has_password: bool) -> String {
    match text {
        text if text.contains("authorization") && has_password => {
            "does not take this name and password".into()
        }
        text if text.contains("authorization") => "asks for a name and password".into(),
        text if text.contains("unsuccessful") && has_password => {
            "refuses to connect there, or can't: its settings must allow CONNECT to this port, for this name and password"
                .into()
        }
        text if text.contains("unsuccessful") => {
            "refuses to connect there, or can't: its settings must allow CONNECT to this port"
                .into()
        }
        text => format!("broke off: {}", text.trim_start_matches("tunnel error: ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by(proxies: &Proxies, url: &str) -> Option<String> {
        let proxy = proxies.of(&Target::parse(url).unwrap())?;
        Some(proxy.uri().authority().unwrap().to_string())
    }

    #[test]
    fn a_setting_is_a_url_or_none() {
        for wrong in ["http://us:se@cret@h:1", "http://h:1/path", "http://us:a#b@h:1", "h:1"] {
            assert!(Proxies::one(wrong, "").is_err(), "{wrong}");
        }
        let some =
            Proxies::one("http://alice:s3cret@proxy.example.org:3128", "10.0.0.0/8").unwrap();
        assert_eq!(by(&some, "https://a:7420").as_deref(), Some("proxy.example.org:3128"));
        assert_eq!(by(&some, "https://[::1]:7420").as_deref(), Some("proxy.example.org:3128"));
        assert_eq!(by(&some, "https://10.1.2.3:7420"), None);
        assert_eq!(by(&Proxies::parse("none").unwrap(), "https://a:7420"), None);
        for bad in
            ["proxy:3128", "https://proxy:3128", "socks5://proxy:1080", "http://proxy", "http://"]
        {
            assert_eq!(Proxies::parse(bad).unwrap_err(), NoProxy, "{bad}");
        }
    }

    #[test]
    fn a_password_is_in_no_text() {
        let some = Proxies::one("http://alice:s3cret@proxy:3128", "").unwrap();
        let proxy = some.of(&Target::parse("https://a:1").unwrap()).unwrap();
        let texts = format!("{some:?} {proxy:?} {} {}", proxy.uri(), NoProxy);
        assert!(!texts.contains("s3cret"), "{texts}");
    }
}
