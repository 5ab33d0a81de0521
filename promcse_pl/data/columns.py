"""Match the columns of a data file to roles (anchor, positive, negative, score), by name in any order or else by position."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from promcse_pl.utils.errors import DataError

TEXT_ROLES = ("anchor", "positive", "negative")
ROLE_OF_NAME = {
    **dict.fromkeys(("anchor", "query", "question", "premise"), "anchor"),
    **dict.fromkeys(
        ("positive", "pos", "answer", "entailment", "paraphrase", "passage", "document", "response"), "positive"
    ),
    **dict.fromkeys(
        ("negative", "neg", "hard_negative", "hard_neg", "wrong", "contradiction", "distractor"), "negative"
    ),
    **dict.fromkeys(
        ("score", "similarity", "similarity_score", "label", "gold", "gold_score", "relatedness", "relatedness_score"),
        "score",
    ),
    **dict.fromkeys(("sentence", "text"), "text"),
}
"""Role of each column name, in lower case with _ for spaces, hyphens and camelCase; a trailing number is ignored.

`text` is a text column without a specific role. Other names of labels and scores have the role `label`, names of ids `id`.
Numbered names (sent0, sent1, sent2; sentence1, sentence2; sentence_A, sentence_B; a, b) get their roles by rank, see `roles_of`.
"""
_NUMBERED = re.compile(r"(?:(sent|sentence|text|question|query|title|caption|phrase)_?([0-3a-c])|()([a-c]))")
_LABEL = re.compile(r"is_.*|class|verdict|(?:.*_)?(?:labels?|scores?|ratings?|relevance|judge?ments?)")
_ID = re.compile(r"(?:unnamed:)?|(?:.*_)?(?:id|idx|index)|(?:q|p|doc|corpus|gu|uu)id|nr|no|num|number|row|key")
_NO_TEXT = {"note", "source", "split"}
_PLAIN_NAME = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][A-Za-z0-9_-]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RowKind:
    """Roles of the values in a row.

    Attributes:
        name: Name in messages; for training rows, also the value of `data=`.
        roles: Role of each value, in order; see `ROLE_OF_NAME`.
        titles: Name of each role in messages; each is also a known column name.
    """

    name: str
    roles: tuple[str, ...]
    titles: tuple[str, ...]


TRAINING_ROWS = {
    1: RowKind("sentences", ("text",), ("sentence",)),
    2: RowKind("pairs", TEXT_ROLES[:2], TEXT_ROLES[:2]),
    3: RowKind("triplets", TEXT_ROLES, TEXT_ROLES),
}
"""Kinds of training rows by their number of texts."""
SCORED_PAIRS = RowKind("scored pairs", ("anchor", "positive", "score"), ("sentence1", "sentence2", "score"))


@dataclass(frozen=True, slots=True)
class ColumnRequest:
    """Columns that a reader requests from a file.

    Attributes:
        path: Path of the file, for messages.
        kind: Kind of the rows.
        chosen: Names or 0-based positions, one per role; None: matched by `find`.
        header: Value of `data.header`, repeated in the commands of messages.
        configurable: Whether messages may suggest data.columns, data.header and so on, which apply only to the training file.
    """

    path: Path
    kind: RowKind
    chosen: Sequence[str | int] | None = None
    header: bool | None = None
    configurable: bool = True

    def find(self, names: Sequence[str] | None, count: int) -> list[int]:
        """Return the position of each role's column.

        Args:
            names: Names of all columns; None if the file has no names.
            count: Number of columns.

        Raises:
            DataError: A chosen column does not exist, or the match is ambiguous.
        """
        if self.chosen is not None:
            return self._chosen_positions(names, count)
        kind, needed = self.kind, len(self.kind.roles)
        shown = listed(names) if names else f"no names, positions from 0 to {count - 1}"
        roles = roles_of(names or ())
        labels = [name for name, role in zip(names or (), roles, strict=True) if role in ("score", "label")]
        is_unused = {"pairs": count > needed, "triplets": count >= needed and not match_names(names or (), kind)}
        if labels and is_unused.get(kind.name):
            label = short_name(labels[0])
            raise DataError(
                f"{self.path} has a column {label} (columns: {shown}), which training on {kind.name} cannot use: every row would "
                f"be a positive pair, whatever its {label}. Keep only the rows that are positive pairs. "
                f"{self._advice(names, count)}"
            )
        if names and (matched := match_names(names, kind)):
            return matched
        if several := self._duplicate_role(names or ()):
            raise DataError(f"{self.path}: {several} (columns: {shown}). {self._advice(names, count, several=True)}")
        if count < needed:
            raise DataError(
                f"{self.path} has {count} column{'s' * (count > 1)} ({shown}); {kind.name} need {needed}: "
                f"{', '.join(kind.titles)}. {self._too_few(count)}"
            )
        if count > needed:
            raise DataError(
                f"{self.path} has {count} columns ({shown}), and their names do not identify the columns that {kind.name} "
                f"need: {', '.join(kind.titles)}. {self._advice(names, count)}"
            )
        for name, role, wanted, title in zip(names or (), roles, kind.roles, kind.titles, strict=False):
            if role is not None and not _fits(role, wanted):
                raise DataError(
                    f"{self.path}: column {short_name(name)} would be read as the {title}, but its name means another role "
                    f"(columns: {shown}). {self._advice(names, count)}"
                )
        return list(range(needed))

    def describe(self, names: Sequence[str] | None, positions: Sequence[int], count: int) -> str:
        """Return one line with the column of each role and the columns that are not read."""
        labels = [short_name(name) for name in names] if names else [f"column {position}" for position in range(count)]
        used = ", ".join(
            f"{title}={labels[position]}" for title, position in zip(self.kind.titles, positions, strict=True)
        )
        rest = [label for position, label in enumerate(labels) if position not in positions]
        return f"{self.path}: {used}" + (f"; not read: {listed(rest)}" if rest else "")

    def _duplicate_role(self, names: Sequence[str]) -> str | None:
        found = _candidates(names, self.kind)
        for role, title in zip(self.kind.roles, self.kind.titles, strict=True):
            if len(found[role]) > 1:
                columns = listed([names[position] for position in found[role]])
                return f"{len(found[role])} columns match the {title}: {columns}"
        return None

    def _advice(self, names: Sequence[str] | None, count: int, *, several: bool = False) -> str:
        """Return the command with the most plausible columns, or the columns to rename."""
        if not self.configurable and several:
            return "Rename or remove all but one of them"
        if not self.configurable:
            plural = "s" * (len(self.kind.titles) > 1)
            return f"Rename the column{plural} to read to {', '.join(self.kind.titles)}"
        positions = _guess(names, count, self.kind)
        kind = TRAINING_ROWS[len(positions)].name
        without = "" if kind == self.kind.name else f" (no column is left for {self.kind.name})"
        columns = [_typed_column(names, position) for position in positions]
        shown = ", ".join(short_name(names[position]) if names else str(position) for position in positions)
        titles = ", ".join(TRAINING_ROWS[len(positions)].titles)
        condition = f"If {shown} are {titles} in this order" if len(positions) > 1 else f"If {shown} is the {titles}"
        return f"{condition}{without}: {self.command(kind, columns)}"

    def _too_few(self, count: int) -> str:
        if not self.configurable:
            return f"Add the missing columns; their names are {', '.join(self.kind.titles)}"
        other = TRAINING_ROWS[count].name
        without = "hard negatives" if count == 2 else "pairs (each sentence is its own positive)"
        return f"To train without {without}: {self.command(other)}"

    def command(self, kind: str, columns: Iterable[str] = ()) -> str:
        """Return the command that trains on the file, quoted for a shell."""
        settings = [f"data={kind}", typed_setting("data.train", str(self.path))]
        if self.header is not None:
            settings.append(f"data.header={str(self.header).lower()}")
        if chosen := ",".join(columns):
            settings.append(_for_shell(f"data.columns=[{chosen}]"))
        return f"python run.py {' '.join(settings)}"

    def _chosen_positions(self, names: Sequence[str] | None, count: int) -> list[int]:
        positions: list[int] = []
        needed = len(self.kind.roles)
        assert self.chosen is not None
        for column in self.chosen:
            if names is None:
                found = [column] if isinstance(column, int) and 0 <= column < count else []
                known = f"its columns have no names, only positions from 0 to {count - 1}"
                example = list(map(str, range(needed)))
            else:
                found = [position for position, name in enumerate(names) if column in (name, position)]
                known = f"its {len(names)} columns are: {listed(names)}"
                example = [_typed_column(names, position) for position in range(min(needed, len(names)))]
            if len(found) != 1:
                raise DataError(
                    f"{self.path} has {'several columns' if found else 'no column'} {column!r}; {known}. "
                    f"{needed} are needed, for example data.columns=[{','.join(example)}]"
                )
            positions += found
        return positions


def roles_of(names: Sequence[str]) -> list[str | None]:
    """Return the role of each column name, None for unknown names.

    Numbered names get their roles by rank: sent0, sent1, sent2 and sentence1, sentence2, sentence3 are anchor, positive and
    negative. Ranks start at 0 if one of the numbers is 0, else at 1.
    """
    plain = [re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower() for name in names]
    letters = {"a", "b"} <= set(plain)  # a alone is no first of several: q, a
    numbered = [_NUMBERED.fullmatch(name) if letters or len(name) > 1 else None for name in plain]
    from_zero = {match[1] for match in numbered if match and match[2] == "0"}
    roles: list[str | None] = []
    for name, match in zip(plain, numbered, strict=True):
        if match is None:
            name = re.sub(r"_?\d+$", "", name)
            other = "label" if _LABEL.fullmatch(name) else "id" if _ID.fullmatch(name) else None
            roles.append(ROLE_OF_NAME.get(name, other))
            continue
        index = match[2] or match[4]
        rank = ord(index) - ord("a") if index.isalpha() else int(index) - (match[1] not in from_zero)
        roles.append(TEXT_ROLES[rank] if rank < len(TEXT_ROLES) else None)
    return roles


def match_names(names: Sequence[str], kind: RowKind) -> list[int] | None:
    """Return the position of each role if exactly one column has a name for it, else None."""
    found = _candidates(names, kind)
    return [found[role][0] for role in kind.roles] if all(len(found[role]) == 1 for role in kind.roles) else None


def _candidates(names: Sequence[str], kind: RowKind) -> dict[str, list[int]]:
    roles = roles_of(names)
    texts = [position for position, role in enumerate(roles) if role == "text"]
    if kind.roles == ("text",):
        exact = [position for position, name in enumerate(names) if name.strip().lower() == "sentence"]
        return {"text": exact or texts or [position for position, role in enumerate(roles) if role in TEXT_ROLES]}
    found = {role: [position for position, known in enumerate(roles) if known == role] for role in kind.roles}
    missing = [role for role in kind.roles if not found[role]]
    if len(missing) == 1 and missing[0] in TEXT_ROLES[:2]:  # (text, positive, negative) or (query, text)
        found[missing[0]] = texts
    return found


def _fits(role: str, wanted: str) -> bool:
    """Return whether a column of a known role may be read as the wanted one."""
    if wanted == "score" or role not in (*TEXT_ROLES, "text"):
        return {role, wanted} <= {"score", "label"}
    return role == wanted or "text" in (role, wanted)


def _guess(names: Sequence[str] | None, count: int, kind: RowKind) -> list[int]:
    """Return the most plausible columns, for the command in a message."""
    if names is None:
        return list(range(len(kind.roles)))
    found = _candidates(names, kind)
    chosen = {role: positions[0] for role, positions in found.items() if positions}
    roles = roles_of(names)
    rest = [
        position
        for position in range(count)
        if position not in chosen.values()
        and roles[position] not in ("id", "score", "label")
        and names[position].strip().lower() not in _NO_TEXT
    ]
    rest.sort(key=lambda position: roles[position] in TEXT_ROLES)
    guess = [chosen[role] if role in chosen else rest.pop(0) for role in kind.roles if role in chosen or rest]
    return guess or list(range(len(kind.roles)))


def _typed_column(names: Sequence[str] | None, position: int) -> str:
    """Return a column as an entry of data.columns: its name if Hydra accepts it without quotes, else its position."""
    plain = names is not None and _PLAIN_NAME.fullmatch(names[position]) and list(names).count(names[position]) == 1
    return names[position] if names is not None and plain else str(position)


def typed_setting(key: str, value: str) -> str:
    """Return key=value, quoted for Hydra and a shell."""
    if re.fullmatch(r"[A-Za-z0-9_./~-]+", value):
        return f"{key}={value}"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'") if "'" in value or value.endswith("\\") else value
    return _for_shell(f"{key}='{quoted}'")


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
