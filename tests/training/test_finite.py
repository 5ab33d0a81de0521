"""A step with a non-finite loss or gradient does not change the trained parameters, also if it is detected one step later."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.runs import small_config, write_inputs_with_nan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from promcse_pl.data.batch import Tokens, TrainBatch
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.training import finite, module
from promcse_pl.training.finite import CheckedStep, FiniteCheck
from promcse_pl.training.optimizer import build_optimizer
from promcse_pl.utils.errors import NonFiniteError


@pytest.fixture
def deferred(monkeypatch):
    """Check values one step later, as on a GPU; on a CPU, the fused AdamW skips an update in the same way."""
    monkeypatch.setattr(finite, "is_deferred", lambda _: True)

    def fused(*arguments):
        optimizer = build_optimizer(*arguments)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    monkeypatch.setattr(module, "build_optimizer", fused)


def step(number: int, loss: float) -> CheckedStep:
    tokens = Tokens(torch.tensor([[number]]), torch.tensor([[1]]))
    losses = {"loss": torch.tensor(loss), "hinge": torch.tensor(0.5)}
    return CheckedStep(
        f"step {number}", f"batch {number - 1}", "Try: less", TrainBatch(tokens, 2, torch.tensor([number])), losses
    )


@pytest.mark.parametrize(
    ("loss", "norm", "error"),
    [
        (float("nan"), 1.0, r"the loss of step 2 \(batch 1\) is not finite: loss nan, hinge 0.5. Try: less"),
        (1.0, float("inf"), "the gradient of step 2 is not finite. Try: less"),
    ],
)
def test_a_late_error_names_its_step_and_no_update_follows_it(deferred, loss, norm, error):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0, fused=True)
    check, values = FiniteCheck(), []
    for number, (value, length) in enumerate([(1.0, 1.0), (loss, norm), (1.0, 1.0)], start=1):
        check.wait(pending=2)
        parameter.grad = torch.ones(3)
        check.check_losses(step(number, value))
        check.check_gradient(torch.tensor(length), optimizer)
        optimizer.step()
        values.append(parameter.detach().clone())
    assert not torch.equal(values[0], torch.ones(3))
    assert torch.equal(values[1], values[0])
    assert torch.equal(values[2], values[0])
    check.wait(pending=2)
    assert check.failed is None
    with pytest.raises(NonFiniteError, match=f"^{error}$"):
        check.wait(pending=1)
    assert check.failed.rows_B.tolist() == [2]


def test_an_unfused_optimiser_is_checked_immediately(deferred):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    check = FiniteCheck()
    check.check_losses(step(3, float("nan")))
    with pytest.raises(NonFiniteError, match="the loss of step 3"):
        check.check_gradient(torch.tensor(1.0), optimizer)


class FloatReads(TorchDispatchMode):
    """Counts the floating-point values that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("every", "lengths"), [(100, (2, 5)), (4, (5, 7))], ids=["before", "after an evaluation"])
def test_the_number_of_values_that_are_read_does_not_grow_with_the_steps(every, lengths, tmp_path, deferred):
    (tmp_path / "dev.tsv").write_text("a\tb\tscore\n" + "".join(f"w{i} w9\tw{i + 3}\t{i % 5}\n" for i in range(5, 20)))
    counts = []
    for steps in lengths:
        trainer = {"log_every": 100, "eval_every": every, "epochs": 3, "max_steps": steps}
        config = small_config(tmp_path, data={"dev": str(tmp_path / "dev.tsv")}, trainer=trainer)
        with FloatReads() as reads:
            run_job(config, tmp_path / f"run{steps}", Console(file=io.StringIO()))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_a_run_with_late_values_stops_with_the_same_error_and_saves_the_batch_of_the_failed_step(tmp_path, deferred):
    write_inputs_with_nan(tmp_path)
    config = small_config(tmp_path, data={"batch_size": 2}, trainer={"save_every": 1, "eval_every": 1})
    with pytest.raises(NonFiniteError, match=r"^the loss of step \d") as caught:
        run_job(config, tmp_path / "run", Console(file=io.StringIO()))
    failed = int(str(caught.value).split()[4])
    left = load_file(tmp_path / "run/non_finite.safetensors")
    assert (left["batch.ids"] == 96).any()
    assert left["prompt.prompt.embedding.weight"].isfinite().all()
    saved = {int(path.name.removeprefix("step-").split(".")[0]) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert max(saved, default=0) == failed - 1
