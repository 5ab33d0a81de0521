"""Lightning callbacks of a training run: dev evaluation, history, progress output.

The class names are keys in checkpoints: renaming one breaks the resumption of runs that an earlier version started.
"""

from __future__ import annotations

import logging
import math
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
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.terminal import stages

log = logging.getLogger("promcse_pl")


class BestByDev(pl.Callback):
    """Evaluate the test-time embeddings on the dev set, keep the best step and restore its tensors at the end of training.

    Only a strictly better score replaces the best step. A step after it without a score, because all cosines of the pairs are
    equal, counts as not better. Rank 0 evaluates; the other ranks wait for it in their next step.

    Args:
        dev: The dev set.
        tokenizer: Tokenizer of the encoder.
        every: Steps between two evaluations; the last step is evaluated too.
        save_to: Adapter folder that is overwritten at each better score, so that an interrupted run has its best adapter on
            disk; None to save nothing.
        patience: Stop training after this number of evaluations without a better score; None: never. All ranks stop after the
            same step.
    """

    def __init__(
        self,
        dev: DevSet,
        tokenizer: Any,
        *,
        every: int,
        save_to: Path | None = None,
        patience: int | None = None,
    ) -> None:
        self.dev, self.tokenizer, self.every, self.save_to = dev, tokenizer, every, save_to
        self.patience = patience
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.history: list[tuple[int, float]] = []
        self.stopped_early: str | None = None
        """Why training stopped before its last step; always None on ranks other than 0, until the run is resumed."""
        self._best: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once if the run was resumed from the checkpoint of an early stop."""
        trainer.should_stop = trainer.should_stop or self.stopped_early is not None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Evaluate every `every` steps and at the last step; stop training if the patience is exhausted."""
        assert isinstance(pl_module, PromcseModule)
        step, steps = trainer.global_step, pl_module.total_steps
        if step % self.every and step < steps:
            return
        pl_module.finite.wait()
        if trainer.is_global_zero:
            self._evaluate(trainer, pl_module, step)
        if self.patience is None or step >= steps:
            return
        if (
            trainer.is_global_zero
            and sum(evaluated > (self.best_step or 0) for evaluated, _ in self.history) >= self.patience
        ):
            self.stopped_early = f"no better dev score in {self.patience} evaluations since step {self.best_step}"
            log.info("training stopped early after step %d of %d: %s", step, steps, self.stopped_early)
        has_stopped = sum_over_ranks(torch.tensor([int(self.stopped_early is not None)]))
        trainer.should_stop = trainer.should_stop or bool(has_stopped)

    def _evaluate(self, trainer: pl.Trainer, module: PromcseModule, step: int) -> None:
        metric = self.dev.metric
        try:
            score = self._score(module)
        except DataError as error:  # all cosines equal
            if self.best_step is None:
                raise DataError(
                    f"no dev score at step {step}: {error}. Try: a new run with a smaller optim.lr"
                ) from error
            log.warning("no dev score at step %d: %s. The best step so far is %d", step, error, self.best_step)
            self.history.append((step, math.nan))
            module.log("dev", math.nan, logger=False)
            return
        self.history.append((step, score))
        if self.best_score is None or score > self.best_score:
            self._keep(module, step, score)
        assert self.best_score is not None
        percent, best = 100 * score, 100 * self.best_score
        for logger in trainer.loggers:
            logger.log_metrics({f"dev/{metric}": percent, f"dev/best_{metric}": best}, step=step)
        module.log("dev", percent, logger=False)
        module.log(f"dev/{metric}", percent, logger=False)  # the name in the history, for callbacks that monitor it
        name = DEV_METRICS[metric]
        log.info("step %d: dev %s %.2f (best %.2f at step %d)", step, name, percent, best, self.best_step)

    def _score(self, module: PromcseModule) -> float:
        """Return the dev score of the encoder's current tensors."""
        return score_dev(PromCSE(module.encoder, self.tokenizer), self.dev)

    def _keep(self, module: PromcseModule, step: int, score: float) -> None:
        """Keep the encoder's current tensors, and save them as an adapter."""
        self.best_score, self.best_step = score, step
        self._best = {name: tensor.detach().clone() for name, tensor in module.encoder.state_dict().items()}
        if self.save_to is not None:
            training = {"best_step": step, f"dev_{self.dev.metric}": round(100 * score, 4)}
            save_adapter(module.encoder, self.save_to, training=training)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far and the tensors of the best step."""
        state = {"score": self.best_score, "step": self.best_step, "history": self.history, "best": self._best}
        return state if self.stopped_early is None else {**state, "stopped_early": self.stopped_early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.best_score, self.best_step = state_dict["score"], state_dict["step"]
        self.history, self._best = list(state_dict["history"]), dict(state_dict["best"])
        self.stopped_early = state_dict.get("stopped_early")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the best tensors."""
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
        is_entry = trainer.global_step % self.every == 0
        if is_entry:
            pl_module.finite.wait()
        # float() waits for the GPU, so that the measured time includes all steps of the entry
        metrics = {name: float(value) for name, value in pl_module.entry.items()} if is_entry else {}
        seconds = time.perf_counter() - self._start
        lengths_N, longest = batch.tokens.lengths(), batch.tokens.ids_NT.shape[1]
        counts = [len(batch.rows_B), int(lengths_N.sum()), padded_tokens(lengths_N, longest, self.chunk_tokens)]
        rows, real_tokens, padded = sum_over_ranks(torch.tensor(counts)).tolist()
        self.total_rows, self.total_seconds = self.total_rows + rows, self.total_seconds + seconds
        self.rows, self._seconds = self.rows + rows, self._seconds + seconds
        self.real_tokens, self.padded_tokens = self.real_tokens + real_tokens, self.padded_tokens + padded
        if not is_entry:
            return
        metrics |= {
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
        self._bar, self._text = ExitStack(), "training"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        assert isinstance(pl_module, PromcseModule)
        self.report = self._bar.enter_context(stages(self.console))  # shows nothing if the console is not a terminal
        self.report(self._text, trainer.global_step, pl_module.total_steps)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Update the bar; read loss and dev score, and log a line without a terminal, if an entry is due."""
        assert isinstance(pl_module, PromcseModule)
        step, steps = trainer.global_step, pl_module.total_steps
        is_due = step % self.every == 0 or step >= steps or trainer.should_stop
        if is_due:  # reading values in each step would synchronise with the GPU
            loss = f"loss {float(pl_module.entry['train/loss']):.3f}"
            if not self.console.is_terminal:
                log.info("step %d of %d: %s, %.0f s", step, steps, loss, self.seconds())
            dev = trainer.callback_metrics.get("dev")
            self._text = f"training: {loss}" + ("" if dev is None else f", dev {float(dev):.2f}")
        self.report(self._text, step, steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self._bar.close()
