"""experiments/speed/gpu_check.py: its checks and its page, without a GPU."""

import json
import warnings

import gpu_check
import pytest
import torch
from draw import draw


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The folder of a check of tiny encoders on a CPU."""
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "matrix_rate", lambda _dtype, _device: 1e11)  # measuring it takes seconds
        assert gpu_check.main(["--device", "cpu", "--folder", str(folder)]) == 0
    return folder


def test_every_encoder_is_measured_with_every_chunk_size_and_compared_with_the_cpu(checked):
    results = json.loads((checked / "gpu-check.json").read_text())
    assert [encoder["shape"] for encoder in results["encoders"]] == list(gpu_check.ENCODERS)
    for encoder in results["encoders"]:
        assert [(case["chunk_tokens"], case["recompute"]) for case in encoder["cases"]] == gpu_check.CASES
        assert all(case["seconds"] > 0 and case["peak"] > 0 for case in encoder["cases"])
        assert 0 <= encoder["differences"]["loss"] < 1e-5
        assert 0 < encoder["differences"]["gradient"] < 1e-5
    assert results["failures"] == []


def test_the_page_of_a_check_on_a_cpu_says_that_it_is_not_for_publication(checked):
    page = (checked / "README.md").read_text()
    assert gpu_check.TINY_NOTE in page
    assert "Not measured: no GPU" not in page
    assert page.count("| recomputed |") == len(gpu_check.ENCODERS)
    assert page.count("| Qwen3 0.6B (") == len(gpu_check.CASES)
    assert "All checks passed." in page


def test_the_page_says_what_failed_and_what_did_not_fit(checked, tmp_path):
    results = json.loads((checked / "gpu-check.json").read_text())
    for name in ("seconds", "tokens", "before", "peak", "sentences"):
        del results["encoders"][2]["cases"][0][name]
    results["encoders"][2]["cases"][0]["problem"] = "out of memory"
    results["encoders"][0]["synchronisations"] = 2
    results["encoders"][1]["differences"]["gradient"] = float("nan")
    results["tests"] = {"exit_code": 1, "summary": "1 failed, 81 passed in 30.00s"}
    results["failures"] = gpu_check.failures(results)
    assert results["failures"] == [
        "pytest -m gpu: 1 failed, 81 passed in 30.00s",
        "MiniLM: 2 synchronisations in a step",
        "bert-base: the gradient differs from the CPU's by nan, more than 1e-04",
    ]
    (tmp_path / "gpu-check.json").write_text(json.dumps(results))
    page = draw(tmp_path)
    assert "| 2,048 | kept | out of memory | | |" in page
    assert "Failed checks: pytest -m gpu: 1 failed" in page


def test_after_the_time_limit_no_case_is_measured_and_the_check_fails(checked, tmp_path):
    results = json.loads((checked / "gpu-check.json").read_text())
    (encoder,) = results["encoders"] = results["encoders"][:1]
    encoder |= gpu_check.measure_cases("MiniLM", gpu_check.TINY, end=0.0)
    assert [case["problem"] for case in encoder["cases"]] == [gpu_check.OUT_OF_TIME] * len(gpu_check.CASES)
    assert gpu_check.failures(results) == ["MiniLM: 6 of 6 cases not measured: time limit of 420 s"]
    (tmp_path / "gpu-check.json").write_text(json.dumps(results))
    assert "| 2,048 | kept | not measured: time limit of 420 s | | |" in draw(tmp_path)


def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: no CUDA device found by torch {torch.__version__}; nothing was measured\n"
    )
    assert not list(tmp_path.iterdir())
    assert "Not measured: no GPU was available." in draw(tmp_path)


def test_synchronisations_are_the_warnings_of_torch_and_the_mode_is_reset(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu_check.count_synchronisations(step) == 3
    assert modes == ["warn", "default"]
