"""report.html in headless Chromium: sorting, filtering, menus, colours, sizes, and text that must stay text."""

import json
from pathlib import Path

import pytest
from support.browser import chromium, console_messages, needs_chromium, open_page, view, wait
from support.sweep_folders import begin, write_sweep

from promcse_pl.cli.main import main
from promcse_pl.run_folder import STATUS

pytestmark = needs_chromium
NASTY = "</script><img src=x onerror=window.hit=1>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "sweep"
    plan = write_sweep(folder, loss__temperature=[0.03, 0.05, 0.1], loss__margin=[0.1, 0.2], seed=[1, 2])
    begin(folder / "3", [], "failed", f"DataError: {NASTY}")
    raw = json.loads((folder / "sweep.json").read_text())
    for place, job in enumerate(raw["jobs"]):  # a setting with such a name and values, which no run of ours has
        job["overrides"].append(f"{NASTY}={NASTY}<b>{place // 4 % 2}")
    (folder / "sweep.json").write_text(json.dumps(raw))
    assert (folder / "3" / STATUS).exists()
    assert len(plan.jobs) == 12
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def driver():
    with chromium() as started:
        yield started


@pytest.fixture
def opened(driver, page):
    view(driver, 1280)
    open_page(driver, page)
    yield driver
    assert console_messages(driver) == []
    assert driver.execute_script("return window.hit") is None, "text of a run was run"
    assert driver.execute_script("return document.images.length") == 0


def column(driver, name: str) -> list[str]:
    script = """
        const heads = [...document.querySelectorAll("#runs th")].map((head) => head.textContent);
        return [...document.querySelectorAll("#runs tbody tr")].map((row) => row.cells[heads.indexOf(arguments[0])].textContent);
    """
    return driver.execute_script(script, name)


def button(driver, name: str):
    return next(one for one in driver.find_elements("css selector", "#runs th button") if one.text == name)


def pick(driver, section: str, label: str, choice: str) -> None:
    from selenium.webdriver.support.ui import Select

    labels = f"[...document.querySelectorAll('#{section} .menus label')]"
    found = wait(driver, f"return {labels}.find((one) => one.textContent.startsWith({json.dumps(label)}))?.lastChild")
    Select(found).select_by_visible_text(choice)


def picture(driver, section: str) -> str:
    """What is drawn: texts, lines and the heat map's image; no ids, which a second drawing may change."""
    script = """
        const marks = [...document.querySelectorAll(`#${arguments[0]} .plot :is(text, path, image)`)];
        return marks.map((mark) => mark.textContent + mark.getAttribute("d") + mark.getAttribute("href")).join("\\n");
    """
    return driver.execute_script(script, section)


def test_the_table_sorts_both_ways_and_says_so(opened):
    assert column(opened, "#")[0] == "1"
    for expected in ("ascending", "descending"):
        button(opened, "dev").click()
        head = button(opened, "dev").find_element("xpath", "..")
        assert head.get_attribute("aria-sort") == expected
        scores = [float(text.split()[0]) for text in column(opened, "dev") if text[:1].isdigit()]
        assert len(scores) > 5
        assert scores == sorted(scores, reverse=expected == "descending")
    assert opened.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
    assert opened.execute_script("return document.activeElement.textContent") == "dev"


def test_the_table_is_filtered_by_words_and_status(opened):
    from selenium.webdriver.support.ui import Select

    opened.find_element("id", "each").click()
    assert len(column(opened, "run")) == 12
    opened.find_element("id", "filter").send_keys("temperature=0.05 margin=0.1")
    assert set(column(opened, "loss.temperature")) == {"0.05"}
    assert set(column(opened, "loss.margin")) == {"0.1"}
    opened.find_element("id", "filter").clear()
    opened.find_element("id", "filter").send_keys(" ")
    Select(opened.find_element("id", "status")).select_by_visible_text("failed")
    assert column(opened, "run") == ["3"]
    assert opened.find_element("id", "count").text == "1 of 12 rows"


def test_menus_change_the_drawn_pictures(opened):
    before = picture(opened, "heat")
    assert "loss.temperature" in before
    pick(opened, "heat", "seed", "2")
    chosen = picture(opened, "heat")
    assert chosen != before
    pick(opened, "heat", "across", "loss.margin")
    assert picture(opened, "heat") != chosen
    curve = picture(opened, "curve")
    pick(opened, "curve", "loss.margin", "0.2")
    assert picture(opened, "curve") != curve
    pick(opened, "curve", "setting", "loss.margin")
    assert "loss.margin" in picture(opened, "curve")


def test_a_heat_cell_is_the_mean_of_its_finished_runs(opened):
    data = json.loads(opened.execute_script("return document.getElementById('data').textContent"))
    at = {name: place for place, name in enumerate(data["settings"])}
    runs = [run for run in data["runs"] if run["values"][at["loss.temperature"]] == 0.03]
    runs = [run for run in runs if run["values"][at["loss.margin"]] == 0.2 and run["state"] == "finished"]
    assert len(runs) == 1, "of two seeds one failed"
    z = opened.execute_script("return document.querySelector('#heat .plot').data[0].z")
    assert z[1][0] == pytest.approx(runs[0]["dev"])


def test_the_band_is_the_deviation_over_seeds(opened):
    import statistics

    pick(opened, "curve", "loss.margin", "0.1")
    data = json.loads(opened.execute_script("return document.getElementById('data').textContent"))
    at = {name: place for place, name in enumerate(data["settings"])}
    scores = [
        run["dev"]
        for run in data["runs"]
        if (run["values"][at["loss.temperature"]], run["values"][at["loss.margin"]]) == (0.03, 0.1)
    ]
    band, _, line = opened.execute_script("return document.querySelector('#curve .plot').data.map((trace) => trace.y)")
    assert len(scores) == 2
    assert line[0] == pytest.approx(statistics.fmean(scores))
    assert band[0] - line[0] == pytest.approx(statistics.stdev(scores))


def test_ticked_runs_are_drawn_and_every_finished_run_has_a_line(opened):
    count = "return document.querySelector('#training .grid .plot').data.length"
    before = opened.execute_script(count)
    unticked = next(box for box in opened.find_elements("css selector", "#runs tbody input") if not box.is_selected())
    unticked.click()
    assert opened.execute_script(count) > before
    assert opened.execute_script("return document.querySelector('#parallel .plot').data.length") == 11
    assert NASTY in opened.find_element("id", "failures").text


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_and_colours_follow(opened, page, width, dark):
    view(opened, width, dark=dark)
    open_page(opened, page)
    scrolled, inner, ground = opened.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert inner == width
    assert scrolled <= width
    assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    widths = opened.execute_script("return [...document.querySelectorAll('.plot svg')].map((svg) => svg.clientWidth)")
    assert len(widths) > 5
    assert 200 < max(widths) <= width


def test_the_page_asks_for_nothing(opened):
    requests = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
