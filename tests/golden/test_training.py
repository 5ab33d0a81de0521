"""Twenty steps of the official trainer on given batches, with its optimiser (equal up to rounding) and with torch's AdamW.

With `gradient_accumulation_steps` of k in args.json, a step takes k micro-batches of batches.safetensors in order, and loss.json
lists a loss per micro-batch, as the model gives it: not divided by k.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.folders import GOLDEN
from support.official import build_encoder, build_mlm_head, official_state, read_json, tokens_of, worst

from promcse_pl.config import LossConfig, OptimConfig
from promcse_pl.data.batch import TrainBatch
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


def build_module(case):
    args = read_json(case / "args.json")
    state = official_state(case, "model_init.safetensors")
    encoder = build_encoder(case, state, args)
    return PromcseModule(
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


def read_micro_batches(case):
    """The micro-batches in order; their tensors are called microN.input_ids and so on."""
    named = {}
    for name, tensor in load_file(case / "batches.safetensors").items():
        micro, _, part = name.partition(".")
        named.setdefault(int(micro.removeprefix("micro")), {})[part] = tensor
    batches = []
    for _, inputs in sorted(named.items()):
        tokens, views = tokens_of(inputs)
        batches.append(TrainBatch(tokens, views, torch.arange(len(inputs["input_ids"]))))
    return batches


def train(case, official_rule):
    """Train as the case says; returns the module and the loss of every micro-batch."""
    args, module = read_json(case / "args.json"), build_module(case)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wired = module.configure_optimizers()
    optimizer = wired["optimizer"]
    schedule = wired["lr_scheduler"]["scheduler"]
    if official_rule:
        optimizer = OfficialAdamW(trained, args["learning_rate"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args["max_steps"]))
    losses = []
    accumulate = args["gradient_accumulation_steps"]
    micro_batches = read_micro_batches(case)
    assert len(micro_batches) == args["max_steps"] * accumulate
    for step in range(args["max_steps"]):
        module.trainer_step = step
        for batch in micro_batches[step * accumulate : (step + 1) * accumulate]:
            total = module.losses(batch).total
            (total / accumulate).backward()
            losses.append(float(total.detach()))
        torch.nn.utils.clip_grad_norm_(trained, args["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return module, losses


def check(kind, error, tolerance):
    WORST[kind] = max(WORST.get(kind, 0.0), error)
    assert error <= tolerance, f"{kind}: {error:.2e}"


@pytest.fixture(autouse=True)
def _step_of_the_loop(monkeypatch):
    monkeypatch.setattr(PromcseModule, "global_step", property(lambda module: getattr(module, "trainer_step", 0)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_official_trainer_with_its_optimiser_rule(case):
    check_official_rule(case)


def check_official_rule(case):
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
def test_losses_with_torchs_adamw_stay_close_to_the_official_ones(case):
    _, losses = train(case, official_rule=False)
    expected = read_json(case / "loss.json")["f64"]["loss"]
    check("loss, torch's AdamW (absolute)", max(abs(a - b) for a, b in zip(losses, expected, strict=True)), 2.5e-3)


def accumulated_case(case, folder, accumulate):
    """A case with gradient accumulation, from the batches of one without: its numbers come from a plain loop.

    The loop takes the gradient of the mean loss of a step at once and writes the optimiser's rule out per tensor.
    """
    shutil.copytree(case, folder)
    args = read_json(case / "args.json")
    args |= {"gradient_accumulation_steps": accumulate, "max_steps": args["max_steps"] // accumulate}
    if "backbone" in args:
        args["backbone"] = str((case / args["backbone"]).resolve())
    (folder / "args.json").write_text(json.dumps(args))
    module, batches, listed = build_module(folder), read_micro_batches(folder), []
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    means = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    for step in range(args["max_steps"]):
        module.trainer_step = step
        losses = [module.losses(batch).total for batch in batches[step * accumulate : (step + 1) * accumulate]]
        listed += [float(loss.detach()) for loss in losses]
        gradients = dict(zip(trained, torch.autograd.grad(sum(losses) / accumulate, [*trained.values()]), strict=True))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        rate = args["learning_rate"] * (1 - step / args["max_steps"])
        for name, weight in trained.items():
            gradient = gradients[name] * min(1.0, args["max_grad_norm"] / float(norm + 1e-6))
            means[name] = 0.9 * means[name] + 0.1 * gradient
            squares[name] = 0.999 * squares[name] + 0.001 * gradient**2
            scale = (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
            weight.data -= rate * scale * means[name] / (squares[name].sqrt() + 1e-8)
    (folder / "loss.json").write_text(json.dumps({"f64": {"loss": listed}}))
    final = {
        f"final_f64.{name.replace('prompt.', 'prefix_encoder.').replace('head.', 'mlp.')}": tensor.contiguous()
        for name, tensor in module.encoder.state_dict().items()
    }
    save_file(final, folder / "outputs.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_a_training_with_gradient_accumulation_is_read_with_a_loss_per_micro_batch(accumulate, tmp_path):
    case = accumulated_case(CASES[0], tmp_path / "case", accumulate)
    assert len(read_json(case / "loss.json")["f64"]["loss"]) == len(read_json(CASES[0] / "loss.json")["f64"]["loss"])
    check_official_rule(case)
    if accumulate == 1:  # then the plain loop must give the official numbers too
        ours, official = (torch.tensor(read_json(folder / "loss.json")["f64"]["loss"]) for folder in (case, CASES[0]))
        assert worst(ours, official) < 1e-6
