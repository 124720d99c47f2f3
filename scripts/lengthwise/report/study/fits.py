"""Fits of the scaling study: memory and time of a forward pass as sums of growing terms.

Memory without the weights: fixed + a tokens; for fair-esm, which writes out attention scores, + b N (L + 2)^2.
Time: fixed + p product operations + q attention operations.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lengthwise.esm2.residency import LAYERS_HELD, layer_bytes
from lengthwise.esm2.shapes import MEMORY_MARGIN, MODELS, ModelConfig
from lengthwise.report.study.schema import FAIR_ESM

CARDS_GB = (16, 24, 40, 80)
# Smaller growth of resident memory is noise of malloc, which rounds and keeps memory.
MIN_RESIDENT_BYTES = 4_000_000
# Largest over smallest batch. Batches of similar size cannot tell the fixed term from the growing ones.
MIN_SIZE_RATIO = 4
# A fit with less is not read at lengths that were not measured.
MIN_POINTS, MIN_R_SQUARED = 5, 0.95
KEYS = ["engine", "precision", "gradients"]

UNITS = {
    "tokens": "bytes per token",
    "squares": "bytes per pair of a sequence's tokens",
    "products": "s per FLOP",
    "attention": "s per FLOP",
}


@dataclass(frozen=True)
class Fit:
    """A sum of terms, each a coefficient times a size of the batch (`UNITS`)."""

    quantity: str  # memory (bytes beside the weights) or time (seconds)
    engine: str
    precision: str
    gradients: bool
    coefficients: dict[str, float]
    r_squared: float
    largest_residual: float  # of a measurement, as a share of it
    n_points: int

    @property
    def determined(self) -> bool:
        """Whether the fit can be extrapolated: enough points, close to it, and no growing term at 0."""
        all_terms_seen = all(value for term, value in self.coefficients.items() if term != "fixed")
        return all_terms_seen and self.n_points >= MIN_POINTS and self.r_squared >= MIN_R_SQUARED

    def at(self, config: ModelConfig, length: int, n: int = 1) -> float:
        """Bytes or seconds of a batch of n sequences by the fit."""
        tokens, attention = n * (length + 2), n * config.attention_flops(length)
        sizes = {"fixed": 1, "tokens": tokens, "squares": tokens * (length + 2), "attention": attention}
        sizes["products"] = n * config.flops(length) - attention
        return sum(value * sizes[term] for term, value in self.coefficients.items())


def fit_all(study: pd.DataFrame) -> list[Fit]:
    """Fit each engine, precision and mode that has enough points of different size."""
    found = []
    for (engine, precision, gradients), rows in study.groupby(KEYS, sort=False):
        min_bytes = np.where(rows["memory_measure"].fillna("") == "resident", MIN_RESIDENT_BYTES, 0)
        sized = rows[rows["peak_bytes"] > min_bytes]
        timed = rows[rows["wall_ms"].notna() & rows["product_flops"].notna()]
        tokens = sized["n_tokens"].to_numpy(float)
        terms = {"fixed": np.ones(len(sized)), "tokens": tokens}
        if engine == FAIR_ESM:
            terms["squares"] = tokens * (sized["length"].to_numpy(float) + 2)
        fits = {"memory": (terms, sized["peak_bytes"].to_numpy(float))}
        if not gradients:  # with gradients the forward pass alone tells no useful time
            terms = {
                "fixed": np.ones(len(timed)),
                "products": timed["product_flops"].to_numpy(float),
                "attention": timed["attention_flops"].to_numpy(float),
            }
            fits["time"] = (terms, timed["wall_ms"].to_numpy(float) / 1000)
        for quantity, (terms, values) in fits.items():
            growing = list(terms.values())[1]
            if len(values) > len(terms) and growing.max() >= MIN_SIZE_RATIO * growing.min():
                found.append(Fit(quantity, engine, precision, gradients, *least_squares(terms, values), len(values)))
    return found


def least_squares(terms: dict[str, np.ndarray], values: np.ndarray) -> tuple[dict[str, float], float, float]:
    """Least squares of relative residuals, which give short and long sequences the same weight. No coefficient is negative.

    Parameters
    ----------
    terms
        {name: [n]}.
    values
        [n], positive.

    Returns
    -------
    (coefficients, R2, largest)
        A term that would be negative is 0. R2 is that of absolute values; `largest` is the largest relative residual.
    """
    left = dict(terms)
    while True:
        columns = np.stack(list(left.values()), axis=1)  # [n, terms]
        scale = np.abs(columns).max(axis=0)  # terms differ by many powers of ten
        solved, *_ = np.linalg.lstsq(columns / scale / values[:, None], np.ones(len(values)), rcond=None)
        if (solved >= 0).all() or len(left) == 1:
            break
        del left[list(left)[int(np.argmin(solved * (columns / scale / values[:, None]).max(axis=0)))]]
    coefficients = dict.fromkeys(terms, 0.0) | dict(zip(left, (solved / scale).tolist(), strict=True))
    residuals = values - columns @ (solved / scale)
    spread = ((values - values.mean()) ** 2).sum()
    r_squared = float(1 - (residuals**2).sum() / spread) if spread else float("nan")
    return coefficients, r_squared, float(np.abs(residuals / values).max())


def longest(fit: Fit, free_bytes: float) -> int | None:
    """Residues of the longest sequence whose pass fits into free memory, by a fit of memory; None if not determined."""
    if not fit.determined:
        return None
    squares, tokens = fit.coefficients.get("squares", 0.0), fit.coefficients["tokens"]
    left = free_bytes - fit.coefficients["fixed"]
    if squares:
        return max(0, int((-tokens + (tokens**2 + 4 * squares * left) ** 0.5) / (2 * squares)) - 2)
    return max(0, int(left / tokens) - 2)


def longest_by_formula(config: ModelConfig, device_bytes: float, itemsize: int) -> int:
    """Residues of the longest sequence that the packed engine can embed on a device, its weights streamed."""
    stored = 2 * config.embed_dim  # its rows in float16
    free = MEMORY_MARGIN * device_bytes - LAYERS_HELD["cuda"] * layer_bytes(config, itemsize)
    return max(0, int(free / config.bytes_per_token(itemsize, stored)) - 2)


def longest_table(device_bytes: int | None, itemsize: int) -> pd.DataFrame:
    """`longest_by_formula` of every model on common GPU sizes and on the study's device."""
    sizes = {f"{size} GB": size * 1e9 for size in CARDS_GB}
    if device_bytes is not None:
        sizes = {"this device": device_bytes} | sizes
    rows = {
        model: {name: longest_by_formula(config, size, itemsize) for name, size in sizes.items()}
        for model, config in MODELS.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model").reset_index()


def as_table(found: list[Fit]) -> pd.DataFrame:
    """The table `laws`: one row for each term of each fit."""
    rows = [
        {
            "quantity": fit.quantity,
            "engine": fit.engine,
            "precision": fit.precision,
            "gradients": fit.gradients,
            "term": term,
            "coefficient": value,
            "unit": UNITS.get(term) or ("bytes" if fit.quantity == "memory" else "s"),
            "r_squared": fit.r_squared,
            "largest_relative_residual": fit.largest_residual,
            "n_points": fit.n_points,
        }
        for fit in found
        for term, value in fit.coefficients.items()
    ]
    columns = ["quantity", *KEYS, "term", "coefficient", "unit", "r_squared", "largest_relative_residual", "n_points"]
    return pd.DataFrame(rows, columns=columns)


def choose(found: list[Fit], quantity: str, engine: str, precision: str, gradients: bool = False) -> Fit | None:
    """The fit of a quantity, engine, precision and mode, or None."""
    wanted = (quantity, engine, precision, gradients)
    return next((fit for fit in found if (fit.quantity, fit.engine, fit.precision, fit.gradients) == wanted), None)
