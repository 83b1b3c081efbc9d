"""What every line is given: one model and its copies, random adapters as files, random batches."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tasks import load_model  # examples/tasks.py

from peft_aso import ASOLoraConfig, load_chain

from .records import Record, Sameness, relative

Batch = dict[str, torch.Tensor]
FIRST_ID = 3  # the ids below may be special tokens
# The model of --quick: drawn wider than the library does, so that it tells its tokens apart.
TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512, "initializer_range": 0.2}


def task_name(index: int) -> str:
    return f"task{index}"


class Bench:
    """One model and the options.

    Args:
        name: "smollm2", or the folder or Hub id of a causal model; with --quick a tiny random Llama.
        options: the command line, with the sizes (benchmark.py).
        scratch: a folder for adapters.

    Attributes:
        model: in eval mode, without gradients; lines change copies of it (`fresh`).
        exact: whether it is in float32. In bfloat16 the two sides of a line round differently.
    """

    def __init__(self, name: str, options: argparse.Namespace, scratch: Path) -> None:
        self.name, self.options, self.scratch = name, options, scratch
        if options.quick:
            torch.manual_seed(0)
            model, self.tokenizer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), None
        else:
            model, self.tokenizer = load_model(name)
        self.model = model.to(device=options.device, dtype=getattr(torch, options.dtype)).eval().requires_grad_(False)
        self.exact = options.dtype == "float32"
        self.label = ("tiny " if options.quick else "") + name + ("" if self.exact else f" {options.dtype}")

    def record(self, line: str, what: str, against: str, ours: Any, theirs: Any = (), **more: Any) -> Record:
        return Record(line, self.label, what, against, list(ours), list(theirs), **more)

    def fresh(self) -> Any:
        """A copy of the model."""
        return copy.deepcopy(self.model)

    @cached_property
    def _targets(self) -> tuple[Any, dict[str, torch.Size]]:
        """The modules that PEFT targets by default, and the shapes of an adapter of rank 1."""
        model = get_peft_model(self.fresh(), LoraConfig(r=1))
        shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
        return model.peft_config["default"].target_modules, shapes

    def adapter(self, index: int, rank: int | None = None, stock: bool = False, **changes: Any) -> Path:
        """The folder of random adapter `index`: on top of all before it (`changes`: fields of its `ASOLoraConfig`), or
        stock LoRA with the same weights."""
        rank = rank or self.options.rank
        path = self.scratch / f"{'stock' if stock else 'aso'}-{rank}-{index}"
        if changes:
            path = Path(tempfile.mkdtemp(dir=self.scratch))
        elif path.exists():
            return path
        targets, shapes = self._targets
        settings = {"r": rank, "lora_alpha": 4 * rank, "target_modules": targets, "task_type": "CAUSAL_LM"}
        if not stock:
            settings |= {"task_name": task_name(index), "history": [task_name(old) for old in range(index)]} | changes
        (LoraConfig if stock else ASOLoraConfig)(**settings).save_pretrained(str(path))
        generator, weights = torch.Generator().manual_seed(index), {}
        for key, (rows, columns) in shapes.items():
            if "lora_A" in key:  # as PEFT starts it
                weights[key] = torch.randn(rank, columns, generator=generator) * (3 * columns) ** -0.5
            else:  # logits change, and 100 adapters leave a usable model
                weights[key] = torch.randn(rows, rank, generator=generator) * 2e-3
        save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return path

    def chain(self, tasks: int, base: Any = None, rank: int | None = None, **changes: Any) -> Any:
        """A chain of `tasks` random adapters; the newest trains, with `changes` in its config."""
        sources = [self.adapter(index, rank) for index in range(tasks - 1)]
        sources.append(self.adapter(tasks - 1, rank, **changes))
        return load_chain(self.fresh() if base is None else base, sources, trainable=True)

    def stock(self, tasks: Sequence[int], base: Any = None, active: bool = True) -> Any:
        """The same adapters in stock PEFT, loaded one after another; active: all are, and the newest trains."""
        names, model = [task_name(index) for index in tasks], self.fresh() if base is None else base
        folders = [self.adapter(index, stock=True) for index in tasks]
        model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0], is_trainable=True)
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(folder, name, is_trainable=True)
        if active:
            model.base_model.set_adapter(names)
            for name in names[:-1]:
                model.set_requires_grad(name, False)
        return model

    def tokens(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Random token ids, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(FIRST_ID, self.model.config.vocab_size, shape, generator=generator)

    @torch.no_grad()
    def prompts(self, length: int, answers: Sequence[int], seed: int = 0) -> Batch:
        """Prompts of `length` tokens, one row for each number in `answers`: how many tokens its answer has.

        The answer is the model's own first choice, token by token, so that its probability is that of a real answer.
        Rows are padded on the right.
        """
        ids = self.tokens((len(answers), length), seed).to(self.model.device)
        for _ in range(max(answers)):
            best = self.model(input_ids=ids).logits[:, -1, FIRST_ID:].argmax(-1, keepdim=True) + FIRST_ID
            ids = torch.cat([ids, best], 1)
        places, ends = torch.arange(ids.shape[1]), length + torch.tensor(answers)[:, None]
        mask = (places < ends).long().to(ids.device)
        labels = ids.masked_fill(((places < length) | (places >= ends)).to(ids.device), -100)
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}

    def step_batch(self) -> Batch:
        """What a training step is given: answers of one token."""
        return self.prompts(self.options.tokens - 1, [1] * self.options.batch)

    def same(self, ours: torch.Tensor, theirs: torch.Tensor, of: str, limit: float = 1e-4) -> Sameness:
        """Whether two results agree to `limit` of the largest value; in half precision, but for gross errors."""
        return Sameness(f"{of}, against the largest", relative(ours, theirs), limit if self.exact else 0.1)

    def same_logits(self, ours: Any, theirs: Any, of: str) -> Sameness:
        """Whether two models compute the same."""
        batch = self.step_batch()
        return self.same(logits(ours, batch), logits(theirs, batch), f"logits, {of}")


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    """In eval mode, without dropout; the model stays in it."""
    return model.eval()(**batch).logits
