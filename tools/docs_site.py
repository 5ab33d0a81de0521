"""Hooks of mkdocs.yml. The site has the folders of the repository, so that relative links work in both."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "experiments/**/README.md")
HELP_WIDTH = "88"


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
    """Write what GitHub renders and Python-Markdown does not in another form."""
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
    os.environ["COLUMNS"] = HELP_WIDTH  # read by argparse
    from promcse_pl.cli.main import build_parsers

    parser, commands = build_parsers()
    pages = [f"# Command line\n\n```text\n{parser.format_help()}```\n"]
    pages += [f"## promcse {name}\n\n```text\n{command.format_help()}```\n" for name, command in commands.items()]
    return "\n".join(pages)


def _import_table(diagram: re.Match[str]) -> str:
    """Return the arrows of a flowchart as a table: Material loads Mermaid from another host."""
    arrows = re.findall(r'^ *(\w+)(?:\[".*?"\])? --> (\w+)', diagram[1], re.MULTILINE)
    titles = dict(re.findall(r'(\w+)\["\w+<br/>(.*?)"\]', diagram[1]))
    rows: dict[str, list[str]] = {}
    for importer, imported in arrows:
        rows.setdefault(importer, []).append(f"`{imported}`")
    lines = [f"| `{name}` | {titles.get(name, '')} | {', '.join(targets)} |" for name, targets in rows.items()]
    return "\n".join(["| package | contents | imports |", "|---|---|---|", *lines])
