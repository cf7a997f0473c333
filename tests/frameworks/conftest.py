"""Every loop in this folder is right, as users of a framework write it."""

import pytest


@pytest.fixture(autouse=True)
def _right_loops(hears_nothing: None) -> None:
    """No notice, unless a test asks for it."""
