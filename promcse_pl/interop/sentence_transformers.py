"""An adapter as a sentence-transformers model: encode, evaluate and train with that library's tools.

The folder of a model with a prompt contains the adapter in `adapter/`, so `PromCSE.load` reads it too, and loads through
promcse_pl. Without a prompt, the folder contains the library's own modules only.
"""

# N sentences, T tokens, D width

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promcse_pl.adapter import card_of, describe, load_adapter, save_adapter, training_summary
from promcse_pl.data.batch import Tokens
from promcse_pl.embedder import PromCSE
from promcse_pl.model_card import CARD, Form, may_replace_card
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.encoder import LowRankHead, MlpHead, PromptEncoder
from promcse_pl.models.encoder_files import quiet_transformers
from promcse_pl.models.pipeline import POOLING_MODES, SHORTEST_INPUT
from promcse_pl.models.texts import tokenize
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError
from promcse_pl.utils.files import new_folder, update_folder, write_text
from promcse_pl.utils.paths import expand, require_regular_file

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, InputModule, Normalize, Pooling, Transformer
except ImportError as error:
    raise ConfigError("this needs sentence-transformers 6 or newer. Try: pip install 'promcse_pl[st]'") from error


class PromptTransformer(InputModule):  # type: ignore[misc]
    """The first module of a sentence-transformers model: encoder, prompt, pooling and head.

    In eval mode it returns the test-time embedding, in train mode the embedding for the loss (they differ with the head
    `mlp_train_only`). Embeddings are not normalised; `as_sentence_transformer` appends a Normalize module. The prompt, the head
    and the weights that `FrozenBackbone.tune` has selected take gradients; weights that are loaded from an adapter are frozen.

    Args:
        encoder: The prompt encoder; it is shared, not copied.
        tokenizer: A transformers tokenizer; None: that of the encoder. It is not saved.
        max_seq_length: See the property; None: that of the adapter.
    """

    config_file_name = "sentence_bert_config.json"
    config_keys = ["max_seq_length"]  # noqa: RUF012  (the base class declares a plain list)

    def __init__(
        self,
        encoder: PromptEncoder,
        tokenizer: Any | None = None,  # noqa: ANN401
        max_seq_length: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.recompute = encoder, False
        # sentence-transformers would also enable that of transformers, which recomputes layers without the prompt
        encoder.backbone.model.supports_gradient_checkpointing = False  # type: ignore[assignment]
        self.tokenizer = encoder.backbone.tokenizer if tokenizer is None else tokenizer
        if max_seq_length is None:
            max_seq_length = min(encoder.longest_input, encoder.text.max_length or encoder.longest_input)
        self.max_seq_length = max_seq_length

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens, special ones included; longer texts are truncated. It can be set."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if not isinstance(value, int) or not SHORTEST_INPUT <= value <= self.encoder.longest_input:
            raise ConfigError(
                f"max_seq_length must lie in [{SHORTEST_INPUT}, {self.encoder.longest_input}] (the positions that "
                f"the prompt leaves to this encoder), got {value!r}"
            )
        self._max_seq_length = value

    def get_embedding_dimension(self) -> int:
        """Return D."""
        return self.encoder.width

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: object) -> dict[str, Tensor]:
        """Tokenise texts.

        Args:
            inputs: N texts.
            prompt: Prefix of each text.

        Returns:
            `input_ids` and `attention_mask`, (N, T).

        Raises:
            DataError: An input is not text, for example a pair.
        """
        for text in inputs:
            if not isinstance(text, str):
                raise DataError(f"this model encodes single texts, got {type(text).__name__} ({text!r})")
        texts = self.encoder.text.prepare(inputs, prompt or "", tokenizer=self.tokenizer)
        vocabulary = len(self.encoder.backbone.word_embeddings)
        tokens = tokenize(self.tokenizer, texts, self.max_seq_length, vocabulary)
        return {"input_ids": tokens.ids_NT, "attention_mask": tokens.mask_NT}

    def gradient_checkpointing_enable(self, *_: object, **_options: object) -> None:
        """Compute activations again in the backward pass instead of keeping them (`gradient_checkpointing` of the trainer)."""
        self.recompute = True

    def forward(self, features: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        """Add `sentence_embedding`, (N, D), to the features from `preprocess`."""
        tokens = Tokens(features["input_ids"], features["attention_mask"])
        budget = CHUNK_TOKENS[tokens.ids_NT.device.type]  # so that one long text does not pad the whole batch
        features["sentence_embedding"], _hidden = self.encoder(
            tokens, train_head=self.training, chunk_tokens=budget, recompute=self.recompute
        )
        return features

    def save(self, output_path: str, *_: object, **_options: object) -> None:
        """Write the adapter and `max_seq_length`."""
        save_adapter(self.encoder, Path(output_path) / "adapter")
        self.save_config(output_path)

    # the signature is that of sentence-transformers' modules
    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        *,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        trust_remote_code: bool = False,  # noqa: ARG003  (sentence-transformers has asked before it imports this class)
        **where: Any,  # noqa: ANN401  (its options of a download: token, cache_folder, revision, local_files_only)
    ) -> PromptTransformer:
        """Read a folder that `save` wrote; called by sentence-transformers.

        Args:
            model_name_or_path, subfolder, where: The folder; a hub id is downloaded.
            model_kwargs: `encoder`: folder or hub id of the frozen encoder; `dtype`: the torch.dtype it computes in.
            processor_kwargs, config_kwargs, backend: Rejected unless empty, empty and "torch".

        Raises:
            AdapterError: See `load_adapter`; or an option has no effect.
        """
        given = model_kwargs or {}
        if set(given) - {"encoder", "dtype"} or processor_kwargs or config_kwargs or backend != "torch":
            raise AdapterError(
                "a promcse_pl model takes model_kwargs={'encoder': FOLDER, 'dtype': torch.bfloat16}, one or both, and no other "
                "model, processor or config options, on the torch backend"
            )
        if not isinstance(given.get("dtype", torch.float32), torch.dtype):
            raise AdapterError(
                f"model_kwargs['dtype'] must be a torch.dtype such as torch.bfloat16, got {given['dtype']!r}"
            )
        folder = cls.load_dir_path(model_name_or_path, subfolder, **where)
        config = cls.load_config(model_name_or_path, subfolder, **where)
        return cls(load_adapter(Path(folder or model_name_or_path), **given), **config)


def as_sentence_transformer(model: PromCSE) -> SentenceTransformer:
    """Return a sentence-transformers model with the same embeddings, prompts and default prompt.

    It shares the trained tensors with `model`: after training it, `model.save_pretrained(folder)` writes the adapter.
    """
    modules = [PromptTransformer(model.encoder, model.tokenizer), Normalize()]
    text = model.encoder.text
    return SentenceTransformer(
        modules=modules,
        prompts=dict(text.prompts),
        default_prompt_name=text.default_prompt,
        device=str(model.encoder.backbone.device),
    )


def export_sentence_transformers(model: PromCSE, folder: str | Path) -> str:
    """Write a folder for sentence-transformers.

    Without a prompt it contains a Transformer with the trained weights (LoRA is merged), Pooling, the head as a Dense module
    and Normalize, and loads without promcse_pl. With a prompt, or a pooling or head that the library's own modules
    cannot express, it contains the adapter and no code: promcse_pl must be installed where it is loaded, and the encoder is found
    by its name, as for any adapter.

    Args:
        model: The adapter and its encoder.
        folder: Absent or empty; or, with an adapter inside, an earlier export, whose adapter and settings are replaced, while
            other files in it are kept.

    Returns:
        The Python expression that loads it.

    Raises:
        AdapterError: The folder cannot be written or has other content, or the model does not use the tokenizer of its
            encoder.
        EncoderError: The folder would contain the encoder, which was read in another type than float32.
    """
    folder = expand(folder)
    model.require_encoder_tokenizer("export_sentence_transformers")
    encoder = model.encoder
    description = {**describe(encoder), "training": training_summary(encoder)}
    form: Form = "plain" if _is_plain(encoder) else "sentence-transformers"
    card = card_of(encoder, description, folder.absolute().name, form)
    if form == "plain":
        with new_folder(folder, error=AdapterError) as new:
            _save_plain(model, new)
            (new / CARD).write_text(card, encoding="utf-8")
        return f"SentenceTransformer({str(folder)!r})"
    is_update = _is_export(folder)
    if is_update:
        save_adapter(encoder, folder / "adapter")
    with update_folder(folder, (), error=AdapterError) if is_update else new_folder(folder, error=AdapterError) as new:
        as_sentence_transformer(model).save_pretrained(str(new), create_model_card=False)
        if may_replace_card(folder):
            (new / CARD).write_text(card, encoding="utf-8")
        if is_update:
            shutil.rmtree(new / "adapter")  # already replaced above by an update that keeps other files in it
    return f"SentenceTransformer({str(folder)!r}, trust_remote_code=True)"


def _is_plain(encoder: PromptEncoder) -> bool:
    """Return whether built-in modules of sentence-transformers can compute the same embeddings."""
    has_known_head = not encoder.has_test_head or type(encoder.head) in (MlpHead, LowRankHead)
    has_known_pooling = set(encoder.pooling.split("+")) <= set(POOLING_MODES)
    is_bare = encoder.prompt.length == 0 and encoder.position_offset == 0 and not len(encoder.backbone.dense)
    return is_bare and has_known_pooling and has_known_head


def _dense(head: nn.Module | None) -> Dense:
    """Return a head as a Dense module: the MLP head with tanh, the low-rank head h + U V h as the matrix I + U V."""
    if isinstance(head, MlpHead):
        dense = Dense(head.dense.in_features, head.dense.out_features, activation_function=nn.Tanh())
        dense.linear.load_state_dict(head.dense.state_dict())
        return dense
    assert isinstance(head, LowRankHead)
    width = head.down.in_features
    dense = Dense(width, width, bias=False, activation_function=nn.Identity())
    with torch.no_grad():
        dense.linear.weight.copy_(torch.eye(width) + head.up.weight.cpu() @ head.down.weight.cpu())
    return dense


def _save_plain(model: PromCSE, folder: Path) -> None:
    """Write a model without a prompt with the modules of sentence-transformers."""
    encoder, text = model.encoder, model.encoder.text
    # the library builds BERT with a pooler, which it does not use and which would be random in each export
    with tempfile.TemporaryDirectory() as temporary, quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
        encoder.backbone.save(Path(temporary))
        transformer = Transformer(temporary, max_seq_length=model.max_tokens, do_lower_case=text.lower_case)
    modes = tuple(POOLING_MODES[part] for part in encoder.pooling.split("+"))
    modules = [transformer, Pooling(encoder.backbone.width, modes)]
    if encoder.has_test_head:
        modules.append(_dense(encoder.head))
    plain = SentenceTransformer(
        modules=[*modules, Normalize()],
        prompts=dict(text.prompts),
        default_prompt_name=text.default_prompt,
        device="cpu",
    )
    with quiet_transformers():
        plain.save_pretrained(str(folder), create_model_card=False)
    # without it, sentence-transformers truncates to max_position_embeddings, which some encoders exceed
    path = folder / PromptTransformer.config_file_name
    write_text(path, json.dumps(json.loads(path.read_text()) | {"max_seq_length": model.max_tokens}, indent=2) + "\n")


def _is_export(folder: Path) -> bool:
    try:
        return PromptTransformer.__name__ in require_regular_file(folder / "modules.json").read_text("utf-8")
    except (OSError, ValueError):
        return False
