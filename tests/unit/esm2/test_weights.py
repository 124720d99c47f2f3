"""Weights: found, or downloaded from a server on this machine that misbehaves in every way asked for."""

import argparse
import hashlib
import multiprocessing
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint, download, sources
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.store import weights

MODEL = "esm2_t6_8M_UR50D"


class Server:
    """Serves one checkpoint with ranges and an ETag; `breaks` transfers stop half-way, `as_html` says what it is not."""

    def __init__(self, content: bytes):
        self.content, self.etag = content, '"v1"'
        self.breaks, self.as_html, self.missing, self.redirect = 0, False, False, ""
        self.sent: list[tuple[str, int]] = []  # (path, bytes) of each answer
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request):
        if self.redirect:
            request.send_response(302)
            request.send_header("Location", self.redirect)
            request.end_headers()
            return
        if self.missing:
            request.send_error(404)
            return
        start = 0
        asked = request.headers.get("Range")
        if asked and request.headers.get("If-Range") == self.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                request.send_error(416)
                return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Type", "text/html" if self.as_html else "application/octet-stream")
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", self.etag)
        request.end_headers()
        if self.breaks:
            self.breaks -= 1
            body = body[: len(body) // 2]
        self.sent.append((request.path, len(body)))
        request.wfile.write(body)
        request.close_connection = True


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("content") / "tiny.pt"
    checkpoint.write_random(path, ModelConfig(2, 32, 2))
    return path.read_bytes()


@pytest.fixture
def server(content):
    server = Server(content)
    yield server
    server.http.shutdown()


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)  # a broken transfer loses at most the chunk it broke in


def fetch(server, folder, **options):
    return download.fetch(MODEL, str(folder), server.url, **options)


def temporary(folder):
    return [path.name for path in folder.iterdir() if ".part" in path.name]


def test_a_download_is_recorded_and_not_repeated(server, tmp_path):
    receipt = fetch(server, tmp_path)
    assert (tmp_path / f"{MODEL}.pt").read_bytes() == server.content
    assert receipt["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert receipt["bytes"] == len(server.content)
    assert fetch(server, tmp_path) == receipt
    assert server.sent == [(f"/models/{MODEL}.pt", len(server.content))]
    assert temporary(tmp_path) == []


def test_a_broken_transfer_goes_on_where_it_broke(server, tmp_path):
    server.breaks = 3
    fetch(server, tmp_path)
    assert (tmp_path / f"{MODEL}.pt").read_bytes() == server.content
    assert len(server.sent) == 4
    assert sum(size for _, size in server.sent) < len(server.content) + 3 * download.CHUNK_BYTES


def test_an_interrupted_download_is_resumed_by_the_next_run(server, tmp_path):
    server.breaks = download.ATTEMPTS
    with pytest.raises(LengthwiseError, match=r"run again to go on.*put it at .*esm2_t6_8M_UR50D\.pt"):
        fetch(server, tmp_path)
    assert not (tmp_path / f"{MODEL}.pt").exists()
    fetch(server, tmp_path)
    assert sum(size for _, size in server.sent) < len(server.content) + download.ATTEMPTS * download.CHUNK_BYTES


def test_a_file_that_changed_on_the_server_is_not_glued_together(server, tmp_path):
    server.breaks = download.ATTEMPTS
    with pytest.raises(LengthwiseError):
        fetch(server, tmp_path)
    server.etag = '"v2"'
    fetch(server, tmp_path)
    assert (tmp_path / f"{MODEL}.pt").read_bytes() == server.content
    assert server.sent[-1][1] == len(server.content)


def test_a_whole_download_that_was_not_renamed_is_taken(server, tmp_path):
    fetch(server, tmp_path)
    path = tmp_path / f"{MODEL}.pt"
    part = path.rename(tmp_path / f"{MODEL}.pt.part")
    download.write_json(
        part.with_name(f"{part.name}.json"), {"bytes": len(server.content), "validator": server.etag, "url": ""}
    )
    fetch(server, tmp_path)
    assert path.read_bytes() == server.content
    assert len(server.sent) == 1


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path):
    with pytest.raises(LengthwiseError, match="model_sha256"):
        fetch(server, tmp_path, pinned_sha256="0" * 64)
    assert not (tmp_path / f"{MODEL}.pt").exists()
    assert temporary(tmp_path) == []
    fetch(server, tmp_path, pinned_sha256=hashlib.sha256(server.content).hexdigest().upper())


def test_a_pinned_checksum_is_checked_of_a_file_that_was_there(server, tmp_path):
    fetch(server, tmp_path)
    with pytest.raises(LengthwiseError, match="model_sha256"):
        fetch(server, tmp_path, pinned_sha256="0" * 64)


def test_a_web_page_instead_of_weights_is_refused(server, tmp_path):
    server.as_html = True
    with pytest.raises(LengthwiseError, match="web page"):
        fetch(server, tmp_path)
    assert not (tmp_path / f"{MODEL}.pt").exists()


def test_a_web_page_that_calls_itself_weights_is_refused(server, tmp_path):
    server.content = b"<!doctype html><title>Sign in</title>"
    with pytest.raises(LengthwiseError, match="no torch file"):
        fetch(server, tmp_path)
    assert temporary(tmp_path) == []


def test_a_missing_file_on_the_server_is_one_line_that_says_where_to_put_it(server, tmp_path):
    server.missing = True
    with pytest.raises(LengthwiseError, match=r"404.*put it at") as refusal:
        fetch(server, tmp_path)
    assert "\n" not in str(refusal.value)


def test_without_a_network_the_error_says_which_file_goes_where(tmp_path):
    closed = Server(b"")
    closed.http.shutdown()
    closed.http.server_close()
    with pytest.raises(LengthwiseError, match=rf"models/{MODEL}\.pt: .*put it at {tmp_path}/{MODEL}\.pt") as refusal:
        fetch(closed, tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("url", ["http://example.org", "ftp://example.org", "file:///etc"])
def test_only_https_or_this_machine(url, tmp_path):
    with pytest.raises(LengthwiseError, match="https only"):
        download.fetch(MODEL, str(tmp_path), url)


def test_a_redirect_to_plain_http_is_refused(server, tmp_path):
    server.redirect = "http://example.org/weights.pt"
    with pytest.raises(LengthwiseError, match="https only"):
        fetch(server, tmp_path)


def test_a_full_disk_is_noticed_before_the_transfer(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LengthwiseError, match=f"{len(server.content):,} bytes are to be downloaded and 1,000 are free"):
        fetch(server, tmp_path)
    assert not any(path.suffix == ".part" for path in tmp_path.iterdir())


def test_two_at_once_download_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        receipts = pool.starmap(download.fetch, [(MODEL, str(tmp_path), server.url)] * 2)
    assert receipts[0] == receipts[1]
    assert len(server.sent) == 1


def test_the_contact_regression_comes_when_asked_for(server, tmp_path):
    fetch(server, tmp_path, contact_regression=True)
    assert [path for path, _ in server.sent] == [f"/models/{MODEL}.pt", f"/regression/{MODEL}-contact-regression.pt"]
    assert (tmp_path / f"{MODEL}-contact-regression.pt").exists()


@pytest.fixture
def torch_hub(monkeypatch, tmp_path, content):
    """The folder where torch.hub has downloaded the model for fair-esm."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{MODEL}.pt").write_bytes(content)
    return folder


def test_what_torch_hub_has_downloaded_is_used_where_it_is(server, tmp_path, torch_hub):
    assert str(torch_hub) == f"{torch.hub.get_dir()}/checkpoints"  # fair-esm asks torch
    receipt = fetch(server, tmp_path / "weights")
    assert receipt["path"] == str(torch_hub / f"{MODEL}.pt")
    assert receipt["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert server.sent == []
    assert not (tmp_path / "weights").exists()
    assert [path.name for path in torch_hub.iterdir()] == [f"{MODEL}.pt"]


def test_torch_hubs_folder_is_found_without_torch_home(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    for cache in (str(tmp_path), None):
        if cache:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        else:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert str(sources.torch_hub_folder()) == f"{torch.hub.get_dir()}/checkpoints"


def test_the_own_folder_goes_before_torch_hubs(server, tmp_path, torch_hub):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / f"{MODEL}.pt").write_bytes(server.content)
    assert fetch(server, tmp_path / "weights")["path"] == str(tmp_path / "weights" / f"{MODEL}.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path, content):
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with torch.serialization.safe_globals([argparse.Namespace]):
        data = torch.load(path, weights_only=True)
    data["model"]["encoder.sentence_encoder.layers.1.fc1.weight"][3, 5] = float("nan")
    torch.save(data, path)
    with pytest.raises(LengthwiseError, match=r"damaged\.pt: the tensor layers\.1\.fc1\.weight .* NaN"):
        download.fetch(str(path), "unused")


@pytest.mark.parametrize(
    ("arch", "words"), [("roberta_large", "ESM-1b or ESM-1v"), ("msa_transformer", "MSA Transformer")]
)
def test_a_pt_of_another_family_is_named(tmp_path, arch, words):
    torch.save({"args": argparse.Namespace(arch=arch), "model": {}}, tmp_path / "other.pt")
    with pytest.raises(LengthwiseError, match=f"{words}, which is not served yet"):
        checkpoint.read(tmp_path / "other.pt")


@pytest.fixture
def store(server, tmp_path):
    """A store whose receipt names a downloaded checkpoint."""
    store = tmp_path / "results" / MODEL
    store.mkdir(parents=True)
    download.write_json(store / "weights.json", fetch(server, tmp_path / "cache"))
    return store


def test_verify_notices_other_bytes_and_a_missing_file(server, store):
    weights.verify(store)
    path = weights.location(store)[0]
    damaged = bytearray(server.content)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LengthwiseError, match="is not the checkpoint"):
        weights.verify(store)
    path.unlink()
    with pytest.raises(LengthwiseError, match="is gone"):
        weights.verify(store)


def test_a_checkpoint_that_changed_is_not_embedded_with(server, store):
    expected = hashlib.sha256(server.content).hexdigest()
    path = weights.require_unchanged(store, expected)
    path.touch()  # another time and the same bytes
    assert weights.require_unchanged(store, expected) == path
    path.write_bytes(server.content + b"0")
    with pytest.raises(LengthwiseError, match="is not the checkpoint"):
        weights.require_unchanged(store, expected)


def test_a_touched_checkpoint_is_hashed_once(server, store, monkeypatch):
    weights.location(store)[0].touch()
    weights.note_new_time(store)
    monkeypatch.setattr(sources, "sha256", None)
    weights.require_unchanged(store, hashlib.sha256(server.content).hexdigest())
