"""Stock transformers.Trainer on ETT's joint loss: the model returns it, so nothing is subclassed.

python examples/hf_trainer.py MODEL MANIFEST.jsonl OUT STEPS
"""

import sys

from transformers import Trainer, TrainingArguments

import ett

model, processor = ett.load_model(sys.argv[1])
arguments = TrainingArguments(
    sys.argv[3], max_steps=int(sys.argv[4]), learning_rate=4e-5, per_device_train_batch_size=4, logging_steps=1,
    remove_unused_columns=False, report_to="none", save_strategy="no",
)  # fmt: skip
collator, data = ett.EttCollator(processor), ett.Manifest(sys.argv[2])
trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, processing_class=processor)
trainer.train()
trainer.save_model()  # the processor too: a folder for every command of ett, and for from_pretrained
