"""Resolve settings whose defaults are in the encoder's files: pooling, maximum length and text prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from promcse_pl.config import WIDTH, DataConfig, ModelConfig
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.utils.errors import ConfigError

_PROMPTS_EXAMPLE = """'model.prompts={query: "query: "}'"""


def resolve_pooling(model: ModelConfig, backbone: FrozenBackbone) -> str:
    """Return the pooling: `model.pooling`, or for `auto` that of the encoder's pipeline, else the default of its family.

    Raises:
        ConfigError: The first token of a decoder, which attends to no other token.
    """
    if model.pooling == "auto":
        return backbone.pipeline.pooling or backbone.family.pooling
    if backbone.family.pooling == "lasttoken" and model.pooling in ("cls", "cls_before_pooler"):
        raise ConfigError(
            f"model.pooling={model.pooling} reads the first token, which is the same for every text in a {backbone.model_type} "
            "decoder: a token attends only to earlier ones. Try: model.pooling=lasttoken"
        )
    return model.pooling


def resolve_text(model: ModelConfig, backbone: FrozenBackbone) -> TextSettings:
    """Return the text settings: as set in the config, else those of the encoder's pipeline.

    Raises:
        ConfigError: The encoder has no prompt of the name in `model.default_prompt`.
    """
    own = backbone.pipeline.text
    prompts = own.prompts if model.prompts is None else model.prompts
    text = dataclasses.replace(
        own,
        max_length=own.max_length if model.max_length == "auto" else model.max_length,
        prompts=prompts,
        default_prompt=own.default_prompt if own.default_prompt in prompts else None,
    )
    default = model.default_prompt
    if default is not None and default not in prompts:
        near = text.nearest_prompt(default) or next(iter(prompts), None)
        raise ConfigError(
            f"model.default_prompt must be the name of a prompt of the encoder ({_names(prompts)}), got {default!r}. "
            f"Try: {f'model.default_prompt={near}' if near else _PROMPTS_EXAMPLE}"
        )
    return text if default is None else dataclasses.replace(text, default_prompt=default)


def resolved_model(model: ModelConfig, encoder: PromptEncoder) -> ModelConfig:
    """Return the settings with the values that an encoder was built with, and the commit that it was read from."""
    text = encoder.text
    return dataclasses.replace(
        model,
        revision=encoder.backbone.identity.revision,
        pooling=encoder.pooling,
        max_length=text.max_length,
        prompts=dict(text.prompts) or model.prompts,
        default_prompt=text.default_prompt,
    )


def describe_origins(typed: ModelConfig, encoder: PromptEncoder) -> list[str]:
    """Return log lines with the resolved settings and the source of each.

    Args:
        typed: The settings as typed.
        encoder: The encoder that was built with the resolved ones.
    """
    own, text = encoder.backbone.pipeline, encoder.text
    usual = f"default for {encoder.backbone.model_type} encoders"
    origin = ("modules.json of the encoder" if own.pooling else usual) if typed.pooling == "auto" else "model.pooling"
    lines = [f"pooling: {encoder.pooling} ({origin}{_differs(encoder.pooling, own.pooling)})"]
    if own.dense:
        layers = ", ".join(f"{layer.inputs} to {layer.outputs} ({layer.activation})" for layer in own.dense)
        lines.append(f"frozen dense layers after the pooling: {layers} (modules.json of the encoder)")
    parts = []
    if text.max_length is not None or own.text.max_length is not None:
        origin = "max_seq_length of the encoder" if typed.max_length == "auto" else "model.max_length"
        length = "any length" if text.max_length is None else f"at most {text.max_length} tokens"
        if text.max_length is not None and text.max_length > encoder.longest_input:
            length += f", limited to {encoder.longest_input} by the positions of the encoder"
        parts.append(f"{length} ({origin}{_differs(text.max_length, own.text.max_length)})")
    if text.lower_case:
        parts.append("lower case (do_lower_case of the encoder)")
    if any(text.prompts.values()):  # sentence-transformers always writes two, empty if the encoder has none
        shown = ", ".join(f"{name} {prompt[:60]!r}" for name, prompt in text.prompts.items())
        hidden = (
            ""
            if typed.prompts is None or not own.text.prompts
            else f"; the encoder's own are {_names(own.text.prompts)}"
        )
        parts.append(f"prompts {shown} ({'of the encoder' if typed.prompts is None else 'model.prompts'}{hidden})")
    if text.default_prompt is not None:
        origin = "of the encoder" if typed.default_prompt is None else "model.default_prompt"
        parts.append(f"default prompt {text.default_prompt} ({origin})")
    return [*lines, f"texts: {'; '.join(parts)}"] if parts else lines


def training_prompts(data: DataConfig, text: TextSettings) -> list[str]:
    """Return the text to put in front of each text of a training row.

    Raises:
        ConfigError: An entry of `data.prompts` is neither the name of a prompt nor recognisable as text.
    """
    if data.prompts is None:
        return [text.prompt_text()] * WIDTH[data.kind]
    return [_training_prompt(entry, data.prompts, text) for entry in data.prompts]


def _training_prompt(entry: str, entries: list[str], text: TextSettings) -> str:
    if entry in text.prompts:
        return text.prompts[entry]
    if not entry or " " in entry or ":" in entry:
        return entry
    instead = text.nearest_prompt(entry) or f'"{entry}: "'
    typed = ",".join(instead if other == entry else f'"{other}"' for other in entries)
    raise ConfigError(
        f"data.prompts: {entry!r} is not the name of a prompt (known: {_names(text.prompts)}), and a text must contain a space "
        f"or a colon. Try: 'data.prompts=[{typed}]'"
    )


def _names(prompts: Iterable[str]) -> str:
    return ", ".join(prompts)[:200] or "none"


def _differs(value: object, own: object) -> str:
    return "" if own is None or own == value else f"; the encoder's own is {own}"
