"""The workflow on a system that has nothing of Linux but what torch and psutil themselves ask of this one."""

import pandas as pd
from project import Project, of_file, random_sequences, served

from lengthwise.maintain.verify_command import run as verify
from other_systems import ALL, environment


class Elsewhere(Project):
    """Commands on such a system."""

    @property
    def environment(self) -> dict[str, str]:
        elsewhere = environment(*ALL)
        return super().environment | {name: elsewhere[name] for name in ("PYTHONPATH", "LENGTHWISE_WITHOUT")}


def test_a_run_ends_as_on_linux(tmp_path):
    project = Elsewhere.with_tiny_model(tmp_path / "project", a=random_sequences(30, seed=1))
    config = {"exports": ["h5", "pt", "parquet"], "scaling": True, "scaling_seconds": 5, "device": "auto"}
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", **config)
    run = project.snakemake()
    assert run.code == 0, run.output
    assert "this file system has no locks; let no other run work in this store" in run.output
    assert served(project, "a") == of_file(project.folder / "in" / "a.fasta")
    assert verify(project.store, quick=False, repair=False) == 0
    # What is not measured there is null, never zero.
    metrics = pd.concat(map(pd.read_parquet, (project.store / "metrics").rglob("*.parquet")))
    assert metrics["peak_rss_bytes"].isna().all()
    assert (metrics["wall_ms"] > 0).all()
    assert pd.read_csv(project.store / "report" / "scaling.tsv", sep="\t")["peak_bytes"].isna().all()
    again = project.snakemake()
    assert again.code == 0, again.output
    assert not again.rules
