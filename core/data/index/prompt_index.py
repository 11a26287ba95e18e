"""The index of prompts without images: the same table as for images, all of one square size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ...errors import BadValue, UserError
from ..hashing import digest
from ..samples.captions import CaptionRules
from .build_folder import BuildFolder
from .index import NO_CAPTION, SCHEMA, Index, open_index, write_index
from .prompt_files import Chunk, PromptSource


class PromptIndexBuilder:
    """The builder that brings the index of a dataset of prompts up to date.

    Args:
        dataset: Id of the dataset.
        source: Yields the prompts.
        rules: Turn prompts into captions.
        edge: Width and height in pixels that every prompt is for.
    """

    def __init__(self, dataset: str, source: PromptSource, rules: CaptionRules, *, edge: int) -> None:
        self.dataset, self.source, self.rules, self.edge = dataset, source, rules, edge

    def build(self, path: Path) -> Index:
        """Write the index to `path` unless it is there and nothing has changed.

        Raises:
            UserError: The prompts cannot be read.
        """
        try:
            rules = json.dumps([self.rules.identity(), self.source.identity(), self.edge])
            old = open_index(path)
            if old is not None and old.matches(rules):
                return old
            with BuildFolder(path) as build_folder:
                return write_index(map(self._to_batch, self.source.chunks()), path, rules, folder=build_folder.folder)
        except BadValue as error:
            raise UserError(f"data.{self.dataset}.{error}", error.remedy) from error

    def _to_batch(self, chunk: Chunk) -> pa.RecordBatch:
        names = [digest(f"{self.dataset}\x1f{key}") for key in chunk.keys]
        captions = list(self._captions(chunk))
        size = len(names)
        columns = {
            "key": chunk.keys,
            "size": [0] * size,
            "version": [""] * size,
            "caption_version": [""] * size,
            "position": [""] * size,
            "width": [self.edge] * size,
            "height": [self.edge] * size,
            "draw": [int.from_bytes(name[:8], "little") for name in names],
            "identity": names,
            "captions": captions,
            "digests": [[digest(caption) for caption in each] for each in captions],
            "problem": [
                problem or ("" if each else NO_CAPTION) for problem, each in zip(chunk.problems, captions, strict=True)
            ],
        }
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)

    def _captions(self, chunk: Chunk) -> Iterator[list[str]]:
        for text, problem in zip(chunk.texts, chunk.problems, strict=True):
            yield [] if text is None or problem else self.rules.of_prompt(text)
