"""Stores with logits and contacts: what they hold, what their settings are, and what is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint, fair_esm_layout
from lengthwise.store.settings import fingerprint
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json

OUTPUTS = ["residue", "std", "logits", "contacts"]


@pytest.fixture(scope="module")
def store(small_store, tiny_with_contact_head, random_proteins):
    made = small_store(tiny_with_contact_head, outputs=OUTPUTS, contacts_max_residues=40)
    made.ingest("a", {**random_proteins(20), "short": "M", "rejected": "M1", "twin": random_proteins(20)["p0"]})
    made.run(shard_bytes=1 << 16)
    return made


def test_a_shard_has_all_outputs_and_is_whole(store):
    for path in store.shard_files():
        shard = Shard(path)
        assert shard.damaged() == []
        assert shard.data_names == ["layer_2", "std_2", "logits", "pseudo_perplexity", "contacts"]
    counts = np.concatenate([np.diff(Shard(path)["contact_offsets"]) for path in store.shard_files()])
    lengths = np.concatenate([np.diff(Shard(path)["offsets"]) for path in store.shard_files()])
    assert counts.tolist() == [length * (length + 1) // 2 if length <= 40 else 0 for length in lengths.tolist()]
    assert 0 in counts


@torch.inference_mode()
def test_records_have_fair_esms_pseudo_perplexity_of_one_pass_without_masks(store, tiny_with_contact_head):
    records = pd.read_parquet(store.path / "datasets" / "a" / "index.parquet").set_index("id")
    fasta = (store.folder / "a.fasta").read_text().split()
    sequences = {name.removeprefix(">"): sequence for name, sequence in zip(fasta[::2], fasta[1::2], strict=True)}
    model = checkpoint.reference_model(tiny_with_contact_head)
    for name, found in records["pseudo_perplexity"].items():
        if name == "rejected":
            assert np.isnan(found)
            continue
        _, _, tokens = model.alphabet.get_batch_converter()([("", sequences[name])])
        likely = model(tokens)["logits"][0, 1:-1].log_softmax(-1).gather(1, tokens[0, 1:-1, None])
        assert found == pytest.approx(float((-likely.mean()).exp()), rel=1e-4)
    assert records["pseudo_perplexity"]["twin"] == records["pseudo_perplexity"]["p0"]


def test_a_store_without_logits_has_the_columns_of_before(small_store, random_proteins):
    made = small_store(outputs=["mean"])
    made.ingest("a", random_proteins(3))
    made.run()
    columns = pd.read_parquet(made.path / "datasets" / "a" / "index.parquet").columns
    assert columns[-3:].tolist() == ["shard", "sequence_no", "row_start"]


def test_the_receipt_compares_logits_and_says_that_contacts_are_left_out(store):
    (receipt,) = [read_json(path)["parity"] for path in (store.path / "parity").glob("*.json")]
    assert set(receipt["not_compared"]) == {"contacts"}
    assert receipt["stored"]["share_of_limit"] < 1


def test_a_wrong_logit_is_a_miss(small_store, tiny_with_contact_head, random_proteins, monkeypatch):
    from lengthwise.esm2.heads import LMHead

    original = LMHead.forward
    monkeypatch.setattr(LMHead, "forward", lambda self, x: original(self, x).roll(1, dims=1))
    made = small_store(tiny_with_contact_head, outputs=["logits"])
    made.ingest("a", random_proteins(5, shortest=20))
    made.plan()
    with pytest.raises(LengthwiseError, match="logits"):
        made.embed_all()


def test_a_store_of_contacts_alone_compares_nothing_and_says_why(small_store, tiny_with_contact_head, random_proteins):
    made = small_store(tiny_with_contact_head, outputs=["contacts"])
    made.ingest("a", random_proteins(5))
    made.plan()
    (job_record,) = made.embed_all()
    assert "contacts" in job_record["parity"]["skipped"]


def test_only_contacts_bring_their_settings_into_the_fingerprint(small_store, tiny_with_contact_head, store):
    assert store.settings["contacts_max_residues"] == 40
    assert len(store.settings["contact_regression_sha256"]) == 64
    assert fingerprint(store.settings | {"contacts_max_residues": 41}) != store.settings["fingerprint"]
    plain = small_store(tiny_with_contact_head, outputs=["mean"], contacts_max_residues=7).settings
    assert "contacts_max_residues" not in plain
    assert "contact_regression_sha256" not in plain


def test_another_limit_and_another_regression_do_not_fit(small_store, store, tiny_with_contact_head, tmp_path, refused):
    with refused("contacts_max_residues is 40 there and 41 in the config"):
        small_store(tiny_with_contact_head, store.folder, outputs=OUTPUTS, contacts_max_residues=41)
    other = tmp_path / "tiny.pt"
    shutil.copy(tiny_with_contact_head, other)
    checkpoint.write_random_regression(
        fair_esm_layout.contact_regression_path(other), checkpoint.read(other)[0], seed=1
    )
    with refused("contact_regression_sha256 is"):
        small_store(other, store.folder, outputs=OUTPUTS, contacts_max_residues=40)


def test_a_regression_replaced_after_the_store_was_made_is_refused_by_the_job(
    small_store, random_proteins, tmp_path, tiny_with_contact_head, refused
):
    own = tmp_path / "tiny.pt"
    shutil.copy(tiny_with_contact_head, own)
    regression, shape = fair_esm_layout.contact_regression_path(own), checkpoint.read(own)[0]
    checkpoint.write_random_regression(regression, shape)
    made = small_store(own, outputs=["contacts"])
    made.ingest("a", random_proteins(3))
    made.plan()
    checkpoint.write_random_regression(regression, shape, seed=1)
    with refused("contact head", str(own)):
        made.embed_all()


def test_outputs_without_their_heads_are_refused_before_anything_is_computed(
    small_store, tiny_checkpoint, tmp_path, refused
):
    with refused("contact_head", "take contacts out of 'outputs'", "tiny-contact-regression.pt beside it"):
        small_store(tiny_checkpoint, outputs=["contacts"])
    data = torch.load(tiny_checkpoint, weights_only=False)
    data["model"] = {name: tensor for name, tensor in data["model"].items() if "lm_head" not in name}
    torch.save(data, tmp_path / "headless.pt")
    with refused("lm_head", "take logits out of 'outputs'"):
        small_store(tmp_path / "headless.pt", outputs=["logits"])


def test_a_regression_with_nan_is_refused_before_anything_is_computed(small_store, tiny_checkpoint, tmp_path, refused):
    own = tmp_path / "tiny.pt"
    shutil.copy(tiny_checkpoint, own)
    weights = {"regression.weight": torch.full((1, 4), torch.nan), "regression.bias": torch.zeros(1)}
    regression = fair_esm_layout.contact_regression_path(own)
    torch.save({"model": {f"contact_head.{name}": tensor for name, tensor in weights.items()}}, regression)
    with refused(f"{regression}: the tensor contact_head.regression.weight", "NaN or infinite; the file is damaged"):
        small_store(own, outputs=["contacts"])


def test_the_demo_model_has_a_contact_head_of_its_own_and_the_same_weights_as_before(tmp_path):
    from lengthwise.esm2.download import fetch
    from lengthwise.esm2.heads import head_facts

    plain = fetch("demo", str(tmp_path))
    with_contacts = fetch("demo", str(tmp_path), contact_regression=True)
    assert plain == with_contacts
    assert len(head_facts(tmp_path / "demo.pt", ["logits", "contacts"])["contact_regression_sha256"]) == 64
