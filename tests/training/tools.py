"""Tiny tasks to train on, and the pieces that the training tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainingArguments, TrainingArguments

from peft_aso import ASOLoraConfig, ASOSeq2SeqTrainer, ASOTrainer, AttributionConfig
from tests.tiny_models import tiny, tiny_batch

QUICK = AttributionConfig(steps=2, probe_size=4)
NO_DROPOUT = {"llama": (), "t5": ("dropout_rate",), "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob")}
TASK_TYPES = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
WORDS = ["what", "is", "the", "sky", "grass", "blue", "green", "user", "assistant", ":", "yes", "no"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> {% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


class TinyTask(Dataset):  # type: ignore[type-arg]
    """`size` random examples for a tiny model, padded to one length so that torch's default collator serves."""

    def __init__(self, model: Any, size: int = 16, seed: int = 0) -> None:
        self.batch = tiny_batch(model, batch_size=size, seed=seed)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


def tokenizer(known: list[str] = WORDS) -> Any:
    """One word a token, with a chat template that marks the assistant's words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *known])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )


def config(name: str, **settings: Any) -> ASOLoraConfig:
    """A small ASO-LoRA config for the tiny model `name`, without dropout by default."""
    return ASOLoraConfig(**{"attribution": QUICK, "r": 4, "lora_alpha": 8, "task_type": TASK_TYPES[name], **settings})


def randomize(model: Any, adapter: str, seed: int) -> None:
    """Give an adapter the random weights of a trained one (B is zero in a fresh one)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".{adapter}." in parameter_name and "lora_" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def chain(name: str = "llama", tasks: tuple[str, ...] = ("first", "second"), **settings: Any) -> Any:
    """A PEFT model on the tiny model `name`: all tasks but the last have random weights, the last is active."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny(name, **dict.fromkeys(NO_DROPOUT[name], 0.0)),
        config(name, **(settings if len(tasks) == 1 else {})),
        adapter_name=tasks[0],
    )
    for index, task in enumerate(tasks[1:], start=1):
        randomize(model, tasks[index - 1], seed=index)
        model.add_adapter(task, config(name, **(settings if task == tasks[-1] else {})))
    model.set_adapter(tasks[-1])
    return model


def arguments(folder: Path, kind: type = ASOTrainer, **settings: Any) -> TrainingArguments:
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}
    defaults |= {"learning_rate": 1e-2, "weight_decay": 0.0, "lr_scheduler_type": "constant", "seed": 3}
    defaults |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    make = Seq2SeqTrainingArguments if kind is ASOSeq2SeqTrainer else TrainingArguments
    return make(**{**defaults, **settings})


def train(
    model: Any, folder: Path, data: Any = None, kind: Any = ASOTrainer, resume: Any = None, more: Any = (), **args: Any
) -> Any:
    """Train the active task and return the trainer; `more` are further keywords of the trainer."""
    given = {"args": arguments(folder, kind, **args), "train_dataset": data or TinyTask(model), **dict(more)}
    trainer = kind(model=model, eval_dataset=given["train_dataset"], **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Copies of all weights of one adapter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}." in name}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)
