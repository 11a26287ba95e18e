"""The kernels that a run computes with: TensorFloat-32 and the order of PyTorch's attention kernels."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError

logger = logging.getLogger(__name__)
FLASH3 = "flash3"
FLASH3_MODULE = "flash_attn_interface"
HOPPER = 9
ATTENTION = {
    FLASH3: SDPBackend.FLASH_ATTENTION,
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

    Raises:
        UserError: FlashAttention 3 is named, and card, package or PyTorch do not have it.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with ExitStack() as stack:
        if attention:
            backends = list(dict.fromkeys(ATTENTION[name] for name in attention))
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
        if FLASH3 in attention:
            stack.enter_context(_flash3(device))
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        if device.type == "cuda":
            order = ", ".join(attention) or "PyTorch's order"
            logger.info(f"kernels: fp32 {'rounded to TF32' if tf32 else 'in full'}; attention: {order}")
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def _flash3(device: torch.device) -> Iterator[None]:
    """Let FlashAttention 3 be PyTorch's flash kernel inside the block."""
    problem, remedy = _flash3_problem(device)
    if problem:
        raise UserError(f"attention_kernels = {FLASH3}: {problem}", f"{remedy}, or leave {FLASH3} out")
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def _flash3_problem(device: torch.device) -> tuple[str, str]:
    """Return what is missing for FlashAttention 3, and what to do; two empty texts if nothing is."""
    from torch.nn import attention

    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return f"{device} is no Hopper card (compute capability 9)", "choose a card of that kind"
    if not hasattr(attention, "activate_flash_attention_impl"):
        return f"PyTorch {torch.__version__} cannot be given other flash kernels", "install 2.11 or later"
    if importlib.util.find_spec(FLASH3_MODULE) is None:
        return (
            f"the package {FLASH3_MODULE} is not installed",
            "build it in FlashAttention's folder hopper",
        )
    return "", ""
