"""Distributed runs: rank and world size of this process, the process group, and the check that all ranks have the same inputs.

`promcse_pl.runs.launcher`, torchrun or SLURM start the processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from promcse_pl.config import Config, TrainerConfig, flat_settings
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import run_command

T = TypeVar("T")

STORE = "PROMCSE_STORE"
"""Environment variable with the rendezvous file of the ranks that `promcse_pl.runs.launcher` has started."""
LAUNCHER_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # of a job step, not of the batch script
}
"""Launcher -> environment variables of the rank, the world size and the local rank of a process."""
_LOCAL_SIZES = {"torchrun": "LOCAL_WORLD_SIZE", "srun": "SLURM_NTASKS_PER_NODE"}
"""Launcher -> environment variable of the number of ranks on this machine; srun sets it for --ntasks-per-node."""
TIMEOUT = timedelta(hours=1)
"""Timeout of collective operations; longer than any dev evaluation. The exit of a rank is detected at once."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this process.

    Attributes:
        rank: Rank, from 0; rank 0 writes the folder and the console.
        size: World size.
        devices: Number of ranks on each machine.
    """

    rank: int = 0
    size: int = 1
    devices: int = 1

    @property
    def local(self) -> int:
        """Local rank, from 0: the index of its GPU."""
        return self.rank % self.devices


def find_ranks(trainer: TrainerConfig) -> Ranks | None:
    """Return the rank of this process, from the environment that torchrun, SLURM or `promcse_pl.runs.launcher` sets.

    Returns:
        The rank; None if the run needs several processes and they are not started yet.

    Raises:
        ConfigError: The environment has another number of processes than the settings.
    """
    size, environment = trainer.world_size, _from_environment()
    settings = f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
    if environment is None or (
        size == 1 and environment[0] == "srun"
    ):  # the tasks of a job step may be independent runs
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} needs a launcher on every machine. Try: torchrun "
                f"--nnodes={trainer.num_nodes} --nproc-per-node={trainer.devices} ... run.py, or srun (docs/distributed.md)"
            )
        return Ranks() if size == 1 else None
    starter, rank, started, local = environment
    local_size = os.environ.get(_LOCAL_SIZES[starter], "")
    devices = max(1, min(started, int(local_size) if local_size.isdigit() else started // trainer.num_nodes))
    advice = f"trainer=ddp trainer.devices={devices} trainer.num_nodes={started // devices}"
    if started != size:
        raise ConfigError(f"{starter} started {started} processes, but {settings} are {size}. Try: {advice}")
    ranks = Ranks(rank, size, trainer.devices)
    if local != ranks.local or not 0 <= rank < size:
        raise ConfigError(
            f"process {rank} of {started} has local rank {local}, but with {settings} it must be {ranks.local}. Try: "
            f"{'' if devices == trainer.devices else f'{advice}, and '}"
            "as many processes on every machine, one machine after the other (srun --distribution=block)"
        )
    return ranks


def _from_environment() -> tuple[str, int, int, int] | None:
    """Return the launcher of this process, its rank, the world size and its local rank; None without a launcher."""
    for starter, names in LAUNCHER_VARIABLES.items():
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdigit() for value in values):
            rank, size, local = map(int, values)
            return None if size == 1 else (starter, rank, size, local)
    return None


def refuse_sweep() -> None:
    """Check that a sweep runs in one process.

    Raises:
        ConfigError: torchrun or srun started several processes.
    """
    if environment := _from_environment():
        starter, _, size, _ = environment
        raise ConfigError(
            f"{starter} started {size} processes, and each would run the whole sweep. Try: {run_command()} -m ... trainer=ddp "
            "trainer.devices=N without it; every job starts its own processes"
        )


def join_process_group(ranks: Ranks, trainer: TrainerConfig) -> None:
    """Initialise the process group: gloo for tensors in main memory, nccl for those on GPUs.

    Raises:
        ConfigError: This machine has fewer GPUs than ranks.
        LostRankError: Another rank has exited.
    """
    if ranks.size == 1:
        return
    import torch
    import torch.distributed as dist

    from promcse_pl.models.device import pick_device
    from promcse_pl.training.gather import collective

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
    with collective():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            init_method=_rendezvous(),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=TIMEOUT,
        )


def _rendezvous() -> str:
    if os.environ.get(STORE):
        return f"file://{Path(os.environ[STORE]).absolute()}"
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return "env://"
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment()
    return f"tcp://{slurm.main_address}:{slurm.main_port}"


def leave_process_group(ranks: Ranks) -> None:
    """Wait for the other ranks and destroy the process group; rank 0 alone evaluates and writes the results."""
    if ranks.size == 1:
        return
    import torch.distributed as dist

    from promcse_pl.training.gather import collective

    with collective():
        dist.barrier()
    dist.destroy_process_group()


def gather_values(value: T) -> list[T]:
    """Gather a plain value from every rank, in rank order."""
    import torch.distributed as dist

    from promcse_pl.training.gather import collective, world_size

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def rank_zero_first(ranks: Ranks) -> Iterator[None]:
    """Let rank 0 run the block before the others, which then find its result in a cache."""
    if ranks.rank:
        gather_values(None)
    yield
    if not ranks.rank:
        gather_values(None)


def check_equal_on_ranks(facts: Mapping[str, Any]) -> None:
    """Check that all ranks have the same values.

    Raises:
        ConfigError: On every rank, if values differ; the message shows them.
    """
    first, *others = gather_values(dict(facts))
    for rank, values in enumerate(others, start=1):
        different = [name for name in {**first, **values} if first.get(name) != values.get(name)]
        if different:
            shown = "; ".join(f"{name}: {first.get(name)!r} and {values.get(name)!r}" for name in different[:5])
            raise ConfigError(
                f"rank {rank} differs from rank 0 ({shown}). Try: the same command, code and files for all processes"
            )


def facts_of_rank(config: Config, step: int | None) -> dict[str, Any]:
    """Return what must be equal on all ranks before anything is built: settings, code, and the step after which to resume."""
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
