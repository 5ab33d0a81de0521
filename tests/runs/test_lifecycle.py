"""Whole runs: what is in the folder, that it can be repeated, and what happens to bad rows, caches and broken losses."""

import fcntl
import io
import json
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.processes import promcse
from support.runs import DEV_PAIRS, run_small, small_config, word_rows, write_inputs_with_nan

from promcse_pl import PromCSE
from promcse_pl.cli.main import main
from promcse_pl.config import Config
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.data.readers import read_scored_pairs
from promcse_pl.data.sources import load_sources
from promcse_pl.evaluation.sts import score_pairs
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.run_folder import is_running, locked, read_config, read_history, read_status, write_config
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.runs.pipeline import _score_frozen
from promcse_pl.training.context import RunContext
from promcse_pl.training.distributed import Ranks
from promcse_pl.training.fit import Parts, build_data, build_encoder
from promcse_pl.utils.errors import ConfigError, DataError, EncoderError, NonFiniteError


def test_a_saved_config_does_not_run_in_a_folder_with_other_content(tmp_path):
    config = write_config(small_config(tmp_path), tmp_path / "start.yaml")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"a run needs a new or empty folder, but .* contains encoder, train.csv"):
        run_job(read_config(config), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_status_file_of_another_program_is_not_overwritten(tmp_path):
    status = tmp_path / "run/status.json"
    status.parent.mkdir()
    status.write_text("{}")
    with pytest.raises(ConfigError, match=r"a run needs a new or empty folder, but .*run contains status\.json"):
        run_small(tmp_path)
    assert status.read_text() == "{}"


def test_a_moment_in_which_a_report_reads_the_lock_does_not_stop_a_run(tmp_path):
    with (tmp_path / ".lock").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (stream, fcntl.LOCK_UN)).start()
        with locked(tmp_path):
            assert is_running(tmp_path)


# --- the shared run --------------------------------------------------------------------------------------------------


def test_a_run_folder_has_adapter_results_history_config_log_and_tracking_and_nothing_else(trained_run):
    names = {path.name for path in trained_run.folder.iterdir()}
    assert names == {
        "adapter",
        "results.json",
        "metrics.jsonl",
        "config.yaml",
        "run.log",
        "wandb",
        "status.json",
        "inputs.json",
        ".lock",
    }
    adapter = trained_run.folder / "adapter"
    assert {path.name for path in adapter.iterdir()} == {"README.md", "adapter.json", "adapter.safetensors"}
    assert json.loads((trained_run.folder / "results.json").read_text()) == trained_run.results


def test_a_terminal_of_80_columns_sees_one_bar_over_all_steps(tmp_path):
    (tmp_path / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(12)) + "\n")
    screen = io.StringIO()
    config = small_config(tmp_path, data={"dev": "holdout", "batch_size": 4}, trainer={"epochs": 2})
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    steps = run_job(config, tmp_path / "run", console)["steps"]
    frames = [text for text in re.split(r"[\r\n]|\x1b\[[\d;?]*[a-zA-Z]", screen.getvalue()) if "training:" in text]
    assert re.match(rf"training: loss \d+\.\d{{3}}, dev -?\d+\.\d\d .*{steps}/{steps}", frames[-1]), frames
    assert max(map(len, frames)) <= 80
    assert "Epoch" not in screen.getvalue()
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h"), "the cursor comes back"


def test_the_saved_config_is_the_given_one(trained_run):
    assert read_config(trained_run.folder / "config.yaml") == trained_run.config


@pytest.mark.slow
def test_the_saved_config_alone_repeats_the_run_bit_by_bit(trained_run, tmp_path):
    surroundings = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    before = f"import os; os.environ.update({surroundings!r}); os.chdir({str(tmp_path)!r})"
    saved = trained_run.folder / "config.yaml"
    done = promcse(tmp_path / "log", "train", saved, "--out", "again", before=before)
    assert done.code == 0, done.stderr
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "again/adapter" / name).read_bytes() == (trained_run.folder / "adapter" / name).read_bytes()
    assert json.loads((tmp_path / "again/results.json").read_text())["scores"] == trained_run.results["scores"]
    assert not (tmp_path / "again/wandb").exists()


def test_the_history_holds_loss_parts_gradient_norm_rate_speed_and_dev_of_every_step(trained_run):
    history = read_history(trained_run.folder / "metrics.jsonl")
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        steps.setdefault(entry.pop("step"), {}).update(entry)
    assert list(steps) == [1, 2, 3, 4, 5, 6, 7]
    loss = {"train/loss", "train/contrastive", "train/hinge", "train/gradient_norm", "train/lr"}
    speed = {"speed/rows_per_second", "speed/tokens_per_second", "speed/padding_share"}
    for step, entry in steps.items():
        evaluated = {"dev/spearman", "dev/best_spearman"} if step in (2, 4, 6, 7) else set()
        assert set(entry) == loss | speed | evaluated
        assert entry["train/loss"] == pytest.approx(entry["train/contrastive"] + entry["train/hinge"], rel=1e-5)
        assert entry["train/gradient_norm"] > 0
        assert entry["speed/tokens_per_second"] > entry["speed/rows_per_second"] > 0
        assert 0 <= entry["speed/padding_share"] < 1


def test_the_learning_rate_falls_in_a_line_to_zero(trained_run):
    rates = [entry["train/lr"] for entry in read_history(trained_run.folder / "metrics.jsonl") if "train/lr" in entry]
    assert rates == pytest.approx([0.1 * (1 - step / 7) for step in range(7)])
    assert rates[0] == 0.1


def test_the_adapter_on_disk_has_the_best_dev_score_of_the_history(trained_run):
    history = read_history(trained_run.folder / "metrics.jsonl")
    scores = {entry["step"]: entry["dev/spearman"] for entry in history if "dev/spearman" in entry}
    best = max(scores, key=scores.__getitem__)  # the first of equals
    pairs = read_scored_pairs(Path(trained_run.config.data.dev))
    model = PromCSE.load(trained_run.folder, device="cpu")
    assert 100 * score_pairs(model.encode, ScoredPairs.of("dev", pairs)).spearman == pytest.approx(
        scores[best], abs=1e-9
    )
    assert trained_run.results["dev_spearman"] == pytest.approx(scores[best], abs=1e-4)
    assert trained_run.results["best_step"] == best


def test_the_results_name_what_was_trained_on_which_data_and_with_what(trained_run):
    results = trained_run.results
    assert (results["rows"], results["steps"], results["seed"], results["dev"]) == (30, 7, 42, "dev.tsv")
    assert results["trained_parameters"] == 10 * 6 * 2 * 384
    (dev,) = results["evaluation"]["tasks"]["dev"]["files"]
    assert (dev["name"], dev["rows"], len(dev["sha256"])) == ("dev.tsv", DEV_PAIRS, 64)
    assert set(results["scores"]) == {"frozen encoder", "adapter"}
    assert results["rows_per_second"] > 0
    assert results["machine"]["precision"] == "float32"


def test_the_output_shows_data_progress_scores_and_the_path_of_the_adapter(trained_run):
    for text in (
        "demo: 30 rows,",
        "(tokenised now)",
        "dev set: dev.tsv, 40 pairs",
        "trained: 46,080 of ",
        "step 7 of 7: loss ",
        "frozen encoder",
        f"wandb login && wandb sync {trained_run.folder}/wandb/offline-run-",
        f"adapter: {trained_run.folder}/adapter",
    ):
        assert text in trained_run.output
    assert "Traceback" not in trained_run.output
    log = (trained_run.folder / "run.log").read_text()
    assert "step 7 of 7: loss " in log


# --- runs of a small encoder -----------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_written_into(trained_run):
    before = {path: path.stat().st_mtime_ns for path in trained_run.folder.rglob("*")}
    with pytest.raises(ConfigError, match="already contains a run"):
        run_job(trained_run.config, trained_run.folder, Console(file=io.StringIO()))
    assert {path: path.stat().st_mtime_ns for path in trained_run.folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("sections", "kind", "message"),
    [
        ({"data": {"train": "missing.csv"}}, DataError, r"data\.train=missing\.csv does not exist"),
        ({"data": {"dev": "missing.csv"}}, DataError, r"data\.dev=missing\.csv does not exist"),
        ({"model": {"path": "./missing"}}, EncoderError, r"the encoder folder \./missing does not exist"),
        ({"data": {"dev": "stsb", "dir": "."}}, ConfigError, r"data\.dir=\. has no senteval/ folder"),
        (
            {"evaluation": {"tasks": ["sts"]}, "data": {"dir": "."}},
            ConfigError,
            r"data\.dir=\. has no senteval/ folder",
        ),
    ],
)
def test_missing_inputs_are_reported_before_a_folder_is_created(sections, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as caught:
        run_small(tmp_path, **sections)
    assert "Try: " in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_setting_that_the_encoder_refuses_can_be_corrected_in_the_same_folder(existed, tmp_path):
    if existed:
        (tmp_path / "run").mkdir()
    printed = io.StringIO()
    with pytest.raises(ConfigError, match=r"model\.default_prompt must be the name of a prompt"):
        run_job(small_config(tmp_path, model={"default_prompt": "qury"}), tmp_path / "run", Console(file=printed))
    assert "nothing was trained" not in printed.getvalue()
    assert (tmp_path / "run").exists() == existed
    assert not existed or list((tmp_path / "run").iterdir()) == []
    assert run_small(tmp_path)[0]["steps"] == 3


def test_a_setting_that_the_encoder_refuses_removes_no_file_that_was_there_before(tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "run.log").write_text("earlier\n")
    with pytest.raises(ConfigError, match=r"model\.default_prompt"):
        run_job(small_config(tmp_path, model={"default_prompt": "qury"}), folder)
    assert {path.name for path in folder.iterdir()} == {".hydra", "run.log"}
    assert (folder / "run.log").read_text().startswith("earlier\n")


def test_a_job_of_a_sweep_keeps_the_status_of_a_setting_that_the_encoder_refuses(tmp_path):
    config = small_config(tmp_path, model={"default_prompt": "qury"})
    start = write_config(config, tmp_path / "run/start.yaml")
    printed = io.StringIO()
    with pytest.raises(ConfigError, match=r"model\.default_prompt"):
        run_job(read_config(start), tmp_path / "run", Console(file=printed))
    assert read_status(tmp_path / "run").state == "failed"
    assert "nothing was trained" not in printed.getvalue()


def test_bad_rows_stop_a_run_unless_they_are_skipped_and_then_they_are_listed(tmp_path):
    rows = word_rows(6)
    rows[2] = "w5,w6,"
    (tmp_path / "train.csv").write_text("sent0,sent1,hard_neg\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"train\.csv:4: .*data\.on_bad_row=skip"):
        run_small(tmp_path, "stopped")
    results, printed = run_small(tmp_path, "skipped", data={"on_bad_row": "skip"})
    assert (results["rows"], results["tokens"]["skipped_rows"]) == (5, 1)
    (line,) = (tmp_path / "skipped/bad_rows.txt").read_text().splitlines()
    assert line.startswith(f"{tmp_path}/train.csv:4: ")
    assert f"warning: 1 bad rows were skipped; they are listed in {tmp_path}/skipped/bad_rows.txt" in printed


def test_a_second_start_takes_the_tokens_from_the_cache_and_trains_the_same(tmp_path):
    first, printed_first = run_small(tmp_path, "first")
    second, printed_second = run_small(tmp_path, "second")
    assert "(tokenised now)" in printed_first
    assert "(from the cache)" in printed_second
    assert first["tokens"]["cache"] == second["tokens"]["cache"]
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_another_seed_gives_another_adapter(tmp_path):
    run_small(tmp_path, "one")
    run_job(
        Config.from_dict({**small_config(tmp_path).to_dict(), "seed": 1}), tmp_path / "two", Console(file=io.StringIO())
    )
    one, two = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("one", "two"))
    assert not torch.equal(one["prompt.embedding.weight"], two["prompt.embedding.weight"])


def test_without_a_dev_set_the_last_step_is_kept_and_nothing_is_scored(tmp_path):
    results, printed = run_small(tmp_path)
    assert (results["dev"], results["dev_spearman"], results["best_step"], results["scores"]) == (None, None, 3, {})
    assert "no dev set: the last step is kept" in printed


def test_the_speed_of_a_run_shorter_than_a_log_entry_is_still_measured(tmp_path):
    results, _ = run_small(tmp_path, trainer={"log_every": 100})
    assert results["rows_per_second"] > 0
    assert [entry["step"] for entry in read_history(tmp_path / "run/metrics.jsonl")] == [3]


def test_progress_lines_follow_log_every_and_end_with_the_last_step(tmp_path):
    _, printed = run_small(tmp_path, trainer={"epochs": 3, "log_every": 4})
    assert re.findall(r"step (\d+) of 9: loss", printed) == ["4", "8", "9"]


@pytest.mark.parametrize(("kind", "hinge_weight"), [("sentences", 0), ("pairs", 0)])
def test_sentences_and_pairs_train_without_hinge(kind, hinge_weight, tmp_path):
    width = {"sentences": 1, "pairs": 2}[kind]
    (tmp_path / "train.csv").write_text("a,b\n"[: 2 * width - 1] + "\n" + "\n".join(word_rows(10, width)) + "\n")
    results, _ = run_small(tmp_path, data={"kind": kind}, loss={"hinge_weight": hinge_weight})
    assert results["rows"] == 10
    history = read_history(tmp_path / "run/metrics.jsonl")
    assert {"train/loss", "train/contrastive"} <= {name for entry in history for name in entry}
    assert "train/hinge" not in {name for entry in history for name in entry}


def test_held_out_triplets_become_the_dev_set_and_are_not_trained_on(tmp_path):
    rows = word_rows(30)
    rows += [rows[0].replace("w10", "w11"), rows[1].replace("w10", "w11")]
    rows.append(rows[0].split(",")[0] + ",w90,w91")  # the anchor of row 0 once more
    (tmp_path / "train.csv").write_text("sent0,sent1,hard_neg\n" + "\n".join(rows) + "\n")
    config = small_config(tmp_path, data={"dev": "holdout"})
    parts = {}
    for seed in (1, 1, 2):
        source, dev = load_sources(config.data, seed)
        trained = list(source.rows([]))
        assert not {row[0] for row in trained} & set(dev.first)
        assert len(trained) + len(dev) // 2 == len(rows)
        assert dev.gold == (1.0, 0.0) * (len(dev) // 2)
        triplets = {tuple(row.split(",")) for row in rows}
        assert {
            (a, p, n) for a, p, n in zip(dev.first[::2], dev.second[::2], dev.second[1::2], strict=True)
        } <= triplets
        assert parts.setdefault(seed, dev) == dev
    assert parts[1] != parts[2]
    results, _ = run_small(tmp_path, data={"dev": "holdout"})
    assert results["rows"] < len(rows)
    assert results["dev_spearman"] is not None


def test_a_loss_that_is_not_finite_ends_the_run_with_code_2_and_names_step_rows_and_remedy(tmp_path, capsys):
    write_inputs_with_nan(tmp_path)
    path = write_config(small_config(tmp_path, data={"batch_size": 10}), tmp_path / "config.yaml")
    capsys.readouterr()
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the loss of step 1 ")
    assert "is not finite" in error
    assert "training rows [" in error
    assert "It occurred before the first update" in error
    assert "Try: " in error
    assert "Traceback" not in error
    assert not (tmp_path / "run/adapter").exists()
    assert "NonFiniteError" in (tmp_path / "run/run.log").read_text()
    with pytest.raises(NonFiniteError):
        run_job(read_config(path), tmp_path / "again", Console(file=io.StringIO()))


# --- log lines at the start of a run ---------------------------------------------------------------------------------------


def test_the_first_row_is_logged_as_it_is_read(tmp_path):
    rows = ["w7,w5 \x1b[31mred,w6", *(f"w{row},w{row + 1},w{row + 2}" for row in range(10, 20))]
    (tmp_path / "train.csv").write_text("negative,anchor,positive\n" + "\n".join(rows) + "\n")
    run_small(tmp_path)
    log = (tmp_path / "run/run.log").read_text()
    assert f"{tmp_path}/train.csv: anchor=anchor, positive=positive, negative=negative\n" in log
    assert r"first row: anchor 'w5 \x1b[31mred', positive 'w6', negative 'w7'" in log


def test_a_long_text_of_the_first_row_is_cut(tmp_path):
    (tmp_path / "train.csv").write_text("anchor,positive\n" + f"{'x' * 500},w6\n" + "w7,w8\n" * 9)
    run_small(tmp_path, data={"kind": "pairs"}, loss={"hinge_weight": 0})
    assert f"first row: anchor '{'x' * 79}…', positive 'w6'\n" in (tmp_path / "run/run.log").read_text()


def test_truncation_above_five_percent_is_a_warning_with_a_length_that_works(tmp_path):
    run_small(tmp_path, "cut", data={"max_length": 3})
    log = (tmp_path / "cut/run.log").read_text()
    assert (
        "WARNING 100.0 % of the sentences (30) are truncated to 3 tokens. To truncate fewer: data.max_length=6" in log
    )
    run_small(tmp_path, "advised", data={"max_length": 6})
    assert "truncated" not in (tmp_path / "advised/run.log").read_text()


def test_truncation_at_the_longest_input_advises_no_other_length(tmp_path):
    small_config(tmp_path)
    (tmp_path / "train.csv").write_text("sent0,sent1,hard_neg\n" + "w5,w6,w7\n" * 9 + f"{'w8 ' * 600},w6,w7\n")
    longest = PromptEncoder(FrozenBackbone.load(str(tmp_path / "encoder")), length=4).longest_input
    run_small(tmp_path, data={"max_length": longest})
    log = (tmp_path / "run/run.log").read_text()
    assert f"INFO 3.3 % of the sentences (1) are truncated to {longest} tokens" in log
    (tmp_path / "train.csv").write_text("sent0,sent1,hard_neg\n" + f"{'w8 ' * 600},w6,w7\n" * 9)
    run_small(tmp_path, "all", data={"max_length": longest})
    log = (tmp_path / "all/run.log").read_text()
    assert (
        f"WARNING 33.3 % of the sentences (9) are truncated to {longest} tokens, the maximum of data.max_length for this"
        in log
    )


def scored_by_the_encoder(folder: Path, sign: int) -> Path:
    """A dev file whose scores are the cosines of the frozen encoder, or their negatives."""
    small_config(folder)
    plain = PromptEncoder(FrozenBackbone.load(str(folder / "encoder")), length=0, pooling="cls")
    pairs = [(f"w{5 + row} w{9 + row}", f"w{6 + 2 * row}") for row in range(30)]
    lines = [f"{a},{b},{sign * float(PromCSE(plain).similarity(a, b))}\n" for a, b in pairs]
    path = folder / f"dev{sign}.csv"
    path.write_text("a,b,score\n" + "".join(lines))
    return path


def test_a_frozen_encoder_score_below_zero_is_a_warning(tmp_path):
    run_small(tmp_path, "right", data={"dev": str(scored_by_the_encoder(tmp_path, 1))})
    run_small(tmp_path, "reversed", data={"dev": str(scored_by_the_encoder(tmp_path, -1))})
    right, reverse = ((tmp_path / name / "run.log").read_text() for name in ("right", "reversed"))
    assert "WARNING frozen encoder: dev Spearman 100.00, the highest possible on this dev set: it cannot rank" in right
    assert "WARNING frozen encoder: dev Spearman -100.00, but a pre-trained" in reverse
    assert (
        f"Check the columns of data.dev={tmp_path}/dev-1.csv and data.train, and that higher scores mean more similar"
        in reverse
    )
    assert right.index("frozen encoder") < right.index("step 1: dev Spearman")


def test_a_usual_frozen_encoder_score_is_logged_before_training(tmp_path):
    path = scored_by_the_encoder(tmp_path, 1)
    header, *rows = path.read_text().splitlines()
    texts, scores = zip(*(row.rsplit(",", 1) for row in rows), strict=True)
    mixed = [scores[1], scores[0], *scores[2:]]
    path.write_text("\n".join([header, *(f"{text},{score}" for text, score in zip(texts, mixed, strict=True))]) + "\n")
    run_small(tmp_path, data={"dev": str(path)})
    log = (tmp_path / "run/run.log").read_text()
    assert re.search(r"INFO frozen encoder \(pooling \w+\): dev Spearman 9\d\.\d\d$", log, re.MULTILINE)


def test_scoring_the_frozen_encoder_changes_no_generator_and_no_mode_and_encodes_once(tmp_path, monkeypatch):
    config = small_config(tmp_path, data={"dev": str(scored_by_the_encoder(tmp_path, 1))})
    encoder = build_encoder(config)
    data = build_data(config, encoder, lambda _: None)
    run = RunContext(config=config, typed=config, folder=tmp_path, ranks=Ranks(), console=Console(file=io.StringIO()))
    modes = [module.training for module in encoder.modules()]
    states = (torch.random.get_rng_state(), random.getstate(), repr(np.random.get_state()))  # noqa: NPY002
    encoded: list[int] = []
    encode = PromCSE.encode

    def counted(self, sentences, **options):
        encoded.append(len(sentences))
        return encode(self, sentences, **options)

    monkeypatch.setattr(PromCSE, "encode", counted)
    for _ in range(2):
        _score_frozen(run, Parts(torch.device("cpu"), encoder, None, data))
    assert encoded == [60]  # the second time they lie in the cache
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1:] == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002
