"""The quickstart, from its first line to its last on two tiny tasks."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image

import peft_aso
from peft_aso import MERGES


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("bf16", [False, True])
def test_quickstart(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str, bf16: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr(quickstart, "bf16_is_faster", lambda: bf16)  # as on either kind of CPU
    line = f"--data {data} --tasks signs,colors --model {saved[name]} --out {tmp_path} --rank 8 --lr 0.02 --epochs 40"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *line.split(), "--batch-size", "5"])
    quickstart.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert results["tasks"] == ["signs", "colors"]
    assert results["precision"] == ("bf16" if bf16 else "float32")

    # the printed numbers, from which questions were answered right
    assert set(results["right"]) == {"one adapter for all tasks", "chain of adapters, merged"}
    for way, ((first,), last) in results["right"].items():
        assert len(first) == len(last[0]) == len(last[1]) == 6
        before, after, other = (100 * np.mean([int(each) for each in right]) for right in (first, *last))
        learned, end = printed.split(f"\n{way}\n")[1].splitlines()[:2]
        numbers = [before, other, after, other, (after + other) / 2, before - after, after - before]
        found = re.findall(r"-?\d+\.\d", learned + end)
        assert [float(number) for number in found] == pytest.approx(numbers, abs=0.06)
    single, chain = results["right"].values()
    assert single[0] == chain[0], "a first task is stock LoRA"
    assert "1" in single[0][0] + chain[1][1], "something was learned"
    assert results["right, task named"][0] == chain[0][0], "as right after learning"
    (named,) = re.findall(r"at the end, task named +(.*)", printed)
    learned = [100 * np.mean([int(each) for each in right]) for right in results["right, task named"]]
    assert [float(each) for each in named.split()] == pytest.approx([*learned, np.mean(learned), 0, 0], abs=0.06)
    w = results["similarity"]["colors"]["signs"]
    assert f"signs {w:.2f}" in printed and -1 <= w <= 1
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] >= 1600 and len(picture.convert("RGB").getcolors(1 << 24)) > 100

    # what to do next, as printed
    prompt = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": prompt, **({"decoder_input_ids": prompt} if name == "t5" else {})}
    logits = []
    for code in re.findall(r"model = (peft\S.*)", printed):
        base, _ = importlib.import_module("tasks").load_model(str(saved[name]))
        model = eval(code, {"peft": peft, "peft_aso": peft_aso, "base": base})
        logits.append(model.eval()(**inputs).logits)
    chain, served = logits
    assert not torch.allclose(chain, served, atol=1e-4), "merged by regmean, not summed"
    base, _ = importlib.import_module("tasks").load_model(str(saved[name]))
    merged = peft_aso.load_chain(base, tmp_path / "chain").merge_and_unload()
    torch.testing.assert_close(merged.eval()(**inputs).logits, served, rtol=1e-3, atol=1e-4)

    # and the ways to merge the chain, the demo's among them
    compare = importlib.import_module("compare_merges")
    monkeypatch.setattr(
        sys, "argv", ["compare", str(tmp_path / "chain"), "--data", str(data), "--model", str(saved[name])]
    )
    compare.main()
    rows = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == set(MERGES)
    at_end = [
        100 * np.mean([int(each) for each in right]) for right in results["right"]["chain of adapters, merged"][1]
    ]
    assert [float(each) for each in rows["soft_regmean"]] == pytest.approx([*at_end, np.mean(at_end)], abs=0.06)

    base, _ = importlib.import_module("tasks").load_model(str(saved[name]))
    assert not torch.allclose(base.eval()(**inputs).logits, served, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Glyph .* missing")  # where no font has them
def test_names_in_other_scripts_are_drawn(benchmark: Any, tmp_path: Path) -> None:
    quickstart = importlib.import_module("quickstart")
    names = ["情绪", "주제", "緊急度$x$"]
    matrix = [[50.0, None, None], [40.0, 60.0, None], [30.0, 50.0, 70.0]]
    similarities = {"주제": {"情绪": 0.1}, "緊急度$x$": {"情绪": -0.2, "주제": 0.3}}
    matrices = {quickstart.SINGLE: matrix, quickstart.CHAIN: matrix}
    quickstart.draw(names, matrices, [50.0, 60.0, 70.0], similarities, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
