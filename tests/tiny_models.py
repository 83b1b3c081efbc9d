"""Tiny random transformers, one per architecture, and batches that fit them.

Random weights are drawn wider than the libraries' own start, so that attention and gradients are far from degenerate:
a test that passes on them has seen numbers that depend on every part of the model.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

HIDDEN = 16
FFN = 24
LAYERS = 3
VOCAB = 64
POSITIONS = 64
NUM_LABELS = 3
PAD_ID = 0

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
_BASE = {**_TOKENS, **_SIZES, "max_position_embeddings": POSITIONS}
_WITH_FFN = {**_BASE, "intermediate_size": FFN}
_BERT_LIKE = {**_WITH_FFN, "num_labels": NUM_LABELS}
_LLAMA_LIKE = {**_WITH_FFN, "num_key_value_heads": 1}
_GEMMA_LIKE = {**_LLAMA_LIKE, "head_dim": 8}
_GPT_SIZES = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": POSITIONS, "n_inner": FFN}
_GPT_LIKE = {**_TOKENS, **_GPT_SIZES}
_T5_SIZES = {"d_model": HIDDEN, "d_kv": 8, "d_ff": FFN, "num_layers": 2, "num_decoder_layers": LAYERS, "num_heads": 2}
_T5_LIKE = {**_TOKENS, **_T5_SIZES, "decoder_start_token_id": PAD_ID, "feed_forward_proj": "gated-gelu"}
_BART_SIZES = {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": LAYERS, "max_position_embeddings": POSITIONS}
_BART_SIZES |= {f"{side}_ffn_dim": FFN for side in ("encoder", "decoder")}
_BART_SIZES |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
_BART_LIKE = {**_TOKENS, **_BART_SIZES, "decoder_start_token_id": 2, "forced_eos_token_id": None}
_DISTILBERT_SIZES = {"dim": HIDDEN, "hidden_dim": FFN, "n_layers": LAYERS, "n_heads": 2}
_DISTILBERT = {**_TOKENS, **_DISTILBERT_SIZES, "max_position_embeddings": POSITIONS, "num_labels": NUM_LABELS}
_WINDOW = {"sliding_window": 6}

# name -> the model's class in transformers, the values of its configuration
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", {**_LLAMA_LIKE, **_WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", _GEMMA_LIKE),
    "gemma": ("GemmaForCausalLM", _GEMMA_LIKE),
    "gemma2": ("Gemma2ForCausalLM", {**_GEMMA_LIKE, **_WINDOW}),
    "gemma3": ("Gemma3ForCausalLM", {**_GEMMA_LIKE, **_WINDOW}),
    "phi": ("PhiForCausalLM", _WITH_FFN),
    "phi3": ("Phi3ForCausalLM", _LLAMA_LIKE),
    "gpt2": ("GPT2LMHeadModel", _GPT_LIKE),
    "gpt_neox": ("GPTNeoXForCausalLM", _WITH_FFN),
    "gptj": ("GPTJForCausalLM", {**_GPT_LIKE, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", {**_BASE, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN}),
    "bloom": ("BloomForCausalLM", {**_BASE, "n_layer": LAYERS, "n_head": 2}),
    "falcon": ("FalconForCausalLM", {**_BASE, "ffn_hidden_size": FFN}),
    "t5": ("T5ForConditionalGeneration", {**_T5_LIKE, "feed_forward_proj": "relu"}),
    "t5_v11": ("T5ForConditionalGeneration", {**_T5_LIKE, "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", _T5_LIKE),
    "bart": ("BartForConditionalGeneration", _BART_LIKE),
    "bert": ("BertForSequenceClassification", _BERT_LIKE),
    "roberta": ("RobertaForSequenceClassification", {**_BERT_LIKE, "max_position_embeddings": POSITIONS + 2}),
    "distilbert": ("DistilBertForSequenceClassification", _DISTILBERT),
    "albert": ("AlbertForSequenceClassification", {**_BERT_LIKE, "embedding_size": 8}),
    "llama_classifier": ("LlamaForSequenceClassification", {**_LLAMA_LIKE, "num_labels": NUM_LABELS}),
    "bert_mlm": ("BertForMaskedLM", _WITH_FFN),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1}),
}

CAUSAL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3",
    "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon",
)  # fmt: skip
SEQ2SEQ = ("t5", "t5_v11", "mt5", "bart")
CLASSIFIERS = ("bert", "roberta", "distilbert")
ALL = (*CAUSAL, *SEQ2SEQ, *CLASSIFIERS, "bert_mlm")


def tiny(name: str, seed: int = 0, std: float = 0.3, **overrides: Any) -> Any:
    """A tiny random model of architecture `name`, in eval mode, the same for the same seed.

    Weight matrices are normal with standard deviation `std`, biases a third of that, and norm weights are spread
    around the value the library gives them. `overrides` replace single values of the configuration. The caller's
    random state is left as it was.
    """
    class_name, values = _MODELS[name]
    build = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build(build.config_class(**{**values, **overrides}))
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
    """A valid batch with `labels` for any model of this file (or a PEFT wrapper of one), padded on the side named.

    Prompts have between `prompt[0]` and `prompt[1]` tokens, answers one to three, and labels are -100 elsewhere.
    Causal models: the answer is at the end of each row. Encoder-decoders: labels (B, 3). Masked language models: the
    answer is anywhere in the row. Sequence classifiers: labels (B,).
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    lengths = torch.randint(prompt[0], prompt[1] + 1, (batch_size,), generator=generator).tolist()
    answers = [1 + (row + seed) % 3 for row in range(batch_size)]

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, config.vocab_size, (count,), generator=generator)

    if config.is_encoder_decoder:
        rows = [tokens(length) for length in lengths]
        labels = torch.stack([torch.cat([tokens(count), torch.full((3 - count,), -100)]) for count in answers])
    elif kind.endswith("ForSequenceClassification"):
        rows = [tokens(length) for length in lengths]
        labels = torch.randint(0, config.num_labels, (batch_size,), generator=generator)
    else:
        rows, targets = [], []
        for length, count in zip(lengths, answers, strict=True):
            ids = tokens(length + count)
            target = torch.full_like(ids, -100)
            if kind.endswith("ForMaskedLM"):
                chosen = torch.randperm(length + count, generator=generator)[:count]
                target[chosen] = tokens(count)
            else:
                target[length:] = ids[length:]
            rows.append(ids)
            targets.append(target)
        labels = pad_sequence(targets, True, -100, padding)
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], True, 0, padding)
    return {"input_ids": pad_sequence(rows, True, PAD_ID, padding), "attention_mask": mask, "labels": labels}
