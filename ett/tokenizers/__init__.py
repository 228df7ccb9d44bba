"""Vision tokenizers: pictures to codebook embeddings and back."""

from ett.tokenizers.base import VisionTokenizer
from ett.tokenizers.diffusers_vq import DiffusersVQTokenizer
from ett.tokenizers.fsq import FiniteScalarQuantizer, FSQConfig, FSQTokenizer
from ett.tokenizers.ibq import IBQConfig, IBQTokenizer
from ett.tokenizers.lfq import LFQConfig, LFQTokenizer, LookupFreeQuantizer
from ett.tokenizers.library_vq import LibraryConfig
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer, Quantizer
from ett.tokenizers.transformers_vq import (
    ChameleonTokenizer,
    Emu3Tokenizer,
    JanusTokenizer,
    TransformersVQTokenizer,
)

__all__ = [
    "ChameleonTokenizer",
    "DiffusersVQTokenizer",
    "Emu3Tokenizer",
    "FSQConfig",
    "FSQTokenizer",
    "FiniteScalarQuantizer",
    "IBQConfig",
    "IBQTokenizer",
    "IndexBackpropagationQuantizer",
    "JanusTokenizer",
    "LFQConfig",
    "LFQTokenizer",
    "LibraryConfig",
    "LookupFreeQuantizer",
    "Quantizer",
    "TransformersVQTokenizer",
    "VisionTokenizer",
]
