"""Lightning callbacks of a training run: weight averaging, dev evaluation, history, progress output.

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
from torch.optim.swa_utils import get_swa_multi_avg_fn

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


class WeightAverage(pl.Callback):
    """Average the trained tensors of the encoder over the last steps, with equal weights (Izmailov et al. 2018, algorithm 1).

    At the end of training, the encoder holds the mean; `BestByDev`, which must follow it, decides whether to keep it. All ranks
    compute the mean: their trained tensors are equal.

    Args:
        first_step: First step of the mean.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step, self.steps = first_step, 0
        self.mean: dict[str, Tensor] = {}
        self._add = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Add the tensors of the step to the mean."""
        assert isinstance(pl_module, PromcseModule)
        if trainer.global_step < self.first_step:
            return
        tensors = pl_module.encoder.state_dict()
        if not self.steps:
            self.mean = {name: tensor.clone() for name, tensor in tensors.items()}
        else:
            # a mean from a checkpoint is on the CPU
            self.mean = {name: mean.to(tensors[name].device) for name, mean in self.mean.items()}
            self._add(list(self.mean.values()), [tensors[name] for name in self.mean], self.steps)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and its number of steps."""
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.steps, self.mean = state_dict["steps"], dict(state_dict["mean"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the mean into the encoder."""
        if self.steps:
            assert isinstance(pl_module, PromcseModule)
            pl_module.encoder.load_state_dict(self.mean)


class BestByDev(pl.Callback):
    """Evaluate the test-time embeddings on the dev set, keep the best step and restore its tensors at the end of training.

    Only a strictly better score replaces the best step. Rank 0 evaluates; the other ranks wait for it in their next step.

    Args:
        dev: The dev set.
        tokenizer: Tokenizer of the encoder.
        every: Steps between two evaluations; the last step is evaluated too.
        save_to: Adapter folder that is overwritten at each better score, so that an interrupted run has its best adapter on
            disk; None to save nothing.
        patience: Stop training after this number of evaluations without a better score; None: never. All ranks stop after the
            same step.
        average: Mean of the last steps, which is evaluated at the end of training and kept if it is better than the best step;
            None without one.
    """

    def __init__(
        self,
        dev: DevSet,
        tokenizer: Any,
        *,
        every: int,
        save_to: Path | None = None,
        patience: int | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.dev, self.tokenizer, self.every, self.save_to = dev, tokenizer, every, save_to
        self.patience, self.average = patience, average
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.history: list[tuple[int, float]] = []
        self.stopped_early: str | None = None
        """Why training stopped before its last step; always None on ranks other than 0, until the run is resumed."""
        self.average_score: float | None = None
        self.average_kept = False
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
        score, metric = self._score(module), self.dev.metric
        self.history.append((step, score))
        self._keep_if_better(module, step, score)
        assert self.best_score is not None
        percent, best = 100 * score, 100 * self.best_score
        self._log(trainer, step, {f"dev/{metric}": percent, f"dev/best_{metric}": best})
        module.log("dev", percent, logger=False)
        module.log(f"dev/{metric}", percent, logger=False)  # the name in the history, for callbacks that monitor it
        name = DEV_METRICS[metric]
        log.info("step %d: dev %s %.2f (best %.2f at step %d)", step, name, percent, best, self.best_step)

    def _score(self, module: PromcseModule) -> float:
        """Return the dev score of the encoder's current tensors."""
        return score_dev(PromCSE(module.encoder, self.tokenizer), self.dev)

    def _keep_if_better(self, module: PromcseModule, step: int, score: float) -> bool:
        """Keep the encoder's current tensors if their score is the best so far; return whether they were kept."""
        is_better = self.best_score is None or score > self.best_score
        if is_better:
            self.best_score, self.best_step = score, step
            self._best = {name: tensor.detach().clone() for name, tensor in module.encoder.state_dict().items()}
            if self.save_to is not None:
                training = {"best_step": step, f"dev_{self.dev.metric}": round(100 * score, 4)}
                save_adapter(module.encoder, self.save_to, training=training)
        return is_better

    def _log(self, trainer: pl.Trainer, step: int, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

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
        """Evaluate the mean of the last steps if there is one, and restore the best tensors."""
        assert isinstance(pl_module, PromcseModule)
        if trainer.is_global_zero and self.average is not None and self.average.steps:
            self._evaluate_average(trainer, pl_module, self.average)
        if self._best:
            pl_module.encoder.load_state_dict(self._best)

    def _evaluate_average(self, trainer: pl.Trainer, module: PromcseModule, average: WeightAverage) -> None:
        module.encoder.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        module.encoder.load_state_dict(average.mean)
        step, before = trainer.global_step, self.best_score
        self.average_score = self._score(module)
        self.average_kept = self._keep_if_better(module, step, self.average_score)
        assert self.best_score is not None
        percent, best = 100 * self.average_score, 100 * self.best_score
        metric = self.dev.metric
        self._log(trainer, step, {f"dev/average_{metric}": percent, f"dev/best_{metric}": best})
        log.info(
            "mean of steps %d to %d: dev %s %.2f (%s; best step: %.2f)",
            average.first_step,
            step,
            DEV_METRICS[metric],
            percent,
            "kept" if self.average_kept else "not kept",
            100 * before if before is not None else float("nan"),
        )


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
