"""The map of embeddings: pooled vectors of a sample of records, on two principal components and by UMAP where it is installed."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from lengthwise.store.paths import shard_path
from lengthwise.store.shard import Shard
from lengthwise.store.windows import Windows

MAX_RECORDS = 2_000
UMAP_NEIGHBOURS = 15
# The first that is stored is used.
POOLED = {
    "mean": "mean over residues",
    "bos": "BOS",
    "max": "maximum over residues",
    "std": "standard deviation over residues",
}


@dataclass(frozen=True)
class Projection:
    """Records with `dataset`, `id`, `length`, `pc1`, `pc2`, `umap1`, `umap2`, and the share of variance of each component."""

    records: pd.DataFrame
    shares: tuple[float, float]
    of: str  # the vectors, in words


def project(store: Path, settings: dict, manifests: dict[str, Path]) -> tuple[Projection | None, str]:
    """Project pooled vectors of a sample; returns (projection, ""), or (None, reason).

    Parameters
    ----------
    store, settings
        The store and its settings.
    manifests
        {dataset: path of its manifest}. The sample has at most `MAX_RECORDS` accepted records, the same in every run.
    """
    if settings["random_weights"]:
        return None, "A map of embeddings is left out: with random weights it would mean nothing."
    pooled = next((output for output in POOLED if output in settings["outputs"]), None)
    if pooled is None:
        return (
            None,
            "A map of embeddings needs pooled vectors: 'outputs' in the config has none of mean, bos, max and std.",
        )
    records = _sample(manifests)
    if len(records) < 3:
        return None, "A map of embeddings needs three sequences at least."
    layer = settings["layers"][0]
    vectors = np.empty((len(records), settings["embed_dim"]), np.float32)
    for dataset, own in records.groupby("dataset"):
        windows = Windows(manifests[dataset].parent)
        rows = windows.find(np.frombuffer(b"".join(own["digest"]), np.uint8).reshape(-1, 24))
        in_windows = own.index[rows >= 0]
        if len(in_windows):
            vectors[in_windows] = windows.pooled(
                f"{pooled}_{layer}", rows[rows >= 0], lambda name: Shard(shard_path(store, name))
            )
            records.loc[in_windows, "shard"] = None
    for name, rows in records.groupby("shard"):
        vectors[rows.index] = Shard(shard_path(store, name))[f"{pooled}_{layer}"][rows["sequence_no"]]
    good = np.isfinite(vectors).all(axis=1)
    components, shares = principal_components(vectors[good].astype(float))
    near = neighbourhoods(vectors[good])
    records = records.loc[good, ["dataset", "id", "length"]].assign(
        pc1=components[:, 0], pc2=components[:, 1], umap1=near[:, 0], umap2=near[:, 1]
    )
    return Projection(records.reset_index(drop=True), shares, f"{POOLED[pooled]}, layer {layer}"), ""


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """[n, D] -> ([n, 2], shares of the variance); signs are such that the largest loading is positive."""
    centred = vectors - vectors.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2] * np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(axis=1)])[:, None]
    shares = sizes[:2] ** 2 / max((sizes**2).sum(), 1e-30)
    return centred @ directions.T, (float(shares[0]), float(shares[1]))


def neighbourhoods(vectors: np.ndarray) -> np.ndarray:
    """[n, D] -> [n, 2] by UMAP (McInnes et al. 2018, arXiv:1802.03426), the same in every run.

    NaN where umap-learn is not installed, or where there are fewer vectors than UMAP looks at around each.
    """
    if len(vectors) <= UMAP_NEIGHBOURS or importlib.util.find_spec("umap") is None:
        return np.full((len(vectors), 2), np.nan)
    import umap  # here: it compiles for many seconds

    return umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, random_state=0, n_jobs=1).fit_transform(vectors)


def _sample(manifests: dict[str, Path]) -> pd.DataFrame:
    """Accepted records in the order of their digests' hashes, so that the order of files does not matter."""
    database = duckdb.connect()
    database.register(
        "datasets",
        pd.DataFrame(
            {"dataset": list(manifests), "path": [str(path.parent / "index.parquet") for path in manifests.values()]}
        ),
    )
    return database.execute(
        "SELECT dataset, id, length, digest, shard, sequence_no FROM read_parquet($paths, filename = 'path')"
        " JOIN datasets USING (path) WHERE status = 'accepted'"
        " ORDER BY hash(digest), dataset, record_no LIMIT $most",
        {"paths": [str(path.parent / "index.parquet") for path in manifests.values()], "most": MAX_RECORDS},
    ).df()
