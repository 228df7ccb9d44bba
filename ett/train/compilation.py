"""torch.compile, part by part: what repeats is compiled once, and no name of a parameter changes."""

from __future__ import annotations

from ett.model.ett import EttForConditionalGeneration
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.cnn_tokenizer import CNNTokenizer


def compile_parts(model: EttForConditionalGeneration | VisionTokenizer) -> None:
    """Compile, in place, the layers of the language model's stack and encoder and decoder of our own CNN.

    The first step of each shape waits for the compiler. Layers share their code, and take sequences of any length. What lies
    between them (embeddings, quantizer, projector, head and losses) stays as it is: the quantizer's chunks follow values.
    """
    tokenizer = model if isinstance(model, VisionTokenizer) else model.vision_tokenizer
    if isinstance(tokenizer, CNNTokenizer):
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    if isinstance(model, EttForConditionalGeneration):
        repeated = set(model.language_model._no_split_modules or ())
        for layer in model.language_model.modules():
            if type(layer).__name__ in repeated:
                layer.compile(dynamic=True)
