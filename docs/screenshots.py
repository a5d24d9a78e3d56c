"""Pictures of the report and of MLflow's pages, taken by a headless browser for `make screenshots`."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.leaderboard import save_views
from pipeline.show_report import PAGE_WITH_VERDICT, show_report
from pipeline.ui import HOST, find_free_port, wait_for_port

DOCS = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 90
COLOURS = 256  # of a stored picture, which then has a third of the bytes


def find_browser() -> tuple[str, str] | None:
    """The paths of Chromium and of chromedriver, or None where one is missing."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def open_browser(width: int, height: int, *, dark: bool = False, scale: float = 1) -> Iterator[webdriver.Chrome]:
    """A headless browser with a window of this size in CSS pixels."""
    found = find_browser()
    if found is None:
        sys.exit("install Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Chromium's own sandbox does not work for root, as in a container.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", *sandbox):
        options.add_argument(argument)
    with contextlib.closing(_Driver(options, Service(found[1]))) as browser:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield browser.driver


class _Driver:
    def __init__(self, options: webdriver.ChromeOptions, service: Service) -> None:
        self.driver = webdriver.Chrome(options, service)
        # MLflow's charts keep a busy machine occupied for longer than the default of 30 seconds.
        self.driver.set_script_timeout(TIMEOUT_S)

    def close(self) -> None:
        self.driver.quit()


@dataclass
class PageCheck:
    """What a browser says about a page."""

    figures: list[dict[str, Any]]  # tag, width and height in CSS pixels, and alternative text
    errors: list[str]  # of the console
    requests: list[str]  # URLs that are neither the page nor embedded
    overflow: int  # CSS pixels by which the page is wider than the window


MEASURE = """
document.querySelectorAll("details").forEach(each => { each.open = true; });
const figures = [...document.querySelectorAll("figure svg, figure img")].map(each => {
  const box = each.getBoundingClientRect(), named = each.closest('[role="img"]');
  return {tag: each.tagName, width: box.width, height: box.height,
          alt: each.getAttribute("alt") || (named && named.getAttribute("aria-label")) || ""};
});
return {figures, overflow: document.documentElement.scrollWidth - window.innerWidth};
"""


IS_LOADED = "return document.readyState === 'complete' && location.href === arguments[0];"


def check_page(browser: webdriver.Chrome, file: Path) -> PageCheck:
    """Open a page, unfold all of it, and return what can be seen and what went wrong."""
    address = file.resolve().as_uri()
    browser.get(address)
    # On a busy machine a new browser may return from the page that it started with.
    WebDriverWait(browser, TIMEOUT_S).until(lambda _: browser.execute_script(IS_LOADED, address))
    measured = browser.execute_script(MEASURE)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    errors = [entry["message"] for entry in browser.get_log("browser")]
    outside = [url for url in sent if not url.startswith((address, "data:"))]
    return PageCheck(measured["figures"], errors, outside, measured["overflow"])


def save_picture(browser: webdriver.Chrome, file: Path) -> None:
    """Save what the window shows, with few colours."""
    browser.save_screenshot(str(file))
    Image.open(file).convert("RGB").quantize(COLOURS).save(file, optimize=True)


@contextlib.contextmanager
def serve_mlflow(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of MLflow's UI for the project's store, and the links to its saved views."""
    links, port = save_views(root), find_free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"]
    server = subprocess.Popen([*command, "--host", HOST, "--port", str(port), "--workers", "1"], cwd=root)
    address = f"http://{HOST}:{port}"
    try:
        wait_for_port(port, TIMEOUT_S)
        yield address, [address + link[link.index("/#") :] for link in links]
    finally:
        server.terminate()
        server.wait()


def open_page(browser: webdriver.Chrome, link: str, text: str, seconds: float = 4) -> None:
    """Open a page of MLflow and wait until it shows a text, and then for its charts."""
    # A link that differs only after the # would not load the page again.
    browser.get("about:blank")
    browser.get(link)
    deadline = time.monotonic() + TIMEOUT_S
    while text not in _page_text(browser):
        if time.monotonic() > deadline:
            sys.exit(f"{link} does not show {text!r} after {TIMEOUT_S} seconds, but {_page_text(browser)!r}")
        time.sleep(1)
    # MLflow's own assistant covers a third of the first page.
    for button in browser.find_elements(By.CSS_SELECTOR, '[data-component-id="mlflow.assistant.chat_panel.close"]'):
        button.click()
    time.sleep(seconds)
    # MLflow scrolls while its charts appear one by one.
    browser.execute_script("document.querySelectorAll('*').forEach(each => { each.scrollTop = 0; });")
    time.sleep(2)


def _page_text(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body ? document.body.innerText : ''"))


def take_screenshots(root: Path, folder: Path) -> None:
    """Take the pictures of the documentation in a project that has run."""
    show_report(root)
    with open_browser(1180, 1240) as browser:
        browser.get((root / PAGE_WITH_VERDICT).resolve().as_uri() + "#results")
        save_picture(browser, folder / "report.png")
    with serve_mlflow(root) as (_, links), open_browser(1700, 590) as browser:
        open_page(browser, links[0], "validation/accuracy")
        save_picture(browser, folder / "leaderboard.png")
        size = {"width": 1500, "height": 1040, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        open_page(browser, links[1], "epoch/val_accuracy", 8)
        save_picture(browser, folder / "curves.png")


if __name__ == "__main__":
    take_screenshots(Path.cwd(), DOCS)
