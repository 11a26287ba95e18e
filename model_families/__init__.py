"""Model families: a teacher architecture and how to use it; one file each.

This page serves plugins that add a model of diffusers: the bases and the helpers of the built-in families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.utils.lazy import attributes

if TYPE_CHECKING:
    from .bases.diffusers import DiffusersFamily
    from .bases.one_encoder import OneEncoderFamily
    from .bases.transformer import TransformerFamily, check_flow
    from .bases.unet import UNetFamily
    from .calls.encoders import as_chat, last_states, penultimate, ragged, token_ids
    from .calls.packing import pack, patch_ids, text_ids, unpack
    from .described.small_copy import write_small_copy
    from .files.architecture import Architecture, FilePart, SingleFile
    from .files.checks import check_channels, check_unet

__all__ = [
    "Architecture",
    "DiffusersFamily",
    "FilePart",
    "OneEncoderFamily",
    "SingleFile",
    "TransformerFamily",
    "UNetFamily",
    "as_chat",
    "check_channels",
    "check_flow",
    "check_unet",
    "last_states",
    "pack",
    "patch_ids",
    "penultimate",
    "ragged",
    "text_ids",
    "token_ids",
    "unpack",
    "write_small_copy",
]

_HOMES = {
    "files.architecture": "Architecture FilePart SingleFile",
    "files.checks": "check_channels check_unet",
    "bases.diffusers": "DiffusersFamily",
    "calls.encoders": "as_chat last_states penultimate ragged token_ids",
    "bases.one_encoder": "OneEncoderFamily",
    "calls.packing": "pack patch_ids text_ids unpack",
    "described.small_copy": "write_small_copy",
    "bases.transformer": "TransformerFamily check_flow",
    "bases.unet": "UNetFamily",
}

__getattr__ = attributes(__name__, _HOMES)
