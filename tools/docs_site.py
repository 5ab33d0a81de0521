"""Hooks of mkdocs.yml. The site keeps the repository's folders, so that relative links work on GitHub and on the site."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "experiments/**/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by all pages of the repository, the files they link to, and the generated CLI reference."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted(site_files()):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "docs/cli.md", content=cli_reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401  (the hook's signature is that of mkdocs)
    """Convert Markdown that GitHub renders but Python-Markdown does not."""
    markdown = re.sub(r"^```mermaid\n(.*?)^```$", _import_table, markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^(<!-- .* -->)\n(?=\|)", r"\1\n\n", markdown, flags=re.MULTILINE)


def site_files() -> set[str]:
    """Return the paths of the pages, of the files they link to and of the style sheet, relative to the repository."""
    pages = [page for pattern in PAGES for page in ROOT.glob(pattern)]
    linked = [
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)", page.read_text())
    ]
    files = [*pages, *(path for path in linked if path.is_file()), ROOT / "docs/site.css"]
    return {path.relative_to(ROOT).as_posix() for path in files}


def cli_reference() -> str:
    """Return a page with the --help text of every command."""
    from promcse_pl.cli.main import build_parsers
    from promcse_pl.utils.paths import ENTRY_POINT

    with patch.dict(os.environ, {ENTRY_POINT: "promcse train"}):
        parser, commands = build_parsers()
    summaries = dict(re.findall(r"^    (\w+)\s+(.*)$", _help(parser), re.MULTILINE))
    sections = ["# Command line\n\n`promcse COMMAND --help` prints the options of a command.\n"]
    for name, command in commands.items():
        sections.append(f"## promcse {name}\n\n{summaries[name]}\n\n{_help_page(command)}\n")
    return "\n".join(sections)


def _help_page(parser: argparse.ArgumentParser) -> str:
    """Return a --help text with its usage as code and its arguments as a list, which wraps on narrow screens."""
    with patch.dict(os.environ, {"COLUMNS": "80"}):
        usage = parser.format_usage()
    text = re.sub(r"[*_<>\[\]`]", r"\\\g<0>", _help(parser).partition("\n\n")[2])
    text = re.sub(r"^ +(\S.*?)(?: {2,}|\n {20,})(\S.*)$", _help_item, text, flags=re.MULTILINE)
    return f"```text\n{usage}```\n\n" + re.sub(r":\n(?=- )", ":\n\n", text)


def _help(parser: argparse.ArgumentParser) -> str:
    """Return the --help text of a parser without wrapped lines; argparse reads the width from COLUMNS."""
    with patch.dict(os.environ, {"COLUMNS": "10000"}):
        return parser.format_help()


def _help_item(line: re.Match[str]) -> str:
    name = line[1].replace("\\", "")  # code spans need no escapes
    return f"- `{name}`: {line[2]}"


def _import_table(diagram: re.Match[str]) -> str:
    """Return the arrows of a flowchart as a table: Material loads Mermaid from another host."""
    arrows = re.findall(r'^ *(\w+)(?:\[".*?"\])? --> (\w+)', diagram[1], re.MULTILINE)
    titles = dict(re.findall(r'(\w+)\["\w+<br/>(.*?)"\]', diagram[1]))
    rows: dict[str, list[str]] = {}
    for importer, imported in arrows:
        rows.setdefault(importer, []).append(f"`{imported}`")
    lines = [f"| `{name}` | {titles.get(name, '')} | {', '.join(targets)} |" for name, targets in rows.items()]
    return "\n".join(["| package | contents | imports |", "|---|---|---|", *lines])
