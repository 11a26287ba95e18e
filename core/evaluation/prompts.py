"""Prompts of people: what of them is read, and that their embeddings are numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..utils.finite import finite_rows
from ..utils.prompt_library import shortened

if TYPE_CHECKING:
    from ..plugin_api.batch import Conditioning
    from ..plugin_api.family import ModelFamily


def encoded(family: ModelFamily, prompts: Sequence[str], *, negative: bool = False) -> Conditioning:
    """Return the embeddings of prompts. Raises UserError if some are not finite: their images would be black."""
    embeds = family.encode_negative(prompts) if negative else family.encode_prompts(prompts)
    bad = [prompt for prompt, good in zip(prompts, finite_rows(embeds).tolist(), strict=True) if not good]
    if bad:
        raise UserError(
            f"the text encoders make NaN or infinity of {len(bad)} of {len(prompts)} prompts, the first "
            f"{shortened(bad[0])}",
            family.overflow_remedies["text"],
        )
    return embeds


def cut_prompts(family: ModelFamily, prompts: Sequence[str]) -> list[str]:
    """Return a line on each prompt that the text encoders do not read to its end."""
    limit = family.max_prompt_tokens
    if limit is None or not prompts:
        return []
    counts = zip(prompts, family.count_tokens(prompts), strict=True)
    return [_line(family, prompt, count, limit) for prompt, count in counts if count > limit]


def _line(family: ModelFamily, prompt: str, count: int, limit: int) -> str:
    words = prompt.split()
    read = bisect_right(range(1, len(words)), limit, key=lambda end: family.count_tokens([" ".join(words[:end])])[0])
    rest = shortened(" ".join(words[read:]))
    return (
        f"the prompt {shortened(prompt)} has {count:,} tokens, of which the text encoders read {limit:,}; cut off is "
        f"{rest}: {family.long_prompts_remedy(count)}"
    )
