"""The forecast as a user asks for it, and the refusal of what does not fit on the disk."""

import json

from project import Project, random_sequences


def test_a_forecast_reads_the_inputs_and_nothing_more(project):
    project.configure(model="esm2_t33_650M_UR50D", weights_url="http://127.0.0.1:9", device="cpu")
    run = project.snakemake("forecast")
    assert run.code == 0, run.output
    assert run.rules == {"ingest": 1, "forecast": 1}  # no weights are fetched, nothing is planned
    store = project.folder / "results" / "esm2_t33_650M_UR50D"
    made = json.loads((store / "forecast" / "forecast.json").read_text())
    assert made["work"]["sequences"] == 79
    last = run.output.splitlines()[-25:]
    assert [line for line in last if line.startswith("Disk") and line.endswith(" free")] != []
    assert last[-1].endswith("forecast/index.html")


def test_a_run_that_the_disk_cannot_hold_stops_before_it_embeds(tmp_path, monkeypatch):
    """As if 1,000 bytes were free: Python runs sitecustomize.py in every process that finds one."""
    project = Project.with_tiny_model(tmp_path / "project", a=random_sequences(20, seed=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(
        "import shutil\nfree = shutil._ntuple_diskusage(2000, 1000, 1000)\nshutil.disk_usage = lambda path: free\n"
    )
    environment = Project.environment.fget
    path = f"{tmp_path / 'full'}:{environment(project)['PYTHONPATH']}"
    monkeypatch.setattr(Project, "environment", property(lambda self: environment(self) | {"PYTHONPATH": path}))
    run = project.snakemake()
    assert run.code != 0
    assert len(set(run.errors)) == 1, run.output
    assert "are free on its file system" in run.errors[0]
    assert "embed" not in run.rules
    assert not (project.store / "plan" / "jobs.tsv").exists()  # so that the next run plans, and asks, again
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", disk_space="ignore")
    assert project.snakemake("results/tiny/plan/jobs.tsv").code == 0
