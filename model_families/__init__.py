"""Model families: a teacher architecture and how to use it; one file each.

This page serves plugins that add a model of diffusers: the bases and the helpers of the built-in families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.utils.lazy import attributes

if TYPE_CHECKING:
    from ._architecture import Architecture, FilePart, SingleFile
    from ._checks import check_channels, check_unet
    from ._diffusers import DiffusersFamily
    from ._encoders import as_chat, last_states, penultimate, ragged, token_ids
    from ._one_encoder import OneEncoderFamily
    from ._packing import pack, patch_ids, text_ids, unpack
    from ._small_copy import write_small_copy
    from ._transformer import TransformerFamily, check_flow
    from ._unet import UNetFamily

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
    "_architecture": "Architecture FilePart SingleFile",
    "_checks": "check_channels check_unet",
    "_diffusers": "DiffusersFamily",
    "_encoders": "as_chat last_states penultimate ragged token_ids",
    "_one_encoder": "OneEncoderFamily",
    "_packing": "pack patch_ids text_ids unpack",
    "_small_copy": "write_small_copy",
    "_transformer": "TransformerFamily check_flow",
    "_unet": "UNetFamily",
}

__getattr__ = attributes(__name__, _HOMES)
