"""Build what a config describes, and train it."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console

from promcse_pl.config import Config
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.embedder import pick_device
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.mlm import MlmHead
from promcse_pl.run_folder import ADAPTER, Status
from promcse_pl.training.callbacks import BestByDev, History, ProgressBar, ProgressLines
from promcse_pl.training.checkpoint import Checkpoint, RunCheckpoints, Saver
from promcse_pl.training.distributed import Ranks, of_rank_zero
from promcse_pl.training.memory import SHARE, free_bytes, kept_bytes
from promcse_pl.training.module import PromcseModule
from promcse_pl.training.precision import choose_dtype
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.signals import Stopped, StopSignals

log = logging.getLogger("promcse_pl")

DEVICES: dict[str, Literal["cpu", "cuda", "mps"]] = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}
LOOKS = 4
"""Looks at the development set that a run shorter than two `trainer.eval_every` gets."""
SHORTEST_INPUT = 3
"""Tokens of the shortest sentence worth encoding: one word between two special tokens."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a training run leaves behind, beside the encoder itself.

    Attributes:
        steps: Optimiser steps of the run.
        best_step: Step that was kept: the best by development score, else the last.
        dev_score: Best development Spearman in [-1, 1], or None without a development set.
        seconds: Of training, looks at the development set included.
        earlier_seconds: Of the whole run before this process, up to the save that it went on from.
        rows_per_second: Training rows, looks left out.
    """

    steps: int
    best_step: int
    dev_score: float | None
    seconds: float
    earlier_seconds: float
    rows_per_second: float


def resolve_machine(config: Config) -> tuple[Config, torch.device]:
    """Fix what `auto` left open, so that the saved config repeats this run; seed every generator; quieten Lightning.

    Returns:
        The config with the precision that was measured or set and the chunk size, and the device.
    """
    device = pick_device(config.trainer.device)
    dtype, why = choose_dtype(config.trainer.precision, device)
    precision: Literal["bfloat16", "float32"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    precision, why = of_rank_zero((precision, why))
    log.info("device: %s; precision: %s", device.type, why)
    for noisy in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)  # its hints on devices and paid services; errors stay
    pl.seed_everything(config.seed, verbose=False)
    chunk_tokens = CHUNK_TOKENS[device.type] if config.trainer.chunk_tokens == "auto" else config.trainer.chunk_tokens
    settled = dataclasses.replace(
        config.trainer, precision=precision, device=DEVICES[device.type], chunk_tokens=chunk_tokens
    )
    return dataclasses.replace(config, trainer=settled), device


def build_encoder(config: Config) -> PromptEncoder:
    """Read the frozen encoder of a config and put a fresh prompt in front of it.

    Raises:
        EncoderError: The encoder cannot be had or takes no prompt.
        ConfigError: The prompt leaves no room for a sentence.
    """
    dtype = torch.bfloat16 if config.trainer.precision == "bfloat16" else torch.float32
    encoder = PromptEncoder(
        FrozenBackbone.load(config.model.path, revision=config.model.revision, dtype=dtype),
        length=config.prompt.length,
        projection_size=config.prompt.projection_size,
        pooling=config.model.pooling,
        head=config.model.head,
        dropout=config.prompt.dropout,
        position_offset=config.prompt.position_offset,
    )
    encoder.backbone.use_fused_layers = config.trainer.layers == "auto"
    if encoder.longest_input < SHORTEST_INPUT:
        raise ConfigError(
            f"prompt.length={config.prompt.length} shifts the positions so far that no sentence fits the encoder. "
            f"Try: prompt.length={max(0, config.prompt.length + encoder.longest_input - config.data.max_length)}"
        )
    return encoder


def build_mlm_head(config: Config, backbone: FrozenBackbone) -> MlmHead | None:
    """Return the MLM head if the loss has an MLM term: the encoder's own where its files hold one, else a fresh one."""
    if not config.loss.mlm_weight:
        return None
    if backbone.word_embeddings.shape[1] != backbone.width:
        raise ConfigError(
            f"loss.mlm_weight={config.loss.mlm_weight:g} does not work with {config.model.path}: its embeddings are "
            f"{backbone.word_embeddings.shape[1]} wide, its hidden states {backbone.width}. Try: loss.mlm_weight=0"
        )
    head = MlmHead(backbone.word_embeddings.float(), layer_norm_eps=backbone.layer_norm_eps)
    if not backbone.fill_mlm_head(head):
        log.warning("%s brings no MLM head; a fresh one is trained", config.model.path)
    return head


def build_data(config: Config, encoder: PromptEncoder, progress: Callable[[int], None]) -> PromcseDataModule:
    """Read and tokenise the training rows of a config, or find them in the cache."""
    data = PromcseDataModule(
        config.data,
        encoder.backbone.tokenizer,
        longest_input=encoder.longest_input,
        seed=config.seed,
        mlm=bool(config.loss.mlm_weight),
        progress=progress,
    )
    data.setup()
    return data


def must_recompute(config: Config, encoder: PromptEncoder, data: PromcseDataModule, device: torch.device) -> bool:
    """Tell whether chunks run again in the backward pass: as the config says, or because the memory is too small for a batch."""
    if config.trainer.recompute != "auto":
        return config.trainer.recompute == "always"
    free = free_bytes(device)
    if free is None:
        return False
    rows = data.token_rows
    share = -(-config.data.batch_size // config.trainer.world_size)
    sentences = share * max(2, rows.width) * (2 if config.loss.mlm_weight else 1)
    length = -(-rows.tokens_total // (len(rows) * rows.width))
    needed = sentences * kept_bytes(encoder, length)
    if device.type == "cpu":  # the processes here share its memory
        free //= config.trainer.devices
    if needed <= SHARE * free:
        return False
    log.info(
        "the tensors of a batch would take %.1f GB of %.1f GB free: chunks run twice, in the memory of one (trainer.recompute)",
        needed / 1e9,
        free / 1e9,
    )
    return True


class _SharedBatches(DDPStrategy):
    """Lightning's strategy for the processes of `Ranks`. `PromcseModule` averages the gradients: no wrapper around it."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(cluster_environment=_Place(ranks))

    def configure_ddp(self) -> None:
        """Begin with the same trained tensors on all ranks."""
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, 0)


class _Place(LightningEnvironment):
    """Tells Lightning where this process stands; the process group is there already."""

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


def fit(
    config: Config,
    encoder: PromptEncoder,
    data: PromcseDataModule,
    *,
    device: torch.device,
    mlm_head: MlmHead | None,
    loggers: Sequence[Logger],
    folder: Path,
    console: Console,
    status: Status,
    stop: StopSignals,
    started: float,
    resume: Checkpoint | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> Fitted:
    """Train the prompt in place; at the end it holds the tensors of the best step.

    Args:
        config: The settings.
        encoder, data, mlm_head: From the functions above.
        device: Where to compute.
        loggers: Where numbers go.
        folder: Of the run: the best adapter so far and the checkpoints are kept in it.
        console: Shows a progress bar if it is a terminal; else a line is logged now and then.
        status: Where the run stands; its step is kept up to date in the folder.
        stop: Signals that end the run after a save.
        started: When this process began with the run (`time.perf_counter`).
        resume: Where an earlier process left the run.
        ranks: The place of this process; with several, all of them must have joined (`ranks.join`).

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite.
        DataError: A checkpoint cannot be written.
        Stopped: A signal asked for it; the run is saved.
    """
    epoch_steps = -(-len(data.token_rows) // config.data.batch_size)
    steps = min(epoch_steps * config.trainer.epochs, config.trainer.max_steps or epoch_steps * config.trainer.epochs)
    log_every = min(config.trainer.log_every, steps)  # a short run has an entry too
    chunk_tokens = config.trainer.chunk_tokens
    assert chunk_tokens != "auto", "call resolve_machine first"
    module = PromcseModule(
        encoder.to(device),
        loss=config.loss,
        optim=config.optim,
        total_steps=steps,
        chunk_tokens=chunk_tokens,
        recompute=must_recompute(config, encoder, data, device),
        mlm_head=mlm_head,
    )
    data.start_step = resume.step if resume else 0
    history = History(log_every, chunk_tokens)
    saver = Saver(folder, every=config.trainer.save_every, stop=stop, status=status, seed=config.seed, started=started)
    best = None
    if data.dev is not None:
        every = config.trainer.eval_every
        if 2 * every > steps:
            every = max(1, steps // LOOKS)
            log.info("evaluating on the dev set every %d of %d steps", every, steps)
        best = BestByDev(data.dev, data.tokenizer, every=every, save_to=folder / ADAPTER)
    progress = ProgressBar(console) if console.is_terminal else ProgressLines(saver.total_training_seconds)
    watchers = [history, best, progress, saver]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*|lightning_fabric.*|torch.jit.*")
        trainer = pl.Trainer(
            accelerator={"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[device.type],
            strategy=_SharedBatches(ranks) if ranks.size > 1 else "auto",
            devices=ranks.devices,
            num_nodes=ranks.size // ranks.devices,
            precision="32-true",  # the frozen encoder has its own type; everything trained is float32
            max_steps=steps,
            max_epochs=config.trainer.epochs,
            gradient_clip_val=config.optim.clip_norm,
            logger=list(loggers),
            callbacks=[watcher for watcher in watchers if watcher is not None],
            plugins=[RunCheckpoints(folder)],
            log_every_n_steps=log_every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        stop.deferred = True
        try:
            trainer.fit(module, datamodule=data, ckpt_path=resume.path if resume else None)
        finally:
            stop.deferred = False
    if stop.received:
        raise Stopped(stop.received)
    return Fitted(
        steps=steps,
        best_step=best.best_step if best and best.best_step is not None else steps,
        dev_score=best.best_score if best else None,
        seconds=saver.total_training_seconds(),
        earlier_seconds=saver.seconds,
        rows_per_second=history.total_rows / history.total_seconds,
    )
