"""The processes of a distributed run: which place each has, how they meet, and that they were told the same.

Nothing here starts a process: `promcse_pl.runs.launcher`, torchrun or SLURM do.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from promcse_pl.config import Config, TrainerConfig, flat_settings
from promcse_pl.utils.errors import ConfigError

T = TypeVar("T")

STORE = "PROMCSE_STORE"
"""Environment variable with the file through which the processes that `promcse_pl.runs.launcher` started meet."""
TIMEOUT = timedelta(hours=1)
"""A process waits no longer than this for another: longer than any look at a development set, shorter than for ever. One that
dies is noticed at once."""
LOST = "lost the connection to another process of the run"
_CONNECTION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|(TCP|File)Store", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The place of this process.

    Attributes:
        rank: From 0; rank 0 writes the folder and the console.
        size: Of the run.
        devices: Processes on each machine.
    """

    rank: int = 0
    size: int = 1
    devices: int = 1

    @property
    def local(self) -> int:
        """The place on this machine, from 0: the number of its GPU."""
        return self.rank % self.devices


def find_ranks(trainer: TrainerConfig) -> Ranks | None:
    """Return this process's place, as torchrun, SLURM or `promcse_pl.runs.launcher` tell it by the environment.

    Returns:
        None: the run needs several processes, and nobody has started them.

    Raises:
        ConfigError: The environment speaks of another number of processes than the settings.
    """
    size, given = trainer.world_size, _given()
    wanted = f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
    if given is None or (size == 1 and given[0] == "srun"):  # tasks of a job step may be runs of their own
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} needs a starter on every machine. Try: torchrun "
                f"--nnodes={trainer.num_nodes} --nproc-per-node={trainer.devices} ... run.py, or srun (docs/distributed.md)"
            )
        return Ranks() if size == 1 else None
    starter, rank, started, local = given
    if started != size:
        raise ConfigError(
            f"{starter} started {started} processes, but {wanted} are {size}. Try: trainer=ddp trainer.devices="
            f"{started // trainer.num_nodes or 1} trainer.num_nodes={trainer.num_nodes}"
        )
    ranks = Ranks(rank, size, trainer.devices)
    if local != ranks.local or not 0 <= rank < size:
        raise ConfigError(
            f"process {rank} of {started} has place {local} on its machine, but {wanted} put it at {ranks.local}. Try: "
            "as many processes on every machine, one machine after the other (srun --distribution=block)"
        )
    return ranks


def _given() -> tuple[str, int, int, int] | None:
    """Return who started this process, its rank, the number of ranks, and its place on the machine; None: a person did."""
    sources = (
        ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # of a job step, not of the batch script
    )
    for starter, *names in sources:
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdigit() for value in values):
            rank, size, local = map(int, values)
            return None if size == 1 else (starter, rank, size, local)
    return None


def refuse_sweep() -> None:
    """Refuse a sweep that several processes were started for: each would run all of it.

    Raises:
        ConfigError: torchrun or srun started more than this process.
    """
    given = _given()
    if given:
        raise ConfigError(
            f"{given[0]} started {given[2]} processes, and each would run the whole sweep. Try: python run.py -m ... trainer=ddp "
            "trainer.devices=N without it; every job starts its own processes"
        )


def join(ranks: Ranks, trainer: TrainerConfig) -> None:
    """Meet the other processes: gloo for what lies in main memory, and with GPUs nccl for what lies on them.

    Raises:
        ConfigError: There are fewer GPUs here than processes.
    """
    if ranks.size == 1:
        return
    import torch
    import torch.distributed as dist

    from promcse_pl.embedder import pick_device

    kind = pick_device(trainer.device).type
    if kind == "mps":
        raise ConfigError("an Apple GPU trains in one process. Try: trainer.devices=1, or trainer.device=cpu")
    if kind == "cuda":
        if torch.cuda.device_count() < trainer.devices:
            raise ConfigError(
                f"trainer.devices={trainer.devices}, but this machine has {torch.cuda.device_count()} GPUs. "
                f"Try: trainer.devices={torch.cuda.device_count()}, or trainer.device=cpu"
            )
        torch.cuda.set_device(ranks.local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        init_method=_meeting_point(),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=TIMEOUT,
    )


def _meeting_point() -> str:
    if os.environ.get(STORE):
        return f"file://{Path(os.environ[STORE]).absolute()}"
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return "env://"
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment()
    return f"tcp://{slurm.main_address}:{slurm.main_port}"


def leave(ranks: Ranks) -> None:
    """Part from the other processes when all have come so far; rank 0 may then take as long as it likes."""
    if ranks.size == 1:
        return
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def of_every_rank(value: T) -> list[T]:
    """Return a plain value of every rank, in their order."""
    import torch.distributed as dist

    from promcse_pl.training.gather import world_size

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def of_rank_zero(value: T) -> T:
    """Return the plain value that rank 0 gives."""
    return of_every_rank(value)[0]


@contextmanager
def first_rank_first(ranks: Ranks) -> Iterator[None]:
    """Let rank 0 do something before the others: they find what it left in a cache."""
    if ranks.rank:
        of_every_rank(None)
    yield
    if not ranks.rank:
        of_every_rank(None)


def compare(facts: Mapping[str, Any]) -> None:
    """Go on only if all ranks were told the same.

    Raises:
        ConfigError: On every rank; it names what differs, and how.
    """
    every = of_every_rank(dict(facts))
    for rank, others in enumerate(every):
        different = [name for name in {**every[0], **others} if every[0].get(name) != others.get(name)]
        if different:
            shown = "; ".join(f"{name}: {every[0].get(name)!r} and {others.get(name)!r}" for name in different[:5])
            raise ConfigError(
                f"rank {rank} would not train the same as rank 0 ({shown}). Try: the same command, code and files for all "
                "processes"
            )


def told(config: Config, step: int | None) -> dict[str, Any]:
    """Return what all ranks must agree on before anything is built: the config and its hash, the code, where to go on."""
    import torch

    settings = flat_settings(config.to_dict())
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    return {
        **settings,
        "config sha256": digest,
        "code": _code(),
        "torch": torch.__version__,
        "resumed after step": step,
    }


@cache
def _code() -> str:
    """Return a checksum of this package's source files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_lost(error: RuntimeError, ranks: Ranks) -> bool:
    """Tell whether an error means that another rank is gone."""
    return ranks.size > 1 and ("Dist" in type(error).__name__ or bool(_CONNECTION.search(str(error))))
