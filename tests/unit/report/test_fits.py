"""Fits of the scaling study, from measurements that follow known formulas."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lengthwise.esm2.shapes import MODELS, ModelConfig
from lengthwise.report.study import fits
from lengthwise.report.study.measure import COLUMNS, FAIR_ESM, LENGTHWISE

SHAPE = ModelConfig(6, 320, 20)
LENGTHS = (50, 100, 200, 500, 1000, 2000)


def study(noise=0.0):
    """Measurements that follow known formulas: 10 kB a token, 80 bytes a pair, 2 and 5 ns a thousand operations."""
    rng, rows = np.random.default_rng(0), []
    for engine in (LENGTHWISE, FAIR_ESM):
        for n in (1, 8):
            for length in LENGTHS:
                attention = n * SHAPE.attention_flops(length)
                products = n * SHAPE.flops(length) - attention
                tokens = n * (length + 2)
                peak = 1e6 + 1e4 * tokens + (80 * tokens * (length + 2) if engine == FAIR_ESM else 0)
                seconds = 1e-3 + 2e-12 * products + 5e-12 * attention
                row = {"engine": engine, "precision": "float32", "gradients": False, "length": length, "n_sequences": n}
                row |= {
                    "n_tokens": tokens,
                    "product_flops": products,
                    "attention_flops": attention,
                    "repeats": 1,
                    "status": "ok",
                }
                row |= {
                    "wall_ms": 1000 * seconds * rng.lognormal(0, noise),
                    "peak_bytes": round(peak * rng.lognormal(0, noise)),
                }
                rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def test_the_formulas_behind_the_measurements_are_found():
    found = fits.fit_all(study())
    memory = fits.choose(found, "memory", FAIR_ESM, "float32")
    assert memory.coefficients == pytest.approx({"fixed": 1e6, "tokens": 1e4, "squares": 80}, rel=1e-4)
    assert "squares" not in fits.choose(found, "memory", LENGTHWISE, "float32").coefficients
    time = fits.choose(found, "time", LENGTHWISE, "float32")
    assert time.coefficients == pytest.approx({"fixed": 1e-3, "products": 2e-12, "attention": 5e-12}, rel=1e-6)
    assert (time.r_squared, time.n_points) == (pytest.approx(1), 12)
    assert time.largest_residual < 1e-6


def test_noise_shows_in_the_residuals_and_hardly_in_the_coefficients():
    memory = fits.choose(fits.fit_all(study(noise=0.05)), "memory", FAIR_ESM, "float32")
    assert memory.coefficients["squares"] == pytest.approx(80, rel=0.15)
    assert 0.03 < memory.largest_residual < 0.3
    assert 0.9 < memory.r_squared < 1


def test_a_fit_predicts_the_measurements():
    rows, found = study(), fits.fit_all(study())
    row = rows[(rows["engine"] == FAIR_ESM) & (rows["length"] == 500) & (rows["n_sequences"] == 8)].iloc[0]
    assert fits.choose(found, "memory", FAIR_ESM, "float32").at(SHAPE, 500, 8) == pytest.approx(
        row["peak_bytes"], rel=1e-4
    )
    assert fits.choose(found, "time", FAIR_ESM, "float32").at(SHAPE, 500, 8) * 1000 == pytest.approx(
        row["wall_ms"], rel=1e-4
    )


def test_a_term_is_never_negative():
    x = np.array([1.0, 2, 3, 4, 5])
    coefficients, _, largest = fits.least_squares(
        {"fixed": np.ones(5), "tokens": x, "squares": x**2}, 7 * x - 0.2 * x**2 + 0.01
    )
    assert min(coefficients.values()) >= 0
    assert largest > 0
    assert fits.least_squares({"fixed": np.ones(5), "tokens": x}, 3 * x)[0] == pytest.approx(
        {"fixed": 0, "tokens": 3}, abs=1e-9
    )


def test_an_undetermined_fit_is_not_extrapolated():
    good = fits.choose(fits.fit_all(study()), "memory", FAIR_ESM, "float32")
    assert fits.longest(good, 1e9) > 2000
    unseen = good.coefficients | {"squares": 0.0}
    for fault in ({"coefficients": unseen}, {"r_squared": 0.6}, {"r_squared": float("nan")}, {"n_points": 4}):
        assert fits.longest(replace(good, **fault), 1e9) is None
    assert replace(good, coefficients=good.coefficients | {"fixed": 0.0}).determined  # a fixed term of 0 is a result


def test_the_longest_sequence_fits_and_one_more_residue_does_not():
    for engine in (LENGTHWISE, FAIR_ESM):
        fit = fits.choose(fits.fit_all(study()), "memory", engine, "float32")
        length = fits.longest(fit, 1e9)
        assert fit.at(SHAPE, length) <= 1e9 < fit.at(SHAPE, length + 1)


def test_the_longest_by_the_formula_grows_with_the_card_and_weights_are_streamed():
    table = fits.longest_table(8_000_000_000, itemsize=2).set_index("model")
    assert list(table.columns) == ["this device", "16 GB", "24 GB", "40 GB", "80 GB"]
    assert (table.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert (table.diff().iloc[1:] <= 0).all(axis=None)  # a larger model leaves less
    assert table.loc["esm2_t48_15B_UR50D", "16 GB"] > 10_000  # of 30 GB of weights two layers' are there
    length = table.loc["esm2_t33_650M_UR50D", "16 GB"]
    config = MODELS["esm2_t33_650M_UR50D"]
    needed = 2 * 2 * config.parameters / 33 + (length + 2) * config.bytes_per_token(2, 2 * 1280)
    assert needed == pytest.approx(0.9 * 16e9, rel=1e-4)


def test_too_few_points_make_no_fit():
    assert fits.fit_all(study().head(2)) == []
    alike = study()[lambda rows: rows["n_tokens"].between(400, 1100)]  # batches of about the same size
    assert len(alike) > 4
    assert fits.fit_all(alike) == []
    assert fits.as_table([]).empty
