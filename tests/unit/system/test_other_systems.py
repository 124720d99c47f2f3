"""Where a call of Linux is missing, stores are written byte for byte and read as they are here."""

import copy
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lengthwise.system import descriptors
from other_systems import ALL, OF_WRITERS, USED, environment

WRITE = """
import sys
from pathlib import Path
from small_store import SmallStore
store = SmallStore(Path(sys.argv[1]), Path(sys.argv[2]), outputs=["residue", "mean"])
store.ingest("a", dict(zip(sys.argv[3::2], sys.argv[4::2])))
store.run(shard_bytes=4_000)
sys.argv[1] = store.path / "datasets" / "a"
"""

READ = """
import sys, warnings
from hashlib import sha256
warnings.simplefilter("ignore")
import lengthwise
ds = lengthwise.open(sys.argv[1])
print(len(ds), ds.verify(), len(ds.records), len(ds.where("length < 30")))
print(*(sha256(ds[name].tobytes()).hexdigest() for name in ds.ids))
print(*(name + sha256(rows.tobytes()).hexdigest() for name, rows in ds.in_storage_order()))
print(sha256(ds.pooled("mean").tobytes()).hexdigest())
"""

BATCH = """
data = ds.torch()
from torch.utils.data import DataLoader
batch = next(iter(DataLoader(data, batch_size=3, collate_fn=data.pack)))
print(batch.ids, sha256(batch.rows.numpy().tobytes()).hexdigest())
"""


def output_of(script: str, *arguments: str, without: Iterable[str] = ()) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(*without), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def proteins(random_proteins):
    return random_proteins(20)


@pytest.fixture(scope="module")
def store(small_store, proteins):
    made = small_store(outputs=["residue", "mean"])
    made.ingest("a", proteins)
    made.run(shard_bytes=4_000)
    return made


@pytest.fixture(scope="module")
def dataset(store):
    return str(store.path / "datasets" / "a")


@pytest.fixture(scope="module")
def read_here(dataset):
    read = output_of(READ, dataset)
    assert read.startswith("20 20 20 ")
    return read


@pytest.mark.parametrize("without", [*([words] for words in USED), ALL], ids=" ".join)
def test_a_store_is_written_and_read(tmp_path, tiny_checkpoint, proteins, store, read_here, without):
    arguments = [text for protein in proteins.items() for text in protein]
    read = output_of(WRITE + READ, str(tmp_path), str(tiny_checkpoint), *arguments, without=without)
    assert read == read_here
    made = copy_of_paths(store, tmp_path)
    assert made.rows() == store.rows()
    assert [path.name for path in made.shard_files()] == [path.name for path in store.shard_files()]


def copy_of_paths(store, folder: Path):
    """The same store's methods over the files of another folder."""
    other = copy.copy(store)
    other.folder, other.path = folder, folder / "results" / "tiny"
    return other


def test_a_store_is_read_where_nothing_of_unix_is(dataset, read_here):
    assert output_of(READ, dataset, without=ALL + OF_WRITERS) == read_here


def test_torch_reads_batches_where_nothing_of_linux_is(dataset):
    assert output_of(READ + BATCH, dataset, without=ALL) == output_of(READ + BATCH, dataset)


USES = {
    "module": "import {name}",
    "os": "import os; os.{name}",
    "libc": "import ctypes; ctypes.CDLL(None).{name}",
    "libc:": "import ctypes; ctypes.CDLL(None)",
    "mmap": "import mmap; mmap.mmap(-1, 9).{name}",
    "open:folders": "import os; os.open('/', os.O_RDONLY)",
    "open:/proc": "from lengthwise.system.files import sha256; sha256('/proc/self/status')",
}


@pytest.mark.parametrize("word", ALL + OF_WRITERS)
def test_what_is_taken_away_is_gone(word):
    """Else the tests above would show nothing."""
    kind, _, name = word.partition(":")
    use = USES.get(word, USES.get(kind, "")).format(name=name)
    codes = [
        subprocess.run([sys.executable, "-c", use], env=environment(*without), stderr=subprocess.DEVNULL).returncode
        for without in ([word], [])
    ]
    assert codes == [1, 0]


def test_the_disks_own_cache_is_flushed_where_the_system_can(tmp_path, monkeypatch):
    """F_FULLFSYNC of macOS; a file system that refuses it gets an fsync."""
    calls = []

    def full_sync(descriptor, command):
        calls.append(command)
        if refused:
            raise OSError(errno.ENOTSUP, "no")

    monkeypatch.setattr(descriptors.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(descriptors.fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    refused = False
    descriptors.flush_folder(tmp_path)
    assert calls == [51]
    refused = True
    descriptors.flush_folder(tmp_path)
    assert calls == [51, 51, "fsync"]


def test_a_page_on_the_disk_is_asked_for_and_one_in_memory_is_not(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))

    class Map(mmap.mmap):
        asked: ClassVar[list] = []

        def madvise(self, *arguments):
            self.asked.append(arguments)

    with open(path, "rb") as file, Map(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        for in_memory in (True, False):
            if not in_memory:
                os.fsync(file.fileno())
                descriptors.drop_cached_pages(file.fileno())
            descriptors.read_ahead(mapped, address, 5_000, 10_000)
            start = 5_000 // mmap.PAGESIZE * mmap.PAGESIZE
            assert mapped.asked == ([] if in_memory else [(mmap.MADV_WILLNEED, start, 15_000 - start)])
