"""The report: its tables, figures and page agree with the metrics, job records and study of a store."""

import json
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.plan.planner import JOBS_COLUMNS
from lengthwise.report import pca, proteins, summarize
from lengthwise.report.map_figure import embedding_map
from lengthwise.report.study.schema import COLUMNS, read_scaling
from lengthwise.report.svg import save
from lengthwise.report.tables import COLUMNS as MEANINGS
from lengthwise.store.layout import layout
from lengthwise.store.metrics import METRICS, write_metrics
from lengthwise.store.paths import QUARANTINE_ENDING, job_record_path, metrics_path, shard_path
from lengthwise.store.receipts import RECEIPT, damaged_by_receipt, read_receipt, reported_datasets
from lengthwise.store.settings import fingerprint
from lengthwise.system.files import facts, read_json

SETTINGS = {
    "model": "demo",
    "weights_sha256": "a" * 64,
    "layers": [6],
    "precision": "float32",
    "storage_dtype": "float16",
    "outputs": ["residue", "mean"],
    "random_weights": False,
    "num_layers": 6,
    "embed_dim": 320,
    "attention_heads": 20,
}
SHAPE = ModelConfig(6, 320, 20)
INDEX = {
    "record_no": "int64",
    "id": "string",
    "length": "int32",
    "digest": "string",
    "status": "string",
    "shard": "string",
}
INDEX["sequence_no"] = "int32"
DIGESTS = pa.schema([(name, "binary" if name == "digest" else kind) for name, kind in INDEX.items()])
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
    """fair-esm runs out of memory at 1,000 residues in full batches; in bfloat16 there is time for one length."""
    rows = []
    for engine, weights in (("lengthwise", 30_000_000), ("fair-esm", 32_000_000)):
        for precision, gradients, n in (
            ("float32", False, 4),
            ("float32", False, 1),
            ("float32", True, 1),
            ("bfloat16", False, 4),
        ):
            for length in (50, 200, 500, 1000):
                attention = SHAPE.attention_flops(length)
                products = SHAPE.flops(length) - attention
                row = {
                    "engine": engine,
                    "precision": precision,
                    "gradients": gradients,
                    "length": length,
                    "n_sequences": n,
                }
                row |= {
                    "batch_tokens": None if n == 1 else 2_000,
                    "n_tokens": n * (length + 2),
                    "weights_bytes": weights,
                }
                row |= {"product_flops": n * products, "attention_flops": n * attention, "device": CPU, "repeats": 3}
                row |= {"device_bytes": 8_000_000_000, "memory_measure": "resident" if peaks else None, "status": "ok"}
                if length == 1000 and n > 1:
                    row |= {"repeats": 0, "status": "out_of_memory"}
                else:
                    wall = 1 + n * (products * 1e-9 + attention * 2e-9)
                    row |= {"wall_ms": wall, "residues_per_second": n * length / wall * 1000}
                    squares = 20 * n * (length + 2) ** 2 if engine == "fair-esm" else 0
                    row["peak_bytes"] = int(15_000 * n * (length + 2) * (1 + gradients) + squares) if peaks else None
                rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


class Store:
    """A small store on disk; `summarize` reports it."""

    def __init__(self, folder):
        self.folder, self.jobs, self.datasets, self.settings = folder, [], {}, dict(SETTINGS)
        self.study = study()  # None: the config leaves it out

    def job(self, shards, made=None, device=CPU, threads=1, batch_tokens=2_048):
        name = f"job{len(self.jobs)}"
        for shard, rows in shards.items():
            if rows is not None:
                metrics_path(self.folder, shard).parent.mkdir(parents=True, exist_ok=True)
                write_metrics(metrics_path(self.folder, shard), rows)
        job_record = {"job": name, "shards": list(shards), "made": list(shards) if made is None else made}
        job_record |= {
            "sequences": 10,
            "residues": 1234,
            "device": device,
            "precision": "float32",
            "threads": threads,
            "batch_tokens": batch_tokens,
        }
        job_record |= {"versions": {"torch": "2.0", "cuda": None}, "load_seconds": 0.5, "embed_seconds": 2.0}
        job_record_path(self.folder, name).parent.mkdir(exist_ok=True)
        job_record_path(self.folder, name).write_text(json.dumps(job_record))
        self.jobs.append({"job": name, "datasets": "a", "shards": len(shards), "sequences": 10, "residues": 1234})
        return self

    def dataset(self, name, accepted=8, duplicate=1, rejected=2, records=11, index=(), **values):
        manifest = {
            "dataset": name,
            "records": records,
            "accepted": accepted,
            "duplicate": duplicate,
            "rejected": rejected,
        }
        manifest |= {"reasons": {"empty": rejected} if rejected else {}, "residues": 1234, "input": f"in/{name}.fasta"}
        manifest |= {"created": "2026-01-02T03:04:05+00:00", "random_weights": False, "model": "demo", "settings": {}}
        path = self.folder / "datasets" / str(len(self.datasets)) / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(manifest | values))
        index = [dict.fromkeys(INDEX) | {"record_no": i, "id": f"P{i}"} | row for i, row in enumerate(index)]
        pq.write_table(pa.Table.from_pylist(index, DIGESTS), path.with_name("index.parquet"))
        self.datasets[name] = path
        return self

    def embeddings(self, n):
        """A shard of means whose first channel grows with the number of the record, and an index of the first dataset."""
        lengths, name = np.arange(n) * 10 + 50, "ab" * 16
        header, tensors = layout(lengths, {"fingerprint": "", **SETTINGS, "outputs": ["mean"]})
        data = np.random.default_rng(0).normal(size=(n, 320)).astype(np.float32)
        data[:, 0] += np.arange(n) * 10
        content = bytearray(max(tensor.start + tensor.nbytes for tensor in tensors.values()))
        start = tensors["mean_6"].start
        content[: len(header)], content[start : start + data.nbytes] = header, data.tobytes()
        start = tensors["offsets"].start
        content[start : start + 8 * (n + 1)] = np.append(0, np.cumsum(lengths)).tobytes()
        path = shard_path(self.folder, name)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        index = {
            "record_no": range(n),
            "id": [f"P{i}" for i in range(n)],
            "length": lengths,
            "digest": [f"{i:024}" for i in range(n)],
        }
        index |= {"status": "accepted", "shard": name, "sequence_no": range(n)}
        manifest = next(iter(self.datasets.values()))
        table = pa.Table.from_pandas(pd.DataFrame(index).astype(INDEX), preserve_index=False)
        pq.write_table(table.cast(DIGESTS), manifest.with_name("index.parquet"))
        return data

    def summarize(self):
        complete = {"schema": 1, "numerics": 1, "device": "cpu", **self.settings}
        complete["fingerprint"] = fingerprint(complete)
        (self.folder / "settings.json").write_text(json.dumps(complete))
        jobs, scaling = self.folder / "jobs.tsv", self.folder / "report" / "scaling.tsv"
        pd.DataFrame(self.jobs, columns=JOBS_COLUMNS).fillna(1).to_csv(jobs, sep="\t", index=False)
        scaling.parent.mkdir(exist_ok=True)
        if self.study is None:
            scaling = None
        else:
            self.study.to_csv(scaling, sep="\t", index=False)
        facts = summarize.summarize(self.folder, jobs, self.datasets, scaling, self.folder / "report")
        return facts, (self.folder / "report" / "index.html").read_text()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store whose figures are made and not written, which takes most of the time."""
    monkeypatch.setattr(summarize, "save", lambda plot, out, name: "<svg></svg>")
    return Store(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store reported as users get it: (store, page)."""
    store = Store(tmp_path_factory.mktemp("whole")).job({"s0": batches_of("s0", 1_600)}).dataset("a")
    store.embeddings(30)
    return store, store.summarize()[1]


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
    assert (facts["held"], facts["batches"], facts["missing_metrics"]) == (10, 40, 0)
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


def test_every_file_is_written_and_is_what_it_says(whole):
    store, _ = whole
    out = store.folder / "report"
    for name in summarize.FIGURES:
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
        assert (out / f"{name}.svg").stat().st_size > 10_000
        if name in ("memory", "copies"):  # of a CPU there is only a sentence
            assert not (out / f"{name}.png").exists()
        else:
            assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(out / "metrics.tsv", sep="\t")) == 1_600
    bins = pd.read_csv(out / "by_length.tsv", sep="\t")
    assert bins["n_batches"].sum() == 1_600
    assert (bins["residues_per_second_q25"] <= bins["residues_per_second_median"]).all()
    assert bins["median_length"].between(bins["length_from"], bins["length_to"], inclusive="left").all()


def test_every_column_of_every_table_is_explained_in_tsv_and_parquet(whole):
    store, _ = whole
    out = store.folder / "report"
    explained = pd.read_csv(out / "columns.tsv", sep="\t").groupby("table")["column"].agg(list)
    written = {
        table: meanings for table, meanings in MEANINGS.items() if table != "windows"
    }  # no protein is in windows
    assert set(explained.index) == set(written)
    for table, meanings in written.items():
        columns = list(pd.read_csv(out / f"{table}.tsv", sep="\t").columns)
        assert sorted(columns) == sorted(meanings) == sorted(explained[table])
        assert list(pd.read_parquet(out / f"{table}.parquet").columns) == columns
    assert {path.stem for path in out.glob("*.parquet")} == set(written)


def test_every_point_of_a_figure_has_a_hover_text(whole):
    _, page = whole
    fast = page[page.index('aria-label="How fast') :]
    said = re.findall("<title>([^<]+)</title>", fast[: fast.index("</figure>")])
    expected = {
        f"{row['n_sequences']} sequence{'s' if row['n_sequences'] > 1 else ''} of {row['mean_length']:,.0f} residues on average: "
        f"{row['n_residues'] / row['wall_ms'] * 1000:,.0f} residues/s"
        for row in batches_of("s0", 1_600)
    }
    points = [text for text in said if "on average" in text]
    assert len(points) == 1_500
    assert set(points) <= expected
    assert len(said) - 1_500 == len(pd.read_csv(whole[0].folder / "report" / "by_length.tsv", sep="\t"))


def test_many_batches_stay_a_light_page(whole):
    _, page = whole
    assert len(page) < 2_000_000
    assert "A random 1,500 of 1,600 batches are drawn" in Page(page).text


def test_the_pages_figures_have_the_pages_colours(whole):
    figures = re.findall("<svg.*?</svg>", whole[1], re.DOTALL)
    assert len(figures) == 9  # no memory of batches and no copies on a CPU
    assert all("var(--ink)" in figure for figure in figures)
    assert not any(re.search("#1b1f24|#000000|fill: #ffffff", figure) for figure in figures)


@pytest.mark.slow
def test_the_same_store_makes_the_same_bytes(whole):
    store, _ = whole
    first = {path.name: path.read_bytes() for path in (store.folder / "report").iterdir()}
    store.summarize()
    assert first == {path.name: path.read_bytes() for path in (store.folder / "report").iterdir()}


def test_the_map_has_the_principal_components_of_the_stored_means(whole, tmp_path):
    store, page = whole
    data = Store(tmp_path).dataset("a").embeddings(30)
    shown = pd.read_parquet(store.folder / "report" / "map.parquet").set_index("id")
    assert len(shown) == 30
    # The first channel is nearly all of the variance: the oracle is the covariance's own eigenvectors.
    values, vectors = np.linalg.eigh(np.cov(data.T.astype(float)))
    expected = (data - data.mean(0)) @ vectors[:, -1]
    found = shown["pc1"].loc[[f"P{i}" for i in range(30)]]
    assert abs(np.corrcoef(found, expected)[0, 1]) == pytest.approx(1, abs=1e-6)
    assert found.std() == pytest.approx(values[-1] ** 0.5, rel=1e-4)
    assert found.is_monotonic_increasing
    assert f"First component ({values[-1] / values.sum():.0%} of the variance)" in Page(page).text


def test_without_umap_the_map_has_two_panels_and_no_coordinates_of_it(whole, monkeypatch):
    monkeypatch.setattr(pca.importlib.util, "find_spec", lambda name: None)
    assert np.isnan(pca.neighbourhoods(np.zeros((40, 3)))).all()


def test_with_umap_the_map_has_two_more_panels_that_keep_clusters_apart_and_are_the_same_in_every_run():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.standard_normal((20, 8)) + 30 * cluster for cluster in (0, 1)])
    near = pca.neighbourhoods(vectors.astype(np.float32))
    assert np.array_equal(near, pca.neighbourhoods(vectors.astype(np.float32)))
    centres = near[:20].mean(0), near[20:].mean(0)
    spread = max(np.linalg.norm(part - part.mean(0), axis=1).max() for part in (near[:20], near[20:]))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    assert np.isnan(pca.neighbourhoods(vectors[: pca.UMAP_NEIGHBOURS])).all()


def test_coordinates_of_umap_are_drawn_below_the_components(tmp_path):
    records = pd.DataFrame({"dataset": ["a", "b", "a"], "id": ["x", "y", "z"], "length": [10, 20, 30]})
    records = records.assign(pc1=[0.0, 1, 2], pc2=[2.0, 1, 0], umap1=[5.0, 6, 7], umap2=[7.0, 6, 5])
    drawn = save(embedding_map(pca.Projection(records, (0.5, 0.3), "mean")), tmp_path, "map")
    assert drawn.count("UMAP 1") == 2
    without = records.assign(umap1=np.nan, umap2=np.nan)
    assert "UMAP" not in save(embedding_map(pca.Projection(without, (0.5, 0.3), "mean")), tmp_path, "map")


def test_a_map_of_random_weights_is_left_out(store):
    store.settings["random_weights"] = True
    store.job({"s0": batches_of("s0", 4)}).dataset("a").embeddings(30)
    _, page = store.summarize()
    assert "with random weights it would mean nothing" in Page(page).text
    assert "A first look at the embeddings" not in page
    assert pd.read_parquet(store.folder / "report" / "map.parquet").empty


def test_hostile_names_are_shown_and_not_run(store):
    evil = "<script>alert(1)</script>"
    rows = batches_of("s0", 4, device=CPU)
    for row in rows:
        row["device"] = f'$\\frac${evil}"'
    store.job({"s0": rows}, device=evil).dataset(evil, reasons={evil: 2}, input=f'"><img src=x>{evil}')
    store.settings["model"] = evil
    _, page = store.summarize()
    parsed = Page(page)
    assert "img" not in parsed.tags
    assert parsed.tags.count("script") == 1  # the page's own
    assert evil in parsed.text
    assert pd.read_csv(store.folder / "report" / "metrics.tsv", sep="\t")["device"].iloc[0] == rows[0]["device"]


def test_the_page_loads_nothing_from_elsewhere(whole):
    store, page = whole
    for reference in Page(page).loads:
        assert reference.startswith(("#", "data:image/png;base64,")) or (store.folder / "report" / reference).is_file()
    assert not re.search(r"@import|url\((?!#)|fetch\(|import\(", page)


def test_two_devices_keep_their_own_rates_and_measures(store):
    shards = {"s0": batches_of("s0", 20), "s1": batches_of("s1", 30, device=GPU)}
    facts, _ = store.job(shards).dataset("a").summarize()
    assert [(rate["device"], rate["batches"]) for rate in facts["rates"]] == [(CPU, 20), (GPU, 30)]
    bins = pd.read_csv(store.folder / "report" / "by_length.tsv", sep="\t")
    assert bins.groupby("memory_measure")["n_batches"].sum().to_dict() == {"resident": 20, "allocated": 30}
    assert set(bins.loc[bins["device"] == GPU, "peak_bytes_median"]) == {9e9}


def test_memory_that_was_not_measured_is_a_sentence_instead_of_a_figure(store):
    store.study = study(peaks=False)
    _, page = store.job({"s0": batches_of("s0", 9, peak_rss_bytes=None)}).dataset("a").summarize()
    text = Page(page).text
    assert text.count("This system does not say how much memory a pass takes") == 1
    assert (
        Page(page).tags.count("figure") == 5
    )  # of eleven: two of memory, no_grad, copies, lengths and the map are missing
    bins = pd.read_csv(store.folder / "report" / "by_length.tsv", sep="\t")
    assert bins["peak_bytes_median"].isna().all()
    assert bins["n_batches"].sum() == 9


def test_a_store_whose_shards_have_no_metrics_has_a_report(store):
    facts, page = store.job({"s0": None, "s1": None}, made=[]).dataset("a").summarize()
    assert (facts["batches"], facts["missing_metrics"], facts["rates"]) == (0, 2, [])
    text = Page(page).text
    assert "2 of 2 shards have no metrics" in text
    assert "taken over" in text


@pytest.mark.parametrize("batch_tokens", [None, "auto"])  # auto: from job records of the first version
def test_a_job_that_found_its_shards_made_has_no_fill_of_batches(store, batch_tokens):
    store.job({"s0": batches_of("s0", 10)}).job({"s1": batches_of("s1", 10)}, made=[], batch_tokens=batch_tokens)
    facts, _ = store.dataset("a").summarize()
    assert 0 < facts["fill"] <= 1
    assert facts["batches"] == 20


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


def test_the_page_says_where_the_study_ended_and_why(store):
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    row = "fair-esm, float32, without gradients batches of 2,000 tokens 1,000 out of memory"
    assert row in Page(page).text


def test_captions_answer_their_questions_with_measurements(store):
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    text = Page(page).text
    assert "From 50 to 500 residues Lengthwise goes from 780 kB to 7.53 MB, 10 times as much" in text
    assert "fair-esm goes from 834 kB to 12.6 MB, 15 times as much" in text
    assert "Lengthwise at 500 residues: 7.53 MB instead of 15.1 MB, a factor of 2.0." in text
    assert "float32: weights 30 MB, 30.1 MB of resident memory added by a batch" in text
    assert (
        "cop" not in text[text.index("What does half precision save?") : text.index("Details")]
    )  # a CPU copies nothing
    assert "The lines are fits" in text
    assert "Too few lengths" not in text
    assert pd.read_csv(store.folder / "report" / "scaling.tsv", sep="\t")["copy_out_ms"].isna().all()


def test_a_fit_of_scattered_points_is_not_stated(store, monkeypatch):
    rows = study()
    rows["wall_ms"] *= np.where(np.arange(len(rows)) % 2, 20, 1)
    store.study = rows.assign(memory_measure="allocated")  # of which no point is too small to count
    labels = []
    monkeypatch.setattr(
        summarize, "save", lambda plot, *_: labels.extend(plot.axes.get_legend_handles_labels()[1]) or ""
    )
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    assert re.search("time, Lengthwise, float32 +not determined", Page(page).text)
    assert ("Too few lengths were measured to fit a line." in page) != ("The lines are fits" in page)
    assert not re.search("left out|6 d - 2", page)
    assert labels.count("Lengthwise, fit") == 1  # the fit of memory, which does not scatter


def test_the_fill_of_batches_is_tokens_over_tokens_allowed(store):
    rows = [batch("s0", 0, 300, n_tokens=2_000), batch("s0", 1, 300, n_tokens=500)]
    facts, page = store.job({"s0": rows}).dataset("a").summarize()
    assert facts["fill"] == pytest.approx(2_500 / (2 * 2_048))
    assert "Batches held 61.0 % of the tokens that they may, none of it padding" in Page(page).text


def test_time_is_split_into_computing_waiting_and_the_rest(store):
    busy = {"wall_ms": 100.0, "gpu_busy": 0.7, "device_ms": 70.0, "wait_read_ms": 10.0, "wait_write_ms": 50.0}
    rows = [batch("s0", i, 300, GPU, **busy) for i in range(4)]
    rows += [
        batch("s0", i, 300, device_ms=80.0, wall_ms=100.0, wait_read_ms=5.0, wait_write_ms=0.0) for i in range(4, 8)
    ]
    store.job({"s0": rows}).dataset("a").summarize()
    devices = pd.read_csv(store.folder / "report" / "devices.tsv", sep="\t").set_index("device")
    shares = ["computing", "wait_read", "wait_write", "other"]
    assert devices.loc[GPU, shares].tolist() == pytest.approx([0.7, 0.1, 0.2, 0.0])
    assert devices.loc[CPU, shares].tolist() == pytest.approx([0.8, 0.05, 0.0, 0.15])


def test_a_gpu_that_waits_for_launches_does_not_count_as_computing(store):
    """Batches of earlier versions do not have that wait, and their files no such column."""
    rows = [
        batch("s0", i, 300, GPU, wall_ms=100.0, device_ms=90.0, wait_launch_ms=60.0, gpu_busy=0.3) for i in range(4)
    ]
    store.job({"s0": rows, "s1": batches_of("s1", 4, GPU, wall_ms=100.0, device_ms=90.0, gpu_busy=0.9)})
    earlier = metrics_path(store.folder, "s1")
    pq.write_table(pq.read_table(earlier).drop_columns("wait_launch_ms"), earlier)
    store.dataset("a").summarize()
    devices = pd.read_csv(store.folder / "report" / "devices.tsv", sep="\t").set_index("device")
    assert devices.loc[GPU, ["computing", "other"]].tolist() == pytest.approx([0.6, 0.4])
    batches = pd.read_csv(store.folder / "report" / "metrics.tsv", sep="\t").set_index("shard")
    assert batches.loc["s0", "wait_launch_ms"].tolist() == [60.0] * 4
    assert batches.loc["s1", "wait_launch_ms"].isna().all()


def test_a_cpu_that_computes_on_each_core_is_busy_when_all_of_them_are(store):
    rows = [batch("s0", i, 300, device_ms=90.0, wall_ms=50.0) for i in range(4)]
    store.job({"s0": rows}, threads=2).dataset("a").summarize()
    assert pd.read_csv(store.folder / "report" / "devices.tsv", sep="\t")["computing"][0] == pytest.approx(0.9)


def record(name, length, status="accepted"):
    return {"digest": name.encode(), "length": length, "status": status}


def test_counts_are_of_the_datasets_distinct_sequences_not_of_the_jobs(store):
    """The job holds 10 sequences; the datasets have 3, one of them in both."""
    store.settings["random_weights"] = True  # without a map: the index names no shards
    store.job({"s0": batches_of("s0", 4)})
    store.dataset("a", 2, 1, 0, 3, index=[record("x", 100), record("y", 50), record("x", 100, "duplicate")])
    store.dataset("b", 2, 0, 1, 3, index=[record("y", 50), record("z", 7), record("w", 900, "rejected")])
    facts, page = store.summarize()
    assert (facts["sequences"], facts["residues"], facts["held"]) == (3, 157, 10)
    text = Page(page).text
    assert "157 residues in 3 distinct sequences" in text
    assert (
        "distinct sequences, embedded 3 shared by datasets, embedded once 1 median length, residues 50 longest, residues 100"
        in text
    )
    assert "These jobs hold 10 sequences: some were embedded for other datasets too." in text


def test_digests_that_take_several_passes_are_counted_once(store, monkeypatch):
    monkeypatch.setattr(proteins, "MAX_AT_ONCE", 20)
    names = [f"{number}" for number in range(100)]
    store.settings["random_weights"] = True
    store.job({"s0": batches_of("s0", 4)})
    for name, kept in (("a", names[:60]), ("b", names[40:])):
        store.dataset(name, 60, 0, 0, 60, index=[record(one, 10 + int(one)) for one in kept])
    facts, _ = store.summarize()
    assert (facts["sequences"], facts["residues"]) == (100, sum(10 + number for number in range(100)))


def test_the_distinct_sequences_of_one_dataset_are_its_accepted_records(store):
    store.job({"s0": batches_of("s0", 4)})
    store.dataset("a", 1, 1, 0, 2, index=[record("x", 100), record("x", 100, "duplicate")])
    facts, page = store.summarize()
    assert (facts["sequences"], facts["residues"]) == (1, 100)
    assert "shared by datasets" not in Page(page).text


def test_the_page_opens_with_lengths_what_was_rejected_and_what_is_beyond_the_training_length(store):
    lengths = [30, 1022, 1023, 5000]
    index = [record(f"{length}", length) for length in lengths]
    index += [record("long", 9000, "rejected"), record("none", 0, "rejected"), record("30", 30, "duplicate")]
    policy = {"long_policy": "skip", "max_residues": 8000}
    store.settings["random_weights"] = True  # without a map: the index names no shards
    store.job({"s0": batches_of("s0", 4)}).dataset("old").dataset(
        "a", 4, 1, 2, 7, index=index, reasons={"too_long": 1, "empty": 1}, policy=policy
    )
    facts, page = store.summarize()
    assert facts["beyond_training"] == 2
    text = Page(page).text
    first = text[: text.index("In production")]
    assert "accepted beyond 1,022 residues 2" in first
    assert "truncated 0" in first
    assert "rejected, too_long : longer than long_sequences allows (8000 residues) 1" in first
    assert "rejected, empty : no residues 3" in first
    assert "a in/a.fasta 7 4 1 2 1 too_long 1 empty 2 5,000 1,234" in first
    table = pd.read_csv(store.folder / "report" / "lengths.tsv", sep="\t")
    assert table["records"].sum() == len(index)
    for row in table.itertuples():
        assert row.length_to <= 1023 or row.length_from >= 1023
        inside = [
            one for one in index if row.length_from <= one["length"] < row.length_to and one["status"] == row.status
        ]
        assert row.records == len(inside)


def test_every_bar_of_the_histogram_says_what_it_is(tmp_path):
    index = [record(f"{n}", n) for n in (30, 31, 2000)] + [record("bad", 31, "rejected")]
    store = Store(tmp_path).job({"s0": batches_of("s0", 4)}).dataset("a", index=index)
    store.settings["random_weights"] = True  # without a map: the index names no shards
    _, page = store.summarize()
    shown = page[page.index('aria-label="How long they are') :]
    said = re.findall("<title>([^<]+)</title>", shown[: shown.index("</figure>")])
    assert said == [
        "27 to 31 residues: 2 records embedded",
        "1,720 to 2,045 residues: 1 record embedded",
        "27 to 31 residues: 1 record rejected",
    ]


def test_memory_against_length_is_shown_where_it_is_true(store):
    """Resident memory falls with length on a CPU, because long batches come last and the allocator keeps what it has."""
    _, page = store.job({"s0": batches_of("s0", 9)}).dataset("a").summarize()
    text = Page(page).text
    assert "memory, against length" not in text
    assert text.count("Memory against length is not shown for batches on a CPU") == 1


def test_on_a_gpu_memory_against_length_is_of_what_was_allocated(store, monkeypatch):
    drawn = {}
    monkeypatch.setattr(summarize, "save", lambda plot, out, name: drawn.setdefault(name, plot) and "<svg></svg>")
    _, page = store.job({"s0": batches_of("s0", 9), "s1": batches_of("s1", 9, device=GPU)}).dataset("a").summarize()
    assert "How much allocated GPU memory, against length" in Page(page).text
    assert {line.get_label() for line in drawn["memory"].axes.lines} == {f"{GPU}, float32, median"}


def without(rows, status="skipped_time"):
    """The study where these rows were not measured."""
    found = study()
    chosen = rows(found)
    found.loc[chosen, ["wall_ms", "residues_per_second", "peak_bytes"]] = pd.NA
    found.loc[chosen, "status"] = status
    return found


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (study()[study()["precision"] == "float32"], f"{CPU} has no instructions for half precision."),
        (
            without(lambda rows: rows["precision"] == "bfloat16"),
            "The scaling study had no time for a second precision.",
        ),
        (
            without(lambda rows: rows["precision"] == "bfloat16", "out_of_memory"),
            "The scaling study measured nothing of a second precision: it does not fit into this device's memory.",
        ),
        (
            without(lambda rows: rows["batch_tokens"].isna() & ~rows["gradients"]),
            "The scaling study had no time for the memory of one protein.",
        ),
        (without(lambda rows: rows["gradients"]), "The scaling study had no time for passes with gradients."),
        (study().assign(peak_bytes=0), "The scaling study saw no growth for passes with gradients"),
    ],
)
def test_a_figure_that_is_missing_has_its_own_reason(store, rows, reason):
    store.study = rows
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    text = Page(page).text
    assert reason in text
    assert "or the study had no time" not in text
    assert "was not measured" not in text


def test_what_nobody_looks_at_is_gone(whole):
    store, page = whole
    assert not re.search("lost the most time|padding tokens|fill of batches|How full|Padded to", page)
    assert not (store.folder / "report" / "fill.svg").exists()
    assert "The longest protein, by the formula" in page


def test_a_study_of_an_earlier_version_has_a_report(store):
    new = [
        "batch_tokens",
        "product_flops",
        "attention_flops",
        "wall_ms_median",
        "wall_ms_max",
        "weights_bytes",
        "device_bytes",
    ]
    store.study = store.study.drop(columns=[*new, "copy_in_ms", "copy_out_ms", "clock_mhz", "temperature_c"])
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    assert "From 50 to 500 residues Lengthwise goes from 780 kB to 7.53 MB" in Page(page).text


def test_without_the_study_the_page_says_so_in_one_sentence_and_every_file_is_there(tmp_path):
    store = Store(tmp_path).job({"s0": batches_of("s0", 4)}).dataset("a")
    store.study = None
    _, page = store.summarize()
    text, out = Page(page).text, store.folder / "report"
    assert text.count("The scaling study is off; with scaling: true in the config, the next run measures it.") == 1
    assert not re.search("Controlled runs|Clock|no_grad|scaling.tsv", text)
    assert "The longest protein by the formula" in text
    for reference in Page(page).loads:
        assert reference.startswith(("#", "data:")) or (out / reference).is_file()
    for name in summarize.STUDY_FIGURES:
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
        assert not (out / f"{name}.png").exists()
    for table in ("scaling", "laws"):
        assert pd.read_parquet(out / f"{table}.parquet").empty
    assert list(pd.read_parquet(out / "scaling.parquet").columns) == list(COLUMNS)


def test_a_skipped_study_says_why_once_and_how_to_measure_it(store):
    rows = study().assign(status="skipped_memory", wall_ms=None, residues_per_second=None, peak_bytes=None, repeats=0)
    store.study = rows.assign(needed_bytes=24_100_000_000, free_bytes=9_300_000_000)
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    text = Page(page).text
    reason = "Lengthwise and fair-esm side by side take 24.1 GB, and 9.3 GB were free."
    command = "With more memory, snakemake --forcerun scaling measures it."
    assert text.count(f"The scaling study was skipped: {reason} {command}") == 1
    assert "Controlled runs" not in text


def test_a_point_of_the_study_says_how_far_its_passes_are_apart(tmp_path):
    store, rows = Store(tmp_path), study()
    store.study = rows.assign(wall_ms_max=2 * rows["wall_ms"])
    _, page = store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    row = rows[rows["batch_tokens"].isna() & (rows["length"] == 500)].iloc[0]
    assert f"(the shortest of 3 passes, {row['wall_ms']:,.3g} to {2 * row['wall_ms']:,.3g} ms)" in page


def test_a_study_that_was_measured_outlasts_a_report_without_it(store):
    store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    out = store.folder / "report"
    names = ("scaling.tsv", "scaling.parquet")
    before = {name: (out / name).read_bytes() for name in names}
    store.study = None
    _, page = store.summarize()
    assert "The scaling study is off" in page
    assert {name: (out / name).read_bytes() for name in names} == before


def test_the_receipt_vouches_for_every_file_and_names_the_datasets(whole):
    store, _ = whole
    out = store.folder / "report"
    receipt = read_receipt(out)
    names = {path.name for path in out.iterdir()} - {RECEIPT}
    assert receipt["files"] == {name: facts(out / name) for name in names}
    assert reported_datasets(out) == receipt["datasets"] == ["a"]
    assert damaged_by_receipt(out) == []


def test_damaged_by_receipt_of_a_report_are_named(whole, tmp_path):
    out = Path(shutil.copytree(whole[0].folder / "report", tmp_path / "report"))
    (out / "jobs.tsv").unlink()
    os.truncate(out / "map.svg", 100)
    assert sorted(damaged_by_receipt(out)) == ["jobs.tsv", "map.svg"]
    os.truncate(out / RECEIPT, 100)
    assert (damaged_by_receipt(out), reported_datasets(out)) == ([RECEIPT], None)
    (out / RECEIPT).rename(out / f"{RECEIPT}{QUARANTINE_ENDING}")
    assert damaged_by_receipt(out) == [RECEIPT]
    (out / f"{RECEIPT}{QUARANTINE_ENDING}").unlink()
    assert (damaged_by_receipt(out), reported_datasets(out)) == ([], None)  # of an earlier version


SPOILED_STUDIES = {
    "empty": lambda content: b"",
    "no columns": lambda content: b"\n",
    "cut": lambda content: content[: len(content) // 2],
    "no text": lambda content: b"\xff" + content[1:],
    "another number": lambda content: content[:-40] + content[-40:].replace(b"8", b"7"),
    "another word": lambda content: content.replace(b"fair-esm", b"fair-esn", 1),
}


@pytest.mark.parametrize("spoiled", SPOILED_STUDIES)
def test_a_damaged_study_is_one_line_and_goes_out_of_the_way(store, refused, spoiled):
    store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    scaling = store.folder / "report" / "scaling.tsv"
    content = SPOILED_STUDIES[spoiled](scaling.read_bytes())
    assert content != scaling.read_bytes()
    scaling.write_bytes(content)
    with refused(f"{scaling}: damaged", "in quarantine", "run snakemake again"):
        summarize.summarize(store.folder, store.folder / "jobs.tsv", store.datasets, scaling, scaling.parent)
    assert not scaling.exists()
    assert scaling.with_name(f"scaling.tsv{QUARANTINE_ENDING}").read_bytes() == content
    assert damaged_by_receipt(scaling.parent) == ["scaling.tsv"]


@pytest.mark.parametrize("spoiled", [name for name in SPOILED_STUDIES if name != "another number"])
def test_a_damaged_study_of_an_earlier_version_is_noticed_too(tmp_path, refused, spoiled):
    study().to_csv(tmp_path / "scaling.tsv", sep="\t", index=False)
    (tmp_path / "scaling.tsv").write_bytes(SPOILED_STUDIES[spoiled]((tmp_path / "scaling.tsv").read_bytes()))
    with refused("scaling.tsv: damaged"):
        read_scaling(tmp_path / "scaling.tsv")


@pytest.mark.parametrize("spoiled", SPOILED_STUDIES)
def test_a_damaged_study_is_left_out_where_the_study_is_off(store, caplog, spoiled):
    store.job({"s0": batches_of("s0", 4)}).dataset("a").summarize()
    scaling = store.folder / "report" / "scaling.tsv"
    scaling.write_bytes(SPOILED_STUDIES[spoiled](scaling.read_bytes()))
    store.study = None
    store.summarize()
    assert f"{scaling}: damaged" in caplog.text
    assert pd.read_parquet(scaling.with_suffix(".parquet")).empty
    assert "scaling.tsv" not in read_receipt(scaling.parent)["files"]
    caplog.clear()
    assert damaged_by_receipt(scaling.parent) == []


@pytest.mark.parametrize("record", ["of this version", "of an earlier version"])
@pytest.mark.parametrize("spoil", ["emptied", "cut", "flipped"])
def test_damaged_metrics_count_as_missing(store, caplog, spoil, record):
    store.job({"s0": batches_of("s0", 40), "s1": batches_of("s1", 40)}).dataset("a")
    bad = metrics_path(store.folder, "s1")
    if record == "of this version":
        path = job_record_path(store.folder, "job0")
        expected = {shard: facts(metrics_path(store.folder, shard)) for shard in ("s0", "s1")}
        path.write_text(json.dumps(read_json(path) | {"metrics": expected}))
    content = bytearray(bad.read_bytes())
    content[30] ^= 1  # within a page, which has a checksum of its own
    bad.write_bytes({"emptied": b"", "cut": content[:500], "flipped": content}[spoil])
    found, _ = store.summarize()
    assert (found["batches"], found["missing_metrics"]) == (40, 1)
    assert f"{bad}: damaged" in caplog.text


def test_a_damaged_parity_receipt_is_left_out(store, caplog):
    store.job({"s0": batches_of("s0", 4)}).dataset("a")
    (store.folder / "parity").mkdir()
    (store.folder / "parity" / "cpu.json").write_text("")
    assert "Parity with fair-esm" not in store.summarize()[1]
    assert "cpu.json: damaged" in caplog.text


def test_parity_receipts_are_shown(store):
    store.job({"s0": batches_of("s0", 4)}).dataset("a")
    assert "Parity with fair-esm" not in store.summarize()[1]
    judged = {"tensor": "layer_6", "channel": None, "error": 1e-4, "limit": 4e-4, "share_of_limit": 0.25}
    parity = {"truth": "float64", "compared": [{"digest": "SQ.a", "residues": 70}], "engine": judged, "stored": judged}
    parity |= {"moves": 5.2e-7, "fair_esm_moves": 4e-7, "storage_moves": 2e-4, "not_compared": {}}
    (store.folder / "parity").mkdir()
    receipt = {"device": CPU, "versions": {"torch": "2.0", "cuda": None}, "parity": parity}
    (store.folder / "parity" / "cpu.json").write_text(json.dumps(receipt))
    text = Page(store.summarize()[1]).text
    assert f"{CPU} torch 2.0 1 70 within 25 % 25 % 5.2e-05 % 4e-05 % 0.02 %" in text
    parity |= {
        "miss": "layer_6 is wrong",
        "engine": None,
        "fair_esm_moves": None,
        "not_compared": {"this engine": "no room"},
    }
    (store.folder / "parity" / "cpu.json").write_text(json.dumps(receipt))
    text = Page(store.summarize()[1]).text
    assert "missed: layer_6 is wrong not compared: this engine (no room) not compared 25 %" in text


def test_a_parity_receipt_of_an_earlier_version_is_left_out(store):
    store.job({"s0": batches_of("s0", 4)}).dataset("a")
    (store.folder / "parity").mkdir()
    parity = {"bound": "the bound", "max_error_over_rms": 3e-6, "min_cosine": 0.9999999, "compared": []}
    receipt = {"device": CPU, "versions": {}, "parity": parity}
    (store.folder / "parity" / "cpu.json").write_text(json.dumps(receipt))
    assert "Parity with fair-esm" not in store.summarize()[1]


def test_a_job_without_a_job_record_is_an_error(store):
    store.job({"s0": batches_of("s0", 4)}).dataset("a")
    job_record_path(store.folder, "job0").unlink()
    with pytest.raises(LengthwiseError, match="job0"):
        store.summarize()
    assert not (store.folder / "report" / "index.html").exists()


def reported_at_scale(folder, jobs, with_metrics):
    """A report of jobs, so many with 400 batches each, in a process of its own: (facts, seconds, most bytes, page)."""
    store, rows = Store(folder).dataset("a"), batches_of("", 400, wait_read_ms=1.0, wait_write_ms=1.0)
    template = pa.Table.from_pylist(rows, METRICS)
    for number in range(jobs):
        shard = f"{number:032x}"
        store.job({shard: None})
        if number < with_metrics:
            metrics_path(folder, shard).parent.mkdir(parents=True, exist_ok=True)
            names = {"job": f"job{number}", "shard": shard}
            for column, name in names.items():
                template = template.set_column(template.column_names.index(column), column, pa.array([name] * 400))
            pq.write_table(template, metrics_path(folder, shard))
    store.embeddings(30)
    began = time.perf_counter()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        facts, most_bytes = pool.submit(summarized, store).result()
    return facts, time.perf_counter() - began, most_bytes, (folder / "report" / "index.html").read_text()


def summarized(store):
    facts, _ = store.summarize()
    status = Path("/proc/self/status").read_text()
    return facts, 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # ru_maxrss begins with the parent's


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1_000, 5_000])
def test_thousands_of_jobs_make_a_light_page_in_good_time(tmp_path, jobs):
    facts, seconds, most_bytes, page = reported_at_scale(tmp_path, jobs, 300)
    assert (facts["jobs"], facts["batches"]) == (jobs, 120_000)
    assert seconds < 45  # about 10 on two free cores
    assert most_bytes < 1.2e9
    assert len(page) < 2_000_000
    assert f"The slowest 25 of {jobs:,}" in Page(page).text
    assert page.count("<svg") == 9


@pytest.mark.huge
def test_two_million_batches_make_a_light_page_in_a_minute_and_two_gigabytes(tmp_path):
    facts, seconds, most_bytes, page = reported_at_scale(tmp_path, 5_000, 5_000)
    assert facts["batches"] == 2_000_000
    assert seconds < 60
    assert most_bytes < 2e9
    assert len(page) < 2_000_000
    assert len(pd.read_parquet(tmp_path / "report" / "metrics.parquet", columns=["batch"])) == 2_000_000
