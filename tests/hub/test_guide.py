"""The code of docs/hub.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests.chain.chains import make_chain
from tests.hub.server import Hub
from tests.tiny_models import tiny, tiny_batch


def test_the_code_in_the_guide_runs(hub: Hub, tmp_path: Path) -> None:
    stock = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    stock.save_pretrained(tmp_path)
    hub.put("friend/plain-lora", {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "hub.md").read_text(), re.S)
    model = make_chain(tasks={"mood": {}, "topic": {}})
    names = {"model": model, "base": fresh(), "fresh": fresh}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/hub.md, block {number + 1}", "exec"), names)
        if number == 1:
            found = names["model"]
            with torch.no_grad():
                batch = tiny_batch(model)
                torch.testing.assert_close(found(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)
    assert len(blocks) == 6 and list(names["model"].peft_config) == ["plain"]
    assert set(hub.repos) == {"you/support", "friend/more", "friend/more-urgency", "friend/plain-lora"}


def fresh() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny("llama").eval()
