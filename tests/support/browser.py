"""Headless Chromium for tests of HTML pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
)


@contextmanager
def chromium() -> Iterator[object]:
    """Start a browser; its network requests are logged."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def view(driver: object, width: int, height: int = 900, dark: bool = False) -> None:
    """Set the page size in CSS pixels (a window is at least 500 wide) and the colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_page(driver: object, path: Path) -> None:
    """Load a page and wait until its charts are drawn."""
    driver.get("about:blank")  # the page may be open already
    driver.get(path.absolute().as_uri())
    wait(driver, "return document.readyState === 'complete' && document.querySelector('.js-plotly-plot')")


def wait(driver: object, script: str, *arguments: object) -> object:
    """Return the result of a script as soon as it is truthy."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 30).until(lambda page: page.execute_script(script, *arguments))


def console_messages(driver: object) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]
