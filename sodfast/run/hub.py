"""The Hugging Face hub: an exported model is uploaded, with its card."""

from pathlib import Path
from types import ModuleType

from sodfast.errors import RunFailed, UsageError


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError("--push: pip install huggingface_hub") from error
    return huggingface_hub


def require_hub(repository: str) -> None:
    """Raise `UsageError` where nothing could be uploaded to `repository`, ORG/NAME: the package
    huggingface_hub or a token of its is missing, or the name is none. Needs no network."""
    hub = _hub()
    try:
        hub.utils.validate_repo_id(repository)
    except hub.errors.HFValidationError as error:
        raise UsageError(f"--push={repository}: {error}") from error
    if "/" not in repository:
        raise UsageError(f"--push={repository}: name it ORG/NAME, or USER/NAME")
    if hub.get_token() is None:
        raise UsageError("--push: no token of the hub: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload all files of `folder` to the model `repository` of the hub; return its address.

    A repository that is not there is created, and private: what stands in the card can be read
    before anybody else does. One that is there stays as public or private as it is.

    Raises:
        RunFailed: the hub refused, or was not reached.
    """
    hub = _hub()
    try:
        address = hub.HfApi().create_repo(repository, private=True, exist_ok=True)
        hub.HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Exported by sodfast"
        )
    except hub.errors.HfHubHTTPError.__bases__ as error:  # of its HTTP client, and OSError
        raise RunFailed(
            f"{folder} is written, but not uploaded to {repository}: {error}; "
            f"`hf upload {repository} {folder}` tries again"
        ) from error
    return str(address)
