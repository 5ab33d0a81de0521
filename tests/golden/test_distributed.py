"""Loss and gradients over 2 and 3 real processes: equal to a single one by default, to the official 1/W scale on request."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.folders import GOLDEN
from support.official import build_encoder, build_mlm_head, official_state, read_json, tokens_of, worst
from support.processes import PROCESSES, end

from promcse_pl.config import LossConfig, OptimConfig
from promcse_pl.data.batch import Tokens, TrainBatch
from promcse_pl.training.module import PromcseModule

pytestmark = pytest.mark.golden
CASES = sorted(path.parent for path in GOLDEN.glob("ddp_w*/outputs.safetensors"))
TOLERANCE = 1e-9
WORST: dict[str, float] = {}
WHAT = f"{len(CASES)} cases over 2 and 3 processes"


def check(kind, error):
    WORST[kind] = max(WORST.get(kind, 0.0), error)
    assert error <= TOLERANCE, f"{kind}: {error:.2e}"


def equal_shares(case):
    args = read_json(case / "args.json")
    return [args["per_rank_batch"]] * args["world_size"]


def build_module(case, *, official_gradient):
    args = read_json(case / "args.json")
    state = official_state(case)
    encoder = build_encoder(case, state, args)
    return PromcseModule(
        encoder,
        loss=LossConfig(
            temperature=args["temp"],
            margin=args["eh_loss_margin"] or 0.0,
            hinge_weight=args["eh_loss_weight"] if args["do_eh_loss"] else 0.0,
            hard_negative_logit=args["hard_negative_weight"] if args["num_sent"] == 3 else 0.0,
            mlm_weight=args["mlm_weight"],
        ),
        optim=OptimConfig(),
        total_steps=1,
        mlm_head=build_mlm_head(encoder, state) if args["do_mlm"] else None,
        official_gradient=official_gradient,
    )


def rank_batch(case, rows):
    inputs = {name: tensor[rows] for name, tensor in load_file(case / "inputs.safetensors").items()}
    tokens, views = tokens_of(inputs)
    return TrainBatch(Tokens(*(getattr(tokens, name) for name in Tokens.__slots__)), views, torch.arange(len(rows)))


JOBS = [(case, equal_shares(case), official) for case in CASES for official in (False, True)]
RAGGED = [(case, [3, 1, 2], False) for case in CASES if sum(equal_shares(case)) == 6]
JOBS += RAGGED


def run_rank(rank, jobs, out):
    """Function of one process: compute its part of every case with enough ranks."""
    torch.set_num_threads(1)
    for number, (case, sizes, official_gradient) in enumerate(jobs):
        if rank >= len(sizes):
            continue
        dist.init_process_group("gloo", init_method=f"file://{out}/store{number}", rank=rank, world_size=len(sizes))
        module = build_module(case, official_gradient=official_gradient).train()
        start = sum(sizes[:rank])
        parts = module.losses(rank_batch(case, torch.arange(start, start + sizes[rank])))
        parts.total.backward()
        gradients = {}
        for name, parameter in module.encoder.named_parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.grad)
                gradients[name] = parameter.grad / len(sizes)  # what DistributedDataParallel leaves in .grad
        if rank == 0:
            save_file(gradients, f"{out}/gradients{number}.safetensors")
        losses = {name: float(part) for name, part in parts.named().items()}
        Path(f"{out}/loss{number}-{rank}.json").write_text(json.dumps(losses))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Loss of every rank and the mean gradient, by job; the processes start once for all jobs."""
    out = tmp_path_factory.mktemp("ranks")
    most = max(len(sizes) for _, sizes, _ in JOBS)
    processes = [PROCESSES.Process(target=run_rank, args=(rank, JOBS, str(out))) for rank in range(most)]
    for process in processes:
        process.start()
    assert [end(process) for process in processes] == [0] * most

    def find(case, sizes, official_gradient):
        number = JOBS.index((case, sizes, official_gradient))
        losses = [read_json(out / f"loss{number}-{rank}.json") for rank in range(len(sizes))]
        return losses, load_file(out / f"gradients{number}.safetensors")

    return find


def official_name(name):
    return name.replace("prompt.", "prefix_encoder.").replace("head.", "mlp.")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_by_default_loss_and_gradient_are_those_of_a_single_process(case, results):
    losses, gradients = results(case, equal_shares(case), False)
    expected, outputs = read_json(case / "loss.json"), load_file(case / "outputs.safetensors")
    for loss in losses:
        check("loss", abs(loss["loss"] / expected["loss_single"] - 1))
    for name, gradient in gradients.items():
        check("gradient", worst(gradient, outputs[f"grad_single.{official_name(name)}"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_official_gradient_scale_is_an_option(case, results):
    losses, gradients = results(case, equal_shares(case), True)
    expected, outputs = read_json(case / "loss.json"), load_file(case / "outputs.safetensors")
    for loss, official in zip(losses, expected["loss_rank"], strict=True):
        check("loss, official scale", abs(loss["loss"] / official - 1))
    for name, gradient in gradients.items():
        check("gradient, official scale", worst(gradient, outputs[f"grad_ddp_mean.{official_name(name)}"]))


@pytest.mark.parametrize("case", [case for case, _, _ in RAGGED], ids=lambda case: case.name)
def test_ranks_may_hold_different_numbers_of_rows(case, results):
    losses, gradients = results(case, [3, 1, 2], False)
    expected, outputs = read_json(case / "loss.json"), load_file(case / "outputs.safetensors")
    for loss in losses:
        check("loss, ragged", abs(loss["loss"] / expected["loss_single"] - 1))
    for name, gradient in gradients.items():
        check("gradient, ragged", worst(gradient, outputs[f"grad_single.{official_name(name)}"]))
