"""The cache of compiled code: a folder that nobody else can write to, or none."""

import os
import stat
from types import SimpleNamespace

import pytest
import torch

from lengthwise.jobs import embed_job
from lengthwise.store.settings import shape_of
from lengthwise.system.cache import private_cache, user_cache


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_it_is_in_the_users_cache(home, monkeypatch, tmp_path):
    assert private_cache("compiled") == home / ".cache" / "lengthwise" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = private_cache("compiled")
    assert found == tmp_path / "xdg" / "lengthwise" / "compiled"
    assert stat.S_IMODE(found.parent.stat().st_mode) == stat.S_IMODE(found.stat().st_mode) == 0o700


def test_weights_in_it_leave_it_to_this_user_alone(home):
    before = os.umask(0o002)  # usual where each user has a group of their own
    try:
        (user_cache() / "weights").mkdir()
    finally:
        os.umask(before)
    assert private_cache("compiled") == home / ".cache" / "lengthwise" / "compiled"


def test_a_folder_that_others_may_write_to_is_not_taken(home, monkeypatch, tmp_path):
    (home / ".cache" / "lengthwise").mkdir(parents=True)
    (home / ".cache" / "lengthwise").chmod(0o770)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert private_cache("compiled") == tmp_path / f"lengthwise-{os.getuid()}" / "compiled"
    (tmp_path / f"lengthwise-{os.getuid()}").chmod(0o707)
    assert private_cache("compiled") is None


def test_a_home_that_is_read_only_here_is_not_taken(monkeypatch, tmp_path):
    found = private_cache("compiled")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: path != found)
    assert private_cache("compiled") == tmp_path / f"lengthwise-{os.getuid()}" / "compiled"


def test_a_folder_of_another_user_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert private_cache("compiled")
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    assert private_cache("compiled") is None


def test_where_no_folder_can_be_made_nothing_is_compiled_and_a_line_says_so(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not embed_job.has_compile_cache()
    assert "the layers run uncompiled" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_job_on_a_gpu_compiles_in_it_and_never_in_the_store(small_store, monkeypatch, home):
    """Where the job is long enough; a CPU compiles nothing."""
    store, asked = small_store(), []
    engine = SimpleNamespace(model=SimpleNamespace(config=shape_of(store.settings)), contact_head=None)
    monkeypatch.setattr(embed_job, "open_engine", lambda *given: asked.append(given[4]) or engine)
    monkeypatch.setattr(embed_job, "forecast_seconds", lambda *_: torch.tensor([1000.0]))
    checkpoint = store.config["model"]
    for device in ("cuda", "cpu"):
        embed_job._load(store.path, store.settings, checkpoint, torch.device(device), [1], "auto")
    assert asked == [True, False]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(home / ".cache" / "lengthwise" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    embed_job._load(store.path, store.settings, checkpoint, torch.device("cuda"), [1], "auto")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
