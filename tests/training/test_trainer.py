"""The Trainer: what the penalty does to the loss, and what accumulation, resuming and saving must not do."""

from __future__ import annotations

import itertools
import json
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BertForQuestionAnswering, BertForTokenClassification, Trainer, TrainerCallback

from peft_aso import ASOLoraConfig, ASOSeq2SeqTrainer, ASOTrainer, ASOTrainerMixin, AttributionConfig, HistoryError
from tests.tiny_models import tiny
from tests.training.tools import TinyTask, arguments, chain, config, distance, randomize, train, weights

NO_SIMILARITY = AttributionConfig(similarity="none")


def test_the_first_task_is_stock_lora_bit_for_bit(tmp_path: Path) -> None:
    results = []
    for settings, trainer_class in ((LoraConfig, Trainer), (ASOLoraConfig, ASOTrainer)):
        torch.manual_seed(5)
        lora = settings(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM")
        model = get_peft_model(tiny("llama"), lora, adapter_name="first")
        state = train(model, tmp_path, kind=trainer_class, max_steps=10).state
        logged = [(entry.get("loss"), entry.get("grad_norm")) for entry in state.log_history]
        results.append((weights(model, "first"), [*logged, state.total_flos]))
    (stock, log), (ours, our_log) = results
    assert distance(stock, ours) == 0 and log == our_log
    assert any(value.abs().sum() > 0 for name, value in stock.items() if "lora_B" in name)


@pytest.mark.parametrize("penalty", ["squared", "l1"])
def test_the_loss_is_the_trainers_plus_lambda_times_eq_7_in_training_only(tmp_path: Path, penalty: str) -> None:
    model = chain(tasks=("one", "two", "new"), penalty=penalty, penalty_weight=3.0, l2_weight=0.25)
    psi = {"one": 0.5, "two": 1.25}
    model.base_model.set_soft_coefficients(psi)
    given = {"model": model, "args": arguments(tmp_path), "train_dataset": TinyTask(model)}
    stock, ours = Trainer(**given), ASOTrainer(**given)
    ours.current_gradient_accumulation_steps = 1
    batch = next(iter(ours.get_train_dataloader()))
    term = norms = 0.0
    for layer in model.base_model.lora_layers().values():
        new = layer.lora_A["new"].weight
        norms += new.norm().item() + layer.lora_B["new"].weight.norm().item()
        for task, old_row, new_row in itertools.product(psi, range(4), range(4)):
            product = psi[task] * (layer.lora_A[task].weight[old_row] @ new[new_row]).item()
            term += product**2 if penalty == "squared" else abs(product)
    model.train()
    loss = stock.compute_loss(model, dict(batch)).item()
    assert ours.compute_loss(model, dict(batch)).item() == pytest.approx(loss + 3 * term + 0.25 * norms, rel=1e-5)
    model.eval()
    assert ours.compute_loss(model, dict(batch)).item() == pytest.approx(stock.compute_loss(model, batch).item())


def test_the_history_stays_bit_for_bit_and_the_parts_of_the_loss_are_logged(tmp_path: Path) -> None:
    model = chain(tasks=("one", "two", "new"), lora_dropout=0.1, penalty_weight=0.5)
    before = {name: weights(model, name) for name in ("one", "two", "new")}
    trainer = train(model, tmp_path, logging_steps=2, gradient_accumulation_steps=2)
    moved = {name: distance(values, weights(model, name)) for name, values in before.items()}
    assert moved["one"] == moved["two"] == 0 and moved["new"] > 1e-3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:  # refreshed after each step
        for task in ("one", "two"):
            assert entry[f"psi/{task}"] == pytest.approx(1 - entry[f"similarity/{task}"], abs=1e-6)
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * entry["orthogonality_penalty"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_stock_trainer_warns_once_that_the_penalty_is_left_out(tmp_path: Path, optimizer: str) -> None:
    def warned(model: Any, kind: Any = Trainer) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"gradient_accumulation_steps": 2, "warmup_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
            train(model, tmp_path, kind=kind, optim=optimizer, **settings)
        return [str(each.message) for each in caught if "without the penalty" in str(each.message)]

    model = chain()
    (message,) = warned(model)
    assert "'second'" in message and all(f"{each}" in message for each in ("ASOTrainer", "penalty_weight=0"))
    model.set_adapter("second")
    assert warned(model) == []
    first = chain(tasks=("first",))
    for other in (chain(penalty_weight=0.0), chain(train_a=False), first):
        assert warned(other) == []
    assert warned(chain(), ASOTrainer) == []


@pytest.mark.parametrize("order", ["first", "summed", "after", "last micro-batch"])
def test_a_loop_that_adds_the_penalty_gets_no_warning(order: str, recwarn: pytest.WarningsRecorder) -> None:
    model = chain()
    batch, tuner = TinyTask(model).batch, model.base_model
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for step in range(6):
        penalty = tuner.orthogonality_penalty() if order == "first" else 0.0
        loss = model.train()(**batch).loss + penalty
        if order == "summed":
            loss = loss + tuner.orthogonality_penalty()
        loss.backward()
        if order == "after" or (order == "last micro-batch" and step % 3 == 2):
            tuner.orthogonality_penalty().backward()
        if order != "last micro-batch" or step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert not [each for each in recwarn if "without the penalty" in str(each.message)]


class Counting(Trainer):
    """As the documentation of transformers has it: a sum, divided by the count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        total = cross_entropy(outputs.logits.flatten(0, -2), inputs["labels"].flatten(), reduction="sum")
        return total / (num_items_in_batch if model.training else inputs["labels"].ne(-100).sum())


class Popping(Trainer):
    """The weighted loss of the documentation, which takes the labels out of the inputs and ignores the count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return cross_entropy(model(**inputs).logits, labels, label_smoothing=0.2)


class Divided(Popping):
    loss_is_scaled_for_ga = True

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / self.current_gradient_accumulation_steps


def counted_loss(outputs, labels, num_items_in_batch=None):
    shifted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(*shifted, reduction="sum") / num_items_in_batch


ACCUMULATED: dict[str, tuple[str, type, dict[str, Any], dict[str, Any]]] = {
    "counts": ("llama", ASOTrainer, {}, {}),
    "counts, some micro-batches have no labels": ("llama", ASOTrainer, {}, {}),
    "ignores the count": ("t5", ASOSeq2SeqTrainer, {}, {}),
    "has a head": ("bert", ASOTrainer, {}, {}),
    "label smoothing": ("llama", ASOTrainer, {"label_smoothing_factor": 0.1}, {}),
    "ignores the count, l1": ("t5", ASOSeq2SeqTrainer, {}, {}),
    "compute_loss_func": ("llama", ASOTrainer, {}, {"compute_loss_func": counted_loss}),
    "own loss that counts": ("bert", type("Own", (ASOTrainerMixin, Counting), {}), {}, {}),
    "own loss that counts, T5": ("t5", type("Own", (ASOTrainerMixin, Counting), {}), {}, {}),
    "own loss that pops the labels": ("bert", type("Own", (ASOTrainerMixin, Popping), {}), {}, {}),
    "own loss that divides": ("bert", type("Own", (ASOTrainerMixin, Divided), {}), {}, {}),
}
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 2}


@pytest.mark.parametrize("case", ACCUMULATED)
def test_gradient_accumulation_changes_nothing(tmp_path: Path, case: str) -> None:
    name, kind, settings, more = ACCUMULATED[case]
    if "kwargs" not in signature(type(tiny(name)).forward).parameters:
        pytest.skip("transformers 4 weighs micro-batches of BERT and T5 alike (docs/compatibility.md): use 5 or newer")
    penalty = "l1" if "l1" in case else "squared"
    results = []
    for parts in (1, 4):
        model = chain(name, penalty=penalty, penalty_weight=0.5, l2_weight=0.01)
        data = TinyTask(model, size=32)
        if "no labels" in case:
            data.batch["labels"][::2] = -100
        sizes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        train(model, tmp_path, data, kind, more=more, **SGD, **sizes, **settings)
        results.append(weights(model, "second"))
    assert distance(weights(chain(name), "second"), results[0]) > 1e-3
    assert distance(*results) < 1e-5


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16", "torch_compile"])
def test_training_options_give_the_same_weights(tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 sets it for bf16, and leaves it set
    more = {
        "torch_compile": {"torch_compile_backend": "aot_eager"},
        "gradient_checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},  # 5's default
    }
    usual, other = chain(), chain()
    train(usual, tmp_path, max_steps=3, optim="sgd")
    train(other, tmp_path, max_steps=3, optim="sgd", **{option: True}, **more.get(option, {}))
    moved = distance(weights(chain(), "second"), weights(usual, "second"))
    off = distance(weights(usual, "second"), weights(other, "second"))
    assert moved > 1e-4 and off < (0.1 * moved if option == "bf16" else 1e-5)


def test_a_loss_without_a_gradient_is_refused_since_the_penalty_alone_would_be_trained(tmp_path: Path) -> None:
    class Detached(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs).detach()

    with pytest.raises(ValueError, match="no gradient.*use_reentrant"):
        train(chain(), tmp_path, kind=type("Own", (ASOTrainerMixin, Detached), {}))


def test_fsdp1_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=1), raising=False)
    with pytest.raises(ValueError, match="FSDP1 flattens the weights"):
        train(chain(), tmp_path)


@pytest.mark.parametrize("head", [BertForTokenClassification, BertForQuestionAnswering])
def test_heads_for_tokens_and_spans_are_trained(tmp_path: Path, head: type) -> None:
    spans = head is BertForQuestionAnswering
    settings = config("bert", task_type="QUESTION_ANS" if spans else "TOKEN_CLS", attribution=NO_SIMILARITY)
    model = get_peft_model(head(tiny("bert", num_labels=2).config), settings, adapter_name="first")
    randomize(model, "first", seed=1)
    model.add_adapter("second", settings)
    model.set_adapter("second")
    old, before, data = weights(model, "first"), weights(model, "second"), TinyTask(tiny("bert"))
    label, ids = data.batch.pop("labels") % 2, data.batch["input_ids"]
    data.batch.update({"start_positions": label, "end_positions": label + 1} if spans else {"labels": ids % 2})
    trainer = train(model, tmp_path, data)
    assert all(entry["orthogonality_penalty"] > 0 for entry in trainer.state.log_history[:4])
    assert distance(old, weights(model, "first")) == 0
    moved = {name for name, value in weights(model, "second").items() if not torch.equal(value, before[name])}
    assert any("qa_outputs" in name or "classifier" in name for name in moved) and any("lora_A" in n for n in moved)


SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_a_killed_and_resumed_run_ends_in_the_same_weights_bit_for_bit(tmp_path: Path, granularity: str) -> None:
    attribution = AttributionConfig(steps=2, probe_size=4, refresh=3, granularity=granularity)
    tasks = ("one", "two", "new")
    full, killed, resumed = (chain(tasks=tasks, attribution=attribution, lora_dropout=0.1) for _ in range(3))
    train(full, tmp_path / "full", max_steps=8, **SAVING)

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, tmp_path / "cut", max_steps=8, more={"callbacks": [Kill()]}, **SAVING)
    randomize(resumed, "new", seed=99)  # whatever it held, the checkpoint counts
    train(resumed, tmp_path / "cut", resume=True, max_steps=8, **SAVING)
    assert distance(weights(full, "new"), weights(resumed, "new")) == 0.0
    psi = resumed.base_model.soft_coefficients
    assert psi == full.base_model.soft_coefficients and psi["one"] != psi["two"]
    folder = tmp_path / "cut" / "checkpoint-8"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["soft_coefficients"] == psi and set(saved["similarities"]) == {"one", "two"}
    assert (saved["task_name"], saved["history"], saved["inference_mode"]) == ("new", ["one", "two"], True)
    assert not [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".part"], "the current task alone"


def test_the_checkpoint_or_trainer_of_another_task_or_history_is_refused(tmp_path: Path) -> None:
    model = chain()
    trainer = train(model, tmp_path, max_steps=2, **SAVING)
    other = chain(tasks=("first",))
    randomize(other, "first", seed=77)
    other.add_adapter("second", config("llama"))
    other.set_adapter("second")
    with pytest.raises(ValueError, match="other weights of its history"):
        train(other, tmp_path, resume=True)
    model.add_adapter("third", config("llama"))
    model.set_adapter("third")
    with pytest.raises(ValueError, match="is of task 'second'.*output_dir of its own"):
        train(model, tmp_path, resume=True)
    with pytest.raises(ValueError, match="none of the weights of 'third'.*new trainer"):
        trainer.train()  # its optimizer has the other task's weights


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = chain(penalty_weight=0.0)
    history = weights(model, "first")
    saved: dict[int, dict[str, torch.Tensor]] = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved[state.global_step] = weights(kwargs["model"], "second")

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    options |= {"load_best_model_at_end": True, "learning_rate": 0.5}  # so large that the last model is not the best
    best = train(model, tmp_path, more={"callbacks": [Remember()]}, **options).state.best_global_step
    assert best != 6
    assert distance(weights(model, "second"), saved[best]) == 0.0
    assert distance(weights(model, "first"), history) == 0.0


def test_bad_models_are_refused_before_training(tmp_path: Path) -> None:
    given = {"args": arguments(tmp_path), "train_dataset": TinyTask(tiny("llama"))}
    with pytest.raises(ValueError, match="get_peft_model"):
        ASOTrainer(model=tiny("llama"), **given)
    model = chain()
    model.set_adapter("first")
    with pytest.raises(ValueError, match="'first' is the history of 'second' and stays frozen"):
        ASOTrainer(model=model, **given)
    model.set_adapter("second", inference_mode=True)
    with pytest.raises(ValueError, match="loaded for inference"):
        ASOTrainer(model=model, **given)
    with pytest.raises(HistoryError, match="no module in common"):
        ASOTrainer(model=chain(target_modules=["o_proj"]), **given)
    ASOTrainer(model=chain(target_modules=["o_proj"], penalty_weight=0.0), **given)


BACK = {"merge_adapter": "unmerge_adapter", "disable_adapter_layers": "enable_adapter_layers"}


@pytest.mark.parametrize("leave", BACK)
def test_merged_or_disabled_adapters_are_refused(tmp_path: Path, leave: str) -> None:
    model = chain()
    given = {"model": model, "args": arguments(tmp_path), "train_dataset": TinyTask(model)}
    trainer = ASOTrainer(**given)
    getattr(model.base_model, leave)()
    if leave == "disable_adapter_layers":
        model.base_model.set_adapter("second")  # trains by name, and is still not in the forward pass
    before = weights(model, "second")
    for start in (lambda: ASOTrainer(**given), trainer.train):
        with pytest.raises(ValueError, match=rf"(merged|disabled).*\b{BACK[leave]}"):
            start()
    assert distance(before, weights(model, "second")) == 0
    getattr(model.base_model, BACK[leave])()
    trainer.train()
    assert all(value.any() for name, value in weights(model, "second").items() if "lora_B" in name)
