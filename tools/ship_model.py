"""Stores a trained model as shipped weights, rounded to float16 on disk; it computes in float32 like any other.

    python tools/ship_model.py runs/reader_64px reader_64px

Half the size, and no code is between what is stored and what runs: loading widens the numbers, nothing else. Prints how many
tokens of validation pictures the rounding changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ett.data.mixture import SourceConfig
from ett.experiments.run import load_model, resolve_model_folder
from ett.model.loading import SHIPPED_WEIGHTS

CHECKED_PICTURES = 128


def ship(source: Path, target: Path) -> None:
    """`source`, a run or a saved model, into the folder `target`, which must not exist or be replaced."""
    folder = resolve_model_folder(source)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in load_file(weights).items()
    }
    assert all(tensor.isfinite().all() for tensor in tensors.values()), "a weight does not fit float16"
    save_file(tensors, weights, metadata={"format": "pt"})
    for path in target.rglob("*.json"):
        _one_line_end(path)
    print(f"{weights}: {weights.stat().st_size / 1e6:.2f} MB")


def changed_tokens(source: Path, target: Path) -> float:
    """Share of the tokens of validation pictures that the two models index differently."""
    (before, processor), (after, _) = load_model(source), load_model(target)
    pictures = [
        config.with_split("validation")
        for config in (SourceConfig("names"), SourceConfig("drawn_text", size=64, difficulty=0.3))
    ]
    changed = []
    for source_ in pictures:
        examples = [source_[i] for i in range(CHECKED_PICTURES)]
        pixels = processor.image_processor([e.images[0] for e in examples], return_tensors="pt")["pixel_values"]
        changed.append((before.vision_tokenizer.tokenize(pixels) != after.vision_tokenizer.tokenize(pixels)).double())
    return float(torch.cat(changed).mean())


def _one_line_end(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's folder or a saved model's")
    parser.add_argument("name", help="of the folder in ett/weights")
    arguments = parser.parse_args()
    target = SHIPPED_WEIGHTS / arguments.name
    ship(arguments.source, target)
    print(f"tokens changed by the rounding: {changed_tokens(arguments.source, target):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
