"""PEFT: low-rank adapters in the language model, vision tokenizer and projector trained whole, merged at the end.

python examples/peft_lora.py MODEL MANIFEST.jsonl OUT STEPS
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import ett

model, processor = ett.load_model(sys.argv[1])
whole = ["vision_tokenizer", "projector"]  # the point of ETT: the tokenizer must train, not its adapter
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=whole))
arguments = TrainingArguments(
    sys.argv[3], max_steps=int(sys.argv[4]), learning_rate=4e-5, per_device_train_batch_size=4, logging_steps=1,
    remove_unused_columns=False, report_to="none", save_strategy="no",
)  # fmt: skip
collator, data = ett.EttCollator(processor), ett.Manifest(sys.argv[2])
trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data)
trainer.train()
model.merge_and_unload().save_pretrained(sys.argv[3])
processor.save_pretrained(sys.argv[3])
