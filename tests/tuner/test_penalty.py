"""The current task's penalty and psi, on a model's own adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from peft_aso import HistoryError
from peft_aso.tuner.layer import adapters_in, subspace_of
from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import TASKS, chain, config_for, fill, logits
from tests.tuner.test_orthogonality import equation_7

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def by_loops(model: Any, task: str, history: tuple[str, ...], psi: Any, form: str = "squared") -> float:
    layers = model.base_model.lora_layers()
    current = {name: subspace_of(layer, task) for name, layer in layers.items() if adapters_in(layer, [task])}
    rows = {
        name: [(t, subspace_of(layer, old)) for t, old in enumerate(history) if adapters_in(layer, [old])]
        for name, layer in layers.items()
    }
    return equation_7(rows, current, psi, form)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["v_proj", "embed_tokens"], "penalty": "l1"}),
        ("gpt2", {"target_modules": ["attn.c_attn"]}),
        ("t5", {"target_modules": ["q"]}),
    ],
)
def test_it_is_equation_7(kind: str, settings: dict[str, Any]):
    _, model = chain(kind, **settings)
    form = settings.get("penalty", "squared")
    found = model.base_model.orthogonality_penalty()
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(by_loops(model, CURRENT, HISTORY, lambda *_: 1.0, form), rel=1e-4)
    psi = {"dbpedia": 0.25, "amazon": 1.5}
    model.base_model.set_soft_coefficients(psi)
    found = model.base_model.orthogonality_penalty()
    expected = by_loops(model, CURRENT, HISTORY, lambda t, _: psi[HISTORY[t]], form)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_tasks_that_share_some_modules():
    model = get_peft_model(tiny("llama"), config_for("llama", r=3, target_modules=["q_proj"]), "dbpedia")
    model.add_adapter("amazon", config_for("llama", r=1, target_modules=["v_proj", "q_proj"]))
    model.add_adapter("agnews", config_for("llama", target_modules=["v_proj", "q_proj", "o_proj"]))
    model.set_adapter(CURRENT)
    fill(model, TASKS)
    model.base_model.set_soft_coefficients({"dbpedia": 2.0, "amazon": 0.5})
    expected = by_loops(model, CURRENT, HISTORY, lambda t, _: (2.0, 0.5)[t])
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)


def test_one_psi_a_layer():
    _, model = chain("llama")
    modules = {name: int(name.split(".")[2]) for name in model.base_model.lora_layers()}
    psi = {"dbpedia": [0.1, 0.5, 1.0], "amazon": torch.tensor([1.0, 0.0, 2.0])}
    model.base_model.set_soft_coefficients(psi, modules)
    expected = by_loops(model, CURRENT, HISTORY, lambda t, m: float(psi[HISTORY[t]][modules[m]]))
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)
    assert model.base_model.soft_coefficients["amazon"] == [1.0, 0.0, 2.0]
    model.base_model.set_soft_coefficients(psi, {next(iter(modules)): 0})
    with pytest.raises(ValueError, match="which layer these modules belong to"):
        model.base_model.orthogonality_penalty()


def test_it_reaches_the_current_a_alone():
    _, model = chain("llama")
    model.base_model.orthogonality_penalty().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in model.named_parameters() if f"lora_A.{CURRENT}." in name}
    assert reached == expected


def test_the_history_s_rows_are_stacked_once(monkeypatch: pytest.MonkeyPatch):
    from peft_aso.tuner import penalty as module

    made: list[Any] = []
    original = module.group_history
    monkeypatch.setattr(module, "group_history", lambda *args, **more: made.append(args) or original(*args, **more))
    _, model = chain("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model.base_model.orthogonality_penalty().backward()
        optimizer.step()
    assert len(made) == 1
    model.set_adapter(model.base_model.current_task)  # nothing changes
    model.base_model.orthogonality_penalty()
    assert len(made) == 1
    model.set_adapter("amazon")
    model.base_model.orthogonality_penalty()
    assert len(made) == 2


def _to_half_and_back(model: Any) -> None:
    model.half().float()


def _new_parameter(model: Any) -> None:
    layer = next(iter(model.base_model.lora_layers().values()))
    layer.lora_A["dbpedia"].weight = torch.nn.Parameter(layer.lora_A["dbpedia"].weight * 2, requires_grad=False)


def _in_place(model: Any) -> None:
    with torch.no_grad():
        next(iter(model.base_model.lora_layers().values())).lora_A["amazon"].weight.mul_(-3)


def _new_data(model: Any) -> None:
    weight = next(iter(model.base_model.lora_layers().values())).lora_A["amazon"].weight
    weight.data = weight.data * 3


def _new_module(model: Any) -> None:
    layer = next(iter(model.base_model.lora_layers().values()))
    new = torch.nn.Linear(layer.lora_A["amazon"].in_features, 2, bias=False).requires_grad_(False)
    layer.lora_A["amazon"] = new


@pytest.mark.parametrize("change", [_to_half_and_back, _new_parameter, _in_place, _new_data, _new_module])
@pytest.mark.parametrize("copied", [True, False])
def test_a_change_of_the_history_is_noticed(
    change: Any, copied: bool, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
):
    from peft_aso.tuner import orthogonality

    monkeypatch.setitem(orthogonality.COPY_BYTES, "cpu", 64 << 20 if copied else 0)
    _, model = chain("llama", target_modules=["q_proj", "down_proj"])
    fill(model, TASKS, fresh_seed)
    before = model.base_model.orthogonality_penalty().item()
    change(model)
    found = model.base_model.orthogonality_penalty().item()
    assert found != before
    assert found == pytest.approx(by_loops(model, CURRENT, HISTORY, lambda *_: 1.0), rel=1e-4)


def test_an_adapter_of_the_same_name_and_a_copied_model(fresh_seed: int):
    _, model = chain("llama", target_modules=["q_proj"])
    model.base_model.orthogonality_penalty()
    model.delete_adapter(CURRENT)
    model.delete_adapter("amazon")
    for name in ("amazon", CURRENT):
        model.add_adapter(name, config_for("llama", target_modules=["q_proj"]))
    model.set_adapter(CURRENT)
    fill(model, TASKS, fresh_seed)
    expected = by_loops(model, CURRENT, HISTORY, lambda *_: 1.0)
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)
    twin = copy.deepcopy(model)
    _in_place(twin)
    expected = by_loops(twin, CURRENT, HISTORY, lambda *_: 1.0)
    assert twin.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)
    twin.base_model.orthogonality_penalty().backward()
    assert all(p.grad is None for p in model.parameters())


def test_adapters_that_all_lie_in_memory_once(monkeypatch: pytest.MonkeyPatch, fresh_seed: int):
    """The history's rows become views of the blocks that the penalty reads: nothing is held twice, nothing changes."""
    from peft_aso.tuner import orthogonality

    monkeypatch.setitem(orthogonality.COPY_BYTES, "cpu", 0)
    _, model = chain("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = by_loops(model, CURRENT, HISTORY, lambda *_: 1.0)
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)
    groups = model.base_model._groups.held.groups
    blocks = {group.rows.untyped_storage().data_ptr() for group in groups}
    rows = [p for name, p in model.named_parameters() if "lora_A" in name and CURRENT not in name]
    assert {p.untyped_storage().data_ptr() for p in rows} == blocks
    assert sum(p.numel() for p in rows) == sum(group.rows.numel() for group in groups)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        rows[0].mul_(2)  # a write to a parameter is a write to the block
    expected = by_loops(model, CURRENT, HISTORY, lambda *_: 1.0)
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)


def test_rows_in_half_precision_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch):
    from peft_aso.tuner import orthogonality

    monkeypatch.setitem(orthogonality.COPY_BYTES, "cpu", 0)
    _, model = chain("llama")
    for name, parameter in model.named_parameters():
        if "lora_A" in name and CURRENT not in name:
            parameter.data = parameter.data.bfloat16()
    expected = by_loops(model, CURRENT, HISTORY, lambda *_: 1.0)
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)
    own = {p.data_ptr() for p in model.parameters()}
    groups = model.base_model._groups.held.groups
    assert all(group.rows is None for group in groups)
    assert all(part.data_ptr() in own for group in groups for parts in group.parts for part in parts)


def test_a_chain_whose_rows_lie_together_is_saved_and_copied_as_ever(tmp_path: Path):
    base, model = chain("llama")
    model.base_model.orthogonality_penalty()
    model.save_pretrained(tmp_path)
    for task in HISTORY:
        saved = load_file(tmp_path / task / "adapter_model.safetensors")
        own = get_peft_model_state_dict(model, adapter_name=task)
        assert all(torch.equal(saved[key], own[key]) for key in own)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in twin.named_parameters() if f"lora_A.{HISTORY[0]}" in name).zero_()
    expected = by_loops(model, CURRENT, HISTORY, lambda *_: 1.0)
    assert model.base_model.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-4)


def test_it_follows_the_active_task_also_in_a_context():
    _, model = chain("llama")
    with model.base_model.through("amazon"):
        found = model.base_model.orthogonality_penalty().item()
    assert found == pytest.approx(by_loops(model, "amazon", ("dbpedia",), lambda *_: 1.0), rel=1e-4)
    with model.base_model.through("dbpedia"):
        assert model.base_model.orthogonality_penalty().item() == 0


def test_no_shared_module_is_an_error_that_says_what_to_do():
    model = get_peft_model(tiny("llama"), config_for("llama", target_modules=["q_proj"]), "dbpedia")
    model.add_adapter("amazon", config_for("llama", target_modules=["v_proj"]))
    model.set_adapter("amazon")
    for call in (model.base_model.check_shared_modules, model.base_model.orthogonality_penalty):
        with pytest.raises(HistoryError, match="'dbpedia' and 'amazon' have no module in common.*weight=0"):
            call()
    logits(model)  # it runs all the same


def test_psi_by_task_or_adapter_name(tmp_path: Path):
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "dbpedia")  # called "default"
    loaded.load_adapter(tmp_path / "amazon", adapter_name="second")
    loaded.load_adapter(tmp_path / CURRENT, adapter_name="third")
    loaded.set_adapter("third")
    for psi in ({"dbpedia": 0.5, "second": 0.25}, {"default": 0.5, "amazon": 0.25}):
        loaded.base_model.set_soft_coefficients(psi, similarities={"default": 0.5})
        assert loaded.base_model.soft_coefficients == {"default": 0.5, "second": 0.25}
        assert loaded.peft_config["third"].soft_coefficients == {"dbpedia": 0.5, "amazon": 0.25}
        assert loaded.peft_config["third"].similarities == {"dbpedia": 0.5}, "by task, as psi is"
    with pytest.raises(ValueError, match="Give one value for each"):
        loaded.base_model.set_soft_coefficients({"default": 0.5})
    with pytest.raises(ValueError, match="psi is given for"):
        loaded.base_model.set_soft_coefficients({"default": 0.5, "second": 1, "imdb": 1})


def test_psi_of_a_loaded_task_is_the_one_it_was_saved_with(tmp_path: Path):
    _, model = chain("llama")
    assert model.base_model.soft_coefficients == {"dbpedia": 1.0, "amazon": 1.0}
    model.base_model.set_soft_coefficients({"dbpedia": 0.5, "amazon": 0.25})
    penalty = model.base_model.orthogonality_penalty()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "dbpedia", adapter_name="first")
    loaded.load_adapter(tmp_path / "amazon", adapter_name="second")
    loaded.load_adapter(tmp_path / CURRENT, adapter_name="third")
    loaded.set_adapter("third")
    assert loaded.base_model.soft_coefficients == {"first": 0.5, "second": 0.25}
    torch.testing.assert_close(loaded.base_model.orthogonality_penalty(), penalty)
    loaded.set_adapter("second")
    assert loaded.base_model.soft_coefficients == {"first": 1.0}
    loaded.add_adapter("new", config_for("llama"))
    loaded.set_adapter("new")
    assert set(loaded.base_model.soft_coefficients.values()) == {1.0}


def test_norms_of_the_current_adapter():
    _, model = chain("llama")
    layers = model.base_model.lora_layers().values()
    expected = sum(m.weight.norm() for layer in layers for m in (layer.lora_A[CURRENT], layer.lora_B[CURRENT]))
    torch.testing.assert_close(model.base_model.norm_penalty(), expected)


# ---- gradient checkpointing and torch.compile
# ----------------------------------------------------------------


def _step(model: Any, forward: Any = None, psi: float = 0.5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step with the penalty."""
    model.zero_grad(set_to_none=True)
    model.base_model.set_soft_coefficients(dict.fromkeys(HISTORY, psi))
    run = model if forward is None else forward
    loss = run(**tiny_batch(model)).loss + 0.5 * model.base_model.orthogonality_penalty()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all(f".{CURRENT}." in name for name in grads)
    return loss.detach(), grads


def _assert_same_step(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool):
    _, model = chain(kind, base=tiny(kind, **({"dropout_rate": 0.0} if kind == "t5" else {})))
    expected = _step(model.train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _assert_same_step(_step(model.train()), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_give_the_same_and_psi_compiles_nothing_anew(backend: str):
    torch._dynamo.reset()
    _, model = chain("llama", base=tiny("llama", num_hidden_layers=1))
    expected = [_step(model.train(), psi=psi) for psi in (0.5, 0.75)]
    compiled = torch.compile(model, backend=backend)
    _assert_same_step(_step(model, compiled), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_same_step(_step(model, compiled, psi=0.75), expected[1])
        _assert_same_step(_step(model, compiled), expected[0])
    with torch.no_grad():  # the graph reads the history's weights, and keeps none
        for layer in model.base_model.lora_layers().values():
            layer.lora_B["dbpedia"].weight.mul_(2)
    changed = _step(model)
    assert not torch.allclose(changed[0], expected[0][0])
    _assert_same_step(_step(model, compiled), changed)
    torch._dynamo.reset()


def test_the_history_breaks_no_graph():
    torch._dynamo.reset()
    _, model = chain("llama", base=tiny("llama", num_hidden_layers=1))
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, tiny_batch(model)), logits(model, tiny_batch(model)))
    torch._dynamo.reset()


def test_a_compiled_step_with_the_penalty_in_it():
    torch._dynamo.reset()
    _, model = chain("llama", base=tiny("llama", num_hidden_layers=1))
    expected = [_step(model.train(), psi=psi) for psi in (0.5, 0.75)]

    @torch.compile(backend="eager")
    def step(**batch: Any) -> torch.Tensor:
        return model(**batch).loss + 0.5 * model.base_model.orthogonality_penalty()

    for index, psi in enumerate((0.5, 0.75)):
        model.zero_grad(set_to_none=True)
        model.base_model.set_soft_coefficients(dict.fromkeys(HISTORY, psi))
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            loss = step(**tiny_batch(model))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        _assert_same_step((loss.detach(), grads), expected[index])
    torch._dynamo.reset()
