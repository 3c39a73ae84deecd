"""Programs of others that judge what FedSpan writes; on a machine without one, the tests that ask it are skipped."""

import shutil

import pytest


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test where ``program`` is not installed."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
