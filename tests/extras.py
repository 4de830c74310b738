"""Packages that some tests need and a bare machine lacks."""

from typing import Any

import pytest


def needs(module: str, extra: str, instead: str = "") -> Any:
    """A module from an extra of this package. Where it is missing, the test is skipped, with what covers its code."""
    __tracebackhide__ = True  # the report names the test
    reason = f"{module.partition('.')[0]} is not installed (make test EXTRAS={extra})"
    return pytest.importorskip(module, reason=f"{reason}; {instead}" if instead else reason)
