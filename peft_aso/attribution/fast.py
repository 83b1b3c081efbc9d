"""The fast engine for integrated gradients: the numbers of integrated_gradients.py in a hundredth of the time.

Neurons are scaled where the answer is predicted, and in a causal model the prompt does not depend on them.

- `fast_vector` groups examples whose answers have about the same length, one pass for all of a group.
- `causal_suffix`, `decoder_suffix`: the prompt's keys and values are computed once. Only the suffix, from the first
  position that predicts an answer token to the last, runs again. For an encoder the suffix is all of the input.
- `FastEngine` runs the suffix at all nodes of neighbouring layers in one forward pass, from the lowest block on.
- `choose_setting` compares a small piece of the work with the reference before the first use on a model. Where they
  differ, the reference takes over, with a warning.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..sharding import gathered
from .answer import IGNORE, LabelledBatch, forward_parameters, log_probability, read_batch
from .config import AttributionConfig, check_choice
from .integrated_gradients import check_runs, integrate, integrated_gradients
from .neurons import NeuronLayer, eval_mode, find_neurons, rows_that_fit, unwrap
from .quadrature import Samples, nodes_and_weights
from .shared_attention import PrefixLayer, Rows, each_tensor, prefix_cache, shared_prefixes
from .vector import AttributionVector, LayerScores, assemble, float64

# how long the shortest suffix of a group is at least, as a part of the longest
_SHORTEST = 0.9
# how far scores may be from the reference's, as a part of the layer's largest: bfloat16 has eight bits
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 1e-1


class FastPathUnsupported(ValueError):
    """The fast engine cannot run this batch or this model; the reference can."""


@dataclass(frozen=True)
class Setting:
    """How the fast engine runs a model.

    Attributes:
        shared: rows share their example's prefix in the attention (shared_attention.py); else each has a copy.
        skip_padding: how positions are numbered where the batch has no position_ids: by token, as in OPT; else by
            column, as in Llama. They differ where padding is on the left.
        extra_padding: columns added in front of every prompt. The self-check adds some, which shows whether the model
            follows position_ids or counts columns.
    """

    shared: bool = False
    skip_padding: bool = False
    extra_padding: int = 0


# model -> situation -> the setting that passed the self-check, or why none did
_checked: WeakKeyDictionary[nn.Module, dict[str, Setting | str]] = WeakKeyDictionary()


def attribute(
    model: nn.Module, batch: Mapping[str, Any], config: AttributionConfig, *, method: str = "auto",
    progress: bool = False,
) -> AttributionVector:  # fmt: skip
    """Integrated gradients of P(y* given x) for every FFN neuron, one row per example (Eq. 8-12).

    The model runs in eval mode; its training flags, gradients, hooks and configuration and the random state are
    restored. The caller's autocast applies; probabilities are taken in float32 at least.

    Args:
        model, batch, config: as in `integrated_gradients`. `config.max_rows` changes the last digits at most.
        method: "auto" takes the fast engine where it passes its self-check, and the reference with a warning where it
            does not; "fast" raises instead; "reference" runs the whole model for each layer and node.
        progress: show a bar over layers while it runs.

    Raises:
        ValueError: as in `integrated_gradients`, and another method.
        FastPathUnsupported: only with method "fast".
    """
    check_choice("method", method, ("auto", "fast", "reference"))
    if method == "reference":
        return integrated_gradients(model, batch, config, progress=progress)
    model = unwrap(model)
    layers = find_neurons(model, config.neurons, config.stacks)
    scores: dict[str, LayerScores] = {}
    with gathered(model), eval_mode(model):
        read = read_batch(model, batch, config.max_answer_tokens)
        total = len(layers) * len(read)
        with tqdm(total=total, desc="attribution", unit="layer", leave=False, disable=not progress) as bar:
            for stack in dict.fromkeys(layer.stack for layer in layers if layer.block is not None):
                inside = [layer for layer in layers if layer.stack == stack and layer.block is not None]
                try:
                    setting = choose_setting(model, read, inside, config, method)
                    if setting is not None:
                        vector = fast_vector(model, read, inside, setting, config, bar)
                        scores.update(vector.scores_by_layer())
                except FastPathUnsupported as error:
                    if method == "fast":
                        raise
                    warnings.warn(f"Attribution of this batch runs the slow reference: {error}.", stacklevel=2)
        rest = [layer for layer in layers if layer.name not in scores]
        if rest:  # outside of all blocks, or of a stack that the fast engine cannot run
            vector = integrated_gradients(
                model, {**read.inputs, "labels": read.labels}, _only(rest, config), progress=progress
            )
            scores.update(vector.scores_by_layer())
        return assemble({layer.name: scores[layer.name] for layer in layers}, float64(vector.log_probability))


def fast_vector(
    model: nn.Module,
    batch: LabelledBatch,
    layers: list[NeuronLayer],
    setting: Setting,
    config: AttributionConfig,
    bar: Any = None,
) -> AttributionVector:
    """Eq. 12 for layers of one stack."""
    stack = layers[0].stack
    lengths = suffix_lengths(batch, stack)
    longest, keys = int(lengths.max()), max(mask.shape[1] for mask in batch.positions.values())
    logits, copied = longest if batch.targets.ndim > 1 else 1, 0 if setting.shared else keys
    max_rows = config.max_rows or rows_that_fit(model, layers, longest, keys, logits, copied)
    groups = [part for group in group_examples(lengths) for part in group.split(max_rows)]
    vectors = []
    for group in groups:
        part = batch.examples(group)
        if batch.kind == "causal":
            suffix = causal_suffix(model, part, setting)
        elif stack == "decoder":
            suffix = decoder_suffix(model, part, setting)
        else:
            suffix = Suffix(model, dict(part.inputs), part.targets, part.positions[stack])
        engine = FastEngine(suffix, layers, max_rows)
        vectors.append(assemble(engine.scores(config, bar), engine.log_p))
    return AttributionVector.cat(vectors).examples(torch.cat(groups).argsort())


def suffix_lengths(batch: LabelledBatch, stack: str) -> torch.Tensor:
    """How many positions of each example run again, `(B,)`."""
    chosen = batch.positions[stack]
    if stack == "encoder" or batch.kind not in ("causal", "seq2seq"):
        return torch.full((len(chosen),), chosen.shape[1])
    start = _first(chosen) if batch.kind == "causal" else 0
    return (chosen.shape[1] - start - _first(chosen.flip(1))).cpu()


def group_examples(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Examples in groups, as indices `(E,)`, whose suffixes differ in length by at most a tenth of the longest.

    All suffixes of a group run as long as its longest, for each node and layer.
    """
    # a group has the lengths between two powers of 1 / _SHORTEST
    power = (lengths.double().log() / -math.log(_SHORTEST)).floor()
    return [(power == each).nonzero()[:, 0] for each in power.unique()]


@dataclass
class Suffix:
    """The positions of B examples that are run again, on a cached prefix.

    Attributes:
        inputs: the model's arguments for them, the batch in the first dimension.
        targets, positions: as in `LabelledBatch`, of these W positions.
        cache: the prefix's keys and values; None without a prefix.
        shared: as in `Setting`.
    """

    model: nn.Module
    inputs: dict[str, Any]
    targets: torch.Tensor
    positions: torch.Tensor
    cache: Cache | None = None
    shared: bool = False

    def log_p(self, rows: Rows) -> torch.Tensor:
        """log P(y* given x) of each row, `(R,)`, Eq. 9; differentiable."""
        options: dict[str, Any] = {"return_dict": True}
        targets, accepted = self.targets, forward_parameters(self.model)
        if "logits_to_keep" in accepted and targets.ndim > 1:
            columns = (targets != IGNORE).any(0).nonzero()[:, 0]
            targets, options["logits_to_keep"] = targets[:, columns], columns
        if "use_cache" in accepted:
            options["use_cache"] = self.cache is not None
        if self.cache is not None:
            options["past_key_values"] = prefix_cache(self.cache, rows, self.shared)
        with shared_prefixes(self.model) if self.shared else nullcontext():
            logits = self.model(**rows.take(self.inputs), **options).logits
        return log_probability(logits, targets[rows.indices().to(targets.device)])


def causal_suffix(model: nn.Module, batch: LabelledBatch, setting: Setting) -> Suffix:
    """The suffix of a causal model.

    Prompts and answers differ in length. The columns are shifted, so that all suffixes start in the same one; tokens
    have the position ids that they had:

        batch:   p p p a a .        shifted:   p p p | a a
                 p a . . . .                   . . p | a .

    Raises:
        FastPathUnsupported: the batch cannot be shifted, or the model does not fill the cache.
    """
    chosen = batch.positions["single"]
    tokens, width = _real_tokens(batch, chosen), chosen.shape[1]
    first, start, end = _first(tokens), _first(chosen), width - _first(chosen.flip(1))
    prefix = int((start - first).max())
    prefix += setting.extra_padding if prefix else 0
    total = prefix + int((end - start).max())
    columns = start[:, None] - prefix + torch.arange(total, device=chosen.device)
    present = (columns >= first[:, None]) & (columns < end[:, None])
    rows, columns = torch.arange(len(columns), device=chosen.device)[:, None], columns.clamp(0, width - 1)

    inputs: dict[str, torch.Tensor] = {}
    for name, tensor in batch.inputs.items():
        if tensor.shape[:2] != chosen.shape:
            raise FastPathUnsupported(f"{name} of shape {tuple(tensor.shape)} is not one entry per token")
        inputs[name] = tensor[rows, columns]
    if "position_ids" not in inputs and "position_ids" in forward_parameters(model):
        by_column = torch.arange(width, device=chosen.device).expand_as(chosen)
        ids = (tokens.cumsum(1) - 1).clamp(min=0) if setting.skip_padding else by_column
        inputs["position_ids"] = ids[rows, columns]
    inputs["attention_mask"] = present.long()
    again = {name: tensor if name == "attention_mask" else tensor[:, prefix:] for name, tensor in inputs.items()}
    positions = (chosen[rows, columns] & present)[:, prefix:]
    targets = batch.targets[rows, columns].masked_fill(~present, IGNORE)[:, prefix:]
    if not prefix:
        return Suffix(model, again, targets, positions)
    options = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
    before, cache = {name: tensor[:, :prefix] for name, tensor in inputs.items()}, DynamicCache()
    with torch.no_grad():
        model(**before, **options, past_key_values=cache, use_cache=True, return_dict=True)
    if cache.get_seq_length() != prefix:
        raise FastPathUnsupported(f"{type(model).__name__} did not fill the cache that it was given")
    return Suffix(model, again, targets, positions, cache, setting.shared)


def decoder_suffix(model: nn.Module, batch: LabelledBatch, setting: Setting) -> Suffix:
    """The suffix of an encoder-decoder's decoder: its columns up to the last with a label.

    Runs the encoder once, and caches the keys and values of its states for the cross-attention.

    Raises:
        FastPathUnsupported: an input that the encoder does not take.
    """
    chosen, encoder = batch.positions["decoder"], model.get_encoder()  # type: ignore[operator]
    end = int(chosen.any(0).nonzero()[-1]) + 1
    given = {name: tensor for name, tensor in batch.inputs.items() if not name.startswith("decoder_")}
    foreign = given.keys() - forward_parameters(encoder)
    if foreign:
        raise FastPathUnsupported(f"the encoder of {type(model).__name__} does not take {', '.join(foreign)}")
    inputs: dict[str, Any] = {name: x[:, :end] for name, x in batch.inputs.items() if name not in given}
    if "attention_mask" in given:
        inputs["attention_mask"] = given["attention_mask"]
    cache = EncoderDecoderCache(Cache(layer_class_to_replicate=PrefixLayer), DynamicCache())
    with torch.no_grad():
        inputs["encoder_outputs"] = BaseModelOutput(encoder(**given, return_dict=True)[0])
        model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
    return Suffix(model, inputs, batch.targets[:, :end], chosen[:, :end], cache, setting.shared)


class FastEngine:
    """Forward and backward passes over one suffix, for layers of one stack. Records an unscaled pass at the start.

    Attributes:
        max_rows: rows that may run at once.
        log_p: log P(y* given x), float64 `(B,)`.
        neurons: layer name -> the neurons, at least float32 `(B, W, size)`, zero where they are not scaled.
        outputs: block index -> the block's output.
        unscaled: layer name -> the gradients at node 1, where nothing is scaled: one backward pass serves all layers.

    Raises:
        ValueError: a layer that ran several times or never.
    """

    def __init__(self, suffix: Suffix, layers: list[NeuronLayer], max_rows: int) -> None:
        self.suffix, self.layers, self.max_rows = suffix, layers, max_rows
        self.size = len(suffix.positions)
        self.outputs: dict[int, Any] = {}
        inputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

        def record_input(layer: NeuronLayer, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            neurons = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            inputs[layer.name].append(neurons)
            return (neurons, *args[1:])

        def record_output(index: int, _: nn.Module, __: Any, output: Any) -> None:
            self.outputs[index] = each_tensor(torch.Tensor.detach, output)

        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.module.register_forward_pre_hook(partial(record_input, layer)).remove)
            for index, block in enumerate(layers[0].blocks):
                hooks.callback(block.register_forward_hook(partial(record_output, index)).remove)
            log_p = suffix.log_p(Rows(torch.arange(self.size), self.size))
        for layer in layers:
            check_runs(layer, len(inputs[layer.name]))
        self.log_p, self.neurons, self.unscaled = float64(log_p.detach()), {}, {}
        gradients = torch.autograd.grad(log_p.sum(), [inputs[layer.name][0] for layer in layers])
        for layer, gradient in zip(layers, gradients, strict=True):
            n, g = (
                layer.by_position(each.detach(), *suffix.positions.shape)
                .masked_fill(~suffix.positions.to(each.device)[..., None], 0.0)
                .to(torch.promote_types(each.dtype, torch.float32))
                for each in (inputs[layer.name][0], gradient)
            )
            self.neurons[layer.name] = n
            self.unscaled[layer.name] = Samples(torch.arange(self.size), torch.ones(self.size), log_p, (n * g).sum(1))

    def scores(self, config: AttributionConfig, bar: Any = None) -> dict[str, LayerScores]:
        """Eq. 11 for all examples and layers, by name."""
        nodes, weights = nodes_and_weights(config)
        recorded = bool(nodes[-1] == 1)
        nodes, scores, size = nodes[: len(nodes) - recorded], {}, self.size
        for layers in self.layers_of_a_pass(self.max_rows // (size * len(nodes) or 1)):
            gradients, pairs = partial(self.gradients, layers), torch.arange(len(layers) * size)
            parts = gradients(pairs, nodes.expand(len(pairs), -1)) if nodes.numel() else []
            if recorded:
                parts += [
                    replace(self.unscaled[layer.name], examples=pairs[place * size :][:size])
                    for place, layer in enumerate(layers)
                ]
            values, log_scale, taken = integrate(gradients, Samples.cat(parts), weights, config)
            for layer, value, scale in zip(layers, values.split(size), log_scale.split(size), strict=True):
                scores[layer.name] = LayerScores(value, scale, taken)
            if bar is not None:
                bar.update(len(pairs))
        return scores

    def layers_of_a_pass(self, most: int) -> Iterator[list[NeuronLayer]]:
        """Neighbouring layers that run in one pass: few, as each row runs the blocks between them in vain."""
        most = max(1, min(most, max(2, len(self.layers) // 12)))
        for _, group in groupby(self.layers, lambda layer: (layer.size, self.neurons[layer.name].device)):
            layers = list(group)
            yield from (layers[start : start + most] for start in range(0, len(layers), most))

    def gradients(self, layers: list[NeuronLayer], pairs: torch.Tensor, nodes: torch.Tensor) -> list[Samples]:
        """n * d log P / dn with a layer's neurons at node * n (Eq. 10), pairs `(E,)` at nodes `(E, K)`.

        Pair i is example i % B and layer i // B of `layers`. Each row of the pass scales the neurons of one layer.
        """
        samples = []
        neurons = torch.cat([self.neurons[layer.name] for layer in layers])
        for some in nodes.split(max(1, self.max_rows // len(pairs)), dim=1):
            of_pair, node = Rows(pairs, len(neurons), some.shape[1]), some.flatten()
            own = of_pair.take(neurons)
            scaled = (own * node[:, None, None].to(own)).requires_grad_()
            rows = Rows(pairs % self.size, self.size, some.shape[1])
            with self.patched(layers, of_pair.indices() // self.size, rows, scaled):
                log_p = self.suffix.log_p(rows)
            (gradient,) = torch.autograd.grad(log_p.sum(), scaled)
            samples.append(Samples(of_pair.indices(), node, log_p, (own * gradient).sum(1)))
        return samples

    @contextmanager
    def patched(
        self, layers: list[NeuronLayer], places: torch.Tensor, rows: Rows, scaled: torch.Tensor
    ) -> Iterator[None]:
        """Activation patching in the forward pass run inside: in row r, layer places[r] has the neurons scaled[r].

        The blocks below the first layer's do not run. They return the recorded output of the last of them, which the
        first layer's block reads:

            block 3    runs
            block 2    runs, its neurons scaled in the rows of the second layer
            block 1    runs, its neurons scaled in the rows of the first layer
            block 0    recorded

        Args:
            places: `(R,)`.
            scaled: `(R, W, size)`.
        """
        positions = self.suffix.positions[rows.indices().to(self.suffix.positions.device)]
        below = layers[0].blocks[: layers[0].block_index]
        recorded = rows.take(self.outputs[len(below) - 1]) if below else None

        def scale(place: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            own = layers[place].by_position(args[0], *positions.shape)
            chosen = positions.to(own.device) & (places == place).to(own.device)[:, None]
            patched = torch.where(chosen[..., None], scaled.to(own.dtype), own)
            return (patched.view_as(args[0]), *args[1:])

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = recorded[0] if isinstance(recorded, tuple) else recorded
            return (hidden, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

        with ExitStack() as stack:
            for place, layer in enumerate(layers):
                stack.callback(layer.module.register_forward_pre_hook(partial(scale, place)).remove)
            for block in below:
                # accelerate may have put a forward into the block, which goes back in its place
                own = {"forward": block.forward} if "forward" in block.__dict__ else {}
                stack.callback(block.__dict__.update, own)
                stack.callback(block.__dict__.pop, "forward", None)
                block.forward = lambda *_, **__: recorded
            if below:
                # the recorded output is that after the user's hooks, which would change it once more
                hook = layers[0].blocks[len(below)].register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            yield


def choose_setting(
    model: nn.Module, batch: LabelledBatch, layers: list[NeuronLayer], config: AttributionConfig, method: str
) -> Setting | None:
    """The setting under which the fast engine is right for such a batch; or None, with a warning the first time.

    It is found once for each model and situation, on the longest prefix, which is read from the cache, and on the
    longest with padding on the left.

    Raises:
        FastPathUnsupported: the batch is not for the fast engine; with method "fast" also where the model is not.
    """
    known, stack, causal = _checked.setdefault(model, {}), layers[0].stack, batch.kind == "causal"
    chosen, mask, cached = batch.positions[stack], batch.inputs.get("attention_mask"), causal or stack == "decoder"
    padding = _first(mask) if mask is not None and mask.ndim == 2 else torch.zeros(len(chosen), device=chosen.device)
    prefix = (_first(chosen) - padding) * causal
    situation = f"{batch.kind}, {stack}, padded left: {bool(padding.any())}, prefix: {bool((prefix > 0).any())}"
    if situation not in known:
        rows = {int(prefix.argmax()), int(prefix.masked_fill((padding == 0) & padding.any(), -1).argmax())}
        part = batch.examples(torch.tensor(sorted(rows)))
        known[situation] = found = self_check(model, part, layers, cached, config)
        if isinstance(found, str):
            warnings.warn(
                f"Attribution of {type(model).__name__} runs the reference, which is exact but slow: the fast engine "
                f"did not pass its self-check, {found}.",
                stacklevel=3,
            )
    found = known[situation]
    if isinstance(found, str) and method == "fast":
        raise FastPathUnsupported(f"the fast engine did not pass its self-check on {type(model).__name__}: {found}")
    return found if isinstance(found, Setting) else None


def self_check(
    model: nn.Module, batch: LabelledBatch, layers: list[NeuronLayer], cached: bool, config: AttributionConfig
) -> Setting | str:
    """The first setting with the reference's scores in the first, the middle and the last layer; or why none has."""
    layers = [layers[index] for index in sorted({0, len(layers) // 2, len(layers) - 1})]
    config = _only(layers, replace(config, steps=2, quadrature="riemann"))
    reference = integrated_gradients(model, {**batch.inputs, "labels": batch.labels}, config)
    dtype, device = getattr(model, "dtype", torch.float32), batch.targets.device.type
    half = torch.finfo(dtype).bits < 32 or torch.is_autocast_enabled(device)
    reason = ""
    for skip_padding, shared in product((False, True), (True, False)) if cached else [(False, False)]:
        setting = Setting(shared, skip_padding)
        try:
            vector = fast_vector(model, batch, layers, replace(setting, extra_padding=2), config)
        except FastPathUnsupported:
            raise
        except Exception as error:  # whatever the fast engine fails on, the reference does not need it
            reason = f"it raised {type(error).__name__}: {error}".rstrip(".")
            continue
        pairs = [(vector.layer(layer.name), reference.layer(layer.name)) for layer in layers]
        gap = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
        if gap <= (_HALF_TOLERANCE if half else _TOLERANCE):
            return setting
        reason = f"scores differ by {gap:.1e} of the largest one"
    return reason


def _only(layers: list[NeuronLayer], config: AttributionConfig) -> AttributionConfig:
    return replace(config, neurons="|".join(re.escape(layer.name) for layer in layers), stacks="all")


def _real_tokens(batch: LabelledBatch, positions: torch.Tensor) -> torch.Tensor:
    """bool `(B, L)`: what is not padding; FastPathUnsupported where it is not one run of tokens in each row."""
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(positions)
    if mask.shape != positions.shape:
        raise FastPathUnsupported(f"an attention mask of shape {tuple(mask.shape)} cannot be shifted")
    tokens = mask.bool()
    if (tokens.sum(1) != tokens.shape[1] - _first(tokens) - _first(tokens.flip(1))).any():
        raise FastPathUnsupported("an attention mask with holes between tokens cannot be shifted")
    return tokens


def _first(mask: torch.Tensor) -> torch.Tensor:
    """Column of the first True in each row."""
    return mask.long().argmax(1)
