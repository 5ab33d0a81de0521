"""Lightning callbacks of a training run: dev evaluation, history, progress output.

The class names are keys in checkpoints: renaming one breaks the resumption of runs that an earlier version started.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor

from promcse_pl.adapter import save_adapter
from promcse_pl.data.batch import TrainBatch
from promcse_pl.data.retrieval import DevSet
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.dev import score_dev
from promcse_pl.models.cpu.chunks import padded_tokens
from promcse_pl.run_folder import DEV_METRICS
from promcse_pl.training.gather import sum_over_ranks
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.terminal import stages

log = logging.getLogger("promcse_pl")


class BestByDev(pl.Callback):
    """Evaluate the test-time embeddings on the dev set, keep the best step and restore its tensors at the end of training.

    Only a strictly better score replaces the best step. Rank 0 evaluates; the other ranks wait for it in their next step.

    Args:
        dev: The dev set.
        tokenizer: Tokenizer of the encoder.
        every: Steps between two evaluations; the last step is always evaluated.
        save_to: Adapter folder that is overwritten at each better score, so that an interrupted run has its best adapter on
            disk; None to save nothing.
    """

    def __init__(self, dev: DevSet, tokenizer: Any, *, every: int, save_to: Path | None = None) -> None:
        self.dev, self.tokenizer, self.every, self.save_to = dev, tokenizer, every, save_to
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.history: list[tuple[int, float]] = []
        self._best: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Evaluate every `every` steps and at the last step."""
        assert isinstance(pl_module, PromcseModule)
        step = trainer.global_step
        if trainer.is_global_zero and (step % self.every == 0 or step >= pl_module.total_steps):
            self._evaluate(trainer, pl_module, step)

    def _evaluate(self, trainer: pl.Trainer, module: PromcseModule, step: int) -> None:
        metric = self.dev.metric
        score = score_dev(PromCSE(module.encoder, self.tokenizer), self.dev)
        self.history.append((step, score))
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step = score, step
            self._best = {name: tensor.detach().clone() for name, tensor in module.encoder.state_dict().items()}
            if self.save_to is not None:
                training = {"best_step": step, f"dev_{metric}": round(100 * score, 4)}
                save_adapter(module.encoder, self.save_to, training=training)
        percent, best = 100 * score, 100 * self.best_score
        for logger in trainer.loggers:
            logger.log_metrics({f"dev/{metric}": percent, f"dev/best_{metric}": best}, step=step)
        module.log("dev", percent, prog_bar=True, logger=False)
        module.log(f"dev/{metric}", percent, logger=False)  # the name in the history, for callbacks that monitor it
        name = DEV_METRICS[metric]
        log.info("step %d: dev %s %.2f (best %.2f at step %d)", step, name, percent, best, self.best_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far and the tensors of the best step."""
        return {"score": self.best_score, "step": self.best_step, "history": self.history, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.best_score, self.best_step = state_dict["score"], state_dict["step"]
        self.history, self._best = list(state_dict["history"]), dict(state_dict["best"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the tensors of the best step."""
        if self._best:
            assert isinstance(pl_module, PromcseModule)
            pl_module.encoder.load_state_dict(self._best)


class History(pl.Callback):
    """Log loss terms, gradient norm, learning rate, and the speed and padding since the last entry.

    Dev evaluation is not part of the measured time. Rows and tokens are summed over all ranks.

    Args:
        every: Steps between two entries.
        chunk_tokens: Chunk size of the encoder, for the padding share.
    """

    def __init__(self, every: int, chunk_tokens: int | None) -> None:
        self.every, self.chunk_tokens = every, chunk_tokens
        self.rows = self.real_tokens = self.padded_tokens = 0
        self.total_rows, self.total_seconds = 0, 0.0
        self._seconds, self._start, self._lr = 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Start the clock of a step and record its learning rate."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Add the step to the counts; log an entry every `every` steps."""
        assert isinstance(pl_module, PromcseModule)
        if batch.tokens.ids_NT.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        mask_NT = batch.tokens.mask_NT
        counts = [len(batch.rows_B), int(mask_NT.sum()), padded_tokens(mask_NT, self.chunk_tokens)]
        rows, real_tokens, padded = sum_over_ranks(torch.tensor(counts)).tolist()
        self.total_rows, self.total_seconds = self.total_rows + rows, self.total_seconds + seconds
        self.rows, self._seconds = self.rows + rows, self._seconds + seconds
        self.real_tokens, self.padded_tokens = self.real_tokens + real_tokens, self.padded_tokens + padded
        if trainer.global_step % self.every:
            return
        metrics = {
            **{name: float(value) for name, value in pl_module.entry.items()},
            "train/lr": self._lr,
            "speed/rows_per_second": self.rows / self._seconds,
            "speed/tokens_per_second": self.real_tokens / self._seconds,
            "speed/padding_share": 1 - self.real_tokens / self.padded_tokens,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.rows = self.real_tokens = self.padded_tokens = 0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts since the last entry and since the start of the run."""
        names = ("rows", "real_tokens", "padded_tokens", "total_rows", "total_seconds", "_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        vars(self).update(state_dict)


class Progress(pl.Callback):
    """Show a progress bar over all steps of the run on a terminal; elsewhere, log a line at each history entry.

    Args:
        console: Console for the bar.
        every: Steps between two lines; the last step always has one.
        seconds: Returns the training time of the run so far, in seconds, earlier processes included.
    """

    def __init__(self, console: Console, every: int, seconds: Callable[[], float]) -> None:
        self.console, self.every, self.seconds = console, every, seconds
        self._bar = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        assert isinstance(pl_module, PromcseModule)
        self.report = self._bar.enter_context(stages(self.console))  # shows nothing if the console is not a terminal
        self.report("training", trainer.global_step, pl_module.total_steps)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Update the bar with loss and dev score, or log a line if it is due."""
        assert isinstance(pl_module, PromcseModule)
        step, steps, metrics = trainer.global_step, pl_module.total_steps, trainer.callback_metrics
        digits = {"loss": 3, "dev": 2}
        values = [f"{name} {float(metrics[name]):.{digits[name]}f}" for name in digits if name in metrics]
        self.report(f"training: {', '.join(values)}", step, steps)
        if not self.console.is_terminal and (step % self.every == 0 or step >= steps):
            log.info("step %d of %d: %s, %.0f s", step, steps, values[0], self.seconds())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self._bar.close()
