"""The pipeline around an encoder that sentence-transformers stores in modules.json: texts, pooling and dense layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args

from promcse_pl.config.pooling import is_pooling
from promcse_pl.models.dense import ACTIVATIONS, DenseSpec
from promcse_pl.models.weights import read_json_list, read_json_object
from promcse_pl.utils.errors import ConfigError, EncoderError
from promcse_pl.utils.paths import is_there

MODULES = "modules.json"
SHORTEST_INPUT = 3
"""Minimum of `max_length`: the two special tokens and a word."""

Value = TypeVar("Value")

_MODULE = re.compile(
    r"sentence_transformers\.(?:models|base\.modules|sentence_transformer\.modules)(?:\.\w+)?\."
    r"(Transformer|Pooling|Dense|Normalize)"
)
_ADVICE = (
    "Try: a copy of the folder without modules.json, and the pooling by hand (model.pooling=avg, or promcse evaluate --pooling "
    "avg); its dense layers, prompts and maximum length are then not used"
)
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the Transformer module's settings, in the order in which sentence-transformers looks for them."""
_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "avg",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "lasttoken",
}
POOLING_MODES = {"cls_before_pooler": "cls", **{ours: theirs for theirs, ours in _POOLINGS.items()}}
"""Pooling -> its name in sentence-transformers."""
_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "avg",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ROLE_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Role of a text in retrieval -> names of its prompt, the first that exists, as in sentence-transformers."""
_KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", dict: "an object", NoneType: "null"}
_LARGEST = 2**20
"""Maximum width of a dense layer."""
_NO_LIMIT = 2**30
"""Values of the tokenizer's `model_max_length` from here on stand for no limit."""
_DEFAULTS = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": (None, True, False),
}
"""Settings of the Transformer module -> values that this package implements."""
_OPTIONS = {
    "model": {"attn_implementation", "dtype", "torch_dtype", "trust_remote_code"},
    "processor": {"model_max_length", "padding_side", "trust_remote_code"},
    "tokenizer": {"model_max_length", "padding_side", "trust_remote_code"},
    "config": {"trust_remote_code"},
}
"""Prefixes of *_args and *_kwargs of the Transformer module -> options that are applied or have no effect here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """How texts become the input of an encoder.

    Attributes:
        max_length: Maximum number of tokens, special ones included; None: the limit of the encoder.
        lower_case: Whether texts are converted to lower case.
        prompts: Name -> text that is put in front of a sentence, such as {"query": "query: "}.
        default_prompt: Name of the prompt that is used if none is given; None: no prompt.
    """

    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    @property
    def changes_texts(self) -> bool:
        """Whether texts are changed before tokenisation if no prompt is given."""
        return self.lower_case or bool(self.prompt_text())

    def nearest_prompt(self, name: str) -> str | None:
        """Return the name of a prompt that is close to an unknown one; None if there is none."""
        return next(iter(difflib.get_close_matches(name, self.prompts, n=1)), None)

    def prompt_text(self, name: str | None = None, text: str | None = None) -> str:
        """Return the text to put in front of sentences: `text` if given, else the prompt of a name, else the default prompt.

        Raises:
            ConfigError: There is no prompt of that name, or both are given.
        """
        if None not in (name, text):
            raise ConfigError(f"prompt_name={name!r} and prompt={text!r} are mutually exclusive. Pass only one")
        if text is not None:
            return text
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            near = self.nearest_prompt(str(name))
            advice = f"prompt_name={near!r}" if near else 'prompt="TEXT: " with the text itself'
            raise ConfigError(f"there is no prompt {name!r} (known: {known}). Try: {advice}")
        return self.prompts[name]

    def role_prompt(self, role: str) -> str | None:
        """Return the name of the prompt of queries or documents (`ROLE_PROMPTS`), else that of the default prompt."""
        return next((name for name in ROLE_PROMPTS[role] if name in self.prompts), self.default_prompt)

    def prepare(self, texts: Sequence[str], prompt: str = "", *, tokenizer: Any) -> list[str]:  # noqa: ANN401
        """Prepend a prompt text, and convert texts to lower case if set, except special and other added tokens in them.

        Args:
            texts: N texts.
            prompt: Text to prepend.
            tokenizer: The transformers tokenizer of the texts; it is not changed.
        """
        prepared = [prompt + text for text in texts]
        if not self.lower_case:
            return prepared
        names = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        added = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        # every second part is an added token. Character by character, like the tokenizers library: str.lower on a whole word
        # maps a final sigma differently
        return [
            "".join(part if i % 2 else "".join(map(str.lower, part)) for i, part in enumerate(added.split(text)))
            for text in prepared
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The settings of a sentence-transformers folder.

    Attributes:
        pooling: Pooling of the token embeddings; None without modules.json.
        text: How texts become the input of the encoder.
        dense: Dense layers after the pooling, in order.
    """

    pooling: str | None = None
    text: TextSettings = field(default_factory=TextSettings)
    dense: tuple[DenseSpec, ...] = ()


def read_pipeline(folder: Path, max_positions: int | None = None) -> Pipeline:
    """Read modules.json of an encoder's folder and the settings of its modules; no weights are read and no code is run.

    A Normalize module at the end is ignored: `encode` normalises embeddings by default.

    Args:
        folder: Folder of the encoder.
        max_positions: `max_position_embeddings` of the encoder. As in sentence-transformers, it limits a maximum length that
            only the tokenizer declares, but not `max_seq_length`.

    Returns:
        The pipeline; the default one without modules.json.

    Raises:
        EncoderError: A file is missing or cannot be read, or a module or setting is not supported.
    """
    path = folder / MODULES
    if not is_there(path):
        return Pipeline()
    modules = [_module(entry, path) for entry in _read(path, read_json_list)]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "Normalize"}:
        raise EncoderError(
            f"{path} has the modules {', '.join(kinds) or 'none'}; supported: Transformer, Pooling, then any of Dense and "
            f"Normalize. {_ADVICE}"
        )
    if modules[0][1] != folder:
        raise EncoderError(
            f"{path} has its encoder in the folder {modules[0][1].name}, not beside modules.json. Try: "
            "SentenceTransformer(OLD).save_pretrained(NEW), and model.path=NEW"
        )
    dense, normalize = [], False
    for kind, module_folder in modules[2:]:
        if kind == "Dense":
            dense.append(_dense(module_folder, normalize))
        else:
            _check_names(_read_optional(module_folder / "config.json"), module_folder / "config.json")
        normalize = kind == "Normalize"
    text = _text(folder, max_positions)
    return Pipeline(pooling=_pooling(modules[1][1] / "config.json"), text=text, dense=tuple(dense))


def _module(entry: object, path: Path) -> tuple[str, Path]:
    """Return the kind of a module and its folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not isinstance(entry.get("path"), str):
        raise EncoderError(
            f"{path}: every module needs a type and a path, got {_shown(entry)}. Restore the published file"
        )
    found = _MODULE.fullmatch(entry["type"])
    if found is None:
        raise EncoderError(
            f"{path} has the module {_shown(entry['type'])}, which is not supported (supported: Transformer, Pooling, Dense, "
            f"Normalize of sentence-transformers). {_ADVICE}"
        )
    module_folder = PurePosixPath(entry["path"])
    if module_folder.is_absolute() or ".." in module_folder.parts or not entry["path"].isprintable():
        raise EncoderError(f"{path}: the path {_shown(entry['path'])} leaves the folder. Restore the published file")
    return found.group(1), path.parent / module_folder


def _pooling(path: Path) -> str:
    """Return the pooling in the settings of a Pooling module."""
    config = _read(path, read_json_object)
    unknown = set(config) - {
        "word_embedding_dimension",
        "embedding_dimension",
        "pooling_mode",
        "include_prompt",
        *_OLD_POOLINGS,
    }
    if unknown:
        raise EncoderError(f"{path} has the unknown setting {_shown(min(unknown))}. {_ADVICE}")
    if not _value(config, "include_prompt", bool, True, path):
        raise EncoderError(
            f"{path}: include_prompt is false, so the pooling would leave out the tokens of a prompt, which is not supported. "
            "Try: a copy of the folder with include_prompt true, if its prompts are not used"
        )
    modes = config.get("pooling_mode")
    if modes is None:
        pooling = (
            "+".join(ours for key, ours in _OLD_POOLINGS.items() if _value(config, key, bool, False, path)) or "avg"
        )
    else:
        names = modes if isinstance(modes, list) else [modes]
        pooling = "+".join(_POOLINGS.get(name, "?") if isinstance(name, str) else "?" for name in names)
    if not is_pooling(pooling):
        raise EncoderError(
            f"{path}: pooling_mode is {_shown(modes)}; allowed: {', '.join(_POOLINGS)}, or a list of them"
        )
    return pooling


def _dense(folder: Path, normalize: bool) -> DenseSpec:
    """Return the settings of a Dense module."""
    path = folder / "config.json"
    config = _read(path, read_json_object)
    _check_names(config, path)
    if config.get("use_residual"):
        raise EncoderError(f"{path}: use_residual is set, which is not supported. {_ADVICE}")
    activation = _value(config, "activation_function", str, "torch.nn.modules.activation.Tanh", path)
    module, _, name = activation.rpartition(".")
    if name not in ACTIVATIONS or not re.fullmatch(r"torch\.nn(\.modules\.\w+)?", module):
        raise EncoderError(
            f"{path}: activation_function is {_shown(activation)}; supported: {', '.join(ACTIVATIONS)} of torch.nn. {_ADVICE}"
        )
    inputs, outputs = (_value(config, key, int, None, path) for key in ("in_features", "out_features"))
    if not (1 <= inputs <= _LARGEST and 1 <= outputs <= _LARGEST):
        raise EncoderError(
            f"{path}: in_features and out_features must be in [1, {_LARGEST}], got {_shown([inputs, outputs])}"
        )
    bias = _value(config, "bias", bool, True, path)
    return DenseSpec(folder / "model.safetensors", inputs, outputs, bias, name, normalize)


def _check_names(config: Mapping[str, Any], path: Path) -> None:
    """Reject a Dense or Normalize module that reads or writes something other than the sentence embedding."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise EncoderError(f"{path}: {key} is {_shown(config[key])}; supported: 'sentence_embedding'. {_ADVICE}")


def _text(folder: Path, max_positions: int | None) -> TextSettings:
    """Return the text settings: those of the Transformer module, and the prompts."""
    path = next(
        (path for name in _TRANSFORMER_FILES if is_there(path := folder / name)), folder / _TRANSFORMER_FILES[0]
    )
    config = _read_optional(path)
    limit = _value(config, "max_seq_length", int | None, None, path)
    lower_case = _value(config, "do_lower_case", bool, False, path)
    options = _checked_options(config, path)
    tokenizer = folder / "tokenizer_config.json"
    if "model_max_length" in options:
        limit = options["model_max_length"]
    elif limit is None:  # sentence-transformers 6 stores the maximum length in the tokenizer's file
        limit = _value(_read_optional(tokenizer), "model_max_length", int | float | None, None, tokenizer)
        if limit is not None and limit < _NO_LIMIT and max_positions not in (None, -1):
            limit = min(limit, max_positions)
    if limit is not None and not limit >= SHORTEST_INPUT:  # also rejects NaN
        raise EncoderError(
            f"{path}: max_seq_length (or model_max_length of {tokenizer.name}) must be at least {SHORTEST_INPUT}, got {limit}"
        )
    prompts, default = _prompts(folder / "config_sentence_transformers.json")
    return TextSettings(
        max_length=None if limit is None or limit >= _NO_LIMIT else int(limit),
        lower_case=lower_case,
        prompts=prompts,
        default_prompt=default,
    )


def _checked_options(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the options of the tokenizer; raises EncoderError for a setting that affects embeddings and is not supported."""
    tokenizer: dict[str, Any] = {}
    for key, value in config.items():
        prefix, _, suffix = key.rpartition("_")
        if key in ("max_seq_length", "do_lower_case") or value in (None, {}, False) or value in _DEFAULTS.get(key, ()):
            continue
        if suffix in ("args", "kwargs") and isinstance(value, dict) and set(value) <= _OPTIONS.get(prefix, set()):
            tokenizer |= value if prefix in ("processor", "tokenizer") else {}
            continue
        # with a chat template ("message"), the text is not what the tokenizer gets
        text = {"method": "forward", "method_output_name": "last_hidden_state"}
        if (
            key == "modality_config"
            and isinstance(value, dict)
            and value.get("text") == text
            and "message" not in value
        ):
            continue
        raise EncoderError(f"{path}: {_shown(key)} is {_shown(value)}, which is not supported. {_ADVICE}")
    _value(tokenizer, "model_max_length", int | None, None, path)
    return tokenizer


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by name, and the name of the default prompt."""
    config = _read_optional(path)
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise EncoderError(f"{path}: model_type is {_shown(kind)}; supported: 'SentenceTransformer'. {_ADVICE}")
    if config.get("truncate_dim") is not None:
        raise EncoderError(
            f"{path}: truncate_dim is {_shown(config['truncate_dim'])}, which is not supported. Try: a copy of the folder with "
            "truncate_dim null, and embeddings[:, :SIZE]"
        )
    prompts = _value(config, "prompts", dict | None, None, path) or {}
    for name, text in prompts.items():
        if not isinstance(text, str | None):
            raise EncoderError(f"{path}: the prompt {_shown(name)} must be text, got {_shown(text)}")
    prompts = {name: text or "" for name, text in prompts.items()}
    default = _value(config, "default_prompt_name", str | None, None, path)
    if default is not None and default not in prompts:
        raise EncoderError(
            f"{path}: default_prompt_name is {_shown(default)}; the prompts are {_shown(list(prompts))}. Try: a copy of the "
            "folder with default_prompt_name null"
        )
    return prompts, default


def _read(path: Path, read: Callable[[Path], Value]) -> Value:
    try:
        return read(path)
    except FileNotFoundError:
        raise EncoderError(
            f"{path} is missing, but modules.json names it. Copy the encoder from its source again"
        ) from None
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read: {str(error)[:200]}. Restore the published file") from error


def _read_optional(path: Path) -> dict[str, Any]:
    return _read(path, read_json_object) if is_there(path) else {}


def _value(config: Mapping[str, Any], key: str, kind: type | UnionType, default: object, path: Path) -> Any:  # noqa: ANN401
    """Return a setting after checking its type; True and False are no integers."""
    value = config.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = " or ".join(_KINDS[each] for each in (get_args(kind) or (kind,)))
        raise EncoderError(f"{path}: {key} must be {kinds}, got {_shown(value)}. Restore the published file")
    return value


def _shown(value: object) -> str:
    """Return a value of a file for an error message, in one short line."""
    return repr(value)[:100]
