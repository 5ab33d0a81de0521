"""Retrieval data in the layout of BEIR: documents, queries, and relevance judgements of a split."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from promcse_pl.data.files import open_file
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.paths import is_folder, is_there

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
_DEV_SPLITS = ("dev", "validation", "train")
"""Splits to suggest for a dev set, the best first."""


class RoleText(NamedTuple):
    """A text of a retrieval set; the role selects the prompt of the model."""

    role: Literal["query", "document"]
    text: str


Text = str | RoleText
"""A text to encode; a plain string gets the default prompt of the model."""


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Queries of a split, documents, and the relevance of documents to queries.

    Attributes:
        name: Name of the folder and the split.
        queries: Text of each query with a relevant document, by id.
        documents: Title and text of each document, by id, in the order of the file.
        relevance: Judgements by query id and document id; above 0 means relevant.
        sha256: Of the bytes of the three files.
    """

    metric: ClassVar[str] = "ndcg_at_10"
    """Name of the metric if this is a dev set; see `promcse_pl.run_folder.DEV_METRICS`."""
    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    relevance: dict[str, dict[str, int]]
    sha256: str

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def size(self) -> str:
        """The size for messages, such as "300 queries, 5,183 documents"."""
        return f"{len(self.queries):,} queries, {len(self.documents):,} documents"

    @property
    def texts(self) -> tuple[RoleText, ...]:
        """All texts to encode."""
        queries = (RoleText("query", text) for text in self.queries.values())
        return (*queries, *(RoleText("document", text) for text in self.documents.values()))


DevSet = ScoredPairs | RetrievalSet
"""A dev set: pairs with scores, or a retrieval set."""


def is_retrieval(path: Path) -> bool:
    """Return whether a path is a folder in BEIR layout, or the file of judgements of a split in one."""
    folder = path.parent.parent if path.parent.name == QRELS and path.suffix == ".tsv" else path
    return any((folder / name).exists() for name in (CORPUS, QUERIES)) or is_folder(folder / QRELS)


def load_retrieval(path: Path, split: str) -> RetrievalSet:
    """Read a retrieval set.

    Args:
        path: Folder with corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/SPLIT.tsv (query-id, corpus-id,
            score), or the .tsv file itself.
        split: Split of a folder; if it does not exist, the only split is used.

    Raises:
        ConfigError: The package for the metrics is not installed.
        DataError: A file is missing or broken, the split does not exist among several, or no query has a relevant document.
    """
    if importlib.util.find_spec("pytrec_eval") is None:
        raise ConfigError(
            "retrieval metrics need the package pytrec-eval-terrier. Try: pip install 'promcse_pl[retrieval]'"
        )
    qrels = _existing_file(path, split) if path.suffix == ".tsv" else _split_file(path, split)
    folder = qrels.parent.parent
    digests = [hashlib.sha256() for _ in range(3)]
    relevance, lines = _read_qrels(qrels, digests[2])
    queries = {key: text for key, text in _texts(folder / QUERIES, digests[1]) if key in lines}
    documents = dict(_texts(folder / CORPUS, digests[0]))
    for query, judged in relevance.items():
        for kind, key, known in (("query", query, queries), *(("document", key, documents) for key in judged)):
            if key not in known:
                where = folder / (QUERIES if kind == "query" else CORPUS)
                line = lines[query] if kind == "query" else lines[query, key]
                raise DataError(f"{qrels}:{line}: the {kind} {key!r} is not in {where}. Check that the ids agree")
    relevant = {query for query, judged in relevance.items() if max(judged.values()) > 0}
    if not relevant:
        raise DataError(f"{qrels} has no relevant document: all {len(lines) - len(relevance)} scores are 0 or less")
    sha256 = hashlib.sha256("".join(digest.hexdigest() for digest in digests).encode()).hexdigest()
    return RetrievalSet(
        f"{folder.absolute().name} {qrels.stem}",
        {query: text for query, text in queries.items() if query in relevant},
        documents,
        {query: judged for query, judged in relevance.items() if query in relevant},
        sha256,
    )


def _split_file(folder: Path, split: str) -> Path:
    """Return the qrels file of a split, or the only qrels file."""
    found = _splits(folder)
    if split in found or len(found) == 1:
        return found.get(split) or next(iter(found.values()))
    if not found:
        raise DataError(f"{folder} is not in BEIR layout: it has no {QRELS}/{split}.tsv (query-id, corpus-id, score)")
    raise DataError(f"{folder / QRELS} has the splits {', '.join(found)}, but no {split}.{_advice(found, split)}")


def _existing_file(path: Path, split: str) -> Path:
    """Return a qrels file; if it does not exist, the error lists the splits."""
    found = _splits(path.parent.parent)
    if found and not is_there(path):
        raise DataError(f"{path} does not exist; the splits are {', '.join(found)}.{_advice(found, split)}")
    return path


def _splits(folder: Path) -> dict[str, Path]:
    """Return the qrels files of a folder by split."""
    return {path.stem: path for path in sorted((folder / QRELS).glob("*.tsv"))}


def _advice(splits: dict[str, Path], split: str) -> str:
    """Return the advice to use an existing split; `test` may not select the best step, so it is not advised for a dev set."""
    names = [*_DEV_SPLITS, *splits] if split == "dev" else splits
    allowed = [name for name in names if name in splits and not (split == "dev" and name == "test")]
    return f" Try: {splits[allowed[0]]}" if allowed else ""


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, str]]:  # noqa: ANN401  (hashlib's type is private)
    """Yield number and content of every line that is not blank; update the digest with all bytes."""
    with open_file(path) as stream:
        for line, content in enumerate(stream, start=1):
            digest.update(content)
            try:
                text = content.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from error
            if text.strip():
                yield line, text


def _texts(path: Path, digest: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401  (as above)
    """Yield id and text of every line of a .jsonl file; the title is prepended to the text, as in BEIR."""
    seen: set[str] = set()
    for line, content in _lines(path, digest):
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}:{line}: expected a JSON object like {{"_id": "1", "text": "..."}}')
        key, text, title = row.get("_id"), row.get("text"), row.get("title") or ""
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
        if not isinstance(key, str) or not key or not isinstance(text, str) or not isinstance(title, str):
            raise DataError(f"{path}:{line}: _id and text must be strings, got {sorted(row)}")
        text = f"{title} {text}".strip()
        if "\0" in key or not _is_unicode(key + text):
            raise DataError(f"{path}:{line}: a lone surrogate in the text, or a NUL character in the _id")
        if key in seen:
            raise DataError(f"{path}:{line}: the _id {key!r} occurs twice")
        seen.add(key)
        yield key, text
    if not seen:
        raise DataError(f"{path} has no rows")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_FirstLines = dict[str | tuple[str, str], int]
"""First line of each query id, and of each pair of ids."""


def _read_qrels(path: Path, digest: Any) -> tuple[dict[str, dict[str, int]], _FirstLines]:  # noqa: ANN401  (as above)
    """Return the judgements, and line numbers for messages."""
    relevance: dict[str, dict[str, int]] = {}
    first_lines: _FirstLines = {}
    for line, content in _lines(path, digest):
        fields = content.split("\t")
        if len(fields) != 3:
            raise DataError(f"{path}:{line}: expected query-id, corpus-id and score separated by tabs, got {content!r}")
        query, document, score = fields
        try:
            grade = int(score)
        except ValueError:
            if line == 1:
                continue  # the header
            raise DataError(f"{path}:{line}: the score {score!r} is not an integer") from None
        if query == document and grade > 0:
            raise DataError(
                f"{path}:{line}: the document {document!r} is relevant to the query with the same id, but a document with the id "
                f"of the query counts as the query itself and is never retrieved (as in BEIR). Use other ids, such as q{query}"
            )
        if relevance.setdefault(query, {}).setdefault(document, grade) != grade:
            raise DataError(f"{path}:{line}: a second, different score for query {query!r} and document {document!r}")
        first_lines.setdefault(query, line)
        first_lines.setdefault((query, document), line)
    if not relevance:
        raise DataError(f"{path} has no judgements")
    return relevance, first_lines
