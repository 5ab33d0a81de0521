"""Build our objects from an official state dict and option file."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from promcse_pl.data.batch import Tokens
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.identity import EncoderId
from promcse_pl.models.mlm import MlmHead
from support import single_thread  # noqa: F401

LM_NAMES = {"lm_head.bias": "decoder.bias", "lm_head.decoder.weight": "decoder.weight"}
LM_PARTS = {"transform.dense": "dense", "transform.LayerNorm": "layer_norm"}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def official_state(folder: Path, weights: str = "model.safetensors") -> dict[str, Tensor]:
    args = read_json(folder / "args.json")
    state = load_file(folder / weights)
    return {**load_file((folder / args["backbone"]).resolve()), **state} if "backbone" in args else state


def build_backbone(folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> FrozenBackbone:
    raw = {
        k: v for k, v in read_json(folder / "config.json").items() if k not in ("transformers_version", "architectures")
    }
    family = raw.pop("model_type")
    config = AutoConfig.for_model(family, **raw)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = AutoModel.from_config(config, add_pooling_layer=False)
    encoder = {k.removeprefix(f"{family}."): v for k, v in state.items() if k.startswith(f"{family}.")}
    encoder = {k: v for k, v in encoder.items() if "position_ids" not in k and not k.startswith("pooler.")}
    missing, unexpected = model.load_state_dict(encoder, strict=False)
    assert not unexpected
    assert not missing, missing
    return FrozenBackbone(model.to(dtype), EncoderId(folder.name, None, ""))


def build_encoder(
    folder: Path, state: dict[str, Tensor], args: dict, dtype: torch.dtype = torch.float64
) -> PromptEncoder:
    pooling = args["pooler_type"]
    head = "none" if pooling != "cls" else "mlp_train_only" if args["mlp_only_train"] else "mlp"
    encoder = PromptEncoder(
        build_backbone(folder, state, dtype),
        length=args["pre_seq_len"],
        projection_size=args["prefix_hidden_size"] if args["prefix_projection"] else None,
        pooling=pooling,
        head=head,
    ).to(dtype)
    trained = {k.replace("prefix_encoder.", "prompt.").replace("mlp.", "head."): v for k, v in state.items()}
    wanted = set(encoder.state_dict())
    encoder.load_state_dict({k: v for k, v in trained.items() if k in wanted}, strict=True)
    return encoder


def lm_name(name: str) -> str | None:
    """Our name of an official lm_head parameter; None for one that is stored twice."""
    if name == "lm_head.decoder.bias":
        return None
    if name in LM_NAMES:
        return LM_NAMES[name]
    short = name.removeprefix("lm_head.")
    for old, new in LM_PARTS.items():
        short = short.replace(old, new)
    return short


def build_mlm_head(encoder: PromptEncoder, state: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> MlmHead:
    head = MlmHead(encoder.backbone.word_embeddings, layer_norm_eps=encoder.backbone.layer_norm_eps).to(dtype)
    named = {lm_name(k): v for k, v in state.items() if k.startswith("lm_head.") and lm_name(k)}
    head.load_state_dict(named, strict=True)
    return head


def tokens_of(inputs: dict[str, Tensor]) -> tuple[Tokens, int]:
    """Official (batch, views, T) arrays as a view-major batch, and the number of views."""
    views = inputs["input_ids"].shape[1]

    def flat(name: str) -> Tensor | None:
        return inputs[name].long().transpose(0, 1).flatten(0, 1) if name in inputs else None

    return Tokens(
        flat("input_ids"), flat("attention_mask"), flat("token_type_ids"), flat("mlm_input_ids"), flat("mlm_labels")
    ), views


def views_of(vectors_ND: Tensor, views: int) -> list[Tensor]:
    parts = list(vectors_ND.view(views, -1, vectors_ND.shape[1]))
    return parts if views == 3 else [*parts, None]


def worst(ours: Tensor, official: Tensor) -> float:
    """Largest error relative to the largest official entry."""
    if official.numel() == 0:
        return 0.0
    return ((ours.double() - official.double()).abs().max() / official.double().abs().max().clamp(min=1e-300)).item()
