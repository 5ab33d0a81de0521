"""`promcse search`: the sentences of a file or an index that are nearest to a query."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from promcse_pl.cli.inputs import (
    SENTENCES_HELP,
    add_adapter,
    add_prompt_options,
    load_model,
    prompt_text,
    read_sentences,
    require_single_stdin,
)
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("search", help="the sentences of a file or index that are nearest to a query")
    add_adapter(parser)
    parser.add_argument("corpus", metavar="FILE|INDEX", help=f"{SENTENCES_HELP}; or a folder that promcse index wrote")
    parser.add_argument(
        "query", help="a sentence: prints score, tab, sentence; - reads queries and prints one JSON object each"
    )
    parser.add_argument("--top-k", type=int, default=5, help="maximum number of hits per query (default 5)")
    parser.add_argument("--threshold", type=float, help="minimum cosine of a hit, in [-1, 1] (default: no minimum)")
    add_prompt_options(parser, "the queries")
    add_prompt_options(parser, "the sentences of FILE", "document-")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Encode the queries and, for a file, the corpus; search it and print the hits."""
    from promcse_pl.corpus.folder import is_corpus
    from promcse_pl.index import check_search
    from promcse_pl.utils.paths import expand

    check_search(options.top_k, options.threshold)  # before the corpus is encoded
    require_single_stdin(options.corpus, options.query)
    if is_corpus(expand(options.corpus)):
        _search_index(options)
        return
    from rich.console import Console

    from promcse_pl.utils.terminal import progress_bar

    corpus = read_sentences(options.corpus)
    queries = _queries(options)
    model = load_model(options)
    query_prompt, document_prompt = prompt_text(model, options), prompt_text(model, options, "document-")
    with progress_bar(Console(stderr=True), "encoding", len(corpus)) as progress:
        model.build_index(corpus, prompt=document_prompt, progress=progress)
    results = model.search(queries, prompt=query_prompt, top_k=options.top_k, threshold=options.threshold)
    _print(options, queries, [[(score, sentence, {}) for sentence, score in hits] for hits in results])


def _search_index(options: argparse.Namespace) -> None:
    from promcse_pl.corpus.index import CorpusIndex
    from promcse_pl.utils.paths import expand

    if options.document_prompt is not None or options.document_prompt_name is not None:
        raise ConfigError(
            "--document-prompt and --document-prompt-name have no effect on an index: promcse encode has already "
            "applied the prompt of its texts. Leave the options out"
        )
    queries = _queries(options)
    model = load_model(options)
    index = CorpusIndex.load(expand(options.corpus), adapter=model.adapter_hash(), width=model.width)
    embeddings_QD = model.encode(queries, prompt=prompt_text(model, options))
    results = index.search(embeddings_QD, top_k=options.top_k, threshold=options.threshold)
    _print(options, queries, [[(hit.score, hit.text, hit.columns) for hit in hits] for hits in results])


def _queries(options: argparse.Namespace) -> list[str]:
    return read_sentences("-") if options.query == "-" else [options.query]


def _print(
    options: argparse.Namespace, queries: list[str], results: list[list[tuple[float, str, dict[str, Any]]]]
) -> None:
    import json

    if options.query == "-":
        for query, hits in zip(queries, results, strict=True):
            named = [
                {"sentence": sentence, "score": score} | ({"columns": columns} if columns else {})
                for score, sentence, columns in hits
            ]
            line = json.dumps(_finite({"query": query, "hits": named}), ensure_ascii=False, default=str)
            sys.stdout.write(line + "\n")
        return
    shown = visible if sys.stdout.isatty() else str  # unchanged in a pipe
    sys.stdout.write("".join(f"{score:.4f}\t{shown(sentence)}\n" for score, sentence, _ in results[0]))
    if not results[0]:
        sys.stderr.write(f"no sentence has a cosine >= {options.threshold}. Try: leave --threshold out\n")


def _finite(value: Any) -> Any:  # noqa: ANN401  (any value of a column)
    """Return a value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
