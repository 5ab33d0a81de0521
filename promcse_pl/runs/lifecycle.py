"""The lifecycle of a run: start, resume, and record the final state. `promcse_pl.runs.pipeline` trains and evaluates.

Errors in the config, files and folder are found before torch is imported.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from promcse_pl.adapter_folder import check_target
from promcse_pl.config import Config, resumed_with
from promcse_pl.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    INPUTS,
    LOG,
    RESULTS,
    START,
    STATUS,
    State,
    Status,
    check_run_folder,
    locked,
    read_configs,
    read_results,
    read_status,
    remove_checkpoints,
    remove_first_files,
    write_config,
    write_status,
)
from promcse_pl.runs.failures import actionable_errors
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.tracking.wandb import new_run_id, resolve_mode
from promcse_pl.training.context import RunContext
from promcse_pl.training.distributed import STORE, find_ranks
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError, RankError
from promcse_pl.utils.files import remove_leftovers
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.paths import expand, run_command
from promcse_pl.utils.signals import Stopped
from promcse_pl.utils.terminal import NO_TERMINAL_WIDTH, logging_to, output_console, plain

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger

log = logging.getLogger("promcse_pl")


def run_job(
    config: Config,
    folder: str | Path,
    console: Console | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    note: str | None = None,
) -> dict[str, Any]:
    """Train an adapter and evaluate it.

    The run folder contains config.yaml (repeats the run), run.log, metrics.jsonl, adapter/, results.json, status.json,
    inputs.json, bad_rows.txt if rows were skipped, wandb/ unless tracking is off, and checkpoints/ until the run is finished.

    With `trainer.devices` > 1, it starts as many processes and waits for them, unless torchrun or SLURM have started this process
    as a rank. Only rank 0 writes to the folder and the console; the other ranks return {}.

    Args:
        config: Valid settings.
        folder: Run folder; must be absent or empty.
        console: Console for output; None for standard output.
        callbacks, loggers: Additional ones for the Lightning Trainer; not with `trainer.devices` > 1.
        note: Line on the config to print first.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: A setting is not valid; if the encoder or the data show it before training, the folder is as it was before.
        PromcseError: Another error that the user can correct; the message says how.
        Stopped: A signal stopped the run; `resume_job` resumes it.
    """
    folder, console = expand(folder), console or output_console()
    ranks = find_ranks(config.trainer)
    if ranks is None and (callbacks or loggers):
        raise ConfigError(
            f"callbacks and loggers cannot be sent to the {config.trainer.devices} processes of trainer.devices. Try: "
            "trainer.devices=1"
        )
    is_main = ranks is None or ranks.rank == 0
    if is_main:
        check_run_folder(folder)
    check_inputs(config)
    if is_main and note:
        console.print(plain(note), soft_wrap=True)
    if ranks is not None:
        run = RunContext(
            config=config,
            typed=config,
            folder=folder,
            ranks=ranks,
            console=console,
            callbacks=callbacks,
            loggers=loggers,
        )
        if not run.is_main:
            return _run_as_follower(run)
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    with locked(folder) as lock:
        check_run_folder(folder)
        try:
            write_config(config, folder / CONFIG)
            return _launch(config, folder, lock) if ranks is None else _run_as_main(run)
        except ConfigError:  # resuming would refuse the corrected setting; a sweep needs the status of its job
            if not (folder / INPUTS).exists() and START not in (before or ()):
                remove_first_files(folder, before=before)
            raise


def resume_job(folder: str | Path, console: Console | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Resume a run that was killed, stopped or failed, from its newest valid checkpoint; without one, from step 0.

    On the same machine with the same number of threads, the result is bit-identical to that of an uninterrupted run, unless
    `trainer.chunk_tokens` is changed: dropout masks are sampled per chunk.

    Args:
        folder: Run folder.
        console: Console for output; None for standard output.
        overrides: `key=value` of execution settings (`promcse_pl.config.decides`). They are saved to config.yaml and apply to
            later resumes.

    Returns:
        The content of results.json. A finished run is not changed.

    Raises:
        ConfigError: The folder contains no run, another process runs in it, or an override may change the result.
        DataError: The data, the encoder or a setting have changed since the run started.
        PromcseError, Stopped: As for `run_job`.
    """
    folder, console = expand(folder), console or output_console()
    if not (folder / CONFIG).is_file():
        reason = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder} contains no run to resume: {reason}. Try: the folder of a run")
    typed, config = _saved_configs(folder, overrides)
    ranks = find_ranks(config.trainer)
    status = read_status(folder)
    if ranks and ranks.rank:
        return {} if status and status.state == "finished" else run_rank(folder, overrides=overrides)
    with locked(folder) as lock:
        status = read_status(folder)
        if status is not None and status.state == "finished":
            return _finished_results(folder, console)
        check_inputs(config)
        check_target(folder / ADAPTER)
        remove_leftovers(folder)
        remove_leftovers(folder / CHECKPOINTS)
        if overrides:
            write_config(typed, folder / CONFIG, config)
        return _launch(config, folder, lock) if ranks is None else run_rank(folder, console)


def run_rank(folder: Path, console: Console | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Start or resume a run as one of its ranks; the folder must contain config.yaml and be locked for the run.

    Args:
        folder: Run folder.
        console: Console for the output of rank 0; None for standard output.
        overrides: Overrides of `resume_job`, for a rank that may read config.yaml before rank 0 has saved them.

    Returns:
        The content of results.json on rank 0; {} on other ranks.
    """
    from promcse_pl.training.checkpoint import newest_checkpoint  # imports torch

    typed, config = _saved_configs(folder, overrides)
    ranks, checkpoint = find_ranks(config.trainer), newest_checkpoint(folder)
    assert ranks is not None, "start the ranks through run_job or resume_job"
    console = console or output_console()
    run = RunContext(config=config, typed=typed, folder=folder, ranks=ranks, console=console, checkpoint=checkpoint)
    if not run.is_main:
        return _run_as_follower(run)
    status = (read_status(folder) or run.status).resumed()
    try:  # entries after the checkpoint are logged again
        with suppress(FileNotFoundError):
            os.truncate(folder / HISTORY, checkpoint.history_bytes if checkpoint else 0)
    except OSError as error:
        raise DataError(f"{folder / HISTORY} cannot be written: {error.strerror}") from error
    return _run_as_main(dataclasses.replace(run, status=status))


def _saved_configs(folder: Path, overrides: Sequence[str]) -> tuple[Config, Config]:
    """Return a run's settings as typed and as resolved when it started, both with overrides of execution settings."""
    typed, resolved = read_configs(folder / CONFIG)
    return resumed_with(typed, overrides), resumed_with(resolved, overrides)


def _run_as_main(run: RunContext) -> dict[str, Any]:
    """Run the pipeline as rank 0 and record in the run folder how it ends."""
    if run.status.wandb_id is None and resolve_mode(run.config.tracking.wandb) != "disabled":
        run = dataclasses.replace(run, status=dataclasses.replace(run.status, wandb_id=new_run_id()))
    missing = run.status.callbacks
    if passed := [type(part).__name__ for part in (*run.callbacks, *run.loggers)]:
        run, missing = dataclasses.replace(run, status=dataclasses.replace(run.status, callbacks=passed)), []
    is_new = not (run.folder / STATUS).exists()
    with logging_to(run.folder / LOG, run.console), run.stop:
        if missing:
            log.warning(
                "the run is resumed without %s: a resume does not recreate callbacks and loggers", ", ".join(missing)
            )
        write_status(run.folder, run.status)
        try:
            results = _run_pipeline(run)
        except Stopped:
            _record_end(run.folder, "stopped")
            log.info("stopped; to resume: %s", run_command(f"resume={run.folder}"))
            raise
        except BaseException as error:
            _record_end(run.folder, "failed", f"{type(error).__name__}: {error}")
            is_resumable = isinstance(error, PromcseError) and not (is_new and isinstance(error, ConfigError))
            if is_resumable and not (run.folder / INPUTS).exists():
                retry = run_command(f"resume={run.folder}")
                log.info(
                    "nothing was trained yet. If a setting is wrong, start a new run in another folder; otherwise fix the cause, "
                    "then: %s",
                    retry,
                )
            raise
        _record_end(run.folder, "finished", stopped_early=results["stopped_early"])
        remove_checkpoints(run.folder)
        return results


def _run_as_follower(run: RunContext) -> dict[str, Any]:
    """Run the pipeline as another rank than 0: nothing is written to the run folder, log lines go to stderr."""
    console = Console(stderr=True, width=NO_TERMINAL_WIDTH, quiet=not os.environ.get(STORE))
    with logging_to(None, console), run.stop:
        return _run_pipeline(dataclasses.replace(run, console=console))


def _run_pipeline(run: RunContext) -> dict[str, Any]:
    with actionable_errors(run):
        with run.console.status("loading torch"), without_gc():
            from promcse_pl.runs.pipeline import run_pipeline
        return run_pipeline(run)


def _launch(config: Config, folder: Path, lock: int) -> dict[str, Any]:
    """Start the ranks of a run on this machine, wait for them, and record a failure that rank 0 could not record."""
    from promcse_pl.runs.launcher import launch

    try:
        launch(folder, config.trainer.devices, lock)
    except (Stopped, RankError) as error:
        status = read_status(folder)
        if status is not None and status.state == "finished":  # a rank or a signal cannot harm a finished run
            return read_results(folder)
        if isinstance(error, Stopped):
            _record_end(folder, "stopped")
            raise
        _record_end(folder, "failed", f"RankError: {error}")
        with logging_to(folder / LOG, output_console()):
            raise
    return read_results(folder)


def _finished_results(folder: Path, console: Console) -> dict[str, Any]:
    """Return the results of a finished run; remove checkpoints that remain if it was killed just before it finished."""
    remove_checkpoints(folder)
    if not (folder / RESULTS).exists():
        raise DataError(
            f"the run in {folder} is finished, but its {RESULTS} is missing. Its adapter is complete. To evaluate it: "
            f"promcse evaluate {folder} --tasks sts,sick --data FOLDER"
        )
    console.print(plain(f"the run in {folder} is already finished"), soft_wrap=True)
    return read_results(folder)


def _record_end(folder: Path, state: State, error: str | None = None, *, stopped_early: str | None = None) -> None:
    """Write to status.json how the run ended; a failure to write must not hide its error."""
    with suppress(PromcseError):
        status = read_status(folder) or Status(state=state)
        write_status(folder, dataclasses.replace(status, state=state, error=error, stopped_early=stopped_early))
