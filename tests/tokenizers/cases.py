"""One small tokenizer of every type, as a recipe would describe it."""

from __future__ import annotations

from typing import Any

from tests.conftest import TOKENIZER

_CNN = {name: value for name, value in TOKENIZER.items() if not name.startswith("codebook")}
_TWO_LEVELS = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "embed_dim": 8,
}
EMU3 = _TWO_LEVELS | {"codebook_size": 32, "hidden_size": 32, "attn_resolutions": [1], "temporal_downsample_factor": 4}
CHAMELEON = _TWO_LEVELS | {"num_embeddings": 32, "resolution": 16, "attn_resolutions": [8], "latent_channels": 12}
JANUS = _TWO_LEVELS | {"num_embeddings": 32, "num_patches": 8, "latent_channels": 12}
DIFFUSERS: dict[str, Any] = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
    "latent_channels": 12,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 32,
}
SPATIAL = DIFFUSERS | {"norm_type": "spatial", "block_out_channels": [32, 32], "vq_embed_dim": 12}

CASES: dict[str, dict[str, Any]] = {
    "ibq": dict(TOKENIZER),
    "ibq-distance": TOKENIZER | {"similarity": "distance"},
    "fsq": _CNN | {"tokenizer_type": "fsq", "levels": [5, 4, 3]},
    "lfq": _CNN | {"tokenizer_type": "lfq", "codebook_size": 64},
    "emu3": {"tokenizer_type": "emu3_vqvae", "config": EMU3},
    "chameleon": {"tokenizer_type": "chameleon_vqvae", "config": CHAMELEON},
    "janus": {"tokenizer_type": "janus_vqvae", "config": JANUS},
    "janus-normalized": {"tokenizer_type": "janus_vqvae", "config": JANUS, "normalize": True},
    "janus-straight-through": {"tokenizer_type": "janus_vqvae", "config": JANUS, "gradient": "straight_through"},
    "diffusers": {"tokenizer_type": "diffusers_vq", "config": DIFFUSERS},
    "diffusers-spatial": {"tokenizer_type": "diffusers_vq", "config": SPATIAL},
    "diffusers-normalized": {
        "tokenizer_type": "diffusers_vq",
        "config": DIFFUSERS,
        "normalize": True,
        "gradient": "straight_through",
    },
}
"""Configurations by name; each names its `tokenizer_type` (the default is "ibq")."""
WITHOUT_CODEBOOK_PARAMETER = {"fsq", "lfq"}
