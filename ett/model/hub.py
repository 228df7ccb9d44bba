"""What ``push_to_hub`` of the model and of the processor shares: a folder that loads where this package is not installed.

transformers' own would upload weights with a general card and without the code. What belongs into the folder is made by
`ett.export`, which reads the source of this level and stands above it; it is looked up by its name when something is shared.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

SHARING = "ett.export.hub"
OPTIONS = frozenset(
    {"commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"}
    | {"license_name", "metrics", "processor"}
)
"""What ``save_pretrained(push_to_hub=True)`` hands on; its other arguments say how weights are saved."""


def share_model(model: Any, repo_id: str, **options: Any) -> CommitInfo:
    """`ett.export.hub.share_model`."""
    found: CommitInfo = importlib.import_module(SHARING).share_model(model, repo_id, **options)
    return found


def share_processor(processor: Any, repo_id: str, **options: Any) -> CommitInfo:
    """`ett.export.hub.share_processor`."""
    found: CommitInfo = importlib.import_module(SHARING).share_processor(processor, repo_id, **options)
    return found


def split_options(
    directory: str | os.PathLike[str], given: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(repository, options of sharing, options of saving) of ``save_pretrained(directory, push_to_hub=True, **given)``."""
    repo_id = given.get("repo_id") or Path(directory).name
    sharing = {name: value for name, value in given.items() if name in OPTIONS}
    saving = {name: value for name, value in given.items() if name not in OPTIONS | {"repo_id"}}
    return repo_id, sharing, saving
