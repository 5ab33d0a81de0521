"""Build the parts that a config describes, and train them with Lightning."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy

from promcse_pl.config import Config
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.dev import score_dev
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.dropout import Dropout
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.mlm import MlmHead
from promcse_pl.models.tuning import Tuning
from promcse_pl.run_folder import ADAPTER
from promcse_pl.training.callbacks import BestByDev, History, Progress
from promcse_pl.training.checkpoint import RunCheckpoints, Saver, check_callbacks
from promcse_pl.training.context import RunContext
from promcse_pl.training.distributed import Ranks
from promcse_pl.training.encoder_settings import resolve_pooling, resolve_text, training_prompts
from promcse_pl.training.gather import collective
from promcse_pl.training.machine import must_recompute
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.signals import Stopped

log = logging.getLogger("promcse_pl")

SHORT_RUN_EVALUATIONS = 4
"""Number of dev evaluations in a run of fewer than two `trainer.eval_every`."""
MIN_INPUT_TOKENS = 3
"""Tokens of the shortest useful sentence: one word between two special tokens."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Encoder, heads, data and device of a training run.

    Attributes:
        device: Device of the computation.
        encoder: The encoder with its prompt.
        mlm_head: MLM head; None without an MLM term in the loss.
        data: Training batches and dev set.
    """

    device: torch.device
    encoder: PromptEncoder
    mlm_head: MlmHead | None
    data: PromcseDataModule


@dataclass(frozen=True, slots=True)
class Fitted:
    """Statistics of a training run; the encoder is trained in place.

    Attributes:
        steps: Optimiser steps of the run.
        stopped_early: Why the run has fewer steps than planned; None if it has all of them.
        best_step: Step whose tensors are kept: the best by dev score, or the last without a dev set.
        dev_score: Dev score of the kept tensors in its metric, in [-1, 1]; None without a dev set.
        seconds: Training time, dev evaluation included.
        earlier_seconds: Duration of the run in earlier processes, up to the checkpoint that this one resumed from.
        rows_per_second: Training rows per second, dev evaluation excluded.
    """

    steps: int
    stopped_early: str | None
    best_step: int
    dev_score: float | None
    seconds: float
    earlier_seconds: float
    rows_per_second: float


def build_encoder(config: Config, *, with_pipeline: bool = True) -> PromptEncoder:
    """Load the encoder of a config, select its trained weights and add an untrained prompt.

    Args:
        config: The settings.
        with_pipeline: Whether to read the encoder's sentence-transformers pipeline.

    Raises:
        EncoderError: The encoder cannot be loaded, or it does not support prompts.
        ConfigError: With the prompt, no token position is left for a sentence; the encoder has no `model.default_prompt`; or
            unsupervised training without dropout; see also `FrozenBackbone.tune`.
    """
    tuning, is_bfloat16 = config.tuning, config.trainer.precision == "bfloat16"
    uses_autocast = is_bfloat16 and tuning.uses_autocast
    dtype = torch.bfloat16 if is_bfloat16 and not uses_autocast else torch.float32
    backbone = FrozenBackbone.load(
        config.model.path, revision=config.model.revision, dtype=dtype, with_pipeline=with_pipeline
    )
    backbone.tune(Tuning(tuning.weights, tuning.rank, tuning.alpha))
    encoder = PromptEncoder(
        backbone,
        length=config.prompt.length,
        kind=config.prompt.kind,
        projection_size=config.prompt.projection_size,
        pooling=resolve_pooling(config.model, backbone),
        head=config.model.head,
        head_rank=config.model.head_rank,
        dropout=config.prompt.dropout,
        position_offset=config.prompt.position_offset,
        text=resolve_text(config.model, backbone),
    )
    encoder.autocast = torch.bfloat16 if uses_autocast else None
    encoder.backbone.use_fused_layers = config.trainer.layers == "auto"
    if encoder.longest_input < MIN_INPUT_TOKENS:
        raise ConfigError(
            f"prompt.length={config.prompt.length} shifts the positions so far that no sentence fits the encoder. "
            f"Try: prompt.length={max(0, config.prompt.length + encoder.longest_input - config.data.max_length)}"
        )
    if config.data.kind == "sentences" and config.trainer.max_steps != 0 and not _has_dropout(encoder):
        advice = "prompt.dropout=0.1" if config.prompt.length else "prompt.length=10 prompt.dropout=0.1"
        raise ConfigError(
            f"data.kind=sentences needs dropout, which makes the two views of a sentence differ, but {config.model.path} has "
            f"none. Try: {advice}"
        )
    return encoder


def _has_dropout(encoder: PromptEncoder) -> bool:
    """Return whether two passes of an encoder in train mode differ."""
    modules = any(isinstance(module, Dropout) and module.p > 0 for module in encoder.backbone.modules())
    attention = getattr(encoder.backbone.model.config, "attention_dropout", None) or 0.0
    return modules or attention > 0 or (encoder.prompt.length > 0 and encoder.prompt.dropout > 0)


def build_mlm_head(config: Config, backbone: FrozenBackbone) -> MlmHead | None:
    """Return the MLM head if the loss has an MLM term: the pre-trained one if the encoder's files contain it, else a new one."""
    if not config.loss.mlm_weight:
        return None
    if backbone.word_embeddings.shape[1] != backbone.width:
        raise ConfigError(
            f"loss.mlm_weight={config.loss.mlm_weight:g} does not work with {config.model.path}: its embeddings are "
            f"{backbone.word_embeddings.shape[1]} wide, its hidden states {backbone.width}. Try: loss.mlm_weight=0"
        )
    head = MlmHead(backbone.word_embeddings.float(), layer_norm_eps=backbone.layer_norm_eps)
    if not backbone.fill_mlm_head(head):
        log.warning("%s has no MLM head; a new one is trained", config.model.path)
    return head


def build_data(config: Config, encoder: PromptEncoder, progress: Callable[[int], None]) -> PromcseDataModule:
    """Read and tokenise the training rows of a config, or load them from the token cache.

    Prompt names in `data.prompts` are replaced by their texts, and `data.max_length` is limited to the encoder's maximum length.
    """
    text = encoder.text
    max_length = min(config.data.max_length, text.max_length or config.data.max_length)
    data = PromcseDataModule(
        dataclasses.replace(config.data, max_length=max_length, prompts=training_prompts(config.data, text)),
        encoder.backbone.tokenizer,
        longest_input=encoder.longest_input,
        prepare=partial(text.prepare, tokenizer=encoder.backbone.tokenizer),
        seed=config.seed,
        mlm=bool(config.loss.mlm_weight),
        vocabulary=len(encoder.backbone.word_embeddings),
        progress=progress,
    )
    data.setup()
    return data


def fit(run: RunContext, parts: Parts, loggers: Sequence[Logger]) -> Fitted:
    """Train the encoder of `parts`; at the end, it holds the tensors of the best step, or of the last one without a dev set.

    Args:
        run: The run; its config must be resolved, and all ranks must have joined.
        parts: Encoder, data and device.
        loggers: Loggers for metrics; empty on ranks other than 0.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite.
        DataError: A checkpoint cannot be written.
        ConfigError: A checkpoint cannot contain the state of a callback of the user.
        Stopped: A signal stopped the run; a checkpoint is saved.
    """
    config, data = run.config, parts.data
    parts.encoder.to(parts.device)
    if config.trainer.max_steps == 0:
        return _untrained(run, parts, loggers)
    epoch_steps = -(-len(data.token_rows) // config.data.batch_size)
    steps = min(epoch_steps * config.trainer.epochs, config.trainer.max_steps or epoch_steps * config.trainer.epochs)
    chunk_tokens = config.trainer.chunk_tokens
    assert chunk_tokens != "auto", "call resolve_machine first"
    module = PromcseModule(
        parts.encoder,
        loss=config.loss,
        optim=config.optim,
        total_steps=steps,
        chunk_tokens=chunk_tokens,
        recompute=must_recompute(config, parts.encoder, data.token_rows, parts.device),
        mlm_head=parts.mlm_head,
    )
    data.start_step = run.checkpoint.step if run.checkpoint else 0
    log_every = min(config.trainer.log_every, steps)  # at least one entry in a short run
    history, best, saver = History(log_every, chunk_tokens), _dev_evaluation(run, parts, steps), Saver(run)
    progress = Progress(run.console, log_every, saver.total_training_seconds)
    callbacks: list[pl.Callback] = [history, *([best] if best else []), progress, *run.callbacks]
    check_callbacks(run.callbacks)
    callbacks.append(saver)  # the last: a checkpoint contains the state of the others after the step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*|lightning_fabric.*|torch.jit.*")
        trainer = _build_trainer(run, parts.device, steps, callbacks, loggers)
        run.stop.deferred = True
        try:
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint.path if run.checkpoint else None)
        finally:
            run.stop.deferred = False
    if run.stop.received:
        raise Stopped(run.stop.received)
    step, early = trainer.global_step, None
    if step < steps:
        early = best.stopped_early if best and best.stopped_early else "a callback stopped the training"
    return Fitted(
        steps=step,
        stopped_early=early,
        best_step=best.best_step if best and best.best_step is not None else step,
        dev_score=best.best_score if best else None,
        seconds=saver.total_training_seconds(),
        earlier_seconds=saver.seconds,
        rows_per_second=history.total_rows / history.total_seconds,
    )


def _untrained(run: RunContext, parts: Parts, loggers: Sequence[Logger]) -> Fitted:
    """Evaluate on the dev set without training (`trainer.max_steps=0`); rank 0 evaluates."""
    log.info("trainer.max_steps=0: nothing is trained")
    score, dev = None, parts.data.dev
    if run.is_main and dev is not None:
        score = score_dev(PromCSE(parts.encoder, parts.data.tokenizer), dev)
        for logger in loggers:
            logger.log_metrics({f"dev/{dev.metric}": 100 * score, f"dev/best_{dev.metric}": 100 * score}, step=0)
    return Fitted(
        steps=0,
        stopped_early=None,
        best_step=0,
        dev_score=score,
        seconds=0.0,
        earlier_seconds=0.0,
        rows_per_second=0.0,
    )


def _dev_evaluation(run: RunContext, parts: Parts, steps: int) -> BestByDev | None:
    """Return the callback that evaluates on the dev set; None without one."""
    if parts.data.dev is None:
        return None
    every, patience = run.config.trainer.eval_every, run.config.trainer.patience
    if 2 * every > steps:
        every = max(1, steps // SHORT_RUN_EVALUATIONS)
        log.info("evaluating on the dev set every %d of %d steps", every, steps)
    evaluations = -(-steps // every)
    # the first evaluation is the best so far, and the last one is at the last step
    if patience is not None and patience > evaluations - 2:
        log.warning("trainer.patience=%d has no effect on a run of %d dev evaluations", patience, evaluations)
    save_to = run.folder / ADAPTER
    return BestByDev(parts.data.dev, parts.data.tokenizer, every=every, save_to=save_to, patience=patience)


def _build_trainer(
    run: RunContext, device: torch.device, steps: int, callbacks: list[pl.Callback], loggers: Sequence[Logger]
) -> pl.Trainer:
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hides hints on devices and paid services
    config, ranks = run.config, run.ranks
    return pl.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[device.type],
        strategy=_RankStrategy(ranks) if ranks.size > 1 else "auto",
        devices=ranks.devices,
        num_nodes=ranks.size // ranks.devices,
        precision="32-true",  # the encoder has a dtype of its own or its own autocast; everything trained is float32
        max_steps=steps,
        max_epochs=config.trainer.epochs,
        gradient_clip_val=config.optim.clip_norm,
        logger=list(loggers),
        callbacks=callbacks,
        plugins=[RunCheckpoints(run.folder)],
        log_every_n_steps=min(config.trainer.log_every, steps),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )


class _RankStrategy(DDPStrategy):
    """DDP without the wrapper around the module: `PromcseModule` averages the gradients itself."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(cluster_environment=_RankEnvironment(ranks))

    def configure_ddp(self) -> None:
        """Start with the same trained tensors on all ranks."""
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                with collective():
                    dist.broadcast(parameter.data, 0)

    def barrier(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  (Lightning's)
        with collective():
            super().barrier(*arguments, **options)

    def broadcast(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  (Lightning's)
        with collective():
            return super().broadcast(*arguments, **options)

    def reduce(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  (Lightning's)
        with collective():
            return super().reduce(*arguments, **options)


class _RankEnvironment(LightningEnvironment):
    """Describes the ranks to Lightning, which finds the process group already initialised."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.ranks.local

    def node_rank(self) -> int:
        return self.ranks.rank // self.ranks.devices
