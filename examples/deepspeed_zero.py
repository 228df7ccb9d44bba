"""DeepSpeed ZeRO through the stock transformers.Trainer: gradients and optimizer divided (2), weights too (3).

torchrun --nproc-per-node 8 examples/deepspeed_zero.py MODEL MANIFEST.jsonl OUT STEPS 3
"""

import sys

import deepspeed
import torch
from transformers import Trainer, TrainingArguments

import ett

model, processor = ett.load_model(sys.argv[1])
model.to(memory_format=torch.contiguous_format)  # DeepSpeed exchanges no channels-last weights
# the codebook is looked through by the loss's way back as well: to be gathered there too
deepspeed.zero.register_external_parameter(model, model.vision_tokenizer.quantize.embedding.weight)
zero = {"stage": int(sys.argv[5]), "stage3_gather_16bit_weights_on_model_save": True}
settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
arguments = TrainingArguments(
    sys.argv[3], max_steps=int(sys.argv[4]), learning_rate=4e-5, per_device_train_batch_size=4, logging_steps=1,
    remove_unused_columns=False, report_to="none", save_strategy="no", deepspeed=settings,
)  # fmt: skip
collator, data = ett.EttCollator(processor), ett.Manifest(sys.argv[2])
trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, processing_class=processor)
trainer.train()
trainer.save_model()
