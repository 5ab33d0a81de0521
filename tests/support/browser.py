"""Debian's headless Chromium on a page of this machine, and what is looked at in it."""

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
    """A browser that can reach no network."""
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
    """Give the page this size in CSS pixels (a window is never narrower than 500) and these colours."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_page(driver: object, path: Path) -> None:
    """Load it anew and wait for its scripts: the one before it may be this page too, and must not be taken for it."""
    driver.get("about:blank")
    driver.get(path.absolute().as_uri())
    wait(driver, "return document.readyState === 'complete' && document.querySelector('footer')?.textContent")


def wait(driver: object, script: str) -> object:
    """What the script returns, as soon as that is true or not empty."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 30).until(lambda page: page.execute_script(script))


def console_messages(driver: object) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]
