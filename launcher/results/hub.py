"""An export on the Hugging Face Hub, on request and with a login only."""

import re
import sys
from pathlib import Path

from launcher.errors import UserError
from launcher.utils.redaction import HIDDEN, redacted

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def refuse_unready(repository: str) -> None:
    """Raise `UserError` where a push could not begin, before minutes are spent on an export."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "--push, and no token of the Hugging Face Hub is here",
            expected="HF_TOKEN, or a login that is stored",
            instead="type hf auth login once, or leave out --push",
        )
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(
            f"--push {repository[:60]}",
            expected="the owner of a repository and its name",
            instead="type --push OWNER/NAME",
        )


def push(folder: Path, repository: str) -> str:
    """Upload a folder in one commit; returns its address.

    A new repository is private; publishing it is left to the user. Raises `UserError` where
    the Hub does not take it; the folder is still there.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    token = get_token()
    hub = HfApi(token=token)
    try:
        made = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload from launcher export"
        )
    except Exception as error:  # of its HTTP library, or its own
        hides_another = isinstance(error, RuntimeError) and error.__cause__ is not None
        cause = error.__cause__ if hides_another else error
        said = " ".join(f"{type(cause).__name__}: {cause}".split())
        said = redacted(said.replace(token, HIDDEN) if token else said)
        raise UserError(
            f"{repository}, which was not taken ({said[:300]})",
            expected="a repository into which your token may write",
            instead=f"push {folder}, which is proved: hf upload {repository} {folder}",
        ) from None
    return str(made)
