"""Tokenizers without their text encoders, to count the tokens of prompts."""

from __future__ import annotations

from typing import Any

from ._files import quiet_libraries
from ._single_file import FileSource
from ._source import FolderSource, Source


def load_tokenizer(source: Source, part: str) -> Any:
    """Load one tokenizer of a model, as ``tokenizer_2``; that of a single file comes from where its configs do."""
    import transformers

    folders = source.configs if isinstance(source, FileSource) else source
    assert isinstance(folders, FolderSource)
    with quiet_libraries():
        kind = getattr(transformers, source.architecture.tokenizers[part])
        return kind.from_pretrained(folders.component(part), local_files_only=True)
