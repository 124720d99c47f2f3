"""A dataset of several files: one ledger with the file of each record, in order, by the rules of one file."""

import gzip
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lengthwise.ingest import fasta as fasta_module
from lengthwise.ingest.identity import adopt, expected_stamps, input_stamp, read_summary, why_read_again
from lengthwise.ingest.ingest import ingest
from lengthwise.ingest.judge import Policy
from lengthwise.system.files import read_json, write_json
from lengthwise.system.runs import inputs_of

TABLES = ("records.parquet", "sequences.parquet", "summary.json")
ONE = b">a one\nMKV\n>b\nMAVK\n>bad\nM1K\n"
TWO = b">c\nMKV\n>a one\nMKV\n>d\nACDE"  # a duplicate of a, a itself again, and no line break at the end
THREE = b">e\nWWW\n"


@pytest.fixture
def files(tmp_path):
    """Three files, the second one compressed."""
    for name, content in {"a.fasta": ONE, "b.fasta.gz": gzip.compress(TWO), "c.fa": THREE}.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in ("a.fasta", "b.fasta.gz", "c.fa")]


def run(files, folder: Path, **options) -> dict:
    folder.mkdir(exist_ok=True)
    return ingest(files, *(folder / name for name in TABLES), Policy(**options))


def records(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder / "records.parquet").to_pandas()


def stamps(files) -> list[dict]:
    return [input_stamp(file) for file in files]


def test_records_of_all_files_are_in_one_ledger_in_order_with_their_file(files, tmp_path):
    summary = run(files, tmp_path / "t")
    found = records(tmp_path / "t")
    assert found["record_no"].tolist() == list(range(1, 8))
    assert found["id"].tolist() == ["a", "b", "bad", "c", "a", "d", "e"]
    assert found["status"].tolist() == ["accepted"] * 2 + ["rejected"] + ["duplicate"] * 2 + ["accepted"] * 2
    assert found["file"].tolist() == [str(files[i]) for i in (0, 0, 0, 1, 1, 1, 2)]
    assert {key: summary[key] for key in ("records", "accepted", "duplicate", "rejected", "residues")} == {
        "records": 7,
        "accepted": 4,
        "duplicate": 2,
        "rejected": 1,
        "residues": 14,
    }
    assert summary["sources"] == [
        {
            "file": str(file),
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "records": n,
        }
        for file, n in zip(files, (3, 3, 1), strict=True)
    ]
    assert summary["input_bytes"] == sum(file.stat().st_size for file in files)
    lines = "".join(source["sha256"] + "\n" for source in summary["sources"])
    assert summary["input_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert summary["input"] == f"{files[0]} and 2 more"


def test_the_tables_are_those_of_one_file_of_all_records(files, tmp_path):
    run(files, tmp_path / "t")
    whole = tmp_path / "whole.fasta"
    whole.write_bytes(ONE + TWO + b"\n" + THREE)
    run([whole], tmp_path / "w")
    pd.testing.assert_frame_equal(records(tmp_path / "t").drop(columns="file"), records(tmp_path / "w"))
    one, other = (pq.read_table(tmp_path / name / "sequences.parquet") for name in "tw")
    assert one.equals(other)


def test_one_file_leaves_what_it_left_before(files, tmp_path):
    for how, given in {"path": files[0], "list": files[:1]}.items():
        summary = run(given, tmp_path / how)
        assert "file" not in records(tmp_path / how)
        assert "sources" not in summary
        assert summary["input"] == str(files[0])
        assert summary["inputs"] == stamps(files[:1])
        assert summary["input_sha256"] == hashlib.sha256(ONE).hexdigest()
    assert (tmp_path / "path/records.parquet").read_bytes() == (tmp_path / "list/records.parquet").read_bytes()


# ---- the rules of one file


def test_one_id_for_two_sequences_names_both_files(files, tmp_path, refused):
    files[2].write_bytes(b">x\nWW\n>b\nWWW\n")
    with refused(
        f"{files[2]}: record 2 of {files[0]} and its record 2 have the same id 'b' and different sequences",
        "(byte 11, line 3; byte 6, line 3)",
        "duplicate_ids: suffix",
    ):
        run(files, tmp_path / "t")
    files[2].write_bytes(b">x\nWW\n>x\nWWW\n")
    with refused(f"{files[2]}: records 1 and 2 have the same id 'x'", "(byte 0, line 1; byte 6, line 3)"):
        run(files, tmp_path / "t")


def test_suffixes_go_on_over_files(files, tmp_path, refused):
    files[2].write_bytes(b">a\nWWW\n>b\nWWW\n")
    summary = run(files, tmp_path / "t", duplicate_ids="suffix")
    found = records(tmp_path / "t")
    assert found["id"].tolist() == ["a", "b", "bad", "c", "a", "d", "a_2", "b_2"]
    assert found["file"].tolist() == [str(files[i]) for i in (0, 0, 0, 1, 1, 1, 2, 2)]
    assert summary["changes"] == {"id_suffixed": 2}
    files[2].write_bytes(b">a\nWWW\n>a_2\nWWW\n")
    with refused(f"record 1 of {files[2]}, 'a', would be renamed to 'a_2', but record 2 of {files[2]} has that id"):
        run(files, tmp_path / "t", duplicate_ids="suffix")


def test_what_is_wrong_is_named_by_its_own_file_and_place(files, tmp_path, refused):
    with refused(f"{files[0]}: 1 of the records of 3 files would be rejected", "record 3 (byte 19, line 5), 'bad'"):
        run(files, tmp_path / "t", strict=True)
    files[2].write_bytes(b">e\nWWW\n>f\nM>K\n")
    with refused(f"{files[2]}: byte 11, line 4: '>' inside a line"):
        run(files, tmp_path / "t")
    files[2].write_bytes(b"")
    with refused(f"{files[2]}: the file is empty"):
        run(files, tmp_path / "t")


def test_each_file_is_judged_for_nucleotides_by_itself(files, tmp_path, refused):
    files[2].write_bytes(b">n\n" + b"ACGT" * 20 + b"\n")
    files[0].write_bytes(b">p\n" + b"MKVLAWWCDE" * 100 + b"\n")
    with refused(f"{files[2]}: looks like nucleotides: 80 of 80 letters", "the first at byte 0, line 1"):
        run(files, tmp_path / "t")


def test_a_failing_file_leaves_the_tables_that_were_there(files, tmp_path, refused):
    run(files, tmp_path / "t")
    before = {name: (tmp_path / "t" / name).read_bytes() for name in TABLES}
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with refused(str(files[1])):
        run(files, tmp_path / "t")
    assert {name: (tmp_path / "t" / name).read_bytes() for name in TABLES} == before


def test_many_chunks_of_many_files_number_their_records_through(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta_module.decompress, "BLOCK_BYTES", 64)
    rng = np.random.default_rng(0)
    files = []
    for i in range(5):
        files.append(tmp_path / f"{i}.fasta")
        lines = [f">{i}_{j}\n{''.join(rng.choice(list('ACDEFGHIKL'), 30))}\n" for j in range(20 + i)]
        files[-1].write_text("".join(lines))
    run(files, tmp_path / "t")
    found = records(tmp_path / "t")
    assert found["record_no"].tolist() == list(range(1, 111))
    assert [Path(file).stem for file in found["file"]] == [name.split("_")[0] for name in found["id"]]


# ---- identity


@pytest.fixture
def known(files, tmp_path):
    """The folder of the tables of the first two files."""
    run(files[:2], tmp_path / "t")
    return tmp_path / "t"


def why(folder: Path, files) -> str:
    return why_read_again(folder, read_summary(folder), stamps(files), {})


def test_the_files_that_were_read_are_known(known, files):
    assert why(known, files[:2]) == ""
    assert read_json(known / "summary.json")["inputs"] == [stamps(files[:2])]


def test_an_added_a_removed_a_changed_file_and_another_order_are_read(known, files):
    assert "c.fa is another path" in why(known, files)
    assert re.search(r"b\.fasta\.gz is no longer among the dataset's files", why(known, files[:1]))
    assert "in another order" in why(known, files[1::-1])
    files[0].write_bytes(ONE + b">more\nMMM\n")
    assert "a.fasta is another path, or has another size or time" in why(known, files[:2])


def test_a_file_that_becomes_one_of_several_is_read_and_back(files, tmp_path):
    run(files[0], tmp_path / "t")
    assert "b.fasta.gz is another path" in why(tmp_path / "t", files[:2])
    run(files[:2], tmp_path / "t")
    assert why(tmp_path / "t", files[:2]) == ""
    run(files[:1], tmp_path / "t")
    assert why(tmp_path / "t", files[:1]) == ""
    assert "file" not in records(tmp_path / "t")


def test_the_same_files_elsewhere_are_taken_and_others_refused(known, files, tmp_path, refused):
    elsewhere = [shutil.copy2(file, tmp_path / f"moved_{file.name}") for file in files[:2]]
    assert "another path" in why(known, elsewhere)
    run(elsewhere, known)
    assert why(known, elsewhere) == why(known, files[:2]) == ""  # both sets of paths have this content
    for others in ([files[2]], [files[2], shutil.copy2(files[2], tmp_path / "d.fa")]):
        with refused(str(others[0]), "was read from 2 other files", f"{elsewhere[0]} and 1 more", "another_name: "):
            why(known, others)
        with refused(str(others[0]), "was read from 2 other files"):
            run(others, known)
    same_size = tmp_path / "same_size.fasta"
    same_size.write_bytes(b">z\n" + b"W" * (sum(file.stat().st_size for file in files[:2]) - 3))
    with refused(str(same_size), "was read from 2 other files"):
        run([same_size], known)
    assert why(known, files[:2]) == ""


def test_a_summary_of_an_earlier_version_is_not_adopted_by_several_files(files, tmp_path):
    run(files[0], tmp_path / "t")
    path = tmp_path / "t/summary.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key not in ("inputs", "files")})
    assert "has another size" in why(tmp_path / "t", files[:2])
    assert not adopt(tmp_path / "t", stamps(files[:2]))
    assert not path.exists()


def test_a_file_that_is_gone_is_as_it_was_last_read(files, tmp_path, refused):
    """A rule of another workflow made it, and it was temporary."""
    folder, policy = tmp_path / "t", {"strict": False}
    summary, before = run(files, folder), stamps(files)
    names = [str(file) for file in files]

    def why(paths: list[str]) -> str:
        entries = inputs_of({"t": paths}, may_be_made=True)["t"]
        return why_read_again(folder, summary, expected_stamps(folder, entries), policy)

    files[1].unlink()
    assert inputs_of({"t": names}, may_be_made=True)["t"][1] == {"path": names[1]}
    assert expected_stamps(folder, inputs_of({"t": names}, may_be_made=True)["t"]) == before
    assert why(names) == ""
    assert "is another path" in why([*names, str(tmp_path / "new.fasta")])
    with refused("was read from 3 other files"):
        why([str(tmp_path / "new.fasta")])
    with pytest.raises(FileNotFoundError):
        inputs_of({"t": names})
