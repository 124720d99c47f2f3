"""Laws: what the scaling study's measurements follow, fitted, with what is left over.

Memory of a pass beside the weights: fixed + a tokens, and + b N (L + 2)^2 where every residue's score against every other is
written out. Time of a pass: fixed + p product operations + q attention operations.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lengthwise.esm2.config import MEMORY_MARGIN, MODELS, ModelConfig
from lengthwise.report.study.schema import FAIR_ESM

CARDS_GB = (16, 24, 40, 80)

# Growth of resident memory below this says more of what malloc rounds and keeps than of a pass.
RESIDENT_GRAIN = 4_000_000

# Largest over smallest batch of the points: batches that are all alike tell a fixed part from a growing one by noise alone.
SPREAD = 4

# A law with fewer points, or that explains less of them, is not read at lengths that were not measured.
LEAST_POINTS, LEAST_R_SQUARED = 5, 0.95

# A length that changes by more than this factor if one point is left out says more of that point.
STEADY = 1.5

KEYS = ["engine", "precision", "gradients"]

UNITS = {
    "tokens": "bytes per token",
    "squares": "bytes per pair of a sequence's tokens",
    "products": "s per FLOP",
    "attention": "s per FLOP",
}


@dataclass(frozen=True)
class Fit:
    """A sum of terms, each a coefficient times what it is of."""

    quantity: str  # memory (bytes beside the weights) or time (seconds)
    engine: str
    precision: str
    gradients: bool
    coefficients: dict[str, float]
    r_squared: float
    largest_residual: float  # of a point, as a share of its measurement
    n_points: int
    up_to: int  # residues of its longest point
    without_one: tuple[dict[str, float], ...] = ()  # of time: the coefficients with each point left out in turn

    @property
    def determined(self) -> bool:
        """Whether the points say enough to read the law: they are many, they lie on it, and every growing term was seen."""
        seen = all(value for term, value in self.coefficients.items() if term != "fixed")
        return seen and self.n_points >= LEAST_POINTS and self.r_squared >= LEAST_R_SQUARED

    def at(self, config: ModelConfig, length: int, n: int = 1) -> float:
        """What the law says of a batch of n sequences."""
        tokens, attention = n * (length + 2), n * config.attention_flops(length)
        of = {"fixed": 1, "tokens": tokens, "squares": tokens * (length + 2), "attention": attention}
        of["products"] = n * config.flops(length) - attention
        return sum(value * of[term] for term, value in self.coefficients.items())


def fit_all(study: pd.DataFrame) -> list[Fit]:
    """The laws of a study, for each engine, precision and mode that has points enough."""
    found = []
    for (engine, precision, gradients), rows in study.groupby(KEYS, sort=False):
        least = np.where(rows["memory_measure"].fillna("") == "resident", RESIDENT_GRAIN, 0)
        sized = rows[rows["peak_bytes"] > least]
        timed = rows[rows["wall_ms"].notna() & rows["product_flops"].notna()]
        tokens = sized["n_tokens"].to_numpy(float)
        terms = {"fixed": np.ones(len(sized)), "tokens": tokens}
        if engine == FAIR_ESM:
            terms["squares"] = tokens * (sized["length"].to_numpy(float) + 2)
        fits = {"memory": (sized, terms, sized["peak_bytes"].to_numpy(float))}
        if not gradients:  # with them, time is of the forward pass alone, which nobody wants by itself
            terms = {
                "fixed": np.ones(len(timed)),
                "products": timed["product_flops"].to_numpy(float),
                "attention": timed["attention_flops"].to_numpy(float),
            }
            fits["time"] = (timed, terms, timed["wall_ms"].to_numpy(float) / 1000)
        for quantity, (points, terms, values) in fits.items():
            growing = list(terms.values())[1]
            if len(values) > len(terms) and growing.max() >= SPREAD * growing.min():
                up_to = int(points["length"].max())
                law = Fit(quantity, engine, precision, gradients, *fit(terms, values), len(values), up_to)
                found.append(replace(law, without_one=_without_one(terms, values)) if quantity == "time" else law)
    return found


def _without_one(terms: dict[str, np.ndarray], values: np.ndarray) -> tuple[dict[str, float], ...]:
    """The coefficients of `fit` with each point left out in turn."""
    left = [np.arange(len(values)) != i for i in range(len(values))]
    return tuple(fit({name: column[kept] for name, column in terms.items()}, values[kept])[0] for kept in left)


def fit(terms: dict[str, np.ndarray], values: np.ndarray) -> tuple[dict[str, float], float, float]:
    """Least squares of the relative residuals, so that short sequences count as long ones do; no coefficient is negative.

    Parameters
    ----------
    terms
        {name: [n]}.
    values
        [n], positive.

    Returns
    -------
    (coefficients, R2, largest)
        A term that would be negative is 0. R2 is of the values as they are; `largest` is the largest relative residual.
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


def crossing(law: Fit, config: ModelConfig) -> tuple[float, float, float] | None:
    """The length where attention takes as long as the products, by a law of time, and the range of it.

    The range is what leaving out any one point makes of it. None where the law is not determined, or one point decides more
    than a factor of `STEADY`.
    """
    laws_of_all = [law.coefficients, *law.without_one]
    if not law.determined or not all(c["attention"] for c in laws_of_all):
        return None
    at = [6 * config.embed_dim * c["products"] / c["attention"] - 2 for c in laws_of_all]
    return (at[0], min(at), max(at)) if max(at) <= STEADY * min(at) else None


def longest(law: Fit, free_bytes: float) -> int | None:
    """Residues of the longest sequence whose pass fits into so much memory, by a law of memory; None if not determined."""
    if not law.determined:
        return None
    squares, tokens = law.coefficients.get("squares", 0.0), law.coefficients["tokens"]
    left = free_bytes - law.coefficients["fixed"]
    if squares:
        return max(0, int((-tokens + (tokens**2 + 4 * squares * left) ** 0.5) / (2 * squares)) - 2)
    return max(0, int(left / tokens) - 2)


def longest_by_formula(config: ModelConfig, device_bytes: float, itemsize: int) -> int:
    """Residues of the longest sequence that the packed engine takes on a device; 0 where its weights alone do not fit."""
    stored = 2 * config.embed_dim  # its rows in float16
    free = MEMORY_MARGIN * device_bytes - config.parameters * itemsize
    return max(0, int(free / config.bytes_per_token(itemsize, stored)) - 2)


def longest_table(device_bytes: int | None, itemsize: int) -> pd.DataFrame:
    """`longest_by_formula` of every model on usual sizes of cards and, as `this device`, on the one of the study."""
    sizes = {f"{size} GB": size * 1e9 for size in CARDS_GB}
    if device_bytes is not None:
        sizes = {"this device": device_bytes} | sizes
    rows = {
        model: {name: longest_by_formula(config, size, itemsize) for name, size in sizes.items()}
        for model, config in MODELS.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model").reset_index()


def as_table(found: list[Fit]) -> pd.DataFrame:
    """The laws, one row for each term."""
    rows = [
        {
            "quantity": law.quantity,
            "engine": law.engine,
            "precision": law.precision,
            "gradients": law.gradients,
            "term": term,
            "coefficient": value,
            "unit": UNITS.get(term) or ("bytes" if law.quantity == "memory" else "s"),
            "r_squared": law.r_squared,
            "largest_relative_residual": law.largest_residual,
            "n_points": law.n_points,
        }
        for law in found
        for term, value in law.coefficients.items()
    ]
    columns = ["quantity", *KEYS, "term", "coefficient", "unit", "r_squared", "largest_relative_residual", "n_points"]
    return pd.DataFrame(rows, columns=columns)


def choose(found: list[Fit], quantity: str, engine: str, precision: str, gradients: bool = False) -> Fit | None:
    """The law of these, or None."""
    wanted = (quantity, engine, precision, gradients)
    return next((law for law in found if (law.quantity, law.engine, law.precision, law.gradients) == wanted), None)
