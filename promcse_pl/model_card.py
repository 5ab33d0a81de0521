"""The model card of an adapter (README.md): rendered from adapter.json and the metadata of the encoder's model card."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from promcse_pl.adapter_folder import BUNDLED
from promcse_pl.models.hub import card_metadata
from promcse_pl.run_folder import DEV_METRICS, find_dev
from promcse_pl.utils.errors import AdapterError
from promcse_pl.utils.paths import looks_like_path, require_regular_file

CARD = "README.md"
Form = Literal["adapter", "sentence-transformers", "plain"]
"""Content of a folder: an adapter; a sentence-transformers model that needs promcse_pl; or one that does not (`plain`)."""
_MARK = "<!-- Written by promcse_pl. It is updated unless the text is edited. sha256 of the text: {} -->\n"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{64})") + r"\Z")
_IMPORT = "from promcse_pl import PromCSE"
_ENCODE = 'embeddings = model.encode(["A woman is reading.", "Someone reads."])'
_SENTENCES = r"printf 'A woman is reading.\nSomeone reads.\n' > sentences.txt"
_FOLDER_OPTION = ', encoder="ENCODER_FOLDER"'
_LICENCE_KEYS = ("license", "license_name", "license_link")
_METRICS = {
    "Spearman x 100": ("sentence-similarity", "spearman"),
    "nDCG@10 x 100": ("text-retrieval", "ndcg_at_10"),
    "accuracy x 100": ("text-classification", "accuracy"),
}
"""Unit of a score -> task and metric in the metadata. Scores with other units are in the table only."""


def model_card(
    about: Mapping[str, Any],
    *,
    name: str,
    parameters: int,
    encoder_card: Mapping[str, Any],
    form: Form = "adapter",
    revision: str | None = None,
) -> str:
    """Return the model card of an adapter.

    Args:
        about: The content of adapter.json.
        name: Path or hub id that the examples load.
        parameters: Number of trained parameters.
        encoder_card: Metadata of the encoder's own model card; empty if unknown.
        form: What the folder contains.
        revision: Branch that the examples load; None: the default branch. The commands have no option for it.

    Raises:
        AdapterError: `training` in adapter.json was not written by this package.
    """
    try:
        text = _text(about, name, parameters, encoder_card, form, revision)
    except (TypeError, ValueError, AttributeError, LookupError, StopIteration) as error:
        raise AdapterError(
            f"the entry training in adapter.json was not written by promcse_pl ({type(error).__name__}: {error}). To remove "
            "it, use promcse_pl.adapter. Try: save_adapter(load_adapter(FOLDER), FOLDER, training={})"
        ) from error
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


# six parameters: those of `model_card`
def _text(
    about: Mapping[str, Any],
    name: str,
    parameters: int,
    encoder_card: Mapping[str, Any],
    form: Form,
    revision: str | None,
) -> str:
    sections = [
        f"# {_line(name)}",
        _introduction(about, form),
        "## Usage",
        _usage(about, name, form, revision),
        "## Model",
        _model(about, parameters),
        "## Training",
        _training(about["training"]),
        "## Evaluation",
        _evaluation(about["training"]),
        "## Licence",
        _licence(about["encoder"]["name"], encoder_card),
        "## Limitations",
        _limits(about, encoder_card),
    ]
    metadata = yaml.safe_dump(_metadata(about, name, encoder_card, form), allow_unicode=True)
    return f"---\n{metadata}---\n\n" + "\n\n".join(sections) + "\n\n"


def encoder_metadata(name: str, revision: str | None, *, online: bool = False) -> dict[str, Any]:
    """Return the metadata of an encoder's model card without links that point nowhere; see `card_metadata`."""
    if name == BUNDLED:  # relative to the adapter, which contains no card of its encoder
        return {}
    card = card_metadata(name, revision, online=online)
    link = card.get("license_link")
    if link and not re.match(r"https?://", str(link)):
        card.pop("license_link")
        if not looks_like_path(name):
            card["license_link"] = f"https://huggingface.co/{name}/blob/{revision or 'main'}/{link}"
    return card


def is_generated(card: str) -> bool:
    """Return whether a model card was written by `model_card` and not edited since."""
    mark = _MARKED.search(card)
    return mark is not None and mark[1] == hashlib.sha256(card[: mark.start()].encode()).hexdigest()


def may_replace_card(folder: Path) -> bool:
    """Return whether a folder has no README.md, or one that was written by `model_card` and not edited since."""
    try:
        return is_generated(require_regular_file(folder / CARD, at_most=2**20).read_bytes().decode())
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _metadata(about: Mapping[str, Any], name: str, encoder_card: Mapping[str, Any], form: Form) -> dict[str, Any]:
    encoder = about["encoder"]["name"]
    found: dict[str, Any] = {
        "library_name": "promcse_pl" if form == "adapter" else "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-similarity", "feature-extraction", "promcse_pl"],
        **{key: encoder_card[key] for key in ("language", *_LICENCE_KEYS) if encoder_card.get(key)},
    }
    if form != "adapter":
        found["tags"].append("sentence-transformers")
    if not looks_like_path(encoder):
        is_whole = form == "plain" or _weights(about) == "full"
        found |= {"base_model": encoder, "base_model_relation": "finetune" if is_whole else "adapter"}
    if results := [*_results(about["training"])]:
        found["model-index"] = [{"name": name, "results": results}]
    return found


def _results(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the adapter's scores as entries of `model-index`."""
    found = []
    for task, entry in training.get("evaluation", {}).get("tasks", {}).items():
        if entry["unit"] not in _METRICS or entry["rows"] is None:  # an average is not a data set
            continue
        kind, metric = _METRICS[entry["unit"]]
        dataset = f"{_dev_name(training)} (dev set)" if task == "dev" else task
        found.append(
            {
                "task": {"type": kind},
                "dataset": {"name": dataset, "type": re.sub(r"[^\w.-]+", "-", dataset.lower()).strip("-")},
                "metrics": [{"type": metric, "name": entry["unit"], "value": round(entry["scores"]["adapter"][0], 2)}],
            }
        )
    return found


def _dev_name(training: Mapping[str, Any]) -> str:
    return str(training.get("dev") or "dev")


def _weights(about: Mapping[str, Any]) -> str:
    """Return which weights of the encoder were trained; adapters of formats 1 to 3 train none."""
    return str((about.get("tuning") or {}).get("weights", "none"))


def _line(text: object) -> str:
    """Return a value as one line of Markdown."""
    return " ".join(str(text).split()).replace("|", r"\|")


def _code(text: object) -> str:
    return f"`{_line(text).replace('`', '')}`"


def _table(rows: Sequence[Sequence[object]], *, header: Sequence[str] = ("", "")) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _introduction(about: Mapping[str, Any], form: Form) -> str:
    encoder, weights = about["encoder"]["name"], _weights(about)
    linked = (
        _code(encoder) if looks_like_path(encoder) else f"[{_line(encoder)}](https://huggingface.co/{_line(encoder)})"
    )
    parts = ["a soft prompt"] if about["prompt"]["length"] else []
    parts += [] if weights == "none" else [f"weights of the encoder ({weights})"]
    parts += [] if about["head"] == "none" else ["a head"]
    what = "A sentence-transformers model" if form != "adapter" else "A promcse_pl adapter"
    return (
        f"{what} for sentence embeddings. Encoder: {linked}. Trained with "
        f"[PromCSE](https://arxiv.org/abs/2203.06875), promcse_pl {_line(about['promcse_pl'])}. "
        f"Trained tensors: {', '.join(parts) or 'none'}."
    )


def _usage(about: Mapping[str, Any], name: str, form: Form, revision: str | None) -> str:
    quoted, encoder = json.dumps(name, ensure_ascii=False), about["encoder"]["name"]
    has_folder = encoder != BUNDLED and looks_like_path(encoder) and _weights(about) != "full"
    branch = f", revision={json.dumps(revision, ensure_ascii=False)}" if revision else ""
    ours = f"PromCSE.from_pretrained({quoted}{branch}{_FOLDER_OPTION if has_folder else ''})"
    if form == "adapter":
        theirs = f"{_IMPORT}\nfrom promcse_pl.interop.sentence_transformers import as_sentence_transformer\n\n"
        theirs += f"model = as_sentence_transformer({ours})"
    else:
        options = ", trust_remote_code=True" if form == "sentence-transformers" else ""
        options += ', model_kwargs={"encoder": "ENCODER_FOLDER"}' if options and has_folder else ""
        theirs = (
            f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({quoted}{options})"
        )
    command = f"{_SENTENCES}\npromcse encode {shlex.quote(name)} sentences.txt --out embeddings.npy"
    examples = [
        ("Python", "python", f"{_IMPORT}\n\nmodel = {ours}\n{_ENCODE}"),
        *(
            []
            if revision
            else [("Command line", "bash", command + (" --encoder ENCODER_FOLDER" if has_folder else ""))]
        ),
        ("sentence-transformers", "python", f"{theirs}\n{_ENCODE}"),
    ]
    parts = [f"{title}:\n\n```{language}\n{code}\n```" for title, language, code in examples]
    if form == "plain":
        return "\n\n".join([parts[-1], *_text_prompts(about)])
    needed = "The examples need the package `promcse_pl`."
    needed += f" ENCODER_FOLDER is a copy of the encoder {_code(encoder)}." if has_folder else ""
    return "\n\n".join([needed, *parts, *_text_prompts(about)])


def _text_prompts(about: Mapping[str, Any]) -> list[str]:
    text = about.get("text", {})
    if not text.get("prompts"):
        return []
    listed = ", ".join(f"{_code(key)} ({_code(json.dumps(front))})" for key, front in text["prompts"].items())
    default = _code(text["default_prompt"]) if text["default_prompt"] else "none"
    return [f"Text prompts (`prompt_name` of `encode`): {listed}. Default: {default}."]


def _model(about: Mapping[str, Any], parameters: int) -> str:
    encoder, prompt, tuning = about["encoder"], about["prompt"], about.get("tuning") or {}
    details = "".join(f", {key} {tuning[key]}" for key in ("rank", "alpha") if tuning.get(key) is not None)
    rows = [
        ("encoder", _code("in the folder encoder/" if encoder["name"] == BUNDLED else encoder["name"])),
        ("revision of the encoder", _code(encoder["revision"]) if encoder["revision"] else "not recorded"),
        ("sha256 of the encoder's weights", _code(encoder["sha256"])),
        ("prompt", f"{prompt.get('kind', 'deep')}, {prompt['length']} slots" if prompt["length"] else "none"),
        ("trained weights of the encoder", _weights(about) + details),
        ("pooling", about["pooling"]),
        ("head", about["head"] + (f", rank {about['head_rank']}" if about.get("head_rank") else "")),
        ("position offset", about["position_offset"]),
        ("trained parameters", f"{parameters:,} ({4 * parameters:,} bytes)"),
    ]
    return _table(rows)


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return "Not recorded: the adapter was not saved by a run, or was changed since."
    data, dev = training.get("data", {}), find_dev(training, "dev_")
    rows = [
        ("training data", _code(data["name"]) if data else None),
        ("sha256 of the training data", _code(data["sha256"]) if data else None),
        ("training rows", training.get("rows")),
        ("dev set", training.get("dev") and _line(training["dev"])),
        ("optimiser steps", training.get("steps")),
        ("best step on the dev set", training.get("best_step")),
        ("dev score", f"{dev[1]:.2f} ({DEV_METRICS[dev[0]]} x 100)" if dev else None),
        ("stopped early", training.get("stopped_early") and _line(training["stopped_early"])),
        ("seed", training.get("seed")),
    ]
    table = _table([row for row in rows if row[1] is not None])
    if not training.get("settings"):
        return table
    settings = yaml.safe_dump(training["settings"], allow_unicode=True, sort_keys=False)
    return f"{table}\n\nSettings (keys of `promcse train`):\n\n```yaml\n{settings}```"


def _evaluation(training: Mapping[str, Any]) -> str:
    evaluation = training.get("evaluation", {})
    if not evaluation:
        return "The adapter has no recorded test scores. Use `promcse evaluate`."
    tasks = evaluation["tasks"]
    targets = list(next(iter(tasks.values()))["scores"])
    rows = []
    for task, entry in tasks.items():
        cells = [_score(*entry["scores"][target]) for target in targets]
        label = f"{_line(_dev_name(training))} (dev set)" if task == "dev" else _line(task)
        rows.append((label, _line(entry["unit"]), *cells, _line(entry["difference"] or "")))
    notes = (
        f"In brackets: {100 * evaluation['level']:.0f} % confidence intervals (bootstrap, {evaluation['resamples']} resamples)."
        + (" Differences are relative to the frozen encoder." if len(targets) > 1 else "")
    )
    return f"{_table(rows, header=('task', 'unit', *targets, 'difference'))}\n\n{notes}"


def _score(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def _licence(encoder: str, encoder_card: Mapping[str, Any]) -> str:
    licence = encoder_card.get("license_name") or encoder_card.get("license")
    known = (
        f"Licence of the encoder: {_line(licence)} (from its model card)."
        if licence
        else f"The licence of the encoder {_code(encoder)} is unknown: its model card was not found. Look it up before you use "
        "or publish this model."
    )
    return f"{known} The licence of the training data is not recorded."


def _limits(about: Mapping[str, Any], encoder_card: Mapping[str, Any]) -> str:
    training, limit = about["training"], about.get("text", {}).get("max_length")
    positions = about["encoder"].get("config", {}).get("max_position_embeddings")
    fits = f"the {positions} positions of the encoder" if positions else "the positions of the encoder"
    fits += f", minus the position offset of {about['position_offset']}" if about["position_offset"] else ""
    languages = encoder_card.get("language")
    listed = ", ".join(map(str, languages)) if isinstance(languages, list) else languages
    points = [
        "Texts are truncated to " + (f"{limit} tokens." if limit else f"{fits}."),
        f"Languages: {_line(listed)} (model card of the encoder)."
        if listed
        else "The languages of the encoder are unknown.",
        "Not evaluated on languages and domains other than those of the training data, except for the tasks in the table above.",
        "Scores on similarity tasks do not measure retrieval or classification.",
    ]
    if longest := training.get("settings", {}).get("data.max_length"):
        points.insert(1, f"It was trained on texts of at most {longest} tokens.")
    if training.get("evaluation"):
        points.append(
            "The confidence intervals do not include the variance over seeds: this is the adapter of one run."
        )
    if training.get("dev"):
        points.append("The best step was selected on the dev set, so the dev score is optimistic.")
    return "\n".join(f"- {point}" for point in points)
