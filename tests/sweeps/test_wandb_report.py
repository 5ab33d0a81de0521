"""The W&B Report of a sweep and the previews of W&B views: content, errors, the page, and what a server receives."""

import dataclasses
import html
import json
import math
import random
import re
import shlex
import statistics
import subprocess
from itertools import product
from pathlib import Path

import pytest
import wandb
from markdown_it import MarkdownIt
from support.browser import chromium, console_messages, needs_chromium, view
from support.sweep_folders import finish, start, write_sweep
from support.wandb_server import serving

from promcse_pl.cli.main import main
from promcse_pl.run_folder import RESULTS, read_status, write_status
from promcse_pl.sweeps import wandb_report
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.ranking import find_best, rank
from promcse_pl.sweeps.wandb_report import SHADES, _best_adapter, heat_map
from promcse_pl.tracking import dashboard
from promcse_pl.tracking.dashboard import build_workspace, sent_json

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces.*")
NASTY = "</script><img src onerror>|*b*"
KEY = "0123456789" * 4


def track(folder: Path) -> None:
    """Give every started job the id of a W&B run: id0, id1, ..."""
    for status in folder.glob("*/status.json"):
        job = status.parent
        write_status(job, dataclasses.replace(read_status(job), wandb_id=f"id{job.name}"))


def change_results(job: Path, **changes: object) -> None:
    results = json.loads((job / RESULTS).read_text())
    (job / RESULTS).write_text(json.dumps({**results, **changes}))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over two settings and two seeds; job 3 failed, and the best job is 11."""
    folder = tmp_path_factory.mktemp("report") / "margins"
    write_sweep(folder, loss__temperature=[0.03, 0.05, 0.1], loss__margin=[0.1, 0.2], seed=[1, 2])
    start(folder / "3", [], "failed", f"DataError: /secret/folder: {NASTY}")
    for job in range(12):
        if job != 3:
            change_results(folder / str(job), dev_spearman=70.0 + job % 2 + job / 10)
    track(folder)
    return folder


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No API key, and a server address that nothing listens on."""
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def preview(folder: Path, out: Path, *arguments: str) -> list[dict]:
    """The blocks of the previewed report."""
    assert main(["dashboard", "--sweep", str(folder), "--preview", str(out / "preview"), *arguments]) == 0
    return json.loads((out / "preview.json").read_text())["spec"]["blocks"]


def texts(blocks: list[dict], kind: str = "paragraph") -> list[str]:
    return ["".join(part["text"] for part in block["children"]) for block in blocks if block["type"] == kind]


def tables(blocks: list[dict]) -> list[list[list[str]]]:
    """The cells of the tables, by a Markdown parser."""
    found = []
    for block in blocks:
        if block["type"] == "markdown-block":
            rendered = MarkdownIt().enable("table").render(block["content"])
            rows = re.findall(r"<tr>(.*?)</tr>", rendered, re.DOTALL)
            found.append([[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows])
    return found


def panels(blocks: list[dict]) -> list[dict]:
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]


def test_a_preview_is_written_without_a_key_and_without_a_request(sweep, tmp_path, monkeypatch, capsys):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        preview(sweep, tmp_path)
        assert main(["dashboard", "--preview", str(tmp_path / "view.json")]) == 0
        assert server.operations == []
    assert capsys.readouterr().out == "~/preview.json\n~/preview.html\n~/view.json\n~/view.html\n"
    page = (tmp_path / "view.html").read_text()
    assert not re.findall(r"https?://|<script", page)
    workspace = json.loads((tmp_path / "view.json").read_text())
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections if section["panels"]]
    assert re.findall(r"<h2>(.*?)</h2>", page) == names
    assert page.count('<article class="panel">') == sum(len(section["panels"]) for section in sections)


def test_the_report_names_what_varied_the_states_the_best_settings_and_what_was_not_compared(sweep, tmp_path):
    blocks = preview(sweep, tmp_path)
    assert texts(blocks, "heading") == [
        "Summary",
        "Best adapter",
        "Effect of the settings",
        "Training curves",
        "Settings",
        "Jobs",
    ]
    found = [text for text in texts(blocks) if text]
    assert found[0] == "Varied: loss.temperature (0.03, 0.05, 0.1); loss.margin (0.1, 0.2); seed (1, 2)."
    assert found[1].startswith("Setup: training data: demo; encoder: sentence-transformers/all-MiniLM-L6-v2; dev set: ")
    assert "frozen encoder: dev 45.00" in found[1]
    assert found[2] == "12 jobs: 11 finished, 1 failed."
    half = 12.7062 * math.sqrt(1.1**2 / 2) / math.sqrt(2)  # t quantile of 1 degree of freedom; 71.0 and 72.1
    mean = (71.0 + 72.1) / 2
    assert found[3] == (
        "Best by dev: loss.temperature=0.1, loss.margin=0.2: 71.55 ± 0.78 (Spearman x 100, mean ± standard deviation of "
        f"2 seeds, 95 % confidence interval over seeds [{mean - half:.2f}, {mean + half:.2f}]); best seed 72.10, job 11."
    )
    assert found[4].startswith("Best of 6 settings on the dev set: ")
    assert found[5].startswith("Not compared: job 3 (failed); test scores; ")


def test_the_tables_contain_every_job_and_the_mean_over_seeds(sweep, tmp_path):
    heat, settings, jobs = tables(preview(sweep, tmp_path))
    assert jobs[0] == ["#", "dev", "n", "run", "loss.temperature", "loss.margin", "seed", "time", "status"]
    assert jobs[1] == ["1", "72.10", "1", "11", "0.1", "0.2", "2", "1 min 01 s", "finished"]
    assert len(jobs) == 1 + 12
    assert jobs[-1][3] == "3"
    assert settings[1][:4] == ["1", "71.55 ± 0.78", "2", "10,11"]
    assert len(settings) == 1 + 6
    assert heat[0] == ["loss.temperature / loss.margin", "0.1", "0.2"]
    assert heat[1] == ["0.03", "▒ 70.55", "░ 70.20"]  # the quarters of 70.2 to 71.55 end at 70.54, ...
    assert heat[3] == ["0.1", "█ 71.35", "█ 71.55"]


def test_the_panels_show_the_logged_metrics_of_the_runs_of_this_sweep_only(sweep, tmp_path):
    blocks = preview(sweep, tmp_path)
    shown = panels(blocks)
    lines = [panel["config"]["metrics"] for panel in shown if panel["viewType"] == "Run History Line Plot"]
    assert lines == [["train/loss"], ["train/hinge"], ["train/lr"], ["dev/spearman"], ["dev/best_spearman"]]
    scatter = shown[0]["config"]
    assert [scatter[axis] for axis in ("xAxis", "yAxis", "zAxis")] == [
        "config:loss.value.temperature",
        "config:loss.value.margin",
        "summary:dev/spearman",
    ]
    assert [panel["viewType"] for panel in shown[1:3]] == ["Parallel Coordinates Plot", "Parameter Importance"]
    for block in blocks:
        if block["type"] == "panel-grid":
            (runs,) = block["metadata"]["runSets"]
            (condition,) = runs["filters"]["filters"]
            assert condition["key"] == {"section": "run", "name": "name"}  # W&B's name of the id
            assert set(condition["value"]) == {f"id{number}" for number in range(12)}


def test_the_best_adapter_comes_with_the_commands_that_load_it(sweep, tmp_path):
    blocks = preview(sweep, tmp_path, "--entity", "someone", "--project", "mine")
    code = [
        line["children"][0]["text"] for block in blocks if block["type"] == "code-block" for line in block["children"]
    ]
    assert code[0] == "wandb artifact get someone/mine/adapter-id11:latest --root best-adapter"
    assert code[1] == 'from promcse_pl import PromCSE\n\nmodel = PromCSE.from_pretrained("best-adapter")'
    assert any("./margins/11/adapter, relative to the folder that contains margins." in text for text in texts(blocks))
    (sweep / "11/wandb/offline-run-20260101_000000-id11").mkdir(parents=True)  # an offline run has no artifact
    try:
        blocks = preview(sweep, tmp_path)
    finally:
        (sweep / "11/wandb/offline-run-20260101_000000-id11").rmdir()
    (code,) = [block["children"][0]["children"][0]["text"] for block in blocks if block["type"] == "code-block"]
    assert code.endswith('PromCSE.from_pretrained("./margins/11")')


def test_the_path_of_the_best_adapter_works_in_the_folder_of_the_command(tmp_path, monkeypatch):
    project = tmp_path / "project"
    sweep = project / "multirun/2026-01-01/12-00-00"
    write_sweep(sweep, loss__margin=[0.1, 0.2])
    change_results(sweep / "1", dev_spearman=90.0)
    here, typed = "the folder in which promcse dashboard was started", str(sweep.relative_to(project))
    for current, folder, path, origin in (
        (project, typed, f"{typed}/1", here),
        (project, str(sweep), f"{typed}/1", here),
        (project, f"{typed}/1", f"{typed}/1", here),  # a single run
        (sweep / "1", ".", "1", "the folder that contains 1"),
        (sweep, ".", "12-00-00/1", "the folder that contains 12-00-00"),
        (tmp_path.parent, str(sweep), "12-00-00/1", "the folder that contains 12-00-00"),  # above the home folder
    ):
        monkeypatch.chdir(current)
        runs = read_sweep(folder)
        section = _best_adapter(runs, find_best(runs.runs), "promcse", "")
        assert section.paragraphs == [f"On the machine of the sweep: ./{path}/adapter, relative to {origin}."]
        assert section.code == [
            ("python", f'from promcse_pl import PromCSE\n\nmodel = PromCSE.from_pretrained("./{path}")')
        ]


def test_one_seed_has_the_interval_of_its_dev_set_and_the_missing_seeds_are_named(tmp_path):
    folder = tmp_path / "sweep"
    write_sweep(folder, optim__lr=[0.001, 0.01])
    change_results(
        folder / "0",
        dev_spearman=80.0,
        evaluation={"targets": {"adapter": {"scores": {"dev": {"value": 80.0, "low": 78.5, "high": 81.25}}}}},
    )
    track(folder)
    blocks = preview(folder, tmp_path)
    found = " ".join(texts(blocks))
    assert "80.00 (Spearman x 100, 1 seed, 95 % confidence interval over the dev set [78.50, 81.25]); job 0." in found
    assert "seeds (only one per combination of settings)" in found
    assert "Settings" not in texts(blocks, "heading")
    assert len(tables(blocks)) == 1, "one setting has no heat map"


def test_without_a_ranking_the_report_names_no_best_adapter(tmp_path):
    folder = tmp_path / "sweep"
    write_sweep(folder, loss__margin=[0.1, 0.2])
    track(folder)
    change_results(folder / "0", dev="other dev")
    blocks = preview(folder, tmp_path)
    assert "Not compared: all jobs, since they were evaluated on different dev sets." in texts(blocks)
    assert texts(blocks, "heading") == ["Summary", "Training curves", "Jobs"]
    for job in ("0", "1"):
        finish(folder / job, [f"loss.margin=0.{job}"], None)
    track(folder)
    blocks = preview(folder, tmp_path)
    assert texts(blocks, "heading") == ["Summary", "Training curves", "Jobs"]
    assert any(text.startswith("Not compared: jobs 0 (finished), 1 (finished)") for text in texts(blocks))


def test_no_error_message_and_no_folder_is_sent(sweep, tmp_path):
    folder = tmp_path / "files"
    write_sweep(folder, loss__margin=[0.1, 0.2])
    raw = json.loads((folder / "sweep.json").read_text())
    for number, job in enumerate(raw["jobs"]):
        job["overrides"].append(f"data.train=/home/someone/secret/{number}.csv")
    (folder / "sweep.json").write_text(json.dumps(raw))
    config = folder / "0/config.yaml"
    config.write_text(config.read_text().replace("train: demo", "train: /home/someone/secret/0.csv"))
    change_results(folder / "0", dev="/home/someone/secret/dev.tsv")
    change_results(folder / "1", dev="/home/someone/secret/dev.tsv")
    track(folder)
    for each in (folder, sweep):
        preview(each, tmp_path)
        sent = (tmp_path / "preview.json").read_text()
        assert "secret" not in sent
        assert "DataError" not in sent
        assert str(tmp_path) not in sent
    blocks = preview(folder, tmp_path)
    assert "data.train (0.csv, 1.csv)" in texts(blocks)[1]
    assert "dev set: dev.tsv" in texts(blocks)[2]


def test_long_tables_and_lists_of_values_are_cut_and_say_so(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_report, "MAX_ROWS", 5)
    monkeypatch.setattr(wandb_report, "MAX_LEVELS", 2)
    blocks = preview(sweep, tmp_path)
    assert [len(table) - 1 for table in tables(blocks)[1:]] == [5, 5]
    assert "The first 5 of 12 rows; promcse report shows all." in texts(blocks)
    assert "Varied: loss.temperature (3 values, 0.03 to 0.1); loss.margin (0.1, 0.2); seed (1, 2)." in texts(blocks)


def test_a_heat_map_is_a_slice_through_the_best_settings(tmp_path):
    generator = random.Random(3)
    write_sweep(
        tmp_path / "s", loss__temperature=[0.05, 0.1], loss__margin=[0.1, 0.2, 0.3], prompt__length=[6, 10], seed=[1, 2]
    )
    runs = read_sweep(tmp_path / "s").runs
    for run in runs:
        run.dev = generator.uniform(60, 80)
    names = ["loss.temperature", "loss.margin", "prompt.length"]
    heat = heat_map(runs, rank(runs, by_seed=True), names)
    assert (heat.row_setting, heat.column_setting) == ("loss.temperature", "loss.margin")
    means = {
        key: statistics.fmean(run.dev for run in runs if tuple(run.settings[name] for name in names) == key)
        for key in product([0.05, 0.1], [0.1, 0.2, 0.3], [6, 10])
    }
    length = max(means, key=means.get)[2]
    assert f"at prompt.length={length}, the best values" in heat.caption
    scores = {key[:2]: mean for key, mean in means.items() if key[2] == length}
    assert heat.columns[1:] == ["0.1", "0.2", "0.3"]
    assert [[row[0], *(cell.split()[1] for cell in row[1:])] for row in heat.rows] == [
        [str(row), *(f"{scores[row, column]:.2f}" for column in (0.1, 0.2, 0.3))] for row in (0.05, 0.1)
    ]
    cells = sorted((cell for row in heat.rows for cell in row[1:]), key=lambda cell: float(cell.split()[1]))
    shades = [SHADES.index(cell[0]) for cell in cells]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0, 3)
    for run in runs:
        run.settings["loss.margin"] = generator.random()  # a random search has no grid
        run.settings["loss.temperature"] = generator.random()
    assert heat_map(runs, rank(runs, by_seed=True), ["loss.temperature", "loss.margin"]) is None


def ids_removed(spec: object) -> object:
    """A spec without the random ids of panels and run sets, and without the project that the server looked up."""
    if isinstance(spec, dict):
        return {key: ids_removed(value) for key, value in spec.items() if key not in ("__id__", "id", "project")}
    return [ids_removed(part) for part in spec] if isinstance(spec, list) else spec


@pytest.mark.slow
def test_the_server_receives_what_the_preview_shows(sweep, tmp_path, monkeypatch, capsys):
    preview(sweep, tmp_path)
    capsys.readouterr()
    uploaded = sweep / "0/wandb/offline-run-20260101_000000-id0"
    uploaded.mkdir(parents=True)
    (uploaded / "run-id0.wandb.synced").touch()  # as wandb sync does
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert main(["dashboard", "--sweep", str(sweep)]) == 0
        try:
            assert dashboard.main([json.dumps(["mine", "team"])]) == 0  # without the seconds that another process needs
        finally:
            wandb.teardown()  # ends its service, which other tests would use
    report, workspace = server.views
    addresses = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{server.url}/someone/promcse/reports/Sweep-margins[^ /]*--V1", addresses[0])
    assert addresses[1].startswith(f"{server.url}/team/mine?nw=")
    assert (report["entityName"], report["projectName"], report["type"]) == ("someone", "promcse", "runs")
    assert report["displayName"] == "Sweep margins: loss.temperature, loss.margin, seed"
    sent = json.loads(report["spec"])
    previewed = json.loads((tmp_path / "preview.json").read_text())["spec"]
    code = [block for block in sent["blocks"] if block["type"] == "code-block"]
    assert "someone/promcse/adapter-id11" in json.dumps(code[0])
    known = json.loads(json.dumps(sent).replace("someone/promcse/adapter", "promcse/adapter"))
    assert ids_removed(known) == ids_removed(previewed)
    (runs,) = next(block for block in sent["blocks"] if block["type"] == "panel-grid")["metadata"]["runSets"]
    assert runs["project"] == {"name": "promcse", "entityName": "someone", "id": "12"}
    expected = json.loads(sent_json(build_workspace("team", "mine")))
    assert ids_removed(json.loads(workspace["spec"])) == ids_removed(expected["spec"])
    assert (workspace["entityName"], workspace["projectName"]) == (expected["entity"], expected["project"])


def test_a_missing_sweep_or_a_sweep_without_wandb_is_one_line_that_says_what_to_type(sweep, tmp_path, capsys):
    assert main(["dashboard", "--sweep", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: ~/none is not a folder (current folder: {Path.cwd()}). Try: promcse dashboard --sweep FOLDER, with the "
        "folder that the sweep printed, such as multirun/DATE/TIME\n"
    )

    folder = tmp_path / "not tracked"
    write_sweep(folder, loss__margin=[0.1, 0.2])
    for arguments in ([], ["--preview", str(tmp_path / "x")]):
        assert main(["dashboard", "--sweep", str(folder), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: no run of ")
        assert error.count("\n") == 1
    typed = error.rpartition("or promcse ")[2]
    assert main(shlex.split(typed.replace("~", str(tmp_path)))) == 0
    assert (folder / "report.html").exists()


def test_offline_runs_come_with_the_command_that_uploads_them(tmp_path, capsys):
    folder = tmp_path / "sweep"
    write_sweep(folder, loss__margin=[0.1, 0.2])
    track(folder)
    offline = folder / "1/wandb/offline-run-20260101_000000-id1"
    offline.mkdir(parents=True)
    assert main(["dashboard", "--sweep", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of 2 W&B runs of ~/sweep are offline. Try: wandb login && wandb sync ")
    assert [*tmp_path.glob("sweep/*/wandb/offline-run-*")] == [offline]
    assert "sweep/*/wandb/offline-run-*" in error


def test_the_command_that_uploads_offline_runs_covers_a_folder_of_sweeps(tmp_path, capsys):
    folder = tmp_path / "two sweeps"
    offline = []
    for name in ("a", "b"):
        write_sweep(folder / name, loss__margin=[0.1, 0.2])
        track(folder / name)
        offline += [folder / name / part / "wandb/offline-run-20260101_000000-id" for part in ("0", "1", ".")]
    for path in offline:
        path.mkdir(parents=True)
    assert main(["dashboard", "--sweep", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 4 of 4 W&B runs of ~/two sweeps are offline. Try: wandb login && wandb sync ")
    arguments = error.strip().partition("wandb sync ")[2].replace("~", str(tmp_path))
    listed = subprocess.run(f"ls -d {arguments}", shell=True, capture_output=True, text=True, check=True).stdout
    assert sorted(listed.splitlines()) == sorted(map(str, offline))


def test_a_preview_replaces_a_preview_but_no_other_file(sweep, tmp_path, capsys):
    content = (sweep / "sweep.json").read_text()
    assert main(["dashboard", "--preview", str(sweep / "sweep")]) == 2
    assert "sweep.json exists and is not a preview. Try: --preview with another name\n" in capsys.readouterr().err
    assert (sweep / "sweep.json").read_text() == content
    assert not (sweep / "sweep.html").exists()
    for name in ("p", "p.json", "p.html"):
        assert main(["dashboard", "--preview", str(tmp_path / name)]) == 0
    assert sorted(path.name for path in tmp_path.glob("p*")) == ["p.html", "p.json"]
    foreign = tmp_path / "app.json"
    foreign.write_text('{"name": "app", "displayName": "My app"}')
    for page in (None, "<title>My app</title>"):
        if page:
            (tmp_path / "app.html").write_text(page)
        assert main(["dashboard", "--preview", str(tmp_path / "app")]) == 2
        assert "exists and is not a preview" in capsys.readouterr().err
        assert "My app" in foreign.read_text()
    (tmp_path / "p.json").unlink()
    (tmp_path / "p.json").mkdir()
    assert main(["dashboard", "--preview", str(tmp_path / "p")]) == 2
    assert "p.json exists and is not a preview" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "..", "/", "", "a/.."])
def test_a_preview_needs_a_file_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard", "--preview", name]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --preview must be the name of a file, got {str(Path(name))!r}. Try: --preview preview\n"
    assert [*tmp_path.iterdir()] == []


@needs_chromium
@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desktop_and_shows_texts_as_texts(tmp_path):
    folder = tmp_path / "sweep"
    write_sweep(folder, loss__temperature=[0.03, 0.05, 0.1], loss__margin=[0.1, 0.2], seed=[1, 2])
    raw = json.loads((folder / "sweep.json").read_text())
    for number, job in enumerate(raw["jobs"]):  # a setting whose name and values are markup
        job["overrides"].append(f"{NASTY}={NASTY}{number % 2}")
    (folder / "sweep.json").write_text(json.dumps(raw))
    track(folder)
    blocks = preview(folder, tmp_path)
    assert f"{NASTY}0" in {cell for table in tables(blocks) for row in table for cell in row}
    with chromium() as driver:
        for width in (400, 1280):
            view(driver, width)
            driver.get((tmp_path / "preview.html").as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") == width
            boxes = driver.execute_script(
                "return [...document.querySelectorAll('.panel')].map((panel) => panel.getBoundingClientRect().toJSON())"
            )
            assert len(boxes) == len(panels(blocks))
            assert all(box["left"] >= 0 and box["right"] <= width and box["height"] > 40 for box in boxes)
            assert len({box["left"] for box in boxes}) == (1 if width == 400 else 3)
            shown = driver.execute_script("return document.body.innerText")
            assert all(text in shown for text in texts(blocks) if text)
            assert f"{NASTY}1" in shown
            assert driver.execute_script("return document.images.length + document.scripts.length") == 0
        assert console_messages(driver) == []
        addresses = [
            message["params"]["request"]["url"]
            for entry in driver.get_log("performance")
            if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
        ]
    assert all(address.startswith(("file:", "data:")) for address in addresses)
