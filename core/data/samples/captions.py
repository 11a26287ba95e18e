"""Captions of an image, from its file name, its caption file or the texts that come with it."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from ...errors import UserError
from ...utils.seeds import derive_seed

if TYPE_CHECKING:
    from ...settings.dataset_settings import DatasetSettings

SHUFFLES = 4
"""Orders of a caption's comma-separated parts that are encoded with ``caption_shuffle``, the written one among them."""
MAX_CAPTION_BYTES = 2**20
"""Caption files with more bytes are not read."""
SUBSTITUTION = re.compile(r"s/((?:[^/\\]|\\.)+)/((?:[^/\\]|\\.)*)/")


def caption_key(key: str) -> str:
    """Return the key of the caption file beside an image: ``a/b.jpg`` -> ``a/b.txt``."""
    return str(PurePosixPath(key).with_suffix(".txt"))


def read_text(data: bytes, *, what: str = "its caption file") -> str:
    """Decode a caption file: UTF-8, or UTF-16 with its byte order mark. Raises ValueError that begins with `what`."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not {'UTF-16' if utf16 else 'UTF-8'} (byte {error.start})") from error
    if "\0" in text:
        raise ValueError(f"{what} holds NUL bytes: it is no text, or UTF-16 without its mark")
    return text


def read_caption(stream: BinaryIO) -> str:
    """Read a caption file. Raises ValueError when it is no text, or too long."""
    data = stream.read(MAX_CAPTION_BYTES + 1)
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"its caption file has more than {MAX_CAPTION_BYTES // 2**20} MiB")
    return read_text(data)


class CaptionRules:
    """The rules by which one dataset makes captions.

    A filter is a text that is cut out, or ``s/PATTERN/REPLACEMENT/`` with a regular expression.
    """

    def __init__(self, settings: DatasetSettings) -> None:
        self.settings = settings
        self.filters = self._read_filters(settings)
        if (settings.caption_strategy == "instanceprompt" or self._instance_used()) and not settings.instance_prompt:
            raise UserError(
                f"data.{settings.id} needs an instance_prompt: caption_strategy, prepend_instance_prompt or "
                "only_instance_prompt ask for one",
                'add "instance_prompt": "..." to the dataset',
            )

    def _instance_used(self) -> bool:
        return self.settings.prepend_instance_prompt or self.settings.only_instance_prompt

    @property
    def reads_files(self) -> bool:
        """True if captions stand in files beside the images."""
        return self.settings.caption_strategy == "textfile" and not self.settings.only_instance_prompt

    def identity(self) -> str:
        """Return a text that changes whenever the captions would."""
        settings = self.settings
        parts = [settings.caption_strategy, settings.instance_prompt, settings.prepend_instance_prompt,
                 settings.only_instance_prompt, settings.disable_multiline_split, settings.caption_shuffle,
                 [pattern for pattern, _, _ in self.filters], [new for _, new, _ in self.filters]]  # fmt: skip
        return json.dumps(parts)

    @staticmethod
    def _read_filters(settings: DatasetSettings) -> list[tuple[str, str, re.Pattern[str]]]:
        given: Sequence[str] | Path = settings.caption_filter_list
        if isinstance(given, Path):
            try:
                given = given.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise UserError(
                    f"data.{settings.id}.caption_filter_list = {str(given)!r} cannot be read: {reason}",
                    "name a text file with one filter per line, or give the list itself",
                ) from error
        return [_compile_filter(settings.id, line) for line in given if line.strip()]

    def captions(self, key: str, text: str | None) -> list[str]:
        """Return all captions of an image; empty when it has none.

        Args:
            key: The image's key.
            text: Content of its caption file, None when there is none.
        """
        settings = self.settings
        if settings.only_instance_prompt or settings.caption_strategy == "instanceprompt":
            found = [settings.instance_prompt or ""]
        elif settings.caption_strategy == "filename":
            found = [_one_line(PurePosixPath(key).stem.replace("_", " "))]
        else:
            found = self._split(text or "")
        return self._variants_of(found)

    def of_sample(self, key: str, texts: Sequence[str]) -> list[str]:
        """Return all captions of an image that comes with its texts; empty when it has none."""
        if self.settings.only_instance_prompt or self.settings.caption_strategy in ("instanceprompt", "filename"):
            return self.captions(key, None)
        return self._variants_of([line for text in texts for line in self._split(text)])

    def of_prompt(self, text: str) -> list[str]:
        """Return the captions of a prompt that has no image; empty when nothing is left of it."""
        settings = self.settings
        return self._variants_of([settings.instance_prompt or "" if settings.only_instance_prompt else _one_line(text)])

    def _variants_of(self, found: Sequence[str]) -> list[str]:
        cleaned = [self._clean(caption) for caption in found]
        return list(dict.fromkeys(variant for caption in cleaned if caption for variant in self._variants(caption)))

    def _split(self, text: str) -> list[str]:
        lines = [_one_line(line) for line in text.splitlines() if line.strip()]
        return [" ".join(lines)] if self.settings.disable_multiline_split else lines

    def _clean(self, caption: str) -> str:
        for _, new, pattern in self.filters:
            caption = pattern.sub(new, caption)
        caption = " ".join(caption.split()).strip(" ,") if self.filters else caption.strip()
        if caption and self.settings.prepend_instance_prompt:
            return f"{self.settings.instance_prompt} {caption}"
        return caption

    def _variants(self, caption: str) -> list[str]:
        parts = [part.strip() for part in caption.split(",") if part.strip()]
        if not self.settings.caption_shuffle or len(parts) < 2:
            return [caption]
        orders = [caption]
        for number in range(1, SHUFFLES):
            order = list(parts)
            random.Random(derive_seed(0, "caption_shuffle", caption, number)).shuffle(order)
            orders.append(", ".join(order))
        return orders


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _compile_filter(dataset: str, line: str) -> tuple[str, str, re.Pattern[str]]:
    substitution = SUBSTITUTION.fullmatch(line.strip())
    if substitution is None:
        return line, "", re.compile(re.escape(line))
    old, new = (part.replace("\\/", "/") for part in substitution.groups())
    try:
        pattern = re.compile(old)
        pattern.sub(new, "")  # the replacement may name groups that are not there
        return line, new, pattern
    except (re.error, RecursionError, OverflowError, IndexError) as error:
        raise UserError(
            f"data.{dataset}.caption_filter_list has {line!r}, which is no regular expression: {error}",
            "mend the pattern between the first two slashes, or give the plain text that is to be cut out",
        ) from error
