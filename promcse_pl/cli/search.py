"""`promcse search`: the sentences of a file that are nearest to a query."""

from __future__ import annotations

import argparse
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
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("search", help="the sentences of a file that are nearest to a query")
    add_adapter(parser)
    parser.add_argument("corpus", metavar="FILE", help=SENTENCES_HELP)
    parser.add_argument(
        "query", help="a sentence: prints score, tab, sentence; - reads queries and prints one JSON object each"
    )
    parser.add_argument("--top-k", type=int, default=5, help="maximum number of hits per query (default 5)")
    parser.add_argument("--threshold", type=float, help="minimum cosine of a hit, in [-1, 1] (default: no minimum)")
    add_prompt_options(parser, "the queries")
    add_prompt_options(parser, "the sentences of FILE", "document-")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Encode the corpus, search it and print the hits."""
    import json

    from rich.console import Console

    from promcse_pl.index import check_search
    from promcse_pl.utils.terminal import progress_bar

    check_search(options.top_k, options.threshold)  # before the corpus is encoded
    require_single_stdin(options.corpus, options.query)
    corpus = read_sentences(options.corpus)
    queries = read_sentences("-") if options.query == "-" else [options.query]
    model = load_model(options)
    query_prompt, document_prompt = prompt_text(model, options), prompt_text(model, options, "document-")
    with progress_bar(Console(stderr=True), "encoding", len(corpus)) as progress:
        model.build_index(corpus, prompt=document_prompt, progress=progress)
    results = model.search(queries, prompt=query_prompt, top_k=options.top_k, threshold=options.threshold)
    if options.query == "-":
        for query, hits in zip(queries, results, strict=True):
            named = [{"sentence": sentence, "score": score} for sentence, score in hits]
            sys.stdout.write(json.dumps({"query": query, "hits": named}, ensure_ascii=False) + "\n")
        return
    shown = visible if sys.stdout.isatty() else str  # unchanged in a pipe
    sys.stdout.write("".join(f"{score:.4f}\t{shown(sentence)}\n" for sentence, score in results[0]))
    if not results[0]:
        sys.stderr.write(f"no sentence has a cosine >= {options.threshold}. Try: leave --threshold out\n")
