"""A model with another one's vision tokenizer: what does a language model make of tokens that it had no part in?

    python tools/swap_tokenizer.py runs/tight_64px runs/tight_reading/ett/seed-0 runs/swapped/ett

writes OUT, the first model with the second one's tokenizer, as a start for training (`model.init: OUT`). Both tokenizers must
have the same shape: downsampling, number and length of codes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ett


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="brings language model, projector and processor")
    parser.add_argument("tokenizer", help="a model or run that brings the vision tokenizer")
    parser.add_argument("out", type=Path, help="a new folder")
    arguments = parser.parse_args()
    model, processor = ett.load_model(arguments.model)
    tokenizer = ett.load_model(arguments.tokenizer)[0].vision_tokenizer
    for name in ("downsample", "codebook_size", "codebook_dim"):
        own, other = getattr(model.vision_tokenizer, name), getattr(tokenizer, name)
        if own != other:
            parser.error(
                f"{name} is {own} in {arguments.model} and {other} in {arguments.tokenizer}: it must be the same."
            )
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already. Choose another folder, or delete it.")
    model.vision_tokenizer = tokenizer
    model.config.vision_tokenizer = tokenizer.config_mapping()
    model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
