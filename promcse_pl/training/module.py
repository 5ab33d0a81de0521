"""The LightningModule: connects encoder, hybrid loss and optimiser."""

# B rows, N = views x B sentences, D width

from __future__ import annotations

import dataclasses
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from promcse_pl.config import LossConfig, OptimConfig
from promcse_pl.data.batch import TrainBatch, upload
from promcse_pl.data.masking import IGNORED
from promcse_pl.losses.hybrid import LossParts, hybrid_loss, mlm_loss, mlm_weight_at
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.mlm import MlmHead
from promcse_pl.training.finite import CheckedStep, FiniteCheck
from promcse_pl.training.gather import average_gradients, gather_rows, scaled_gradient, sum_over_ranks, world_size
from promcse_pl.training.optimizer import build_optimizer, learning_rate_factor


class PromcseModule(pl.LightningModule):
    """Trains the prompt, the heads and, if any are selected, weights of a prompt encoder.

    Args:
        encoder: The model; frozen weights have no gradient and are not part of checkpoints.
        loss: Weights of the loss terms.
        optim: Optimiser, learning-rate schedule and gradient clipping.
        total_steps: Number of steps of the schedule.
        chunk_tokens, recompute: See `PromptEncoder.forward`.
        mlm_head: Head of the MLM task; trained with the prompt, but not part of the adapter.
        official_gradient: With several ranks, scale the gradient by 1 / ranks and average the MLM loss per rank, as the official
            code does. By default, loss and gradient equal those of a single process.
    """

    def __init__(  # 8 parameters: each is independent, and most have a default
        self,
        encoder: PromptEncoder,
        *,
        loss: LossConfig,
        optim: OptimConfig,
        total_steps: int,
        chunk_tokens: int | None = None,
        recompute: bool = False,
        mlm_head: MlmHead | None = None,
        official_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.mlm_head, self.official_gradient = encoder, mlm_head, official_gradient
        self.finite = FiniteCheck()
        self.loss, self.optim, self.total_steps = loss, optim, total_steps
        self.chunk_tokens, self.recompute = chunk_tokens, recompute
        self.entry: dict[str, Tensor] = {}
        """Loss terms and gradient norm of the last step, for the history."""

    def losses(self, batch: TrainBatch) -> LossParts:
        """Encode the rows of this rank and return the loss terms of the batch of all ranks."""
        rows = len(batch.rows_B)
        if rows:
            vectors_ND, hidden_MD = self.encoder(
                batch.tokens, train_head=True, chunk_tokens=self.chunk_tokens, recompute=self.recompute
            )
        else:  # a last batch with fewer rows than ranks: this rank only joins the collective operations
            widths = (self.encoder.width, self.encoder.backbone.width)
            vectors_ND, hidden_MD = (self._trained()[0].new_zeros(0, width) for width in widths)
        views = gather_rows(vectors_ND.view(batch.views, rows, vectors_ND.shape[1]))
        parts = hybrid_loss(
            views[0],
            views[1],
            views[2] if batch.views == 3 else None,
            self.loss,
            scores_B=None if batch.scores_B is None else gather_rows(batch.scores_B.view(1, -1, 1)).flatten(),
            mlm=self._mlm_loss(hidden_MD, batch.tokens.mlm_labels_NT),
        )
        total = parts.total
        if not rows:
            total = total + 0 * torch.stack([parameter.sum() for parameter in self._trained()]).sum()  # a gradient of 0
        if not self.official_gradient:
            total = scaled_gradient(total, world_size())  # gradients are averaged over the ranks, but must be summed
        return dataclasses.replace(parts, total=total)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _mlm_loss(self, hidden_MD: Tensor | None, labels_NT: Tensor | None) -> Tensor | None:
        """Return the weighted MLM loss over all ranks, or None without the MLM task."""
        if self.mlm_head is None or hidden_MD is None or labels_NT is None:
            return None
        weight = mlm_weight_at(self.global_step, self.loss.mlm_weight)
        labels_M = upload(labels_NT[labels_NT != IGNORED], hidden_MD.device)
        loss = mlm_loss(self.mlm_head(hidden_MD), labels_M)
        if self.official_gradient or world_size() == 1:
            return weight * loss
        fraction = len(labels_M) / sum_over_ranks(loss.new_full((), float(len(labels_M)))).clamp(min=1)
        loss = loss * fraction
        # the value over all ranks, the gradient of this rank
        return weight * (loss + (sum_over_ranks(loss) - loss).detach())

    def on_fit_start(self) -> None:
        """Enable dropout: encoders are loaded in eval mode, and Lightning does not change the mode."""
        self.train()

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Return the total loss; `FiniteCheck` raises NonFiniteError if it is not finite."""
        parts = self.losses(batch)
        named = {name: part.detach() for name, part in parts.named().items()}
        rows = f"batch {batch_idx} of epoch {self.current_epoch}, training rows {batch.rows_B[:4].tolist()}..."
        self.finite.check_losses(CheckedStep(f"step {self.global_step + 1}", rows, self._remedy(), batch, named))
        self.entry = {f"train/{name}": part for name, part in named.items()}
        return parts.total

    def on_train_batch_start(self, batch: TrainBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Raise the error of an earlier step; the last one may still be computed by a GPU."""
        self.finite.wait(pending=1)

    def on_train_end(self) -> None:
        """Raise the error of one of the last steps."""
        self.finite.wait()

    def on_after_backward(self) -> None:
        """Average the gradients over all ranks; a strategy that has done so already is not affected."""
        average_gradients(self._trained())

    def configure_optimizers(self) -> Any:  # noqa: ANN401  (Lightning's own union of dictionaries)
        """Return AdamW on the trained tensors, and the schedule of its learning rate."""
        optimizer = build_optimizer(self._trained(), self.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.optim, self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Record and check the global gradient norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.finite.check_gradient(norm, optimizer)
        self.entry["train/gradient_norm"] = norm

    def _remedy(self) -> str:
        is_float32 = self.encoder.backbone.dtype == torch.float32 and self.encoder.autocast is None
        if self.global_step == 0 and not is_float32:
            return (
                "It occurred before the first update, so it comes from the encoder. Try: trainer.precision=float32, or "
                "another model=, in a new run"
            )
        if self.global_step == 0:
            return (
                "It occurred before the first update, so it comes from the encoder in float32. Try: another model= in a "
                "new run"
            )
        return f"The trained tensors are those of the last step. Try: optim.lr={self.optim.lr / 3:.2g} in a new run"
