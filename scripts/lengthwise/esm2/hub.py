"""Checkpoints on the Hugging Face hub, by its own library: its cache, tokens, offline mode and HF_ENDPOINT."""

import logging
import re
from itertools import count
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.hugging_face_layout import read_config
from lengthwise.esm2.sources import (
    ADAPTERS,
    CONFIG,
    INDEX,
    NO_ADAPTERS,
    VOCABULARY,
    WEIGHTS,
    HubId,
    indexed,
    no_pickles,
    not_served,
    other_family,
)

log = logging.getLogger("lengthwise")
ATTEMPTS = 3  # of a run
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(model: HubId) -> tuple[Path, dict[str, str]]:
    """Provide a model's files in the library's cache; the config is judged before any weights are downloaded.

    Returns
    -------
    (folder, origin)
        The folder in the cache, which holds one commit of the model; and its id, revision (as asked for), commit and address.

    Raises
    ------
    LengthwiseError
        The hub does not have the model or does not give it, it has no safetensors, or it is not ESM-2.
    """
    try:
        folder = _fetch_patiently(model)
    except LocalEntryNotFoundError as error:
        raise LengthwiseError(
            f"{model}: not whole in the cache {constants.HF_HUB_CACHE}, and {_why_local(error)}; with a network, run "
            f"'hf download {model.id}' and take that cache along (HF_HOME), or give a folder with the files as 'model'"
        ) from error
    except EntryNotFoundError as error:
        raise LengthwiseError(f"{model}: {_what_it_lacks(model)}") from error
    except HfHubHTTPError as error:
        raise LengthwiseError(f"{model}: {_refusal(model, error)}") from error
    asked = model.revision or constants.DEFAULT_REVISION
    return folder, {"id": model.id, "revision": asked, "commit": folder.name, "address": constants.ENDPOINT}


def _fetch_patiently(model: HubId) -> Path:
    """Fetch a model; a broken transfer is taken up again, which some versions of the library leave to the caller."""
    for attempt in count(1):
        try:
            return _fetch(model)
        except (EntryNotFoundError, HfHubHTTPError, LengthwiseError):
            raise
        except Exception as error:  # each version of the library has its own HTTP client, with its own exceptions
            reason = f"{type(error).__name__}: {_first_line(error)}"
            if attempt == ATTEMPTS:
                raise LengthwiseError(
                    f"{model}: {constants.ENDPOINT} does not answer, or broke off ({reason}); run again, whole files are "
                    "kept; or give a folder with the files as 'model'"
                ) from error
            log.info("%s: the transfer broke (%s); going on", model, reason)
    raise AssertionError  # count has no end


def require_own_checksums(model: HubId, checksums: dict[Path, str]) -> None:
    """Refuse files that are not those which the hub announced: the library's cache names a large file by its SHA-256.

    Parameters
    ----------
    model
        The model.
    checksums
        {file in the cache: its SHA-256}
    """
    for file, checksum in checksums.items():
        blob = file.resolve()
        if _SHA256.fullmatch(blob.name) and blob.name != checksum:
            raise LengthwiseError(
                f"{model}: {file.name} has the SHA-256 {checksum}, and the hub announced {blob.name}: it was damaged on its "
                f"way or in the cache; remove {blob} and run again"
            )


def _fetch(model: HubId) -> Path:
    config = Path(hf_hub_download(model.id, CONFIG, revision=model.revision))
    folder = config.parent
    model = HubId(model.id, folder.name)  # all files of one commit, whatever is pushed meanwhile
    _fetch_if_any(model, VOCABULARY)
    read_config(config)
    names = [WEIGHTS]
    try:
        hf_hub_download(model.id, WEIGHTS, revision=model.revision)
    except EntryNotFoundError as error:
        if not _fetch_if_any(model, INDEX):
            raise error
        names = indexed(folder / INDEX)
    log.info("%s: %s from %s", model.id, " ".join(names), constants.ENDPOINT)
    for name in names:
        hf_hub_download(model.id, name, revision=model.revision)
    return folder


def _fetch_if_any(model: HubId, name: str) -> bool:
    try:
        hf_hub_download(model.id, name, revision=model.revision)
    except EntryNotFoundError:
        return False
    return True


def _what_it_lacks(model: HubId) -> str:
    """Why a model that the hub has cannot be read: what is missing, or there in its place."""
    try:
        names = list_repo_files(model.id, revision=model.revision)
    except (HfHubHTTPError, OSError):
        names = [CONFIG]
    if family := other_family(model.id):
        return not_served(family)
    if ADAPTERS in names:
        return f"holds {NO_ADAPTERS}"
    if CONFIG not in names:
        return f"has no {CONFIG}, so it is no model of transformers"
    if pickles := sorted(name for name in names if name.endswith(".bin")):
        return (
            f"has no safetensors at this revision, but {pickles[0]}; {no_pickles(model.id)}, or a revision that has them "
            f"({model.id}@REVISION)"
        )
    return f"has neither {WEIGHTS} nor {INDEX} at this revision"


def _why_local(error: LocalEntryNotFoundError) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT} does not answer ({_first_line(error.__cause__ or error)})"


def _refusal(model: HubId, error: HfHubHTTPError) -> str:
    token = "give a token of an account that may read it ('hf auth login', or HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        return f"is gated; accept its terms at {constants.ENDPOINT}/{model.id}, and {token}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no folder of that name here, and {constants.ENDPOINT} knows no such model; check the name, or {token} if "
            "it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the model has no branch, tag or commit {model.revision!r}"
    return f"{constants.ENDPOINT} refused: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
