"""What every test shares: no network, few threads, a fixed seed, and a fresh one for those that ask."""

from __future__ import annotations

import os

# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import secrets
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: the first example pays for imports and warm-up, and the machine may be shared.
settings.register_profile("peft_aso", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("peft_aso")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models (handing work over costs more than it saves); two for the slow tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before) if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def precision() -> None:
    """`TrainingArguments(bf16=True)` of transformers 4 sets this for all that are made later in the process."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Torch's generator starts every test from the same number."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_seed(seed: None) -> int:
    """A new seed each run, also set in torch, for tests on inputs that nobody could fit by hand.

    Pytest shows the printed line when the test fails; the variable in it repeats the draw.
    """
    drawn = int(os.environ.get("PEFT_ASO_TEST_SEED") or secrets.randbelow(2**31))
    print(f"fresh seed: repeat this draw with PEFT_ASO_TEST_SEED={drawn}")
    torch.manual_seed(drawn)
    return drawn
