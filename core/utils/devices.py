"""Choice of the device."""

from __future__ import annotations

from ..errors import UserError


def cuda_available() -> bool:
    """Return whether PyTorch sees a CUDA device (imports PyTorch)."""
    import torch

    return torch.cuda.is_available()


def resolve_device(device: str) -> str:
    """Return the device to use: for ``auto`` cuda, mps or cpu, whichever this machine has.

    Raises:
        UserError: The named device is not there.
    """
    import torch

    if device != "auto":
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device = {device!r}: this machine has no CUDA device", "use device=auto or device=cpu")
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
