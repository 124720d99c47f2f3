"""The last lines of a run, read by the shell in which it was started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import Project

PROTEINS = [b"MKV", b"MKVLAAG"]


class FromAbove(Project):
    """Commands typed in the folder above the working folder: `snakemake --directory project`."""

    @property
    def shell_folder(self) -> Path:
        return self.folder.parent

    def command(self, *arguments: str) -> list[str]:
        return [*super().command(*arguments)[:-1], self.folder.name]


def last_lines(run) -> dict[str, str]:
    """{first word: rest} of the lines after Snakemake's own."""
    lines = run.output[run.output.index("\nRecords  ") :].splitlines()
    return {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line}


def printed_by(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def above(tmp_path_factory):
    """A project that was run from the folder above it, and that run."""
    project = FromAbove.with_tiny_model(tmp_path_factory.mktemp("above") / "project", a=PROTEINS)
    run = project.snakemake()
    assert run.code == 0, run.output
    return project, run


def test_the_last_lines_of_a_run_in_another_folder_name_files_as_the_shell_sees_them(above):
    project, run = above
    lines = last_lines(run)
    assert lines["Embeddings"] == "project/results/tiny/datasets/a"
    assert (project.shell_folder / lines["Embeddings"] / "manifest.json").exists()
    assert (project.shell_folder / lines["Report"]).exists()
    assert printed_by(lines["Next"], project.shell_folder) == "a_0 (3, 32)\n"
    assert "project/config/config.yaml" in lines["RANDOM"]


def test_a_forecast_in_another_folder_names_the_store_as_the_shell_sees_it(above):
    project, _ = above
    run = project.snakemake("forecast")
    assert run.code == 0, run.output
    (line,) = [line for line in run.output.splitlines() if line.startswith("Forecast    ")]
    assert line.startswith("Forecast    project/results/tiny: ")


def test_the_errors_of_a_run_in_another_folder_name_files_as_the_shell_sees_them(above, tmp_path):
    project = above[0].copy(tmp_path / "copy")
    (project.folder / "in/b.fasta").write_text("")
    run = project.snakemake()
    assert run.code != 0
    assert run.errors[-1].startswith("lengthwise: error: copy/in/b.fasta: ")


def test_a_run_with_nothing_to_do_says_where_the_results_are_too(above):
    project, first = above
    run = project.snakemake()
    assert run.code == 0, run.output
    assert "Nothing to be done" in run.output
    assert run.output.count("Records   ") == 1
    before, after = last_lines(first), last_lines(run)
    assert after.pop("Time").endswith("nothing was left to embed")
    assert after == {name: text for name, text in before.items() if name != "Time"}


def slow(*arguments):
    return pytest.param([*arguments], marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dry-run"],
        ["results/tiny/plan/jobs.tsv"],
        slow("--until", "plan"),
        slow("--touch"),
        slow("--unlock"),
        slow("--list-rules"),
        slow("--config", "layers=7"),
    ],
    ids=" ".join,
)
def test_a_command_that_is_no_whole_run_or_fails_says_nothing_of_results(above, arguments):
    project, _ = above
    run = project.snakemake(*arguments)
    assert (run.code == 0) == ("--config" not in arguments), run.output
    assert "Records   " not in run.output
