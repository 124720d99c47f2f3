"""The run summary of a failed run says why it failed and what to do."""

from lengthwise.maintain.run_summary import failure_lines_of
from lengthwise.system.logging import ERROR_PREFIX


def test_the_reason_in_the_logs_is_given_once(tmp_path):
    (tmp_path / "logs/ingest").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"logs/ingest/{name}.log").write_text(
            f"10:00:00  working\n{ERROR_PREFIX}in.fasta: the file is empty\n"
        )
    _, reason, *rest = failure_lines_of(tmp_path, 0)
    assert reason == f"{ERROR_PREFIX}in.fasta: the file is empty"
    assert len(rest) == 1
    assert "mend that, then run the same command again" in rest[0]


def test_without_a_reason_in_the_logs_the_summary_points_to_snakemakes_lines(tmp_path):
    lines = failure_lines_of(tmp_path, 0)
    assert "Snakemake's lines above say why" in lines[1]
    assert "run the same command again to go on" in lines[2]
