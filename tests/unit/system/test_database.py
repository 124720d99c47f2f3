"""DuckDB within a limit of memory."""

import pytest

from lengthwise.system.database import out_of_core


@pytest.mark.parametrize("rows", ["fetchall", "to_arrow_reader"])
def test_a_query_that_needs_more_memory_than_the_rule_has_is_one_line(tmp_path, refused, rows):
    """The size of one string cannot be spilled."""
    query = "SELECT repeat('x', CASE WHEN range > 50_000 THEN 30_000_000 ELSE 1 END) FROM range(60_000)"
    with refused("plan ran out of its 20,000,000 bytes", "--set-resources plan:mem_mb="):  # noqa: SIM117
        with out_of_core("plan", 20_000_000, tmp_path / "spill", threads=1) as database:
            for _ in getattr(database.sql(query), rows)():
                pass


def test_another_error_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), out_of_core("plan", 20_000_000, tmp_path / "spill", threads=1):
        (tmp_path / "none").read_text()
