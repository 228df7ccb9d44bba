"""The plug-in for lmms-eval (0.7): `ett` as one of its models, and the built-in splits as its tasks (docs/lmms_eval.md).

lmms-eval finds `manifest` by the entry point group ``lmms_eval.models``; nothing else here needs it to be installed.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "ett"
CHAT_CLASS = "ett.evaluate.lmms.models.EttChat"
SIMPLE_CLASS = "ett.evaluate.lmms.models.EttSimple"


def manifest() -> Any:
    """lmms-eval's `ModelManifest` of both classes: chat for generation, simple where likelihoods are asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=SIMPLE_CLASS, chat_class_path=CHAT_CLASS)
