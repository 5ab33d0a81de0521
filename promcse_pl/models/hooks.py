"""Hooks on the frozen encoder's modules: detect hooks of other libraries, append an input prompt, compute only the first token.

The hooks of this package have no effect outside their context managers, which apply to the current thread only.
"""

# B sentences, T tokens, P prompt length, D width, E width of the input embeddings

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_first_token_only: ContextVar[bool] = ContextVar("first_token_only", default=False)
_input_prompt: ContextVar[Tensor | None] = ContextVar("input_prompt", default=None)
_INACTIVE_HOOKS = (__name__, "transformers.utils.output_capturing")
"""Python modules whose hooks do nothing unless this package enables them: this one, and that of `output_hidden_states`."""


def has_hooks(model: nn.Module) -> bool:
    """Return whether the modules of a model have hooks or replaced forward methods other than those of this package.

    This covers forward and backward hooks and pre-hooks of every module, global module hooks, and a `forward` that was assigned
    to an instance. torch has no public function for it; the attributes are those that `nn.Module.__call__` reads.
    """
    global_hooks: bool = torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return global_hooks or any(map(_is_observed, model.modules()))


def _is_observed(module: nn.Module) -> bool:
    if "forward" in vars(module) and getattr(module.forward, "__func__", None) is not type(module).forward:
        return True
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(
        getattr(hook, "__module__", None) not in _INACTIVE_HOOKS
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        if hooks  # fast path: called for every chunk of sentences, and most modules have no hooks
        for hook in hooks.values()
    )


def register_first_token_hook(attention_output: nn.Module) -> None:
    """Make the last layer compute only the first token after its attention, within `first_token_only(True)`.

    Args:
        attention_output: The module that adds the residual after the last layer's attention (`BertSelfOutput`).
    """
    attention_output.register_forward_pre_hook(_cut_to_first_token)


@contextmanager
def first_token_only(enabled: bool) -> Iterator[None]:
    """Enable the hook of `register_first_token_hook` in the current thread."""
    token = _first_token_only.set(enabled)
    try:
        yield
    finally:
        _first_token_only.reset(token)


def _cut_to_first_token(_module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Cut the attention output and the residual, each (B, T, D), to (B, 1, D)."""
    return tuple(state_BTD[:, :1] for state_BTD in states) if _first_token_only.get() else None


def register_input_prompt_hook(embeddings: nn.Module) -> None:
    """Make an embedding layer append the vectors of `input_prompt` to its output.

    Args:
        embeddings: The module that embeds the tokens, positions included.
    """
    embeddings.register_forward_hook(_append_input_prompt)


@contextmanager
def input_prompt(vectors_BPE: Tensor | None) -> Iterator[None]:
    """Set the vectors that the hook of `register_input_prompt_hook` appends, (B or 1, P, E); None: nothing is appended."""
    token = _input_prompt.set(vectors_BPE)
    try:
        yield
    finally:
        _input_prompt.reset(token)


def _append_input_prompt(_module: nn.Module, _inputs: object, embedded_BTE: Tensor) -> Tensor | None:
    """Return (B, T + P, E). The tokens stay first: in an encoder with absolute positions, the order of its rows has no effect."""
    vectors = _input_prompt.get()
    if vectors is None:
        return None
    # not len(), which would make the batch size a constant in an exported graph
    return torch.cat([embedded_BTE, vectors.to(embedded_BTE.dtype).expand(embedded_BTE.shape[0], -1, -1)], dim=1)
