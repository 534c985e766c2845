"""A few lines of the W3C WebDriver protocol: enough to drive headless Chromium through
chromedriver.
"""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import WAIT, wait_until

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# Lowest contrast of any text with what is behind it (WCAG 2.1), its text, and the smallest font
# size.
LEGIBILITY = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
let worst = [99, ""], smallest = 99;
for (const element of document.querySelectorAll("body *")) {
  const texts = [...element.childNodes].filter(n => n.nodeType === 3);
  const text = texts.map(n => n.data.trim()).join("");
  if (!text || element.closest("svg, script") || !element.getClientRects().length) continue;
  let behind = element;
  while (behind && (rgb(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0)
    behind = behind.parentElement;
  const a = luminance(rgb(getComputedStyle(element).color));
  const b = luminance(rgb(getComputedStyle(behind ?? document.body).backgroundColor));
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < worst[0]) worst = [contrast, text];
  smallest = Math.min(smallest, parseFloat(getComputedStyle(element).fontSize));
}
return [worst, smallest];
"""
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Space": " "}
MODIFIERS = {"Shift": "\ue008", "Control": "\ue009"}


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
        self._http = httpx.Client(base_url=driver_url, timeout=WAIT)
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

    def assert_legible(self) -> None:
        """Every text has WCAG's contrast for small text, and none is smaller than 11 pixels."""
        (contrast, text), smallest = self.run(LEGIBILITY)
        assert contrast >= 4.5, text
        assert smallest >= 11

    def keep_downloads(self, directory: Path) -> None:
        """Save what pages download there."""
        params = {"behavior": "allow", "downloadPath": str(directory)}
        self._call("/goog/cdp/execute", cmd="Page.setDownloadBehavior", params=params)

    def press(self, *keys: str) -> None:
        """Type texts and named keys into whatever has the focus; "Shift+Enter" is both together."""
        actions = []
        for key in keys:
            *held, last = key.split("+") if key.split("+")[0] in MODIFIERS else [key]
            modifiers = [MODIFIERS[each] for each in held]
            actions += [{"type": "keyDown", "value": each} for each in modifiers]
            for typed in [KEYS[last]] if last in KEYS else last:
                actions += [{"type": kind, "value": typed} for kind in ("keyDown", "keyUp")]
            actions += [{"type": "keyUp", "value": each} for each in modifiers]
        self._call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, selector: str) -> None:
        found = self._call("/element", using="css selector", value=selector)
        self._call(f"/element/{found[ELEMENT]}/click")

    def wait(self, condition: str, seconds: float = WAIT) -> Any:
        """Wait until the JavaScript expression is true, and return it."""
        try:
            return wait_until(lambda: self.run(f"return {condition}"), seconds)
        except AssertionError:
            text = self.run("return document.body.innerText")
            raise AssertionError(f"never true: {condition}\n{text}") from None

    def close(self) -> None:
        self._http.delete(self._session)


def _is_ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/status", timeout=WAIT).json()["value"]["ready"])
    except httpx.TransportError:
        return False


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
        wait_until(lambda: _is_ready(url))
        yield open_browser
    finally:
        for browser in browsers:
            browser.close()
        driver.terminate()
        driver.wait()
