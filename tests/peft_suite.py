"""PEFT's own LoRA tests with its `LoraConfig` and with `ASOLoraConfig(history=[])` in its place: `make test-peft`.

This file is the script, and the pytest plugin of both runs of PEFT's `tests/test_custom_models.py`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from functools import partialmethod
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import peft
import transformers  # noqa: F401  (it looks for diffusers when it is imported: before there is a stub)

HERE, OUTCOMES = Path(__file__).resolve(), {}


def pytest_configure() -> None:
    """Our config in the place of PEFT's, and a stub for a package of which one name is imported and never used."""
    diffusers: Any = types.ModuleType("diffusers")
    diffusers.__spec__, diffusers.StableDiffusionPipeline = ModuleSpec("diffusers", None), type("Stub", (), {})
    sys.modules["diffusers"] = diffusers
    if os.environ["PEFT_SUITE"] == "ours":
        from peft_aso import ASOLoraConfig

        ASOLoraConfig.__init__ = partialmethod(ASOLoraConfig.__init__, history=[])
        peft.LoraConfig = ASOLoraConfig


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The LoRA cases: it is among the parameters, or the test names `LoraConfig` and takes no config."""

    def is_lora_case(item: Any) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else []
        flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
        classes = [part if isinstance(part, type) else type(part) for part in flat]
        if any(issubclass(cls, peft.PeftConfig) for cls in classes):
            return peft.LoraConfig in classes
        return re.search(r"\bLoraConfig\b", inspect.getsource(item.function)) is not None

    items[:] = filter(is_lora_case, items)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid.replace("ASOLoraConfig", "LoraConfig")] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["PEFT_SUITE"] + ".json").write_text(json.dumps(OUTCOMES))


def outcomes(which: str, root: Path) -> dict[str, str]:
    """Test -> "passed", "failed" or "skipped", with `"stock"` LoRA or with `"ours"`."""
    command = f"{sys.executable} -m pytest -q -p peft_suite -c {os.devnull} --rootdir . tests/test_custom_models.py"
    variables = {"PEFT_SUITE": which, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}", "HF_HUB_OFFLINE": "1"}
    with (root / f"{which}.log").open("w") as log:
        subprocess.run(command.split(), cwd=root, env={**os.environ, **variables}, stdout=log, check=False)
    return json.loads((root / f"{which}.json").read_text())


if __name__ == "__main__":
    archive = Path(sys.argv[1]).resolve()
    shutil.unpack_archive(archive, archive.parent, filter="data")
    folder = archive.with_name(archive.name.removesuffix(".tar.gz"))
    (folder / "tests" / "__init__.py").touch()  # its tests import one another relatively
    stock, ours = outcomes("stock", folder), outcomes("ours", folder)
    lost = [name for name, outcome in stock.items() if outcome == "passed" and ours.get(name) != "passed"]
    print("stock LoRA:", Counter(stock.values()), "ASOLoraConfig(history=[]):", Counter(ours.values()))
    print(f"{len(lost)} pass with stock LoRA only; tracebacks are in {folder}/ours.log", *lost, sep="\n  ")
