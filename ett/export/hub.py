"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ett.errors import UserError


def push_folder(folder: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload everything in `folder`, card and code included; returns the repository's address.

    transformers' own ``push_to_hub`` writes a card of its own over ours and leaves the code out, hence this.

    Args:
        repository: "name" or "owner/name"; made where there is none. private: if it is made.
        api: the hub's client; None takes the user's login (``hf auth login``).

    Raises:
        UserError: no login, no network, no right to write there, or an impossible name.
    """
    client = api or HfApi()
    try:
        url = client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Model, code and card, written by ett export"
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} is written, but not uploaded to {repository!r}: {reason} Log in with `hf auth login`, check the name, "
            f"and run `hf upload {repository} {folder}`."
        ) from error
    return str(url)
