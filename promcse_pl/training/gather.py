"""Collective operations: rows, gradients and sums of all ranks, and their errors."""

# V views, B rows of this rank, G rows of all ranks, D width, W ranks

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from promcse_pl.utils.errors import LostRankError


def world_size() -> int:
    """Return W, the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def collective() -> Iterator[None]:
    """Surround a collective call: it fails with a plain RuntimeError under gloo if another rank has exited.

    Raises:
        LostRankError: The call failed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostRankError(f"lost the connection to another process of the run ({reason})") from error


def gather_rows(local_VBD: Tensor) -> Tensor:
    """Concatenate the rows of all ranks; ranks may hold different numbers of rows.

    Only the rows of this rank get a gradient. With the same global loss on every rank, the sum of the ranks' gradients is
    that of a single process.

    Args:
        local_VBD: This rank's vectors; V and D are the same on all ranks.

    Returns:
        (V, G, D), in the order of the ranks, the same values on each.
    """
    if world_size() == 1:
        return local_VBD
    rows = torch.tensor([local_VBD.shape[1]])  # on the CPU, over gloo: its value is needed here
    counts = [torch.empty_like(rows) for _ in range(world_size())]
    with collective():
        dist.all_gather(counts, rows)
    sizes = [int(count) for count in counts]
    padded = local_VBD.new_zeros(local_VBD.shape[0], max(sizes), local_VBD.shape[2])
    padded[:, : local_VBD.shape[1]] = local_VBD.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    with collective():
        dist.all_gather(parts, padded)
    cut = [part[:, :size] for part, size in zip(parts, sizes, strict=True)]
    cut[dist.get_rank()] = local_VBD
    return torch.cat(cut, dim=1)


def sum_over_ranks(local: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient; its shape must be equal on all ranks."""
    total = local.detach().clone()
    if world_size() > 1:
        with collective():
            dist.all_reduce(total)
    return total


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients by their mean over the ranks, as DistributedDataParallel does, in one all-reduce.

    The order of summation is the same in every step. DistributedDataParallel rebuilds its buckets after the first step of a
    process, so a resumed run with three ranks would add in another order than an uninterrupted one.

    Args:
        parameters: The same on every rank; a rank without a gradient for one counts as 0.
    """
    if world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with collective():
        dist.all_reduce(flat)
    means = torch.split_with_sizes(flat.div_(world_size()), [parameter.numel() for parameter in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter)


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """Return the same value with its gradient multiplied by a factor."""
    return value if factor == 1 else value * factor - (value * (factor - 1)).detach()
