"""The studies: claims of the paper, the runs that test them, and the comparisons."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
RESULTS = "results.json"
Results = dict[str, Any]
Expected = Literal["higher", "lower", "equal"]
STS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R", "Avg")
TRANSFER = ("MR", "CR", "SUBJ", "MPQA", "SST-2", "TREC", "MRPC", "Avg transfer")
SHIFTED, OTHER = "forum and SICK", "other subsets"
"""Proxy of the domain shift: mean Spearman over SHIFTED_PARTS, and over all other subsets with STS-B."""
SHIFTED_PARTS = ("STS14 deft-forum", "SICK-R")
COMMON_LIMITS = (
    "The small sentence encoders were trained contrastively on a billion pairs, NLI among them, whereas the paper starts from "
    "masked language models. Absolute scores are therefore not comparable; a difference shows only whether it has the "
    "paper's sign for such an encoder and a small sample. Steps and settings are selected on STS-B dev, as in the paper; 76 % "
    "of STS-B dev are test pairs of the other tasks, so the selection is not independent of the tests."
)
DEV = "dev"
FROZEN, TRAINED = "frozen encoder", "trained"
"""Names of rows of the diagnostics; the first also is a row of every study."""
SEEDS = (42, 43, 44, 45, 46)
DEFAULT_SEEDS = 3
"""Seeds of a study unless --seeds is given: all studies together had 12 hours of two cores."""
MODELS = {
    "minilm": (6, 384, 30_522),
    "mpnet": (12, 768, 30_527),
    "bert-base": (12, 768, 30_522),
    "bert-large": (24, 1024, 30_522),
    "roberta-base": (12, 768, 50_265),
    "roberta-large": (24, 1024, 50_265),
}
"""Layers, width and vocabulary of the models; the feed-forward layers are four times as wide."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        name: Name on the page.
        preset: Choice of `experiment`.
        overrides: Further overrides.
        paper: The paper's scores by encoder and task.
        is_removed: Whether the code no longer has the setting, so that only earlier results can be shown.
    """

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    paper: dict[str, dict[str, float]] | None = None
    is_removed: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the paper about the score of `second` relative to that of `first`.

    Attributes:
        first, second: Names of two rows.
        expected: How `second` compares with `first` according to the paper.
        task: Task whose scores are compared.
        proxy: Task that is compared instead where `task` is not scored.
    """

    first: str
    second: str
    expected: Expected = "higher"
    task: str = "Avg"
    proxy: str | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """A table or figure of the paper, or a comparison of our own.

    Attributes:
        title: Title of its page.
        about: What the paper reports, in a sentence.
        rows: Its rows; each is trained with every seed.
        claims: Comparisons of rows.
        tasks: Columns; none for the dev score alone.
        headline: Task of the first table and of the curves; `dev` for the dev score.
        suites: Suites that are scored: `sts` (with SICK-R), `transfer`, `geometry`, `cxc`.
        limits: What cannot be compared, and why.
        seeds: Number of seeds.
        curves: For a figure: the label of each curve, and its points: value on the horizontal axis and name of the row.
        axis: Label of the horizontal axis.
        baseline: In a comparison of our own: the row that all others are compared with, on the headline task.
    """

    title: str
    about: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    tasks: tuple[str, ...] = STS
    headline: str = "Avg"
    suites: tuple[str, ...] = ("sts",)
    limits: str = ""
    seeds: int = DEFAULT_SEEDS
    curves: tuple[tuple[str, tuple[tuple[float, str], ...]], ...] = ()
    axis: str = ""
    baseline: str | None = None


def _scores(tasks: tuple[str, ...], *lines: tuple[str, str]) -> dict[str, dict[str, float]]:
    return {encoder: dict(zip(tasks, map(float, values.split()), strict=True)) for encoder, values in lines}


SIMCSE, SIMCSE_EH, PROMCSE, PROMCSE_EH = "SimCSE", "SimCSE + EH", "PromCSE", "PromCSE + EH"
UNSUP_SIMCSE, UNSUP_PROMCSE = "unsupervised SimCSE", "unsupervised PromCSE"
PRESETS = {
    SIMCSE: "table1/full",
    SIMCSE_EH: "table1/full_eh",
    PROMCSE: "table1/prompt",
    PROMCSE_EH: "table1/prompt_eh",
    UNSUP_SIMCSE: "table1/unsup_full",
    UNSUP_PROMCSE: "table1/unsup_prompt",
}
"""Rows of table 1 -> choice of `experiment`; other tables share these rows."""


def _methods(**paper: dict[str, dict[str, float]]) -> tuple[Row, ...]:
    return tuple(Row(name, preset, paper=paper.get(preset.removeprefix("table1/"))) for name, preset in PRESETS.items())


_TABLE1 = _methods(
    full=_scores(STS, ("bert-base", "75.13 84.35 80.26 85.45 80.83 84.29 80.39 81.53")),
    full_eh=_scores(
        STS,
        ("bert-base", "75.22 84.93 81.37 85.94 80.94 84.78 80.38 81.94"),
        ("roberta-base", "76.83 85.67 81.57 86.35 82.72 86.84 80.56 82.86"),
        ("roberta-large", "78.01 87.65 82.55 87.21 84.19 86.95 82.03 84.08"),
    ),
    prompt=_scores(
        STS,
        ("bert-base", "75.58 84.33 79.67 85.79 81.24 84.25 80.79 81.81"),
        ("roberta-base", "76.75 85.86 80.98 86.51 83.51 86.58 80.41 82.94"),
        ("roberta-large", "79.14 88.64 83.73 87.33 84.57 87.84 82.07 84.76"),
    ),
    prompt_eh=_scores(
        STS,
        ("bert-base", "75.96 84.99 80.44 86.83 81.30 84.40 80.96 82.13"),
        ("roberta-base", "77.51 86.15 81.59 86.92 83.81 86.35 80.49 83.26"),
        ("roberta-large", "79.56 88.97 83.81 88.08 84.96 87.87 82.43 85.10"),
    ),
    unsup_full=_scores(STS, ("bert-base", "68.40 82.41 74.38 80.91 78.56 76.85 72.23 76.25")),
    unsup_prompt=_scores(STS, ("bert-base", "73.03 85.18 76.70 84.19 79.69 80.62 70.00 78.49")),
)


def _average(score: float) -> dict[str, dict[str, float]]:
    return {"bert-base": {"Avg": score}}


_MARGINS = {"0": 81.56, "0.1": 81.75, "0.2": 81.94, "0.3": 81.71, "0.4": 81.36}
_DEFAULT_MARGIN = "0.2"


def _margin_rows(method: str, preset: str, paper: bool) -> tuple[Row, ...]:
    """Return the rows of table 4 for a method; the row of the default margin shares the runs of table 1."""
    return (
        Row(f"{method}, without EH", preset.removesuffix("_eh"), paper=_average(81.53) if paper else None),
        *(
            Row(
                f"{method}, m = {margin}",
                preset,
                () if margin == _DEFAULT_MARGIN else (f"loss.margin={margin}",),
                _average(score) if paper else None,
            )
            for margin, score in _MARGINS.items()
        ),
    )


_LENGTHS = (1, 4, 8, 12, 16)

STUDIES: dict[str, Study] = {
    "learning_rate": Study(
        title="Learning rates",
        about="The best learning rate on STS-B dev, seed 42, is used for all rows with the same method and data once all "
        "rates of the method were run. A method without runs uses the rate of the model's recipe.",
        rows=tuple(
            Row(f"{name}, lr = {lr}", PRESETS[name], (f"optim.lr={lr}",))
            for name in (PROMCSE_EH, UNSUP_PROMCSE, SIMCSE_EH, UNSUP_SIMCSE)
            for lr in (("3e-3", "1e-2", "3e-2") if "Prom" in name else ("1e-5", "2e-5", "5e-5", "1e-4", "2e-4"))
        ),
        tasks=(),
        headline=DEV,
        suites=(),
        seeds=1,
        limits="One seed; no test set is evaluated. The highest rate of the prompt is the highest that the paper uses.",
    ),
    "table1": Study(
        title="Table 1: semantic textual similarity",
        about="A prompt is better than full fine-tuning (SimCSE), and the energy hinge (EH) improves both.",
        rows=_TABLE1,
        claims=(
            Claim(PROMCSE, PROMCSE_EH),
            Claim(SIMCSE, SIMCSE_EH),
            Claim(SIMCSE, PROMCSE),
            Claim(SIMCSE_EH, PROMCSE_EH),
            Claim(UNSUP_SIMCSE, UNSUP_PROMCSE),
        ),
        limits="Rows without EH use the learning rate that was selected with EH, which can favour EH. Two averages of the paper "
        "are not the means of its cells: PromCSE with bert-base (81.81, mean 81.66) and SimCSE + EH with roberta-base (82.86, "
        "mean 82.93).",
    ),
    "table3": Study(
        title="Table 3: prompt kinds",
        about="One prompt per layer is better than one prompt for all layers, which is better than one in the input layer only. "
        "Full fine-tuning (SimCSE) is between the last two.",
        rows=(
            Row("one prompt per layer", PRESETS[UNSUP_PROMCSE], paper=_average(78.49)),
            Row("one prompt for all layers", "table3/shared", paper=_average(77.64)),
            Row("input layer only", "table3/input", paper=_average(68.35)),
            Row(UNSUP_SIMCSE, PRESETS[UNSUP_SIMCSE], paper=_average(76.25)),
        ),
        claims=(
            Claim("one prompt for all layers", "one prompt per layer"),
            Claim("input layer only", "one prompt for all layers"),
            Claim(UNSUP_SIMCSE, "one prompt for all layers"),
            Claim(UNSUP_SIMCSE, "input layer only", "lower"),
        ),
        limits="All kinds use the learning rate that was selected for the prompt per layer, which can favour it.",
    ),
    "table4": Study(
        title="Table 4: margins",
        about="The score rises with the margin m up to 0.2 and then falls; at m = 0.4 it is below the score without the hinge "
        "(full fine-tuning). The paper has no such table for the prompt. The score at m = 0.2 is compared with that without the "
        "hinge in table 1.",
        rows=(*_margin_rows(SIMCSE, "table1/full_eh", True), *_margin_rows(PROMCSE, "table1/prompt_eh", False)),
        claims=(
            Claim(f"{SIMCSE}, m = 0", f"{SIMCSE}, m = 0.2"),
            Claim(f"{SIMCSE}, m = 0.2", f"{SIMCSE}, m = 0.4", "lower"),
            Claim(f"{SIMCSE}, without EH", f"{SIMCSE}, m = 0.4", "lower"),
            Claim(f"{PROMCSE}, m = 0", f"{PROMCSE}, m = 0.2"),
            Claim(f"{PROMCSE}, m = 0.2", f"{PROMCSE}, m = 0.4", "lower"),
        ),
        curves=tuple(
            (method, tuple((float(margin), f"{method}, m = {margin}") for margin in _MARGINS))
            for method in (SIMCSE, PROMCSE)
        ),
        axis="margin m",
    ),
    "figure2": Study(
        title="Figure 2: prompt length",
        about="One slot is already better than full fine-tuning; the score rises with the length and is flat from about 12.",
        rows=(
            Row(UNSUP_SIMCSE, PRESETS[UNSUP_SIMCSE], paper=_average(76.25)),
            *(
                Row(
                    f"P = {length}",
                    PRESETS[UNSUP_PROMCSE],
                    (f"prompt.length={length}",),
                    _average({1: 76.50, 16: 78.49}[length]) if length in (1, 16) else None,
                )
                for length in _LENGTHS
            ),
        ),
        claims=(
            Claim(UNSUP_SIMCSE, "P = 1"),
            Claim("P = 1", "P = 12"),
            Claim("P = 12", "P = 16", "equal"),
        ),
        limits="The paper's score of P = 1 is read from its figure.",
        curves=(("PromCSE", tuple((length, f"P = {length}") for length in _LENGTHS)),),
        axis="prompt length P",
    ),
    "table5": Study(
        title="Table 5: alignment and uniformity",
        about="The hinge makes supervised embeddings more uniform (lower) and positive pairs less aligned (higher); without "
        "it, the supervised prompt has higher alignment and lower uniformity than full fine-tuning (SimCSE), the unsupervised "
        "prompt lower alignment and higher uniformity.",
        rows=_methods(
            unsup_full={"bert-base": {"alignment": 0.238, "uniformity": -2.337}},
            unsup_prompt={"bert-base": {"alignment": 0.117, "uniformity": -1.354}},
            full={"bert-base": {"alignment": 0.241, "uniformity": -3.246}},
            full_eh={"bert-base": {"alignment": 0.260, "uniformity": -3.349}},
            prompt={"bert-base": {"alignment": 0.325, "uniformity": -3.268}},
            prompt_eh={"bert-base": {"alignment": 0.366, "uniformity": -3.397}},
        ),
        claims=tuple(
            claim
            for first, second, (alignment, uniformity) in (
                (PROMCSE, PROMCSE_EH, ("higher", "lower")),
                (SIMCSE, SIMCSE_EH, ("higher", "lower")),
                (SIMCSE, PROMCSE, ("higher", "lower")),
                (UNSUP_SIMCSE, UNSUP_PROMCSE, ("lower", "higher")),
            )
            for claim in (
                Claim(first, second, alignment, "alignment"),  # type: ignore[arg-type]
                Claim(first, second, uniformity, "uniformity"),  # type: ignore[arg-type]
            )
        ),
        tasks=("alignment", "uniformity"),
        headline="uniformity",
        suites=("geometry",),
        limits="Measured on STS-B test; positive pairs have a gold score of 4 or more. Both measures depend on the pre-training "
        "of the encoder.",
    ),
    "table7": Study(
        title="Table 7: transfer",
        about="Full fine-tuning transfers slightly better than a prompt; the hinge helps the prompt, but not full fine-tuning.",
        rows=_methods(
            unsup_full={"bert-base": {"Avg transfer": 85.81}},
            unsup_prompt={"bert-base": {"Avg transfer": 85.46}},
            full={"bert-base": {"Avg transfer": 86.51}},
            full_eh={"bert-base": {"Avg transfer": 86.46}},
            prompt={"bert-base": {"Avg transfer": 85.50}},
            prompt_eh={"bert-base": {"Avg transfer": 85.91}},
        ),
        claims=(
            Claim(PROMCSE, PROMCSE_EH, "higher", "Avg transfer"),
            Claim(SIMCSE, SIMCSE_EH, "equal", "Avg transfer"),
            Claim(SIMCSE, PROMCSE, "lower", "Avg transfer"),
            Claim(UNSUP_SIMCSE, UNSUP_PROMCSE, "lower", "Avg transfer"),
        ),
        tasks=TRANSFER,
        headline="Avg transfer",
        suites=("transfer",),
        limits="The paper's classifier is trained by Adam on unnormalised embeddings; ours is a logistic regression on unit "
        "embeddings.",
    ),
    "domain": Study(
        title="Domain shift",
        about="On image captions (CxC-STS), a prompt is better than full fine-tuning, and the hinge improves both.",
        rows=_methods(
            unsup_full={"bert-base": {"CxC-STS": 67.5}},
            unsup_prompt={"bert-base": {"CxC-STS": 71.2}},
            full={"bert-base": {"CxC-STS": 73.0}},
            full_eh={"bert-base": {"CxC-STS": 73.2}},
            prompt={"bert-base": {"CxC-STS": 73.6}},
            prompt_eh={"bert-base": {"CxC-STS": 74.0}},
        ),
        claims=tuple(
            Claim(first, second, "higher", "CxC-STS", SHIFTED)
            for first, second in (
                (PROMCSE, PROMCSE_EH),
                (SIMCSE, SIMCSE_EH),
                (SIMCSE, PROMCSE),
                (UNSUP_SIMCSE, UNSUP_PROMCSE),
            )
        ),
        tasks=(SHIFTED, OTHER, "CxC-STS"),
        headline=SHIFTED,
        limits="A proxy: the mean of the subset deft-forum (STS14) and SICK-R (image captions). answers-forums (STS15) is left "
        "out, because all of its pairs are in STS-B dev. If DATA/cxc exists, CxC-STS is evaluated and compared instead.",
    ),
}

STUDIES["options"] = Study(
    title="Options beyond the paper",
    about="Losses, initialisation, averaging, heads, poolings and trained weights beyond the paper, each added to "
    f"{PROMCSE_EH} with the same learning rate; LoRA and biases alone replace the prompt, with two rates each. Rows that gained "
    "less than 0.1 with the first seed were not run with further seeds, so the differences of rows with more seeds are "
    "biased upwards, and their intervals do not cover this selection. The row of a mean over steps has the score of the mean "
    "itself, not of the better of the mean and the best step.",
    rows=(
        Row(PROMCSE_EH, PRESETS[PROMCSE_EH]),
        *(
            Row(name, PRESETS[PROMCSE_EH], overrides)
            for name, overrides in {
                "prompt and low-rank head": ("model.head=low_rank", "model.head_rank=8"),
                "prompt, mean of the last two layers": ("model.pooling=avg_top2",),
                "prompt and LoRA": ("tuning.weights=lora", "tuning.rank=1", "tuning.alpha=0.02"),
                "LoRA, lr = 1e-3": ("tuning=lora", "tuning.rank=2", "tuning.alpha=4", "optim.lr=1e-3"),
                "LoRA, lr = 3e-3": ("tuning=lora", "tuning.rank=2", "tuning.alpha=4", "optim.lr=3e-3"),
                "biases, lr = 1e-3": ("tuning=bitfit", "optim.lr=1e-3"),
                "biases, lr = 3e-3": ("tuning=bitfit", "optim.lr=3e-3"),
            }.items()
        ),
        *(
            Row(name, PRESETS[PROMCSE_EH], overrides, is_removed=True)
            for name, overrides in {
                "false negatives masked": ("loss.mask_false_negatives=true",),
                "distillation from the frozen encoder": ("loss.distillation_weight=0.3",),
                "symmetric NT-Xent": ("loss.symmetric=true",),
                "weighted negatives": ("loss.hardness=0.5",),
                "prompt from data": ("prompt.init=data",),
                "mean of the last half": ("trainer.average=0.5",),
                "two epochs, mean of the second": ("trainer.epochs=2", "trainer.average=0.5"),
            }.items()
        ),
    ),
    tasks=(),
    headline=DEV,
    suites=(),
    baseline=PROMCSE_EH,
    limits="No test set is evaluated. Settings marked as removed are in commit 3cfaa3b.",
)

STUDIES["best_option"] = Study(
    title="The best option on the test sets",
    about="The option with the best mean dev score (study `options`), evaluated on the test sets.",
    rows=tuple(row for row in STUDIES["options"].rows if row.name in (PROMCSE_EH, "biases, lr = 1e-3")),
    baseline=PROMCSE_EH,
    limits="Learning rates were selected on the dev set: that of the prompt from three, that of the biases from two. The option "
    "was selected before any of its test scores was computed.",
)

LEARNING_RATE_OF = {
    "table1/prompt": "table1/prompt_eh",
    "table1/full": "table1/full_eh",
    "table3/shared": "table1/unsup_prompt",
    "table3/input": "table1/unsup_prompt",
}
"""Preset -> preset whose learning rate it uses."""


def learning_rates(results: Results, preset: str) -> dict[str, float | None]:
    """Return the dev score of each learning rate of a method that the study `learning_rate` compares; None: not run.

    Args:
        results: Results of the study for one workspace.
        preset: Choice of `experiment`; empty if the study has no rates for it.
    """
    runs = {row: about["runs"] for row, about in results.get("rows", {}).items()}
    rows = [row for row in STUDIES["learning_rate"].rows if row.preset == preset]
    scores = (runs[row.name][0]["dev_spearman"] if runs.get(row.name) else None for row in rows)
    return dict(zip((row.overrides[0].removeprefix("optim.lr=") for row in rows), scores, strict=True))


def best_rate(scores: dict[str, float | None]) -> str | None:
    """Return the learning rate with the best dev score, of `learning_rates`; None if a rate was not run."""
    known = {rate: score for rate, score in scores.items() if score is not None}
    return max(known, key=known.__getitem__) if known and len(known) == len(scores) else None


def study_folder(name: str) -> Path:
    """Return the folder of a study (results and page)."""
    return HERE / name


def summary_page() -> Path:
    """Return the path of the page of all studies."""
    return HERE / "README.md"


def read_results(name: str) -> Results:
    """Return the results of a study by name of the workspace (model and rows); empty if it was not run."""
    path = study_folder(name) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def selected_rows(study: Study, only: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows that can be run and whose name or preset contains one of the texts; without texts, all that can be run."""
    rows = tuple(row for row in study.rows if not row.is_removed)
    return tuple(row for row in rows if any(text in row.name or text in row.preset for text in only)) if only else rows
