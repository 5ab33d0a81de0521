"""Match the columns of a data file to roles (anchor, positive, negative, score), by name in any order or else by position."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import run_command

TEXT_ROLES = ("anchor", "positive", "negative")
ROLES = {
    "anchor": "anchor|query|question|premise",
    "positive": "positive|pos|answer|entailment|paraphrase|passage|document|response",
    "negative": "negative|neg|hard_negative|hard_neg|wrong|contradiction|distractor",
    "score": "score|similarity|similarity_score|label|gold|gold_score|relatedness|relatedness_score",
    "text": "sentence|text",
    "label": "is_.*|class|verdict|(.*_)?(labels?|scores?|ratings?|relevance|judge?ments?)",
    "id": "(unnamed:)?|(.*_)?(id|idx|index)|(q|p|doc|corpus|gu|uu)id|nr|no|num|number|row|key",
}
"""Role of a column and a pattern of its names, the first match counts.

Names are compared in lower case with _ for spaces, hyphens and camelCase, without a number at the end. `text` is a text column
without a specific role, `label` a label or score that only scored pairs may read. Numbered names (sent0, sent1, sent2;
sentence1, sentence2; sentence_A, sentence_B; a, b) get their roles by rank, see `Columns.of`.
"""
METADATA = ("note", "source", "split")
"""Names that are not suggested as texts; they are read by position like unknown names."""
BY_POSITION = " (by position)"
"""End of the note about columns whose names do not identify them."""
Record = list[tuple[str, Any]] | str
"""Label and value of each requested column, or why the row cannot be used."""
Records = Iterator[tuple[int, Record]]
"""Records with the 1-based number of the line or row where they start."""
_NUMBERED = re.compile(r"(?:(sent|sentence|text|question|query|title|caption|phrase)_?([0-3a-c])|()([a-c]))")
_PLAIN_NAME = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][A-Za-z0-9_-]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RowKind:
    """Roles of the values in a row.

    Attributes:
        name: Name in messages.
        roles: Role of each value, in order; see `ROLES`.
        titles: Name of each role in messages; each is also a known column name.
    """

    name: str
    roles: tuple[str, ...]
    titles: tuple[str, ...]

    @property
    def choice(self) -> str:
        """Value of `data=` and of `data.kind` for training rows of this kind."""
        return self.name.replace(" ", "_")

    @property
    def is_scored(self) -> bool:
        """Whether the last value of a row is a score."""
        return "score" in self.roles


TRAINING_ROWS = {
    1: RowKind("sentences", ("text",), ("sentence",)),
    2: RowKind("pairs", TEXT_ROLES[:2], TEXT_ROLES[:2]),
    3: RowKind("triplets", TEXT_ROLES, TEXT_ROLES),
}
"""Kinds of training rows by their number of texts."""
SCORED_PAIRS = RowKind("scored pairs", ("anchor", "positive", "score"), ("sentence1", "sentence2", "score"))
ROW_KINDS = {kind.choice: kind for kind in (*TRAINING_ROWS.values(), SCORED_PAIRS)}
"""Kinds of training rows by `data.kind`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a file.

    Attributes:
        names: Name of each column; empty if the file has no names.
        roles: Role of each column by its name, None for an unknown name.
    """

    names: tuple[str, ...]
    roles: tuple[str | None, ...]

    @classmethod
    def of(cls, names: Sequence[str] | None, count: int) -> Columns:
        """Return the columns with their roles.

        Numbered names get their roles by rank: sent0, sent1, sent2 and sentence1, sentence2, sentence3 are anchor, positive
        and negative. Ranks start at 0 if one of the numbers is 0, else at 1.
        """
        plain = [re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower() for name in names or ()]
        has_letters = {"a", "b"} <= set(plain)  # a single `a`, as in (q, a), is not a numbered name
        numbered = [_NUMBERED.fullmatch(name) if has_letters or len(name) > 1 else None for name in plain]
        from_zero = {match[1] for match in numbered if match and match[2] == "0"}
        roles: list[str | None] = []
        for name, match in zip(plain, numbered, strict=True):
            if match is None:
                name = re.sub(r"_?\d+$", "", name)
                roles.append(next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)), None))
                continue
            index = match[2] or match[4]
            rank = ord(index) - ord("a") if index.isalpha() else int(index) - (match[1] not in from_zero)
            roles.append(TEXT_ROLES[rank] if rank < len(TEXT_ROLES) else None)
        return cls(tuple(names or ()), tuple(roles) if names else (None,) * count)

    def __len__(self) -> int:
        return len(self.roles)

    def __str__(self) -> str:
        return listed(self.names) if self.names else f"no names, positions from 0 to {len(self) - 1}"

    def label(self, position: int) -> str:
        """Return the name of a column for messages, or its position."""
        return short_name(self.names[position]) if self.names else str(position)

    def typed(self, position: int) -> str:
        """Return a column as an entry of data.columns: its name if Hydra accepts it without quotes, else its position."""
        is_plain = self.names and _PLAIN_NAME.fullmatch(self.names[position])
        return self.names[position] if is_plain and self.names.count(self.names[position]) == 1 else str(position)

    def candidates(self, kind: RowKind) -> dict[str, list[int]]:
        """Return the positions of the columns whose names match each role of a kind of rows."""
        positions = {role: [i for i, known in enumerate(self.roles) if known == role] for role in (*TEXT_ROLES, *ROLES)}
        if kind.roles == ("text",):
            exact = [i for i, name in enumerate(self.names) if name.strip().lower() == "sentence"]
            other = [i for i, role in enumerate(self.roles) if role in TEXT_ROLES]
            return {"text": exact or positions["text"] or other}
        found = {role: positions[role] for role in kind.roles}
        missing = [role for role in kind.roles if not found[role]]
        if len(missing) == 1 and missing[0] in TEXT_ROLES[:2]:  # (text, positive, negative) or (query, text)
            found[missing[0]] = positions["text"]
        return found

    def match(self, kind: RowKind) -> list[int] | None:
        """Return the position of each role if exactly one column has a name for it, else None."""
        found = self.candidates(kind)
        return [found[role][0] for role in kind.roles] if all(len(found[role]) == 1 for role in kind.roles) else None

    def guess(self, kind: RowKind) -> list[int]:
        """Return the most plausible columns, for the command in a message."""
        if not self.names:
            return list(range(len(kind.roles)))
        chosen = {role: positions[0] for role, positions in self.candidates(kind).items() if positions}
        rest = [
            i
            for i, (name, role) in enumerate(zip(self.names, self.roles, strict=True))
            if i not in chosen.values()
            and role not in ("id", "score", "label")
            and name.strip().lower() not in METADATA
        ]
        rest.sort(key=lambda i: self.roles[i] in TEXT_ROLES)
        guess = [chosen[role] if role in chosen else rest.pop(0) for role in kind.roles if role in chosen or rest]
        return guess or list(range(len(kind.roles)))


@dataclass(frozen=True, slots=True)
class ColumnRequest:
    """Columns that a reader requests from a file.

    Attributes:
        path: Path of the file, for messages.
        kind: Kind of the rows.
        chosen: Names or 0-based positions, one per role; None: matched by name or position.
        header: Value of `data.header`, repeated in the commands of messages.
        configurable: Whether messages may suggest data.columns, data.header and so on, which apply only to the training file.
        notes: `select` appends a line that describes the selected columns.
        with_others: Whether each record ends with the other columns of the row, for text formats.
        option: Command-line option that selects the column, for messages; empty: there is none.
    """

    path: Path
    kind: RowKind
    chosen: Sequence[str | int] | None = None
    header: bool | None = None
    configurable: bool = True
    notes: list[str] = field(default_factory=list)
    with_others: bool = False
    option: str = ""

    def select(self, names: Sequence[str] | None, count: int) -> list[int]:
        """Return the position of each role's column, and append a note about columns that are not obvious.

        Args:
            names: Names of all columns; None if the file has no names.
            count: Number of columns.

        Raises:
            DataError: A chosen column does not exist, or the match is ambiguous.
        """
        columns = Columns.of(names, count)
        positions = self._matched(columns) if self.chosen is None else self._chosen(columns, self.chosen)
        if names or count > len(positions):
            labels = [columns.label(i) if names else f"column {i}" for i in range(count)]
            read = (f"{title}={labels[i]}" for title, i in zip(self.kind.titles, positions, strict=True))
            rest = [label for i, label in enumerate(labels) if i not in positions]
            unread = f"; not read: {listed(rest)}" if rest else ""
            is_guess = names and self.chosen is None and not columns.match(self.kind)
            self.notes.append(f"{self.path}: {', '.join(read)}{unread}{BY_POSITION if is_guess else ''}")
        return positions

    def command(self, kind: str, columns: Iterable[str] = ()) -> str:
        """Return the command that trains on the file, quoted for Hydra and a shell."""
        path = str(self.path)
        if not re.fullmatch(r"[A-Za-z0-9_./~-]+", path):
            escaped = path.replace("\\", "\\\\").replace("'", "\\'") if "'" in path or path.endswith("\\") else path
            path = f"'{escaped}'"
        settings = [f"data={kind}", f"data.train={path}"]
        if self.header is not None:
            settings.append(f"data.header={str(self.header).lower()}")
        if chosen := ",".join(columns):
            settings.append(f"data.columns=[{chosen}]")
        return f"{run_command()} {' '.join(map(_for_shell, settings))}"

    def _chosen(self, columns: Columns, chosen: Sequence[str | int]) -> list[int]:
        positions: list[int] = []
        for column in chosen:
            found = [i for i in range(len(columns)) if column == i or column in columns.names[i : i + 1]]
            if len(found) != 1:
                found_as = (
                    f"{self.path} has {'several columns' if found else 'no column'} {column!r} (columns: {columns})"
                )
                if self.option:
                    raise DataError(f"{found_as}. {self._advice(columns)}")
                needed = len(self.kind.roles)
                example = map(columns.typed, range(min(needed, len(columns)) if columns.names else needed))
                raise DataError(f"{found_as}. {needed} are needed, for example data.columns=[{','.join(example)}]")
            positions += found
        return positions

    def _matched(self, columns: Columns) -> list[int]:
        self._reject_labels(columns)
        if matched := columns.match(self.kind):
            return matched
        self._reject_duplicates(columns)
        self._reject_other_count(columns)
        self._reject_other_roles(columns)
        return list(range(len(columns)))

    def _reject_labels(self, columns: Columns) -> None:
        """Reject labelled pairs: without the labels, pairs of different meaning would be trained as positives."""
        spare = len(columns) - len(self.kind.roles)
        is_unused = {"pairs": spare > 0, "triplets": spare >= 0 and not columns.match(self.kind)}.get(self.kind.name)
        label = next((columns.label(i) for i, role in enumerate(columns.roles) if role in ("score", "label")), None)
        if is_unused and label:
            raise DataError(
                f"{self.path} has a column {label} (columns: {columns}), which training on {self.kind.name} cannot use: every "
                f"row would be a positive pair, whatever its {label}. Keep only the rows that are positive pairs. "
                f"{self._advice(columns)}{self._scored_advice(columns)}"
            )

    def _reject_duplicates(self, columns: Columns) -> None:
        found = columns.candidates(self.kind)
        for role, title in zip(self.kind.roles, self.kind.titles, strict=True):
            if len(found[role]) > 1:
                names = listed([columns.names[i] for i in found[role]])
                is_option = self.configurable or self.option
                advice = self._advice(columns) if is_option else "Rename or remove all but one of them"
                raise DataError(
                    f"{self.path}: {len(found[role])} columns match the {title}: {names} (columns: {columns}). {advice}"
                )

    def _reject_other_count(self, columns: Columns) -> None:
        count, needed, titles = len(columns), len(self.kind.roles), ", ".join(self.kind.titles)
        if count > needed:
            raise DataError(
                f"{self.path} has {count} columns ({columns}), and their names do not identify the columns that "
                f"{self.kind.name} need: {titles}. {self._advice(columns)}"
            )
        if count < needed:
            if self.configurable:
                pairs = "scores (every row is a positive pair)" if self.kind.is_scored else "hard negatives"
                without = pairs if count == 2 else "pairs (each sentence is its own positive)"
                advice = f"To train without {without}: {self.command(TRAINING_ROWS[count].choice)}"
            else:
                advice = f"Add the missing columns; their names are {titles}"
            raise DataError(
                f"{self.path} has {count} column{'s' * (count > 1)} ({columns}); {self.kind.name} need {needed}: {titles}. "
                f"{advice}"
            )

    def _reject_other_roles(self, columns: Columns) -> None:
        for i, (role, wanted, title) in enumerate(zip(columns.roles, self.kind.roles, self.kind.titles, strict=True)):
            if role is not None and not _fits(role, wanted):
                raise DataError(
                    f"{self.path}: column {columns.label(i)} would be read as the {title}, but its name means another role "
                    f"(columns: {columns}). {self._advice(columns)}"
                )

    def _advice(self, columns: Columns) -> str:
        """Return the command or option with the most plausible columns, or the names to rename columns to."""
        if self.option and columns.names:
            return f"Try: {self.option} {shlex.quote(columns.names[columns.guess(self.kind)[0]])}"
        if self.option and self.chosen is not None:
            return f"The columns have no names. Leave {self.option} out"
        if not self.configurable:
            plural = "s" * (len(self.kind.titles) > 1)
            return f"Rename the column{plural} to read to {', '.join(self.kind.titles)}"
        positions = columns.guess(self.kind)
        kind = self.kind if len(positions) == len(self.kind.roles) else TRAINING_ROWS[len(positions)]
        shown, titles = ", ".join(map(columns.label, positions)), ", ".join(kind.titles)
        condition = f"If {shown} are {titles} in this order" if len(positions) > 1 else f"If {shown} is the {titles}"
        without = "" if kind.name == self.kind.name else f" (no column is left for {self.kind.name})"
        return f"{condition}{without}: {self.command(kind.choice, map(columns.typed, positions))}"

    def _scored_advice(self, columns: Columns) -> str:
        """Return the command that trains on scores, if the file has exactly one column for each value of a scored pair."""
        positions = columns.match(SCORED_PAIRS)
        if positions is None or not self.configurable:
            return ""
        label = columns.label(positions[-1])
        return f". If {label} is a similarity score: {self.command(SCORED_PAIRS.choice)}"


def _fits(role: str, wanted: str) -> bool:
    """Return whether a column of a known role may be read as the wanted one."""
    if wanted == "score" or role not in (*TEXT_ROLES, "text"):
        return {role, wanted} <= {"score", "label"}
    return role == wanted or "text" in (role, wanted)


def _for_shell(text: str) -> str:
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def listed(names: Sequence[str]) -> str:
    """Return column names separated by commas, at most 20 of them."""
    shown = ", ".join(map(short_name, names[:20]))
    return shown if len(names) <= 20 else f"{shown}, ... ({len(names)} in all)"


def short_name(name: str) -> str:
    """Return the name of a column for messages: truncated, control characters escaped."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name[:40])
    return (shown if len(name) <= 40 else shown[:37] + "...") or "''"


def is_number(text: str) -> bool:
    """Return whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
