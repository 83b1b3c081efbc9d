"""Two tasks in sequence, saved, loaded, exported and merged. Offline: python examples/minimal.py"""

import argparse
import json
from pathlib import Path

from peft import get_peft_model
from tasks import load_model  # model and tokenizer by from_pretrained; "smollm2" is read from an installed package
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig, export_lora, load_chain

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="folder or Hub id of a causal model, or smollm2")
parser.add_argument("--out", type=Path, default=Path("runs/minimal"))
options = parser.parse_args()
base, tokenizer = load_model(options.model)


def read(task, split):
    lines = Path(__file__).with_name("data").joinpath(task, f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]  # {"prompt": ..., "answer": ...}


def tokenized(example):
    prompt = tokenizer(example["prompt"]).input_ids
    answer = tokenizer(" " + example["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def config():
    attribution = AttributionConfig(refresh=0.5)  # psi is computed twice; the default is ten times
    return ASOLoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM", attribution=attribution)


def train(task):
    args = TrainingArguments(options.out / "run", num_train_epochs=2, learning_rate=1e-3, save_strategy="no")
    data, collator = [tokenized(example) for example in read(task, "train")], DataCollatorForSeq2Seq(tokenizer)
    ASOTrainer(model=model, args=args, train_dataset=data, data_collator=collator).train()


model = get_peft_model(base, config(), adapter_name="mood")
train("mood")
model.add_adapter("topic", config())
model.set_adapter("topic")  # trains; "mood" is its history: active and frozen
train("topic")
print("psi of each earlier task:", model.base_model.soft_coefficients)

model.save_pretrained(options.out / "chain")
model = load_chain(load_model(options.model)[0], options.out / "chain")
export_lora(model, options.out / "served")  # one stock LoRA adapter
merged = model.merge_and_unload()  # or one model: base + all adapters

for task in ("mood", "topic"):
    right, examples = 0, read(task, "test")
    for example in examples:
        batch = tokenizer(example["prompt"], return_tensors="pt", return_token_type_ids=False)
        output = merged.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(output[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
        right += answer.strip() == example["answer"]
    print(f"{task}: {right} of {len(examples)} answers right")
