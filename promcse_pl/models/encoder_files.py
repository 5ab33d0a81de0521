"""Read the files of a pre-trained encoder: config, weights, tokenizer and MLM head. No code in them is run."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promcse_pl.models.attention import PROMPT_ATTENTION
from promcse_pl.models.families import FAMILIES, SUPPORTED, unsupported
from promcse_pl.models.weights import file_sha256, read_header, read_json_object
from promcse_pl.utils.errors import EncoderError
from promcse_pl.utils.paths import is_there

log = logging.getLogger(__name__)

_LARGEST = {"num_hidden_layers": 1000, "num_labels": 100_000}
"""Maximum of fields in config.json for which transformers builds lists of that length before it reads the weights."""
_UNSUPPORTED_FIELDS = ("quantization_config", "per_layer_config")
"""Fields of config.json that replace layers without changing the other fields; no supported encoder needs them."""

_PEFT_ADAPTER = "adapter_config.json"
_MOST_POSITIONS = 2**24
_QUIET = threading.RLock()


def first_line(error: BaseException) -> str:
    """Return the first line of a message; some libraries' messages fill a screen."""
    return str(error).strip().split("\n", 1)[0][:500]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the loading bars and reports of transformers; callers check what matters in them."""
    from transformers.utils import logging

    with _QUIET:  # two threads would restore each other's settings
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()


def read_config(source: str | Path, name: str, revision: str | None = None) -> Any:  # noqa: ANN401  (a transformers config)
    """Return the config of an encoder of a supported family.

    Args:
        source: Folder (a Path), or hub id (a str).
        name: The encoder in messages.
        revision: Commit, tag or branch on the hub.

    Raises:
        EncoderError: The config cannot be read, is of an unsupported family, or has a PEFT adapter beside it.
    """
    from transformers import AutoConfig

    if isinstance(source, Path):
        _refuse_peft_adapter(source, name)
    try:
        if isinstance(source, Path):
            _check_config_file(source / "config.json")
        config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        if isinstance(source, Path) and (unknown := _unknown_model_type(source / "config.json")):
            raise unsupported(unknown, name) from error
        hint = (
            f"{name} is neither a local folder nor an installed weight wheel, and cannot be downloaded from the hub. Check "
            "the name and the network, or use a downloaded encoder: model.path=FOLDER in a run, --encoder FOLDER elsewhere"
            if not isinstance(source, Path)
            else "expected a folder with config.json and model.safetensors as transformers writes them"
        )
        raise EncoderError(
            f"cannot read the encoder {name}: {hint}. ({type(error).__name__}: {first_line(error)})"
        ) from error
    if config.model_type not in SUPPORTED:
        raise unsupported(config.model_type, name)
    if getattr(config, "max_position_embeddings", 0) > _MOST_POSITIONS:  # allocated in full by some families
        raise EncoderError(
            f"cannot read the encoder {name}: max_position_embeddings is {config.max_position_embeddings}, the maximum is "
            f"{_MOST_POSITIONS}"
        )
    try:
        FAMILIES[config.model_type].require_supported(config)
    except EncoderError as error:
        raise EncoderError(f"{name}: {error}") from None
    return config


def _refuse_peft_adapter(folder: Path, name: str) -> None:
    """Reject a folder with a PEFT adapter, which transformers applies if peft is installed and ignores if it is not."""
    if is_there(folder / _PEFT_ADAPTER):
        raise EncoderError(
            f"{name} has a PEFT adapter in its folder ({_PEFT_ADAPTER}), which transformers applies only if peft is installed. "
            f"Use the encoder without {_PEFT_ADAPTER}, or merge the adapter into a copy: PeftModel.from_pretrained("
            f"AutoModel.from_pretrained(BASE), {str(folder)!r}).merge_and_unload().save_pretrained(NEW), where BASE has no "
            f"{_PEFT_ADAPTER}, and AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(NEW)"
        )


def _unknown_model_type(path: Path) -> str | None:
    """Return the `model_type` of a config.json if transformers has no class for it: a misspelling, or remote code."""
    from transformers import CONFIG_MAPPING

    try:
        model_type = read_json_object(path).get("model_type")
    except (OSError, ValueError):
        return None
    return model_type if isinstance(model_type, str) and model_type not in CONFIG_MAPPING else None


def _check_config_file(path: Path) -> None:
    """Check config.json for values that make transformers hang, allocate unbounded memory or build unsupported layers.

    Raises:
        OSError, ValueError: The file is rejected; the message gives the reason.
    """
    raw = read_json_object(path)
    for key, most in _LARGEST.items():
        if isinstance(raw.get(key), int | float) and not raw[key] <= most:
            raise ValueError(f"{key} is {raw[key]}, the maximum is {most}")
    for key in _UNSUPPORTED_FIELDS:
        if raw.get(key):
            raise ValueError(f"{key} is set, which is not supported. Use an encoder without it")


def model_on_meta(config: Any) -> nn.Module:  # noqa: ANN401  (a transformers config)
    """Build the encoder of a config on the meta device: no memory is allocated for its weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]), quiet_transformers():
        model: nn.Module = auto_class(config).from_config(config, **without_pooler(config))
    return model


def auto_class(config: Any) -> Any:  # noqa: ANN401
    """Return the class of transformers that loads the encoder of a config."""
    import transformers

    return getattr(transformers, FAMILIES[config.model_type].auto_class)


def without_pooler(config: Any) -> dict[str, bool]:  # noqa: ANN401
    """Return the option that builds an encoder without the pooler, which no pooling here uses."""
    return {"add_pooling_layer": False} if FAMILIES[config.model_type].has_pooler else {}


def _check_sizes(config: Any, folder: Path) -> None:  # noqa: ANN401
    """Check that a config does not declare more weights than its weight files contain, before transformers allocates them."""
    stored = [spec for path in sorted(folder.glob("*.safetensors")) for spec in read_header(path).values()]
    if config.num_hidden_layers > len(stored):
        raise ValueError(
            f"config.json declares {config.num_hidden_layers} layers, the weight files contain {len(stored)} tensors"
        )
    wanted = sum(weight.numel() for weight in model_on_meta(config).parameters())
    held = sum(spec.numel for spec in stored)
    if wanted > held:
        raise ValueError(f"config.json declares {wanted:,} weights, the weight files contain {held:,}")


def read_model(folder: Path, config: Any, name: str, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401
    """Return the encoder in a folder, without pooler and with the prompt attention.

    Args:
        folder: Folder with *.safetensors.
        config: From `read_config`.
        name: The encoder in messages.
        dtype: Type that the weights are kept and computed in.

    Raises:
        EncoderError: The weights cannot be read, or some are missing.
    """
    try:
        _check_sizes(config, folder)
        with quiet_transformers():
            model, report = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=PROMPT_ATTENTION,
                output_loading_info=True,
                trust_remote_code=False,
                **without_pooler(config),
            )
    except Exception as error:
        raise EncoderError(f"cannot read the weights of {name}: {type(error).__name__}: {first_line(error)}") from error
    if report["missing_keys"]:
        raise EncoderError(
            f"the weights of {name} lack {len(report['missing_keys'])} tensors of the encoder, such as "
            f"{min(report['missing_keys'])}: they would be random"
        )
    if auto_map := getattr(config, "auto_map", None):
        log.warning(
            "config.json of %s names code (auto_map: %s), which is not executed. The encoder is transformers' %s; if the code "
            "computes something else, such as attention in both directions, the embeddings differ",
            name,
            repr(auto_map)[:200],
            type(model).__name__,
        )
    found: nn.Module = model
    return found


def weights_sha256(folder: Path) -> str:
    """Return the sha256 of the weights in a folder; for sharded weights, that of all shards in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if not any(folder.glob("*.bin")):
            raise EncoderError(f"{folder} holds no *.safetensors: copy the encoder from its source again")
        convert = (
            "AutoModel.from_pretrained(OLD, weights_only=True).save_pretrained(NEW), and the same with AutoTokenizer"
        )
        if (folder / "modules.json").is_file():  # pooling, Dense layers and prompts are kept too
            convert = "SentenceTransformer(OLD).save_pretrained(NEW)"
        raise EncoderError(
            f"{folder} holds no *.safetensors. Pickled weights are not read; convert them once: {convert}"
        )
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


def read_tokenizer(folder: Path | None, name: str, vocabulary: int) -> Any:  # noqa: ANN401  (a transformers tokenizer)
    """Return the tokenizer in an encoder's folder; one without a padding token pads with its end-of-sequence token.

    Args:
        folder: The folder; None for a model built in memory.
        name: The encoder in messages.
        vocabulary: V, the rows of the encoder's embedding matrix.

    Raises:
        EncoderError: There is none, it cannot be read, it has more tokens than the embedding matrix (special tokens without an
            embedding are allowed, texts with them are not), or no token for padding.
    """
    from transformers import AutoTokenizer

    if folder is None:
        raise EncoderError(f"{name} has no tokenizer: save one in its folder with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise EncoderError(
            f"cannot read the tokenizer of {name}: {type(error).__name__}: {first_line(error)}"
        ) from error
    # transformers returns a tokenizer with nothing but special tokens for a folder without tokenizer files
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise EncoderError(
            f"{name} has no tokenizer. Try: AutoTokenizer.from_pretrained(OLD).save_pretrained({str(folder)!r})"
        )
    # Gemma 3 adds special tokens for images, which its text encoders have no embeddings for
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if len(tokenizer) > vocabulary and not special.issuperset(range(vocabulary, len(tokenizer))):
        raise EncoderError(
            f"the tokenizer of {name} knows {len(tokenizer)} tokens, its embedding matrix only {vocabulary}: they do not "
            "belong together"
        )
    if tokenizer.pad_token_id is None:  # decoders; the attention mask excludes padding, so that any token will do
        if tokenizer.eos_token_id is None:
            raise EncoderError(
                f"the tokenizer of {name} has neither a padding nor an end-of-sequence token. Add "
                f'"pad_token": "TOKEN" with one of its tokens to {folder / "tokenizer_config.json"}'
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_mlm_head(folder: Path, family: str) -> dict[str, Tensor] | None:
    """Return the tensors of the pre-trained MLM head under the names of `MlmHead`; None if the files contain none.

    The decoder's weight is not among them: in pre-trained files it is tied to the word embeddings.
    """
    from safetensors import safe_open

    names = FAMILIES[family].mlm_head
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            found |= {ours: file.get_tensor(theirs) for ours, theirs in names.items() if theirs in stored}
    return found if names and set(found) == set(names) else None
