"""The orthogonality penalty (Eq. 4-7) and its gradient, against the equation written out in loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_aso import HistoryError
from peft_aso.tuner.low_rank import LowRank
from peft_aso.tuner.penalties import PENALTIES, l1, register_penalty, squared
from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import CURRENT, HISTORY, TASKS, add, assert_close, chain, config_for, fill, gradients, logits

FORMS: dict[str, Callable[..., torch.Tensor]] = {"squared": squared, "l1": l1}


def equation_7(new: torch.Tensor, history: Sequence[torch.Tensor], psi: Sequence[float], form: str) -> torch.Tensor:
    """One module's sum_t sum_jk (psi_t (A_t^T A_T)[j,k])^2 in nested loops, in float64.

    The paper's A is in x r: column j of A_t is row j here.
    """
    total, new = torch.zeros((), dtype=torch.float64), new.double()
    for coefficient, old in zip(psi, history, strict=True):
        for column in old.double():
            for other in new:
                value = coefficient * (column * other).sum()
                total = total + (value * value if form == "squared" else abs(value))
    return total


def low_ranks(matrices: Sequence[torch.Tensor]) -> list[LowRank]:
    """With a B and a scale, which the penalty does not depend on."""
    return [LowRank(matrix, torch.randn(3, len(matrix)), 0.5 + number) for number, matrix in enumerate(matrices)]


@given(st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from(list(FORMS)))
@settings(max_examples=60)
def test_one_module_is_equation_7(seed: int, ranks: list[int], form: str):
    torch.manual_seed(seed)
    new, psi = torch.randn(1 + seed % 3, 1 + seed % 5), torch.randn(len(ranks))
    history = [torch.randn(rank, new.shape[1]) for rank in ranks]
    found = FORMS[form](low_ranks([new])[0], low_ranks(history), psi)
    expected = equation_7(new, history, psi.tolist(), form)
    assert found.shape == () and found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def moment_rows(x: torch.Tensor, directions: int) -> torch.Tensor:
    """What a task stores of inputs `(n, in)`: leading eigenvectors times the roots of their values, from an SVD."""
    _, singular, vectors = torch.linalg.svd(x.double(), full_matrices=False)
    scale = x.shape[1] ** 0.5 / singular.norm()
    return (vectors * singular[:, None] * scale)[:directions]


@given(st.integers(0, 2**31), st.integers(1, 3))
@settings(max_examples=30)
def test_penalties_of_other_methods_are_their_sums_in_loops(seed: int, tasks: int):
    torch.manual_seed(seed)
    psi, width = torch.randn(tasks, dtype=torch.float64), 5
    x = [torch.randn(40, width, dtype=torch.float64) * torch.rand(width).double() for _ in range(tasks)]
    history = [
        LowRank(torch.randn(2, width).double(), torch.randn(4, 2).double(), 0.5, moment_rows(each, width))
        for each in x
    ]
    new = LowRank(torch.randn(3, width).double(), torch.randn(4, 3).double(), 1.5)
    outputs = inputs = ella = sparse = 0.0
    for coefficient, old, rows in zip(psi.tolist(), history, x, strict=True):
        for column in old.B.T:
            for other in new.B.T:
                outputs += (coefficient * float(column @ other)) ** 2
        read = sum(float(a @ row) ** 2 for row in rows for a in new.A)
        inputs += coefficient**2 * read / float(rows.square().sum())
    for i in range(4):
        for j in range(width):
            step = 1.5 * float(new.B[i] @ new.A[:, j])
            past = sum(c * 0.5 * float(old.B[i] @ old.A[:, j]) for c, old in zip(psi.tolist(), history, strict=True))
            sparse, ella = sparse + abs(step), ella + (step * past) ** 2
    for name, expected in {"outputs": outputs, "inputs": inputs, "ella": ella, "n_lora": sparse}.items():
        assert PENALTIES[name].function(new, history, psi).item() == pytest.approx(expected, rel=1e-4), name


def test_directions_that_were_not_stored_have_the_mean_energy_of_the_rest(fresh_seed: int):
    """The penalty of a whole orthonormal A is the trace: 1, however many directions are stored."""
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    for directions in (1, 3, 6):
        stored = moment_rows(torch.randn(50, 6), directions).half()
        found = PENALTIES["inputs"].function(
            LowRank(basis, basis), [LowRank(basis, basis, 1.0, stored)], torch.ones(1)
        )
        assert found.item() == pytest.approx(1.0, rel=1e-3)


def test_a_penalty_without_a_history_acts_on_a_first_task():
    _, model = chain("llama", TASKS[:1], penalty="n_lora")
    layers = model.base_model.lora_layers().values()
    expected = sum(layer.get_delta_weight(TASKS[0]).abs().sum() for layer in layers)
    torch.testing.assert_close(model.base_model.orthogonality_penalty(), expected)
    assert model.base_model.has_penalty(TASKS[0]) and not model.base_model.uses_coefficients(TASKS[0])


def test_psi_1_and_l1_is_the_published_loss_of_o_lora():
    """Value and gradients of sum |A_old A_new^T| over a double loop of parameter names."""
    names = [f"encoder.block.{i}.SelfAttention.{p}" for i in range(3) for p in "qv"]
    old = {f"{name}.loranew_A_old": torch.randn(6, 10) for name in names}  # two tasks of rank 3, stacked
    new = {name: torch.randn(3, 10, requires_grad=True) for name in names}
    published, found = torch.zeros(()), torch.zeros(())
    for name, rows in old.items():
        for other, trained in new.items():
            if name.split(".loranew_A_old")[0] == other:
                published = published + torch.abs(torch.mm(rows, trained.T)).sum()
                found = found + l1(low_ranks([trained])[0], low_ranks([rows[:3], rows[3:]]), torch.ones(2))
    torch.testing.assert_close(found, published)
    ours, theirs = (torch.autograd.grad(loss, list(new.values())) for loss in (found, published))
    torch.testing.assert_close(ours, theirs)


Psi = Callable[[int, str], float]


def rows_of(layer: Any, task: str) -> torch.Tensor | None:
    if task in layer.lora_embedding_A:
        return layer.lora_embedding_A[task]
    return layer.lora_A[task].weight.flatten(1) if task in layer.lora_A else None


def by_loops(model: Any, psi: Psi = lambda *_: 1.0, form: str = "squared", task: str = CURRENT) -> torch.Tensor:
    """Eq. 7 over the modules of the model; `psi(t, module)` is the coefficient of earlier task t there."""
    total, history = torch.zeros((), dtype=torch.float64), TASKS[: TASKS.index(task)]
    for name, layer in model.base_model.lora_layers().items():
        old = {t: rows for t, other in enumerate(history) if (rows := rows_of(layer, other)) is not None}
        if (new := rows_of(layer, task)) is not None:
            total = total + equation_7(new, list(old.values()), [psi(t, name) for t in old], form)
    return total


def assert_penalty(model: Any, expected: torch.Tensor) -> torch.Tensor:
    """The model's penalty is this; returns it."""
    found = model.base_model.orthogonality_penalty()
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    return found


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_are_those_of_the_equation(form: str, precision: str, fresh_seed: int):
    """With ranks and target modules that differ; one module of the current task has no history."""
    more = {"r": 1, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 4}}
    last = {"target_modules": ["v_proj", "q_proj", "o_proj", "down_proj"], "use_rslora": True, "penalty": form}
    _, model = chain("llama", TASKS[:1], seed=fresh_seed, r=3, target_modules=["q_proj", "down_proj"])
    add(model, "amazon", config_for(**more), fresh_seed + 1)
    add(model, CURRENT, config_for(**last), fresh_seed + 2)
    model = model.bfloat16() if precision == "bfloat16" else model
    values = {"dbpedia": 0.25, "amazon": -1.5}
    model.base_model.set_soft_coefficients(values)
    for _ in range(2):  # the second time from what the first one prepared
        equation = by_loops(model, lambda t, _: values[HISTORY[t]], form)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            found = assert_penalty(model, equation)
        expected, grads = gradients(model, equation), gradients(model, 3.5 * found)
        assert {name for name, grad in grads.items() if grad.any()} == set(expected)
        # |x| has a kink: a product that is 0 to rounding may take either side
        tolerance = 1e-4 if (form, precision) == ("squared", "float32") else 0.05
        for name, grad in expected.items():
            assert (grads[name] - 3.5 * grad).norm() < tolerance * (3.5 * grad).norm()
        fill(model, [CURRENT], seed=3)  # as a step of the optimizer does


def layer_of(module: str) -> int:
    """By hand: the FFN layer of the module's block; an embedding goes with the first, a head with the last."""
    block = 2 if module == "lm_head" else 0 if "embed" in module else int(module.split(".")[2])
    return block + 2 * module.startswith("decoder")


NEURONS = {"llama": [f"model.layers.{i}.mlp.down_proj" for i in range(3)]}
NEURONS["t5"] = [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)]
NEURONS["t5"] += [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(3)]
TARGETS = {"llama": ["embed_tokens", "q_proj", "lm_head"], "t5": ["q", "v"], "gpt2": ["c_attn"], "bert": ["query"]}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_architecture_and_one_psi_a_layer(kind: str, form: str, fresh_seed: int):
    base = tiny(kind, tie_word_embeddings=False) if kind == "llama" else None
    _, model = chain(kind, base=base, seed=fresh_seed, target_modules=TARGETS[kind], penalty=form)
    assert_penalty(model, by_loops(model, form=form))
    if kind in NEURONS:
        config, count = model.peft_config[CURRENT], len(NEURONS[kind])
        config.attribution_layout = [[name, 24 * i, 24 * (i + 1)] for i, name in enumerate(NEURONS[kind])]
        psi = {"dbpedia": torch.rand(count), "amazon": [0.5 * i for i in range(count)]}
        model.base_model.set_soft_coefficients(psi)
        assert_penalty(model, by_loops(model, lambda t, module: float(psi[HISTORY[t]][layer_of(module)]), form))
        assert model.base_model.soft_coefficients["amazon"] == psi["amazon"] == config.soft_coefficients["amazon"]


def test_it_follows_the_active_task():
    _, model = chain("llama")
    with torch.no_grad(), model.base_model.through("amazon"):
        assert_penalty(model, by_loops(model, task="amazon"))
    model.set_adapter("amazon")  # active and frozen
    assert not assert_penalty(model, by_loops(model, task="amazon")).requires_grad
    model.set_adapter("dbpedia")
    assert model.base_model.orthogonality_penalty().item() == 0


def test_no_shared_module_is_an_error():
    model = get_peft_model(tiny("llama"), config_for(target_modules=["q_proj"]), "dbpedia")
    add(model, "amazon", config_for(target_modules=["v_proj"]))
    for call in (model.base_model.check_shared_modules, model.base_model.orthogonality_penalty):
        with pytest.raises(HistoryError, match="'dbpedia' and 'amazon'.*penalty_weight=0"):
            call()
    logits(model)  # it runs all the same


def test_norms_of_the_current_adapter():
    _, model = chain("llama")
    found, values = model.base_model.norm_penalty(), dict(model.named_parameters())
    torch.testing.assert_close(found, sum(values[name].norm() for name in values if f".{CURRENT}." in name))
    for name, grad in gradients(model, found).items():
        torch.testing.assert_close(grad, values[name] / values[name].norm())


def test_a_penalty_of_ones_own(monkeypatch: pytest.MonkeyPatch, fresh_seed: int):
    monkeypatch.setitem(PENALTIES, "of-b", None)  # taken out again at the end

    @register_penalty("of-b")
    def of_b(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
        """How much of what the new task writes was written by an earlier one, to the power of four."""
        terms = [psi[t] * (old.scale * old.B.T @ new.B).pow(4).sum() for t, old in enumerate(history)]
        return torch.stack(terms).sum()

    _, model = chain("llama", seed=fresh_seed, penalty="of-b")
    psi = {"dbpedia": 0.25, "amazon": 1.5}
    model.base_model.set_soft_coefficients(psi)
    found, expected = model.base_model.orthogonality_penalty(), torch.zeros(())
    for layer in model.base_model.lora_layers().values():
        for task in HISTORY:
            product = layer.lora_B[task].weight.T @ layer.lora_B[CURRENT].weight
            expected = expected + psi[task] * (layer.scaling[task] * product).pow(4).sum()
    torch.testing.assert_close(found, expected)
    assert {name.split(".lora_")[1] for name in gradients(model, found)} == {f"B.{CURRENT}.weight"}


def penalised_loss(model: Any, run: Any, **batch: Any) -> torch.Tensor:
    return run(**batch).loss + 0.5 * model.base_model.orthogonality_penalty()


def step(model: Any, psi: float = 0.5, loss_of: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step with the penalty."""
    model.base_model.set_soft_coefficients(dict.fromkeys(HISTORY, psi))
    loss = (loss_of or partial(penalised_loss, model, model))(**tiny_batch(model))
    grads = gradients(model, loss)
    assert grads and all(f".{CURRENT}." in name for name in grads)
    return loss.detach(), grads


assert_same_step = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("inside", "backend"), [(False, "eager"), (True, "aot_eager")])
def test_compiled_steps_are_the_same_and_psi_compiles_nothing_anew(backend: str, inside: bool):
    """With the penalty inside of the compiled function or outside; the history breaks no graph."""
    torch._dynamo.reset()
    _, model = chain("llama", base=tiny("llama", num_hidden_layers=1))
    if not inside:
        compiled = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)
        assert_close(logits(compiled, tiny_batch(model)), logits(model, tiny_batch(model)))
    expected = {psi: step(model.train(), psi=psi) for psi in (0.5, 0.75)}
    if inside:
        loss_of = torch.compile(partial(penalised_loss, model, model), backend=backend)
    else:
        loss_of = partial(penalised_loss, model, torch.compile(model, backend=backend))
    assert_same_step(step(model, 0.5, loss_of), expected[0.5])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for psi in (0.75, 0.5):
            assert_same_step(step(model, psi, loss_of), expected[psi])
    fill(model, HISTORY, seed=5)
    model.base_model.refresh_history()
    changed = step(model)
    assert not torch.allclose(changed[0], expected[0.5][0])
    assert_same_step(step(model, 0.5, loss_of), changed)
    torch._dynamo.reset()
