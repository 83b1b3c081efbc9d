"""Without TRL the package works, and says what to install when its trainer is asked for."""

from __future__ import annotations

import sys

import pytest

import peft_aso


def test_without_trl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "peft_aso.training.sft", raising=False)
    with pytest.raises(ImportError, match=r"pip install \"peft-aso\[trl\]\""):
        peft_aso.ASOSFTTrainer  # noqa: B018
