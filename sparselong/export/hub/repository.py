"""Uploading files to a repository of the hub in one commit, and comparing them with what it has.

The commit is all or nothing: until it is made, nobody sees a part of the files. Files that an
interrupted upload has sent already are not sent again; the hub knows them by their hashes. A new
repository is private, until its owner changes that on its page.

A repository that holds anything else is left alone. Files under the names of ours are replaced only
with `--force`; the hub keeps earlier revisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.run import Stage

_MADE_BY_HUB = (".gitattributes",)
_FAILURES = (httpx.HTTPError, OSError, RuntimeError, ValueError)
"""What huggingface_hub raises if an upload fails: of the network, of the client of its storage, and
for answers that it does not understand."""
_TOKEN = "a token that may write there, from https://huggingface.co/settings/tokens"
Local = dict[str, CommitOperationAdd]
Present = dict[str, RepoFile]


def upload(stage: Stage, repo: str, files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """Upload files, and return the metrics of the part.

    Args:
        stage: for messages; whether it is forced.
        repo: OWNER/NAME.
        files: each as a path here, or its content, by path in the repository.

    Raises:
        StageError: there is no token or no network, the token may not write, the repository holds
            other files, or the hub has other files than were sent.
    """
    nothing = f"nothing was uploaded to {repo}; exports and model card are done"
    if get_token() is None:
        raise _failure(nothing, _TOKEN, "no token", "hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _explained(api, nothing):
        revision = _open_repository(api, repo)
        present = _list_files(api, repo, revision)
    # Each reads its file for its hash.
    local = {
        name: CommitOperationAdd(name, file if isinstance(file, bytes) else str(file))
        for name, file in files.items()
    }
    _refuse_others(stage, repo, present, local)
    size = sum(one.upload_info.size for one in local.values())
    stage.log(f"uploading {len(files)} files, {format_bytes(size)}, to {api.endpoint}/{repo}")
    if _find_differences(local, present):
        message = f"Upload {' '.join(stage.options['to'].split()[:-1])}, by Sparse-Long"
        with _explained(api, nothing):
            # With parent_commit it fails if somebody has changed the repository in the meantime.
            revision = api.create_commit(
                repo, local.values(), commit_message=message, parent_commit=revision
            ).oid
    with _explained(api, f"the files were sent to {repo}, but are not compared yet"):
        present = _list_files(api, repo, revision)
    differing = _find_differences(local, present)
    if differing:
        raise StageError(
            f"{repo} at revision {revision} does not hold what was sent",
            f"{len(files)} files with the hashes of those here",
            f"differences in {', '.join(differing[:4])}",
            "run the same command again",
        )
    stage.log(f"uploaded and compared: {api.endpoint}/{repo}/tree/{revision}")
    return {"repository": repo, "revision": revision, "files": len(files), "uploaded_bytes": size}


def _open_repository(api: HfApi, repo: str) -> str:
    """Return the newest revision of a repository, which is made, private, if there is none."""
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=True)
        info = api.repo_info(repo)
    return str(info.sha)


def _list_files(api: HfApi, repo: str, revision: str) -> Present:
    listed = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {one.path: one for one in listed if isinstance(one, RepoFile)}


def _find_differences(local: Local, present: Present) -> list[str]:
    """Return names of files that the repository lacks or has with other content."""
    return sorted(n for n in local if n not in present or not _is_same(local[n], present[n]))


def _is_same(local: CommitOperationAdd, found: RepoFile) -> bool:
    """Return whether a file is one of the hub's: by its sha256, or by git's hash if it is small."""
    if found.lfs is not None:
        return found.lfs.sha256 == local.upload_info.sha256.hex()
    with local.as_file() as file:
        content = file.read()
    return found.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refuse_others(stage: Stage, repo: str, present: Present, local: Local) -> None:
    """Raise if the repository holds files that would be mixed with ours, or replaced unasked."""
    others = sorted(present.keys() - local.keys() - {*_MADE_BY_HUB})
    if others:
        raise StageError(
            f"{repo} holds files of something else: nothing was uploaded",
            "a new repository, or one with an earlier upload of the same forms",
            ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else ""),
            "pass the name of a new repository, or delete these files on the hub",
        )
    changed = [name for name in _find_differences(local, present) if name in present]
    if changed and not stage.forced:
        raise StageError(
            f"{repo} holds another export: nothing was uploaded",
            "a new repository, or --force to add a revision with other content",
            f"other content in {', '.join(changed[:4])}",
            "pass the name of a new repository, or run the same command again with --force",
        )


@contextmanager
def _explained(api: HfApi, what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into an expected failure, which begins with `what`."""
    taken = f"{api.endpoint} to be reached and to take the files"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise _failure(what, taken, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        fix = "hf auth login with another token, or correct --repo" if refused else "try later"
        raise _failure(what, _TOKEN if refused else taken, _shorten(error), fix) from error
    except _FAILURES as error:
        raise _failure(what, taken, _shorten(error), "check the network") from error


def _shorten(error: BaseException) -> str:
    """Return what an error and its cause say, on one line."""
    texts = [str(one) or type(one).__name__ for one in (error, error.__cause__) if one is not None]
    return " ".join(" ".join(texts).split())[:400]


def _failure(what: str, expected: str, found: str, fix: str) -> StageError:
    again = "then run the same command again: only the upload is left to do"
    return StageError(what, expected, found, f"{fix}; {again}")
