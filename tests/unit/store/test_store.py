"""Shards: the stock safetensors library reads what is written, and what is damaged is refused or found."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from safetensors import safe_open

from lengthwise.esm2 import tensors as names_of
from lengthwise.store import shard_writer
from lengthwise.store.layout import shard_name
from lengthwise.store.paths import find_metrics, metrics_path, shard_path
from lengthwise.store.shard import Shard
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.store.sizes import bytes_per_sequence
from lengthwise.system.files import atomic, scratch_folder, write_json

LENGTHS = np.array([3, 1, 40, 41, 200])
ALL = list(names_of.OUTPUTS)


def settings(**changes) -> dict:
    return {
        "layers": [0, 2],
        "embed_dim": 32,
        "storage_dtype": "float16",
        "outputs": ["residue", "mean", "bos"],
        "contacts_max_residues": 40,
        "fingerprint": "f" * 64,
        **changes,
    }


def digests_of(n: int) -> list[bytes]:
    return [(i + 1).to_bytes(2, "big") * 12 for i in range(n)]


def writer_of(store: Path, how: dict | None = None, shard: str = "ab" * 16, lengths=LENGTHS) -> ShardWriter:
    return ShardWriter(store, shard, digests_of(len(lengths)), lengths, how or settings())


def fill(writer: ShardWriter, arrays: dict[str, np.ndarray], lengths=LENGTHS, batch: int = 2) -> None:
    """Write these arrays in batches."""
    bounds = {name: bounds_of(name, lengths) for name in arrays}
    for start in range(0, len(lengths), batch):
        stop = min(start + batch, len(lengths))
        parts = {name: array[bounds[name][start] : bounds[name][stop]] for name, array in arrays.items()}
        writer.write(start, parts, np.arange(start, stop, dtype=np.uint8) % 3)


def bounds_of(name: str, lengths=LENGTHS) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(names_of.entries(name, lengths, settings()))])


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
    "outputs",
    [["residue"], ["mean"], ["bos"], ["residue", "mean"], ["residue", "mean", "bos"], ["logits"], ["contacts"], ALL],
    ids="-".join,
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_stock_library_reads_every_row_that_was_written(tmp_path, random_rows, dtype, outputs, batch):
    how = settings(storage_dtype=dtype, outputs=outputs)
    arrays = random_rows(LENGTHS, how)
    with writer_of(tmp_path, how) as writer:
        fill(writer, arrays, batch=batch)
        writer.commit()
    tensors, metadata = stock(writer.path)
    pairs = {"contact_offsets"} if "contacts" in outputs else set()
    assert set(tensors) == {*arrays, "offsets", "crc32c", "digests", "status", *pairs}
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    assert tensors["offsets"].tolist() == [0, 3, 4, 44, 85, 285]
    assert tensors["digests"].tobytes() == b"".join(digests_of(5))
    assert tensors["status"].tolist() == [0, 1, 2, 0, 1]
    assert metadata["fingerprint"] == "f" * 64
    assert Shard(writer.path).damaged() == []


def test_a_checksum_is_googles_of_digest_status_and_all_that_is_stored_of_a_sequence(made):
    """As every version has written them."""
    assert_checksums_of_all(made[0])


def test_a_checksum_covers_logits_and_contacts_too(tmp_path, random_rows):
    how = settings(outputs=ALL)
    with writer_of(tmp_path, how) as writer:
        fill(writer, random_rows(LENGTHS, how))
        writer.commit()
    assert_checksums_of_all(writer.path)
    shard = Shard(writer.path)
    assert [shard.is_intact(number) for number in range(len(LENGTHS))] == [True] * 5
    data = bytearray(writer.path.read_bytes())
    data[shard.tensors["contacts"].start + 2 * 6] ^= 1  # the second sequence's only pair, behind the first one's six
    writer.path.write_bytes(data)
    assert Shard(writer.path).damaged() == [1]


def test_pairs_that_are_not_those_of_a_sequence_are_refused(tmp_path, random_rows, refused):
    how = settings(outputs=["mean", "contacts"])
    with writer_of(tmp_path, how) as writer:
        fill(writer, random_rows(LENGTHS, how))
        writer.commit()
    data = bytearray(writer.path.read_bytes())
    start = Shard(writer.path).tensors["contact_offsets"].start
    data[start + 8 : start + 16] = (5).to_bytes(8, "little")
    writer.path.write_bytes(data)
    with refused("contact_offsets", str(writer.path)):
        Shard(writer.path)


def assert_checksums_of_all(path: Path) -> None:
    tensors, _ = stock(path)
    names = [
        name
        for name in Shard(path).tensors
        if name not in ("crc32c", "digests", "status", "offsets", "contact_offsets")
    ]
    for i, checksum in enumerate(tensors["crc32c"].tolist()):
        content = tensors["digests"][i].tobytes() + tensors["status"][i].tobytes()
        for name in names:
            bounds = bounds_of(name)
            content += tensors[name][bounds[i] : bounds[i + 1]].tobytes()
        assert checksum == google_crc32c.value(content)


@pytest.mark.parametrize("length", [30, 300])
def test_checksums_leave_the_interpreters_lock_to_other_threads(tmp_path, monkeypatch, length):
    """A thread that has waited for the GPU would get the lock 5 ms late, which is longer than a small model's batch takes."""
    monkeypatch.setattr(shard_writer, "_write_at", lambda *_: None)  # disks are written to without the lock
    monkeypatch.setattr(shard_writer, "FLUSH_BYTES", np.inf)
    lengths = np.full(30_000 // length, length)
    arrays = {"layer_0": np.zeros((lengths.sum(), 320), np.float16)}
    good, stopped, late_seconds = np.zeros(len(lengths), np.uint8), threading.Event(), []
    with writer_of(tmp_path, settings(layers=[0], outputs=["residue"], embed_dim=320), lengths=lengths) as writer:

        def write() -> None:
            while not stopped.is_set():
                writer.write(0, arrays, good)

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(200):
            began = time.perf_counter()
            time.sleep(1e-4)
            late_seconds.append(time.perf_counter() - began)
        stopped.set()
        thread.join()
    assert np.quantile(late_seconds, 0.75) < 0.002


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


@pytest.mark.parametrize(
    "how",
    [settings(), settings(outputs=["mean"]), settings(storage_dtype="float32", layers=[2]), settings(outputs=ALL)],
)
def test_the_forecast_of_bytes_is_what_the_file_has(tmp_path, random_rows, how):
    with writer_of(tmp_path, how) as writer:
        fill(writer, random_rows(LENGTHS, how))
        writer.commit()
    _, data = parts_of(writer.path)
    more = 16 if "contacts" in how["outputs"] else 8  # tables of offsets have one entry more than sequences
    assert bytes_per_sequence(LENGTHS, how).sum() + more == len(data)


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
    for name in (f".{path.stem}.tmp", f".{path.name}.0123abcd.tmp"):
        path.with_name(name).write_bytes(b"\xff" * 1_000_000)
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


def test_of_two_writers_that_begin_at_once_the_later_one_waits(tmp_path, random_rows, monkeypatch, files_in):
    """The other one begins between this one's look for others and its temporary file."""
    create, others = shard_writer.create_locked, []

    def create_after_another(path):
        monkeypatch.setattr(shard_writer, "create_locked", create)
        others.append(writer_of(tmp_path))
        return create(path)

    monkeypatch.setattr(shard_writer, "create_locked", create_after_another)
    with pytest.raises(BlockingIOError):
        ShardWriter(tmp_path, "ab" * 16, digests_of(5), LENGTHS, settings(), wait=False)
    (first,) = others
    assert files_in(tmp_path) == [first.part]
    first.abandon()
    monkeypatch.setattr(shard_writer, "create_locked", create_after_another)
    second = Second(tmp_path)
    assert not second.done.wait(0.3)
    fill(others[1], random_rows(LENGTHS, settings()))
    others[1].commit()
    assert second.done.wait(10)
    assert second.found is True
    assert files_in(tmp_path) == [others[1].path]


def test_of_four_writers_that_begin_at_once_one_makes_the_shard(tmp_path, random_rows, files_in):
    arrays, rounds = random_rows(LENGTHS, settings()), 25
    barrier, made = threading.Barrier(4), []

    def write() -> None:
        for i in range(rounds):
            barrier.wait(10)
            with writer_of(tmp_path / str(i)) as writer:
                if not writer.already_there:
                    fill(writer, arrays)
                    writer.commit()
                    made.append(i)

    threads = [threading.Thread(target=write, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == list(range(rounds))
    assert len(files_in(tmp_path)) == rounds


@pytest.fixture
def file_system(monkeypatch):
    """One that answers to a reservation with this error, and remembers how many bytes it was asked for."""

    def make(number: int) -> list[int]:
        class Libc:
            @staticmethod
            def fallocate(descriptor, mode, start, size):
                sizes.append(size.value)
                ctypes.set_errno(number)
                return -1

        sizes: list[int] = []
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc)
        return sizes

    return make


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "quota"), (errno.EIO, "Input/output error")],
)
def test_a_full_disk_is_one_line_with_the_bytes_and_leaves_nothing(
    tmp_path, refused, file_system, monkeypatch, files_in, number, words
):
    sizes = file_system(number)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12 - 54_321, 54_321))
    with refused(str(tmp_path / "shards" / "ab"), words, "54,321 are free") as caught:
        writer_of(tmp_path)
    assert f"{sizes[0]:,} bytes" in str(caught.value)
    assert files_in(tmp_path) == []
    monkeypatch.undo()
    with writer_of(tmp_path) as writer:  # the lock was let go
        assert writer.file_bytes == sizes[0]


def test_a_shard_has_its_place_on_the_disk_before_anything_is_computed(tmp_path, random_rows):
    lengths = np.array([30_000])
    with writer_of(tmp_path, lengths=lengths) as writer:
        assert writer.part.stat().st_size == writer.file_bytes
        assert writer.part.stat().st_blocks * 512 >= writer.file_bytes


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_where_nothing_can_be_reserved_the_free_bytes_are_asked(
    tmp_path, random_rows, file_system, refused, monkeypatch, number
):
    file_system(number)
    with writer_of(tmp_path) as writer:
        fill(writer, arrays := random_rows(LENGTHS, settings()))
        writer.commit()
    np.testing.assert_array_equal(stock(writer.path)[0]["layer_2"], arrays["layer_2"])
    writer.path.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12 - 100, 100))
    with refused("cannot reserve", "100 are free", "No space left"):
        writer_of(tmp_path)


def test_a_second_writer_that_must_not_wait_says_so_and_leaves_the_first_alone(tmp_path, random_rows, files_in):
    with writer_of(tmp_path) as first:
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                ShardWriter(tmp_path, "ab" * 16, digests_of(5), LENGTHS, settings(), wait=False)
        assert files_in(tmp_path) == [first.part]
        fill(first, random_rows(LENGTHS, settings()))
        first.commit()
    assert Shard(first.path).damaged() == []


def test_a_writer_whose_temporary_file_was_taken_away_makes_nothing(tmp_path, random_rows, refused, files_in):
    """Where locks do not reach other machines, one of those may take it for a leftover."""
    arrays = random_rows(LENGTHS, settings())
    with writer_of(tmp_path) as first:
        fill(first, arrays)
        first.part.unlink()
        with writer_of(tmp_path) as second:
            with refused(str(first.path), "No such file"):
                first.commit()
            assert files_in(tmp_path) == [second.part]
            fill(second, arrays)
            second.commit()
    assert Shard(second.path).damaged() == []
    assert files_in(tmp_path) == [second.path]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_locks_two_writers_do_not_touch_each_others_files(tmp_path, random_rows, monkeypatch, number, files_in):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    arrays = random_rows(LENGTHS, settings())
    with writer_of(tmp_path) as first, writer_of(tmp_path) as second:
        fill(first, arrays)
        assert first.part.exists()
        fill(second, arrays)
        first.commit()
        assert Shard(first.path).damaged() == []
        second.commit()
    assert Shard(first.path).damaged() == []
    assert files_in(tmp_path) == [first.path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o027, 0o640), (0o077, 0o600)], ids=oct)
def test_who_may_read_a_shard_is_the_umasks_to_say(tmp_path, random_rows, umask, mode):
    before = os.umask(umask)
    try:
        with writer_of(tmp_path) as writer:
            fill(writer, random_rows(LENGTHS, settings()))
            writer.commit()
    finally:
        os.umask(before)
    assert writer.path.stat().st_mode & 0o777 == mode


def test_the_stock_library_reads_a_shard_of_more_than_4_gib(tmp_path, random_rows, monkeypatch):
    """Sparse: only the first and the last sequences of each layer are written."""
    monkeypatch.setattr(shard_writer, "reserve", lambda descriptor, size, free: os.truncate(descriptor, size))
    how = settings(embed_dim=1280, layers=[6, 33], outputs=["residue", "mean"])
    lengths = np.array([30, 200, *[30_000] * 30, 300, 40])
    first, last = [random_rows(part, how) for part in (lengths[:2], lengths[-2:])]
    with writer_of(tmp_path, how, lengths=lengths) as writer:
        writer.write(len(lengths) - 2, last, np.zeros(2, np.uint8))
        writer.write(0, first, np.zeros(2, np.uint8))
        writer.commit()
    assert writer.path.stat().st_size > 4 << 30
    assert writer.path.stat().st_blocks * 512 < 64 << 20
    shard, total = Shard(writer.path), int(lengths.sum())
    with safe_open(writer.path, "numpy") as file:
        for name in ("layer_6", "layer_33"):
            rows = file.get_slice(name)
            assert rows.get_shape() == [total, 1280]
            np.testing.assert_array_equal(rows[:230], first[name])
            np.testing.assert_array_equal(rows[total - 340 :], last[name])
            np.testing.assert_array_equal(shard[name][-340:], last[name])
        assert file.get_tensor("offsets").tolist() == [0, *np.cumsum(lengths).tolist()]
        np.testing.assert_array_equal(file.get_tensor("mean_33")[-2:], last["mean_33"])


@pytest.mark.huge
def test_writing_runs_at_four_fifths_of_the_disks_own_rate_at_least(tmp_path, random_rows, capsys):
    """A shard of 1 GiB in batches of 32,768 tokens, everything included, beside dd in the same blocks, interleaved."""
    how = settings(embed_dim=1280, layers=[33], outputs=["residue"])
    batch, batches = np.full(109, 300), 13
    arrays, status = random_rows(batch, how), np.zeros(109, np.uint8)
    lengths = np.tile(batch, batches)
    block = arrays["layer_33"].nbytes

    def ours() -> None:
        with writer_of(tmp_path, how, lengths=lengths) as writer:
            for n in range(batches):
                writer.write(n * 109, arrays, batch.tolist(), status)
            writer.commit()

    def dd() -> None:
        command = ["dd", "if=/dev/zero", f"of={tmp_path / 'dd'}", f"bs={block}", f"count={batches}", "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)

    rates: dict[str, list[float]] = {"dd": [], "ours": []}
    for _ in range(7):
        for name, write in (("dd", dd), ("ours", ours)):
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            os.sync()
            began = time.perf_counter()
            write()
            rates[name].append(block * batches / (time.perf_counter() - began) / 1e6)
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    with capsys.disabled():
        print(f"\n{rates}\n{medians} MB/s, {medians['ours'] / medians['dd']:.2f} of dd")
    assert medians["ours"] >= 0.8 * medians["dd"]


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
        ("offsets", 3),
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
        pytest.param(moved("layer_0", 0, 1 << 70), id="place-beyond-int64"),
        pytest.param(changed("layer_2", data_offsets=[18240.0, 36480.0]), id="place-with-a-fraction"),
        pytest.param(changed("layer_2", shape=[float("nan"), 32]), id="nan-shape"),
        pytest.param(changed("layer_2", shape=[float("inf"), 32]), id="infinite-shape"),
        pytest.param(changed("layer_2", shape=["285", "32"]), id="shape-of-words"),
        pytest.param(changed("layer_2", shape=[32, 285]), id="turned-shape"),
        pytest.param(changed("layer_2", shape=[9120]), id="flat-shape"),
        pytest.param(changed("layer_2", shape=[570, 16]), id="narrow-shape"),
        pytest.param(changed("layer_2", dtype="F32", shape=[285, 16]), id="wider-dtype-of-the-same-bytes"),
        pytest.param(changed("mean_2", dtype="F16", shape=[5, 64]), id="mean-in-another-dtype"),
        pytest.param(changed("mean_2", shape=[10, 16]), id="more-means-than-sequences"),
        pytest.param(changed("status", shape=[5, 1]), id="status-with-columns"),
        pytest.param(changed("status", shape=[]), id="status-without-a-shape"),
        pytest.param(changed("offsets", dtype="U8", shape=[48]), id="offsets-in-another-dtype"),
        pytest.param(changed("crc32c", dtype="F16", shape=[10]), id="checksums-in-another-dtype"),
        pytest.param(changed("digests", shape=[24, 5]), id="turned-digests"),
        pytest.param(lambda header: json.dumps(header).encode().replace(b'"status"', b'"crc32c"'), id="a-key-twice"),
        pytest.param(
            lambda header: json.dumps(header).encode().replace(b'"dtype"', b'"shape": [1], "dtype"', 1),
            id="a-shape-twice",
        ),
        pytest.param(lambda header: {**header, "__metadata__": "fingerprint"}, id="metadata-of-text"),
        pytest.param(lambda header: {**header, "__metadata__": 5}, id="metadata-of-a-number"),
        pytest.param(lambda header: b'{"a":' * 100_000, id="deep-objects"),
        pytest.param(lambda header: b'{"status":' + b"9" * 5_000 + b"}", id="a-number-of-5000-digits"),
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


@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param([1, 3, 4, 44, 85, 285], id="not-from-0"),
        pytest.param([0, 4, 3, 44, 85, 285], id="descending"),
        pytest.param([0, 3, 3, 44, 85, 285], id="an-empty-sequence"),
        pytest.param([0, 3, 4, 44, 85, 286], id="beyond-the-rows"),
        pytest.param([0, 3, 4, 44, 85, 284], id="short-of-the-rows"),
        pytest.param([0, 3, 4, -44, 85, 285], id="negative"),
        pytest.param([0, 3, 4, 44, 85, -(1 << 63)], id="as-negative-as-can-be"),
        pytest.param([0, 3, 4, 44, 85, (1 << 63) - 1], id="as-large-as-can-be"),
        pytest.param([0] * 6, id="zeros"),
    ],
)
def test_offsets_that_do_not_fit_the_rows_are_one_line(made, refused, offsets):
    path, _ = made
    with open(path, "r+b") as file:
        file.seek(Shard(path).tensors["offsets"].start)
        file.write(np.array(offsets, np.int64).tobytes())
    with refused(str(path), "damaged shard"):
        Shard(path)


def test_metadata_that_names_a_path_opens_nothing_else(made, tmp_path, files_in):
    path, arrays = made
    header, data = parts_of(path)
    header["__metadata__"] |= {"path": "../../../../etc/passwd", "layer_2": "/dev/zero"}
    before = files_in(tmp_path)
    path.write_bytes(join(header, data))
    np.testing.assert_array_equal(Shard(path)["layer_2"], arrays["layer_2"])
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("spoil", [Path.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_one_line(tmp_path, refused, spoil):
    path = tmp_path / "odd.safetensors"
    spoil(path)
    with refused(str(path)):
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


@pytest.mark.parametrize("make", [lambda path: write_json(path, {}), lambda path: scratch_folder(path).__enter__()])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, refused, make):
    (tmp_path / "file").write_text("")
    with refused(str(tmp_path / "file" / "x"), "cannot be written", "mend that and run again"):
        make(tmp_path / "file" / "x")


def test_scratch_folders_are_one_process_s_and_those_of_the_dead_go(tmp_path):
    (tmp_path / ".dead.spill").mkdir()
    with scratch_folder(tmp_path / ".spill") as mine, scratch_folder(tmp_path / ".spill") as anothers:
        (mine / "file").write_text("")
        assert {*tmp_path.iterdir()} == {mine, anothers}
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_that_cannot_be_removed_hides_no_error(tmp_path, refused, monkeypatch):
    def no_more(*_):
        raise OSError(30, "Read-only file system")

    with refused("x.json: cannot be written: Read-only file system"), atomic(tmp_path / "x.json"):
        monkeypatch.setattr(Path, "unlink", no_more)
        no_more()
