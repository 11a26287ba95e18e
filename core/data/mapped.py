"""Memory-mapped files of tensors: what is read from them need not stay in memory."""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}  # fmt: skip
_LIBC = ctypes.CDLL(None) if hasattr(mmap, "MADV_DONTNEED") else None  # None on Windows


def release(address: int, size: int) -> None:
    """Give the pages of a mapped file back to the system; nothing is lost, since a touch reads them again.

    It would take them when it needs memory, but until then they count as this process's.

    Args:
        address: Memory address of the mapping.
        size: Bytes of the file.
    """
    if _LIBC is not None:
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


class MappedShard:
    """The tensors of a safetensors file as views of the mapped file; pages are read when they are touched.

    Raises:
        ValueError: The file is not what it should be.
    """

    def __init__(self, path: Path, size: int) -> None:
        if path.stat().st_size != size:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {size}")
        whole = self._whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        length = int.from_bytes(whole[:8].numpy().tobytes(), "little")
        header = json.loads(whole[8 : 8 + length].numpy().tobytes())
        self.tensors: dict[str, Tensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            self.tensors[name] = whole[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def release(self) -> None:
        """Give the pages that were read back to the system."""
        release(self._whole.data_ptr(), self._whole.numel())
