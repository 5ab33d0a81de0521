"""A step with a non-finite loss or gradient does not change the trained parameters, also if it is detected one step later."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.encoders import save_small_encoder
from support.runs import small_config, word_rows
from torch import nn

from promcse_pl.runs.lifecycle import run_job
from promcse_pl.training import finite, module
from promcse_pl.training.finite import FiniteCheck
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


@pytest.mark.parametrize(
    ("loss", "norm", "error"),
    [
        (1.0, 1.0, None),
        (float("nan"), 1.0, r"the loss of step 3 \(batch 2\) is not finite: loss nan, hinge 0.5. Try: less"),
        (1.0, float("inf"), "the gradient of step 3 is not finite. Try: less"),
    ],
)
def test_a_late_error_is_raised_once_and_the_update_is_skipped(deferred, loss, norm, error):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0, fused=True)
    parameter.grad = torch.ones(3)
    check = FiniteCheck()
    losses = {"loss": torch.tensor(loss), "hinge": torch.tensor(0.5)}
    check.check_losses(losses, step="step 3", rows="batch 2", remedy="Try: less")
    check.check_gradient(torch.tensor(norm), optimizer)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3)) == (error is not None)
    if error:
        with pytest.raises(NonFiniteError, match=f"^{error}$"):
            check.wait()
    check.wait()


def test_an_optimiser_that_cannot_skip_an_update_is_waited_for(deferred):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    check = FiniteCheck()
    check.check_losses({"loss": torch.tensor(float("nan"))}, step="step 3", rows="batch 2", remedy="Try: less")
    with pytest.raises(NonFiniteError, match="the loss of step 3"):
        check.check_gradient(torch.tensor(1.0), optimizer)


def test_a_run_with_late_values_stops_with_the_same_error_and_saves_the_batch_of_the_failed_step(tmp_path, deferred):
    save_small_encoder(tmp_path / "encoder")
    weights = tmp_path / "encoder/model.safetensors"
    tensors = load_file(weights)
    tensors["embeddings.word_embeddings.weight"][96] = float("nan")  # the word w96
    save_file(tensors, weights, metadata={"format": "pt"})
    (tmp_path / "train.csv").write_text("a,b,c\n" + "\n".join([*word_rows(9), "w96 w96,w96,w96"]) + "\n")
    config = small_config(tmp_path, data={"batch_size": 2}, trainer={"save_every": 1, "eval_every": 1})
    with pytest.raises(NonFiniteError, match=r"^the loss of step \d") as caught:
        run_job(config, tmp_path / "run", Console(file=io.StringIO()))
    failed = int(str(caught.value).split()[4])
    left = load_file(tmp_path / "run/non_finite.safetensors")
    assert (left["batch.ids"] == 96).any()
    assert left["prompt.prompt.embedding.weight"].isfinite().all()
    saved = {int(path.name.removeprefix("step-").split(".")[0]) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert max(saved, default=0) == failed - 1
