"""The forecast as a user asks for it, and the refusal of what does not fit on the disk."""

import json
import statistics

import pytest
from project import Project, random_sequences

import realistic
from lengthwise.store.metrics import read_metrics
from lengthwise.store.paths import find_metrics
from lengthwise.system.files import read_json
from lengthwise.system.machine import usable_cores


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
    assert sorted(path.name for path in (store / "forecast").iterdir()) == ["forecast.json", "forecast.txt"]


def test_a_card_that_is_named_is_forecast_too_and_an_unknown_one_is_refused(project):
    project.configure(model="esm2_t33_650M_UR50D", device="cpu")
    run = project.snakemake("forecast", "--config", "device_like=A100-40GB")
    assert run.code == 0, run.output
    assert "on A100-40GB, float16: " in run.output
    run = project.snakemake("forecast", "--config", "device_like=A100")
    assert run.code != 0
    assert "device_like: 'A100'" in run.errors[0]
    assert "A100-80GB" in run.errors[0]


def test_a_whole_run_takes_the_disk_and_about_the_memory_that_were_forecast(project, example):
    """The report and all, of another folder with the same config; malloc differs from machine to machine."""
    assert project.snakemake("forecast").code == 0
    made = read_json(project.folder / "results" / "demo" / "forecast" / "forecast.json")
    store = example[0].folder / "results" / "demo"
    known_before = {store / "inputs", store / "forecast"}
    files = [path for path in store.rglob("*") if path.is_file() and not known_before & set(path.parents)]
    assert made["disk"]["needed_bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.02)
    peak = read_metrics(store.glob("metrics/*/*.parquet"))["peak_rss_bytes"].max()
    assert made["memory"]["batch_bytes"] == pytest.approx(peak, rel=0.25)


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


def test_a_gpu_is_forecast_where_there_is_none(project, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    project.configure(model="esm2_t33_650M_UR50D", device="cuda")
    run = project.snakemake("forecast")
    assert run.code == 0, run.output
    assert "float16 on cuda" in run.output
    assert "allocated GPU memory" in run.output
    assert "no GPU is visible" in project.snakemake().errors[0]  # embedding there is another matter


# Records of the job that is learned from, and of the one that is forecast; so often.
FIRST, SECOND, ROUNDS = 120, 280, 3


@pytest.mark.huge
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_and_time_are_as_forecast_on_a_quiet_machine(tmp_path, precision):
    """Prints what was forecast and what was measured, in 8M's shape on all cores, for the README."""
    times, memories = [], []
    for number in range(ROUNDS):
        project = Project(tmp_path / str(number))
        project.cores = usable_cores()
        store = project.folder / "results" / "demo"
        for name, records in (("first", FIRST), ("second", SECOND)):
            (project.folder / "config").mkdir(parents=True, exist_ok=True)
            realistic.write(project.folder / f"{name}.fasta", records, seed=records)
            project.configure(inputs=[f"{name}.fasta"], precision=precision, weights=str(tmp_path / "weights"))
            assert project.snakemake("forecast").code == 0
            assert project.snakemake(f"results/demo/datasets/{name}/manifest.json").code == 0
        made = read_json(store / "forecast" / "forecast.json")
        job_record = max(map(read_json, store.glob("jobs/*.json")), key=lambda job: job["finished"])
        seconds, expected_seconds = job_record["load_seconds"] + job_record["embed_seconds"], made["time"][0]["seconds"]
        peak = read_metrics(find_metrics(store, shard) for shard in job_record["made"])["peak_rss_bytes"].max()
        expected_peak = max(made["memory"]["batch_bytes"], made["memory"]["longest_bytes"])
        times.append(expected_seconds / seconds)
        memories.append(expected_peak / peak)
        print(
            f"\n{precision}, {job_record['residues']:,} residues: {seconds:.1f} s, forecast {expected_seconds:.1f} s; ",
            end="",
        )
        print(f"{peak / 1e6:.0f} MB, forecast {expected_peak / 1e6:.0f} MB", flush=True)
    assert statistics.median(times) == pytest.approx(1, abs=0.3), times
    assert statistics.median(memories) == pytest.approx(1, abs=0.1), memories
