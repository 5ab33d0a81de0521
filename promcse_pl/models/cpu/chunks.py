"""Encode sentences in chunks of similar length: little padding, all cores busy, bounded memory.

On a CPU every core takes whole chunks, which needs no barrier after each operation and keeps a chunk's tensors in the core's
cache. With `recompute` (activation checkpointing) the backward pass computes a chunk's activations again instead of keeping them
(GradCache, Gao et al. 2021), so that memory depends on the chunk and not on the batch. Neither changes a result.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from threading import Barrier
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promcse_pl.models.cpu.dropout import seeded_dropout

Result = TypeVar("Result")
Outputs = tuple[Tensor, ...]
Run = Callable[[Any, Tensor], Outputs]
"""Function of a chunk's inputs and the prompt (`Prompt.forward`) that returns the chunk's outputs."""
Gradients = tuple[Tensor | None, ...]


CHUNK_TOKENS = {"cpu": 512, "cuda": 16384, "mps": 8192}
"""Default number of tokens in a chunk, by device type; the CPU's fits a core's cache, the others are not measured."""


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


def padded_tokens(lengths_N: Tensor, longest: int, budget: int | None) -> int:
    """Return the number of tokens, including padding, of a batch that is split into chunks.

    Args:
        lengths_N: Number of tokens of each sentence.
        longest: T of the batch: the length of the chunk if the batch is not split.
        budget: See `plan_chunks`.
    """
    if budget is None:
        return len(lengths_N) * longest
    return sum(len(rows) * int(lengths_N[rows].max()) for rows in plan_chunks(lengths_N, budget))


# six parameters: what is run, on which tensors, and how
def run_chunks(
    run: Run,
    prompt_kv: Tensor,
    chunks: Sequence[Any],
    *,
    weights: Sequence[Tensor] = (),
    dropout: bool = False,
    recompute: bool = False,
) -> list[Outputs]:
    """Run every chunk and return the outputs in the order of the chunks, differentiable in the prompt and in weights.

    Args:
        run: See `Run`. On a CPU, several threads call it.
        prompt_kv: The prompt's keys and values, or its vectors beside the input embeddings.
        chunks: The inputs of each chunk.
        weights: The other tensors that `run` reads and that require a gradient. Their gradients are summed in the order of the
            chunks, and only those of a few chunks are in memory.
        dropout: Whether `run` draws dropout masks; a chunk's masks depend on its position, not on threads.
        recompute: Compute each chunk's activations again in the backward pass instead of keeping them: 1.5x the computation.
    """
    seeds = torch.randint(2**62, (len(chunks),)).tolist() if dropout else [None] * len(chunks)
    work = [_Chunk(run, inputs, seed) for inputs, seed in zip(chunks, seeds, strict=True)]
    trains_prompt = prompt_kv.requires_grad and prompt_kv.numel() > 0
    if not (torch.is_grad_enabled() and (trains_prompt or weights)):
        return _map(lambda chunk: chunk.forward(prompt_kv), work, prompt_kv.device)
    flat = iter(cast(Outputs, _Chunks.apply(work, recompute, prompt_kv, *weights)))  # type: ignore[no-untyped-call]
    return [tuple(next(flat) for _ in range(chunk.outputs)) for chunk in work]


class _Chunk:
    """One chunk and, between forward and backward, its graph."""

    outputs = 0

    def __init__(self, run: Run, inputs: Any, seed: int | None) -> None:  # noqa: ANN401
        self.run, self.inputs, self.seed = run, inputs, seed
        self._autocast = {  # of the caller: other threads and the backward pass have none
            device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        }
        self._graph: tuple[Tensor, Outputs] | None = None

    def forward(self, prompt_kv: Tensor) -> Outputs:
        with ExitStack() as stack:
            for device, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            stack.enter_context(seeded_dropout(self.seed, prompt_kv.device))
            return self.run(self.inputs, prompt_kv)

    def forward_with_graph(self, prompt_kv: Tensor) -> Outputs:
        leaf = prompt_kv.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.forward(leaf)
        self._graph = (leaf, outputs)
        return tuple(output.detach() for output in outputs)

    def backward(self, prompt_kv: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Gradients:
        """Return the gradients of the prompt and of each weight; None for a weight that the chunk does not read."""
        if self._graph is None:
            self.forward_with_graph(prompt_kv)
        (leaf, outputs), self._graph = cast(tuple[Tensor, Outputs], self._graph), None
        return torch.autograd.grad(outputs, [leaf, *weights], gradients, allow_unused=True)


class _Chunks(torch.autograd.Function):
    """All chunks as one operation on prompt and weights, so that several threads can run their backward passes."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        work: list[_Chunk],
        recompute: bool,  # noqa: FBT001, RUF100
        prompt_kv: Tensor,
        *weights: Tensor,
    ) -> Outputs:
        ctx.work = work
        ctx.save_for_backward(prompt_kv, *weights)
        step = _Chunk.forward if recompute else _Chunk.forward_with_graph
        found = _map(lambda chunk: step(chunk, prompt_kv.detach()), work, prompt_kv.device)
        for chunk, outputs in zip(work, found, strict=True):
            chunk.outputs = len(outputs)
        return tuple(output for outputs in found for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        prompt_kv, *weights = ctx.saved_tensors
        of_chunk, start = {}, 0
        for chunk in ctx.work:
            of_chunk[chunk], start = gradients[start : start + chunk.outputs], start + chunk.outputs
        parts: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(weights)
        # gradients of weights are large: only those of a few chunks are kept at the same time
        pending = 2 * torch.get_num_threads() if weights else None
        for of_prompt, *of_weights in _results(
            lambda chunk: chunk.backward(prompt_kv, weights, of_chunk[chunk]), ctx.work, prompt_kv.device, pending
        ):
            if of_prompt is not None:
                parts.append(of_prompt)
            for number, part in enumerate(of_weights):
                total = sums[number]
                if part is not None:  # copied, because autograd may return the same tensor for two weights
                    sums[number] = part.clone() if total is None else total.add_(part)
        return None, None, torch.stack(parts).sum(0) if parts else None, *sums


def _map(function: Callable[[_Chunk], Result], work: Sequence[_Chunk], device: torch.device) -> list[Result]:
    """Call a function for every chunk, on a CPU with as many threads as torch uses."""
    return list(_results(function, work, device))


def _results(
    function: Callable[[_Chunk], Result], work: Sequence[_Chunk], device: torch.device, pending: int | None = None
) -> Iterator[Result]:
    """Yield the results of `_map` in the order of the chunks; at most `pending` are computed ahead (None: all)."""
    threads = torch.get_num_threads()
    workers = min(threads, len(work)) if device.type == "cpu" else 1
    if workers < 2:
        yield from map(function, work)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def in_thread(chunk: _Chunk) -> Result:  # the modes are thread-local
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(chunk)

    pool, running = _workers(workers, threads // workers), deque[Future[Result]]()
    for chunk in work:
        if len(running) == pending:
            yield running.popleft().result()
        running.append(pool.submit(in_thread, chunk))
    while running:
        yield running.popleft().result()


@lru_cache(maxsize=8)  # the threads of a dropped pool end
def _workers(count: int, threads_each: int) -> ThreadPoolExecutor:
    """Return a pool of threads whose operations use `threads_each` cores; the calling thread keeps using all cores."""
    before, all_started = torch.get_num_threads(), Barrier(count + 1)

    def limit_threads() -> None:
        torch.get_num_threads()  # the first call in a thread copies the process's number of threads and would undo a limit
        torch.set_num_threads(threads_each)

    pool = ThreadPoolExecutor(count, "promcse-chunks", limit_threads)
    for _ in range(
        count
    ):  # start all threads now: later ones would get the number of threads that torch was given last
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(before)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
