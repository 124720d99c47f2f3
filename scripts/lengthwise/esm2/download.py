"""Downloads of checkpoints: resumed after a break, checked, and recorded with their SHA-256."""

import logging
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urljoin

import requests
from filelock import FileLock

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MODELS
from lengthwise.esm2.sources import (
    DEMO,
    HUB_ORGANISATION,
    OFFICIAL_URL,
    HubId,
    file_sha256,
    hub_id,
    identity,
    is_path,
    path_of,
    record_path,
    require_secure,
    weights_stamp,
)
from lengthwise.system.descriptors import flush, flush_folder
from lengthwise.system.files import atomic, read_json, sha256, stamp, write_json

log = logging.getLogger("lengthwise")
ATTEMPTS = 5
TIMEOUT_SECONDS = (20, 60)  # to connect, to wait for the next bytes
CHUNK_BYTES = 1 << 20
PROGRESS_SECONDS = 5.0


class _NoAnswerError(LengthwiseError):
    """An address does not answer, or does not have the file: another one may."""


def fetch(
    model: str,
    folder: str,
    url: str = OFFICIAL_URL,
    pinned_sha256: str = "",
    contact_regression: bool = False,
    source: str = "auto",
) -> dict:
    """Provide a model's checkpoint: find it, download it once for all users of the folder, or create the random one (`demo`).

    Parameters
    ----------
    model
        An ESM-2 name; an id of the Hugging Face hub, ``org/name`` or ``org/name@revision``; the path of a fair-esm ``.pt``, of a
        safetensors file or of a folder that transformers wrote; or ``demo``.
    folder
        The folder of the weights of names; users and nodes may share it. Those of the hub lie in its library's cache.
    url
        Where ``models/<model>.pt`` is downloaded from.
    pinned_sha256
        The SHA-256 that the checkpoint must have; empty: any.
    contact_regression
        Whether to download the contact head's weights too; files of the hub have them.
    source
        Where names are downloaded from: ``fair-esm`` (`url`), ``hub``, or ``auto``: the hub where fair-esm's own address does not
        give the file.

    Returns
    -------
    The receipt: path, bytes, mtime_ns, sha256, the model's shape, whether its weights are random, `inv_freq` (``file`` where the
    rotary frequencies are the file's, else ``computed``), and of the hub id, revision, commit and address.

    Raises
    ------
    LengthwiseError
        The checkpoint cannot be had, has another checksum, is not ESM-2, or holds values that are not finite.
    """
    from lengthwise.esm2 import checkpoint, hub

    path, origin = provide(model, folder, url, pinned_sha256, contact_regression, source)
    opened = checkpoint.read(path)
    if origin:
        checksums = file_sha256(path)
        hub.require_own_checksums(HubId(origin["id"]), checksums)
        checksum = identity(checksums)
    else:
        checksum = known_sha256(path)
    if pinned_sha256 and checksum != pinned_sha256.lower():
        way_out = "" if origin or is_path(model) else "remove the file to download it again, or "
        raise LengthwiseError(
            f"{path}: its SHA-256 is {checksum}, but model_sha256 in the config is {pinned_sha256}; {way_out}correct the config"
        )
    checkpoint.require_finite(path)
    return {
        "model": model,
        "path": str(path),
        **weights_stamp(path),
        "sha256": checksum,
        "num_layers": opened.shape.num_layers,
        "embed_dim": opened.shape.embed_dim,
        "attention_heads": opened.shape.attention_heads,
        "random_weights": opened.random,
        "inv_freq": "file" if opened.has_frequencies else "computed",
        **({"hub": origin} if origin else {}),
    }


def provide(
    model: str,
    folder: str,
    url: str = OFFICIAL_URL,
    pinned_sha256: str = "",
    contact_regression: bool = False,
    source: str = "auto",
) -> tuple[Path, dict[str, str]]:
    """The path of a checkpoint that is there now; and what the hub says of it, if it is from there. As `fetch`, unchecked."""
    from lengthwise.esm2 import checkpoint, hub

    path = path_of(model, folder)
    if is_path(model):
        return path, {}
    if id := hub_id(model):
        return hub.fetch(id)
    if model in MODELS and source == "hub":
        return hub.fetch(HubId(f"{HUB_ORGANISATION}/{model}"))
    regression = path.with_name(f"{model}-contact-regression.pt")
    if path.exists() and (regression.exists() or not contact_regression):
        return path, {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), mode=0o666):
        if model == DEMO:
            if not path.exists():
                with atomic(path) as part:
                    checkpoint.write_random(part, checkpoint.DEMO_SHAPE)
            if contact_regression and not regression.exists():
                with atomic(regression) as part:
                    checkpoint.write_random_regression(part, checkpoint.DEMO_SHAPE)
        elif model in MODELS:
            try:
                _download_once(path, f"{url.rstrip('/')}/models/{path.name}", pinned_sha256)
            except _NoAnswerError as error:
                if source != "auto" or url.rstrip("/") != OFFICIAL_URL:
                    raise
                return _fetch_from_hub_instead(model, error)
            if contact_regression:
                _download_once(regression, f"{url.rstrip('/')}/regression/{regression.name}", "")
    return path, {}


def _fetch_from_hub_instead(model: str, error: LengthwiseError) -> tuple[Path, dict[str, str]]:
    from lengthwise.esm2 import hub

    id = HubId(f"{HUB_ORGANISATION}/{model}")
    log.warning("%s; trying the hub: %s", error, id)
    try:
        return hub.fetch(id)
    except LengthwiseError as of_hub:
        raise LengthwiseError(f"{error}. Nor does the hub give it: {of_hub}") from of_hub


def known_sha256(path: Path) -> str:
    """The checkpoint's SHA-256: from its download's record if size and time still match, else computed."""
    record = record_path(path)
    if path.suffix == ".pt" and record.exists():
        known = read_json(record, "sha256")
        if stamp(path).items() <= known.items():
            return known["sha256"]
    return identity(file_sha256(path))


def _download_once(path: Path, url: str, pinned_sha256: str) -> None:
    """Download a file unless it exists. The caller holds the lock."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    log.info("%s: downloading %s", path, url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download(url, part)
            break
        except requests.RequestException as error:
            done = part.stat().st_size if part.exists() else 0
            refused = isinstance(error, requests.HTTPError) and _status_code(error) < 500
            if refused or attempt == ATTEMPTS:
                raise _NoAnswerError(
                    f"{url}: {_reason(error)}; {done:,} bytes are kept; run again to go on. "
                    f"Without a network here, download it elsewhere and put it at {path}"
                ) from error
            log.info("the transfer broke after %s bytes (%s); going on", f"{done:,}", _reason(error))
            time.sleep(min(2**attempt / 4, 10))
    _require_torch_file(part, url)
    checksum = sha256(part)
    if pinned_sha256 and checksum != pinned_sha256.lower():
        _discard(part)
        raise LengthwiseError(
            f"{url}: its SHA-256 is {checksum}, but model_sha256 in the config is {pinned_sha256}; the download was removed"
        )
    with open(part, "rb") as file:
        flush(file.fileno())
    os.replace(part, path)
    flush_folder(path.parent)
    _state_path(part).unlink(missing_ok=True)
    size = path.stat().st_size
    write_json(
        record_path(path),
        {
            "url": url,
            **stamp(path),
            "sha256": checksum,
            "downloaded": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    log.info("%s: %s bytes, SHA-256 %s", path, f"{size:,}", checksum)


def _download(url: str, part: Path) -> None:
    """One transfer into `part`, resumed after the bytes it holds if the server's file is unchanged."""
    held = part.stat().st_size if part.exists() else 0
    state = read_json(_state_path(part)) if held and _state_path(part).exists() else {}
    headers = {"Accept-Encoding": "identity"}
    if state.get("validator"):
        headers |= {"Range": f"bytes={held}-", "If-Range": state["validator"]}
    with _get(url, headers) as response:
        if (
            response.status_code == 416
        ):  # no bytes after those held: the file is complete, or the server has a shorter one
            if held == state.get("bytes"):
                return
            _discard(part)
            raise requests.ConnectionError("the server has less than what was kept; starting again")
        response.raise_for_status()
        if "text/html" in response.headers.get("Content-Type", ""):
            raise LengthwiseError(
                f"{url}: the server sent a web page instead of weights; check the network's sign-in page"
            )
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        start = held if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if total:
            _require_space(part.parent, total - held)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        write_json(_state_path(part), {"url": url, "bytes": total, "validator": validator})
        _write_body(response, part, start, total)


def _get(url: str, headers: dict) -> requests.Response:
    """GET, following redirects only to https or loopback."""
    for _ in range(10):
        require_secure(url)
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS, allow_redirects=False)
        if not response.is_redirect:
            return response
        url = urljoin(url, response.headers["Location"])
        response.close()
    raise LengthwiseError(f"{url}: too many redirects")


def _write_body(response: requests.Response, part: Path, start: int, total: int | None) -> None:
    began = reported = time.monotonic()
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        for chunk in response.iter_content(CHUNK_BYTES):
            file.write(chunk)
            now = time.monotonic()
            if now - reported >= PROGRESS_SECONDS:
                reported, done = now, file.tell()
                rate = (done - start) / (now - began)
                left = f", {(total - done) / rate:.0f} s left" if total else ""
                log.info(
                    "%.2f of %s GB, %.1f MB/s%s", done / 1e9, f"{total / 1e9:.2f}" if total else "?", rate / 1e6, left
                )
        if total and file.tell() != total:
            raise requests.ConnectionError(f"the server sent {file.tell():,} of {total:,} bytes")


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LengthwiseError(
            f"{folder}: {needed:,} bytes are to be downloaded and {free:,} are free; free some space, or set 'weights' to "
            "another folder"
        )


def _require_torch_file(part: Path, url: str) -> None:
    with open(part, "rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip and its older pickle
        _discard(part)
        raise LengthwiseError(
            f"{url}: the server sent no torch file (it begins with {start!r}); the download was removed"
        )


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def _state_path(part: Path) -> Path:
    """The file with the URL, size and validator of a partial download."""
    return part.with_name(f"{part.name}.json")


def _status_code(error: requests.HTTPError) -> int:
    return error.response.status_code if error.response is not None else 0


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return (
            f"the server answered {_status_code(error)} {error.response.reason if error.response is not None else ''}"
        )
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError) and "resol" in str(error).lower():
        return "the host's name cannot be resolved"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
