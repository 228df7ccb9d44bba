"""What is left of a picture that went through the tokenizer's indices."""

from __future__ import annotations

from typing import ClassVar

import torch

from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, batches
from ett.evaluate.metrics import codebook_usage, index_counts, index_perplexity, l1, psnr, ssim
from ett.images import load_image


class ReconstructionTask(Task):
    """Pictures at the size the model works at, against their reconstruction from indices; padding does not count.

    Metrics, means over pictures:
        psnr [dB], ssim, l1 (mean absolute difference, pictures in [-1, 1]).
    and of the indices of all pictures together, padding included:
        codebook_usage: share of the K codes in use. index_perplexity: in [1, K].
    """

    name: ClassVar[str] = "reconstruction"
    needs_language_model: ClassVar[bool] = False

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        tokenizer, image_processor = subject.vision_tokenizer, subject.processor.image_processor
        counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
        sums: dict[str, list[float]] = {"psnr": [], "ssim": [], "l1": []}
        pictures: list[int] = []
        for part in batches(data, subject.batch_size, f"{data.name} {self.name}"):
            shown = [example for example in part if example.images]
            if not shown:
                continue
            fitted = [image_processor.fit(load_image(image)) for example in shown for image in example.images]
            pixels = torch.stack([torch.from_numpy(array) for array, _ in fitted]).to(subject.device)
            indices = tokenizer.tokenize(pixels)
            decoded = tokenizer.detokenize(indices)
            counts += index_counts(indices, tokenizer.codebook_size)
            for name, measure in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
                each = iter([measure(pixels[i], decoded[i], box) for i, (_, box) in enumerate(fitted)])
                sums[name].extend(sum(next(each) for _ in example.images) for example in shown)
            pictures.extend(len(example.images) for example in shown)
        if not pictures:
            return TaskResult()
        metrics = {name: Metric.mean(values, pictures) for name, values in sums.items()}
        metrics["codebook_usage"] = Metric(codebook_usage(counts), len(pictures))
        metrics["index_perplexity"] = Metric(index_perplexity(counts), len(pictures))
        return TaskResult(metrics)
