"""Training of encoder weights equals a plain loop with transformers and AdamW, step by step."""

import pytest
import torch
from support.encoders import NO_DROPOUT, small_backbone, small_config, small_encoder, small_tokens
from torch import nn
from transformers import AutoModel

from promcse_pl.config import LossConfig, OptimConfig
from promcse_pl.data.batch import TrainBatch
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.tuning import Tuning
from promcse_pl.training.module import PromcseModule

STEPS, LR = 3, 0.01
TUNINGS = [Tuning("bias"), Tuning("lora", rank=3, alpha=6.0), Tuning("full")]


class LoraLinear(nn.Module):
    """W x + b + alpha / rank * B A x (Hu et al. 2022, eq. 3)."""

    def __init__(self, linear: nn.Linear, tuning: Tuning, lora_a: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.factor = linear, tuning.alpha / tuning.rank
        self.lora_a = nn.Parameter(lora_a.clone())
        self.lora_b = nn.Parameter(lora_a.new_zeros(linear.out_features, tuning.rank))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) + self.factor * inputs @ self.lora_a.T @ self.lora_b.T


def plain_model(tuning: Tuning, module: PromcseModule) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """transformers' encoder with the trained parameters under the names of the module."""
    model = AutoModel.from_config(small_config("bert", **NO_DROPOUT), attn_implementation="eager")
    model.load_state_dict(small_encoder("bert").state_dict())
    model.double().eval().requires_grad_(False)
    named = {}
    if tuning.weights == "lora":
        for name, linear in [item for item in model.encoder.named_modules() if isinstance(item[1], nn.Linear)]:
            prefix = f"encoder.backbone.model.encoder.{name}.lora_"
            added = LoraLinear(linear, tuning, module.state_dict()[f"{prefix}A.default.weight"])
            parent, _, child = name.rpartition(".")
            setattr(model.encoder.get_submodule(parent), child, added)
            named |= {f"{prefix}A.default.weight": added.lora_a, f"{prefix}B.default.weight": added.lora_b}
    else:
        for name, weight in model.named_parameters():
            if not name.startswith("pooler") and (tuning.weights == "full" or name.endswith("bias")):
                named[f"encoder.backbone.model.{name}"] = weight.requires_grad_()
    return model, named


@pytest.mark.parametrize("chunk_tokens", [None, 20])
@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning.weights)
def test_three_steps_equal_a_plain_loop_in_loss_gradients_and_weights(tuning, chunk_tokens):
    backbone = small_backbone(**NO_DROPOUT)
    backbone.tune(tuning)
    encoder = PromptEncoder(backbone, length=0, pooling="cls", head="none").double()
    module = PromcseModule(
        encoder, loss=LossConfig(), optim=OptimConfig(lr=LR), total_steps=STEPS, chunk_tokens=chunk_tokens
    ).train()
    model, named = plain_model(tuning, module)
    optimizer = module.configure_optimizers()["optimizer"]
    plain = torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.0)
    tokens = small_tokens([9, 4, 12, 5, 9, 3])
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain.zero_grad()
        loss = module.losses(TrainBatch(tokens, 3, torch.arange(2))).total
        loss.backward()
        states = model(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT).last_hidden_state
        views = states[:, 0].view(3, 2, -1)
        expected = hybrid_loss(*views, LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0)).total
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        found = {name: weight for name, weight in module.named_parameters() if weight.numel() and weight.requires_grad}
        assert found.keys() == named.keys()
        largest = max(float(weight.grad.norm()) for weight in named.values())
        for name, weight in named.items():
            assert (found[name].grad - weight.grad).norm() <= 1e-10 * largest, name
        # where a gradient is 0 but for rounding (a key bias), AdamW would divide rounding by rounding
        for name, weight in named.items():
            found[name].grad.copy_(weight.grad)
        optimizer.step()
        plain.step()
        for name, weight in named.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-12, atol=1e-14)


def test_a_head_alone_trains_with_a_frozen_encoder():
    encoder = PromptEncoder(small_backbone(**NO_DROPOUT), length=0, pooling="cls", head="mlp").double().train()
    module = PromcseModule(encoder, loss=LossConfig(), optim=OptimConfig(lr=LR), total_steps=1, chunk_tokens=20)
    module.losses(TrainBatch(small_tokens([9, 4, 12, 5, 9, 3]), 3, torch.arange(2))).total.backward()
    moved = {name for name, weight in encoder.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert moved == {"head.dense.weight", "head.dense.bias"}
