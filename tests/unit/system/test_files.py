"""JSON files have a checksum of their own: damage that leaves valid JSON is noticed too."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.system.files import ignores_case, read_json, write_json

VALUE = {"name": "a\u00e9 b", "numbers": [1, 2.5, -3e-7], "inner": {"yes": True, "none": None}}


@pytest.fixture
def path(tmp_path):
    write_json(tmp_path / "x.json", VALUE)
    return tmp_path / "x.json"


def test_what_was_written_is_read(path):
    assert read_json(path, "name") == VALUE


@pytest.mark.parametrize("mask", [1, 32, 255])
def test_a_flipped_byte_is_noticed_or_changes_no_value(path, mask):
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        with suppress(LengthwiseError):
            assert read_json(path) == VALUE


def test_a_file_that_is_cut_is_noticed_wherever(path):
    content = path.read_bytes()
    for n_bytes in range(len(content) - 1):  # the last is the line's end
        path.write_bytes(content[:n_bytes])
        with pytest.raises(LengthwiseError, match="damaged"):
            read_json(path)


@pytest.mark.parametrize("value", [VALUE, {}, {"sha256": "0" * 64}])
def test_a_file_of_an_earlier_version_has_no_checksum(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("names", [("config", "in"), ("config", "CONFIG"), ("1", "config"), ()])
def test_this_file_system_keeps_case(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    assert not ignores_case(tmp_path)
    assert not ignores_case(tmp_path / "results" / "not there yet")


def test_a_file_system_that_ignores_case_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path.with_name(path.name.lower())))
    assert ignores_case(tmp_path / "results" / "not there yet")
