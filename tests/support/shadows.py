"""Modules of the current folder that have the names of libraries: nobody but the user may import them."""

from pathlib import Path

SHADOWS = ("h2", "json", "torch", "wandb", "yaml", "promcse_pl", "numpy")


def write_shadows(folder: Path) -> None:
    """Write modules to a folder; each leaves a marker beside the folder when it is imported."""
    for name in SHADOWS:
        marker = folder.parent / f"imported-{name}"
        (folder / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nraise ImportError('the user\\'s own')\n"
        )


def imported_shadows(folder: Path) -> list[str]:
    """Return the markers of those that were imported."""
    return sorted(path.name for path in folder.parent.glob("imported-*"))
