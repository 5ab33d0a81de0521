"""What watches a training run: development score, history, plain progress lines."""

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
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.sts import score_pairs
from promcse_pl.models.cpu.chunks import padded_tokens
from promcse_pl.training.gather import sum_over_ranks
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.terminal import stages

log = logging.getLogger("promcse_pl")


class BestByDev(pl.Callback):
    """Score the test-time vector on development pairs every so many steps, keep the strictly better, restore it at the end.

    Of several processes the first one does it, and the others wait for it in the next step.

    Args:
        dev: The pairs.
        tokenizer: Of the encoder.
        every: Steps between two looks; the last step is always looked at.
        save_to: Adapter folder that gets every better one at once, so that a run cut short leaves its best; None: no folder.
    """

    def __init__(self, dev: ScoredPairs, tokenizer: Any, *, every: int, save_to: Path | None = None) -> None:
        self.dev, self.tokenizer, self.every, self.save_to = dev, tokenizer, every, save_to
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.history: list[tuple[int, float]] = []
        self._best: dict[str, Tensor] = {}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *_: Any,
        **__: Any,
    ) -> None:
        """Look at the development set when it is time."""
        assert isinstance(pl_module, PromcseModule)
        step = trainer.global_step
        if trainer.is_global_zero and (step % self.every == 0 or step >= pl_module.total_steps):
            self._look(trainer, pl_module, step)

    def _look(self, trainer: pl.Trainer, module: PromcseModule, step: int) -> None:
        score = score_pairs(PromCSE(module.encoder, self.tokenizer).encode, self.dev).spearman
        self.history.append((step, score))
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step = score, step
            self._best = {name: tensor.detach().clone() for name, tensor in module.encoder.state_dict().items()}
            if self.save_to is not None:
                save_adapter(
                    module.encoder, self.save_to, training={"best_step": step, "dev_spearman": round(100 * score, 4)}
                )
        for logger in trainer.loggers:
            logger.log_metrics({"dev/spearman": 100 * score, "dev/best_spearman": 100 * self.best_score}, step=step)
        module.log("dev", 100 * score, prog_bar=True, logger=False)
        log.info(
            "step %d: dev Spearman %.2f (best %.2f at step %d)",
            step,
            100 * score,
            100 * self.best_score,
            self.best_step,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"score": self.best_score, "step": self.best_step, "history": self.history, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier process had found."""
        self.best_score, self.best_step = state_dict["score"], state_dict["step"]
        self.history, self._best = list(state_dict["history"]), dict(state_dict["best"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best tensors back."""
        if self._best:
            assert isinstance(pl_module, PromcseModule)
            pl_module.encoder.load_state_dict(self._best)


class History(pl.Callback):
    """Log what a step was: loss parts, gradient norm, learning rate, and rows/s, tokens/s and padding since the last entry.

    The looks at the development set are left out of the times. Of several processes the rows and tokens are added up.

    Args:
        every: Steps between two entries.
        chunk_tokens: Of the encoder, for the padding share.
    """

    def __init__(self, every: int, chunk_tokens: int | None) -> None:
        self.every, self.chunk_tokens = every, chunk_tokens
        self.rows = self.real_tokens = self.padded_tokens = 0
        self.total_rows, self.total_seconds = 0, 0.0
        self._seconds, self._start, self._lr = 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Start the clock of a step and note its learning rate."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        """Count the step and log when it is time."""
        assert isinstance(pl_module, PromcseModule)
        if batch.tokens.ids_NT.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        self._seconds += seconds
        tokens = batch.tokens
        own = [len(batch.rows_B), int(tokens.mask_NT.sum()), padded_tokens(tokens.mask_NT, self.chunk_tokens)]
        rows, real_tokens, padded = sum_over_ranks(torch.tensor(own)).tolist()
        self.total_rows, self.total_seconds = self.total_rows + rows, self.total_seconds + seconds
        self.rows, self.real_tokens = self.rows + rows, self.real_tokens + real_tokens
        self.padded_tokens += padded
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
        """Return what a resumed run needs: the counts since the last entry and of all."""
        names = ("rows", "real_tokens", "padded_tokens", "total_rows", "total_seconds", "_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over an earlier process's counts."""
        vars(self).update(state_dict)


class ProgressLines(pl.Callback):
    """A line every tenth of the run, for output that is not a terminal.

    Args:
        seconds: Gives the seconds of training so far, those before a resumption included.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.seconds = seconds

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *_: Any,
        **__: Any,
    ) -> None:
        """Write a line when another tenth is done."""
        assert isinstance(pl_module, PromcseModule)
        step, steps = trainer.global_step, pl_module.total_steps
        if step * 10 // steps > (step - 1) * 10 // steps:
            loss = float(trainer.callback_metrics["loss"])
            log.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss, self.seconds())


class ProgressBar(pl.Callback):
    """A bar over all steps of the run, with loss and development score, for a terminal.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._bar = ExitStack()
        self.console = console

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        assert isinstance(pl_module, PromcseModule)
        self.report = self._bar.enter_context(stages(self.console))
        self.report("training", trainer.global_step, pl_module.total_steps)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *_: Any,
        **__: Any,
    ) -> None:
        """Move it on."""
        assert isinstance(pl_module, PromcseModule)
        metrics = trainer.callback_metrics
        parts = [
            f"{name} {float(metrics[name]):.{digits}f}" for name, digits in (("loss", 3), ("dev", 2)) if name in metrics
        ]
        self.report(f"training: {', '.join(parts)}", trainer.global_step, pl_module.total_steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take it away."""
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take it away."""
        self._bar.close()
