"""The scaling study on a pretended card that does not hold what fair-esm needs."""

import pytest
from order import CONTEXT_BYTES
from pretend import Card
from rehearsal import pretended

from lengthwise.esm2.shapes import ModelConfig
from lengthwise.report.study import measure, rounds
from lengthwise.report.study.schema import FAIR_ESM, LENGTHWISE, OK, OUT_OF_MEMORY


@pytest.fixture(scope="module")
def study(tiny_checkpoint, tmp_path_factory):
    table = tmp_path_factory.mktemp("study") / "scaling.tsv"
    with pytest.MonkeyPatch.context() as patch, pretended(Card(total_bytes=CONTEXT_BYTES + (9 << 20))) as device:
        patch.setitem(measure.LENGTHS, "cuda", (50, 200, 800))
        patch.setitem(measure.BATCH_TOKENS, "cuda", (1_700,))
        patch.setattr(rounds, "MAX_REPEATS", 2)
        frame = measure.scaling(tiny_checkpoint, "cuda", "float16", table, seconds=100)
        assert device.live_bytes == 0
    return frame


def test_a_series_ends_where_memory_ends_and_the_others_go_on(study):
    ended = study[study["status"] == OUT_OF_MEMORY]
    assert set(ended["engine"]) == {FAIR_ESM}
    assert set(ended["precision"]) == {"float32", "float16", "bfloat16"}
    ours = study[study["engine"] == LENGTHWISE]
    assert (ours["status"] == OK).all()
    assert len(ours) == 3 * 3 + 3 * 3 + 3  # lengths by precisions: alone, full batches; alone with gradients


def test_memory_of_a_packed_pass_is_linear_in_its_tokens(study):
    ours = study[(study["engine"] == LENGTHWISE) & ~study["gradients"]]
    for precision, rows in ours.groupby("precision"):
        per_token = rows["peak_bytes"] / rows["n_tokens"]
        assert per_token.max() < 1.2 * per_token.min(), precision
    formula = ModelConfig(2, 32, 2).bytes_per_token(2)
    assert (ours.loc[ours["precision"] == "float16", "peak_bytes"] / ours["n_tokens"]).max() < 1.1 * formula
