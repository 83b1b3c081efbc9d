"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download, hf_api, utils
from transformers.utils import hub as transformers_hub

from tests.chain.chains import make_chain
from tests.chain.server import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server that the client takes for the Hub, logged in, with an empty cache; without Xet, which it has not."""
    server = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)  # made when it was imported
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # cached once it was made
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if hasattr(utils, "reset_sessions"):  # before huggingface_hub 1
        utils.reset_sessions()  # a session stays offline
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chain's folder as PEFT writes it, without chain.json, to be spoilt."""
    make_chain().save_pretrained(str(tmp_path / "chain"))
    return tmp_path / "chain"
