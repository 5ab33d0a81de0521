"""Resolves the settings that depend on the machine: device, precision, chunk size and activation checkpointing."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from promcse_pl.config import Config
from promcse_pl.data.batch import Tokens
from promcse_pl.data.tokens import TokenRows
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.device import pick_device
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.training.distributed import gather_values
from promcse_pl.utils.errors import PromcseError, write_error

log = logging.getLogger("promcse_pl")

MIN_BFLOAT16_GAIN = 1.3
"""`trainer.precision=auto` selects bfloat16 if its matrix product is at least this many times as fast as float32's."""
MAX_MEMORY_FRACTION = 0.5
"""`trainer.recompute=auto` keeps activations that fit into this fraction of the free memory, and so does a chunk on a GPU."""
_MEMORY_DEVICES = ("cuda",)
"""Devices where `trainer.chunk_tokens=auto` depends on the free memory."""
MAX_BFLOAT16_CHUNK = 2048
"""Maximum chunk size in bfloat16 on a CPU; see docs/speed.md."""
_PADDING = 1.2
"""Assumed ratio of padded to real tokens: NLI triplets in chunks of 2,048 tokens have 1.18 with 128 rows, 1.06 with 512."""
_ROWS, _WIDTH, _REPEATS = 512, 768, 5
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PROBE_SENTENCES = 4


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory of a training step, measured at the start of a run.

    Attributes:
        free: Free bytes for the activations of this rank.
        token_bytes: Bytes that autograd keeps for one token.
        batch_tokens: Number of tokens in the batch of this rank, from the mean length of a sentence.
    """

    free: int
    token_bytes: int
    batch_tokens: int

    @property
    def needed(self) -> int:
        """Bytes that autograd keeps for a batch."""
        return self.token_bytes * self.batch_tokens

    @property
    def fits(self) -> bool:
        """Whether the activations of a batch are kept with `trainer.recompute=auto`."""
        return self.needed <= MAX_MEMORY_FRACTION * self.free


def resolve_machine(config: Config) -> tuple[Config, torch.device]:
    """Replace `auto` in device, precision and chunk size by values for this machine; all ranks use rank 0's precision.

    Where the chunk size depends on encoder or data, it stays `auto`, see `resolve_chunk_tokens`.

    Returns:
        The resolved config, and the device.
    """
    device = pick_device(config.trainer.device)
    precision, reason = gather_values(_choose(config, device))[0]
    log.info("device: %s; precision: %s", device.type, reason)
    resolved: dict[str, Any] = {"device": device.type, "precision": precision}
    is_fixed = device.type not in _MEMORY_DEVICES and (device.type, precision) != ("cpu", "bfloat16")
    if config.trainer.chunk_tokens == "auto" and is_fixed:
        resolved["chunk_tokens"] = CHUNK_TOKENS[device.type]
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **resolved)), device


def _choose(config: Config, device: torch.device) -> tuple[str, str]:
    """Return precision and reason for a run."""
    if config.trainer.precision == "auto" and device.type == "cpu" and config.tuning.uses_autocast:
        return "float32", f"float32 (tuning.weights={config.tuning.weights} on a CPU)"
    return choose_precision(config.trainer.precision, device)


def choose_precision(setting: str, device: torch.device) -> tuple[str, str]:
    """Return `float32` or `bfloat16` for a `trainer.precision` setting, and the reason for the log."""
    if setting != "auto":
        return setting, f"{setting} (set in the config)"
    gain = measure_bfloat16_gain(device)
    precision = "bfloat16" if gain >= MIN_BFLOAT16_GAIN else "float32"
    return precision, f"{precision} (a bfloat16 matrix product is {gain:.1f}x as fast as a float32 one here)"


def measure_bfloat16_gain(device: torch.device) -> float:
    """Return how many times as fast a bfloat16 matrix product is as a float32 one on a device (takes about 50 ms)."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = (torch.ones(size, _WIDTH, dtype=dtype, device=device) for size in (_ROWS, 4 * _WIDTH))
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            result = F.linear(rows, weight)
            result[0, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def measure(arguments: Sequence[str]) -> int:
    """Write the number of threads and the precision that `auto` selects per device to a JSON file; return an exit code.

    Args:
        arguments: The path of the file, then values of `trainer.device`.
    """
    result, *devices = arguments
    try:
        precision = {device: choose_precision("auto", pick_device(device))[0] for device in devices}
    except PromcseError as error:
        write_error(error)
        return 2
    Path(result).write_text(json.dumps({"threads": torch.get_num_threads(), "precision": precision}), encoding="utf-8")
    return 0


def resolve_chunk_tokens(config: Config, encoder: PromptEncoder, rows: TokenRows, device: torch.device) -> Config:
    """Replace `auto` in the chunk size by a value for the free memory of a GPU, or for a batch in bfloat16 on a CPU.

    All ranks use the smallest value.

    Args:
        config: The config after `resolve_machine`.
        encoder: The model; it is moved to the device.
        rows: The training rows.
        device: The device of this rank.
    """
    if config.trainer.chunk_tokens != "auto":
        return config
    if device.type in _MEMORY_DEVICES:
        tokens = fit_chunk_tokens(CHUNK_TOKENS[device.type], measure_memory(config, encoder.to(device), rows, device))
    elif _recomputes(config, encoder, rows, device)[0]:
        tokens = CHUNK_TOKENS[device.type]  # the activations of as many chunks as threads are in memory
    else:
        tokens = divide_batch(_batch_tokens(config, rows), torch.get_num_threads())
    tokens = min(gather_values(tokens))
    log.info("chunk size: %d tokens (trainer.chunk_tokens)", tokens)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, chunk_tokens=tokens))


def divide_batch(batch_tokens: int, threads: int) -> int:
    """Return the chunk size on a CPU in bfloat16: as large as allowed, with equal work for all threads.

    Args:
        batch_tokens: Number of tokens in the batch of a rank, without padding.
        threads: Threads of the rank.

    Returns:
        A size from the default of a CPU to `MAX_BFLOAT16_CHUNK`.
    """
    padded = math.ceil(_PADDING * batch_tokens)
    rounds = math.ceil(padded / (threads * MAX_BFLOAT16_CHUNK))
    return max(CHUNK_TOKENS["cpu"], math.ceil(padded / (threads * rounds)))


def fit_chunk_tokens(most: int, memory: StepMemory | None) -> int:
    """Return the number of tokens in a chunk: `most`, or the largest power of two whose activations fit.

    If the activations of a batch fit, those of a chunk do. Powers of two, so that runs with nearly equal free memory have equal
    chunks and dropout masks.

    Args:
        most: Maximum; larger chunks need more padding.
        memory: Measured memory; None: not known.
    """
    if memory is None or memory.fits:
        return most
    fitting = max(1, int(MAX_MEMORY_FRACTION * memory.free) // memory.token_bytes)
    return min(most, 1 << (fitting.bit_length() - 1))


def must_recompute(config: Config, encoder: PromptEncoder, rows: TokenRows, device: torch.device) -> bool:
    """Return whether chunks are recomputed in the backward pass: as set, or with `auto` if memory is too small."""
    recomputes, memory = _recomputes(config, encoder, rows, device)
    if recomputes and memory is not None:
        log.info(
            "the activations of a batch would take %.1f GB of %.1f GB free memory: chunks are recomputed in the backward pass "
            "(trainer.recompute)",
            memory.needed / 1e9,
            memory.free / 1e9,
        )
    return recomputes


def _recomputes(
    config: Config, encoder: PromptEncoder, rows: TokenRows, device: torch.device
) -> tuple[bool, StepMemory | None]:
    """Return whether chunks are recomputed, and with `trainer.recompute=auto` the memory that decides."""
    if config.trainer.recompute != "auto":
        return config.trainer.recompute == "always", None
    memory = measure_memory(config, encoder, rows, device)
    return memory is not None and not memory.fits, memory


def measure_memory(config: Config, encoder: PromptEncoder, rows: TokenRows, device: torch.device) -> StepMemory | None:
    """Measure the free memory of a device and what the activations of a batch need; None if it is not known.

    Args:
        config: The config.
        encoder: The model, on the device.
        rows: The training rows.
        device: The device of this rank.
    """
    free = free_bytes(device)
    if free is None:
        return None
    # gradients, both moments of AdamW, and the gradients of the chunks that run at the same time
    trained = sum(weight.nbytes for weight in encoder.parameters() if weight.requires_grad)
    free = max(0, free - (3 + (2 * torch.get_num_threads() if device.type == "cpu" else 1)) * trained)
    if device.type == "cpu":  # the ranks of this machine share its memory
        free //= config.trainer.devices
    mean_length = _mean_length(rows)
    passes = 2 if config.loss.mlm_weight else 1
    token_bytes = -(-passes * activation_bytes(encoder, mean_length) // mean_length)
    return StepMemory(free, token_bytes, _batch_tokens(config, rows))


def _mean_length(rows: TokenRows) -> int:
    """Return the mean number of tokens of a sentence, rounded up."""
    return -(-rows.tokens_total // (len(rows) * rows.width))


def _batch_tokens(config: Config, rows: TokenRows) -> int:
    """Return the number of tokens in the batch of a rank, from the mean length; single sentences are encoded twice."""
    batch_rows = -(-min(config.data.batch_size, len(rows)) // config.trainer.world_size)
    return batch_rows * max(2, rows.width) * _mean_length(rows)


def activation_bytes(encoder: PromptEncoder, length: int) -> int:
    """Measure how many bytes autograd keeps for the backward pass of one sentence in training mode.

    Args:
        encoder: The model.
        length: Number of tokens of the sentence, special tokens included.
    """
    few, more = (_kept_bytes(encoder, sentences, length) for sentences in (_PROBE_SENTENCES, 2 * _PROBE_SENTENCES))
    return (more - few) // _PROBE_SENTENCES  # the difference excludes weights that autocast has converted


def _kept_bytes(encoder: PromptEncoder, sentences: int, length: int) -> int:
    """Return how many bytes autograd keeps for a chunk of sentences, without the weights."""
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = encoder.backbone.device
    token_id = min(5, len(encoder.backbone.word_embeddings) - 1)
    ids_NT, lengths_N = torch.full((sentences, length), token_id, device=device), torch.full((sentences,), length)
    training = encoder.training
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(record, record),
    ):
        encoder.train()
        kept = encoder.encode_chunk(Tokens(ids_NT, torch.ones_like(ids_NT), lengths_N=lengths_N), encoder.prompt())
    encoder.train(training)
    del kept
    return sum(sizes.values())


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, for a CPU at most that of its container; None if it is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    return min([int(psutil.virtual_memory().available), *_container_free()])


def _container_free() -> list[int]:
    """Return the free memory of every control group of this process (cgroup v2) that has a limit, such as a container or job."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    free = []
    for folder in [_CGROUP / own, *(_CGROUP / own).parents]:
        with suppress(OSError):  # absent: the files of the root, and groups outside the container
            if (limit := (folder / "memory.max").read_text().strip()) != "max":
                free.append(int(limit) - int((folder / "memory.current").read_text()))
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free[-1] += int(statistics.get("inactive_file", 0))  # pages of files, dropped if memory is short
        if folder == _CGROUP:
            break
    return free
