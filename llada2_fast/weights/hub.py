"""Where a checkpoint is: a folder, or a snapshot of a repository on the Hugging Face Hub."""

import os
import re
from pathlib import Path

from .weight_map import CheckpointError


def resolve(
    path_or_hub_id: str | os.PathLike,
    revision: str | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    force_download: bool | None = None,
    subfolder: str | None = None,
    patterns: tuple[str, ...] = ("*.json", "*.safetensors", "*.jinja"),
    subfolders: bool = False,
) -> Path:
    """The local folder of a checkpoint. Where the hub cannot be reached or refuses, a snapshot in the cache is used.

    path_or_hub_id: a folder, or owner/name of a hub repository, of which a snapshot is taken.
    revision: its branch, tag or commit; None = its main branch.
    cache_dir: where snapshots are kept; None = the hub library's folder.
    token: for private and gated repositories; True or None = the one that is logged in.
    local_files_only: ask the cache alone.
    force_download: fetch files again that are in the cache.
    subfolder: the folder inside the checkpoint that is meant.
    patterns: only files that match one of them are fetched.
    subfolders: fetch them from folders inside, too.
    Raises CheckpointError in one line when there is neither folder nor snapshot, ValueError for a subfolder that is
    none.
    """
    name, below = os.fspath(path_or_hub_id), _subfolder(subfolder)
    if os.path.isdir(name):
        return _existing(Path(name, below))
    if os.path.exists(name):
        raise CheckpointError(f"{name}: is a file; expected the folder of a checkpoint")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(f"{name}: no such folder, and not the id of a hub repository (owner/name)")
    from huggingface_hub import errors, snapshot_download

    def snapshot(local_files_only: bool) -> Path:
        return Path(snapshot_download(
            name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only,
            force_download=bool(force_download), allow_patterns=[(below / p).as_posix() for p in patterns],
            ignore_patterns=None if subfolders else [(below / "*/*").as_posix()],
        ))  # fmt: skip

    # bases: OSError and what the hub's own HTTP library raises, httpx or with huggingface_hub 2 httpx2
    failures = (*errors.HfHubHTTPError.__bases__, errors.HFValidationError)
    try:
        return _existing(snapshot(bool(local_files_only)) / below)
    except failures as error:
        failure = error
    commit = getattr(revision, "resolved", revision)  # transformers passes huggingface_hub's ResolvedRevision on
    if re.fullmatch(r"[0-9a-f]{40}", commit or "") and not force_download:
        try:  # snapshot_download looks into the cache for a branch, but asks the hub for the files of a commit
            return _existing(snapshot(True) / below)
        except failures:
            pass  # the first failure says more
    reason = _hub_reason(failure, revision, errors)
    raise CheckpointError(f"{name}: no such folder, and the hub did not provide it: {reason}") from failure


def _subfolder(subfolder) -> Path:
    """`subfolder` as a relative path; ValueError for anything else."""
    path = Path(subfolder or "") if isinstance(subfolder, (str, os.PathLike, type(None))) else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"subfolder={subfolder!r:.80}: expected the name of a folder inside the checkpoint")
    return path


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    return folder


def _hub_reason(error: Exception, revision: str | None, errors) -> str:
    """One line for an error of huggingface_hub, whose own are long, with what helps on the later lines."""
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its terms on the hub, then log in or give token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one: check the id, log in or give token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r:.80}"
    if isinstance(error, errors.LocalEntryNotFoundError) and revision is not None:
        return f"revision {revision!r:.80}: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
