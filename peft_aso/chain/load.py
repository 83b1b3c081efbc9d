"""Load a chain of tasks onto a base model, take one adapter in as history, or update one task.

All that the files and the base model tell is checked before the model is touched. After any error it is as it was.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import CONFIG_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..tuner import ASOLoraConfig, ASOLoraModel
from ..tuner.adapter_file import ATTRIBUTION_KEY, check_attribution, weights_hash
from ..tuner.history import (
    adapter_of,
    chain_obstacles,
    check_adapter_name,
    is_free,
    name_parts,
    oldest_first,
    task_name_of,
)
from .export import PREFIX, BaseView, base_view
from .hub import ADAPTER_FILES, Access, Source, find, is_on_hub
from .manifest import (
    MANIFEST_NAME,
    AdapterFile,
    ChainError,
    Place,
    adapter_hash,
    check_task_name,
    find_in_folder,
    mismatch,
    read_adapter,
    warn_or_raise,
    with_history,
)
from .save import adapter_for

Tensors = Mapping[str, torch.Tensor]

_LORA_KEY = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
# where the vocabulary was resized, PEFT writes a head in modules_to_save once more, and the base model's own
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."
# settings that say how the adapter is added up, and where
_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias")


def load_chain(
    base: nn.Module,
    source: Source | Sequence[Source],
    *,
    tasks: Sequence[str] | None = None,
    trainable: bool = False,
    strict: bool = True,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """Put all tasks of a chain onto a base model; the newest is active, on top of its history.

    From the Hub only `chain.json`, configs and safetensors are fetched, what a `chain.json` pins elsewhere at those
    commits. The commit that an adapter is from is written into its config (`origin`).

    Args:
        base: the base model, without adapters. It is changed in place, as by `get_peft_model`.
        source: a folder written by `save_chain` or `model.save_pretrained`, the id of a repository on the Hub
            ("user/chain"), or a list of adapter folders and ids, oldest first.
        tasks: load only these tasks, and what they were trained on top of. None: all.
        trainable: whether the newest task can be trained on. Its history is frozen either way.
        strict: whether weights or histories that differ from what `chain.json` has, or from those that a task was
            trained on top of, are an error; else a warning.
        autocast_adapter_dtype: as in PEFT: float32 adapter weights where the model is in half precision.
        revision: branch, tag or commit of a single repository. None: its main branch.
        token: for private repositories. None: the one of `hf auth login`.
        cache_dir: where files are cached. None: huggingface_hub's cache.
        local_files_only: do not ask the Hub.

    Returns:
        The `PeftModel`, in eval mode unless trainable (then its mode is left as it was). Each adapter is called by its
        task's name.

    Raises:
        ChainError: before the model is touched: no such folder or repository, unreadable or unsafe files, NaN or Inf,
            another base model, a history that is missing or cyclic, or has other weights than the ones trained on, two
            folders with one task, a name that cannot be used, a base model that has adapters already.
        ValueError: a revision for more than one repository.
        huggingface_hub.errors.HfHubHTTPError: what goes wrong on the way from the Hub.
    """
    if revision is not None and not is_on_hub(source):
        raise ValueError("revision= is for one repository on the Hub. Histories are pinned by their chain.json.")
    if isinstance(base, PeftModel) or _has_adapters(base):
        raise ChainError(
            "The base model has adapters already. Give load_chain the bare model (model.unload() returns it), or add "
            "one adapter to this one with load_history."
        )
    places = find(source, Access(revision, token, cache_dir, local_files_only), tasks)
    adapters = in_order(_read(places, strict), tasks)
    taken = name_parts(base)
    for adapter in adapters:
        if not is_free(adapter.name, taken):
            _check_name(adapter.name, base)
        if len(adapters) > 1:
            _refuse_obstacles(adapter)
    _warn_of_other_bases(adapters, base)
    loaded, hashes, view = [], dict[str, str](), base_view(base)
    for adapter in tqdm(adapters, desc="Reading the chain", leave=False, disable=len(adapters) < 5):
        tensors = adapter.tensors()
        if difference := mismatch(adapter, tensors):
            warn_or_raise(f"{adapter.name!r} in {adapter.place.path} has {difference}. Restore it.", strict)
        check_history_hashes(adapter, hashes, strict)
        hashes[adapter.name] = adapter_hash(tensors, adapter.config)
        if adapter.place.origin is not None:
            adapter.config.origin = {**adapter.place.origin, "sha256": weights_hash(tensors, adapter.config)}
        loaded.append((adapter, check_fit(adapter, tensors, view)))
    newest = adapters[-1].name
    with _put_back_on_error(base, None, newest):
        for adapter in adapters:
            adapter.config.task_name = adapter.name
            adapter.config.inference_mode = not (trainable and adapter.name == newest)
        model = _add(base, loaded, autocast_adapter_dtype)
        model.set_adapter(newest, inference_mode=not trainable)
    return model if trainable else model.eval()


def load_history(
    model: Any,
    source: Source,
    name: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
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
        ChainError: before the model is touched: as `load_chain`; an adapter that cannot be summed with others (DoRA,
            trained biases, PiSSA and others that change the base weights); a name that is taken; a history that is not
            in the model, or has other weights there.
    """
    is_bare = not isinstance(model, PeftModel)
    if not is_bare and not isinstance(model.base_model, ASOLoraModel) or is_bare and _has_adapters(model):
        raise ChainError(
            "The model has adapters of another kind. Give load_history a model with ASO_LORA adapters, or a bare base "
            "model (model.unload() returns it)."
        )
    folder = Path(source)
    if is_on_hub(source):
        folder = Access(revision, token, cache_dir, local_files_only).snapshot(source, ADAPTER_FILES)
    elif not folder.is_dir():
        find_in_folder(folder)  # raises with what is wrong
    adapter = read_adapter(Place(folder))
    if getattr(adapter.config, "task_name", None) is None and is_on_hub(source):
        name = name or source.split("/")[1]
    if name is not None:
        check_task_name(name, "The argument name")
        adapter = replace(adapter, name=name)
    inner = model if is_bare else model.base_model.model
    configs: Mapping[str, Any] = {} if is_bare else model.peft_config
    _check_name(adapter.name, inner)
    _refuse_obstacles(adapter)
    if adapter.name in configs or adapter_of(adapter.name, configs) is not None:
        raise ChainError(f"The model has a task called {adapter.name!r} already. Give another name=.")
    lacking = [task for task in adapter.history if adapter_of(task, configs) is None]
    if lacking:
        raise ChainError(
            f"{adapter.name!r} was trained on top of {', '.join(map(repr, lacking))}, which the model does not hold. "
            "Load those first, or the whole chain with load_chain."
        )
    _warn_of_other_bases([adapter], inner)
    check_history_hashes(adapter, _hashes_in(model, adapter.history), strict=True)
    tensors = check_fit(adapter, adapter.tensors(), base_view(inner))
    config = adapter.config
    if adapter.is_stock:
        settings = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        config = ASOLoraConfig(**settings, history=[])
    config.task_name, config.inference_mode = adapter.name, True
    modes, mode = {module: module.training for module in inner.modules()}, inner.training
    with _put_back_on_error(inner, None if is_bare else model, adapter.name):
        model = _add(model, [(replace(adapter, config=config), tensors)], autocast_adapter_dtype)
    for module in model.modules():
        module.training = modes.get(module, mode)  # new modules start in training mode
    return model


def update_task(
    model: Any,
    task: str,
    source: Source,
    *,
    strict: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> None:
    """Load another version of a task into its adapter, wherever it stands in the chain.

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
        ChainError: before the model is touched: no such task in the model or there, merged adapters, files that cannot
            be read, an adapter of another rank, alpha or other modules, or one that was trained on top of others.
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
        raise ChainError(
            f"{task!r} of {source} cannot replace the old one: {what}. Call remove_task, and load it anew."
        )
    if new.history != list(config.history or []):
        raise ChainError(
            f"{task!r} of {source} was trained on top of {new.history or 'nothing'}, and its history in the model is "
            f"{config.history or 'empty'}. Load that chain with load_chain, or train the task anew."
        )
    tensors = new.tensors()
    if difference := mismatch(new, tensors):
        warn_or_raise(f"{task!r} of {source} has {difference}. Restore it.", strict)
    check_history_hashes(new, _hashes_in(model, new.history), strict)
    tensors = check_fit(new, tensors, base_view(model.base_model.model))
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes, found = (
        {key: tensor.shape for key, tensor in held.items() if key != ATTRIBUTION_KEY} for held in (own, tensors)
    )
    if key := next((key for key in sorted({*shapes, *found}) if shapes.get(key) != found.get(key)), None):
        raise ChainError(
            f"{task!r} of {source} has other modules: {key} has the shape {found.get(key, 'none')} there and "
            f"{shapes.get(key, 'none')} in the model. Call remove_task, and train or load it anew."
        )
    origin = new.place.origin and {**new.place.origin, "sha256": weights_hash(tensors, new.config)}
    model.base_model.attribution.pop(name, None)
    for field in ("similarities", "soft_coefficients", "attribution_layout", "history_hashes"):
        setattr(config, field, getattr(new.config, field))
    config.origin = origin or new.config.origin
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    for later in model.peft_config.values():
        if later.history_hashes and task in later.history_hashes:
            later.history_hashes[task] = adapter_hash(tensors, new.config)
    model.base_model.refresh_history()


# ---- which adapters, in which order -----------------------------------------------------------------------------


def _read(places: Iterable[Place], strict: bool) -> Iterator[AdapterFile]:
    """Read the adapters' configs. One that `chain.json` lists and that is not there is a warning unless strict."""
    for place in places:
        if place.entry and not (place.path / CONFIG_NAME).exists():
            warn_or_raise(
                f"{MANIFEST_NAME} lists the task {place.entry['task']!r}, and {place.path} is not there.", strict
            )
            continue
        adapter = read_adapter(place)
        if adapter.is_stock:
            raise ChainError(
                f"{place.path} is a stock LoRA adapter, trained without a chain. Take it in with load_history first, "
                "train the tasks on top of it, and save the chain."
            )
        yield adapter


def in_order(adapters: Iterable[AdapterFile], tasks: Sequence[str] | None = None) -> list[AdapterFile]:
    """The adapters, each after its history; of those that are ready the first given goes first.

    Args:
        tasks: only these and their histories. None: all but the products of `add_weighted_adapter`.

    Raises:
        ChainError: no task, an unknown one, one that is there twice, a history that is not there or that is a cycle.
    """
    by_name: dict[str, AdapterFile] = {}
    for adapter in adapters:
        place, known = adapter.place, by_name.setdefault(adapter.name, adapter)
        hashes = [entry and entry["sha256"] for entry in (place.entry, known.place.entry)]
        if known.place.pinned and not place.pinned:
            by_name[adapter.name] = adapter
        elif known is not adapter and not place.pinned and (hashes[0] is None or hashes[0] != hashes[1]):
            raise ChainError(
                f"Two folders hold a task called {adapter.name!r}: {known.place.path} and {place.path}. Remove one of "
                "them, or pass a list of the folders that you mean."
            )
    combined = [name for name, adapter in by_name.items() if getattr(adapter.config, "combined", False)]
    if combined and tasks is None:
        warnings.warn(
            f"{combined} were made by add_weighted_adapter and are no tasks: they are left out. Load them with "
            "model.load_adapter, or name them in tasks=.",
            stacklevel=3,
        )
        by_name = {name: adapter for name, adapter in by_name.items() if name not in combined}
    histories = {name: adapter.history for name, adapter in by_name.items()}
    histories = {name: histories[name] for name in with_history(histories, tasks)}
    if not histories:
        raise ChainError("There is no task to load.")
    for name, history in histories.items():
        lacking = [task for task in history if task not in histories]
        if lacking:
            raise ChainError(
                f"{name!r} was trained on top of {', '.join(map(repr, lacking))}, which is not there. Put the missing "
                f"folders next to {by_name[name].place.path}, or pass a list of all adapter folders, oldest first."
            )
    try:
        TopologicalSorter(histories).prepare()
    except CycleError as error:
        raise ChainError(
            f"The histories form a cycle: {' -> '.join(error.args[1])}. One of these adapters has a wrong `history` "
            "in its adapter_config.json."
        ) from error
    return [by_name[name] for name in oldest_first(histories)]


def check_history_hashes(adapter: AdapterFile, hashes: Mapping[str, str], strict: bool) -> None:
    """Compare the history with the one that the adapter was trained on top of.

    Args:
        hashes: task -> `adapter_hash` of what is there.
        strict: whether a difference is an error. Else it is a warning, and the config gets the hashes that are there.

    Raises:
        ChainError: a task of the history has other weights or another scale.
    """
    expected = getattr(adapter.config, "history_hashes", None) or {}
    for task, digest in expected.items():
        if hashes.get(task, digest) != digest:
            warn_or_raise(
                f"{adapter.name!r} was trained on top of {task!r} with the sha256 {digest}, and this one has "
                f"{hashes[task]}. Load the version that it was trained on.",
                strict,
            )
            adapter.config.history_hashes = {**adapter.config.history_hashes, task: hashes[task]}


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
        raise ChainError(
            f"{error} To rename a saved task, change task_name in its adapter_config.json, and history in those of "
            "the tasks after it."
        ) from error


def _refuse_obstacles(adapter: AdapterFile) -> None:
    for reason in chain_obstacles(adapter.config):
        raise ChainError(
            f"The adapter {adapter.name!r} ({adapter.place.path}) cannot be part of a chain of tasks: {reason}. Train "
            "it without that setting, or use it alone, with PeftModel.from_pretrained."
        )


def _warn_of_other_bases(adapters: Sequence[AdapterFile], base: nn.Module) -> None:
    """Two base models of the same shapes cannot be told apart by the weights: compare the names."""
    names = {adapter.config.base_model_name_or_path for adapter in adapters} - {None}
    own = base.__dict__.get("name_or_path") or None
    if own is not None and names - {own} or len(names) > 1:
        warnings.warn(
            f"The adapters were trained on {', '.join(map(repr, sorted(names)))}, and this base model is called "
            f"{own!r}. If it is another model of the same shape, the results will be wrong.",
            stacklevel=3,
        )


# ---- does an adapter fit the base model? ------------------------------------------------------------------------


def check_fit(adapter: AdapterFile, tensors: Tensors, base: BaseView) -> dict[str, torch.Tensor]:
    """Check an adapter's tensors against the base model and return those that may be loaded.

    Tensors of the base model that PEFT saves with an adapter on embeddings, or where the vocabulary was resized, are
    compared with the model's own and left out: what all tasks share is not changed by loading one of them.

    Raises:
        ChainError: a module that the model does not have, a tensor of another shape, weights that are missing or that
            the config does not account for, a base weight that differs from the model's, a damaged attribution vector.
    """
    name, config = adapter.name, adapter.config
    own_base = f" It was trained on {config.base_model_name_or_path!r}." if config.base_model_name_or_path else ""

    def misfit(problem: str) -> ChainError:
        return ChainError(f"The adapter {name!r} does not fit this model: {problem}.{own_base}")

    def damaged(problem: str) -> ChainError:
        return ChainError(f"The file of {name!r} ({adapter.place.path}) {problem}. Save or download it again.")

    lora: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    others = {}
    for key, tensor in tensors.items():
        if match := _LORA_KEY.fullmatch(key.removeprefix(PREFIX)):
            lora[match[1]][match[2]] = tensor
        elif key != ATTRIBUTION_KEY:
            others[key] = tensor
    if not lora:
        raise damaged("holds no LoRA matrices")
    for module, matrices in lora.items():
        if module not in base.modules:
            raise misfit(f"it has no module {module!r}")
        if isinstance(base.modules[module], nn.MultiheadAttention):
            raise misfit(f"{module} is a MultiheadAttention, which cannot carry a history")
        A = matrices.get("lora_A.weight", matrices.get("lora_embedding_A"))
        B = matrices.get("lora_B.weight", matrices.get("lora_embedding_B"))
        if A is None or B is None or A.dim() < 2 or B.dim() < 2:
            raise damaged(f"lacks one of the two matrices of {module}")
        pattern = get_pattern_key(config.rank_pattern.keys(), module)
        rank = config.rank_pattern.get(pattern, config.r)
        rank_B = B.shape[1] * getattr(base.modules[module], "groups", 1)  # PEFT groups B alone
        if (A.shape[0], rank_B) != (rank, rank):
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise damaged(f"has {shapes} for {module}, and its config has rank {rank}")
        sizes = _sizes(base.modules[module])
        if sizes is not None and (A.shape[1], B.shape[0]) != sizes:
            raise misfit(
                f"{module} maps {A.shape[1]} to {B.shape[0]} values in the file and {sizes[0]} to {sizes[1]} here"
            )
    # what PEFT works out from the model, or ties to another module, is left to PEFT
    derived = config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND) or config.ensure_weight_tying
    if not derived and not any(True for _ in chain_obstacles(config)):
        named = {module for module in base.modules if module and check_target_module_exists(config, module)}
        if lacking := sorted(named - set(lora)):
            raise misfit(f"its file has no weights for {lacking[0]}, which its config names as a target")
        if surplus := sorted(set(lora) - named):
            raise damaged(f"has weights for {surplus[0]}, which its config does not name as a target")
    heads = tuple(config.modules_to_save or ())
    loadable = {key: tensor for key, tensor in tensors.items() if _COPY not in key and _ORIGINAL not in key}
    for key in [key for key in others if key in loadable]:
        own, tensor = key.removeprefix(PREFIX), others[key]
        is_head = _in_head(own, heads)
        own = own if is_head else own.replace(".base_layer.", ".")
        held = base.weights.get(own)
        if held is None:
            raise misfit(f"its file holds {key!r}, which belongs to nothing here")
        if held.shape != tensor.shape:
            raise misfit(
                f"{own} has shape {tuple(tensor.shape)} in the file and {tuple(held.shape)} here. A classifier needs "
                f"the same num_labels, added tokens need model.resize_token_embeddings({tensor.shape[0]}) first"
            )
        tied = [other for other, weight in base.weights.items() if weight is held and _in_head(other, heads)]
        if is_head or (tied and config.ensure_weight_tying):  # PEFT saves and loads both
            continue
        del loadable[key]
        if held.device.type != "meta" and not _same(tensor, held):
            raise ChainError(
                f"The file of {name!r} has its own {own}, and it differs from the base model's, which all tasks "
                "share. If its values are right, load them into the base model before load_chain."
            )
    for module in base.modules:
        for weight in base.modules[module].state_dict() if module and heads and module.endswith(heads) else ():
            if f"{PREFIX}{module}.{weight}" not in others:
                raise damaged(f"lacks {module}.{weight} of modules_to_save={sorted(set(heads))}")
    if ATTRIBUTION_KEY in tensors and not adapter.is_stock:
        try:
            check_attribution(name, config.attribution_layout, tensors[ATTRIBUTION_KEY])
        except ValueError as error:
            raise ChainError(str(error)) from error
    return loadable


def _in_head(key: str, heads: tuple[str, ...]) -> bool:
    """Whether a weight belongs to one of modules_to_save."""
    parts = key.split(".")[:-1]
    return any(".".join(parts[: end + 1]).endswith(heads) for end in range(len(parts))) if heads else False


def _same(tensor: torch.Tensor, held: torch.Tensor) -> bool:
    """Equal up to the rounding of the coarser of the two dtypes."""
    held = held.cpu()
    if tensor.shape != held.shape or not held.is_floating_point():
        return torch.equal(tensor, held)
    coarse = max(tensor.dtype, held.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(tensor.to(coarse), held.to(coarse))


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a linear, embedding or convolution layer (quantized ones too), or None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    kinds = ("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("in_channels", "out_channels")
    found = next(((a, b) for a, b in kinds if hasattr(module, a) and hasattr(module, b)), None)
    return None if found is None else (int(getattr(module, found[0])), int(getattr(module, found[1])))


# ---- into the model ---------------------------------------------------------------------------------------------


def _add(model: Any, adapters: Sequence[tuple[AdapterFile, Tensors]], autocast: bool) -> Any:
    """Add checked adapters, oldest first, to a bare model (which is wrapped) or to a `PeftModel`."""
    with torch.random.fork_rng(devices=[]):  # PEFT initialises what is overwritten at once
        for is_simple, group in groupby(adapters, key=_is_simple):
            run = list(group)
            if not isinstance(model, PeftModel):
                model, run = _add_as_peft_does(model, *run[0], autocast), run[1:]
            if is_simple and run and _takes_simple(model):
                found = {adapter.name: (adapter.config, tensors) for adapter, tensors in run}
                model.base_model.add_loaded_adapters(found, autocast)
                continue
            for adapter, tensors in run:
                model = _add_as_peft_does(model, adapter, tensors, autocast)
    return model


def _is_simple(loaded: tuple[AdapterFile, Tensors]) -> bool:
    """Whether an adapter is nothing but A and B of linear or convolution layers, for `add_loaded_adapters`."""
    config = loaded[0].config
    is_usual_start = config.init_lora_weights in (True, False, "gaussian", "orthogonal")
    if not is_usual_start or config.modules_to_save or config.use_qalora or any(True for _ in chain_obstacles(config)):
        return False
    return all(".lora_A." in key or ".lora_B." in key for key in loaded[1] if key != ATTRIBUTION_KEY)


def _takes_simple(model: PeftModel) -> bool:
    """Whether a model has no heads (classes for classifiers add one for each adapter) and nothing merged."""
    has_wrapper = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    return type(model).add_adapter is PeftModel.add_adapter and not has_wrapper and not model.base_model.is_merged


def _add_as_peft_does(model: Any, adapter: AdapterFile, tensors: Tensors, autocast: bool) -> Any:
    name, config = adapter.name, adapter.config
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=autocast)
    else:  # PEFT would warn of another name here, for the first adapter only: done for all of them before
        config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
        model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=autocast)
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
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
            for parent in list(base.modules()):
                for child_name, child in list(parent.named_children()):
                    if isinstance(child, BaseTunerLayer):
                        setattr(parent, child_name, child.get_base_layer())
                    elif isinstance(child, AuxiliaryTrainingWrapper):
                        setattr(parent, child_name, child.original_module)
            if hasattr(base, "peft_config"):
                del base.peft_config
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
