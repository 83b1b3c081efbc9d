"""Load a chain of tasks onto a base model, take one adapter in as history, or update one task.

After any error the model is as it was.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm

from ..tuner import ASOLoraConfig, ASOLoraModel, HistoryError
from ..tuner.adapter_file import ATTRIBUTION_KEY, check_attribution, is_own_key, weights_hash
from ..tuner.history import (
    adapter_of,
    chain_obstacles,
    check_adapter_name,
    is_free,
    name_parts,
    oldest_first,
    task_name_of,
)
from ..tuner.layer import remove_adapter
from ..tuner.loading import add_loaded_adapters
from .export import PREFIX, base_weights
from .hub import ADAPTER_FILES, Access, Source, find, is_on_hub
from .manifest import (
    MANIFEST_NAME,
    AdapterFile,
    ChainError,
    Place,
    adapter_hash,
    check_task_name,
    mismatch,
    read_adapter,
    warn_or_raise,
    with_history,
)
from .save import adapter_for

Tensors = dict[str, torch.Tensor]

# settings that tell how the adapter is added up, and where
_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias")


def load_chain(
    base: nn.Module, source: Source | Sequence[Source], *, tasks: Sequence[str] | None = None, trainable: bool = False,
    strict: bool = True, autocast_adapter_dtype: bool = True, revision: str | None = None,
    token: str | bool | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
) -> Any:  # fmt: skip
    """Put all tasks of a chain onto a base model; the newest is active, on top of its history.

    From the Hub only `chain.json`, configs and safetensors are fetched, what a `chain.json` pins elsewhere at those
    commits. The commit that an adapter is from is written into its config (`origin`).

    Args:
        base: the base model, without adapters. It is changed in place, as by `get_peft_model`. Rows of new tokens at
            the end of its embeddings get the values that the chain was trained with.
        source: a folder written by `save_chain` or `model.save_pretrained`, the id of a repository on the Hub
            ("user/chain"), or a list of adapter folders and ids, oldest first.
        tasks: load only these tasks, and what they were trained on top of. None: all.
        trainable: whether the newest task can be trained on. Its history is frozen either way.
        strict: whether other weights or histories than in `chain.json`, or than a task was trained on top of, are an
            error; else a warning.
        autocast_adapter_dtype: as in PEFT: float32 adapter weights where the model is in half precision.
        revision, token, cache_dir, local_files_only: as in huggingface_hub; a revision of a single repository.

    Returns:
        The `PeftModel`, in eval mode unless trainable (then its mode is left as it was). Each adapter is called by its
        task's name.

    Raises:
        ChainError: files that are missing, unsafe, damaged or of another base model; a history that is missing, cyclic
            or has other weights; a name that cannot be used. The model is as before then.
        ValueError: a revision for more than one repository.
        huggingface_hub.errors.HfHubHTTPError: what goes wrong on the way from the Hub.
    """
    if revision is not None and not is_on_hub(source):
        raise ValueError("revision= is for one repository on the Hub. Histories are pinned by their chain.json.")
    if isinstance(base, PeftModel) or _has_adapters(base):
        raise ChainError("The base model has adapters already. Give the bare model, which model.unload() returns.")
    places = find(source, Access(revision, token, cache_dir, local_files_only), tasks)
    loaded = read_chain(places, tasks, strict, base)
    adapters = [adapter for adapter, _ in loaded]
    _warn_of_other_bases(adapters, base)
    newest = adapters[-1].name
    with _put_back_on_error(base, None, [adapter.name for adapter in adapters]):
        for adapter in adapters:
            adapter.config.task_name = adapter.name
            adapter.config.inference_mode = not (trainable and adapter.name == newest)
        model = _add(base, loaded, autocast_adapter_dtype)
        model.set_adapter(newest, inference_mode=not trainable)
    return model if trainable else model.eval()


def load_history(
    model: Any, source: Source, name: str | None = None, *, autocast_adapter_dtype: bool = True,
    revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:  # fmt: skip
    """Take an adapter in as history for the tasks that come: a stock LoRA adapter, or one of this package's.

    Args:
        model: a `PeftModel` with ASO_LORA adapters, or a bare base model, which is wrapped.
        source: the adapter's folder, or the id of a repository that has it at its root ("user/lora"). A stock adapter
            (peft_type LORA) gets an empty history.
        name: the task's name in the chain. None: the one in its config, else the folder's or repository's.
        autocast_adapter_dtype, revision, token, cache_dir, local_files_only: as `load_chain`.

    Returns:
        The `PeftModel`. What was active stays active, and what trained still trains. A model that had no adapter runs
        the loaded one, frozen.

    Raises:
        ChainError: as `load_chain`; an adapter that cannot be summed with others, a name that is taken, a history that
            is not in the model. The model is as before then.
    """
    is_bare = not isinstance(model, PeftModel)
    if not is_bare and not isinstance(model.base_model, ASOLoraModel) or is_bare and _has_adapters(model):
        raise ChainError("The model has adapters of another kind. Give the bare model, which model.unload() returns.")
    access = Access(revision, token, cache_dir, local_files_only)
    folder = access.snapshot(source, ADAPTER_FILES) if is_on_hub(source) else Path(source)
    adapter = read_adapter(Place(folder))
    if getattr(adapter.config, "task_name", None) is None and is_on_hub(source):
        name = name or source.split("/")[1]
    if name is not None:
        check_task_name(name, "The argument name")
        adapter = adapter._replace(name=name)
    inner = model if is_bare else model.base_model.model
    configs: Mapping[str, Any] = {} if is_bare else model.peft_config
    _check_name(adapter.name, inner)
    _refuse_obstacles(adapter)
    if adapter.name in configs or adapter_of(adapter.name, configs) is not None:
        raise ChainError(f"The model has a task called {adapter.name!r} already. Give another name=.")
    lacking = [task for task in adapter.history if adapter_of(task, configs) is None]
    if lacking:
        names = ", ".join(map(repr, lacking))
        raise ChainError(f"{adapter.name!r} was trained on top of {names}, which the model lacks. Load them first.")
    _warn_of_other_bases([adapter], inner)
    tensors, config = _checked(adapter, _hashes_in(model, adapter.history), strict=True), adapter.config
    if adapter.is_stock:
        settings = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        config = ASOLoraConfig(**settings, history=[])
    config.task_name, config.inference_mode = adapter.name, True
    modes, mode = {module: module.training for module in inner.modules()}, inner.training
    with _put_back_on_error(inner, None if is_bare else model, [adapter.name]):
        model = _add(model, [(adapter._replace(config=config), tensors)], autocast_adapter_dtype)
    for module in model.modules():
        module.training = modes.get(module, mode)  # new modules start in training mode
    return model


def update_task(
    model: Any, task: str, source: Source, *, strict: bool = True, revision: str | None = None,
    token: str | bool | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
) -> None:  # fmt: skip
    """Load another version of a task into its adapter, at its place in the chain.

    Tasks learned after it were trained with its old weights in the forward pass: test them. Their `history_hashes` get
    the new version's hash.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        task: which one, by its own or its adapter's name.
        source: a chain's folder or repository with that task.
        strict: whether other weights than `chain.json` names, or another history than the new version was trained on
            top of, are an error; else a warning.
        revision, token, cache_dir, local_files_only: as `load_chain`.

    Raises:
        ChainError: no such task in the model or there, merged adapters, files that cannot be read, an adapter of
            another rank, alpha or other modules, or one that was trained on top of others. The model is as before.
    """
    name = adapter_for(model, task)
    config = model.peft_config[name]
    task = task_name_of(name, config)
    places = find(source, Access(revision, token, cache_dir, local_files_only), [task])
    new = next((each for each in map(read_adapter, places) if each.name == task), None)
    if new is None:
        raise ChainError(f"There is no task {task!r} in {source}.")
    other = [key for key in _SAME if getattr(new.config, key) != getattr(config, key)]
    changes = [f"{key} {getattr(new.config, key)!r}, not {getattr(config, key)!r}" for key in other]
    if new.is_stock or changes:
        what = "a stock LoRA adapter, which belongs to no chain" if new.is_stock else ", ".join(changes)
        raise ChainError(f"{task!r} of {source} cannot replace the old one: {what}. Train it anew.")
    if new.history != list(config.history or []):
        there, here = new.history or "nothing", config.history or "nothing"
        raise ChainError(
            f"{task!r} of {source} was trained on top of {there}, and this one on {here}. Load that chain."
        )
    tensors = _checked(new, _hashes_in(model, new.history), strict)
    base = {key: weight.detach() for key, weight in base_weights(model.base_model.model).items()}
    with _explained([new]):
        tensors = fitting(model, name, new, tensors, base)
    model.base_model.attribution.pop(name, None)
    for field in ("similarities", "soft_coefficients", "attribution_layout", "history_hashes", "origin"):
        setattr(config, field, getattr(new.config, field))
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    for later in model.peft_config.values():
        if later.history_hashes and task in later.history_hashes:
            later.history_hashes[task] = adapter_hash(tensors, new.config)
    model.base_model.refresh_history()


def read_chain(
    places: Sequence[Place], tasks: Sequence[str] | None = None, strict: bool = True, base: nn.Module | None = None
) -> list[tuple[AdapterFile, Tensors]]:
    """The adapters of a chain, each after its history, with their tensors: all checks but the fit of the shapes.

    The names are checked against `base`, if it is given. Raises as `load_chain`.
    """
    adapters = in_order(_read(places, strict), tasks)
    taken = name_parts(base) if base is not None else ()
    for adapter in adapters:
        if base is not None and not is_free(adapter.name, taken):
            _check_name(adapter.name, base)
        if len(adapters) > 1:
            _refuse_obstacles(adapter)
    loaded, hashes = [], dict[str, str]()
    for adapter in tqdm(adapters, desc="Reading the chain", leave=False, disable=len(adapters) < 5):
        tensors = _checked(adapter, hashes, strict)
        hashes[adapter.name] = adapter_hash(tensors, adapter.config)
        loaded.append((adapter, tensors))
    return loaded


def verify_chain(
    places: Sequence[Place], bare: Callable[[AdapterFile], nn.Module] | None
) -> tuple[dict[str, str], str]:
    """What `load_chain` refuses: task -> what is wrong with it ("" if nothing), and what is wrong with the chain.

    `bare` makes the base model on the meta device, to check names and shapes.
    """
    checks = dict[str, str]()
    for place in places:  # every task is checked, whatever is wrong with the others
        task = place.entry["task"] if place.entry else place.path.name
        checks[task] = ""
        try:
            adapter = next(_read([place], strict=True))
            tensors = adapter.tensors()
            if len(places) > 1:
                _refuse_obstacles(adapter)
            checks[task] = mismatch(adapter, tensors) or ""
            if bare is not None:
                base = bare(adapter)
                _check_name(adapter.name, base)
                config = replace(adapter.config, history=[], history_hashes=None)
                _add(base, [(adapter._replace(config=config), tensors)], autocast=True)
        except ChainError as error:
            checks[task] = str(error)
    try:
        if not any(checks.values()):
            read_chain(places)
    except ChainError as error:
        return checks, str(error)
    return checks, ""


def _read(places: Iterable[Place], strict: bool) -> Iterator[AdapterFile]:
    """Read the adapters' configs. One that `chain.json` lists and that is not there is a warning unless strict."""
    for place in places:
        if place.entry and not os.path.lexists(place.path / CONFIG_NAME):
            task = place.entry["task"]
            warn_or_raise(f"{MANIFEST_NAME} lists the task {task!r}, and {place.path} is not there.", strict)
            continue
        adapter = read_adapter(place)
        if adapter.is_stock:
            raise ChainError(f"{place.path} is a stock LoRA adapter. Take it in with load_history first.")
        yield adapter


def in_order(adapters: Iterable[AdapterFile], tasks: Sequence[str] | None = None) -> list[AdapterFile]:
    """The adapters, each after its history; of those that are ready the first given goes first.

    With `tasks` only these and their histories, else all but the products of `add_weighted_adapter`. `ChainError` if
    there is no task, one is unknown or there twice, or a history is not there or a cycle.
    """
    by_name: dict[str, AdapterFile] = {}
    for adapter in adapters:
        place, known = adapter.place, by_name.setdefault(adapter.name, adapter)
        hashes = [entry and entry["sha256"] for entry in (place.entry, known.place.entry)]
        if known.place.pinned and not place.pinned:
            by_name[adapter.name] = adapter
        elif known is not adapter and not place.pinned and (hashes[0] is None or hashes[0] != hashes[1]):
            folders = f"{known.place.path} and {place.path}"
            text = f"Two folders hold a task called {adapter.name!r}: {folders}."
            raise ChainError(f"{text} Pass a list with one of them.")
    combined = [
        name for name, each in by_name.items() if not each.place.entry and getattr(each.config, "combined", None)
    ]
    if combined and tasks is None:
        text = f"{combined} of add_weighted_adapter are no tasks: they are left out. Name them in tasks= to load them."
        warnings.warn(text, stacklevel=3)
        by_name = {name: adapter for name, adapter in by_name.items() if name not in combined}
    histories = {name: adapter.history for name, adapter in by_name.items()}
    histories = {name: histories[name] for name in with_history(histories, tasks)}
    if not histories:
        raise ChainError("There is no task to load.")
    for name, history in histories.items():
        lacking = [task for task in history if task not in histories]
        if lacking:
            names = ", ".join(map(repr, lacking))
            raise ChainError(f"{name!r} was trained on top of {names}, which is not there. Add its folder.")
    try:
        order = oldest_first(histories)
    except HistoryError as error:
        raise ChainError(str(error)) from error
    return [by_name[name] for name in order]


def _checked(adapter: AdapterFile, hashes: Mapping[str, str], strict: bool) -> Tensors:
    """The adapter's tensors, compared with `chain.json` and its history (`hashes`: task -> what is there).

    A difference is a `ChainError` if strict, else a warning, and the config gets the hashes that are there.
    """
    tensors, config = adapter.tensors(), adapter.config
    if difference := mismatch(adapter, tensors):
        warn_or_raise(f"{adapter.name!r} in {adapter.place.path} has {difference}. Restore it.", strict)
    for task, digest in (getattr(config, "history_hashes", None) or {}).items():
        if hashes.get(task, digest) != digest:
            text = f"{adapter.name!r} was trained on top of {task!r} with the sha256 {digest}, not {hashes[task]}."
            warn_or_raise(f"{text} Load the version that it was trained on.", strict)
            config.history_hashes = {**config.history_hashes, task: hashes[task]}
    if adapter.place.origin is not None:
        config.origin = {**adapter.place.origin, "sha256": weights_hash(tensors, config)}
    return tensors


def _hashes_in(model: Any, tasks: Iterable[str]) -> dict[str, str]:
    """Task -> hash of its adapter in the model, if it is there."""
    holders = {task: adapter_of(task, getattr(model, "peft_config", {})) for task in tasks}
    return {task: model.base_model.adapter_hash(name) for task, name in holders.items() if name is not None}


def _has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _check_name(name: str, base: nn.Module) -> None:
    try:
        check_adapter_name(name, base)
    except ValueError as error:
        raise ChainError(f"{error} A saved task is renamed by task_name in its adapter_config.json.") from error


def _refuse_obstacles(adapter: AdapterFile) -> None:
    for reason in chain_obstacles(adapter.config):
        name = f"The adapter {adapter.name!r} ({adapter.place.path})"
        raise ChainError(f"{name} cannot be part of a chain of tasks: {reason}. Use it alone, with stock PEFT.")


def _warn_of_other_bases(adapters: Sequence[AdapterFile], base: nn.Module) -> None:
    """Two base models of the same shapes cannot be told apart by the weights: compare the names."""
    names = {adapter.config.base_model_name_or_path for adapter in adapters} - {None}
    own = base.__dict__.get("name_or_path") or None
    if own is not None and names - {own} or len(names) > 1:
        text = f"The adapters were trained on {', '.join(map(repr, sorted(names)))}, and this base model is {own!r}."
        warnings.warn(f"{text} The results are wrong if it is another one of the same shape.", stacklevel=3)


def _add(model: Any, adapters: Sequence[tuple[AdapterFile, Tensors]], autocast: bool) -> Any:
    """Add adapters, oldest first, to a bare model (which is wrapped) or to a `PeftModel`."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    base = base_weights(inner)
    if inner is not model:
        base = {name: weight.detach() for name, weight in base.items()}
    for attention in (name for name, module in inner.named_modules() if isinstance(module, nn.MultiheadAttention)):
        if any(key.startswith(f"{PREFIX}{attention}.lora_") for _, tensors in adapters for key in tensors):
            raise ChainError(f"{attention} is a MultiheadAttention, which cannot be part of a chain. Use PEFT alone.")
    with torch.random.fork_rng(devices=[]):  # PEFT initialises what is overwritten at once
        for is_simple, group in groupby(adapters, key=_is_simple):
            run = list(group)
            if not isinstance(model, PeftModel):
                model, run = _add_as_peft_does(model, *run[0], autocast, base), run[1:]
            # not with heads (classes for classifiers add one for each adapter), nor where something is merged
            has_heads = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
            has_heads |= type(model).add_adapter is not PeftModel.add_adapter
            if is_simple and run and not has_heads and not model.base_model.is_merged:
                with _explained([adapter for adapter, _ in run]):
                    found = {adapter.name: (adapter.config, tensors) for adapter, tensors in run}
                    add_loaded_adapters(model.base_model, found, autocast)
                continue
            for adapter, tensors in run:
                model = _add_as_peft_does(model, adapter, tensors, autocast, base)
    with torch.no_grad():
        for name, weight in base_weights(inner).items():
            if base[name].data_ptr() != weight.data_ptr():
                weight.copy_(base[name])
    return model


@contextmanager
def _explained(adapters: Sequence[AdapterFile]) -> Iterator[None]:
    """What PEFT raises about a config or tensors that it cannot take becomes a `ChainError` that names the adapter."""
    try:
        yield
    except ChainError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, re.error) as error:
        places = ", ".join(str(adapter.place.path) for adapter in adapters)
        text = f"An adapter does not fit this model, or its config is wrong: {error} It is in {places}"
        raise ChainError(f"{text}, for {adapters[0].config.base_model_name_or_path!r}.") from error


def _is_simple(loaded: tuple[AdapterFile, Tensors]) -> bool:
    """Whether an adapter is nothing but A and B of linear or convolution layers, for `add_loaded_adapters`."""
    config = loaded[0].config
    is_usual = config.init_lora_weights in (True, False, "gaussian", "orthogonal")
    if not is_usual or config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return False
    if config.modules_to_save or config.use_qalora or any(True for _ in chain_obstacles(config)):
        return False
    return all(".lora_A." in key or ".lora_B." in key for key in loaded[1] if not is_own_key(key))


def _add_as_peft_does(model: Any, adapter: AdapterFile, tensors: Tensors, autocast: bool, base: Tensors) -> Any:
    name, config = adapter.name, adapter.config
    with _explained([adapter]):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, autocast_adapter_dtype=autocast)
        else:  # PEFT would warn of another name here, for the first adapter only: done for all of them before
            config = copy.copy(config)
            config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
            model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=autocast)
        set_peft_model_state_dict(model, fitting(model, name, adapter, tensors, base), adapter_name=name)
        model.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast)
    return model


def fitting(model: Any, name: str, adapter: AdapterFile, tensors: Tensors, base: Tensors) -> Tensors:
    """The file's tensors for the adapter `name` of the model, which has tensors of the same names and shapes.

    PEFT saves weights of the base model too, with an adapter on an embedding or where the vocabulary was resized. They
    are compared with `base` and left out: all tasks share them. Where `base` has a parameter of which just the last
    rows differ, those of new tokens, the file's tensor takes its place, for this task and the later ones.
    A tensor that is missing, unknown, of another shape, or differs from the base model's is a `ChainError`.
    """
    copies = re.compile(r"\.(modules_to_save|original_module)\.")
    found = {key: tensor for key, tensor in tensors.items() if not copies.search(key)}
    stored = {key: found.pop(key) for key in [*found] if is_own_key(key)}
    own: Any = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {key: tensor for key, tensor in own.items() if not is_own_key(key)}
    where = f"The adapter {adapter.name!r} ({adapter.place.path}, for {adapter.config.base_model_name_or_path!r})"
    for key in sorted({*found, *own}):
        short = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        held = own.get(key, base.get(short))
        there, here = (None if each is None else tuple(each.shape) for each in (found.get(key), held))
        if there != here:
            text = f"{where} does not fit this model: {key} has the shape {there} in the file and {here} here."
            raise ChainError(f"{text} Heads need the same num_labels, added tokens model.resize_token_embeddings.")
        if key in own or held.is_meta:
            continue
        equal = _equal_rows(found[key], held.cpu())
        is_new = isinstance(held, nn.Parameter) and equal[0] and equal.sum() == equal.nonzero()[-1] + 1
        if not equal.all() and not is_new:
            raise ChainError(f"{where} has another {key} than the base model. Load the one that it was trained on.")
        base[short] = held.detach() if equal.all() else found[key]
    if ATTRIBUTION_KEY in stored:
        check_attribution(adapter.name, getattr(adapter.config, "attribution_layout", None), stored[ATTRIBUTION_KEY])
    return {key: each for key, each in found.items() if key in own} | stored


def _equal_rows(tensor: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Which rows are equal up to the rounding of the coarser of the two dtypes."""
    if held.is_floating_point() and tensor.is_floating_point():
        coarse = max(tensor.dtype, held.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        tensor, held = tensor.to(coarse), held.to(coarse)
    return (tensor == held).reshape(len(held) if held.dim() else 1, -1).all(1)


@contextmanager
def _put_back_on_error(base: nn.Module, model: Any, names: Sequence[str]) -> Iterator[None]:
    """After an error the model is as it was, without the new adapters."""
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C in a notebook too, where the model lives on
        if model is not None:
            for name in set(names) & set(model.peft_config):
                model.delete_adapter(name)
        else:
            for name in names:
                remove_adapter(base, name, [])
            base.__dict__.pop("peft_config", None)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
