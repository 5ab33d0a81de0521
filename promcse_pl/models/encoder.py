"""The prompt encoder: backbone, prompt, pooling and head, from token ids to sentence embeddings."""

# N sentences, T tokens, D width, M masked tokens, R rank

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn

from promcse_pl.config import Head, PromptKind
from promcse_pl.data.batch import Tokens, upload
from promcse_pl.data.masking import IGNORED
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.chunks import plan_chunks, run_chunks
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.models.pooling import needs_all_layers, needs_first_token, pool
from promcse_pl.models.prompt import INIT_STD, DeepPrompt, InputPrompt, Prompt, SharedPrompt
from promcse_pl.utils.errors import ConfigError

HEADS: tuple[Head, ...] = get_args(Head)
HEAD_RANK = 8
"""Default rank of the head `low_rank`."""

STATE_PREFIX = "backbone."
MODEL_PREFIX = f"{STATE_PREFIX}model."
"""Prefix of the encoder's weights in the state dict."""


class MlpHead(nn.Module):
    """Linear(D, D) and tanh on the pooled embedding (Jiang et al. 2022); newly initialised, not BERT's pooler."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, dtype=torch.float32)
        nn.init.normal_(self.dense.weight, std=INIT_STD)
        nn.init.zeros_(self.dense.bias)

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return (N, D) embeddings with entries in (-1, 1)."""
        return torch.tanh(self.dense(pooled_ND))


class LowRankHead(nn.Module):
    """h + U V h for a pooled embedding h; U starts at zero, so the embedding is unchanged before training.

    Args:
        width: D.
        rank: R, the number of rows of V, (R, D).
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, width, bias=False, dtype=torch.float32)
        nn.init.normal_(self.down.weight, std=INIT_STD)
        nn.init.zeros_(self.up.weight)

    @property
    def rank(self) -> int:
        """R."""
        return self.down.out_features

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return (N, D) embeddings."""
        changed: Tensor = pooled_ND + self.up(self.down(pooled_ND))
        return changed


class PromptEncoder(nn.Module):
    """Sentence embeddings from an encoder with a trained prompt.

    Its state dict contains exactly what is trained: the prompt, the head, and the weights of the backbone that
    `FrozenBackbone.tune` has selected.

    Args:
        backbone: The encoder.
        length: Prompt length P >= 0.
        kind: `deep`, `projected`, `shared` or `input`; a deep prompt with a `projection_size` is projected.
        projection_size: Hidden width of the re-parametrisation of a deep prompt, or None.
        pooling: See `promcse_pl.models.pooling.pool`.
        head: `none`; `mlp` and `low_rank`: used in training and at test time; `mlp_train_only`: used in training only.
        head_rank: Rank of the head `low_rank`; None: 8.
        dropout: Prompt dropout; None: the encoder's hidden dropout, as in the official code.
        position_offset: Shift of all positions; None: P, as in the official code, or 0 for an input prompt or an encoder without
            position ids.
        text: How texts become token ids at encode time; None: as in the encoder's pipeline.

    Attributes:
        width: Dimension of an embedding: after the pooling, and after the dense layers of the encoder.
        autocast: Type that an encoder with float32 weights computes in (`torch.autocast`); None: float32.
        trained_by: `adapter_hash` and summary of the training, if the model was loaded from an adapter; otherwise
            None.

    Raises:
        ConfigError: A position offset for an encoder without position ids, an input prompt for an encoder without absolute
            positions, or dense layers of the encoder that do not take the width of this pooling.
    """

    # the parameters are the settings of model and prompt that decide an embedding
    def __init__(
        self,
        backbone: FrozenBackbone,
        *,
        length: int,
        kind: PromptKind = "deep",
        projection_size: int | None = None,
        pooling: str = "cls",
        head: Head = "none",
        head_rank: int | None = None,
        dropout: float | None = None,
        position_offset: int | None = None,
        text: TextSettings | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        dropout = backbone.hidden_dropout if dropout is None else dropout
        self.prompt = build_prompt(kind, length, backbone, projection_size=projection_size, dropout=dropout)
        self.pooling = pooling
        self.text = backbone.pipeline.text if text is None else text
        self.width = backbone.embedding_width(pooling)
        self.head_mode: Head = head
        self.head = _build_head(head, self.width, head_rank)
        has_positions = backbone.family.positions != "none"
        if position_offset and not has_positions:
            raise ConfigError(
                f"prompt.position_offset={position_offset}: {backbone.model_type} encoders have no position ids to shift. "
                "Try: prompt.position_offset=null"
            )
        default = length if has_positions and self.prompt.kind != "input" else 0
        self.position_offset = default if position_offset is None else position_offset
        self.autocast: torch.dtype | None = None
        self.trained_by: tuple[str, dict[str, Any]] | None = None
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_no_frozen)  # type: ignore[no-untyped-call]

    @property
    def has_test_head(self) -> bool:
        """Whether the head is part of the test-time embedding."""
        return self.head_mode in ("mlp", "low_rank")

    @property
    def longest_input(self) -> int:
        """Maximum number of tokens that fit the encoder after its prompt, special ones included."""
        return self.backbone.longest_input(self.position_offset, self.text.max_length)

    def forward(
        self,
        tokens: Tokens,
        *,
        train_head: bool = False,
        chunk_tokens: int | None = None,
        chunk_sentences: int | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode sentences, in chunks of similar length.

        Chunks do not change the result: embeddings are returned in the order of the rows.

        Args:
            tokens: N sentences.
            train_head: True for the embeddings for the loss, False for test-time embeddings (they differ with
                `mlp_train_only`).
            chunk_tokens, chunk_sentences: Maximum tokens and sentences of a chunk; see `plan_chunks`.
            recompute: See `run_chunks`.

        Returns:
            Unnormalised embeddings (N, D), float32 or wider; and, if the batch has an MLM task, the hidden states of its masked
            tokens (M, D), in the row-major order of the labels.
        """
        if tokens.lengths_N is None and bool(tokens.mask_NT[:, 0].all()):
            tokens = dataclasses.replace(tokens, lengths_N=tokens.lengths())
        planned = plan_chunks(tokens.lengths(), chunk_tokens, chunk_sentences)
        order_N = torch.cat(planned)
        # sentences that may be padded at the start are not trimmed
        is_trimmed = chunk_tokens is not None and tokens.lengths_N is not None
        ordered = tokens.select(order_N, tokens.mask_NT.shape[1])
        chunks = _split(ordered, [len(rows) for rows in planned], is_trimmed=is_trimmed)
        weights = [weight for weight in self.backbone.parameters() if weight.requires_grad]
        found = run_chunks(
            self.encode_chunk, self.prompt(), chunks, weights=weights, dropout=self.training, recompute=recompute
        )
        pooled, hidden = [outputs[0] for outputs in found], [outputs[1] for outputs in found if len(outputs) > 1]
        embeddings_ND = _float(torch.cat(pooled))[upload(torch.argsort(order_N), pooled[0].device)]
        if self.head is not None and (train_head or self.has_test_head):
            embeddings_ND = self.head(embeddings_ND)
        return embeddings_ND, self._in_row_order(hidden, tokens, order_N) if hidden else None

    def encode_chunk(self, chunk: Tokens, prompt: Tensor) -> tuple[Tensor, ...]:
        """Return the pooled embeddings of a chunk before the head and, with an MLM task, the hidden states of masked tokens."""
        # the MLM pass gets the same prompt with the same dropout mask
        dropped = self.prompt.drop(prompt.to(self.backbone.dtype), chunk.ids_NT.shape[0])
        pooled = self._pool(chunk, dropped)
        if chunk.mlm_ids_NT is None or chunk.mlm_labels_NT is None:
            return (pooled,)
        (states,) = self._states(chunk, chunk.mlm_ids_NT, dropped)
        masked_M = (chunk.mlm_labels_NT != IGNORED).flatten().nonzero()[:, 0]  # on the CPU, like the labels
        return pooled, states.flatten(0, 1).index_select(0, upload(masked_M, states.device))

    def _states(
        self,
        tokens: Tokens,
        ids_NT: Tensor,
        prompt: Tensor,
        *,
        all_layers: bool = False,
        first_token: bool = False,
    ) -> tuple[Tensor, ...]:
        with self._autocast(ids_NT.device):
            states: tuple[Tensor, ...] = self.backbone(
                ids_NT,
                tokens.mask_NT,
                prompt,
                position_offset=self.position_offset,
                types_BT=tokens.types_NT,
                all_layers=all_layers,
                first_token=first_token,
            )
        return states

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # no weight cache, which threads would share; each chunk converts each weight once
        return torch.autocast(device.type, self.autocast, cache_enabled=False)

    def _pool(self, tokens: Tokens, prompt: Tensor) -> Tensor:
        states = self._states(
            tokens,
            tokens.ids_NT,
            prompt,
            all_layers=needs_all_layers(self.pooling),
            first_token=needs_first_token(self.pooling) and tokens.lengths_N is not None,
        )
        pooled: Tensor = self.backbone.dense(pool([_float(state) for state in states], tokens.mask_NT, self.pooling))
        return pooled

    @staticmethod
    def _in_row_order(hidden: list[Tensor], tokens: Tokens, order_N: Tensor) -> Tensor:
        """Return the hidden states of all chunks in the row-major order of the batch's labels."""
        assert tokens.mlm_labels_NT is not None
        counts_N = (tokens.mlm_labels_NT != IGNORED).sum(1)
        row_of_hidden = torch.repeat_interleave(order_N, counts_N[order_N])
        return _float(torch.cat(hidden))[upload(torch.argsort(row_of_hidden, stable=True), hidden[0].device)]


def _split(tokens: Tokens, sizes: Sequence[int], *, is_trimmed: bool) -> list[Tokens]:
    """Return consecutive sentences as chunks.

    Args:
        tokens: The sentences.
        sizes: Number of sentences of each chunk.
        is_trimmed: Whether a chunk is as long as its longest sentence, instead of as long as the batch.
    """
    chunks, start, lengths_N = [], 0, tokens.lengths()
    for size in sizes:
        rows = slice(start, start + size)
        chunks.append(tokens.select(rows, int(lengths_N[rows].max()) if is_trimmed else tokens.mask_NT.shape[1]))
        start += size
    return chunks


def build_prompt(
    kind: PromptKind, length: int, backbone: FrozenBackbone, *, projection_size: int | None = None, dropout: float
) -> Prompt:
    """Return an untrained prompt for an encoder; see `PromptEncoder`.

    Raises:
        ConfigError: The encoder's family does not take an input prompt.
    """
    if kind == "input":
        if not backbone.takes_input_prompt:
            raise ConfigError(
                f"prompt.kind=input needs an encoder whose positions are absolute, but {backbone.identity.name} "
                f"({backbone.model_type}) has relative or rotary positions or is a decoder. Try: prompt.kind=shared"
            )
        return InputPrompt(length, width=backbone.input_width, dropout=dropout)
    shape = {"layers": backbone.layers, "heads": backbone.kv_heads, "head_size": backbone.head_size}
    if kind == "shared":
        return SharedPrompt(length, **shape, dropout=dropout)
    return DeepPrompt(length, **shape, projection_size=projection_size, dropout=dropout)


def _build_head(head: Head, width: int, rank: int | None) -> nn.Module | None:
    if head == "none":
        return None
    return LowRankHead(width, rank or HEAD_RANK) if head == "low_rank" else MlpHead(width)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode in a block, and restore the mode of each of its modules afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def _float(tensor: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _drop_frozen(module: PromptEncoder, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    trained = {f"{prefix}{MODEL_PREFIX}{name}" for name in module.backbone.tuned_names}
    for key in [key for key in state if key.startswith(prefix + STATE_PREFIX) and key not in trained]:
        del state[key]


def _expect_no_frozen(module: PromptEncoder, incompatible: object) -> None:
    trained = tuple(f".{MODEL_PREFIX}{name}" for name in module.backbone.tuned_names)
    missing: list[str] = incompatible.missing_keys  # type: ignore[attr-defined]
    missing[:] = [key for key in missing if f".{STATE_PREFIX}" not in f".{key}" or f".{key}".endswith(trained)]
