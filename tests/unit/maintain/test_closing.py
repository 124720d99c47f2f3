"""A failed run's last lines say what to do."""

from lengthwise.maintain.run_summary import failure_lines_of
from lengthwise.system.logging import FAILED


def test_what_is_wrong_is_to_be_mended_before_the_same_command_runs_again(tmp_path):
    (tmp_path / "logs/ingest").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"logs/ingest/{name}.log").write_text(f"10:00:00  working\n{FAILED}in.fasta: the file is empty\n")
    _, reason, *rest = failure_lines_of(tmp_path, 0)
    assert reason == f"{FAILED}in.fasta: the file is empty"
    assert len(rest) == 1
    assert "mend that, then run the same command again" in rest[0]


def test_a_run_that_gave_no_reason_is_run_again(tmp_path):
    lines = failure_lines_of(tmp_path, 0)
    assert "Snakemake's lines above say why" in lines[1]
    assert "run the same command again to go on" in lines[2]
