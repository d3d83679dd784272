"""A headless Chromium for the tests that look at MLflow's UI: the five WebDriver calls they need.

Plain HTTP to chromedriver, so that no browser library has to be installed.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = None if CHROMIUM and CHROMEDRIVER else "chromium and chromedriver are not installed"
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1900,1000"]


class Browser:
    """One tab."""

    def __init__(self, session_url: str) -> None:
        self._session_url = session_url

    def open(self, url: str) -> None:
        _call("POST", f"{self._session_url}/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that the JavaScript returns."""
        return _call("POST", f"{self._session_url}/execute/sync", {"script": script, "args": []})

    def screenshot(self) -> bytes:
        return base64.b64decode(_call("GET", f"{self._session_url}/screenshot"))

    def wait_for(self, script: str, accept: Callable[[Any], bool], *, timeout_s: float = 60.0) -> Any:
        """The script's value once it is accepted, or the last one."""
        deadline = time.monotonic() + timeout_s
        value = self.run(script)
        while not accept(value) and time.monotonic() < deadline:
            time.sleep(0.5)
            value = self.run(script)
        return value


@contextmanager
def chromium() -> Iterator[Browser]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": _ARGUMENTS}}
        answer = _when_up(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": options}})
        session_url = f"http://127.0.0.1:{port}/session/{answer['sessionId']}"
        yield Browser(session_url)
        _call("DELETE", session_url)
    finally:
        driver.terminate()
        driver.wait(10)


def _when_up(url: str, body: dict[str, Any]) -> Any:
    for _ in range(50):
        try:
            return _call("POST", url, body)
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError("chromedriver does not start")


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]
