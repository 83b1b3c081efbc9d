"""The models that are measured: SmolLM2-135M, and random ones of a stated size."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers

# examples/tasks.py: examples/ is on the path, see benchmark.py
from tasks import load_model

_SMALL = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 8}
_TINY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_T5 = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 4}
_SMALL_BERT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
_TINY_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
_TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    # wider than the library's start, so that a model of this size tells its tokens apart
    "initializer_range": 0.2,
}

# name -> (class, config, values, tiny values)
_RANDOM: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, **_SMALL, "vocab_size": 8192},
        {**_T5, **_TINY, "vocab_size": 512},
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_BERT, **_SMALL_BERT, "vocab_size": 8192},
        {**_BERT, **_TINY_BERT, "vocab_size": 512, "initializer_range": 0.2},
    ),
    "llama-1b": ("LlamaForCausalLM", "LlamaConfig", _LLAMA_1B, _TINY_LLAMA),
    "smollm2": ("LlamaForCausalLM", "LlamaConfig", {}, _TINY_LLAMA),
}


@dataclass
class Subject:
    """A model to measure on.

    Attributes:
        name: as `--model` takes it.
        label: what the table calls it.
        model: in eval mode; never changed: `fresh()` gives copies.
        tokenizer: None for a random model.
    """

    name: str
    label: str
    model: Any
    tokenizer: Any

    @property
    def kind(self) -> str:
        """What it does: causal, seq2seq or encoder."""
        if self.model.config.is_encoder_decoder:
            return "seq2seq"
        return "causal" if self.model.can_generate() else "encoder"

    @property
    def task_type(self) -> str | None:
        """PEFT's name for the kind."""
        return {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(self.kind)

    def fresh(self) -> Any:
        """A copy that may be changed."""
        return copy.deepcopy(self.model)


def load(name: str, device: str, dtype: str, quick: bool) -> Subject:
    """A subject by name: `smollm2`, `t5`, `bert`, `llama-1b`, or the folder or Hub id of a model.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 for llama-1b, float32 for all others.
        quick: a tiny random model of the same architecture instead.
    """
    chosen = ("bfloat16" if name == "llama-1b" and not quick else "float32") if dtype == "auto" else dtype
    tokenizer = None
    if quick or (name in _RANDOM and name != "smollm2"):
        model = _random(name, quick, device, getattr(torch, chosen))
    else:
        model, tokenizer = load_model(name)
    model = model.to(device=device, dtype=getattr(torch, chosen)).eval()
    label = ("tiny " if quick else "") + name + ("" if chosen == "float32" else f", {chosen}")
    return Subject(name, label, model, tokenizer)


def _random(name: str, quick: bool, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the same for each call; made in their dtype where they will be."""
    if name not in _RANDOM:
        raise SystemExit(f"--quick has no tiny model for {name!r}; it has {', '.join(_RANDOM)}.")
    model_class, config_class, values, tiny = _RANDOM[name]
    config = getattr(transformers, config_class)(**(tiny if quick else values))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return getattr(transformers, model_class)(config)
    finally:
        torch.set_default_dtype(before)
