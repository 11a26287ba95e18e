"""Tensors of safetensors files: by name and shape without their values, or read as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from .reading import read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALES = (".scale_weight", ".weight_scale")
"""Endings of the scale that belongs to ``<layer>.weight`` in eight bits."""
BESIDE_SCALES = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


def torch_dtype(name: str) -> torch.dtype | None:
    """Return torch's type for the name of one in a safetensors header; None where torch has none."""
    import torch

    named = {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
        **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    }
    return named.get(name)


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file.

    Attributes:
        path: The file.
        entries: Name -> ``dtype`` and ``shape``, from its header.
        metadata: Its header's strings.
    """

    path: Path
    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> WeightFile:
        """Read the header. Raises UserError when the file is no safetensors file, or is cut short."""
        header = read_header(path)
        metadata = header.pop("__metadata__", {})
        return cls(path, header, metadata)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, without the scales of weights in eight bits."""
        return [name for name in self.entries if not self._is_scale(name)]

    def _is_scale(self, name: str) -> bool:
        ending = next((ending for ending in BESIDE_SCALES if name.endswith(ending)), None)
        if ending is None:
            return name == "scaled_fp8"
        weight = self.entries.get(f"{name.removesuffix(ending)}.weight")
        return weight is not None and weight["dtype"] in EIGHT_BITS

    def shape(self, name: str) -> Tensor:
        """Return a tensor on the meta device with the shape and type of `name`."""
        import torch

        entry = self.entries[name]
        dtype = torch_dtype(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{self.path}: {name} is of type {entry['dtype']}, which is not read", "use the unquantised weights"
            )
        return torch.empty(entry["shape"], dtype=dtype, device="meta")

    @contextmanager
    def reader(self) -> Iterator[Any]:
        """Open the file for :meth:`read`."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as opened:
            yield opened

    def stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they are in the file."""
        with self.reader() as opened:
            return {name: opened.get_tensor(name) for name in names}

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read tensors; weights in eight bits that have a scale come back multiplied by it, as `dtype`."""
        with self.reader() as opened:
            return {name: self.read_one(opened, name, dtype) for name in names}

    def read_one(self, opened: Any, name: str, dtype: torch.dtype) -> Tensor:
        """Read one tensor as :meth:`read` does, from what :meth:`reader` gave."""
        tensor = opened.get_tensor(name)
        scale = self.scale_of(name)
        if scale is None:
            return tensor
        factor = opened.get_tensor(scale).float()
        if factor.numel() not in (1, len(tensor)):
            raise UserError(
                f"{self.path}: {scale} has {factor.numel()} values for {len(tensor)} rows of {name}, which is not read",
                "use the unquantised weights",
            )
        return (tensor.float() * factor.reshape(-1, *[1] * (tensor.ndim - 1))).to(dtype)

    def scale_of(self, name: str) -> str | None:
        """Return the name of the scale of a weight in eight bits; None where it has none."""
        if not name.endswith(".weight") or self.entries[name]["dtype"] not in EIGHT_BITS:
            return None
        layer = name.removesuffix(".weight")
        return next((layer + ending for ending in SCALES if layer + ending in self.entries), None)
