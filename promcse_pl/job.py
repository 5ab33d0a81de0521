"""One run: a valid config and a folder in; adapter, results and logs out. The only place that wires all layers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from promcse_pl.config import DATA_SUITES, Config
from promcse_pl.errors import ConfigError, DataError, EncoderError, PromcseError, RankError
from promcse_pl.folder import (
    ADAPTER,
    BAD_ROWS,
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    LOCK,
    LOG,
    RESULTS,
    State,
    Status,
    locked,
    read_status,
    write_status,
    write_text,
)
from promcse_pl.imports import unwatched_imports
from promcse_pl.logs import logging_to
from promcse_pl.paths import expand, hide_home, is_folder
from promcse_pl.terminal import NO_TERMINAL_WIDTH, config_tree, output_console, progress_bar, stages
from promcse_pl.training.ranks import (
    STORE,
    Ranks,
    compare,
    find_ranks,
    first_rank_first,
    join,
    leave,
    of_rank_zero,
    told,
)
from promcse_pl.training.trouble import plain_errors
from promcse_pl.version import __version__

if TYPE_CHECKING:
    from promcse_pl.training.checkpoint import Checkpoint
    from promcse_pl.training.stop import StopSignals

log = logging.getLogger("promcse_pl")


def read_config(path: Path) -> Config:
    """Read a saved config.yaml.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not fit the schema.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {str(error)[:1000]}") from error
    return Config.from_dict(raw)


def write_config(config: Config, path: Path) -> Path:
    """Save a config so that `read_config` gives it back, with ~ for the home folder; return the path."""
    text = yaml.safe_dump(hide_home(config.to_dict()), sort_keys=False, allow_unicode=True)
    write_text(path, f"# promcse train THIS_FILE --out NEW_FOLDER repeats the run\n{text}")
    return path


def run_job(config: Config, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Train an adapter, evaluate it, and leave everything in a folder.

    The folder gets config.yaml (alone enough to repeat the run), run.log, metrics.jsonl, adapter/, results.json, status.json,
    inputs.json, bad_rows.txt if rows were skipped, and wandb/ unless tracking is off; while the run goes on also checkpoints/.

    With `trainer.devices` > 1 it starts as many processes and waits for them, unless torchrun or SLURM have started this one as a
    rank. Rank 0 alone writes the folder and the console; the others return {}.

    Args:
        config: Valid settings.
        folder: Made if absent; must not hold a run.
        console: Where to print.

    Returns:
        What results.json holds.

    Raises:
        PromcseError: Whatever the user can mend; the message says how.
        Stopped: A signal ended the run; `resume_job` goes on with it.
    """
    check_inputs(config)
    ranks = find_ranks(config.trainer)
    if ranks and ranks.rank:
        return _follow(config, folder, None, ranks)
    with locked(folder) as lock:
        if (folder / CONFIG).exists():
            raise ConfigError(
                f"{folder} already holds a run. Try another folder, or python run.py resume={folder} to go on with it"
            )
        write_config(config, folder / CONFIG)
        if ranks is None:
            return _launch(config, folder, lock)
        return _session(config, folder, console or output_console(), Status(state="running"), None, ranks)


def resume_job(folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Go on with a run that was killed, stopped or failed, from its newest whole checkpoint; without one it starts over.

    On the same machine and number of threads the result is bit for bit that of the uninterrupted run.

    Args:
        folder: Of the run.
        console: Where to print.

    Returns:
        What results.json holds; a finished run is left as it is.

    Raises:
        ConfigError: The folder holds no run, or another process is at work in it.
        DataError: The data, the encoder or a setting have changed since the run began.
        PromcseError, Stopped: As for `run_job`.
    """
    if not (folder / CONFIG).is_file():
        why = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder} holds no run to go on with: {why}. Try: the folder of a run")
    console = console or output_console()
    config = read_config(folder / CONFIG)
    ranks = find_ranks(config.trainer)
    before = read_status(folder)
    if ranks and ranks.rank:
        return {} if before and before.state == "finished" else take_part(folder)
    with locked(folder) as lock:
        before = read_status(folder)
        if before is not None and before.state == "finished":
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # it may have been killed before it did so itself
            console.print(f"the run in {folder} is finished; nothing is left to do", soft_wrap=True)
            return read_results(folder)
        check_inputs(config)
        _remove_leftovers(folder)
        return _launch(config, folder, lock) if ranks is None else take_part(folder, console)


def take_part(folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Go on with a run, or begin it, as one of its processes; the folder must hold its config and be locked for the run.

    Args:
        folder: Of the run.
        console: Where to print, for rank 0.

    Returns:
        What results.json holds on rank 0, {} on the others.
    """
    from promcse_pl.training.checkpoint import newest_checkpoint

    config = read_config(folder / CONFIG)
    ranks, resume = find_ranks(config.trainer), newest_checkpoint(folder)
    assert ranks is not None, "start it through run_job or resume_job"
    if ranks.rank:
        return _follow(config, folder, resume, ranks)
    status = (read_status(folder) or Status(state="running")).resumed()
    with suppress(FileNotFoundError):  # what was logged after the save is logged again
        os.truncate(folder / HISTORY, resume.history_bytes if resume else 0)
    return _session(config, folder, console or output_console(), status, resume, ranks)


def _launch(config: Config, folder: Path, lock: int) -> dict[str, Any]:
    """Start the ranks of a run on this machine, wait for them, and leave in the folder how it ended."""
    from promcse_pl.launch import launch
    from promcse_pl.training.stop import Stopped

    try:
        launch(folder, config.trainer.devices, lock)
    except (Stopped, RankError) as error:
        status = read_status(folder)
        if status is not None and status.state == "finished":  # what came later costs nothing
            return read_results(folder)
        if isinstance(error, Stopped):
            _leave(folder, "stopped")
            raise
        _leave(folder, "failed", f"RankError: {error}")  # what rank 0 could not know
        with logging_to(folder / LOG, output_console()):
            raise
    return read_results(folder)


def _follow(config: Config, folder: Path, resume: Checkpoint | None, ranks: Ranks) -> dict[str, Any]:
    """Take part in a run as another rank than the first: it writes nothing into the folder, and its log lines to stderr."""
    from promcse_pl.training.stop import StopSignals

    console = Console(stderr=True, width=NO_TERMINAL_WIDTH, quiet=not os.environ.get(STORE))
    with logging_to(None, console), StopSignals() as stop, plain_errors(config, ranks):
        return _run(config, folder, console, Status(state="running"), resume, stop, ranks)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing under a temporary name."""
    for path in folder.glob(".*"):
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        DataError: There are none, or the file is damaged.
    """
    try:
        results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / RESULTS} cannot be read: {error}") from error
    return results


def _session(
    config: Config, folder: Path, console: Console, status: Status, resume: Checkpoint | None, ranks: Ranks
) -> dict[str, Any]:
    """Run with signals and log in hand, and leave in the folder how it ended."""
    from promcse_pl.tracking.wandb import new_run_id, resolve_mode
    from promcse_pl.training.stop import Stopped, StopSignals

    if status.wandb_id is None and resolve_mode(config.tracking.wandb) != "disabled":
        status = dataclasses.replace(status, wandb_id=new_run_id())
    with logging_to(folder / LOG, console), StopSignals() as stop:
        write_status(folder, status)
        try:
            with plain_errors(config, ranks):
                results = _run(config, folder, console, status, resume, stop, ranks)
        except Stopped:
            _leave(folder, "stopped")
            log.info("stopped; to go on: python run.py resume=%s", folder)
            raise
        except BaseException as error:
            _leave(folder, "failed", f"{type(error).__name__}: {error}")
            raise
        _leave(folder, "finished")
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return results


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
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not is_folder(expand(path)):
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


def _run(
    config: Config,
    folder: Path,
    console: Console,
    status: Status,
    resume: Checkpoint | None,
    stop: StopSignals,
    ranks: Ranks,
) -> dict[str, Any]:
    started = time.perf_counter()
    with console.status("loading torch"), unwatched_imports():  # late: mistakes in a config must not wait for it
        import torch

        from promcse_pl.adapter.files import save_adapter
        from promcse_pl.evaluation.report import headline, tables
        from promcse_pl.tracking.local import JsonlLogger
        from promcse_pl.tracking.wandb import finish_wandb, start_wandb
        from promcse_pl.training.fit import build_data, build_encoder, build_mlm_head, fit, resolve_machine
        from promcse_pl.training.inputs import describe_inputs, record_inputs

    join(ranks, config.trainer)
    compare(told(config, resume.step if resume else None))
    folder, own_folder = of_rank_zero(folder), folder
    if folder != own_folder:  # torchrun composes a config in every process, and the clock went on
        with suppress(OSError):
            own_folder.rmdir()
    config, device = resolve_machine(Config.from_dict(hide_home(config.to_dict())))
    if ranks.rank == 0:
        console.print(config_tree(config.to_dict()))
    encoder = build_encoder(config)
    model = dataclasses.replace(config.model, revision=encoder.backbone.identity.revision)
    config = dataclasses.replace(
        config, model=model
    )  # the commit that was read, so that the saved config repeats the run
    mlm_head = build_mlm_head(config, encoder.backbone)
    with first_rank_first(ranks), progress_bar(console, "tokenising", None) as progress:
        data = build_data(config, encoder, progress)
    _report_rows(data, folder, ranks)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters())
    log.info("trained: %s of %s parameters (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    inputs = describe_inputs(config, encoder, data)
    if ranks.rank == 0:
        record_inputs(folder, inputs)
        write_config(config, folder / CONFIG)  # again: what `auto` left open is settled now
    compare({name: inputs[name]["sha256"] for name in ("data.train", "data.dev", "model.path")})
    if resume:
        log.info("going on after step %d", resume.step)

    wandb_run = start_wandb(config, folder, status.wandb_id) if ranks.rank == 0 and status.wandb_id else None
    try:
        fitted = fit(
            config,
            encoder,
            data,
            device=device,
            mlm_head=mlm_head,
            loggers=[JsonlLogger(folder / HISTORY)] if ranks.rank == 0 else [],
            folder=folder,
            console=console,
            status=status,
            stop=stop,
            started=started,
            resume=resume,
            ranks=ranks,
        )
        leave(ranks)
        if ranks.rank:
            return {}
        summary = {
            "rows": len(data.token_rows),
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "dev": data.dev.name if data.dev else None,
            "dev_spearman": None if fitted.dev_score is None else round(100 * fitted.dev_score, 4),
            "seed": config.seed,
        }
        save_adapter(encoder.to("cpu"), folder / ADAPTER, training=summary)
        if data.dev or config.evaluation.tasks:
            log.info(
                "evaluating %s", "the adapter and the frozen encoder" if config.evaluation.frozen else "the adapter"
            )
        with stages(console) as report:
            evaluation = _evaluate(config, folder / ADAPTER, data.dev, device.type, report)
    except BaseException:
        if wandb_run:
            wandb_run.finish(exit_code=1)
        raise
    rows = data.token_rows
    results = {
        "scores": headline(evaluation),
        **summary,
        "trained_parameters": trained,
        "trained_share": trained / total,
        "training_seconds": round(fitted.seconds, 2),
        "rows_per_second": round(fitted.rows_per_second, 2),
        "seconds": round(fitted.earlier_seconds + time.perf_counter() - started, 2),
        "tokens": {"cache": rows.fingerprint, "truncated": rows.truncated, "skipped_rows": len(rows.bad_rows)},
        "evaluation": evaluation,
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": device.type, "threads": torch.get_num_threads(), "precision": config.trainer.precision},
    }
    write_text(folder / RESULTS, json.dumps(hide_home(results), indent=2) + "\n")
    for warning in evaluation.get("warnings", ()):
        log.warning("%s", warning)
    for table in tables(evaluation):
        console.print(table)
    if wandb_run:
        finish_wandb(wandb_run, results, folder / ADAPTER)
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


def _report_rows(data: Any, folder: Path, ranks: Ranks) -> None:  # noqa: ANN401  (PromcseDataModule, imported late)
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
    if len(rows) < data.config.batch_size:
        log.info(
            "they are fewer than data.batch_size=%d: an epoch is a single step. For more of them: data.batch_size=%d, say",
            data.config.batch_size,
            max(2, len(rows) // 10),
        )
    if rows.truncated:
        log.info("%s sentences were cut to %d tokens", f"{rows.truncated:,}", data.config.max_length)
    if rows.bad_rows:
        if ranks.rank == 0:
            write_text(folder / BAD_ROWS, "".join(f"{hide_home(str(row))}\n" for row in rows.bad_rows))
        log.warning("%d bad rows were skipped; they are listed in %s", len(rows.bad_rows), folder / BAD_ROWS)
    if data.dev is None:
        log.info("no development set: the last step is kept")
    else:
        log.info("development set: %s, %s pairs", data.dev.name, f"{len(data.dev):,}")


def _leave(folder: Path, state: State, error: str | None = None) -> None:
    """Write how the run ended; a full disk must not hide why."""
    with suppress(PromcseError):
        before = read_status(folder) or Status(state=state)
        write_status(folder, dataclasses.replace(before, state=state, error=error))
