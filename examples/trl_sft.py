"""TRL's SFTTrainer on ETT's joint loss.

SFTTrainer computes a loss of its own from the language model's head; one line takes the model's instead.

python examples/trl_sft.py MODEL MANIFEST.jsonl OUT STEPS
"""

import sys

from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import ett


class JointTrainer(SFTTrainer):
    compute_loss = Trainer.compute_loss  # the model's own: caption loss and tokenizer loss


model, processor = ett.load_model(sys.argv[1])
data = Dataset.from_list([{"messages": e.messages, "images": e.images} for e in ett.Manifest(sys.argv[2])])
arguments = SFTConfig(
    sys.argv[3], max_steps=int(sys.argv[4]), learning_rate=4e-5, per_device_train_batch_size=4, logging_steps=1,
    bf16=False, report_to="none", save_strategy="no",
)  # fmt: skip
collator = ett.EttCollator(processor)
trainer = JointTrainer(model, arguments, train_dataset=data, processing_class=processor, data_collator=collator)
trainer.train()
trainer.save_model()
