"""The conformance suite: the promises of every kind of plugin, as checks.

``distill plugins check`` runs it; in a test of one's own::

    import pytest
    from distill.core.testing import NotApplicable, checks_of

    @pytest.mark.parametrize("check", checks_of(MyMethod), ids=str)
    def test_conformance(check):
        try:
            check.run()
        except NotApplicable as reason:
            pytest.skip(str(reason))

It needs no pytest itself, no network and no weights. torch and diffusers are imported when a check needs them.
"""

from __future__ import annotations

from .checks import Check, ConformanceError, NotApplicable
from .report import ConformanceReport, Outcome, check_plugin
from .suite import checks_of

__all__ = ["Check", "ConformanceError", "ConformanceReport", "NotApplicable", "Outcome", "check_plugin", "checks_of"]
