"""One run: a valid config and a folder in; adapter, results and logs out. How it begins, goes on and ends.

What it does in between is in `promcse_pl.runs.pipeline`.
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
    LOG,
    State,
    Status,
    check_run_folder,
    locked,
    read_config,
    read_results,
    read_status,
    remove_checkpoints,
    write_config,
    write_status,
)
from promcse_pl.runs.failures import actionable_errors
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.runs.pipeline import run_experiment
from promcse_pl.training.distributed import STORE, Ranks, find_ranks
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError, RankError
from promcse_pl.utils.files import remove_leftovers
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.terminal import NO_TERMINAL_WIDTH, logging_to, output_console, plain

if TYPE_CHECKING:
    from promcse_pl.training.checkpoint import Checkpoint

log = logging.getLogger("promcse_pl")


def run_job(config: Config, folder: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Train an adapter, evaluate it, and leave everything in a folder.

    The folder gets config.yaml (alone enough to repeat the run), run.log, metrics.jsonl, adapter/, results.json, status.json,
    inputs.json, bad_rows.txt if rows were skipped, and wandb/ unless tracking is off; while the run goes on also checkpoints/.

    With `trainer.devices` > 1 it starts as many processes and waits for them, unless torchrun or SLURM have started this one as a
    rank. Rank 0 alone writes the folder and the console; the others return {}.

    Args:
        config: Valid settings.
        folder: Absent or empty.
        console: Where to print.

    Returns:
        What results.json holds.

    Raises:
        PromcseError: Whatever the user can mend; the message says how.
        Stopped: A signal ended the run; `resume_job` goes on with it.
    """
    folder = Path(folder)
    ranks = find_ranks(config.trainer)
    is_follower = ranks is not None and ranks.rank > 0
    if not is_follower:
        check_run_folder(folder)
    check_inputs(config)
    if ranks and is_follower:
        return _follow(config, folder, None, ranks)
    with locked(folder) as lock:
        check_run_folder(folder)
        write_config(config, folder / CONFIG)
        if ranks is None:
            return _launch(config, folder, lock)
        return _session(config, folder, console or output_console(), Status(state="running"), None, ranks)


def resume_job(folder: str | Path, console: Console | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a run that was killed, stopped or failed, from its newest whole checkpoint; without one it starts over.

    On the same machine with the same number of threads, the result is bit-identical to that of an uninterrupted run, unless
    `trainer.chunk_tokens` is changed: dropout masks are sampled per chunk.

    Args:
        folder: Of the run.
        console: Where to print.
        overrides: `key=value` of execution settings (`promcse_pl.config.decides`). They are saved to config.yaml and apply to
            later resumes.

    Returns:
        What results.json holds; a finished run is left as it is.

    Raises:
        ConfigError: The folder contains no run, another process runs in it, or an override may change the result.
        DataError: The data, the encoder or a setting have changed since the run began.
        PromcseError, Stopped: As for `run_job`.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        why = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder} holds no run to go on with: {why}. Try: the folder of a run")
    console = console or output_console()
    config = resumed_with(read_config(folder / CONFIG), overrides)
    ranks = find_ranks(config.trainer)
    before = read_status(folder)
    if ranks and ranks.rank:
        return {} if before and before.state == "finished" else run_rank(folder, overrides=overrides)
    with locked(folder) as lock:
        before = read_status(folder)
        if before is not None and before.state == "finished":
            remove_checkpoints(folder)  # the run may have been killed before it did so itself
            console.print(plain(f"the run in {folder} is already finished"), soft_wrap=True)
            return read_results(folder)
        check_inputs(config)
        check_target(folder / ADAPTER)
        remove_leftovers(folder)
        remove_leftovers(folder / CHECKPOINTS)
        if overrides:
            write_config(config, folder / CONFIG)
        return _launch(config, folder, lock) if ranks is None else run_rank(folder, console)


def run_rank(folder: Path, console: Console | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a run, or begin it, as one of its processes; the folder must hold its config and be locked for the run.

    Args:
        folder: Of the run.
        console: Where to print, for rank 0.
        overrides: Overrides of `resume_job`, for a rank that may read config.yaml before rank 0 has saved them.

    Returns:
        What results.json holds on rank 0, {} on the others.
    """
    from promcse_pl.training.checkpoint import newest_checkpoint

    config = resumed_with(read_config(folder / CONFIG), overrides)
    ranks, resume = find_ranks(config.trainer), newest_checkpoint(folder)
    assert ranks is not None, "start it through run_job or resume_job"
    if ranks.rank:
        return _follow(config, folder, resume, ranks)
    status = (read_status(folder) or Status(state="running")).resumed()
    try:  # what was logged after the save is logged again
        with suppress(FileNotFoundError):
            os.truncate(folder / HISTORY, resume.history_bytes if resume else 0)
    except OSError as error:
        raise DataError(f"{folder / HISTORY} cannot be written: {error.strerror}") from error
    return _session(config, folder, console or output_console(), status, resume, ranks)


def _launch(config: Config, folder: Path, lock: int) -> dict[str, Any]:
    """Start the ranks of a run on this machine, wait for them, and leave in the folder how it ended."""
    from promcse_pl.runs.launcher import launch
    from promcse_pl.utils.signals import Stopped

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
    from promcse_pl.utils.signals import StopSignals

    console = Console(stderr=True, width=NO_TERMINAL_WIDTH, quiet=not os.environ.get(STORE))
    with logging_to(None, console), StopSignals() as stop, actionable_errors(config, ranks, folder):
        return run_experiment(config, folder, console, Status(state="running"), resume, stop, ranks)


def _session(
    config: Config, folder: Path, console: Console, status: Status, resume: Checkpoint | None, ranks: Ranks
) -> dict[str, Any]:
    """Run with signals and log in hand, and leave in the folder how it ended."""
    from promcse_pl.tracking.wandb import new_run_id, resolve_mode
    from promcse_pl.utils.signals import Stopped, StopSignals

    if status.wandb_id is None and resolve_mode(config.tracking.wandb) != "disabled":
        status = dataclasses.replace(status, wandb_id=new_run_id())
    with logging_to(folder / LOG, console), StopSignals() as stop:
        write_status(folder, status)
        try:
            with actionable_errors(config, ranks, folder):
                results = run_experiment(config, folder, console, status, resume, stop, ranks)
        except Stopped:
            _leave(folder, "stopped")
            log.info("stopped; to resume: %s", run_command(f"resume={folder}"))
            raise
        except BaseException as error:
            _leave(folder, "failed", f"{type(error).__name__}: {error}")
            raise
        _leave(folder, "finished")
        remove_checkpoints(folder)
        return results


def _leave(folder: Path, state: State, error: str | None = None) -> None:
    """Write how the run ended; a full disk must not hide why."""
    with suppress(PromcseError):
        before = read_status(folder) or Status(state=state)
        write_status(folder, dataclasses.replace(before, state=state, error=error))
