"""report.html in headless Chromium: table, filters, charts, colours, sizes, and untrusted text."""

import json
import statistics
from pathlib import Path

import pytest
from support.browser import chromium, console_messages, needs_chromium, open_page, view, wait
from support.sweep_folders import start, write_sweep

from promcse_pl.cli.main import main

pytestmark = needs_chromium
NASTY = "</script><img src=x onerror=window.hit=1>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "sweep"
    plan = write_sweep(folder, loss__temperature=[0.03, 0.05, 0.1], loss__margin=[0.1, 0.2], seed=[1, 2])
    start(folder / "3", [], "failed", f"DataError: {NASTY}")
    raw = json.loads((folder / "sweep.json").read_text())
    for number, job in enumerate(raw["jobs"]):  # a setting whose name and values are markup
        job["overrides"].append(f"{NASTY}={NASTY}<b>{number // 4 % 2}")
    (folder / "sweep.json").write_text(json.dumps(raw))
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
    wait(driver, "return document.querySelector('#parallel .plot').data")
    yield driver
    assert console_messages(driver) == []
    assert driver.execute_script("return window.hit") is None, "text of a run was executed"
    assert driver.execute_script("return document.images.length") == 0


def column(driver, name: str) -> list[str]:
    script = """
        const heads = [...document.querySelectorAll("#runs th")].map((head) => head.textContent);
        const shown = [...document.querySelectorAll("#runs tbody tr:not([hidden])")];
        return shown.map((row) => row.cells[heads.indexOf(arguments[0])].textContent);
    """
    return driver.execute_script(script, name)


def button(driver, name: str):
    return next(found for found in driver.find_elements("css selector", "#runs th button") if found.text == name)


def menu(driver, label: str):
    from selenium.webdriver.support.ui import Select

    labels = driver.find_elements("css selector", ".menus label")
    found = next(found for found in labels if found.text.split("\n")[0].strip() == label)
    return Select(found.find_element("tag name", "select"))


def chart(driver, section: str) -> list[dict]:
    """The traces of a section's first chart, after charts that are to be redrawn are."""
    driver.execute_async_script("setTimeout(arguments[0], 300)")
    script = "return JSON.stringify(document.querySelector(`#${arguments[0]} .plot`).data)"
    return json.loads(driver.execute_script(script, section))


def picture(driver, section: str) -> str:
    """What a section's charts draw: texts, lines and images, without ids, which change when a chart is drawn again."""
    driver.execute_async_script("setTimeout(arguments[0], 300)")
    script = """
        const marks = [...document.querySelectorAll(`#${arguments[0]} .plot :is(text, path, image)`)];
        return marks.map((mark) => mark.textContent + mark.getAttribute("d") + mark.getAttribute("href")).join("\\n");
    """
    return driver.execute_script(script, section)


def data_of(driver) -> dict:
    return json.loads(driver.execute_script("return document.getElementById('data').textContent"))


def scores(driver, **settings: str) -> list[float]:
    """Dev scores of the finished runs with these settings of the loss."""
    data = data_of(driver)
    index = {name: number for number, name in enumerate(data["settings"])}
    return [
        run["dev"]
        for run in data["runs"]
        if run["state"] == "finished"
        and all(run["values"][index[f"loss.{name}"]] == value for name, value in settings.items())
    ]


def test_the_table_sorts_in_both_orders_and_marks_the_sorted_column(opened):
    assert column(opened, "#")[0] == "1"
    for expected in ("ascending", "descending"):
        button(opened, "dev").click()
        head = button(opened, "dev").find_element("xpath", "..")
        assert head.get_attribute("aria-sort") == expected
        means = [float(text.split()[0]) for text in column(opened, "dev") if text[:1].isdigit()]
        assert len(means) > 5
        assert means == sorted(means, reverse=expected == "descending")
    assert opened.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
    assert opened.execute_script("return document.activeElement.textContent") == "dev"


def test_the_table_is_filtered_by_words_and_status(opened):
    opened.find_element("id", "single").click()
    assert len(column(opened, "run")) == 12
    opened.find_element("id", "filter").send_keys("temperature=0.05 margin=0.1")
    assert set(column(opened, "loss.temperature")) == {"0.05"}
    assert set(column(opened, "loss.margin")) == {"0.1"}
    opened.find_element("id", "filter").clear()
    opened.find_element("id", "filter").send_keys(" ")
    menu(opened, "status").select_by_visible_text("failed")
    assert column(opened, "run") == ["3"]
    assert opened.find_element("id", "count").text == "1 of 12 rows"


def test_filters_and_menus_change_the_drawn_charts(opened):
    before, effect = picture(opened, "heat"), picture(opened, "effects")
    assert "loss.temperature" in before
    menu(opened, "seed").select_by_visible_text("2")
    assert len(column(opened, "run")) == 6, "a row with a matching run stays"
    one_seed = picture(opened, "heat")
    assert one_seed != before
    assert picture(opened, "effects") != effect
    menu(opened, "across").select_by_visible_text("loss.margin")
    assert picture(opened, "heat") != one_seed
    menu(opened, NASTY.partition("=")[0]).select_by_index(1)
    assert len(chart(opened, "parallel")) == 3


def test_a_heat_cell_is_the_mean_of_its_finished_runs(opened):
    (score,) = scores(opened, temperature="0.03", margin="0.2")  # of two seeds one failed
    (heat,) = chart(opened, "heat")
    assert heat["z"][1][0] == pytest.approx(score)
    assert heat["customdata"][1][0] == 1
    assert heat["customdata"][0][0] == 2


def test_cell_labels_have_a_contrast_of_4_5(opened):
    (heat,) = chart(opened, "heat")
    assert heat["textfont"]["color"] == "#000000"
    for _, color in heat["colorscale"]:
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        assert (luminance + 0.05) / 0.05 >= 4.5


def test_error_bars_are_the_deviation_over_seeds(opened):
    menu(opened, "loss.margin").select_by_visible_text("0.1")
    expected = scores(opened, temperature="0.03", margin="0.1")
    _, means = chart(opened, "effects")
    assert len(expected) == 2
    assert means["y"][0] == pytest.approx(statistics.fmean(expected))
    assert means["error_y"]["array"][0] == pytest.approx(statistics.stdev(expected))


def test_ticked_runs_are_drawn_and_every_finished_run_has_a_line(opened):
    before = len(chart(opened, "training"))
    boxes = opened.find_elements("css selector", "#runs tbody tr:not([hidden]) input")
    next(box for box in boxes if not box.is_selected()).click()
    assert len(chart(opened, "training")) > before
    assert len(chart(opened, "parallel")) == 11
    assert NASTY in opened.find_element("id", "failures").text


def test_a_series_of_one_point_is_visible(driver, tmp_path):
    write_sweep(tmp_path / "s", steps=1, loss__margin=[0.1, 0.2])
    assert main(["report", str(tmp_path / "s")]) == 0
    view(driver, 1280)
    open_page(driver, tmp_path / "s/report.html")
    points = (
        "return [...document.querySelectorAll('#training .plot')].map((plot) => plot.querySelectorAll('.point').length)"
    )
    assert driver.execute_script(points) == [2] * 5


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (1280, False),
        (400, True),
        pytest.param(1280, True, marks=pytest.mark.exhaustive),
        pytest.param(400, False, marks=pytest.mark.exhaustive),
    ],
)
def test_the_page_does_not_overflow_and_follows_the_colour_scheme(opened, page, width, dark):
    view(opened, width, dark=dark)
    open_page(opened, page)
    wait(opened, "return document.querySelector('#parallel .plot').data")
    scrolled, inner, ground = opened.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert inner == width
    assert scrolled <= width
    assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    widths = opened.execute_script("return [...document.querySelectorAll('.plot svg')].map((svg) => svg.clientWidth)")
    assert len(widths) > 5
    assert 200 < max(widths) <= width
    dev_ends = "return document.querySelector('#runs tr:not([hidden]) td:nth-child(3)').getBoundingClientRect().right"
    assert opened.execute_script(dev_ends) <= width, "the dev score is visible without scrolling"


def test_the_page_makes_no_requests(opened):
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
