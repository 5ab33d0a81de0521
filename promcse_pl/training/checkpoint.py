"""Checkpoints of a run: written atomically, verified by a checksum, without pickle and without the frozen encoder.

A checkpoint is a folder checkpoints/step-N with tensors.safetensors and state.json. A run that resumes from one is bit-identical
to an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint as CheckpointCallback
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from promcse_pl.run_folder import CHECKPOINTS, HISTORY, NON_FINITE, checkpoint_folders, write_status
from promcse_pl.training.context import Checkpoint, RunContext
from promcse_pl.training.distributed import gather_values
from promcse_pl.training.gather import sum_over_ranks
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import ConfigError, DataError, NonFiniteError
from promcse_pl.utils.files import publish, staging_folder, sync, write_bytes
from promcse_pl.utils.paths import require_regular_file
from promcse_pl.utils.signals import Stopped

log = logging.getLogger("promcse_pl")

FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"
KEPT_CHECKPOINTS = 2
"""If the newest checkpoint is damaged, the one before it is used."""


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint of a run folder; None if there is none."""
    history = run / HISTORY
    history_bytes = history.stat().st_size if history.is_file() else 0
    folders = checkpoint_folders(run)
    for path in reversed(folders):
        try:
            checkpoint, _ = read_checkpoint(path)
            if history_bytes < checkpoint.history_bytes:
                raise DataError(f"{path} does not match {HISTORY}, which is shorter than at that step")
            return checkpoint
        except DataError as error:
            consequence = "the run starts from step 0" if path == folders[0] else "the previous checkpoint is used"
            log.warning("%s; %s", error, consequence)
    return None


def read_checkpoint(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Read and verify a checkpoint folder.

    Returns:
        The checkpoint, and the dictionary that Lightning saved.

    Raises:
        DataError: A file is missing, truncated, changed, or of a newer format.
    """
    try:
        stored = json.loads(require_regular_file(path / STATE).read_bytes())
        tensors = require_regular_file(path / TENSORS).read_bytes()
        if stored["format"] != FORMAT:
            raise DataError(f"{path} has format {stored['format']}; this version reads {FORMAT}")
        if stored["sha256"] != _checksum(stored, tensors):
            raise DataError(f"{path} is damaged: its checksum is wrong")
        state = _from_plain(stored["state"], load(tensors))
        return Checkpoint(path, stored["step"], stored["history_bytes"]), state
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a valid checkpoint ({type(error).__name__}: {error})") from error


def _checksum(stored: dict[str, Any], tensors: bytes) -> str:
    described = {name: value for name, value in stored.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(tensors)
    return digest.hexdigest()


class RunCheckpoints(CheckpointIO):
    """Lightning plugin that reads and writes checkpoints in this format.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint atomically, and remove all but the last `KEPT_CHECKPOINTS` up to its step.

        Those of later steps are invalid: the run did not resume from them.

        Raises:
            DataError: It cannot be written, or the path exists and is no checkpoint; existing checkpoints are unchanged.
            ConfigError: The state of a callback contains other values than plain ones and tensors.
        """
        folder, tensors = Path(path), dict[str, Tensor]()
        history = self.run / HISTORY
        try:
            state = _to_plain(checkpoint, tensors)
        except TypeError as error:
            for name, callback_state in checkpoint.get("callbacks", {}).items():
                _check_callback_state(name, callback_state)
            raise ConfigError(f"the checkpoint {folder} cannot be saved: {error}") from error
        stored = {
            "format": FORMAT,
            "step": checkpoint["global_step"],
            "history_bytes": history.stat().st_size if history.exists() else 0,
            "state": state,
        }
        if history.exists():
            sync(history)
        content = save(_unshared(tensors))
        stored["sha256"] = _checksum(stored, content)
        try:
            _check_replaceable(folder)
            with staging_folder(folder.parent) as staged:
                (staged / TENSORS).write_bytes(content)
                (staged / STATE).write_bytes(json.dumps(stored).encode())
                publish(staged, folder, replace=True)
        except OSError as error:
            raise DataError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error
        folders = checkpoint_folders(self.run)
        if folder not in folders:  # a callback of the user saves elsewhere
            return
        last = folders.index(folder) + 1
        for path in [*folders[: max(0, last - KEPT_CHECKPOINTS)], *folders[last:]]:
            shutil.rmtree(path, ignore_errors=True)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the state in a checkpoint."""
        _, state = read_checkpoint(Path(path))
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    """Check that a path is absent or a checkpoint, which is replaced: the run found it damaged, or a callback overwrites its own.

    Raises:
        DataError: It is a file, or a folder with other content.
    """
    if path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= {TENSORS, STATE}):
        raise DataError(f"{path} is not a checkpoint and is not replaced. Try: a new path in trainer.save_checkpoint")


def check_callbacks(callbacks: Iterable[pl.Callback]) -> None:
    """Check before a run that it can use the user's callbacks.

    Raises:
        ConfigError: One of them saves checkpoints itself, or its state contains other values than plain ones and tensors; the
            message names the class.
    """
    for callback in callbacks:
        if isinstance(callback, CheckpointCallback):
            raise ConfigError(
                f"the callback {type(callback).__name__} cannot save checkpoints of a run, which saves its own. Try: "
                "trainer.save_every=STEPS"
            )
        state: Any = None
        with suppress(Exception):  # it may need attributes that a hook creates; then it is checked when it is saved
            state = callback.state_dict()
        _check_callback_state(type(callback).__name__, state)


def _check_callback_state(name: str, state: Any) -> None:
    """Raise ConfigError if a checkpoint cannot contain the state of a callback."""
    try:
        _to_plain(state, {})
    except TypeError as error:
        raise ConfigError(
            f"the state of the callback {name} cannot be saved: {error}. Try: a state_dict of numbers, strings, lists, "
            "dictionaries and tensors"
        ) from error


def _to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a JSON value for a tree of plain values; tensors are added to `tensors` and referenced by name."""
    match value:
        case Tensor() if value.layout is torch.strided:
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
    what = "sparse tensors" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"a checkpoint can contain plain values and tensors, but not {what}")


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, which safetensors refuses."""
    storages, unshared = set[int](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return unshared


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `_to_plain`."""
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
    raise DataError(f"unknown value in a checkpoint: {str(value)[:80]}")


def random_state() -> dict[str, Any]:
    """Return the state of the random generators of this process and its device as plain values and tensors."""
    state: Any = np.random.get_state()  # numpy's global generator: this package does not use it, but a library may
    return {
        "python": random.getstate(),
        "numpy": (state[0], torch.from_numpy(state[1].astype(np.int64)), *state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def seed_rank(seed: int, rank: int) -> None:
    """Seed a rank other than 0, so that its dropout masks differ from those of rank 0."""
    rank_seed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(rank_seed)
    np.random.seed(rank_seed)
    torch.manual_seed(rank_seed)


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state of the random generators of this process and its device."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and (states := state["cuda"]):
        # earlier versions saved all visible GPUs, of which there may be fewer now
        torch.cuda.set_rng_state(states[min(torch.cuda.current_device(), len(states) - 1)])


class Saver(pl.Callback):
    """Save a checkpoint every `trainer.save_every` steps, after the last step and when a signal stops the run.

    All ranks stop after the same step, whichever of them received the signal. It must be the last callback: a checkpoint contains
    the state of the others after the step.

    Args:
        run: The run.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.seconds = self.training_seconds = 0.0
        """Duration of the run and of its training in earlier processes, up to the checkpoint that was resumed from."""
        self._random: list[dict[str, Any]] | None = None
        self._training_started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the number of steps to status.json, replace Lightning's signal handlers and restore or seed the generators."""
        assert isinstance(pl_module, PromcseModule)
        if trainer.is_global_zero:
            write_status(self.run.folder, self.run.status.at(trainer.global_step, pl_module.total_steps))
        self.run.stop.install()
        if self._random is not None:
            set_random_state(self._random[trainer.global_rank])
        elif trainer.global_rank:
            seed_rank(self.run.config.seed, trainer.global_rank)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Save a checkpoint if it is due; stop if a rank has received a signal."""
        assert isinstance(pl_module, PromcseModule)
        step, steps, every = trainer.global_step, pl_module.total_steps, self.run.config.trainer.save_every
        signum = max(sum_over_ranks(self._received(trainer)).tolist())
        if signum or step >= steps or trainer.should_stop or (every and step % every == 0):
            pl_module.finite.wait()
            trainer.save_checkpoint(self.run.folder / CHECKPOINTS / f"step-{step}")
            if trainer.is_global_zero:
                write_status(self.run.folder, self.run.status.at(step, steps))
        if signum:
            raise Stopped(signum)

    def _received(self, trainer: pl.Trainer) -> Tensor:
        """Return a vector of one entry per rank, with the signal that this rank has received or 0."""
        received = torch.zeros(trainer.world_size, dtype=torch.int64)
        received[trainer.global_rank] = self.run.stop.received or 0
        return received

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the batch and the prompt of a non-finite loss to the run folder."""
        assert isinstance(pl_module, PromcseModule)
        batch = pl_module.finite.failed
        if not isinstance(exception, NonFiniteError) or batch is None:
            return
        tokens = batch.tokens
        tensors = {f"prompt.{name}": value for name, value in pl_module.encoder.state_dict().items()} | {
            "batch.ids": tokens.ids_NT,
            "batch.mask": tokens.mask_NT,
            "batch.rows": batch.rows_B,
        }
        path = self.run.folder / NON_FINITE
        if trainer.global_rank:
            path = path.with_stem(f"{path.stem}-rank{trainer.global_rank}")
        try:
            write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
        except DataError as error:
            log.warning("%s", error)
        else:
            log.info("the batch and the prompt before that step are saved in %s", path)

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all ranks after the step, and the durations so far."""
        return {
            "random": gather_values(random_state()),
            "seconds": self.total_training_seconds(),
            "run_seconds": self.seconds + time.perf_counter() - self.run.started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the durations; the random states follow when training starts."""
        self._random, self.training_seconds = state_dict["random"], state_dict["seconds"]
        self.seconds = state_dict.get("run_seconds", self.training_seconds)  # absent: saved by an earlier version

    def total_training_seconds(self) -> float:
        """Return the training time of the run, earlier processes included."""
        return self.training_seconds + time.perf_counter() - self._training_started
