"""Where a run stands, on disk: enough to go on as if nothing had happened, without pickle, whole or absent.

A checkpoint is a folder checkpoints/step-N with tensors.safetensors and state.json. It is written atomically
(`promcse_pl.utils.files.publish`); a checksum detects damage. The frozen encoder is not in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from promcse_pl.data.batch import TrainBatch
from promcse_pl.run_folder import CHECKPOINTS, HISTORY, NON_FINITE, Status, checkpoint_folders, write_status
from promcse_pl.training.distributed import of_every_rank
from promcse_pl.training.gather import sum_over_ranks
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import DataError, NonFiniteError
from promcse_pl.utils.files import publish, staging_folder, sync, write_bytes
from promcse_pl.utils.paths import require_regular_file
from promcse_pl.utils.signals import Stopped, StopSignals

log = logging.getLogger("promcse_pl")

FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"
KEPT = 2
"""Checkpoints that stay: should the newest turn out to be torn, there is another."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint.

    Attributes:
        path: Its folder.
        step: Optimiser steps done.
        history_bytes: Size of the run's history at that step.
        state: What Lightning saved.
    """

    path: Path
    step: int
    history_bytes: int
    state: dict[str, Any]


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run's folder that is whole; None if there is none."""
    history = run / HISTORY
    there = checkpoint_folders(run)
    for path in reversed(there):
        try:
            found = read_checkpoint(path)
            if (history.stat().st_size if history.is_file() else 0) < found.history_bytes:
                raise DataError(f"{path} does not fit {HISTORY}, which is shorter than it was at that step")
            return found
        except DataError as error:
            log.warning("%s; %s", error, "the run starts over" if path == there[0] else "an older one is taken")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's folder.

    Raises:
        DataError: A file is missing, cut short, changed, or of a newer format.
    """
    try:
        stored = json.loads(require_regular_file(path / STATE).read_bytes())
        tensors = require_regular_file(path / TENSORS).read_bytes()
        if stored["format"] != FORMAT:
            raise DataError(f"{path} has format {stored['format']}; this version reads {FORMAT}")
        if stored["sha256"] != _checksum(stored, tensors):
            raise DataError(f"{path} is damaged: its checksum is wrong")
        return Checkpoint(path, stored["step"], stored["history_bytes"], _from_plain(stored["state"], load(tensors)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error


def _checksum(stored: dict[str, Any], tensors: bytes) -> str:
    described = {name: value for name, value in stored.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode() + tensors).hexdigest()


class RunCheckpoints(CheckpointIO):
    """Lightning's door to the folders above.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint and remove those that are too old.

        Raises:
            DataError: It cannot be written; what was there before is untouched.
        """
        folder, tensors = Path(path), dict[str, Tensor]()
        history = self.run / HISTORY
        stored = {
            "format": FORMAT,
            "step": checkpoint["global_step"],
            "history_bytes": history.stat().st_size if history.exists() else 0,
            "state": _to_plain(checkpoint, tensors),
        }
        if history.exists():
            sync(history)
        content = save(tensors)
        stored["sha256"] = _checksum(stored, content)
        try:
            with staging_folder(folder.parent) as staged:
                (staged / TENSORS).write_bytes(content)
                (staged / STATE).write_bytes(json.dumps(stored).encode())
                publish(staged, folder, replace=True)  # an existing checkpoint of this step is damaged
        except OSError as error:
            raise DataError(f"cannot save the run to {folder}: {error.strerror or error}") from error
        for path in checkpoint_folders(self.run)[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint for Lightning."""
        return read_checkpoint(Path(path)).state

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


def _to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for a tree of plain values; its tensors are moved to `tensors` and referred to by name."""
    match value:
        case Tensor():
            tensors[name := str(len(tensors))] = value.detach().cpu().contiguous()
            return {"tensor": name}
        case dict():
            return {"dict": [[_to_plain(key, tensors), _to_plain(item, tensors)] for key, item in value.items()]}
        case list():
            return {"list": [_to_plain(item, tensors) for item in value]}
        case tuple():
            return {"tuple": [_to_plain(item, tensors) for item in value]}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"a checkpoint holds no {type(value).__name__}")


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_to_plain`."""
    match value:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"dict": list(items)}:
            return {_from_plain(key, tensors): _from_plain(item, tensors) for key, item in items}
        case {"list": list(items)}:
            return [_from_plain(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(_from_plain(item, tensors) for item in items)
        case None | bool() | int() | float() | str():
            return value
    raise DataError(f"a checkpoint holds no {str(value)[:80]}")


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process as plain values and tensors."""
    state: Any = np.random.get_state()  # the global one: we draw nothing from it, but a library may
    return {
        "python": random.getstate(),
        "numpy": (state[0], torch.from_numpy(state[1].astype(np.int64)), *state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_rank(seed: int, rank: int) -> None:
    """Give a rank other than the first random numbers of its own: its dropout masks must not be those of rank 0's rows."""
    own = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random generator of this process where it was."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Saver(pl.Callback):
    """Save the run every so many steps, at the last one, and when a signal asks to stop. It must be the last callback.

    All ranks stop after the same step, whichever of them got the signal.

    Args:
        run: The run's folder.
        every: Steps between two saves; None: only at the last step and at a signal.
        stop: The signals.
        status: Where the run stands at the start; its step is kept up to date.
        seed: Of the run.
        started: When this process began with the run, imports included (`time.perf_counter`).
    """

    def __init__(
        self, run: Path, *, every: int | None, stop: StopSignals, status: Status, seed: int, started: float
    ) -> None:
        self.run, self.every, self.stop, self.status, self.seed = run, every, stop, status, seed
        self.seconds = self.training_seconds = 0.0
        """Of the run, and of its training alone, before this process; what was lost after the last save is not in it."""
        self._random: list[dict[str, Any]] | None = None
        self._started, self._training_started = started, time.perf_counter()
        self._batch: TrainBatch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, and the random generators to where the save left them; say how long it is."""
        assert isinstance(pl_module, PromcseModule)
        if trainer.is_global_zero:
            write_status(self.run, self.status.at(trainer.global_step, pl_module.total_steps))
        self.stop.install()
        if self._random is not None:
            set_random_state(self._random[trainer.global_rank])
        elif trainer.global_rank:
            seed_rank(self.seed, trainer.global_rank)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Keep the batch for an inspection, should its loss not be finite."""
        self._batch = batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Save if it is time, and stop if a signal asked for it."""
        assert isinstance(pl_module, PromcseModule)
        step, steps = trainer.global_step, pl_module.total_steps
        stopping = max(sum_over_ranks(self._received(trainer)).tolist())
        if stopping or step >= steps or (self.every and step % self.every == 0):
            trainer.save_checkpoint(self.run / CHECKPOINTS / f"step-{step}")
            if trainer.is_global_zero:
                write_status(self.run, self.status.at(step, steps))
        if stopping:
            raise Stopped(stopping)

    def _received(self, trainer: pl.Trainer) -> Tensor:
        """Return the signal that each rank has received, 0 for none; each knows its own."""
        received = torch.zeros(trainer.world_size, dtype=torch.int64)
        received[trainer.global_rank] = self.stop.received or 0
        return received

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the batch and the prompt of a loss that is not finite for inspection."""
        if not isinstance(exception, NonFiniteError) or self._batch is None:
            return
        assert isinstance(pl_module, PromcseModule)
        tokens = self._batch.tokens
        tensors = {f"prompt.{name}": value for name, value in pl_module.encoder.state_dict().items()} | {
            "batch.ids": tokens.ids_NT,
            "batch.mask": tokens.mask_NT,
            "batch.rows": self._batch.rows_B,
        }
        path = self.run / NON_FINITE
        if trainer.global_rank:
            path = path.with_stem(f"{path.stem}-rank{trainer.global_rank}")
        try:
            write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
        except DataError as error:
            log.warning("%s", error)
        else:
            log.info("the prompt before that step and its batch are in %s", path)

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all ranks, taken after everything else of the step, and the seconds so far."""
        return {
            "random": of_every_rank(random_state()),
            "seconds": self.total_training_seconds(),
            "run_seconds": self.seconds + time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over an earlier process's state; the generators follow when training starts."""
        self._random, self.training_seconds = state_dict["random"], state_dict["seconds"]
        self.seconds = state_dict.get("run_seconds", self.training_seconds)  # absent: saved by an earlier version

    def total_training_seconds(self) -> float:
        """Seconds of training, of all processes that took part one after another."""
        return self.training_seconds + time.perf_counter() - self._training_started
