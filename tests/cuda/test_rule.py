"""The workflow on a pretended card, as a user runs it: lease, embedding, scaling study, report."""

from pathlib import Path

import pandas as pd
from pretend import Card
from pretended_machine import SITE, write_machine
from project import Project, random_sequences, wait_for

import driver
from lengthwise.report import figures
from lengthwise.store.metrics import read_metrics
from lengthwise.system.files import read_json
from lengthwise.system.gpus import lease


class OnCard(Project):
    """A project on a machine with a pretended card, which is the first of three."""

    cores = 2
    machine: Path

    @classmethod
    def with_tiny_model(cls, folder: Path, card: Card, local: str = "+cu130", **inputs: list[bytes]) -> "OnCard":
        project = super().with_tiny_model(folder / "project", **inputs)
        project.machine = folder / "machine"
        project.machine.mkdir()
        write_machine(project.machine, card, local)
        return project

    @property
    def environment(self) -> dict[str, str]:
        inherited = super().environment
        return inherited | {
            "PYTHONPATH": f"{SITE}:{inherited['PYTHONPATH']}",
            "LENGTHWISE_PRETEND": str(self.machine),
            "LD_LIBRARY_PATH": str(self.machine),
            "CUDA_VISIBLE_DEVICES": "0",
        }

    def noticed(self) -> list[dict]:
        """What the device noticed in each process that used it."""
        found = [read_json(path) for path in self.machine.glob("[0-9]*.json")]
        return [each for each in found if each["counts"].get("kernels")]


def test_a_run_leases_the_card_embeds_measures_and_reports(tmp_path):
    """One test: each worker would make the run again."""
    project = OnCard.with_tiny_model(
        tmp_path,
        Card(total_bytes=1 << 30),
        a=random_sequences(60, seed=1, longest=700),
        b=random_sequences(20, seed=2, longest=60),
    )
    project.configure(
        inputs=["in/*.fasta"], model="tiny.pt", device="cuda", batch_tokens=2_048, scaling=True, scaling_seconds=12
    )
    with lease([driver.UUIDS[0]]):
        run = project.start()
        log = project.folder / "snakemake.out"
        wait_for(lambda: "waiting for a GPU: all 1 are in use" in log.read_text() or run.poll() is not None)
        assert run.poll() is None, log.read_text()
        assert not project.noticed()
    assert run.wait(280) == 0, log.read_text()
    the_card_made_every_shard(project)
    nothing_ran_out_of_order_and_torch_got_its_settings(project)
    metrics_have_the_columns_of_a_card(project)
    the_study_measured_allocated_memory_and_copies(project)
    the_page_shows_the_cards_memory_and_plain_numbers(project)


def the_card_made_every_shard(made: OnCard) -> None:
    (job,) = made.jobs
    record = read_json(made.store / "jobs" / f"{job}.json")
    assert record["device"] == "NVIDIA Pretended 100"
    assert record["precision"] == "float16"
    assert record["parity"]["engine"]["share_of_limit"] < 0.6
    assert record["parity"]["stored"]["share_of_limit"] < 0.6
    assert record["versions"]["cuda"] == "13.0"
    assert record["loaded_bytes"] > 0


def nothing_ran_out_of_order_and_torch_got_its_settings(made: OnCard) -> None:
    used = made.noticed()
    assert len(used) == 2  # embedding and study
    assert [each["out_of_order"] for each in used] == [[], []]
    assert {each["settings"] for each in used} == {"expandable_segments:True"}


def metrics_have_the_columns_of_a_card(made: OnCard) -> None:
    metrics = read_metrics(made.store.glob("metrics/*/*.parquet"))
    assert len(metrics) > 5
    assert (metrics["peak_allocated_bytes"] > 0).all()
    assert (metrics["peak_reserved_bytes"] >= metrics["peak_allocated_bytes"]).all()
    assert metrics["peak_rss_bytes"].isna().all()
    assert set(metrics["device"]) == {"NVIDIA Pretended 100"}


def the_study_measured_allocated_memory_and_copies(made: OnCard) -> None:
    study = pd.read_csv(made.store / "report" / "scaling.tsv", sep="\t")
    measured = study[study["status"] == "ok"]
    assert set(study["precision"]) == {"float16", "float32", "bfloat16"}
    assert set(study["memory_measure"]) == {"allocated"}
    assert set(study["device_bytes"]) == {1 << 30}
    ours = measured[(measured["engine"] == "lengthwise") & ~measured["gradients"]]
    assert (ours[["copy_in_ms", "copy_out_ms", "peak_bytes"]] > 0).all(axis=None)
    assert measured.loc[measured["engine"] != "lengthwise", ["copy_in_ms", "copy_out_ms"]].isna().all(axis=None)
    # Packed, the memory of a protein is linear in its length.
    alone = ours[ours["batch_tokens"].isna() & (ours["precision"] == "float16")]
    per_token = alone["peak_bytes"] / alone["n_tokens"]
    assert per_token.max() < 1.3 * per_token.min()


def the_page_shows_the_cards_memory_and_plain_numbers(made: OnCard) -> None:
    page = (made.store / "report" / "index.html").read_text()
    assert "NVIDIA Pretended 100" in page
    assert "allocated" in page
    assert figures.NO_COPIES not in page
    drawn = list((made.store / "report").glob("*.svg"))
    assert made.store / "report" / "copies.svg" in drawn
    assert [path.name for path in drawn if r"\times10" in path.read_text()] == []


def test_a_cpu_build_under_any_version_is_one_line_before_any_job(tmp_path):
    """conda's have no +cpu."""
    project = OnCard.with_tiny_model(tmp_path, Card(cuda=None), local="", a=[b"MKV"])
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", device="cuda")
    run = project.snakemake()
    assert run.code != 0
    assert run.errors == [
        "lengthwise: error: device: cuda, but torch 2.13.0 is a CPU build; docs/install.md says how to install another"
    ]
    assert "rule ingest" not in run.output
    assert "Traceback" not in run.output
