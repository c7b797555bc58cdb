//! A headless Chromium to look at pages with, steered through chromedriver (W3C WebDriver, plain HTTP on loopback).

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{free_ports, process};
use crate::packages::{self, Tool};

/// What a browser needs.
const TOOLS: &[Tool] = &[
    Tool { program: "chromium", package: "chromium" },
    Tool { program: "chromedriver", package: "chromium-driver" },
];
const START_TIME: Duration = Duration::from_secs(60);
const CALL_TIME: Duration = Duration::from_secs(60);

/// A running browser; dropping it ends it.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts one with an empty profile.
    ///
    /// # Errors
    /// When Chromium isn't here and can't be installed, or doesn't start.
    pub fn start() -> Result<Self> {
        packages::require(TOOLS)?;
        let port = free_ports(1)?[0];
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start chromedriver")?;
        process::started(&driver);
        let profile = tempfile::tempdir()?;
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ];
        let mut arguments: Vec<String> = arguments.map(str::to_owned).to_vec();
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        let mut browser = Self { driver, port, session: String::new(), _profile: profile };
        let until = Instant::now() + START_TIME;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(Instant::now() < until, "chromedriver does not listen");
            thread::sleep(Duration::from_millis(50));
        }
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": { "args": arguments } } } });
        let made = browser.call("POST", "/session", &wanted)?;
        let id = made["sessionId"].as_str().with_context(|| format!("no session: {made}"))?;
        browser.session = format!("/session/{id}");
        Ok(browser)
    }

    /// Shows pages as on a screen of this size, in light or dark colours.
    ///
    /// # Errors
    /// When the browser refuses.
    pub fn screen(&self, width: u32, height: u32, is_phone: bool, is_dark: bool) -> Result<()> {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 2, "mobile": is_phone });
        self.devtools("Emulation.setDeviceMetricsOverride", &size)?;
        let scheme = if is_dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", &media)
    }

    fn devtools(&self, command: &str, parameters: &Value) -> Result<()> {
        let path = format!("{}/goog/cdp/execute", self.session);
        self.call("POST", &path, &json!({ "cmd": command, "params": parameters })).map(drop)
    }

    /// Opens a page and waits until it is loaded.
    ///
    /// # Errors
    /// When it can't be loaded.
    pub fn open(&self, url: &str) -> Result<()> {
        self.call("POST", &format!("{}/url", self.session), &json!({ "url": url })).map(drop)
    }

    /// What `return <expression>` gives inside the page.
    ///
    /// # Errors
    /// When it throws.
    pub fn value(&self, expression: &str) -> Result<Value> {
        let script = json!({ "script": format!("return {expression}"), "args": [] });
        self.call("POST", &format!("{}/execute/sync", self.session), &script)
    }

    /// The text that a reader sees.
    ///
    /// # Errors
    /// When there is no page.
    pub fn text(&self) -> Result<String> {
        Ok(self.value("document.body.innerText")?.as_str().unwrap_or_default().to_owned())
    }

    /// Writes a picture (PNG) of what the screen shows.
    ///
    /// # Errors
    /// When it can't be made or written.
    pub fn picture(&self, to: &Path) -> Result<()> {
        let made = self.call("GET", &format!("{}/screenshot", self.session), &Value::Null)?;
        let text = made.as_str().context("no picture")?;
        let picture = BASE64_STANDARD.decode(text).context("picture is not base64")?;
        std::fs::write(to, picture).with_context(|| format!("write {}", to.display()))
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut tcp = TcpStream::connect(("127.0.0.1", self.port))?;
        tcp.set_read_timeout(Some(CALL_TIME))?;
        write!(
            tcp,
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.port,
            body.len()
        )?;
        let (head, body) =
            read_answer(BufReader::new(tcp)).with_context(|| format!("{method} {path}"))?;
        let mut answer: Value = serde_json::from_str(&body).with_context(|| head.clone())?;
        if !head.starts_with("HTTP/1.1 200") {
            bail!("{method} {path}: {}", answer["value"]["message"]);
        }
        Ok(answer["value"].take())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = self.call("DELETE", &self.session, &Value::Null);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        process::ended(&self.driver);
    }
}

/// Head and body; chromedriver keeps the connection open, so its length says where the body ends.
fn read_answer(mut from: impl BufRead) -> Result<(String, String)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        ensure!(from.read_line(&mut head)? > 0, "the answer ends in its head: {head}");
    }
    let lower = head.to_lowercase();
    let length = lower.lines().find_map(|line| line.strip_prefix("content-length:"));
    let mut body = vec![0; length.context("no content-length")?.trim().parse()?];
    from.read_exact(&mut body)?;
    Ok((head, String::from_utf8(body)?))
}
