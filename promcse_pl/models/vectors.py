"""Check and normalise embeddings."""

# N sentences, D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from promcse_pl.utils.errors import DataError, NonFiniteError

Vectors = NDArray[np.float32]
Embeddings = NDArray[np.floating[Any]] | Tensor


def require_finite(sentences: Sequence[str], embeddings_ND: Vectors) -> None:
    """Raise NonFiniteError, with the first sentence concerned, if an embedding is not finite."""
    finite_N = np.isfinite(embeddings_ND).all(1)
    if not finite_N.all():
        sentence = sentences[int(finite_N.argmin())]
        raise NonFiniteError(f"the embedding of {sentence[:80]!r} is not finite: the adapter or the encoder is damaged")


def is_embeddings(values: object) -> TypeGuard[Embeddings]:
    """Return whether a value is a float array or tensor; an array of shape (0,) is an empty list of sentences."""
    if isinstance(values, np.ndarray):
        return np.issubdtype(values.dtype, np.floating) and values.shape != (0,)
    return isinstance(values, Tensor) and values.is_floating_point()


def unit_embeddings(values: Embeddings, width: int) -> Vectors:
    """Return embeddings (N, D) or (D,) of any length and float type, scaled to length 1.

    Raises:
        DataError: D is not `width`, or there are more axes.
        NonFiniteError: An embedding is not finite.
    """
    # in numpy a copy, because torch takes no read-only or reversed arrays; on Apple GPUs torch has no float64
    tensor = (
        values.detach().cpu().double() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, np.float64))
    )
    if tensor.ndim not in (1, 2) or tensor.shape[-1] != width:
        raise DataError(
            f"similarity needs embeddings of shape (N, {width}) or ({width},), got {tuple(tensor.shape)}. "
            "Try: similarity(sentences, sentences), or the output of encode"
        )
    if not torch.isfinite(tensor).all():
        raise NonFiniteError("similarity got embeddings that are not finite")
    unit: Vectors = F.normalize(tensor, dim=-1).float().numpy()
    return unit
