"""Tokenizers without their text encoders, to count the tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from ...core.plugin_api.family import ModelFamily
from .architecture import Architecture
from .single_file import FileSource
from .source import FolderSource, Source

UNLIMITED = 10**6
"""Lengths above this are what tokenizers without a limit say."""


def load_tokenizer(source: Source, part: str) -> Any:
    """Load one tokenizer of a model, as ``tokenizer_2``; that of a single file comes from where its configs do."""
    folders = source.configs if isinstance(source, FileSource) else source
    assert isinstance(folders, FolderSource)
    loaded = folders.load_tokenizer(part)
    from transformers import PreTrainedTokenizerBase

    # a processor has one; a tokenizer with an attribute of that name, as ChatGLM's, is one itself
    return loaded if isinstance(loaded, PreTrainedTokenizerBase) else getattr(loaded, "tokenizer", loaded)


class PromptTokens(ModelFamily):
    """The part of a family that counts the tokens of prompts; abstract."""

    architecture: ClassVar[Architecture]
    _source: Source

    @property
    def longest_reader(self) -> tuple[str, int | None]:
        """The tokenizer of the text encoder that reads most of a prompt, and its number of tokens, marks of beginning
        and end included (None: the tokenizer's own).
        """
        return next(iter(self.architecture.tokenizers)), None

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """Return the prompts as the text encoder reads them, in the template of a conversation, for instance."""
        return list(prompts)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._source, self.longest_reader[0])

    @property
    def max_prompt_tokens(self) -> int | None:
        tokenizer = self._tokenizer
        length = self.longest_reader[1] or tokenizer.model_max_length
        around = sum(map(len, tokenizer(self.written(tokenizer, [""]), add_special_tokens=False).input_ids))
        return None if length > UNLIMITED else length - tokenizer.num_special_tokens_to_add() - around

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        if not prompts:
            return []
        # not verbose: what is too long is ours to say
        found = self._tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) for ids in found.input_ids]
