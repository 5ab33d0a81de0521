"""Frozen dense layers after the pooling, as the Dense modules of sentence-transformers store them."""

# N sentences, D width before, E width after

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from promcse_pl.models.weights import read_header
from promcse_pl.utils.errors import EncoderError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    activation.__name__: activation for activation in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}
"""Name in torch.nn -> class; all are used with their default arguments."""


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """Settings of a dense layer.

    Attributes:
        weights: The safetensors file with linear.weight and linear.bias.
        inputs, outputs: D and E.
        bias: Whether it has a bias.
        activation: Key of `ACTIVATIONS`.
        normalize: Whether its input is normalised to unit length.
    """

    weights: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str
    normalize: bool


class FrozenDense(nn.Module):
    """activation(W x + b) without gradients for W and b, computed in float32 or wider.

    Args:
        spec: Settings of the layer.

    Raises:
        EncoderError: The weights cannot be read, have other names or shapes than declared, or are not finite.
    """

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.spec = spec
        # shapes only: the weights follow after their file was checked
        self.linear = nn.Linear(spec.inputs, spec.outputs, bias=spec.bias, device="meta")
        tensors = _read_tensors(
            spec.weights, {f"linear.{name}": part for name, part in self.linear.state_dict().items()}
        )
        self.load_state_dict(tensors, strict=True, assign=True)
        self.requires_grad_(False)
        self.activation = ACTIVATIONS[spec.activation]()

    def forward(self, embeddings_ND: Tensor) -> Tensor:
        """Return (N, E)."""
        if self.spec.normalize:
            embeddings_ND = F.normalize(embeddings_ND, dim=1)
        found: Tensor = self.activation(self.linear(embeddings_ND))
        return found

    def identity(self) -> dict[str, Any]:
        """Return everything that affects its output, as JSON values."""
        digest = hashlib.sha256()
        for tensor in self.linear.state_dict().values():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        spec = self.spec
        return {
            "inputs": spec.inputs,
            "outputs": spec.outputs,
            "activation": spec.activation,
            "normalize": spec.normalize,
            "sha256": digest.hexdigest(),
        }


def load_dense_layers(specs: Sequence[DenseSpec]) -> nn.Sequential:
    """Read dense layers; without any, the embeddings are returned unchanged.

    Raises:
        EncoderError: See `FrozenDense`; or a layer does not take the output of the one before.
    """
    for before, after in itertools.pairwise(specs):
        if before.outputs != after.inputs:
            raise EncoderError(
                f"{after.weights.parent} takes {after.inputs} features, but the Dense module before it gives {before.outputs}. "
                "Restore the published files"
            )
    return nn.Sequential(*map(FrozenDense, specs))


def _read_tensors(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check the names and shapes in the header of a safetensors file, then return its tensors in float32."""
    if not path.is_file():
        pickled = "pytorch_model.bin"
        advice = (
            f"pickled weights ({pickled}) are not read. Try: SentenceTransformer(OLD).save_pretrained(NEW) and model.path=NEW"
            if path.with_name(pickled).is_file()
            else "copy the encoder from its source again"
        )
        raise EncoderError(f"{path} is missing: {advice}")
    try:
        found = {name: spec.shape for name, spec in read_header(path).items()}
        expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        if found != expected:
            raise ValueError(f"it has the tensors {found}, its config.json declares {expected}")
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise ValueError("it holds values that are not finite")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EncoderError(f"{path} cannot be read: {str(error)[:300]}. Restore the published file") from error
    return tensors
