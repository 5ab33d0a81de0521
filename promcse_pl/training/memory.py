"""Whether a batch's tensors fit into memory until the backward pass: measured on one sentence, not guessed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from promcse_pl.data.batch import Tokens
from promcse_pl.models.encoder import PromptEncoder

SHARE = 0.5
"""Part of the free memory that the kept tensors may take; the rest is for the work on a chunk and for others."""
_CGROUP = Path("/sys/fs/cgroup")
_PROBE = 4  # sentences


def kept_bytes(encoder: PromptEncoder, length: int) -> int:
    """Return how many bytes the backward pass of one sentence keeps, for an encoder in training mode.

    Args:
        encoder: The model.
        length: Tokens of the sentence, special ones included.
    """
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = encoder.backbone.device
    ids_NT = torch.full((_PROBE, length), min(5, len(encoder.backbone.word_embeddings) - 1), device=device)
    training = encoder.training
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, note):
        encoder.train()
        kept = encoder.encode_chunk(Tokens(ids_NT, torch.ones_like(ids_NT)), encoder.prompt())
    encoder.train(training)
    del kept
    return sum(sizes.values()) // _PROBE


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or in the container around a CPU; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
