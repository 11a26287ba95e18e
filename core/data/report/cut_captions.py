# pyright: reportAttributeAccessIssue=false
"""Captions that the text encoders do not read to their end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ..dataset import Dataset

if TYPE_CHECKING:
    from ...plugin_api.family import ModelFamily

SAMPLE = 100_000
"""Captions that are counted; of more, so many evenly spaced ones are, which is exact to a fifth of a per cent."""
AT_ONCE = 10_000


@dataclass(frozen=True)
class CutCaptions:
    """How many captions are longer than the text encoders read.

    Attributes:
        count: Captions that are cut off, scaled up where only a sample was counted.
        total: Captions of the samples in use.
        limit: Tokens that are read.
        longest: Tokens of the longest caption that was counted.
        remedy: What users can do.
        sampled: Whether only a sample was counted.
    """

    count: int
    total: int
    limit: int
    longest: int
    remedy: str
    sampled: bool = False

    def line(self) -> str:
        """Return the sentence to print."""
        about = "about " if self.sampled else ""
        return (
            f"{about}{self.count:,} of {self.total:,} captions are longer than the {self.limit:,} tokens that the text "
            f"encoders read, and are cut off there (the longest has {self.longest:,}): {self.remedy}"
        )


def cut_captions(dataset: Dataset, family: ModelFamily) -> CutCaptions | None:
    """Count the captions of the samples in use that the family's text encoders cut off; None where there are none."""
    limit, positions = family.max_prompt_tokens, dataset.caption_positions()
    if limit is None or not len(positions):
        return None
    total, step = len(positions), -(-len(positions) // SAMPLE)
    longest, found, positions = 0, 0, positions[::step]
    for start in range(0, len(positions), AT_ONCE):
        texts = dataset.index.caption_texts.take(positions[start : start + AT_ONCE])
        long = pc.greater(pc.binary_length(texts), limit)  # a token has one byte at least
        tokens = np.array(family.count_tokens(texts.filter(long).to_pylist()) or [0])
        found += int((tokens > limit).sum())
        longest = max(longest, int(tokens.max()))
    if not found:
        return None
    count = round(found * total / len(positions))
    return CutCaptions(count, total, limit, longest, family.long_prompts_remedy(longest), step > 1)
