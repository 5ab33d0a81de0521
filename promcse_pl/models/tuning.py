"""Selection of the encoder weights that are trained: none, biases, LoRA matrices, or all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from promcse_pl.utils.errors import ConfigError

Weights = Literal["none", "bias", "lora", "full"]
TRAINABLE: tuple[Weights, ...] = get_args(Weights)[1:]


@dataclass(frozen=True, slots=True)
class Tuning:
    """The trained weights of an encoder.

    Attributes:
        weights: `none`: the encoder is frozen. `bias`: all bias vectors (BitFit, Zaken et al. 2022, arXiv 2106.10199). `lora`:
            W x becomes W x + alpha / rank * B A x in every linear layer of the transformer blocks, with trained A (rank, in) and
            B (out, rank) (LoRA, Hu et al. 2022, arXiv 2106.09685). `full`: all weights that the embedding depends on.
        rank, alpha: Settings of LoRA; None otherwise.
    """

    weights: Weights = "none"
    rank: int | None = None
    alpha: float | None = None


def train_weights(model: nn.Module, tuning: Tuning, used: Callable[[], list[str]]) -> tuple[str, ...]:
    """Enable the gradients of the selected weights; LoRA layers are inserted with B = 0, so the output is unchanged.

    Args:
        model: A frozen transformers encoder, changed in place.
        tuning: Which weights; not `none`.
        used: Returns the names of the parameters that the embedding depends on; not called for LoRA.

    Returns:
        The names of the trained parameters. LoRA matrices are float32, other weights keep their type.

    Raises:
        ConfigError: The encoder has no biases, or peft is not installed.
    """
    if tuning.weights == "lora":
        _insert_lora(model, tuning)
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    elif tuning.weights == "bias":
        names = [name for name in used() if name.rpartition(".")[2] == "bias"]
    else:
        names = used()
    if not names:
        raise ConfigError(
            f"tuning.weights={tuning.weights} trains nothing: {model.config.model_type} encoders have no bias vectors. "  # type: ignore[union-attr]
            "Try: tuning=lora"
        )
    for name in names:
        model.get_parameter(name).requires_grad_()
    return tuple(names)


def _insert_lora(model: nn.Module, tuning: Tuning) -> None:
    peft = _import_peft()
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    ]
    config = peft.LoraConfig(r=tuning.rank, lora_alpha=tuning.alpha, target_modules=linear)
    peft.inject_adapter_in_model(config, model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # peft creates them in the dtype of the layer


def merge_lora(model: nn.Module) -> None:
    """Add the LoRA matrices of a model to its weights, W + alpha / rank * B A, and remove its LoRA layers."""
    _import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        with torch.no_grad():
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _import_peft() -> Any:  # noqa: ANN401  (a module)
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA (tuning=lora) needs the package peft. Try: pip install 'promcse_pl[peft]'") from error
    return peft
