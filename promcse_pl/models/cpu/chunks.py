"""Sentences through the frozen encoder in chunks of similar length: little padding, all cores busy, bounded memory.

On a CPU every core takes whole chunks, which costs no barrier after each operation and keeps a chunk's tensors in the core's own
cache. With `recompute` the backward pass runs a chunk forward a second time instead of keeping its tensors (GradCache, Gao et
al. 2021), so that memory is set by the chunk and not by the batch. Neither changes a result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promcse_pl.models.cpu.dropout import seeded_dropout

Result = TypeVar("Result")
Outputs = tuple[Tensor, ...]
Run = Callable[[Tensor, Tensor], Outputs]
"""Takes the row numbers of a chunk and the prompt's keys and values; gives the chunk's outputs."""


CHUNK_TOKENS = {"cpu": 512, "cuda": 16384, "mps": 8192}
"""Tokens that pass the encoder at once, by kind of device: on a CPU what a core's cache likes (the others are not measured)."""


def plan_chunks(lengths_N: Tensor, budget: int | None, most_rows: int | None = None) -> list[Tensor]:
    """Group sentences of similar length, so that chunks need little padding.

    Args:
        lengths_N: Number of tokens of each sentence.
        budget: Maximum of rows x longest of a chunk (a single longer sentence is a chunk of its own); None: one chunk in the
            given order.
        most_rows: Maximum number of sentences in a chunk; None: no limit. No effect without a budget.

    Returns:
        Row numbers of each chunk, longest sentences first; together a permutation of all rows.
    """
    if budget is None:
        return [torch.arange(len(lengths_N))]
    order = torch.argsort(lengths_N, descending=True, stable=True)
    chunks, start = [], 0
    while start < len(order):
        size = min(max(1, budget // max(1, int(lengths_N[order[start]]))), most_rows or len(order))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def padded_tokens(mask_NT: Tensor, budget: int | None) -> int:
    """Return how many tokens, padding included, pass the encoder when a batch goes through in chunks."""
    if budget is None:
        return mask_NT.numel()
    lengths_N = mask_NT.sum(1)
    return sum(len(rows) * int(lengths_N[rows].max()) for rows in plan_chunks(lengths_N, budget))


def run_chunks(
    run: Run, prompt_kv: Tensor, chunks: Sequence[Tensor], *, dropout: bool = False, recompute: bool = False
) -> list[Outputs]:
    """Run every chunk and return the outputs in the order of the chunks, differentiable in the prompt.

    Args:
        run: See `Run`. It must depend on no other tensor that takes a gradient. It is called from several threads on a CPU.
        prompt_kv: The prompt's keys and values.
        chunks: Row numbers of each chunk.
        dropout: Whether `run` draws dropout masks; a chunk's masks depend on its place alone, not on threads.
        recompute: Run each chunk again in the backward pass instead of keeping its tensors: half as much computation more.
    """
    seeds = torch.randint(2**62, (len(chunks),)).tolist() if dropout else [None] * len(chunks)
    work = [_Chunk(run, rows, seed) for rows, seed in zip(chunks, seeds, strict=True)]
    if not (torch.is_grad_enabled() and prompt_kv.requires_grad and prompt_kv.numel()):
        return _map(lambda chunk: chunk.forward(prompt_kv), work, prompt_kv.device)
    flat = iter(cast(Outputs, _Chunks.apply(work, recompute, prompt_kv)))  # type: ignore[no-untyped-call]
    return [tuple(next(flat) for _ in range(chunk.outputs)) for chunk in work]


class _Chunk:
    """The work on one chunk, and what its backward pass needs."""

    outputs = 0

    def __init__(self, run: Run, rows: Tensor, seed: int | None) -> None:
        self.run, self.rows, self.seed = run, rows, seed
        self._graph: tuple[Tensor, Outputs] | None = None

    def forward(self, prompt_kv: Tensor) -> Outputs:
        with seeded_dropout(self.seed, prompt_kv.device):
            return self.run(self.rows, prompt_kv)

    def forward_with_graph(self, prompt_kv: Tensor) -> Outputs:
        leaf = prompt_kv.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.forward(leaf)
        self._graph = (leaf, outputs)
        return tuple(output.detach() for output in outputs)

    def backward(self, prompt_kv: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        if self._graph is None:
            self.forward_with_graph(prompt_kv)
        (leaf, outputs), self._graph = cast(tuple[Tensor, Outputs], self._graph), None
        (gradient,) = torch.autograd.grad(outputs, leaf, gradients)
        return gradient


class _Chunks(torch.autograd.Function):
    """All chunks as one operation on the prompt, so that their graphs can be walked by several threads."""

    @staticmethod
    def forward(ctx: Any, work: list[_Chunk], recompute: bool, prompt_kv: Tensor) -> Outputs:  # noqa: ANN401, FBT001, RUF100
        ctx.work = work
        ctx.save_for_backward(prompt_kv)
        step = _Chunk.forward if recompute else _Chunk.forward_with_graph
        found = _map(lambda chunk: step(chunk, prompt_kv.detach()), work, prompt_kv.device)
        for chunk, outputs in zip(work, found, strict=True):
            chunk.outputs = len(outputs)
        return tuple(output for outputs in found for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:  # noqa: ANN401
        (prompt_kv,) = ctx.saved_tensors
        of_chunk, start = {}, 0
        for chunk in ctx.work:
            of_chunk[chunk], start = gradients[start : start + chunk.outputs], start + chunk.outputs
        parts = _map(lambda chunk: chunk.backward(prompt_kv, of_chunk[chunk]), ctx.work, prompt_kv.device)
        return None, None, torch.stack(parts).sum(0)


def _map(function: Callable[[_Chunk], Result], work: Sequence[_Chunk], device: torch.device) -> list[Result]:
    """Call a function for every chunk, on a CPU with as many threads as torch uses."""
    threads = torch.get_num_threads()
    workers = min(threads, len(work)) if device.type == "cpu" else 1
    if workers < 2:
        return [function(chunk) for chunk in work]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def in_thread(chunk: _Chunk) -> Result:  # these modes belong to a thread
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(chunk)

    return list(_workers(workers, threads // workers).map(in_thread, work))


@cache
def _workers(count: int, threads_each: int) -> ThreadPoolExecutor:
    """Threads whose operations use `threads_each` cores; the calling thread keeps all of them."""
    before, all_here = torch.get_num_threads(), Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "promcse-chunks", lambda: torch.set_num_threads(threads_each))
    for _ in range(count):  # all of them now: torch gives the number set last to threads that it starts later
        pool.submit(all_here.wait)
    all_here.wait()
    torch.set_num_threads(before)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
