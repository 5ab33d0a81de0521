"""Train the runs of a study, score them and write their records to results.json."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scoring import adapter_member, files_of, frozen_member, score, suites_of
from study import (
    DEV,
    LEARNING_RATE_OF,
    RESULTS,
    Results,
    Row,
    Study,
    best_rate,
    learning_rates,
    read_results,
    selected_rows,
    study_folder,
)

from promcse_pl.config import Config, decides, flat_settings
from promcse_pl.run_folder import read_config
from promcse_pl.runs.compose import compose_config
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.files import write_bytes, write_text
from promcse_pl.utils.paths import hide_home

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = {"minilm", "mpnet"}
"""Models that are trained on a sample; others on the whole data with the recipe of the paper."""
MINIATURE_OVERRIDES = (
    "data.batch_size=128",
    "trainer.epochs=1",
    "trainer.eval_every=10",
    "trainer.precision=float32",  # `auto` could differ between runs
)
COMMON_OVERRIDES = ("evaluation=none", "tracking=local")
SOURCES = {"nli": "nli/nli_train.csv", "wiki": "wiki/wiki.txt.gz"}
SAMPLE_SEED = 42
RECORD_KEYS = (
    "dev_spearman",
    "best_step",
    "steps",
    "rows",
    "trained_parameters",
    "trained_share",
    "training_seconds",
    "machine",
    "versions",
)
CHECKED_ELSEWHERE = ("data.train", "data.dir")
"""Settings of a run that are local paths; `write_sample` checks the content of the training file."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Model, data and folders of the runs of a study.

    Attributes:
        model: Choice of `model`.
        data: Folder with nli/, wiki/ and senteval/.
        runs: Folder of all runs.
        rows: Rows of a sample; 0 for the whole data.
        encoder: Folder of the encoder, if it cannot be downloaded.
        extra: Further overrides, for tests.
    """

    model: str
    data: Path
    runs: Path
    rows: int
    encoder: Path | None = None
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Model and rows: name of the folder of the runs, and key in results.json."""
        return f"{self.model}-{self.rows or 'all'}"

    @property
    def folder(self) -> Path:
        """Folder of the runs of this model and sample."""
        return self.runs / self.name

    def sample(self, source: str) -> Path:
        """Return the path of the sample of `nli` or `wiki`."""
        name = SOURCES[source].rpartition("/")[2].removesuffix(".gz")
        return self.runs / "data" / f"{self.rows}-{name}"

    def overrides(self, row: Row, seed: int) -> list[str]:
        """Return the overrides of a run: `python run.py OVERRIDES` repeats it.

        Raises:
            ConfigError: As for `selected_learning_rate`.
        """
        source = source_of(row)
        is_fixed = not self.rows or any(line.startswith("optim.lr=") for line in row.overrides)
        rate = None if is_fixed else selected_learning_rate(self, row.preset)
        set_by_row = {line.partition("=")[0] for line in row.overrides}
        miniature = [line for line in MINIATURE_OVERRIDES if line.partition("=")[0] not in set_by_row]
        return [
            f"experiment={row.preset}",
            f"model={self.model}",
            *row.overrides,
            *([] if rate is None else [f"optim.lr={rate}"]),
            f"seed={seed}",
            f"data.dir={self.data}",
            *([f"data.train={self.sample(source)}", *miniature] if self.rows else []),
            *([f"model.path={self.encoder}"] if self.encoder else []),
            *COMMON_OVERRIDES,
            *self.extra,
        ]

    def portable(self, overrides: list[str]) -> list[str]:
        """Return the overrides without those that contain a local path."""
        local = [str(path) for path in (self.data, self.runs, self.encoder) if path]
        return [line for line in overrides if not any(path in line for path in local)]

    def run_folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a run, named after the overrides that vary, so that studies share runs."""
        common = {f"seed={seed}", f"model={self.model}", *COMMON_OVERRIDES, *MINIATURE_OVERRIDES, *self.extra}
        local = ("data.dir=", "data.train=", "model.path=")
        varying = [line for line in self.overrides(row, seed) if line not in common and not line.startswith(local)]
        return self.folder / "_".join(varying).replace("/", "-").replace("=", "-") / f"seed{seed}"


def source_of(row: Row) -> str:
    """Return the training data of a row: `nli` (triplets) or `wiki` (sentences)."""
    return "nli" if row.preset.startswith("table1/") and "unsup" not in row.preset else "wiki"


def selected_learning_rate(workspace: Workspace, preset: str) -> str | None:
    """Return the learning rate of a method with the best dev score of the study `learning_rate`.

    Returns:
        The rate; None if none of the method was run: the recipe's rate is used.

    Raises:
        ConfigError: Only some rates of the method were run.
    """
    method = LEARNING_RATE_OF.get(preset, preset)
    rates = learning_rates(read_results("learning_rate").get(workspace.name, {}), method)
    missing = [rate for rate, score in rates.items() if score is None]
    if 0 < len(missing) < len(rates):
        sample = f" --rows {workspace.rows}" if workspace.rows else ""
        raise ConfigError(
            f"the learning rates {', '.join(missing)} of {method} were not run for {workspace.name}, others were. Try: "
            f"python experiments/paper/run.py learning_rate --only {method} --model {workspace.model}{sample} "
            f"--data {shlex.quote(str(workspace.data))} --runs {shlex.quote(str(workspace.runs))}"
        )
    return best_rate(rates)


def write_sample(workspace: Workspace, source: str) -> Results:
    """Write a seeded sample of a training file, in file order, unless it exists; return its description.

    Args:
        workspace: If its `rows` is 0, the whole file is used and only hashed.
        source: `nli` or `wiki`.

    Raises:
        DataError: An existing sample or the finished runs were made from another training file.
    """
    original = workspace.data / SOURCES[source]
    content = _sample(original, source, workspace.rows) if workspace.rows else original.read_bytes()
    sha256, path = hashlib.sha256(content).hexdigest(), workspace.folder / "data.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    is_sampled = workspace.rows and workspace.sample(source).is_file()
    if known.get(source, sha256) != sha256 or (is_sampled and workspace.sample(source).read_bytes() != content):
        raise DataError(f"the runs in {workspace.runs} use other rows than {original} has. Try: --runs NEW_FOLDER")
    if workspace.rows and not is_sampled:
        write_bytes(workspace.sample(source), content)
    if source not in known:
        write_text(path, json.dumps(known | {source: sha256}) + "\n")
    return {
        "file": SOURCES[source],
        "rows": workspace.rows or None,
        "sample_seed": SAMPLE_SEED if workspace.rows else None,
        "sha256": sha256,
    }


def _sample(path: Path, source: str, rows: int) -> bytes:
    """Return a seeded sample of the rows of a file as the content of a file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as stream:
        lines = list(csv.reader(stream)) if source == "nli" else [[line] for line in stream]
    header, body = (lines[:1], lines[1:]) if source == "nli" else ([], lines)
    kept = [body[row] for row in sorted(random.Random(SAMPLE_SEED).sample(range(len(body)), rows))]
    text = io.StringIO(newline="")
    if source == "nli":
        csv.writer(text, lineterminator="\n").writerows([*header, *kept])
    else:
        text.writelines(line for (line,) in kept)
    return text.getvalue().encode()


def train(workspace: Workspace, row: Row, seed: int) -> Results:
    """Train a run, or resume it, unless it is finished; return its record.

    Raises:
        CalledProcessError: The run failed.
        ConfigError: The run folder has other settings.
    """
    folder, overrides = workspace.run_folder(row, seed), workspace.overrides(row, seed)
    is_started = (folder / "config.yaml").is_file()
    if is_started:
        check_settings(folder, overrides)
    if not (folder / "results.json").is_file():
        arguments = [f"resume={folder}"] if is_started else [*overrides, "--out", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, env=environment, check=True)
    results = json.loads((folder / "results.json").read_text())
    return {"seed": seed, "overrides": workspace.portable(overrides), **{name: results[name] for name in RECORD_KEYS}}


def is_recorded(name: str, workspace: Workspace, row: Row, seed: int, tasks: set[str]) -> bool:
    """Return whether results.json has a run with the settings and all scores, so that its folder is not needed.

    Args:
        name: Name of the study.
        workspace: Model, data and run folders.
        row: Row of the run.
        seed: Its seed.
        tasks: Tasks of the study that can be scored here.
    """
    runs = read_results(name).get(workspace.name, {}).get("rows", {}).get(row.name, {}).get("runs", [])
    wanted = workspace.portable(workspace.overrides(row, seed))
    return any(run["overrides"] == wanted and tasks <= set(run["scores"]) for run in runs)


def check_settings(folder: Path, overrides: list[str]) -> None:
    """Check that a run has the settings of the overrides.

    Raises:
        ConfigError: A setting that affects training differs.
    """
    stored = _training_settings(read_config(folder / "config.yaml"))
    wanted = _training_settings(compose_config(overrides, {}))
    differing = [f"{key}={stored[key]}, not {wanted[key]}" for key in wanted if stored[key] != wanted[key]]
    if differing:
        raise ConfigError(
            f"the run {folder} has {'; '.join(differing)}. Try: --runs NEW_FOLDER, or delete the folder of the run"
        )


def _training_settings(config: Config) -> Results:
    """Return the settings that affect training, without those whose content is checked."""
    settings = flat_settings(hide_home(config.to_dict()))
    return {
        key: value for key, value in settings.items() if decides(key) == "training" and key not in CHECKED_ELSEWHERE
    }


def run_settings(record: Results) -> list[str]:
    """Return the overrides of a run without its seed."""
    return [line for line in record["overrides"] if not line.startswith("seed=")]


def add_record(runs: list[Results], record: Results) -> list[Results]:
    """Return the runs of a row by seed with a new record, without its predecessor and runs with other settings."""
    kept = [run for run in runs if run["seed"] != record["seed"] and run_settings(run) == run_settings(record)]
    return sorted([*kept, record], key=lambda run: run["seed"])


def check_origin(name: str, key: str, origin: Results) -> None:
    """Check that the earlier results of a study can be merged with new ones.

    Args:
        name: Name of the study.
        key: Name of the workspace.
        origin: Data, tasks and encoder, by part and entry.

    Raises:
        DataError: The earlier results are of other data or another encoder.
    """
    earlier, file = read_results(name).get(key, {}), study_folder(name) / RESULTS
    for part, entries in origin.items():
        known = earlier.get(part, {})
        if differing := [entry for entry in entries if known.get(entry, entries[entry]) != entries[entry]]:
            raise DataError(
                f"{file} has results of {key} with other {part}: {', '.join(differing)}. Try: mv {file} {file}.old"
            )


def write_record(name: str, study: Study, key: str, about: Results, row: Row, record: Results) -> None:
    """Merge the record of a run into results.json; the file is read anew, since other rows may run in parallel.

    Args:
        name: Name of the study.
        study: The study.
        key: Name of the workspace.
        about: Data, tasks, encoder and scores of the frozen encoder.
        row: Row of the run.
        record: Record of the run.
    """
    results = read_results(name)
    earlier = results.get(key, {"rows": {}})
    rows = {}
    for each in study.rows:
        settings = {"preset": each.preset, "overrides": [*each.overrides]}
        known = earlier["rows"].get(each.name, {})
        is_same = all(known.get(part) == value for part, value in settings.items())
        rows[each.name] = {**settings, "runs": known["runs"] if is_same else []}
    rows[row.name]["runs"] = add_record(rows[row.name]["runs"], record)
    results[key] = {part: earlier.get(part, {}) | entries for part, entries in about.items()} | {"rows": rows}
    write_text(study_folder(name) / RESULTS, json.dumps(results, indent=2) + "\n")


def describe_origin(workspace: Workspace, rows: tuple[Row, ...], suites: tuple[str, ...]) -> Results:
    """Return data, tasks and encoder of runs; the samples are written if they do not exist."""
    return {
        "data": {source: write_sample(workspace, source) for source in sorted({source_of(row) for row in rows})},
        "tasks": {task: files for suite in suites for task, files in files_of(suite, workspace.data).items()},
        "encoder": {"sha256": frozen_member(workspace.model, workspace.encoder).load().adapter_hash()},
    }


def run_study(
    name: str,
    study: Study,
    workspace: Workspace,
    seeds: tuple[int, ...],
    report: Callable[[str], None],
    only: tuple[str, ...] = (),
) -> list[str]:
    """Train and score all unfinished runs of a study; merge the record of each into results.json.

    Args:
        name: Name of the study.
        study: The study.
        workspace: Model, data and run folders.
        seeds: Seeds, in the order of training: all rows with the first seed come first.
        report: Called with each progress line.
        only: Texts that select rows, see `selected_rows`.

    Returns:
        The runs that failed.

    Raises:
        PromcseError: The data or the frozen encoder cannot be read, or differ from those of earlier results.
    """
    rows, suites, failed = selected_rows(study, only), suites_of(study, workspace.data), []
    origin = describe_origin(workspace, rows, (DEV, *suites))
    check_origin(name, workspace.name, origin)
    frozen = frozen_member(workspace.model, workspace.encoder)
    scores = score(frozen, (DEV, *suites), workspace.data, workspace.folder / "frozen" / "scores")
    frozen_tasks = set(scores) - {DEV}
    for seed in seeds:
        for row in rows:
            try:
                folder = workspace.run_folder(row, seed)
                if is_recorded(name, workspace, row, seed, frozen_tasks):
                    report(f"{name}: {row.name}, seed {seed}: in {RESULTS}")
                    continue
                report(f"{name}: {row.name}, seed {seed}: {folder}")
                record = train(workspace, row, seed)
                record["scores"] = score(adapter_member(folder), suites, workspace.data, folder / "scores")
            except (subprocess.CalledProcessError, PromcseError) as error:
                failed.append(f"{row.name}, seed {seed}: {_reason(error, workspace, row, seed)}")
                report(failed[-1])
                continue
            write_record(name, study, workspace.name, {**origin, "frozen": scores}, row, record)
    return failed


def _reason(error: Exception, workspace: Workspace, row: Row, seed: int) -> str:
    """Return why a run failed."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}, see {workspace.run_folder(row, seed) / 'run.log'}"
    return str(error)
