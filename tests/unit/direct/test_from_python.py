"""lengthwise.embed and lengthwise.load: the workflow's numbers, rules and refusals, for sequences in memory."""

import gzip
import io
import itertools
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from backports import zstd
from Bio import SeqIO
from Bio.Seq import Seq

import lengthwise
from lengthwise.direct import model as model_module
from lengthwise.esm2 import checkpoint, fair_esm_layout, streamed, tensors
from lengthwise.esm2.engine import Engine
from lengthwise.store.shard import Shard

ROOT = Path(__file__).resolve().parents[3]
OUTPUTS = ["residue", "mean", "bos", "max", "std", "logits", "contacts"]
# Float32 sums in another order, on flat attention: see test_model.
FLOAT32_TOLERANCE = 2e-5
PROTEINS = {"one": "MKTAYIAKQR", "two": "GLSDGEWQLVL", "three": "ACDEFGHIKLMNPQRSTVWY"}


@pytest.fixture(scope="module")
def with_head(tmp_path_factory, tiny_checkpoint) -> Path:
    """The tiny checkpoint with the weights of a contact head beside it."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    checkpoint.write_random_regression(fair_esm_layout.contact_regression_path(path), checkpoint.read(path)[0])
    return path


@pytest.fixture(scope="module")
def load(with_head):
    """Loads the tiny model on the CPU."""

    def make(path: Path = with_head, **options):
        with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
            return lengthwise.load(path, device="cpu", **options)

    return make


@pytest.fixture(scope="module")
def tiny(load):
    return load()


def assert_same(ones, others):
    assert [one.id for one in ones] == [other.id for other in others]
    for one, other in zip(ones, others, strict=True):
        assert (one.sequence, one.changes, one.reason) == (other.sequence, other.changes, other.reason)
        assert one.arrays.keys() == other.arrays.keys()
        for name, values in one.arrays.items():
            np.testing.assert_array_equal(values, other.arrays[name])


@pytest.fixture(scope="module")
def odd_proteins(random_proteins) -> dict[str, str]:
    """All that normalisation does, each reason but a missing id, duplicates, and lengths of several batches."""
    odd = {"lower": "mktayiak", "stop": "MKTAYIAK*", "j": "MKJ", "space": "MK TA", "alone": "M", "long": "MKVLA" * 100}
    bad = {"digit": "MK1", "gap": "M-K", "inner": "MK*TA", "empty": "", "x": "XXX"}
    return {**odd, **random_proteins(100, longest=90), **bad, "twin": "MKTAYIAK"}


@pytest.fixture(scope="module")
def workflow(small_store, with_head, odd_proteins):
    """The same proteins as the workflow embeds them."""
    store = small_store(with_head, outputs=OUTPUTS, storage_dtype="float32", layers=[2, 1])
    store.ingest("a", odd_proteins)
    store.run(shard_bytes=1 << 30)
    return store


def workflow_rows(workflow) -> dict[str, dict[str, bytes]]:
    """{sequence: {tensor: its bytes}}"""
    tables = pd.read_parquet(workflow.inputs("a") / "sequences.parquet")
    names = {row.digest: row.sequence.decode() for row in tables.itertuples()}
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in workflow.shard_files():
        shard = Shard(path)
        lengths = np.diff(shard["offsets"])
        for name in shard.data_names:
            ends = np.cumsum(tensors.entries(name, lengths, workflow.settings))
            for digest, rows in zip(shard["digests"], np.split(shard[name], ends[:-1]), strict=True):
                found.setdefault(names[digest.tobytes()], {})[name] = np.array(rows)
    return found


def test_numbers_are_the_workflows_to_the_bit_where_batches_are_the_same(workflow, tiny, odd_proteins):
    given = tiny.embed(odd_proteins, layers=[2, 1], outputs=OUTPUTS, errors="return")
    rows = workflow_rows(workflow)
    assert [one.id for one in given] == [*odd_proteins]
    assert {one.sequence for one in given if not one.reason} == rows.keys()
    for one in given:
        for name, values in one.arrays.items():
            stored = rows[one.sequence][name]
            if name == "contacts":  # which are stored in float16
                values = values.astype(np.float16)
            np.testing.assert_array_equal(values.reshape(stored.shape), stored, f"{one.id} {name}")
        assert one.reason or len(one.arrays) == len(tensors.names(OUTPUTS, [2, 1]))


def test_batches_are_the_workflows(small_store, with_head, tiny, odd_proteins, monkeypatch):
    batches = []
    original = Engine.embed
    monkeypatch.setattr(Engine, "embed", lambda self, given: original(self, (batches.append(b) or b for b in given)))
    store = small_store(with_head, parity="off")
    store.ingest("a", odd_proteins)
    store.plan(shard_bytes=1 << 30)
    store.embed_all(parity="off")
    ours, batches = batches, []
    tiny.embed(odd_proteins, outputs="mean", errors="return")
    assert len(ours) > 5
    assert batches == ours


@pytest.mark.parametrize("batch_tokens", [16, 100])
def test_numbers_are_the_workflows_but_for_rounding_in_other_batches(workflow, load, odd_proteins, batch_tokens):
    rows = workflow_rows(workflow)
    others = 0
    for one in load(batch_tokens=batch_tokens).iter(odd_proteins, [2, 1], OUTPUTS, errors="return"):
        for name, values in one.arrays.items():
            stored = rows[one.sequence][name]
            values = values.reshape(stored.shape)
            others += (values != stored).any()
            tolerance = 1e-3 if stored.dtype == np.float16 else FLOAT32_TOLERANCE
            if name != tensors.PERPLEXITY:  # an exponential, of up to 1e12 for random weights
                limit = tolerance * max(
                    1.0, np.sqrt(np.mean(np.square(stored, dtype=np.float64))) if stored.size else 1
                )
                assert np.abs(values - stored).max(initial=0) <= limit, f"{one.id} {name}"
    assert others


def test_records_are_accepted_changed_and_rejected_as_by_the_workflow(workflow, tiny, odd_proteins):
    records = pd.read_parquet(workflow.inputs("a") / "records.parquet").set_index("id")
    given = tiny.embed(odd_proteins, outputs="mean", errors="return")
    assert {one.id: one.reason for one in given} == records["reason"].to_dict()
    assert {one.id: ",".join(one.changes) for one in given} == records["changes"].to_dict()
    assert sum(bool(one.reason) for one in given) == 5


def test_every_kind_of_input_gives_the_same(tiny, tmp_path):
    text = "".join(f">{name} described\n{sequence[:8]}\n{sequence[8:]}\n" for name, sequence in PROTEINS.items())
    files = {"a.fasta": text.encode(), "a.gz": gzip.compress(text.encode()), "a.zst": zstd.compress(text.encode())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    expected = tiny.embed(PROTEINS)
    assert [one.id for one in expected] == [*PROTEINS]
    records = list(SeqIO.parse(tmp_path / "a.fasta", "fasta"))
    several = [
        list(PROTEINS.items()),
        iter(PROTEINS.items()),
        pd.Series(PROTEINS),
        records,
        SeqIO.parse(tmp_path / "a.fasta", "fasta"),
        {record.id: record.seq for record in records},
        str(tmp_path / "a.fasta"),
        *(tmp_path / name for name in files),
    ]
    for given in several:
        assert_same(tiny.embed(given), expected)


def test_strings_alone_have_their_numbers_as_ids(tiny):
    given = tiny.embed([*PROTEINS.values(), Seq(PROTEINS["one"]), "MKTAY\r\nIAKQR\n"])
    assert [one.id for one in given] == ["0", "1", "2", "3", "4"]
    assert given[3].sequence == given[4].sequence == PROTEINS["one"]
    np.testing.assert_array_equal(given[3].residue, given[0].residue)


def test_arrays_have_their_shapes_and_layers(tiny):
    (one,) = tiny.embed(["MKTAY"], layers=[1, -1], outputs=OUTPUTS)
    assert one.layers == (1, 2)
    assert one.residue.shape == (5, 32)
    assert [getattr(one, name).shape for name in ("mean", "max", "std", "bos")] == [(32,)] * 4
    assert (one.logits.shape, one.contacts.shape) == ((5, 33), (5, 5))
    assert one.pseudo_perplexity > 0
    np.testing.assert_array_equal(one.contacts, one.contacts.T)
    other = one.layer(2)
    np.testing.assert_array_equal(other.residue, tiny.embed(["MKTAY"])[0].residue)
    np.testing.assert_allclose(other.residue.mean(axis=0), other.mean, atol=1e-6)
    assert not np.array_equal(one.residue, other.residue)
    assert {values.dtype for values in one.arrays.values()} == {np.dtype(np.float32)}
    half = tiny.embed(["MKTAY"], layers=1, outputs=["residue", "mean"], dtype="float16")[0]
    np.testing.assert_array_equal(half.residue, one.residue.astype(np.float16))
    np.testing.assert_array_equal(half.mean, one.mean)


def test_what_was_not_computed_says_so(tiny, refused):
    (one,) = tiny.embed(["MKTAY"], outputs="contacts", contacts_max_residues=4)
    with refused("contacts", "5 residues", "contacts_max_residues"):
        _ = one.contacts
    with refused("mean", "not computed", "outputs"):
        _ = one.mean
    with refused("layer 1", "gave 2"):
        one.layer(1)
    assert not hasattr(one, "residue")


def test_a_rejected_sequence_is_named_before_anything_is_computed(tiny, tmp_path, refused, monkeypatch):
    (tmp_path / "a.fasta").write_text(">one\nMKT\n>bad\nMKT1\n")
    monkeypatch.setattr(Engine, "embed", lambda *_: pytest.fail("it was computed"))
    with refused("sequence 1 (counted from 0)", "invalid_byte: '1'", "errors='return'"):
        tiny.embed(["MKT", "MKT1"])
    with refused("sequence 1 (counted from 0), 'bad'", "empty"):
        tiny.embed({"one": "MKT", "bad": ""})
    with refused("a.fasta: record 2 (byte 9, line 3), 'bad'", "invalid_byte: '1' (0x31) at position 4"):
        tiny.embed(tmp_path / "a.fasta")


def test_an_iterator_is_read_as_it_is_embedded_and_gives_what_comes_before_a_rejected_one(load, refused):
    small = load(batch_tokens=16)
    sequences = ["MKTAYIAKQR", "GLSDGEW", "MKT1", "ACDEF"]
    found = small.iter(iter(sequences))
    assert [next(found).sequence for _ in range(2)] == sequences[:2]
    with refused("sequence 2 (counted from 0)", "invalid_byte"):
        next(found)
    results = small.embed(iter(sequences), errors="return")
    assert [bool(one.reason) for one in results] == [False, False, True, False]
    with refused("2 was rejected", "invalid_byte"):
        _ = results[2].residue


def test_endless_input_gives_results_in_order_while_little_is_read_ahead(load):
    read = 0

    def endless():
        nonlocal read
        for number in itertools.count():
            read += 1
            yield f"{number}", "MKTAYIAKQR" + "ACDEFGHIKL"[number % 10] * (number % 40)

    small = load(batch_tokens=64)
    found = list(itertools.islice(small.iter(endless(), outputs="mean"), 5_000))
    assert [one.id for one in found] == [str(number) for number in range(5_000)]
    assert read <= 5_000 + 2_000  # a chunk is judged at once, and the next one for the next batches
    expected = small.embed([found[4_321].sequence], outputs="mean")[0]
    np.testing.assert_allclose(found[4_321].mean, expected.mean, atol=FLOAT32_TOLERANCE)


def test_the_same_sequence_is_computed_once(tiny, monkeypatch):
    computed = []
    original = Engine.embed
    monkeypatch.setattr(
        Engine, "embed", lambda self, batches: original(self, (computed.extend(batch) or batch for batch in batches))
    )
    found = tiny.embed({"a": "MKTAY", "b": "mktay", "c": "MKTAYI", "d": "MKTAY*"}, outputs="mean")
    assert sorted(computed) == [b"MKTAY", b"MKTAYI"]
    assert [one.id for one in found] == ["a", "b", "c", "d"]
    for one in (found[1], found[3]):
        np.testing.assert_array_equal(one.mean, found[0].mean)


def test_two_iterations_of_one_model_may_take_turns(load, random_proteins):
    small, proteins = load(batch_tokens=32), random_proteins(60)
    rows, means = small.iter(proteins, 1, "residue"), small.iter(proteins, 2, "mean")
    turns = list(zip(rows, means, strict=True))
    assert {(*one.arrays, *other.arrays) for one, other in turns} == {("layer_1", "mean_2")}
    assert_same([one for one, _ in turns], small.embed(proteins, 1, "residue"))
    assert_same([one for _, one in turns], small.embed(proteins, 2, "mean"))


def test_one_id_of_two_sequences_is_refused_and_the_same_twice_is_not(tiny, tmp_path, refused):
    assert len(tiny.embed([("a", "MKT"), ("a", "mkt")])) == 2
    with refused("sequence 2 (counted from 0), 'a'", "same id"):
        tiny.embed([("a", "MKT"), ("b", "MKT"), ("a", "MKV")])
    (tmp_path / "a.fasta").write_text(">a\nMKT\n>a\nMK1\n")
    with refused("record 2", "same id"):
        tiny.embed(tmp_path / "a.fasta", errors="return")


def test_nucleotides_are_refused_unless_allowed(tiny, tmp_path, refused):
    gene = "ACGTTGCA" * 20
    (tmp_path / "a.fasta").write_text(f">a\n{gene}\n")
    for given in ([gene, "MKT"], tmp_path / "a.fasta", iter([gene])):
        with refused("looks like nucleotides", "nucleotides: allow"):
            tiny.embed(given)
    (one,) = tiny.embed([gene], outputs="mean", nucleotides="allow")
    assert one.mean.shape == (32,)
    assert one.changes == tiny.embed(tmp_path / "a.fasta", nucleotides="allow")[0].changes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("MKTAYIAKQR", ["no file 'MKTAYIAKQR'", "['MKTAYIAKQR']"]),
        ("no/such.fasta", ["no file 'no/such.fasta'"]),
        (Path("no/such.fasta"), ["no/such.fasta: cannot be read"]),
        (7, ["int is nothing to embed", "FASTA"]),
        ([7], ["sequence 0", "is int"]),
        (["MKT", float("nan")], ["sequence 1", "is float"]),
        (b"MKT", ["sequence 0", "is int"]),
        (["Mé"], ["invalid_byte", "position 2"]),
        ([">a\nMKT"], ["invalid_byte: '>'", "position 1"]),
    ],
)
def test_what_is_no_input_is_refused_in_a_line(tiny, refused, given, words):
    with refused(*words):
        tiny.embed(given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 3}, ["layers: 3 does not exist", "0 to 2"]),
        ({"layers": "last"}, ["layers: 'last'"]),
        ({"layers": []}, ["layers: none"]),
        ({"outputs": "means"}, ["outputs: 'means'", "did you mean 'mean'?"]),
        ({"dtype": "bfloat16"}, ["dtype: 'bfloat16'"]),
        ({"errors": "skip"}, ["errors: 'skip'", "return"]),
        ({"nucleotides": "no"}, ["nucleotides: 'no'"]),
    ],
)
def test_options_are_checked_when_they_are_given(tiny, refused, options, words):
    with refused(*words):
        tiny.iter(["MKT"], **options)


def test_a_model_without_a_contact_head_says_so_and_stays_usable(load, tiny_checkpoint, refused):
    headless = load(tiny_checkpoint)
    with refused("no contact head", "contact-regression.pt"):
        headless.embed(["MKT"], outputs="contacts")
    assert len(headless.embed(["MKT"])) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "esm2_650M"}, ["'esm2_650M' is not a model", "did you mean 'esm2_t33_650M_UR50D'?"]),
        ({"model": "esm1b_t33_650M_UR50S"}, ["is ESM-1b, which is not served"]),
        ({"model": "no/such.pt"}, ["no file or folder no/such.pt"]),
        ({"model": "demo", "device": "mps"}, ["device: 'mps'"]),
        ({"model": "demo", "precision": "half"}, ["precision: 'half'"]),
        ({"model": "demo", "batch_tokens": 0}, ["batch_tokens: 0"]),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused_in_a_line(refused, options, words):
    with refused(*words):
        lengthwise.load(**options)


def test_a_named_models_weights_are_kept_in_the_users_cache_or_where_one_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS") as warned:
        (one,) = lengthwise.embed(["MKTAY"], model="demo", device="cpu", outputs=["contacts", "mean"])
    assert [Path(one.filename).name for one in warned] == [Path(__file__).name]
    assert (tmp_path / "cache/lengthwise/weights/demo.pt").is_file()
    assert (one.mean.shape, one.contacts.shape) == ((320,), (5, 5))
    (tmp_path / "cache/lengthwise/weights").rename(tmp_path / "own")
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        lengthwise.load("demo", device="cpu", weights=tmp_path / "own")
    assert not (tmp_path / "cache/lengthwise/weights").exists()


def test_a_folder_that_cannot_be_made_is_refused_in_a_line(tmp_path, refused):
    (tmp_path / "file").touch()
    with refused("file/weights", "'weights'"):
        lengthwise.load("demo", device="cpu", weights=tmp_path / "file/weights")


def test_streamed_weights_give_the_same_and_are_not_mixed_with_others(
    tiny, with_head, tmp_path, load, random_proteins, refused, monkeypatch
):
    copy = Path(shutil.copy(with_head, tmp_path / "tiny.pt"))
    monkeypatch.setattr(streamed, "fits_resident", lambda *_: False)  # as if memory were too small
    other, proteins = load(copy, batch_tokens=2_048), random_proteins(30)
    assert isinstance(other._engine, streamed.StreamedEngine)
    assert_same(other.embed(proteins, [2, 1], ["residue", "mean"]), tiny.embed(proteins, [2, 1], ["residue", "mean"]))
    found = other.iter(proteins, [2, 1], ["residue", "mean"])
    next(found)
    checkpoint.write_random(copy, checkpoint.read(copy)[0], seed=1)
    with refused("tiny.pt", "changed", "load the model again"):
        next(found)


def test_heads_of_another_checkpoint_are_not_taken(tiny_checkpoint, tmp_path, load, refused):
    copy = Path(shutil.copy(tiny_checkpoint, tmp_path / "tiny.pt"))
    resident = load(copy)
    checkpoint.write_random(copy, checkpoint.read(copy)[0], seed=1)
    for _ in range(2):
        with refused("tiny.pt", "changed", "load the model again"):
            resident.embed(["MKTAY"], outputs="logits")
    assert resident.embed(["MKTAY"], outputs="mean")[0].mean.shape == (32,)


def hot_checkpoint(tiny_checkpoint: Path, path: Path) -> Path:
    """Tryptophan's embedding has one large channel, which a product takes beyond float16's range."""
    data = torch.load(tiny_checkpoint, weights_only=False)
    encoder = "encoder.sentence_encoder."
    data["model"][f"{encoder}embed_tokens.weight"][22] = torch.eye(32)[0] * 1e3  # W
    data["model"][f"{encoder}layers.0.fc1.weight"][0] = torch.eye(32)[0] * 1.5e4
    torch.save(data, path)
    return path


def test_what_overflows_float16_is_computed_again_in_float32(load, tiny_checkpoint, tmp_path, caplog):
    path = hot_checkpoint(tiny_checkpoint, tmp_path / "hot.pt")
    sequences = ["MKTAY", "MKWAY", "MKTAYI"]
    half, full = load(path, precision="float16"), load(path, precision="float32", batch_tokens=16)
    found, expected = half.embed(sequences, 1), full.embed(sequences, 1)
    assert "1 sequence overflowed float16; computed again in float32" in caplog.text
    same = [np.array_equal(one.residue, other.residue) for one, other in zip(found, expected, strict=True)]
    assert same == [False, True, False]


def test_what_overflows_float32_or_the_type_asked_for_is_rejected_with_the_reason(
    load, tiny_checkpoint, tmp_path, refused
):
    data = torch.load(tiny_checkpoint, weights_only=False)
    data["model"]["encoder.sentence_encoder.embed_tokens.weight"][22] = 1e5  # W
    torch.save(data, tmp_path / "spoiled.pt")
    model, sequences = load(tmp_path / "spoiled.pt"), ["MKTAY", "MKWAY"]
    found = model.embed(sequences, 0, dtype="float16", errors="return")
    assert [one.reason.split(":")[0] for one in found] == ["", "non_finite"]
    assert found[1].arrays == {}
    with refused("sequence 1 (counted from 0)", "non_finite", "overflowed float32 or float16; set dtype to float32"):
        model.embed(sequences, 0, dtype="float16")
    assert np.isfinite(model.embed(sequences, 0)[1].residue).all()


def test_what_overflows_float32_everywhere_is_the_weights(load, tiny_checkpoint, tmp_path):
    data = torch.load(tiny_checkpoint, weights_only=False)
    data["model"]["encoder.sentence_encoder.embed_tokens.weight"][22] = 3e38  # W
    torch.save(data, tmp_path / "spoiled.pt")
    model, sequences = load(tmp_path / "spoiled.pt"), ["MKTAY", "MKWAY"]
    _, pooled = model.embed(sequences, outputs="mean", dtype="float16", errors="return")
    _, found = model.embed(sequences, errors="return")
    assert pooled.reason == found.reason
    assert found.reason.startswith("non_finite: a number overflowed float32;")
    assert "weights" in found.reason
    assert found.reason.count("float32") == 2


def test_what_does_not_fit_into_memory_is_rejected_with_the_reason_and_the_others_stay(tiny, refused, monkeypatch):
    original = Engine._forward

    def refuse_long(self, batch):
        if max(map(len, batch.sequences)) > 50:
            raise torch.OutOfMemoryError("no memory")
        return original(self, batch)

    monkeypatch.setattr(Engine, "_forward", refuse_long)
    found = tiny.embed(["MKTAY", "MKVLA" * 11, "MKTAYI"], errors="return")
    assert [one.reason.split(" about")[0] for one in found] == ["", "does_not_fit: needs", ""]
    assert found[2].residue.shape == (6, 32)
    with refused("sequence 1 (counted from 0)", "does_not_fit"):
        tiny.embed(["MKTAY", "MKVLA" * 11])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("given", ["list", "iterator"])
def test_a_bar_shows_the_residues_done_once_work_takes_a_while(tiny, monkeypatch, given):
    sequences = ["MKTAYIAKQR"] * 50 + ["GLSDGEW"]

    def shown(**options) -> str:
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        tiny.embed(iter(sequences) if given == "iterator" else sequences, **options)
        return terminal.getvalue()

    assert shown() == ""
    monkeypatch.setattr(model_module, "BAR_AFTER_SECONDS", 1e-9)  # as if three seconds were over
    assert ("507/507" if given == "list" else "507 residues") in shown()
    assert shown(progress=False) == ""
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    assert shown() == ""


def test_importing_lengthwise_imports_no_library_of_arrays():
    code = "import lengthwise, sys; lengthwise.embed, lengthwise.load; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()}.isdisjoint({"torch", "numpy", "pyarrow", "pandas", "tqdm", "requests"})


def test_the_lines_of_docs_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "example.fasta").write_bytes((ROOT / "config/example.fasta").read_bytes())
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
            for line in block.splitlines():
                shown = re.fullmatch(r"(?:\w+ = )?(\S.*?) +# (\(.*?\)|\"\d\"|\[\(.*)(:.*)?", line)
                if shown and line[0] != " ":
                    value = eval(line.split("  #")[0].partition(" = ")[2] or line.split("  #")[0], names)
                    seen.append((shown[2], getattr(value, "shape", value)))
    assert len(seen) == 5
    assert [eval(text) for text, _ in seen] == [value for _, value in seen]
