"""Small encoders and tokenizers made in memory."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from promcse_pl.adapter import save_adapter
from promcse_pl.data.batch import Tokens
from promcse_pl.models.attention import prompt_in_attention
from promcse_pl.models.backbone import SUPPORTED, FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.encoder_files import auto_class
from promcse_pl.models.identity import EncoderId
from support import single_thread  # noqa: F401

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # with the usual 0.02 so small an encoder hardly attends to anything
}

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
T5 = {"d_ff": 24, "d_kv": 6, "relative_attention_num_buckets": 8}
FAMILIES: dict[str, dict[str, object]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 12},
    "mpnet": {"pad_token_id": 1},
    "xlm-roberta-xl": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1},
    "data2vec-text": {"pad_token_id": 1},
    "ernie": {},
    "distilbert": {"hidden_dim": 24},
    "albert": {"embedding_size": 12, "num_hidden_groups": 2},
    "eurobert": {"num_key_value_heads": 1, **dict.fromkeys(("bos_token_id", "eos_token_id", "mask_token_id"), 2)},
    "nomic_bert": {},
    "gte": {},
    "jina_embeddings_v3": {"pad_token_id": 1},
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    # a window narrower than a sentence; the default special tokens lie outside so small a vocabulary
    "modernbert": {
        "local_attention": 6,
        **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 2),
    },
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 5},
    "qwen2": {**GROUPED, **WINDOW, "num_key_value_heads": 1, "max_window_layers": 1},
    "qwen3": {**GROUPED, **WINDOW, "max_window_layers": 2, "head_dim": 6},
    "gemma3_text": {
        **GROUPED,
        "head_dim": 6,
        "query_pre_attn_scalar": 5,
        "sliding_window": 9,  # 5 to each side, both ends exclusive
        "sliding_window_pattern": 2,
        "use_bidirectional_attention": True,
    },
}
"""What each supported family needs beside SMALL."""


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def small_config(family: str, **changes: object) -> Any:
    return AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})


_BUILT: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {}
"""Encoders, and the random state after building them: a copy takes a fifth of the time, and there are thousands."""
_SAVED: dict[str, dict[str, bytes]] = {}
"""Files of encoders by name."""


def small_encoder(family: str, **changes: object) -> torch.nn.Module:
    key = f"{family} {changes}"
    if key not in _BUILT:
        torch.manual_seed(1)
        config = small_config(family, **changes)
        model = (auto_class(config) if family in SUPPORTED else AutoModel).from_config(config)
        _BUILT[key] = model, torch.get_rng_state()
    model, state = _BUILT[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def small_backbone(family: str = "bert", **changes: object) -> FrozenBackbone:
    return FrozenBackbone(small_encoder(family, **changes), EncoderId(f"small-{family}", None, "0" * 64))


def prompt_encoder(
    family: str = "bert",
    *,
    length: int = 4,
    dtype: torch.dtype = torch.float64,
    changes: dict[str, object] | None = None,
    **options: Any,
) -> PromptEncoder:
    """A prompt encoder in eval mode whose prompt and head are large enough to matter."""
    encoder = PromptEncoder(small_backbone(family, **(changes or {})), length=length, **{"pooling": "avg", **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(encoder).values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return encoder.to(dtype).eval()


def trained(encoder: PromptEncoder) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def ignore_prompt_in_layer(model: torch.nn.Module, number: int) -> None:
    """Let one layer of an encoder run without the prompt."""
    count = model.config.num_hidden_layers
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    forward = layers[number].forward

    def without_prompt(*inputs: object, **options: object) -> object:
        with prompt_in_attention(None):
            return forward(*inputs, **options)

    layers[number].forward = without_prompt


COMMON = ("bert", "mpnet", "t5", "modernbert", "deberta-v2", "qwen3", "gemma3_text")
"""One family for each way in which prompts and positions reach the layers."""
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in COMMON else [pytest.mark.exhaustive]) for name in FAMILIES]
)
"""All families; those that are not in `COMMON` only with PROMCSE_TESTS=all."""


def small_tokens(lengths: list[int], pad_id: int = 0) -> Tokens:
    """Random sentences of the given lengths, padded to the longest."""
    lengths_N = torch.tensor(lengths)
    mask_NT = (torch.arange(max(lengths)) < lengths_N.unsqueeze(1)).long()
    ids_NT = torch.randint(5, SMALL["vocab_size"], mask_NT.shape, generator=torch.Generator().manual_seed(2))
    return Tokens(torch.where(mask_NT.bool(), ids_NT, pad_id), mask_NT)


def small_tokenizer(pad_id: int = 0) -> PreTrainedTokenizerFast:
    """Words w5, w6, ... by their number; [CLS] and [SEP] around them."""
    words = ["[PAD]", "[UNK]"] if pad_id == 0 else ["[UNK]", "[PAD]"]
    words += ["[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, SMALL["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_small_encoder(folder: Path, family: str = "bert", **changes: object) -> Path:
    """Write a small encoder and its tokenizer as transformers does; returns the folder."""
    model, key = small_encoder(family, **changes), f"{family} {changes}"
    if key not in _SAVED:
        with tempfile.TemporaryDirectory() as temporary:
            _save(model, Path(temporary), family)
            _SAVED[key] = {path.name: path.read_bytes() for path in Path(temporary).iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _SAVED[key].items():
        (folder / name).write_bytes(content)
    return folder


def _save(model: Any, folder: Path, family: str) -> None:
    model.save_pretrained(folder)
    tokenizer = small_tokenizer(model.config.pad_token_id)
    if family == "qwen2":  # transformers reads any tokenizer of this family as byte-level BPE, which keeps added tokens
        tokenizer.eos_token = "[SEP]"
        tokenizer.add_tokens([AddedToken(f"w{i}", normalized=False) for i in range(5, SMALL["vocab_size"])])
    tokenizer.save_pretrained(folder)


def save_small_adapter(folder: Path) -> Path:
    """Write the small encoder and an untrained adapter of it; returns the adapter's folder."""
    backbone = FrozenBackbone.load(str(save_small_encoder(folder / "encoder")))
    save_adapter(PromptEncoder(backbone, length=3, pooling="avg"), folder / "adapter")
    return folder / "adapter"


def add_pipeline(folder: Path, width: int = SMALL["hidden_size"]) -> Path:
    """Add the files of sentence-transformers to an encoder: cls pooling, a dense layer to 8 features, a default prompt."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    files = {
        "modules.json": [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules],
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "2_Dense/config.json": {"in_features": width, "out_features": 8},
        "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "w5 "}, "default_prompt_name": "query"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    torch.manual_seed(0)
    tensors = {"linear.weight": torch.randn(8, width) / width**0.5, "linear.bias": torch.randn(8)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return folder
