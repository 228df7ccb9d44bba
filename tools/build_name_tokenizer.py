"""Build `ett/model/names_tokenizer.json`: a byte-level BPE in which a common word of the built-in names is one token.

    python tools/build_name_tokenizer.py

Trained on the names and styles of the training pictures alone; the same pictures give the same file.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ett.data.artwork import ArtworkNames

SIZE = 2560
OUT = Path(__file__).parents[1] / "ett" / "model" / "names_tokenizer.json"


def main() -> None:
    """Train on `name, style` of every training picture, and write the file."""
    pictures = ArtworkNames("train")
    facts = [pictures.facts(index) for index in range(len(pictures))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator((f"{each['name']}, {each['style']}" for each in facts), trainer)
    tokenizer.save(str(OUT), pretty=False)
    print(f"{OUT.name}: {tokenizer.get_vocab_size()} tokens, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
