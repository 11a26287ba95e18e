"""Model files: safetensors headers, content hashes; and quiet loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LFS_POINTER = b"version https://git-lfs"
"""What a file begins with that Git has put in the place of a large one."""
PIECES, PIECE_BYTES = 16, 8 * 2**10
"""Number and bytes of the pieces that are hashed of a tensor."""
HARMLESS = re.compile(
    r"should be kept in float32: \[\]"  # no module is
    r"|=None of type <class 'NoneType'> cannot be saved"  # a part that the model lacks, or that is written otherwise
    r"|Unable to import `torchao` Tensor objects"  # of a package that is there and not in use
    r"|ImageProcessor` requires torchvision"  # prepares images for CLIP's other half
)
"""Warnings of the libraries that say nothing about the result."""
WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""
CHUNKS, CHUNK_BYTES = 1024, 64 * 2**10
"""Number and bytes of the evenly spaced pieces hashed of larger files: any change longer than size / 1024 is seen."""


logger = logging.getLogger(__name__)


class _Forward(logging.Handler):
    """Says what a library warns of, except for what changes nothing here."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if not HARMLESS.search(message):
            logger.warning("%s: %s", record.name.partition(".")[0], message)


class _Harmless(logging.Filter):
    """Drops what changes nothing here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not HARMLESS.search(record.getMessage())


_HARMLESS = _Harmless()


def drop_harmless() -> None:
    """Leave out, from now on, what diffusers says of modules to keep in float32 where a network has none: it says so at
    every cast.
    """
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_HARMLESS)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and import-time advice of diffusers and transformers inside the block; pass warnings on."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as stack:
        for library in (diffusers_logging, transformers_logging):
            stack.enter_context(_forwarded(library, library.get_logger(library.__name__.partition(".")[0])))
        yield


@contextlib.contextmanager
def _forwarded(library: Any, root: logging.Logger) -> Iterator[None]:
    level, bar = library.get_verbosity(), library.is_progress_bar_enabled()
    handlers, forward = list(root.handlers), _Forward(logging.WARNING)
    propagates, root.propagate = root.propagate, False
    root.handlers = [forward]
    if level != logging.WARNING:  # each change of a level empties the caches of all loggers
        library.set_verbosity_warning()
    library.disable_progress_bar()
    try:
        yield
    finally:
        root.handlers, root.propagate = handlers, propagates
        if level != logging.WARNING:
            library.set_verbosity(level)
        if bar:
            library.enable_progress_bar()


def read_header(path: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file. Raises UserError when the file is none or is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks all of the header: lengths, types, and that no bytes are left
            pass
    except (SafetensorError, OSError) as error:
        _raise_for(path, error)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def _raise_for(path: Path, error: Exception) -> NoReturn:
    """Raise UserError for a file that the library refuses."""
    if "incomplete metadata" in str(error):
        found = f"is cut short, or goes on behind its end: {path.stat().st_size} bytes"
        raise UserError(f"{path} {found} ({error})", "download it again") from error
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the weights", "fetch them: git lfs pull") from error
    raise UserError(f"{path} is not a safetensors file ({error})", "download it again") from error


def hash_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents in order, of large files by 1,024 evenly spaced pieces."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for piece in range(CHUNKS):
                file.seek(piece * (size - CHUNK_BYTES) // (CHUNKS - 1))
                digest.update(file.read(CHUNK_BYTES))
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, type, shape and values, of large ones by evenly spaced pieces."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name};{tensor.dtype};{tuple(tensor.shape)};".encode())
        values = tensor.detach().contiguous().flatten().view(torch.uint8)
        if len(values) <= PIECES * PIECE_BYTES:
            digest.update(values.numpy().data)
            continue
        for piece in range(PIECES):
            start = piece * (len(values) - PIECE_BYTES) // (PIECES - 1)
            digest.update(values[start : start + PIECE_BYTES].numpy().data)
    return digest.hexdigest()
