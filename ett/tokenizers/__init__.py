"""Vision tokenizers: pictures to codebook embeddings and back."""

from ett.tokenizers.base import VisionTokenizer
from ett.tokenizers.ibq import IBQConfig, IBQTokenizer
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer, Quantizer

__all__ = ["IBQConfig", "IBQTokenizer", "IndexBackpropagationQuantizer", "Quantizer", "VisionTokenizer"]
