"""One run: a valid config and a folder in; adapter, results and logs out. The only place that wires all layers."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from promcse_pl.config import DATA_SUITES, Config
from promcse_pl.errors import ConfigError, DataError, EncoderError
from promcse_pl.folder import ADAPTER, BAD_ROWS, CONFIG, HISTORY, LOG, RESULTS, write_text
from promcse_pl.terminal import ConsoleHandler, config_tree, output_console, progress_bar, stages
from promcse_pl.version import __version__

log = logging.getLogger("promcse_pl")


def read_config(path: Path) -> Config:
    """Read a saved config.yaml.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not fit the schema.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    return Config.from_dict(raw)


def write_config(config: Config, path: Path) -> Path:
    """Save a config so that `read_config` gives it back; return the path."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    write_text(path, f"# promcse train THIS_FILE --out NEW_FOLDER repeats the run\n{text}")
    return path


def run_job(config: Config, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Train an adapter, evaluate it, and leave everything in a folder.

    The folder gets config.yaml (alone enough to repeat the run), run.log, metrics.jsonl, adapter/, results.json, bad_rows.txt if
    rows were skipped, and wandb/ unless tracking is off.

    Args:
        config: Valid settings.
        folder: Made if absent; must not hold a run.
        console: Where to print.

    Returns:
        What results.json holds.

    Raises:
        PromcseError: Whatever the user can mend; the message says how.
    """
    console = console or output_console()
    started = time.perf_counter()
    if (folder / CONFIG).exists():
        raise ConfigError(f"{folder} already holds a run. Try another folder, or delete this one")
    check_inputs(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run's folder {folder}: {error.strerror}") from error
    with _logging_to(folder / LOG, console):
        return _run(config, folder, console, started)


def check_inputs(config: Config) -> None:
    """Look whether the files, folders and modes that a config names are there: in a second, before torch and any model.

    Raises:
        ConfigError, DataError, EncoderError: Something is missing.
    """
    from promcse_pl.data.sources import data_dir, dev_pairs, find_file, senteval_dir
    from promcse_pl.evaluation.tasks import load_tasks
    from promcse_pl.tracking.wandb import resolve_mode

    resolve_mode(config.tracking.wandb)
    path = config.model.path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().is_dir():
        raise EncoderError(
            f"the encoder folder {path} does not exist (current folder: {Path.cwd()}). Try: model.path=FOLDER"
        )
    if set(config.evaluation.tasks) & set(DATA_SUITES):
        senteval_dir(config.data)
    dev = None if config.data.dev == "holdout" else dev_pairs(config.data)
    # a missing file must not show itself after hours of training
    for task in load_tasks(config.evaluation.tasks, data_dir(config.data)):
        if dev is not None and dev.sha256 in {file["sha256"] for file in task.files}:
            raise ConfigError(
                f"data.dev={config.data.dev} is also tested on ({task.name}): a model chosen by it has seen the answers. "
                "Try: data.dev=FILE with other pairs"
            )
    if config.data.train != "demo":
        find_file(config.data.train, config.data, "data.train")


def _run(config: Config, folder: Path, console: Console, started: float) -> dict[str, Any]:
    with console.status("loading torch"):  # late: mistakes in a config must not wait for it
        import torch

        from promcse_pl.adapter.files import save_adapter
        from promcse_pl.evaluation.report import headline, tables
        from promcse_pl.tracking.local import JsonlLogger
        from promcse_pl.tracking.wandb import abandon_wandb, finish_wandb, start_wandb
        from promcse_pl.training.fit import build_data, build_encoder, build_mlm_head, fit, resolve_machine

    config, device = resolve_machine(config)
    console.print(config_tree(config.to_dict()))
    encoder = build_encoder(config)
    model = dataclasses.replace(config.model, revision=encoder.backbone.identity.revision)
    config = dataclasses.replace(
        config, model=model
    )  # the commit that was read, so that the saved config repeats the run
    mlm_head = build_mlm_head(config, encoder.backbone)
    with progress_bar(console, "tokenising", None) as progress:
        data = build_data(config, encoder, progress)
    _report_rows(data, folder)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters())
    log.info("trained: %s of %s parameters (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    write_config(config, folder / CONFIG)

    wandb_logger = start_wandb(config, folder)
    loggers = [JsonlLogger(folder / HISTORY), *([wandb_logger] if wandb_logger else [])]
    try:
        fitted = fit(
            config,
            encoder,
            data,
            device=device,
            mlm_head=mlm_head,
            loggers=loggers,
            folder=folder,
            show_bar=console.is_terminal,
        )
        summary = {
            "rows": len(data.token_rows),
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "dev": data.dev.name if data.dev else None,
            "dev_spearman": None if fitted.dev_score is None else round(100 * fitted.dev_score, 4),
            "seed": config.seed,
        }
        save_adapter(encoder.to("cpu"), folder / ADAPTER, training=summary)
        log.info("evaluating %s", "the adapter and the frozen encoder" if config.evaluation.frozen else "the adapter")
        with stages(console) as report:
            evaluation = _evaluate(config, folder / ADAPTER, data.dev, device.type, report)
    except BaseException:
        if wandb_logger:
            abandon_wandb(wandb_logger)
        raise
    rows = data.token_rows
    results = {
        "scores": headline(evaluation),
        **summary,
        "trained_parameters": trained,
        "trained_share": trained / total,
        "training_seconds": round(fitted.seconds, 2),
        "rows_per_second": round(fitted.rows_per_second, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "tokens": {"cache": rows.fingerprint, "truncated": rows.truncated, "skipped_rows": len(rows.bad_rows)},
        "evaluation": evaluation,
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": device.type, "threads": torch.get_num_threads(), "precision": config.trainer.precision},
    }
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    for warning in evaluation.get("warnings", ()):
        log.warning("%s", warning)
    for table in tables(evaluation):
        console.print(table)
    sync = finish_wandb(wandb_logger, results, folder / ADAPTER) if wandb_logger else None
    if sync:
        log.info("the W&B run is offline. To upload it: wandb login && %s", sync)
    log.info("adapter: %s (%.0f s in all)", folder / ADAPTER, results["seconds"])
    return results


def _evaluate(config: Config, adapter: Path, dev: Any, device: str, report: Any) -> dict[str, Any]:  # noqa: ANN401
    """Score the adapter as it lies on disk, beside the frozen encoder if asked, in float32; nothing to score on: {}."""
    from promcse_pl.data.sources import cache_dir, data_dir
    from promcse_pl.embedder import PromCSE
    from promcse_pl.evaluation.suite import evaluate
    from promcse_pl.evaluation.targets import Member, Target, frozen_target
    from promcse_pl.evaluation.tasks import load_tasks, pair_task
    from promcse_pl.evaluation.vectors import VectorCache

    tasks = load_tasks(config.evaluation.tasks, data_dir(config.data))
    if dev is not None:
        tasks.append(pair_task("dev", "dev", [dev]))
    if not tasks:
        return {}
    model = PromCSE.load(adapter, device=device)
    targets = [Target("adapter", "adapter", (Member(lambda: model, config.seed),))]
    if config.evaluation.frozen:
        targets = [frozen_target(model), *targets]
    return evaluate(targets, tasks, VectorCache(cache_dir(config.data.cache_dir) / "vectors"), report)


def _report_rows(data: Any, folder: Path) -> None:  # noqa: ANN401  (PromcseDataModule, imported late)
    rows = data.token_rows
    log.info(
        "%s: %s rows, %s tokens (%s)",
        data.config.train,
        f"{len(rows):,}",
        f"{rows.tokens_total:,}",
        "from the cache" if rows.reused else "tokenised now",
    )
    if len(rows) < 2:
        raise DataError(f"{data.config.train} has {len(rows)} rows; a batch needs at least 2")
    if rows.truncated:
        log.info("%s sentences were cut to %d tokens", f"{rows.truncated:,}", data.config.max_length)
    if rows.bad_rows:
        write_text(folder / BAD_ROWS, "".join(f"{row}\n" for row in rows.bad_rows))
        log.warning("%d bad rows were skipped; they are listed in %s", len(rows.bad_rows), folder / BAD_ROWS)
    if data.dev is None:
        log.info("no development set: the last step is kept")
    else:
        log.info("development set: %s, %d pairs", data.dev.name, len(data.dev))


@contextmanager
def _logging_to(path: Path, console: Console) -> Iterator[None]:
    """Send the package's log lines to the terminal and, with times, to a file."""
    try:
        to_file = logging.FileHandler(path, mode="x", encoding="utf-8")  # claims the folder: of two runs one is refused
    except FileExistsError:
        raise ConfigError(f"{path.parent} already holds a run. Try another folder, or delete this one") from None
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_terminal = ConsoleHandler(console)
    handlers = (to_file, to_terminal)
    level = log.level
    log.setLevel(logging.INFO)
    propagate, log.propagate = log.propagate, False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        to_file.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s: %s", (type(error).__name__, error), None))
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate
