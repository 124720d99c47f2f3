"""Imports of a rule's process, which take most of the time of a small job."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def imported_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_a_model_on_a_cpu_imports_no_compiler(tiny_checkpoint):
    load = f"checkpoint.load_model({str(tiny_checkpoint)!r}, torch.device('cpu'), torch.float32)"
    found = imported_by(f"import torch, lengthwise.jobs.embed_job; from lengthwise.esm2 import checkpoint; {load}")
    assert "torch" in found
    assert "torch._dynamo" not in found


@pytest.mark.parametrize("module", ["ingest.ingest", "plan.planner", "jobs.assemble", "report.summarize"])
def test_rules_without_a_model_import_no_torch(module):
    found = imported_by(f"import lengthwise.{module}")
    assert f"lengthwise.{module}" in found
    assert "torch" not in found


def test_parsing_the_snakefile_imports_no_library_of_arrays_or_tables():
    """Every job parses it. The modules are those that the workflow's common.smk and resources.smk import."""
    rules = Path(__file__).resolve().parents[2] / "workflow" / "rules"
    lines = "\n".join((rules / name).read_text() for name in ("common.smk", "resources.smk"))
    imports = re.findall(r"^(?:from lengthwise\S* import .*|import lengthwise\S*)$", lines, re.MULTILINE)
    found = imported_by("; ".join(imports))
    assert len(imports) > 10
    assert found.isdisjoint({"torch", "numpy", "pandas", "pyarrow", "duckdb", "requests"})
