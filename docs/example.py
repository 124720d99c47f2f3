"""A worked example: from a FASTA file to a figure and a table. docs/example.md explains it.

Two questions, each asked of embeddings and of something simpler: which group does a protein belong to (scikit-learn on
the mean vectors), and is a residue in a hydrophobic stretch (a small torch head on the rows)? Every score is of proteins
that were not trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GroupKFold, RepeatedStratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lengthwise

ROOT = Path(__file__).resolve().parents[1]
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
# Kyte and Doolittle 1982, in the order above: https://doi.org/10.1016/0022-2836(82)90515-0
# fmt: off
HYDROPATHY = [
    1.8, 2.5, -3.5, -3.5, 2.8, -0.4, -3.2, 4.5, -3.9, 3.8,
    1.9, -3.5, -1.6, -3.5, -4.5, -0.8, -0.7, 4.2, -0.9, -1.3,
]
# fmt: on
WINDOW = 9  # residues; they used 7 to 11
FOLDS = 5
MIN_MEMBERS = 2 * FOLDS  # of a group: two in each fold
EPOCHS = 5
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito's, for the colour-blind


def main(folder: Path, fasta: Path, labels: Path, model_name: str) -> None:
    """Write example.png and example.tsv to a folder."""
    model = lengthwise.load(model_name)
    proteins = model.embed(fasta, outputs=["residue", "mean"])
    groups = read_labels(labels).reindex([p.id for p in proteins]).to_numpy()

    one_hot = [identities(p.sequence) for p in proteins]  # (L, 20) each
    means = np.stack([p.mean for p in proteins])  # (N, D)
    compositions = np.stack([rows.mean(axis=0) for rows in one_hot])  # (N, 20)
    truth = [hydrophobic(rows) for rows in one_hot]  # (L,) each
    by_mean, by_composition = score_groups(means, groups), score_groups(compositions, groups)
    by_head = predict_residues([p.residue for p in proteins], truth)
    by_identity = predict_residues(one_hot, truth)

    table = pd.DataFrame(
        [
            ("group of a protein", "mean vector", *by_mean),
            ("group of a protein", "amino acid composition", *by_composition),
            ("hydrophobic stretch", "row of the residue", *score_residues(truth, by_head)),
            ("hydrophobic stretch", "identity of the residue", *score_residues(truth, by_identity)),
        ],
        columns=["question", "features", "measure", "chance", "score", "n"],
    )
    notice = model_name
    if model.random_weights:
        notice += ": RANDOM WEIGHTS, so the scores say nothing about ESM-2"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "example.tsv").write_text(f"# {notice}\n" + table.to_csv(sep="\t", index=False, float_format="%.3f"))
    draw(notice, proteins, means, groups, truth, by_head, by_identity).savefig(folder / "example.png", dpi=110)
    print(notice, table.round(3).to_string(index=False), f"{folder}/example.png, {folder}/example.tsv", sep="\n")


def read_labels(path: Path) -> pd.Series:
    """Each protein's group, by its id."""
    table = pd.read_csv(path, sep="\t", dtype=str)
    if not {"id", "group"} <= {*table} or table["id"].duplicated().any():
        raise SystemExit(f"{path}: not a tab-separated table with columns id and group, and a line for each id")
    return table.set_index("id")["group"]


def identities(sequence: str) -> np.ndarray:
    """Each residue's amino acid [L, 20] float32; zeros where it is another letter."""
    letters = np.frombuffer(sequence.encode(), np.uint8)
    return (letters[:, None] == np.frombuffer(AMINO_ACIDS.encode(), np.uint8)).astype(np.float32)


def hydrophobic(one_hot: np.ndarray) -> np.ndarray:
    """Whether the mean hydropathy of the window around each residue is above zero [L] bool; the ends have shorter windows."""
    sums = np.convolve(one_hot @ np.array(HYDROPATHY), np.ones(WINDOW))  # [L + WINDOW - 1]
    return sums[WINDOW // 2 :][: len(one_hot)].round(3) > 0  # a sum of tenths: zero is zero


def score_groups(vectors: np.ndarray, groups: np.ndarray) -> tuple:
    """Cross-validated balanced accuracy of logistic regression, over the groups with enough proteins."""
    counts = pd.Series(groups).value_counts()
    large = counts.index[counts >= MIN_MEMBERS]
    if len(large) < 2:
        raise SystemExit(f"fewer than two groups have {MIN_MEMBERS} proteins of the FASTA file; label more proteins")
    chosen = np.isin(groups.astype(str), large)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    folds = RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=5, random_state=0)
    scores = cross_val_score(classifier, vectors[chosen], groups[chosen], cv=folds, scoring="balanced_accuracy")
    return "balanced accuracy", 1 / len(large), scores.mean(), f"{chosen.sum()} proteins"


def predict_residues(rows: list[np.ndarray], truth: list[np.ndarray]) -> list[np.ndarray]:
    """Each residue's probability [L] by a head that was trained on other proteins."""
    lengths = [len(one) for one in rows]
    x, y = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(truth)).float()
    protein = np.repeat(np.arange(len(rows)), lengths)
    found = torch.empty(len(y))
    for train, test in GroupKFold(FOLDS).split(x, groups=protein):
        mean, std = x[train].mean(0), x[train].std(0) + 1e-6
        head = train_head((x[train] - mean) / std, y[train])
        with torch.no_grad():
            found[test] = head((x[test] - mean) / std).squeeze(1).sigmoid()
    return np.split(found.numpy(), np.cumsum(lengths)[:-1])


def train_head(x: torch.Tensor, y: torch.Tensor) -> torch.nn.Module:
    """A small head, trained on rows [R, D] and their labels [R]."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3, weight_decay=0.01)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(1024):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(head(x[batch]).squeeze(1), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def score_residues(truth: list[np.ndarray], found: list[np.ndarray]) -> tuple:
    """The area under the ROC curve over all residues."""
    residues = np.concatenate(truth)
    return "area under the ROC curve", 0.5, roc_auc_score(residues, np.concatenate(found)), f"{len(residues)} residues"


def draw(notice, proteins, means, groups, truth, by_head, by_identity) -> Figure:
    """A map of the proteins, the heads' ROC curves, and the head's probabilities along one protein."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    figure.suptitle(notice, fontsize=11)
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 2])

    axes = figure.add_subplot(grid[0, 0], title="Proteins: mean vectors", xlabel="PC 1", ylabel="PC 2")
    points = PCA(2, random_state=0).fit_transform(StandardScaler().fit_transform(means))
    names = pd.Series(groups).fillna("no label")
    for i, (name, count) in enumerate(names.value_counts().items()):
        own, colour = (names == name).to_numpy(), COLOURS[i % len(COLOURS)]
        axes.scatter(*points[own].T, s=18, color=colour, alpha=0.8, label=f"{name} ({count})")
    axes.legend(fontsize=8)

    axes = figure.add_subplot(grid[0, 1], title="Residues: hydrophobic stretch", xlabel="false positive rate")
    axes.set(ylabel="true positive rate", aspect="equal")
    residues = np.concatenate(truth)
    for found, name, colour in ((by_head, "row", COLOURS[0]), (by_identity, "identity", COLOURS[1])):
        false, true, _ = roc_curve(residues, np.concatenate(found))
        area = roc_auc_score(residues, np.concatenate(found))
        axes.plot(false, true, color=colour, label=f"{name} of the residue: {area:.2f}")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="chance: 0.50")
    axes.legend(fontsize=8, loc="lower right")

    lengths = np.array([len(p.sequence) for p in proteins])
    shown = int(np.argmin(np.abs(lengths - np.median(lengths))))
    axes = figure.add_subplot(grid[1, :], xlabel="residue", ylabel="probability")
    axes.set_title(f"{proteins[shown].id}, which the head has not seen", loc="left")
    axes.set(ylim=(0, 1), xlim=(0.5, lengths[shown] + 0.5))
    positions = np.arange(1, lengths[shown] + 1)
    axes.fill_between(positions, truth[shown], step="mid", color="0.88", label="hydrophobic stretch")
    axes.plot(positions, by_head[shown], color=COLOURS[0], linewidth=1.2, label="head on rows")
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where example.png and example.tsv are written")
    parser.add_argument("--fasta", type=Path, default=ROOT / "config" / "example.fasta")
    parser.add_argument(
        "--labels", type=Path, default=ROOT / "docs" / "example_labels.tsv", help="a table with columns id and group"
    )
    parser.add_argument("--model", default="demo", help="esm2_t33_650M_UR50D for real weights")
    options = parser.parse_args()
    try:
        main(options.folder, options.fasta, options.labels, options.model)
    except (lengthwise.LengthwiseError, OSError) as error:
        raise SystemExit(str(error)) from error
