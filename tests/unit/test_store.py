"""Shards: the stock safetensors library reads what is written, and what is damaged is refused or found."""

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lengthwise.store import Shard, ShardWriter, bytes_per_sequence, find_metrics, metrics_path, shard_name, shard_path

LENGTHS = np.array([3, 1, 40, 41, 200])


def settings(**changes) -> dict:
    return {
        "layers": [0, 2],
        "embed_dim": 32,
        "storage_dtype": "float16",
        "outputs": ["residue", "mean", "bos"],
        "fingerprint": "f" * 64,
        **changes,
    }


def digests_of(n: int) -> list[bytes]:
    return [bytes([i + 1]) * 24 for i in range(n)]


def writer_of(store: Path, how: dict | None = None, shard: str = "ab" * 16, lengths=LENGTHS) -> ShardWriter:
    return ShardWriter(store, shard, digests_of(len(lengths)), lengths, how or settings())


def fill(writer: ShardWriter, arrays: dict[str, np.ndarray], lengths=LENGTHS, batch: int = 2) -> None:
    """Write these arrays in batches."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    for start in range(0, len(lengths), batch):
        stop = min(start + batch, len(lengths))
        parts = {
            name: array[bounds[start] : bounds[stop]] if name.startswith("layer_") else array[start:stop]
            for name, array in arrays.items()
        }
        writer.write(start, parts, list(lengths[start:stop]), np.arange(start, stop, dtype=np.uint8) % 3)


@pytest.fixture
def made(tmp_path, random_rows):
    """A committed shard, as (its path, the arrays that were written)."""
    arrays = random_rows(LENGTHS, settings())
    with writer_of(tmp_path) as writer:
        fill(writer, arrays)
        writer.commit()
    return writer.path, arrays


def identity(path: Path) -> tuple[int, int]:
    """Changes whenever the file is replaced or written."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def stock(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def parts_of(path: Path) -> tuple[dict, bytes]:
    """The header as a dict, and the data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "outputs", [["residue"], ["mean"], ["bos"], ["residue", "mean"], ["residue", "mean", "bos"]], ids="-".join
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_stock_library_reads_every_row_that_was_written(tmp_path, random_rows, dtype, outputs, batch):
    how = settings(storage_dtype=dtype, outputs=outputs)
    arrays = random_rows(LENGTHS, how)
    with writer_of(tmp_path, how) as writer:
        fill(writer, arrays, batch=batch)
        writer.commit()
    tensors, metadata = stock(writer.path)
    assert set(tensors) == {*arrays, "offsets", "crc32c", "digests", "status"}
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    assert tensors["offsets"].tolist() == [0, 3, 4, 44, 85, 285]
    assert tensors["digests"].tobytes() == b"".join(digests_of(5))
    assert tensors["status"].tolist() == [0, 1, 2, 0, 1]
    assert metadata["fingerprint"] == "f" * 64
    assert Shard(writer.path).damaged() == []


def test_our_own_reader_and_the_stock_library_agree(made):
    path, _ = made
    shard, (tensors, metadata) = Shard(path), stock(path)
    assert shard.metadata == metadata
    assert set(shard.tensors) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(shard[name], tensor)


@pytest.mark.parametrize("layers", [[2], [0, 1, 2], list(range(49))], ids=len)
def test_the_data_begin_at_a_multiple_of_4096_with_the_residues_first(tmp_path, random_rows, layers):
    how = settings(layers=layers)
    with writer_of(tmp_path, how) as writer:
        fill(writer, random_rows(LENGTHS, how))
        writer.commit()
    header, _ = parts_of(writer.path)
    size = int.from_bytes(writer.path.read_bytes()[:8], "little")
    assert (8 + size) % 4096 == 0
    assert header[f"layer_{layers[0]}"]["data_offsets"][0] == 0


@pytest.mark.parametrize("how", [settings(), settings(outputs=["mean"]), settings(storage_dtype="float32", layers=[2])])
def test_the_forecast_of_bytes_is_what_the_file_has(tmp_path, random_rows, how):
    with writer_of(tmp_path, how) as writer:
        fill(writer, random_rows(LENGTHS, how))
        writer.commit()
    _, data = parts_of(writer.path)
    assert bytes_per_sequence(LENGTHS, how).sum() + 8 == len(data)  # offsets has one entry more than sequences


def test_a_shard_is_the_same_bytes_however_it_is_batched(tmp_path, random_rows):
    arrays, files = random_rows(LENGTHS, settings()), []
    for batch in (1, 2, 5):
        with writer_of(tmp_path / str(batch)) as writer:
            fill(writer, arrays, batch=batch)
            writer.commit()
        files.append(writer.path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_names_of_a_shard_and_its_metrics_tell_their_places(tmp_path):
    assert shard_path(tmp_path, "abcd") == tmp_path / "shards" / "ab" / "abcd.safetensors"
    assert metrics_path(tmp_path, "abcd") == tmp_path / "metrics" / "ab" / "abcd.parquet"


def test_metrics_are_found_where_earlier_versions_wrote_them_too(tmp_path):
    flat = tmp_path / "metrics" / "abcd.parquet"
    assert find_metrics(tmp_path, "abcd") is None
    flat.parent.mkdir()
    flat.touch()
    assert find_metrics(tmp_path, "abcd") == flat
    metrics_path(tmp_path, "abcd").parent.mkdir()
    metrics_path(tmp_path, "abcd").touch()
    assert find_metrics(tmp_path, "abcd") == metrics_path(tmp_path, "abcd")


def test_a_name_depends_on_the_settings_the_sequences_and_their_order():
    one, other = digests_of(2)
    names = {
        shard_name("f", [one, other]),
        shard_name("f", [other, one]),
        shard_name("f", [one]),
        shard_name("g", [one]),
    }
    assert len(names) == 4


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_nothing_is_left_behind_without_a_commit(tmp_path, random_rows, files_in, batches):
    arrays = random_rows(LENGTHS, settings())

    def crash():
        with writer_of(tmp_path) as writer:
            if batches:
                fill(writer, arrays, batch=-(-len(LENGTHS) // batches))
            assert files_in(tmp_path) == [writer.part]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert files_in(tmp_path) == []


def test_a_commit_leaves_the_shard_alone(made, tmp_path, files_in):
    assert files_in(tmp_path) == [made[0]]


def test_what_a_killed_writer_left_is_written_over(tmp_path, random_rows, files_in):
    arrays = random_rows(LENGTHS, settings())
    path = shard_path(tmp_path, "ab" * 16)
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.stem}.tmp").write_bytes(b"\xff" * 1_000_000)
    with writer_of(tmp_path) as writer:
        fill(writer, arrays)
        writer.commit()
    assert files_in(tmp_path) == [path]
    np.testing.assert_array_equal(stock(path)[0]["layer_2"], arrays["layer_2"])


def test_a_shard_that_is_there_is_not_written_again(made, tmp_path, files_in):
    path, _ = made
    before = identity(path)
    with writer_of(tmp_path) as writer:
        assert writer.already_there
    assert identity(path) == before
    assert files_in(tmp_path) == [path]


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-1], lambda data: b"", lambda data: b"\x00" * len(data)],
    ids=["short", "empty", "zeros"],
)
def test_a_shard_that_is_damaged_is_written_again(made, tmp_path, spoil):
    path, arrays = made
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    with writer_of(tmp_path) as writer:
        assert not writer.already_there
        fill(writer, arrays)
        writer.commit()
    assert path.read_bytes() == whole


class Second(threading.Thread):
    """A second writer of the shard; flock holds between descriptors, so a thread is as good as a process."""

    def __init__(self, store: Path):
        super().__init__(daemon=True)
        self.store, self.found, self.done = store, None, threading.Event()
        self.start()

    def run(self) -> None:
        with writer_of(self.store) as writer:
            self.found = writer.already_there
        self.done.set()


def test_a_second_writer_waits_and_finds_the_shard_there(tmp_path, random_rows, files_in):
    with writer_of(tmp_path) as first:
        second = Second(tmp_path)
        assert not second.done.wait(0.3)
        fill(first, random_rows(LENGTHS, settings()))
        first.commit()
        before = identity(first.path)
    assert second.done.wait(10)
    assert second.found is True
    assert identity(first.path) == before
    assert files_in(tmp_path) == [first.path]


def test_a_second_writer_goes_ahead_when_the_first_gave_up(tmp_path):
    with writer_of(tmp_path):
        second = Second(tmp_path)
        assert not second.done.wait(0.3)
    assert second.done.wait(10)
    assert second.found is False


def test_a_full_disk_is_one_line_with_the_bytes_and_leaves_nothing(tmp_path, refused, monkeypatch, files_in):
    def full(descriptor, place, size):
        sizes.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sizes: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(str(tmp_path / "shards" / "ab"), "No space left on device") as caught:
        writer_of(tmp_path)
    assert f"{sizes[0]:,} bytes" in str(caught.value)
    assert files_in(tmp_path) == []
    monkeypatch.undo()
    with writer_of(tmp_path) as writer:  # the lock was let go
        assert writer.size == sizes[0]


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("layer_0", 0),
        ("layer_0", 2),
        ("layer_2", 4),
        ("mean_0", 1),
        ("mean_2", 3),
        ("bos_2", 4),
        ("crc32c", 3),
        ("offsets", 1),
        pytest.param("status", 2),
        pytest.param("digests", 2),
    ],
)
def test_a_flipped_byte_is_found_in_its_sequence(made, name, sequence):
    path, _ = made
    shard = Shard(path)
    tensor, offsets = shard.tensors[name], shard["offsets"]
    first = int(offsets[sequence]) if name.startswith("layer_") else sequence
    data = bytearray(path.read_bytes())
    data[tensor.start + first * tensor.nbytes // tensor.shape[0]] ^= 0x10
    path.write_bytes(data)
    assert sequence in Shard(path).damaged()
    if name.split("_")[0] in ("layer", "mean", "bos", "crc32c"):
        assert Shard(path).damaged() == [sequence]


def test_writing_into_a_tensor_does_not_reach_the_file(made):
    path, _ = made
    before = path.read_bytes()
    Shard(path)["layer_2"][:] = 7
    assert path.read_bytes() == before


def test_a_missing_shard_is_one_line(tmp_path, refused):
    with refused("none.safetensors", "missing"):
        Shard(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 4095, 4096, 5000, -1])
def test_a_truncated_shard_is_one_line(made, refused, keep):
    path, _ = made
    path.write_bytes(path.read_bytes()[:keep])
    with refused(str(path), "damaged shard"):
        Shard(path)


@pytest.mark.parametrize(
    "length", [0, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1], ids="{:#x}".format
)
def test_a_header_of_a_wrong_length_is_one_line(made, refused, length):
    path, _ = made
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with refused(str(path), "damaged shard"):
        Shard(path)


def changed(name: str, **entry):
    return lambda header: {**header, name: {**header[name], **entry}}


def moved(name: str, start: int, stop: int):
    """The place of a tensor moved by so many bytes."""

    def change(header: dict) -> dict:
        places = header[name]["data_offsets"]
        return changed(name, data_offsets=[places[0] + start, places[1] + stop])(header)

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(moved("offsets", -8, 0), id="overlap"),
        pytest.param(moved("offsets", 8, 0), id="hole"),
        pytest.param(moved("layer_0", -8, 0), id="before-the-data"),
        pytest.param(moved("status", 0, 100), id="behind-the-data"),
        pytest.param(moved("status", 1 << 60, 1 << 60), id="far-behind-the-data"),
        pytest.param(changed("layer_2", data_offsets=[0, 18240]), id="two-at-one-place"),
        pytest.param(changed("layer_2", data_offsets=[]), id="no-place"),
        pytest.param(changed("layer_2", data_offsets="all"), id="place-of-text"),
        pytest.param(changed("layer_2", shape=[285, 33]), id="too-large-a-shape"),
        pytest.param(changed("layer_2", shape=[-285, -32]), id="negative-shape"),
        pytest.param(changed("layer_2", shape="wide"), id="shape-of-text"),
        pytest.param(changed("layer_2", dtype="F64"), id="dtype-that-we-never-write"),
        pytest.param(changed("layer_2", dtype=None), id="no-dtype"),
        pytest.param(lambda header: {**header, "more": {"dtype": "U8", "shape": [0]}}, id="entry-without-a-place"),
        pytest.param(lambda header: {**header, "more": 5}, id="entry-that-is-a-number"),
        pytest.param(
            lambda header: {**header, "more": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}},
            id="shape-that-overflows-to-nothing",
        ),
        pytest.param(
            lambda header: {**header, "more": {"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 0]}},
            id="shape-beyond-int64",
        ),
        pytest.param(lambda header: [header], id="list"),
        pytest.param(lambda header: None, id="null"),
        pytest.param(lambda header: {}, id="nothing-in-it"),
        pytest.param(lambda header: b"\xff" * 64, id="no-text"),
        pytest.param(lambda header: b"{" * 64, id="no-json"),
        pytest.param(lambda header: b"[" * 500_000, id="deep-json"),
        *(
            pytest.param(lambda header, name=name: {key: header[key] for key in header if key != name}, id=f"no-{name}")
            for name in ("offsets", "crc32c", "digests", "status", "layer_0")
        ),
    ],
)
def test_a_header_that_lies_is_one_line(made, refused, change):
    path, _ = made
    header, data = parts_of(path)
    path.write_bytes(join(change(header), data))
    with refused(str(path), "damaged shard"):
        Shard(path)


@pytest.mark.parametrize("name", ["offsets", "crc32c", "digests", "status"])
def test_a_whole_safetensors_file_that_is_no_shard_names_what_it_lacks(tmp_path, made, refused, name):
    from safetensors.numpy import save_file

    tensors, _ = stock(made[0])
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "other.safetensors")
    with refused("other.safetensors", f"it has no {name}"):
        Shard(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["crc32c", "digests", "status", "offsets"])
def test_tensors_for_different_numbers_of_sequences_are_refused(tmp_path, made, refused, name):
    from safetensors.numpy import save_file

    tensors, _ = stock(made[0])
    save_file({**tensors, name: tensors[name][:-1].copy()}, tmp_path / "other.safetensors")
    with refused("other.safetensors", "damaged shard"):
        Shard(tmp_path / "other.safetensors")
