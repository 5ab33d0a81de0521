"""Encode texts with an exported graph: with onnxruntime or OpenVINO, numpy and tokenizers, without torch and transformers."""

# N sentences, T tokens, D width

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from promcse_pl.data.texts import list_of_texts
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import expand

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""Function of token ids and attention mask, (N, T), that returns the embeddings (N, D)."""
GRAPH, QUANTIZED, OPENVINO = "onnx/model.onnx", "onnx/model_quantized.onnx", "openvino/openvino_model.xml"
"""Files of an export. The names of the ONNX files are those of transformers.js for float32 and for `dtype: "q8"`."""
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"
"""Names in the graph."""


class GraphEncoder:
    """Encode texts with an exported folder.

    Args:
        run: The graph.
        tokenizer: Its tokenizer, which truncates; its padding is applied to each batch.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer) -> None:
        self.run, self._padding = run, tokenizer.padding or {}
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()  # else all texts are padded to the longest one

    @classmethod
    def load(cls, folder: str | Path, file: str | None = None, *, threads: int = 0) -> GraphEncoder:
        """Read a folder that `export_onnx` or `export_openvino` wrote.

        Args:
            folder: The folder.
            file: `GRAPH`, `QUANTIZED` or `OPENVINO`; None: `OPENVINO` if it exists, else `GRAPH`.
            threads: Number of threads; 0: the default of the runtime.

        Raises:
            ConfigError: The runtime is not installed, or the folder has no such graph.
        """
        folder = expand(folder)
        file = file or next((name for name in (OPENVINO, GRAPH) if (folder / name).is_file()), GRAPH)
        for name in (file, "tokenizer.json"):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{folder} has no {name} (current folder: {Path.cwd()}). Try: promcse export RUN --to onnx -o FOLDER, then "
                    "this FOLDER"
                )
        read = _openvino if file == OPENVINO else _onnxruntime
        return cls(read(folder / file, threads), Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, sentences: str | Iterable[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Compute the embeddings of sentences, in batches of similar length.

        Args:
            sentences: One sentence, or any iterable of them. No text prompt is prepended.
            batch_size: Number of sentences in a batch.

        Returns:
            (N, D) float32, (D,) for a single sentence, (0, D) for an empty list.

        Raises:
            TextTypeError: An entry is not a string.
            DataError: A sentence contains a lone surrogate.
        """
        if isinstance(sentences, str):
            single_D: NDArray[np.float32] = self.encode([sentences], batch_size)[0]
            return single_D
        texts = list_of_texts(sentences, "encode")
        if not texts:
            return self.encode(["A"], batch_size)[:0]  # the graph gives D
        encoded = self.tokenizer.encode_batch_fast(texts)
        order = np.argsort([-len(each.ids) for each in encoded], kind="stable")
        batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        parts = [self.run(*self._padded([encoded[row].ids for row in batch])) for batch in batches]
        embeddings_ND: NDArray[np.float32] = np.concatenate(parts)[np.argsort(order)]
        return embeddings_ND

    def _padded(self, rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return token ids and attention mask, (N, T) with T tokens in the longest row."""
        longest = max(map(len, rows))
        ids_NT = np.full((len(rows), longest), self._padding.get("pad_id", 0), dtype=np.int64)
        mask_NT = np.zeros_like(ids_NT)
        for row, ids in enumerate(rows):
            columns = slice(longest - len(ids), None) if self._padding.get("direction") == "left" else slice(len(ids))
            ids_NT[row, columns], mask_NT[row, columns] = ids, 1
        return ids_NT, mask_NT


def require_modules(extra: str, *modules: str) -> None:
    """Import modules that an extra of this package installs.

    Raises:
        ConfigError: One of them is not installed.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"this needs {module}. Try: pip install 'promcse_pl[{extra}]'") from error


def _onnxruntime(path: Path, threads: int) -> Run:
    require_modules("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        found_ND: NDArray[np.float32] = session.run([OUTPUT], dict(zip(INPUTS, (ids_NT, mask_NT), strict=True)))[0]
        return found_ND

    return run


def _openvino(path: Path, threads: int) -> Run:
    require_modules("openvino", "openvino")
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads} if threads else {})

    lock = threading.Lock()  # the compiled model has one request for all threads

    def run(ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        with lock:
            found_ND: NDArray[np.float32] = compiled(dict(zip(INPUTS, (ids_NT, mask_NT), strict=True)))[OUTPUT].copy()
        return found_ND

    return run
