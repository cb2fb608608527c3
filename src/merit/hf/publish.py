"""Upload of a finished model folder to the hub, and what is needed for it: who is signed in, licences of datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, DatasetCardData, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from merit.errors import RecipeError, ResourceError
from merit.hf.side_files import reason

__all__ = ["Licence", "dataset_licences", "model_files", "publish", "require_repo_id"]


@dataclass(frozen=True)
class Licence:
    """A dataset's licence as its card on the hub states it; ``name`` is None where it states none or could not be asked."""

    name: str | None
    link: str | None = None


def require_repo_id(repo: str) -> None:
    """Check a repository id before anything is read.

    Raises:
        RecipeError: It is not ``namespace/name``.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"--to {repo}: {str(error).splitlines()[0]}", "Give namespace/name.") from None
    if "/" not in repo:
        raise RecipeError(f"--to {repo}: the namespace is missing.", "Give namespace/name, such as my-org/my-model.")


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder by their name in the repository, in order; hidden files stay here."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if not any(part.startswith(".") for part in Path(name).parts)}


def dataset_licences(ids: Sequence[str], *, endpoint: str | None = None) -> dict[str, Licence]:
    """What the hub says about the licences of datasets; unknown ones where it cannot be asked."""
    found = {name: Licence(None) for name in ids}
    if constants.HF_HUB_OFFLINE:
        return found
    api = HfApi(endpoint=endpoint)
    for name in ids:
        with contextlib.suppress(Exception):  # the libraries' network errors have no common base class
            card = api.dataset_info(name).card_data or DatasetCardData()
            licence = card.get("license_name") or card.get("license")
            text = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
            link = card.get("license_link")
            found[name] = Licence(str(text) if text else None, str(link) if link else None)
    return found


def publish(
    repo: str, files: Mapping[str, Path | bytes], message: str, *, private: bool, endpoint: str | None = None
) -> str:
    """Create the repository if it does not exist, and put all files into it as one commit.

    Args:
        repo: ``namespace/name``.
        files: By name in the repository: a file here, or content.
        message: Of the commit.
        private: For a new repository.
        endpoint: Of the hub; default the library's own (HF_ENDPOINT).

    Returns:
        Address of the repository.

    Raises:
        ResourceError: The hub could not be reached or refused; it keeps what it had, since there is one commit.
    """
    if constants.HF_HUB_OFFLINE:
        raise ResourceError(
            "The hub is switched off (HF_HUB_OFFLINE).", "Unset it, or use --dry-run to see what would go."
        )
    api = HfApi(endpoint=endpoint)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message)
    except RepositoryNotFoundError:
        raise ResourceError(f"{repo}: the hub has no such namespace, or you may not write to it.", _SIGN_IN) from None
    except HfHubHTTPError as error:
        raise ResourceError(f"{repo} could not be uploaded: {reason(error)[:300]}", _SIGN_IN) from None
    except Exception as error:  # the libraries' network errors have no common base class
        raise ResourceError(f"{repo} could not be uploaded: {reason(error)[:300]}", _AGAIN) from None
    return f"{(endpoint or constants.ENDPOINT).rstrip('/')}/{repo}"


_AGAIN = "Nothing was changed on the hub unless it says so itself; run the same command again."
_SIGN_IN = "Sign in with `hf auth login`, or set HF_TOKEN to a token that may write there."
