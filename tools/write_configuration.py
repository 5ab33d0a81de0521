"""Write docs/configuration.md from the schema (promcse_pl/config/schema.py) and the comments in conf/.

python tools/write_configuration.py            write the page
python tools/write_configuration.py --check    exit with 1 if the page is not up to date
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from promcse_pl.config import Config, SweepConfig, flat_settings, schema
from promcse_pl.config.fields import Setting, section_name, settings
from promcse_pl.config.parsing import describe, describe_range

ROOT = Path(__file__).resolve().parents[1]
CONF, PAGE = ROOT / "conf", ROOT / "docs" / "configuration.md"
COMMAND = "python tools/write_configuration.py"
INTRODUCTION = f"""<!-- Written by `{COMMAND}` from promcse_pl/config/schema.py and conf/. Do not edit. -->

# Configuration

Set values on the command line as `KEY=VALUE`, and choose files of `conf/` as `GROUP=CHOICE`:

    python run.py model=roberta-large loss.margin=0.3 tracking=local
    python run.py --cfg job model=roberta-large    # print the resulting config without training

Values are validated before anything is loaded. The chosen files set the values of a recipe; a value on the command line takes
precedence. Sources are named in parentheses: the paper (Jiang et al. 2022, arXiv 2203.06875) and the official code.

After its type, each setting shows:

- its default in the schema, which applies to settings that a config file leaves out. Where the default command (`python run.py`:
  `model=minilm data=demo`) uses another value, that one follows;
- what it decides: **training** (the trained adapter), **scores** (only what is evaluated) or **execution** (only memory, speed,
  checkpoints and logs). Execution settings can be changed when resuming a run.

## Your own config files

`promcse train --config FILE.yaml` takes settings from any part of a config, such as `RUN/config.yaml` or

    model: roberta-large
    loss:
      margin: 0.3

What the file leaves out comes from `conf/`; the command line takes precedence over the file. `--out FOLDER` is the run folder.

`--config-dir FOLDER` adds choices to the groups of `conf/`. A file `FOLDER/experiment/mine.yaml` that begins with the line
`# @package _global_` may set any setting; `experiment=mine` selects it. A file `FOLDER/data/mine.yaml` without that line sets the
settings of its group only. A group that `conf/` does not have is added with `+GROUP=CHOICE`.

## Settings
"""


def field_docstrings() -> dict[tuple[str, str], str]:
    """Return the string literal below each field of the schema, by class and field name."""
    found = {}
    for section in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(section, ast.ClassDef):
            continue
        for node, after in zip(section.body, section.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(node.target, ast.Name):
                found[section.name, node.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def type_and_range(setting: Setting) -> str:
    """Return the type of a setting, its choices and its range."""
    if setting.range:
        return f"{'integer' if int in (setting.kind, *get_args(setting.kind)) else 'number'} {describe_range(setting)}"
    text = describe(setting.kind).removeprefix("one of ").replace("true or false or null", "true, false or null")
    return text.replace("a list (like [a,b]) whose entries are", "list of").replace("an integer", "integer")


def plain(value: object) -> str:
    """Return a value as typed on the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")


def list_item(text: str) -> str:
    """Return an item of a Markdown list, wrapped for terminals."""
    return textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def section_lines(kind: Any, name: str, common: dict[str, Any]) -> list[str]:  # noqa: ANN401
    """Return the part of the page about one dataclass of settings.

    Args:
        kind: The dataclass.
        name: Title.
        common: Values of the default command by dotted key.
    """
    docs, title = field_docstrings(), inspect.cleandoc(kind.__doc__)
    decides = settings(Config)
    lines = [f"### {name}", "", textwrap.fill(title, 120), ""]
    for setting in settings(kind).values():
        section, _, field = setting.key.rpartition(".")
        if section != section_name(kind):
            continue
        facts = [type_and_range(setting), f"default `{plain(setting.default)}`"]
        if setting.default is dataclasses.MISSING:
            facts[1] = "required"
        if common.get(setting.key, setting.default) != setting.default:
            facts.append(f"`python run.py`: `{plain(common[setting.key])}`")
        if setting.key in decides:
            facts.append(decides[setting.key].decides)
        lines.append(list_item(f"**`{setting.key}`** ({'; '.join(facts)}) — {docs[kind.__name__, field]}"))
    return [*lines, ""]


def group_lines() -> list[str]:
    """Return the part of the page about the groups of conf/: their choices and the comments in their files."""
    lines = ["## Config groups", "", "Each choice is a file `conf/GROUP/CHOICE.yaml`.", ""]
    for group, default, about in re.findall(
        r"^  - (?:optional )?(\w+): (\S+) # (.+)$", (CONF / "config.yaml").read_text(), re.M
    ):
        shown = "" if default == "null" else f" Default: `{default}`."
        lines += [f"### {group}=CHOICE", "", f"{about}{shown}", ""]
        if group == "recipe":
            lines += [*recipe_table(), ""]
            continue
        for path in sorted((CONF / group).rglob("[!_]*.yaml")):
            comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
            texts = [line.removeprefix("# ") for line in comments if "@package" not in line]
            name = path.relative_to(CONF / group).with_suffix("").as_posix()
            lines.append(list_item(f"`{name}` — {' '.join(texts)}"))
        lines.append("")
    return lines


def recipe_table() -> list[str]:
    """Return a table of the recipes; those that only repeat another one are left out."""
    files = {path: yaml.safe_load(path.read_text()) for path in sorted((CONF / "recipe").rglob("*.yaml"))}
    recipes = {path: flat_settings(tree) for path, tree in files.items() if "defaults" not in tree}
    keys = list(dict.fromkeys(key for recipe in recipes.values() for key in recipe))
    lines = [f"| recipe | {' | '.join(keys)} |", f"|---|{'---|' * len(keys)}"]
    for path, recipe in recipes.items():
        values = [plain(recipe[key]) if key in recipe else "" for key in keys]
        name = path.relative_to(CONF / "recipe").with_suffix("")
        lines.append(f"| {name} | {' | '.join(values)} |")
    return lines


def page() -> str:
    """Return the text of docs/configuration.md."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        common = flat_settings(OmegaConf.to_container(compose("config"), resolve=True))  # type: ignore[arg-type]
    lines = [INTRODUCTION]
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            lines += section_lines(kind, name, common)
    lines += section_lines(Config, "seed", common)
    lines += section_lines(SweepConfig, "sweep", common)
    return "\n".join([*lines, *group_lines()]).rstrip() + "\n"


def main() -> int:
    """Write the page, or check it; return an exit code."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.stderr.write(f"docs/{PAGE.name} is not up to date. Run: {COMMAND}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
