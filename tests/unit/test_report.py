import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from lengthwise import report
from lengthwise.errors import LengthwiseError
from lengthwise.metrics import write_metrics
from lengthwise.plan import JOBS_COLUMNS
from lengthwise.scaling_table import COLUMNS
from lengthwise.settings import fingerprint
from lengthwise.store import commit_path, metrics_path

SETTINGS = {
    "model": "demo",
    "weights_sha256": "a" * 64,
    "layers": [6],
    "precision": "float32",
    "storage_dtype": "float16",
    "outputs": ["residue", "mean"],
    "random_weights": False,
}
CPU, GPU = "Some CPU @ 2.00GHz", "Some GPU 80GB"


def batch(shard, number, length, device=CPU, **values):
    n = max(1, 2_000 // length)
    row = {"job": "job0", "shard": shard, "batch": number, "n_sequences": n, "n_residues": n * length}
    row |= {"n_tokens": n * (length + 2), "min_length": length, "mean_length": float(length), "max_length": length}
    row |= {
        "wall_ms": 100.0 + length / 10,
        "device_ms": 90.0,
        "oom_splits": 0,
        "device": device,
        "precision": "float32",
    }
    memory = {"peak_rss_bytes": 500_000_000} if device == CPU else {"peak_allocated_bytes": 9_000_000_000}
    return row | memory | values


def batches_of(shard, n, device=CPU, **values):
    lengths = np.linspace(30, 1800, n).astype(int).tolist()
    return [batch(shard, i, length, device, **values) for i, length in enumerate(lengths)]


def study(peaks=True):
    rows = []
    for engine in ("lengthwise", "fair-esm"):
        for gradients, n in ((False, 1), (True, 1), (False, 4)):
            for length in (50, 500, 1000):
                peak = 1000 * length**2 * (1 + gradients) if peaks else None
                status, wall = ("ok", 10.0 * length) if length < 1000 or n == 1 else ("out_of_memory", None)
                row = [engine, gradients, length, n, n * (length + 2), 3, wall, wall and n * length / wall * 1000]
                rows.append([*row, peak if wall else None, "resident" if peaks else None, CPU, "float32", status])
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


class Store:
    """A small store on disk; `summarize` reports it."""

    def __init__(self, folder):
        self.folder, self.jobs, self.datasets, self.settings = folder, [], {}, dict(SETTINGS)
        self.study = study()

    def job(self, shards, made=None, device=CPU):
        name = f"job{len(self.jobs)}"
        for shard, rows in shards.items():
            if rows is not None:
                metrics_path(self.folder, shard).parent.mkdir(parents=True, exist_ok=True)
                write_metrics(metrics_path(self.folder, shard), rows)
        commit = {"job": name, "shards": list(shards), "made": list(shards) if made is None else made}
        commit |= {"sequences": 10, "residues": 1234, "device": device, "precision": "float32", "threads": 1}
        commit |= {"versions": {"torch": "2.0", "cuda": None}, "load_seconds": 0.5, "embed_seconds": 2.0}
        commit_path(self.folder, name).parent.mkdir(exist_ok=True)
        commit_path(self.folder, name).write_text(json.dumps(commit))
        self.jobs.append([name, "a", len(shards), 10, 1234, 1, 1.0])
        return self

    def dataset(self, name, accepted=8, duplicate=1, rejected=2, records=11, **values):
        manifest = {
            "dataset": name,
            "records": records,
            "accepted": accepted,
            "duplicate": duplicate,
            "rejected": rejected,
        }
        manifest |= {"reasons": {"empty": rejected} if rejected else {}, "residues": 1234, "input": f"in/{name}.fasta"}
        manifest |= {"created": "2026-01-02T03:04:05+00:00", "random_weights": False, "model": "demo", "settings": {}}
        path = self.folder / f"manifest{len(self.datasets)}.json"
        path.write_text(json.dumps(manifest | values))
        self.datasets[name] = path
        return self

    def summarize(self):
        complete = {"schema": 1, "numerics": 1, **self.settings}
        complete["fingerprint"] = fingerprint(complete)
        (self.folder / "settings.json").write_text(json.dumps(complete))
        jobs, scaling = self.folder / "jobs.tsv", self.folder / "report" / "scaling.tsv"
        pd.DataFrame(self.jobs, columns=JOBS_COLUMNS).to_csv(jobs, sep="\t", index=False)
        scaling.parent.mkdir(exist_ok=True)
        self.study.to_csv(scaling, sep="\t", index=False)
        facts = report.summarize(self.folder, jobs, self.datasets, scaling, self.folder / "report")
        return facts, (self.folder / "report" / "index.html").read_text()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


class Page(HTMLParser):
    """What a page says and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.words = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_headline_states_the_facts(store):
    facts, page = store.job({"s0": batches_of("s0", 40)}).dataset("a").dataset("b").summarize()
    rows = batches_of("s0", 40)
    rate = sum(row["n_residues"] for row in rows) / sum(row["wall_ms"] for row in rows) * 1000
    assert (facts["records"], facts["accepted"], facts["duplicate"], facts["rejected"]) == (22, 16, 2, 4)
    assert (facts["sequences"], facts["residues"], facts["batches"], facts["missing_metrics"]) == (10, 1234, 40, 0)
    (only,) = facts["rates"]
    assert only["residues_per_second"] == pytest.approx(rate)
    text = Page(page).text
    assert "22 records of 2 datasets, every one accounted for" in text
    assert f"{rate:,.0f} residues per second on {CPU} in float32" in text
    assert "RANDOM WEIGHTS" not in text


def test_random_weights_are_announced(store):
    store.settings["random_weights"] = True
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    assert "RANDOM WEIGHTS. The embeddings mean nothing; timings are real." in Page(page).text


def test_records_that_do_not_add_up_raise_an_alarm(store):
    facts, page = store.job({"s0": batches_of("s0", 4)}).dataset("a", records=15).summarize()
    assert not facts["accounted"]
    assert "does not add up" in Page(page).text
    assert "4 unaccounted for" in Page(page).text


def test_every_file_is_written_and_is_what_it_says(store):
    store.job({"s0": batches_of("s0", 40)}).dataset("a").summarize()
    out = store.folder / "report"
    for name in report.FIGURES:
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
        assert (out / f"{name}.svg").stat().st_size > 10_000
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(out / "metrics.tsv", sep="\t")) == 40
    bins = pd.read_csv(out / "by_length.tsv", sep="\t")
    assert bins["n_batches"].sum() == 40
    assert (bins["residues_per_second_q25"] <= bins["residues_per_second_median"]).all()
    assert bins["median_length"].between(bins["length_from"], bins["length_to"], inclusive="left").all()


def test_the_same_store_makes_the_same_bytes(store):
    store.job({"s0": batches_of("s0", 40)}).dataset("a").summarize()
    first = {path.name: path.read_bytes() for path in (store.folder / "report").iterdir()}
    store.summarize()
    assert first == {path.name: path.read_bytes() for path in (store.folder / "report").iterdir()}


def test_hostile_names_are_shown_and_not_run(store):
    evil = "<script>alert(1)</script>"
    rows = batches_of("s0", 4, device=CPU)
    for row in rows:
        row["device"] = f'$\\frac${evil}"'
    store.job({"s0": rows}, device=evil).dataset(evil, reasons={evil: 2}, input=f'"><img src=x>{evil}')
    store.settings["model"] = evil
    _, page = store.summarize()
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert evil in parsed.text
    assert pd.read_csv(store.folder / "report" / "metrics.tsv", sep="\t")["device"].iloc[0] == rows[0]["device"]


def test_the_page_loads_nothing_from_elsewhere(store):
    _, page = store.job({"s0": batches_of("s0", 40)}).dataset("a").summarize()
    for reference in Page(page).loads:
        assert reference.startswith("#") or (store.folder / "report" / reference).is_file()
    assert not re.search(r"@import|url\((?!#)", page)


def test_two_devices_keep_their_own_rates_and_measures(store):
    shards = {"s0": batches_of("s0", 20), "s1": batches_of("s1", 30, device=GPU)}
    facts, page = store.job(shards).dataset("a").summarize()
    assert [(rate["device"], rate["batches"]) for rate in facts["rates"]] == [(CPU, 20), (GPU, 30)]
    text = Page(page).text
    assert "allocated GPU memory or resident memory" in text
    bins = pd.read_csv(store.folder / "report" / "by_length.tsv", sep="\t")
    assert bins.groupby("memory_measure")["n_batches"].sum().to_dict() == {"resident": 20, "allocated": 30}
    assert set(bins.loc[bins["device"] == GPU, "peak_bytes_median"]) == {9e9}


def test_memory_that_was_not_measured_is_said_and_not_drawn(store):
    store.study = study(peaks=False)
    _, page = store.job({"s0": batches_of("s0", 9, peak_rss_bytes=None)}).dataset("a").summarize()
    text = Page(page).text
    assert "was not measured, so there is no figure of it" in text
    assert "Memory was not measured in the scaling study" in text
    assert Page(page).tags.count("figure") == 2
    bins = pd.read_csv(store.folder / "report" / "by_length.tsv", sep="\t")
    assert bins["peak_bytes_median"].isna().all()
    assert bins["n_batches"].sum() == 9


def test_a_store_whose_shards_were_all_taken_over_has_a_report(store):
    facts, page = store.job({"s0": None, "s1": None}, made=[]).dataset("a").summarize()
    assert (facts["batches"], facts["missing_metrics"], facts["rates"]) == (0, 2, [])
    text = Page(page).text
    assert "2 of 2 shards have no metrics" in text
    assert "taken over" in text
    for name in report.FIGURES:
        assert (store.folder / "report" / f"{name}.svg").exists()


def test_no_jobs_at_all(store):
    facts, page = store.dataset("a", accepted=0, duplicate=0, rejected=3, records=3).summarize()
    assert (facts["jobs"], facts["batches"], facts["rejected"]) == (0, 0, 3)
    assert "0 jobs" in Page(page).text


def test_a_single_batch_has_a_report(store):
    facts, _ = store.job({"s0": [batch("s0", 0, 300)]}).dataset("a").summarize()
    assert facts["batches"] == 1


def test_a_job_that_made_part_of_its_shards_is_rated_by_that_part(store):
    store.job({"s0": batches_of("s0", 10), "s1": batches_of("s1", 10)}, made=["s1"]).dataset("a")
    _, page = store.summarize()
    made = sum(row["n_residues"] for row in batches_of("s1", 10))
    assert f'<td class="number">{made / 2.0:,.0f}</td>' in page


def test_where_the_study_ended_is_said_with_the_reason(store):
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    text = Page(page).text
    assert "fair-esm without gradients, full batches: from 1,000 residues on (out of memory)" in text
    assert "lengthwise, no gradients 2.5 MB 250 MB 100" in text


def test_a_job_without_commit_is_an_error(store):
    store.job({"s0": batches_of("s0", 4)}).dataset("a")
    commit_path(store.folder, "job0").unlink()
    with pytest.raises(LengthwiseError, match="job0"):
        store.summarize()
    assert not (store.folder / "report" / "index.html").exists()


def test_many_batches_stay_a_light_page(store):
    facts, page = store.job({"s0": batches_of("s0", 6_000)}).dataset("a").summarize()
    assert facts["batches"] == 6_000
    assert len(page) < 2_000_000
    assert "A random 2,000 of 6,000 batches are drawn" in Page(page).text
