"""The code of docs/hub.md runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

from peft import LoraConfig, get_peft_model

from tests.chain.chains import make_chain, same_logits
from tests.chain.server import Hub
from tests.tiny_models import tiny


def test_the_code_in_the_guide_runs(hub: Hub, tmp_path: Path) -> None:
    stock = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    stock.save_pretrained(tmp_path)
    hub.put("friend/plain-lora", {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "hub.md").read_text(), re.S)
    model = make_chain(tasks={"mood": {}, "topic": {}})
    names = {"model": model, "base": tiny("llama"), "fresh": lambda: tiny("llama")}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/hub.md, block {number + 1}", "exec"), names)
        if number == 1:
            same_logits(names["model"], model)
    assert len(blocks) == 6 and list(names["model"].peft_config) == ["plain"]
    assert set(hub.repos) == {"you/support", "friend/more", "friend/more-urgency", "friend/plain-lora"}
