"""What the tests of the Hub share."""

from __future__ import annotations

import pytest
from huggingface_hub import constants


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may speak to the loopback, though the tests run offline; without Xet, which the server has not."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
