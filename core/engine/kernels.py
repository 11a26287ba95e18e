"""The kernels that a run computes with: TensorFloat-32 and the order of PyTorch's attention kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Name in the configuration -> PyTorch's."""


@contextmanager
def kernels(device: torch.device, *, tf32: bool, attention: Sequence[str]) -> Iterator[None]:
    """Compute with these kernels inside the block; say which on CUDA, where they differ.

    Without `tf32` products and convolutions in fp32 keep 23 bits. PyTorch's own default rounds convolutions to 10,
    which would undo what the first and last layers of a denoiser compute in fp32 for.

    Args:
        device: The run's.
        tf32: Whether fp32 products may round to TensorFloat-32.
        attention: Names of attention kernels in order of preference; those that are left out are not used. Empty:
            PyTorch's order.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with ExitStack() as stack:
        if attention:
            stack.enter_context(sdpa_kernel([ATTENTION[name] for name in attention], set_priority=True))
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        if device.type == "cuda":
            order = ", ".join(attention) or "PyTorch's order"
            logger.info(f"kernels: fp32 {'rounded to TF32' if tf32 else 'in full'}; attention: {order}")
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before
