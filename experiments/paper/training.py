"""Train and score the runs of a study; write their records to results.json."""

import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from study import DEV, LEARNING_RATE_OF, OTHER, RESULTS, SHIFTED, SHIFTED_PARTS, Row, Study, Tree, path_of, read_results

from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target, find_targets
from promcse_pl.evaluation.tasks import Task, load_tasks
from promcse_pl.runs.compose import compose_config
from promcse_pl.utils.files import write_text

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = {"minilm", "mpnet"}
"""Models that are trained on a sample; others on the whole data with the recipe of the paper."""
MINIATURE_OVERRIDES = (
    "data.batch_size=128",
    "trainer.epochs=1",
    "trainer.eval_every=10",
    "trainer.precision=float32",  # `auto` could differ between runs
)
SOURCES = {"nli": "nli/nli_train.csv", "wiki": "wiki/wiki.txt.gz"}
SAMPLE_SEED = 42
SUITES = {"sts": ["sts", "sick"], "transfer": ["transfer"], "geometry": ["geometry"], "cxc": ["cxc"]}
KEPT = ("dev_spearman", "best_step", "steps", "rows", "trained_parameters", "training_seconds", "machine", "versions")


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
    def folder(self) -> Path:
        """Folder of the runs of this model and sample."""
        return self.runs / f"{self.model}-{self.rows or 'all'}"

    def sample(self, source: str) -> Path:
        """Return the path of the sample of `nli` or `wiki`."""
        name = SOURCES[source].rpartition("/")[2].removesuffix(".gz")
        return self.runs / "data" / f"{self.rows}-{name}"

    def overrides(self, row: Row, seed: int) -> list[str]:
        """Return the overrides of a run: `python run.py OVERRIDES` repeats it."""
        source = "nli" if is_supervised(row) else "wiki"
        rate = (
            None if any(line.startswith("optim.lr=") for line in row.overrides) else chosen_rate(self.model, row.preset)
        )
        return [
            f"experiment={row.preset}",
            f"model={self.model}",
            *row.overrides,
            *([] if rate is None else [f"optim.lr={rate}"]),
            f"seed={seed}",
            f"data.dir={self.data}",
            *([f"data.train={self.sample(source)}", *MINIATURE_OVERRIDES] if self.rows else []),
            *([f"model.path={self.encoder}"] if self.encoder else []),
            "evaluation=none",
            "tracking=local",
            *self.extra,
        ]

    def run_folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a run, named after the overrides that vary, so that studies share runs."""
        local = ("seed=", "model", "data.", "evaluation=", "tracking=", *MINIATURE_OVERRIDES, *self.extra)
        varying = [line for line in self.overrides(row, seed) if not line.startswith(local)]
        return self.folder / "_".join(varying).replace("/", "-").replace("=", "-") / f"seed{seed}"


def is_supervised(row: Row) -> bool:
    """Return whether a row is trained on NLI triplets."""
    return row.preset.startswith("table1/") and "unsup" not in row.preset


def chosen_rate(model: str, preset: str) -> str | None:
    """Return the learning rate with the best dev score of the study `learning_rate`; None: use that of the recipe."""
    rows = read_results("learning_rate").get(model, {}).get("rows", {})
    wanted = LEARNING_RATE_OF.get(preset, preset)
    scored = {
        line.removeprefix("optim.lr="): row["runs"][0]["dev_spearman"]
        for row in rows.values()
        if row["preset"] == wanted and row["runs"]
        for line in row["overrides"]
        if line.startswith("optim.lr=")
    }
    return max(scored, key=scored.__getitem__) if scored else None


def write_sample(place: Workspace, source: str) -> Tree:
    """Write a seeded sample of a training file, in file order, unless it exists; return its description.

    Args:
        place: Workspace; if its `rows` is 0, the whole file is used and only hashed.
        source: `nli` or `wiki`.
    """
    path = place.sample(source) if place.rows else place.data / SOURCES[source]
    if place.rows and not path.is_file():
        opener = gzip.open if SOURCES[source].endswith(".gz") else open
        with opener(place.data / SOURCES[source], "rt", encoding="utf-8", newline="") as stream:
            lines = list(csv.reader(stream)) if source == "nli" else [[line] for line in stream]
        header, body = (lines[:1], lines[1:]) if source == "nli" else ([], lines)
        kept = sorted(random.Random(SAMPLE_SEED).sample(range(len(body)), place.rows))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8", newline="") as stream:
            if source == "nli":
                csv.writer(stream, lineterminator="\n").writerows([*header, *(body[row] for row in kept)])
            else:
                stream.writelines(line for row in kept for line in body[row])
        new.replace(path)
    return {
        "file": SOURCES[source],
        "rows": place.rows or None,
        "sample_seed": SAMPLE_SEED if place.rows else None,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def train(place: Workspace, row: Row, seed: int) -> Tree:
    """Train a run, or resume it, unless it is finished; return its record.

    Raises:
        CalledProcessError: The run failed.
    """
    folder, overrides = place.run_folder(row, seed), place.overrides(row, seed)
    if not (folder / "results.json").is_file():
        started = (folder / "config.yaml").is_file()
        arguments = [f"resume={folder}"] if started else [*overrides, "--out", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, env=environment, check=True)
    results = json.loads((folder / "results.json").read_text())
    local = [str(path) for path in (place.data, place.runs, place.encoder) if path]
    kept = [line for line in overrides if not any(path in line for path in local)]
    return {"seed": seed, "overrides": kept, **{name: results[name] for name in KEPT}}


def frozen_member(place: Workspace) -> Member:
    """Return the frozen encoder of a model."""
    path = place.encoder or compose_config([f"model={place.model}", "data=demo"], {}).model.path
    return find_targets([str(path)])[0].members[0]


def adapter_member(folder: Path) -> Member:
    """Return the adapter of a run."""
    return find_targets([str(folder)])[0].members[0]


@cache
def tasks_of(suite: str, data: Path) -> list[Task]:
    """Return the tasks of a suite in `SUITES`, or of `dev` (STS-B dev)."""
    if suite == DEV:
        from promcse_pl.data.pairs import load_stsb
        from promcse_pl.evaluation.tasks import pair_task

        return [pair_task(DEV, "dev", [load_stsb(data / "senteval", "dev")])]
    return load_tasks(SUITES[suite], data)


def score(member: Member, suite: str, data: Path, file: Path) -> dict[str, float]:
    """Return the scores of a model on a suite, by task and `TASK SUBSET`; read them from the file if it exists."""
    if not file.is_file():
        with TemporaryDirectory() as cache_folder:
            target = Target(file.parent.parent.name, "model", (member,))
            tree = evaluate([target], tasks_of(suite, data), EmbeddingCache(cache_folder))
        ((_, found),) = tree["targets"].items()
        scores = {}
        for task, one in found["scores"].items():
            scores[task] = one["value"]
            scores |= {f"{task} {name}": subset["spearman"] for name, subset in one.get("subsets", {}).items()}
        write_text(file, json.dumps({"scores": scores, "tasks": tree["tasks"]}, indent=2) + "\n")
    scores = json.loads(file.read_text())["scores"]
    return scores | domain_scores(scores) if suite == "sts" else scores


def domain_scores(scores: dict[str, float]) -> dict[str, float]:
    """Return the proxy of the domain shift: the mean over `SHIFTED_PARTS`, and over all other subsets."""
    parts = {name: value for name, value in scores.items() if " " in name or name in ("STS-B", "SICK-R")}
    shifted = [parts.pop(name) for name in SHIFTED_PARTS]
    return {SHIFTED: sum(shifted) / len(shifted), OTHER: sum(parts.values()) / len(parts)}


def suites_of(study: Study, data: Path) -> tuple[str, ...]:
    """Return the suites of a study, with `cxc` if its files exist."""
    return (*study.suites, "cxc") if "CxC-STS" in study.tasks and (data / "cxc").is_dir() else study.suites


def run_study(
    name: str, study: Study, place: Workspace, seeds: tuple[int, ...], say: Callable[[str], None]
) -> list[str]:
    """Train and score all unfinished runs of a study; write results.json after each.

    Args:
        name: Name of the study.
        study: The study.
        place: Model, data and run folders.
        seeds: Seeds, in the order of training: all rows with the first seed come first.
        say: Called with each progress line.

    Returns:
        The runs that failed.
    """
    results, failed = read_results(name), []
    suites = suites_of(study, place.data)
    sources = sorted({"nli" if is_supervised(row) else "wiki" for row in study.rows})
    tree: Tree = {
        "data": {source: write_sample(place, source) for source in sources},
        "frozen": {},
        "rows": {row.name: {"preset": row.preset, "overrides": [*row.overrides], "runs": []} for row in study.rows},
    }
    for suite in (DEV, *suites):
        file = place.folder / "frozen" / "scores" / f"{suite}.json"
        tree["frozen"] |= score(frozen_member(place), suite, place.data, file)
        described = json.loads(file.read_text())["tasks"]
        tree.setdefault("tasks", {}).update({task: about.get("files") for task, about in described.items()})
    for seed in seeds:
        for row in study.rows:
            folder = place.run_folder(row, seed)
            say(f"{name}: {row.name}, seed {seed}: {folder}")
            try:
                record = train(place, row, seed)
                record["scores"] = {}
                for suite in suites:
                    file = folder / "scores" / f"{suite}.json"
                    record["scores"] |= score(adapter_member(folder), suite, place.data, file)
            except subprocess.CalledProcessError as error:
                failed.append(f"{row.name}, seed {seed}: exit code {error.returncode}, see {folder / 'run.log'}")
                say(failed[-1])
                continue
            tree["rows"][row.name]["runs"].append(record)
            results[place.model] = tree
            write_text(path_of(name) / RESULTS, json.dumps(results, indent=2) + "\n")
    return failed
