"""Tokens against fair-esm's own alphabet, digests against GA4GH's, and what is done to a raw sequence."""

import hashlib
import random
import re

import numpy as np
import pytest
from esm.data import Alphabet

from lengthwise.esm2 import tokens as tokens_module
from lengthwise.ingest import digests as digests_module
from lengthwise.ingest import normalize

ESM = Alphabet.from_architecture("ESM-1b")
LETTERS = tokens_module.RESIDUES.decode()


def esm_tokens(sequence: str) -> list[int]:
    _, _, tokens = ESM.get_batch_converter()([("", sequence)])
    return tokens[0].tolist()


@pytest.mark.parametrize("letter", LETTERS)
def test_every_residue_has_the_token_of_fair_esm(letter):
    assert tokens_module.tokenize(letter.encode()).tolist() == [ESM.cls_idx, ESM.get_idx(letter), ESM.eos_idx]


def test_the_residues_are_all_letters_of_fair_esm():
    assert set(LETTERS) == {token for token in ESM.all_toks if len(token) == 1} - set(".-")
    assert len(LETTERS) == len(set(LETTERS))


def test_the_specials_and_the_size_are_those_of_fair_esm():
    ours = (tokens_module.BOS, tokens_module.PAD, tokens_module.EOS, tokens_module.UNK, tokens_module.VOCABULARY_SIZE)
    assert ours == (ESM.cls_idx, ESM.padding_idx, ESM.eos_idx, ESM.unk_idx, len(ESM))


@pytest.mark.parametrize("length", [1, 2, 3, 50, 1022, 3000])
def test_a_sequence_has_the_tokens_of_fair_esm_one_per_residue_and_two_more(length):
    sequence = "".join(random.Random(length).choices(LETTERS, k=length))
    tokens = tokens_module.tokenize(sequence.encode())
    assert len(tokens) == length + 2
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == esm_tokens(sequence)


def test_sequences_end_to_end_have_the_tokens_of_each():
    sequences = ["MKV", LETTERS, "W", "MKV"]
    expected = [token for sequence in sequences for token in esm_tokens(sequence)]
    assert tokens_module.tokenize(*(sequence.encode() for sequence in sequences)).tolist() == expected


def test_is_tokens_knows_every_byte_as_fair_esm_does():
    letters = {token for token in ESM.standard_toks if token.isalpha()}
    assert {chr(byte) for byte in range(256) if tokens_module.is_tokens(b"MK" + bytes([byte]) + b"V")} == letters
    assert tokens_module.is_tokens(b"")


@pytest.mark.parametrize("raw", [b"MKJ", b"mkv", b"MK*", b"MK-", b"M K", b"\xff", b"<mask>"])
def test_what_was_not_normalised_has_no_tokens(raw):
    with pytest.raises(ValueError, match="not residues"):
        tokens_module.tokenize(raw)


@pytest.mark.parametrize("byte", sorted(set(range(256)) - set(tokens_module.RESIDUES)))
def test_a_byte_that_is_no_residue_is_named_whatever_sequence_of_a_batch_has_it(byte):
    """Those with the number of a special too."""
    sequences, bad = [b"W", b"MK", b"V"], bytes([byte])
    for i in range(3):
        batch = [*sequences[:i], b"M" + bad + b"K" + bad, *sequences[i:]]
        for more in ([], [b"MK--"]):  # the first sequence that has one is named
            with pytest.raises(ValueError, match=f"^{re.escape(f'not residues: {bad + bad!r}')}$"):
                tokens_module.tokenize(*batch, *more)


@pytest.mark.parametrize(
    ("raw", "sequence", "changes"),
    [
        (b"MKV", b"MKV", []),
        (tokens_module.RESIDUES, tokens_module.RESIDUES, []),
        (b"mkV", b"MKV", ["uppercased"]),
        (b"MKV*", b"MKV", ["stop_stripped"]),
        (b"MJV", b"MXV", ["j_to_x"]),
        (b"mjv*", b"MXV", ["uppercased", "stop_stripped", "j_to_x"]),
    ],
)
def test_normalisation_says_what_it_did(raw, sequence, changes):
    assert normalize.normalize(raw) == (sequence, changes, "")


@pytest.mark.parametrize("raw", [b"", b"*"])
def test_nothing_left_is_rejected_as_empty(raw):
    assert normalize.normalize(raw)[2] == "empty"


@pytest.mark.parametrize(
    ("raw", "shown", "position"),
    [
        (b"MK-V", "'-' (0x2D)", 3),
        (b"-", "'-' (0x2D)", 1),
        (b"MKV.", "'.' (0x2E)", 4),
        (b"M*KV", "'*' (0x2A)", 2),
        (b"MK**", "'*' (0x2A)", 3),
        (b"M<mask>V", "'<' (0x3C)", 2),
        (b"<cls>", "'<' (0x3C)", 1),
        (b"MK1V2", "'1' (0x31)", 3),
        (b"MK\tV", "(0x09)", 3),
        (b"MK\x00", "(0x00)", 3),
        ("MKé".encode(), "(0xC3)", 3),
        (b"mk\xffv", "(0xFF)", 3),
    ],
)
def test_what_is_no_residue_is_rejected_with_its_place(raw, shown, position):
    reason = normalize.normalize(raw)[2]
    assert reason.startswith("invalid_byte: ")
    assert reason.endswith(f"{shown} at position {position}")


@pytest.mark.parametrize("byte", range(256))
def test_a_byte_is_either_embedded_or_rejected(byte):
    sequence, _, reason = normalize.normalize(b"M" + bytes([byte]) + b"K")
    if reason:
        assert chr(byte).upper() not in LETTERS + "J "
    else:
        assert tokens_module.tokenize(sequence).tolist() == esm_tokens(sequence.decode())


def test_the_digest_is_the_example_that_ga4gh_publishes():
    assert digests_module.digest_name(digests_module.digest(b"ACGT")) == "SQ.aKF498dAxcJAqme6QYQ7EZ07-fiw8Kw2"


def test_a_digest_is_24_bytes_and_distinct_sequences_have_distinct_ones():
    sequences = [b"MKV", b"MKVX", b"VKM", b""]
    digests = [digests_module.digest(sequence) for sequence in sequences]
    assert [len(digest) for digest in digests] == [24] * 4
    assert len(set(digests)) == 4
    assert digests[0] == hashlib.sha512(b"MKV").digest()[:24]
