"""Folders on the Hugging Face hub: an exported one, and what ``push_to_hub`` of a model or a processor shares."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open

from ett.errors import UserError
from ett.export.card import model_card
from ett.export.portable import CARD, add_code, merged
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor

MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json")
"""Of a folder in which a model was saved, those that are the model's."""


def push_folder(folder: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload everything in `folder`, card and code included; returns the repository's address.

    Args:
        repository: "name" or "owner/name"; made where there is none. private: if it is made.
        api: the hub's client; None takes the user's login (``hf auth login``).

    Raises:
        UserError: no login, no network, no right to write there, or an impossible name.
    """
    message = "Model, code and card, written by ett export"
    try:
        return str(_upload(api or HfApi(), folder, repository, message, private=private)[0])
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} is written, but not uploaded to {repository!r}: {reason} Log in with `hf auth login`, check the name, "
            f"and run `hf upload {repository} {folder}`."
        ) from error


def share_model(
    model: EttForConditionalGeneration,
    repo_id: str,
    *,
    processor: EttProcessor | None = None,
    license_name: str | None = None,
    metrics: str | Path | None = None,
    saved: str | Path | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] = (),
    **saving: Any,
) -> CommitInfo:
    """Upload a model as `ett.export.portable.export_model` writes it: with processor, code and card.

    The card tells recipe, data and validation losses where the model was loaded from a run's folder and still has the weights
    that it has there. It replaces one that the repository has.

    Args:
        processor: None takes the one beside the model, where it was loaded from.
        license_name, metrics: for the card (`model_card`).
        saved: a folder in which the model was just saved; None saves it.
        commit_message ... tags: as in transformers. saving: arguments of ``save_pretrained``.

    Raises:
        DataError: `metrics` is no such file. Errors of `huggingface_hub` as they are.
    """
    origin = Path(model.name_or_path) if model.name_or_path else None
    if origin is not None and not origin.is_dir():
        origin = None
    if processor is None and origin is not None and (origin / "processor_config.json").is_file():
        processor = EttProcessor.from_pretrained(origin)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        if saved is None:
            model.save_pretrained(folder, **saving)
        else:
            folder.mkdir()
            for path in {path for pattern in MODEL_FILES for path in Path(saved).glob(pattern)}:
                shutil.copyfile(path, folder / path.name)
        if origin is not None and not same_weights(folder, origin):
            origin = None
        if model.config.lora is not None:
            model = merged(EttForConditionalGeneration.from_pretrained(folder))
            folder = Path(directory) / "merged"
            model.save_pretrained(folder, **saving)
        if processor is not None:
            processor.save_pretrained(folder)
        add_code(folder, model)
        card = model_card(
            origin,
            model,
            processor,
            license_name,
            None if metrics is None else Path(metrics),
            name=repo_id.rpartition("/")[2],
            tags=[tags] if isinstance(tags, str) else tags,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        return _upload(
            HfApi(token=token),
            folder,
            repo_id,
            commit_message or "Model, code and card",
            commit_description,
            private=private,
            revision=revision,
            create_pr=create_pr,
        )[1]


def share_processor(
    processor: EttProcessor,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] = (),
    max_shard_size: str = "",
) -> CommitInfo:
    """Upload a processor with its code; a card that the repository has stays. Errors of `huggingface_hub` as they are.

    Args:
        commit_message ... create_pr: as in transformers.
        tags, max_shard_size: transformers' method takes them; here is no card to hold the one, and no weights for the other.
    """
    with tempfile.TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        add_code(Path(directory))
        message = commit_message or "Processor and code"
        client = HfApi(token=token)
        options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
        return _upload(client, Path(directory), repo_id, message, commit_description, **options)[1]


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two saved models have the same tensors, those of `other` in the precision of `folder`."""
    found, expected = _tensor_files(folder), _tensor_files(other)
    if found.keys() != expected.keys():
        return False
    for name, path in found.items():
        with safe_open(path, "pt") as first, safe_open(expected[name], "pt") as second:
            tensor = first.get_tensor(name)
            if not torch.equal(tensor, second.get_tensor(name).to(tensor.dtype)):
                return False
    return True


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Of each tensor the file that holds it."""
    found: dict[str, Path] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), path)
    return found


def _upload(
    client: HfApi,
    folder: Path,
    repository: str,
    message: str,
    description: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> tuple[RepoUrl, CommitInfo]:
    url = client.create_repo(repository, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr"):
        client.create_branch(repo_id=url.repo_id, branch=revision, exist_ok=True)
    commit = client.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )
    return url, commit
