"""Lightning on ETT's joint loss.

python examples/lightning_module.py MODEL MANIFEST.jsonl OUT STEPS
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader

import ett

model, processor = ett.load_model(sys.argv[1])


class Joint(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model.train()

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=4e-5, weight_decay=0.0)


data = DataLoader(ett.Manifest(sys.argv[2]), batch_size=4, shuffle=True, collate_fn=ett.EttCollator(processor))
lightning.Trainer(max_steps=int(sys.argv[4]), default_root_dir=sys.argv[3], gradient_clip_val=1.0).fit(Joint(), data)
model.save_pretrained(sys.argv[3])
processor.save_pretrained(sys.argv[3])
