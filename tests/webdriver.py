"""A few lines of the W3C WebDriver protocol: enough to drive headless Chromium through
chromedriver.
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Shift": "\ue008", "Space": " "}


class Browser:
    """One browser session."""

    def __init__(self, driver_url: str, width: int, height: int) -> None:
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
        ]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": arguments}}
        self._http = httpx.Client(base_url=driver_url, timeout=60)
        made = self._http.post("/session", json={"capabilities": {"alwaysMatch": options}}).json()[
            "value"
        ]
        self._session = f"/session/{made['sessionId']}"

    def _call(self, path: str, **body: Any) -> Any:
        value = self._http.post(self._session + path, json=body).json()["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{path}: {value['message']}")
        return value

    def open(self, url: str) -> None:
        self._call("/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the JavaScript function body returns."""
        return self._call("/execute/sync", script=script, args=list(arguments))

    def emulate_width(self, width: int, height: int) -> None:
        """A viewport narrower than a window may be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self._call("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def emulate_colours(self, scheme: str) -> None:
        """Prefer "light" or "dark"."""
        params = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._call("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=params)

    def press(self, *keys: str) -> None:
        """Type texts and named keys into whatever has the focus."""
        typed = [character for key in keys for character in ([KEYS[key]] if key in KEYS else key)]
        actions = [{"type": kind, "value": key} for key in typed for kind in ("keyDown", "keyUp")]
        self._call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, selector: str) -> None:
        found = self._call("/element", using="css selector", value=selector)
        self._call(f"/element/{found[ELEMENT]}/click")

    def wait(self, condition: str, seconds: float = 20) -> Any:
        """Wait until the JavaScript expression is true, and return it."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < end, (
                f"never true: {condition}\n{self.run('return document.body.innerText')}"
            )
            time.sleep(0.02)
        return value

    def close(self) -> None:
        self._http.delete(self._session)


@contextmanager
def chromium() -> Iterator[Callable[[int, int], Browser]]:
    """Starts chromedriver; gives a function that opens a browser of some width and height."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    browsers = []

    def open_browser(width: int = 1000, height: int = 800) -> Browser:
        browsers.append(Browser(url, width, height))
        return browsers[-1]

    try:
        for _ in range(200):
            try:
                if httpx.get(f"{url}/status").json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield open_browser
    finally:
        for browser in browsers:
            browser.close()
        driver.terminate()
        driver.wait()
