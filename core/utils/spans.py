"""Named spans of a training step, for whoever measures it; they cost a look at one variable while nobody does.

A name is `what` (`data`, `averages`), or `what role` for what is done for one network: `forward teacher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Opener = Callable[[str], AbstractContextManager[object]]
STEP, DATA, FORWARD, FEATURES, BACKWARD = "step", "data", "forward", "features", "backward"
OPTIMIZER, REDUCTION, AVERAGES, METRICS = "optimizer", "reduction", "averages", "metrics"
_NOTHING = nullcontext()
_openers: list[Opener] = []


def span(what: str, role: str = "") -> AbstractContextManager[object]:
    """Return the context of a part of the step, which whoever measures opens and closes.

    Args:
        what: One of the names above.
        role: The network that it is done for.
    """
    if not _openers:
        return _NOTHING
    return _openers[-1](f"{what} {role}" if role else what)


@contextmanager
def measured_by(opener: Opener) -> Iterator[None]:
    """Have every span inside the block opened by `opener`, which is given its name."""
    _openers.append(opener)
    try:
        yield
    finally:
        _openers.remove(opener)
