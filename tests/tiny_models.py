"""Tiny random transformers, one per architecture, and batches that fit them.

Every model has two or three blocks, a hidden size of 16 and a vocabulary of 64 ids, in float32. Random
weights are drawn wider than the libraries' own start, so that attention and gradients are far from
degenerate: a test that passes on them has seen numbers that depend on every part of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

HIDDEN = 16
FFN = 24
LAYERS = 3
VOCAB = 64
POSITIONS = 64
NUM_LABELS = 3
PAD_ID = 0

_HEADS: dict[str, Any] = {"num_attention_heads": 2}
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_HEADS,
}
_LLAMA_LIKE: dict[str, Any] = {**_BASE, "intermediate_size": FFN, "num_key_value_heads": 1}
_GEMMA_LIKE: dict[str, Any] = {**_LLAMA_LIKE, "head_dim": 8}
_GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD_ID,
}
_T5_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": FFN,
    "num_layers": 2,
    "num_decoder_layers": LAYERS,
    "num_heads": 2,
    "pad_token_id": PAD_ID,
    "eos_token_id": 2,
    "decoder_start_token_id": PAD_ID,
}
_BERT_LIKE: dict[str, Any] = {**_BASE, "intermediate_size": FFN}

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA_LIKE, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GEMMA_LIKE),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA_LIKE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA_LIKE, "sliding_window": 6}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA_LIKE, "sliding_window": 6}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_BASE, "intermediate_size": FFN}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA_LIKE),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT_LIKE, "n_inner": FFN}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_BASE, "intermediate_size": FFN}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT_LIKE, "n_inner": FFN, "rotary_dim": 4}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_BASE, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "do_layer_norm_before": True},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_BASE, "n_layer": LAYERS, "n_head": 2}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_BASE, "ffn_hidden_size": FFN}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5_LIKE, "feed_forward_proj": "relu"}),
    "t5_v11": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5_LIKE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", {**_T5_LIKE, "feed_forward_proj": "gated-gelu"}),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": LAYERS,
            "encoder_ffn_dim": FFN,
            "decoder_ffn_dim": FFN,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": PAD_ID,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_BERT_LIKE, "num_labels": NUM_LABELS}),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_BERT_LIKE, "num_labels": NUM_LABELS, "max_position_embeddings": POSITIONS + 2},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "hidden_dim": FFN,
            "n_layers": LAYERS,
            "n_heads": 2,
            "max_position_embeddings": POSITIONS,
            "num_labels": NUM_LABELS,
        },
    ),
    "llama_classifier": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA_LIKE, "num_labels": NUM_LABELS},
    ),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _BERT_LIKE),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}

CAUSAL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3",
    "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon",
)  # fmt: skip
SEQ2SEQ = ("t5", "t5_v11", "mt5", "bart")
CLASSIFIERS = ("bert", "roberta", "distilbert")
ALL = (*CAUSAL, *SEQ2SEQ, *CLASSIFIERS, "bert_mlm")


def tiny_config(name: str, **overrides: Any) -> Any:
    """The configuration behind `tiny(name)`; `overrides` replace single values.

    Each model gets its own copy, so that nothing one test does to a configuration reaches another.
    """
    if name not in _MODELS:
        raise KeyError(f"no tiny model called {name!r}; there are {', '.join(sorted(_MODELS))}")
    _, config_class, values = _MODELS[name]
    return getattr(transformers, config_class)(**{**values, **overrides})


def tiny(name: str, seed: int = 0, std: float = 0.3, **overrides: Any) -> Any:
    """A tiny random model of architecture `name`, in eval mode, the same for the same seed.

    Weight matrices are normal with standard deviation `std`, biases a third of that, and norm weights are
    spread around the value the library gives them. The caller's random state is left as it was.
    """
    config = tiny_config(name, **overrides)
    build: Callable[..., Any] = getattr(transformers, _MODELS[name][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, std)
                else:
                    parameter.add_(torch.randn_like(parameter) * std / 3)
            # the padding row of an embedding is zero in a trained checkpoint as well
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx].zero_()
    return model.eval()


def tiny_batch(
    model: Any, batch_size: int = 2, seed: int = 0, padding: str = "right", prompt: tuple[int, int] = (3, 8)
) -> dict[str, torch.Tensor]:
    """A valid batch with `labels` for any model of this file (or a PEFT wrapper of one).

    Prompts have between `prompt[0]` and `prompt[1]` tokens. Causal models: (B, L) with -100 on prompt and
    padding and an answer of one to three tokens at the end of each row, of lengths that differ.
    Encoder-decoders: labels (B, 3) of one to three tokens, then -100. Masked language models: one to three
    labelled tokens a row. Sequence
    classifiers: labels (B,). Padding of the inputs is on the side named.
    """
    if padding not in ("right", "left"):
        raise ValueError(f"padding is 'right' or 'left', not {padding!r}")
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    lengths = torch.randint(prompt[0], prompt[1] + 1, (batch_size,), generator=generator).tolist()
    answers = [1 + (row + seed) % 3 for row in range(batch_size)]

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, config.vocab_size, (count,), generator=generator)

    if getattr(config, "is_encoder_decoder", False):
        batch = _padded([tokens(length) for length in lengths], padding)
        labels = [torch.cat([tokens(count), torch.full((3 - count,), -100)]) for count in answers]
        return {**batch, "labels": torch.stack(labels)}
    if kind.endswith("ForSequenceClassification"):
        batch = _padded([tokens(length) for length in lengths], padding)
        return {**batch, "labels": torch.randint(0, config.num_labels, (batch_size,), generator=generator)}

    rows, labels = [], []
    for length, count in zip(lengths, answers, strict=True):
        ids = tokens(length + count)
        target = torch.full_like(ids, -100)
        if kind.endswith("ForMaskedLM"):
            chosen = torch.randperm(length + count, generator=generator)[:count]
            target[chosen] = tokens(count)
        else:
            target[length:] = ids[length:]
        rows.append(ids)
        labels.append(target)
    batch = _padded(rows, padding)
    batch["labels"] = _padded(labels, padding, fill=-100)["input_ids"]
    return batch


def _padded(rows: list[torch.Tensor], side: str, fill: int = PAD_ID) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
