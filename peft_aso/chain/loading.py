"""Load a chain of tasks onto a base model, or take one adapter in as history.

Everything that can be known from the files and the base model is checked before the model is touched; if PEFT
refuses something later on, the model is put back as it was.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm

from ..tuner import ASOLoraConfig, ASOLoraModel
from ..tuner.bulk import SavedAdapter, add_saved, fits_bulk, takes_bulk
from ..tuner.history import adapter_of, chain_obstacles, is_free, name_parts
from .beside import left_out_of
from .errors import ChainError
from .fitting import BaseView, check_fit, check_name
from .manifest import ROOT, Listing, check_hash, check_listing, read_listing
from .order import in_order
from .reading import AdapterFile, check_task_name, existing_folder, find_adapters, read_adapter, read_each

Manifest = Mapping[str, Mapping[str, Any]]  # task -> its entry in chain.json
_BAR_FROM = 5  # adapters; fewer load before a progress bar could be read


def load_adapters(
    base: nn.Module,
    found: Sequence[AdapterFile],
    manifest: Manifest,
    where: Path | str,
    *,
    tasks: Sequence[str] | None,
    trainable: bool,
    strict: bool,
    autocast_adapter_dtype: bool,
) -> Any:
    """What `peft_aso.load_chain` does with adapters that were found and read.

    Args:
        base, tasks, trainable, strict, autocast_adapter_dtype: as there.
        manifest: what is known of the tasks; a task whose weights or history differ is an error, if strict.
        where: that comes from, for messages.

    Returns:
        The `PeftModel`.

    Raises:
        ChainError: before the model is touched, as there.
    """
    if isinstance(base, PeftModel) or has_adapters(base):
        raise ChainError(
            "The base model has adapters already. Give load_chain the bare model (model.unload() returns "
            "it), or add a single adapter to this one with load_history or model.load_adapter."
        )
    adapters = _selected(found, manifest, where, tasks, strict)
    if not adapters:
        raise ChainError(f"There is no task to load in {where}.")
    taken = name_parts(base)
    for adapter in adapters:
        if not is_free(adapter.name, taken):
            check_name(adapter.name, base)
        if len(adapters) > 1:
            _refuse_obstacles(adapter)
    _warn_of_other_bases(adapters, base)
    weights, view = [], BaseView.of(base)
    for adapter in tqdm(adapters, desc="Reading the chain", leave=False, disable=len(adapters) < _BAR_FROM):
        tensors = adapter.weights()
        check_hash(adapter, tensors, manifest.get(adapter.name), strict)
        weights.append(check_fit(adapter, tensors, view))

    model: Any = base
    newest = adapters[-1].name
    with _put_back_on_error(base, None, newest):
        for adapter in adapters:
            adapter.config.task_name = adapter.name
            adapter.config.inference_mode = not (trainable and adapter.name == newest)
        model = _add_all(model, adapters, weights, autocast_adapter_dtype)
        model.set_adapter(newest, inference_mode=not trainable)
    return model if trainable else model.eval()


def load_history(
    model: Any,
    source: str | os.PathLike[str],
    name: str | None = None,
    fallback: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
) -> Any:
    """`load_history` from a folder; `fallback` is the name of an adapter that has none, in place of the folder's."""
    bare = not isinstance(model, PeftModel)
    if not bare and not isinstance(model.base_model, ASOLoraModel) or bare and has_adapters(model):
        raise ChainError(
            "The model has adapters of another kind. load_history takes a model with ASO_LORA adapters, or "
            "a bare base model (model.unload() returns it)."
        )
    adapter = read_adapter(existing_folder(source))
    if fallback is not None and getattr(adapter.config, "task_name", None) is None:
        name = name or fallback
    if name is not None:
        check_task_name(name, Path("The argument name"))
        adapter = replace(adapter, name=name)
    inner = model if bare else model.base_model.model
    check_name(adapter.name, inner)
    _refuse_obstacles(adapter)
    configs: Mapping[str, Any] = {} if bare else model.peft_config
    if adapter.name in configs or adapter_of(adapter.name, configs) is not None:
        raise ChainError(f"The model has a task called {adapter.name!r} already. Give another name=.")
    lacking = [task for task in adapter.history if adapter_of(task, configs) is None]
    if lacking:
        raise ChainError(
            f"{adapter.name!r} was trained on top of {', '.join(map(repr, lacking))}, which the model does "
            "not hold. Load those first, or the whole chain with load_chain."
        )
    _warn_of_other_bases([adapter], inner)
    weights = check_fit(adapter, adapter.weights(), BaseView.of(inner))
    adapter = replace(adapter, config=_as_chain_config(adapter))
    mode = inner.training
    modes = {module: module.training for module in inner.modules()}
    with _put_back_on_error(inner, None if bare else model, adapter.name):
        model = _add_all(model, [adapter], [weights], autocast_adapter_dtype)
    for module in model.modules():
        module.training = modes.get(module, mode)  # new modules start in training mode
    return model


class Found(NamedTuple):
    """What a chain's folder holds: adapters, the manifest's entries, and the folders that are left out."""

    adapters: list[AdapterFile]
    manifest: Manifest
    left_out: list[str]


def find_chain(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], damaged: dict[str, str] | None = None
) -> Found:
    """The adapters of a chain's folder, or of a list of folders, for which no manifest is read.

    Args:
        damaged: takes the message of each adapter whose config cannot be read, by its task's name. None: the first is
            an error.

    Raises:
        ChainError: no such folder, a damaged manifest, a config that cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return Found([read_adapter(path) for path in find_adapters(source)], {}, [])
    root = existing_folder(source)
    listing = read_listing(root) or Listing({}, [], {}, None)
    left_out = left_out_of(root, listing)
    places = {path: ROOT if path == root else path.name for path in find_adapters(root, [*listing.exports, *left_out])}
    names = {entry["folder"]: task for task, entry in listing.tasks.items() if "repo_id" not in entry}
    adapters = read_each([(names.get(place, place), path) for path, place in places.items()], damaged)
    return Found(adapters, listing.tasks, left_out)


def _selected(
    found: Sequence[AdapterFile], manifest: Manifest, where: Path | str, tasks: Sequence[str] | None, strict: bool
) -> list[AdapterFile]:
    """The adapters to load, oldest first."""
    for adapter in found:
        if adapter.is_stock:
            raise ChainError(
                f"{adapter.path} is a stock LoRA adapter, trained without a chain. Take it in with "
                "load_history first, train the tasks on top of it, and save the whole chain."
            )
    if manifest:
        check_listing(where, manifest, found, strict)
        place = {task: index for index, task in enumerate(manifest)}
        found = sorted(found, key=lambda adapter: place.get(adapter.name, len(place)))
    combined = [adapter for adapter in found if adapter.config.combined]
    if combined and tasks is None:
        warnings.warn(
            f"{[adapter.name for adapter in combined]} were made by add_weighted_adapter and are no tasks: "
            "they are left out. Load them with model.load_adapter, or name them in tasks=.",
            stacklevel=4,
        )
        found = [adapter for adapter in found if not adapter.config.combined]
    return in_order(found, tasks)


def has_adapters(model: nn.Module) -> bool:
    """True if PEFT has put adapter layers into the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _refuse_obstacles(adapter: AdapterFile) -> None:
    for reason in chain_obstacles(adapter.config):
        raise ChainError(
            f"The adapter {adapter.name!r} ({adapter.path}) cannot be part of a chain of tasks: {reason}. "
            "Train it without that setting, or use it alone, with PeftModel.from_pretrained."
        )


def _as_chain_config(adapter: AdapterFile) -> ASOLoraConfig:
    """The adapter's config as one of a task with a name; a stock LoRA's settings are all kept."""
    config = adapter.config
    if adapter.is_stock:
        names = [field.name for field in fields(LoraConfig) if field.init and field.name != "peft_type"]
        config = ASOLoraConfig(**{name: getattr(config, name) for name in names}, history=[])
    config.task_name = adapter.name
    config.inference_mode = True
    return config


def _warn_of_other_bases(adapters: Sequence[AdapterFile], base: nn.Module) -> None:
    """Two base models of the same shapes cannot be told apart by the weights: compare the names."""
    names = {adapter.config.base_model_name_or_path for adapter in adapters} - {None}
    own = base.__dict__.get("name_or_path") or None
    if own is not None and names - {own} or len(names) > 1:
        warnings.warn(
            f"The adapters say that they were trained on {', '.join(map(repr, sorted(names)))}; this base "
            f"model is called {own!r}. If it is another model of the same shape, the results will be wrong.",
            stacklevel=4,
        )


def _add_all(
    model: Any, adapters: Sequence[AdapterFile], weights: Sequence[Mapping[str, torch.Tensor]], autocast: bool
) -> Any:
    """Add checked adapters, oldest first, to a bare model (which is wrapped) or to a `PeftModel`."""
    saved = [
        SavedAdapter(adapter.name, adapter.config, tensors) for adapter, tensors in zip(adapters, weights, strict=True)
    ]
    paths = {adapter.name: adapter.path for adapter in adapters}
    bar = tqdm(total=len(saved), desc="Loading tasks", leave=False, disable=len(saved) < _BAR_FROM)
    with bar, torch.random.fork_rng(devices=[]):  # PEFT initialises some of what is overwritten at once
        for plain, group in groupby(saved, key=fits_bulk):
            run = list(group)
            if plain and not isinstance(model, PeftModel):
                model = _wrap(model, run[0], autocast, empty=True)
            # classes for classifiers have an add_adapter of their own, which adds a head for each adapter
            if plain and type(model).add_adapter is PeftModel.add_adapter and takes_bulk(model.base_model):
                add_saved(model.base_model, run, autocast=autocast, on_added=bar.update)
                continue
            for adapter in run:
                model = _add(model, adapter, paths[adapter.name], autocast)
                bar.update()
    return model


def _wrap(model: Any, adapter: SavedAdapter, autocast: bool, empty: bool) -> Any:
    """A bare model with the adapter in it, without its weights; `empty`: also without memory for them."""
    # PEFT would warn of another name here, for the first adapter only: done for all of them before
    adapter.config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    return get_peft_model(
        model,
        adapter.config,
        adapter_name=adapter.name,
        low_cpu_mem_usage=empty,
        autocast_adapter_dtype=autocast,
    )


def _add(model: Any, adapter: SavedAdapter, path: Path, autocast: bool) -> Any:
    """Add one checked adapter to a bare model (which is wrapped) or to a `PeftModel`, as PEFT does."""
    name = adapter.name
    if isinstance(model, PeftModel):
        model.add_adapter(name, adapter.config, autocast_adapter_dtype=autocast)
    else:
        model = _wrap(model, adapter, autocast, empty=False)
    result = set_peft_model_state_dict(model, dict(adapter.weights), adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
    if missing or result.unexpected_keys:
        raise ChainError(
            f"The adapter {name!r} ({path}) does not fit this model: the file lacks {missing[:3]} and has "
            f"{list(result.unexpected_keys)[:3]} too many. It was made for another base model."
        )
    model.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast)
    return model


@contextmanager
def _put_back_on_error(base: nn.Module, model: Any, name: str) -> Iterator[None]:
    """After an error the model is as it was: without the new adapter, or without any if it had none."""
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C in a notebook too, where the model lives on
        if model is not None:
            if name in model.peft_config:
                model.delete_adapter(name)
        else:
            _strip(base)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _strip(base: nn.Module) -> None:
    """Take all that PEFT put in out of a base model, also after an injection that stopped half-way."""
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    if hasattr(base, "peft_config"):
        del base.peft_config
