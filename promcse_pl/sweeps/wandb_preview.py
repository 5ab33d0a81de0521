"""Previews of W&B views without an API key or a network connection: the JSON that would be sent, and a static page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promcse_pl.sweeps.html import render
from promcse_pl.sweeps.wandb_report import Section, build_report, read_tracked_sweep, report_sections, report_title
from promcse_pl.tracking.dashboard import DEFAULT_PROJECT, build_workspace, require_extra, sent_json
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import is_plain_name
from promcse_pl.version import __version__

SUFFIXES = (".json", ".html")
PREVIEW_MARKER = 'content="promcse dashboard"'
"""Text that identifies FILE.html, and so the FILE.json beside it, as a preview: the fields of the JSON are too common."""
_FIELDS = {
    "x": "x",
    "y": "y",
    "z": "colour",
    "metrics": "metrics",
    "columns": "axes",
    "with_respect_to": "target",
    "table_name": "table",
}
"""Attributes of the panels of wandb_workspaces that name metrics, and their names on the page."""


def preview_dashboard(file: Path, project: str | None, entity: str | None) -> list[Path]:
    """Write the preview of the saved view of a project; return its files.

    Args:
        file: FILE.json and FILE.html are written.
        project: W&B project; None: the default.
        entity: W&B user or team; None: the account's default, which only the server knows, so the field is empty.

    Raises:
        ConfigError: The extra is missing, FILE is no file name, or a file exists that is not a preview.
        DataError: A file cannot be written.
    """
    files = _preview_files(file)
    project = project or DEFAULT_PROJECT
    workspace = build_workspace(entity or "", project)
    sections = [Section(section.name, panels=section.panels) for section in workspace.sections]
    _write(files, workspace, f"Workspace {workspace.name}", sections)
    return files


def preview_report(file: Path, folder: Path, project: str | None, entity: str | None) -> list[Path]:
    """Write the preview of the report of a sweep; return its files.

    Args:
        file: FILE.json and FILE.html are written.
        folder: Folder of the sweep.
        project: W&B project; None: that of the sweep's runs.
        entity: W&B user or team; None: that of the sweep's runs; without one, the field is empty.

    Raises:
        PromcseError: The sweep has no W&B runs, the extra is missing, or a file cannot be written.
    """
    files = _preview_files(file)
    tracked = read_tracked_sweep(folder)
    project, entity = project or tracked.tracking.project, entity or tracked.tracking.entity or ""
    report = build_report(tracked, project, entity, is_online=False)
    _write(files, report, report_title(tracked.sweep), report_sections(tracked, project, entity))
    return files


def _preview_files(file: Path) -> list[Path]:
    """Return the paths of the JSON and of the page.

    Raises:
        ConfigError: wandb-workspaces is missing, `file` has no name, or a file exists that is not a preview.
    """
    require_extra()
    if not is_plain_name(file.name):
        raise ConfigError(f"--preview must be the name of a file, got {str(file)!r}. Try: --preview preview")
    base = file.with_suffix("") if file.suffix in SUFFIXES else file
    files = [base.with_name(base.name + suffix) for suffix in SUFFIXES]
    page = files[1]
    is_preview = page.is_file() and PREVIEW_MARKER in page.read_text(encoding="utf-8", errors="replace")
    for path in files:
        if path.exists() and not (is_preview and path.is_file()):
            raise ConfigError(f"{path} exists and is not a preview. Try: --preview with another name")
    return files


def _write(files: Sequence[Path], view: Any, title: str, sections: Sequence[Section]) -> None:  # noqa: ANN401
    """Write the JSON and the page of a Workspace or Report."""
    content = {
        "title": title,
        "version": __version__,
        "facts": [("project", view.project), ("entity", view.entity or "the account's default")],
        "json": files[0].name,
        "sections": [(section, [_describe(panel) for panel in section.panels]) for section in sections],
    }
    sent = sent_json(view)
    write_text(files[1], render("preview.html", content))  # first: it identifies the JSON as a preview
    write_text(files[0], sent)


def _describe(panel: Any) -> dict[str, Any]:  # noqa: ANN401  (a panel of wandb_workspaces)
    """Return the title (or None), type and metrics of a panel."""
    kind = re.sub(r"(?<!^)([A-Z])", r" \1", type(panel).__name__.removeprefix("WeavePanel")).lower()
    fields = {name: _names(getattr(panel, field, None)) for field, name in _FIELDS.items()}
    return {
        "title": getattr(panel, "title", None),
        "kind": kind,
        "fields": [(name, values) for name, values in fields.items() if values],
    }


def _names(value: Any) -> list[str]:  # noqa: ANN401  (a metric of wandb_workspaces, or a list)
    """Return the names of metrics and settings."""
    if isinstance(value, list | tuple):
        return [name for part in value for name in _names(part)]
    if value is None or isinstance(value, str):
        return [value] if value else []
    return _names(value.metric if hasattr(value, "metric") else value.name)
