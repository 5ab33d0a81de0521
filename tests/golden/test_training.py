"""Twenty steps of the official trainer on given batches: with its optimiser to rounding, with torch's to the known drift."""

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from golden.official import build_encoder, build_mlm_head, official_state, read_json, tokens_of, worst
from promcse_pl.config import LossConfig, OptimConfig
from promcse_pl.data.module import TrainBatch
from promcse_pl.training.module import PromcseModule

pytestmark = pytest.mark.golden
CASES = sorted(path.parent for path in GOLDEN.glob("training_*/outputs.safetensors"))
WORST: dict[str, float] = {}
WHAT = f"{len(CASES)} trainings of 20 steps"


class OfficialAdamW(torch.optim.Optimizer):
    """The rule of transformers 4.2.1: eps is added to the square root of the uncorrected second moment."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
                state["step"] += 1
                state["mean"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                state["square"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                size = group["lr"] * (1 - 0.999 ** state["step"]) ** 0.5 / (1 - 0.9 ** state["step"])
                parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(1e-8), value=-size)


def train(case, official_rule):
    args = read_json(case / "args.json")
    state = official_state(case, "model_init.safetensors")
    encoder = build_encoder(case, state, args)
    batches = load_file(case / "batches.safetensors")
    module = PromcseModule(
        encoder,
        loss=LossConfig(
            temperature=args["temp"],
            margin=args["eh_loss_margin"] or 0.0,
            hinge_weight=args["eh_loss_weight"] if args["do_eh_loss"] else 0.0,
            hard_negative_logit=args["hard_negative_weight"],
            mlm_weight=args["mlm_weight"] if args["do_mlm"] else 0.0,
        ),
        optim=OptimConfig(lr=args["learning_rate"], clip_norm=args["max_grad_norm"]),
        total_steps=args["max_steps"],
        chunk_tokens=64,
        mlm_head=build_mlm_head(encoder, state) if args["do_mlm"] else None,
    ).train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wired = module.configure_optimizers()
    optimizer = wired["optimizer"]
    schedule = wired["lr_scheduler"]["scheduler"]
    if official_rule:
        optimizer = OfficialAdamW(trained, args["learning_rate"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args["max_steps"]))
    losses = []
    accumulate = args["gradient_accumulation_steps"]
    micro_batches = sorted({name.split(".")[0] for name in batches})
    for step in range(args["max_steps"]):
        module.trainer_step = step
        total = 0.0
        for micro in micro_batches[step * accumulate : (step + 1) * accumulate]:
            inputs = {name.split(".")[1]: tensor for name, tensor in batches.items() if name.startswith(micro)}
            tokens, views = tokens_of(inputs)
            parts = module.losses(TrainBatch(tokens, views, torch.arange(len(inputs["input_ids"]))))
            (parts.total / accumulate).backward()
            total += float(parts.total.detach()) / accumulate
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(trained, args["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return module, losses


def check(kind, error, tolerance):
    WORST[kind] = max(WORST.get(kind, 0.0), error)
    assert error <= tolerance, f"{kind}: {error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_official_trainer_with_its_optimiser_rule(case, monkeypatch):
    monkeypatch.setattr(PromcseModule, "global_step", property(lambda module: getattr(module, "trainer_step", 0)))
    module, losses = train(case, official_rule=True)
    expected = read_json(case / "loss.json")["f64"]["loss"]
    check(
        "loss, official rule",
        worst(torch.tensor(losses, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)),
        1e-9,
    )
    outputs = load_file(case / "outputs.safetensors")
    for name, parameter in module.encoder.state_dict().items():
        official = outputs[f"final_f64.{name.replace('prompt.', 'prefix_encoder.').replace('head.', 'mlp.')}"]
        check("final parameters, official rule", worst(parameter, official), 1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_drifts_little_with_torchs_optimiser(case, monkeypatch):
    monkeypatch.setattr(PromcseModule, "global_step", property(lambda module: getattr(module, "trainer_step", 0)))
    _, losses = train(case, official_rule=False)
    expected = read_json(case / "loss.json")["f64"]["loss"]
    check("loss, torch's AdamW (absolute)", max(abs(a - b) for a, b in zip(losses, expected, strict=True)), 2.5e-3)
