"""What the method costs: attribution against a Captum loop, and a training step against stock PEFT.

    python examples/speed/benchmark.py --out runs/speed.json

Both sides of each line run in this process, one after the other in turn, and are first checked to compute the same
thing. Times are medians; the spread (fastest and slowest) is printed beside them. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum
import peft
import torch
import transformers
from captum.attr import IntegratedGradients
from peft import LoraConfig, get_peft_model

from peft_aso import ASOLoraConfig, compute_attribution
from peft_aso.attribution import find_neurons

sys.path.insert(0, str(Path(__file__).parent.parent))
from tasks import load_model  # noqa: E402


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Times of both, A B A B, so that a machine whose speed drifts is fair to both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, into in zip((first, second), times, strict=True):
            into += timed(function, 1)
    return times


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):8.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, n={len(seconds)})"


def captum_loop(model: Any, batch: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """The same scores by Captum's IntegratedGradients, a layer at a time, through a patched forward.

    One-token answers at the last position: P is the softmax probability of that token. Returns `(batch, N)`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    answers = batch["labels"][:, -1]
    results = []
    for layer in find_neurons(model):
        seen: list[torch.Tensor] = []
        hook = layer.module.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0].detach()))
        with torch.no_grad():
            model(**inputs)
        hook.remove()

        def probability(
            neurons: torch.Tensor, whole: torch.Tensor = seen[0], place: Any = layer.module
        ) -> torch.Tensor:
            copies = len(neurons) // len(answers)

            def put(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                return (torch.cat([whole.repeat(copies, 1, 1)[:, :-2], neurons[:, None], args[0][:, -1:]], dim=1),)

            handle = place.register_forward_pre_hook(put)
            try:
                logits = model(**{name: value.repeat(copies, 1) for name, value in inputs.items()}).logits[:, -2]
            finally:
                handle.remove()
            return logits.float().softmax(-1).gather(1, answers.repeat(copies)[:, None])[:, 0]

        explain = IntegratedGradients(probability)
        results.append(explain.attribute(seen[0][:, -2], n_steps=steps, method="riemann_right").detach())
    return torch.cat(results, dim=1)


def prompt_batch(model: Any, tokens: int, examples: int) -> dict[str, torch.Tensor]:
    """Random prompts of `tokens` tokens, each with one answer token, the last: the model's own first choice."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(100, model.config.vocab_size - 100, (examples, tokens + 1), generator=generator)
    with torch.no_grad():
        ids[:, -1] = model(input_ids=ids[:, :-1]).logits[:, -1].argmax(-1)
    labels = ids.clone()
    labels[:, :-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def attribution_lines(model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    for tokens in args.tokens:
        batch = prompt_batch(model, tokens, args.examples)
        ours = compute_attribution(model, batch)  # the self-check runs here, once a model
        ours_s = timed(lambda batch=batch: compute_attribution(model, batch), args.repeats)
        start = time.perf_counter()
        theirs = captum_loop(model, batch, steps=20)
        captum_s = [time.perf_counter() - start]
        ours_s += timed(lambda batch=batch: compute_attribution(model, batch), args.repeats)
        difference = ((ours.scores - theirs).abs().max() / theirs.abs().max()).item()
        line = {
            "what": "attribution",
            "prompt tokens": tokens,
            "examples": args.examples,
            "ours": ours_s,
            "captum": captum_s,
            "ratio": statistics.median(captum_s) / statistics.median(ours_s),
            "largest difference / largest score": difference,
        }
        lines.append(line)
        print(f"\nattribution, all layers, m = 20, {args.examples} prompt(s) of {tokens} tokens, answers of one token")
        print(f"  peft-aso  {spread(ours_s)}\n  Captum    {spread(captum_s)}")
        print(
            f"  {line['ratio']:.0f} times faster; largest difference {difference:.1e} of the largest score",
            flush=True,
        )
    return lines


def fill(model: Any) -> None:
    """B is zero in a fresh adapter: give every adapter weights."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)


def step_of(model: Any, batch: dict[str, torch.Tensor], penalty: bool) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model.train()
        loss = model(**batch).loss
        if penalty:
            loss = loss + 0.5 * model.base_model.orthogonality_penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def chain_of(base: Any, config_class: type, history: int) -> Any:
    """`history` frozen adapters and one that trains, all in the forward pass."""
    names = [f"task{index}" for index in range(history + 1)]
    model = get_peft_model(base, config_class(r=8, lora_alpha=32, task_type="CAUSAL_LM"), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config_class(r=8, lora_alpha=32, task_type="CAUSAL_LM"))
    fill(model)
    if config_class is LoraConfig:
        model.base_model.set_adapter(names)
        for name in names[:-1]:
            model.set_requires_grad(name, False)
    else:
        model.set_adapter(names[-1])
    return model


def same_output(a: Any, b: Any, batch: dict[str, torch.Tensor]) -> float:
    b.load_state_dict(a.state_dict())
    a.eval(), b.eval()
    with torch.no_grad():
        return (a(**batch).logits - b(**batch).logits).abs().max().item()


def step_lines(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    for history in args.history:
        ours, stock = (chain_of(load_model(name)[0], kind, history) for kind in (ASOLoraConfig, LoraConfig))
        batch = prompt_batch(ours, 64, 8)
        difference = same_output(ours, stock, batch)
        ours_step, stock_step = step_of(ours, batch, penalty=True), step_of(stock, batch, penalty=False)
        ours_step(), stock_step()
        ours_s, stock_s = in_turn(ours_step, stock_step, args.repeats)
        ratio = statistics.median(ours_s) / statistics.median(stock_s)
        lines.append({"what": "step", "history": history, "ours": ours_s, "stock": stock_s, "ratio": ratio})
        print(f"\ntraining step, batch 8 x 64 tokens, {history} frozen adapter(s) of rank 8 and one that trains")
        print(f"  peft-aso, penalty included        {spread(ours_s)}")
        print(f"  stock PEFT, all active, no penalty {spread(stock_s)}")
        print(f"  ratio {ratio:.2f}; largest difference of the logits {difference:.1e}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder or Hub id of a causal model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256], help="prompt lengths")
    parser.add_argument("--examples", type=int, default=1, help="prompts attributed at once")
    parser.add_argument("--history", type=int, nargs="*", default=[1, 15, 50], help="numbers of frozen adapters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, captum)},
    }
    print(f"{args.model}, float32; {machine}")
    model = load_model(args.model)[0].eval()
    lines = attribution_lines(model, args)
    del model
    lines += step_lines(args.model, args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "lines": lines}, indent=2))
        print(f"\nWritten to {args.out}")


if __name__ == "__main__":
    main()
