"""Compares the tensors of a file with those of the network that its config describes; nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NAMED = 3
"""Number of tensors that a message names of each kind of difference."""
UNREAD = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked|attn_mask|logit_scale|lm_head\.weight)$"
    r"|^(vision_model|visual_projection)\."
)
"""Tensors that files of whole models hold and their networks do not read: what follows from the config, the image side
of CLIP, and the head of a language model whose states alone are read."""


@dataclass(frozen=True)
class Comparison:
    """The differences between a file's tensors and a network's.

    Attributes:
        total: Number of tensors of the network.
        missing: Names of the network's tensors that the file lacks.
        left_over: Names of the file's tensors that the network lacks.
        unlike: Sentences about tensors of another shape or type.
    """

    total: int
    missing: Sequence[str] = ()
    left_over: Sequence[str] = ()
    unlike: Sequence[str] = ()

    @property
    def problem(self) -> str | None:
        """The differences in one sentence, with counts and the first names; None where there are none."""
        found = [
            _counted(self.missing, f"of {self.total} tensors are missing"),
            _counted(self.left_over, "are left over"),
            _counted(self.unlike, "are of another shape or type"),
        ]
        return ", ".join(piece for piece in found if piece) or None


def compare(network: Any, tensors: Mapping[str, Tensor]) -> Comparison:
    """Return the differences between a network on the meta device and tensors by the network's own names.

    Args:
        network: Its shapes are compared; a parameter that it knows by several names needs only one of them.
        tensors: On any device; only their shapes and types are looked at.
    """
    expected = network.state_dict()
    names: dict[int, list[str]] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    shared = {name: same for same in names.values() for name in same}
    unread = [UNREAD, *(re.compile(pattern) for pattern in network._keys_to_ignore_on_load_unexpected or ())]
    return Comparison(
        len(expected),
        [name for name in expected if not any(one in tensors for one in shared.get(name, [name]))],
        [name for name in tensors if name not in expected and not any(pattern.search(name) for pattern in unread)],
        [
            said
            for name, found in tensors.items()
            if name in expected and (said := _unlike(name, found, expected[name]))
        ],
    )


def check_tensors(where: str, network: Any, tensors: Mapping[str, Tensor], *, remedy: str) -> None:
    """Raise UserError unless `tensors` are exactly those of `network`, which is on the meta device."""
    problem = compare(network, tensors).problem
    if problem is not None:
        raise UserError(f"{where}: the weights are not those that its config describes: {problem}", remedy)


def _unlike(name: str, found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"{name} {tuple(found.shape)} for {tuple(expected.shape)}"
    if expected.is_floating_point() and not found.is_floating_point():
        return f"{name} of {str(found.dtype).removeprefix('torch.')}, quantised"
    return None


def _counted(found: Sequence[str], what: str) -> str | None:
    if not found:
        return None
    named = "; ".join(found[:NAMED]) + ("; ..." if len(found) > NAMED else "")
    return f"{len(found)} {what} ({named})"
