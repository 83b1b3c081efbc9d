"""Two tasks in sequence, saved, loaded, exported and merged. Offline: python examples/minimal.py"""

import argparse
from pathlib import Path

from peft import get_peft_model
from tasks import AnswerDataset, accuracy, load_model, read_task  # data and model of the examples
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig, export_lora, load_chain

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="folder or Hub id of a causal model, or smollm2")
parser.add_argument("--out", type=Path, default=Path("runs/minimal"))
options = parser.parse_args()
base, tokenizer = load_model(options.model)
mood, topic = (read_task(Path(__file__).parent / "data" / name) for name in ("mood", "topic"))
attribution = AttributionConfig(refresh=0.5)  # psi is computed twice; the default is four times
config = ASOLoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM", attribution=attribution)


def train(task):
    args = TrainingArguments(options.out / "run", num_train_epochs=2, learning_rate=1e-3, save_strategy="no")
    data = AnswerDataset(task.train, tokenizer, seq2seq=False)  # input_ids and labels, -100 on the prompt
    ASOTrainer(model=model, args=args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()


model = get_peft_model(base, config, adapter_name="mood")
train(mood)
model.add_adapter("topic", config)
model.set_adapter("topic")  # trains; "mood" is its history: active and frozen
train(topic)
print("psi of each earlier task:", model.base_model.soft_coefficients)

model.save_pretrained(options.out / "chain")
model = load_chain(load_model(options.model)[0], options.out / "chain")
export_lora(model, options.out / "served")  # one stock LoRA adapter
merged = model.merge_and_unload()  # or one model: base + all adapters
for task in (mood, topic):
    print(f"{task.name}: {accuracy(merged, tokenizer, task):.0%} of the answers right")
