"""The pipeline around an encoder that sentence-transformers stores in modules.json: texts, pooling and dense layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from promcse_pl.utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """How texts become the input of an encoder.

    Attributes:
        max_length: Maximum number of tokens, special ones included; None: the limit of the encoder.
        lower_case: Whether texts are converted to lower case.
        prompts: Name -> text that is put in front of a sentence, such as {"query": "query: "}.
        default_prompt: Name of the prompt that is used if none is given; None: no prompt.
    """

    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def prompt_text(self, name: str | None = None, text: str | None = None) -> str:
        """Return the text to put in front of sentences: `text` if given, else the prompt of a name, else the default prompt.

        Raises:
            ConfigError: There is no prompt of that name, or both are given.
        """
        if None not in (name, text):
            raise ConfigError(f"prompt_name={name!r} and prompt={text!r} exclude each other. Try: one of them")
        if text is not None:
            return text
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ConfigError(f"there is no prompt {name!r} (known: {known}). Try: prompt={name + ': '!r} for the text itself")
        return self.prompts[name]

    def prepare(self, texts: Sequence[str], prompt: str = "") -> list[str]:
        """Return texts as the tokenizer gets them: with a prompt text in front, in lower case if set."""
        prepared = [prompt + text for text in texts]
        return [text.lower() for text in prepared] if self.lower_case else prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The settings of a sentence-transformers folder.

    Attributes:
        pooling: Pooling of the token embeddings; None without modules.json.
        text: How texts become the input of the encoder.
    """

    pooling: str | None = None
    text: TextSettings = field(default_factory=TextSettings)
