"""Names for target_modules that match just the wanted modules."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from peft_aso.chain import ChainError
from peft_aso.chain.targets import exact_targets

NAMES = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "x.h.0.mlp.c_proj", "head"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["h.0.attn.c_proj", "h.1.attn.c_proj"], ["attn.c_proj"]),
        (["head"], ["head"]),
        ([name for name in NAMES if "c_proj" in name], ["c_proj"]),
        (["h.1.mlp.c_proj"], ["1.mlp.c_proj"]),
        (["h.1.mlp.c_proj", "head"], ["1.mlp.c_proj", "head"]),
        (["x.h.0.mlp.c_proj"], ["x.h.0.mlp.c_proj"]),
        # a whole name that is the ending of another one: only an expression tells them apart
        (["h.0.mlp.c_proj"], r"h\.0\.mlp\.c_proj"),
    ],
)
def test_exact(wanted: list[str], expected: list[str] | str) -> None:
    config = LoraConfig()
    assert exact_targets(wanted, ["", *NAMES], config) == expected
    assert config.target_modules == (set(expected) if isinstance(expected, list) else expected)


def test_modules_that_are_saved_as_a_whole() -> None:
    with pytest.raises(ChainError, match=r"adapter on head, .*modules_to_save=\['head'\]"):
        exact_targets(["head", "h.1.mlp.c_proj"], NAMES, LoraConfig(modules_to_save=["head"]))
