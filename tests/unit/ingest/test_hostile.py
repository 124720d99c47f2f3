"""Every file of tests/hostile/ has one oddity or defect, and its end is stated here: refused in these words, or these records."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lengthwise.ingest.ingest import ingest

HOSTILE = Path(__file__).resolve().parents[2] / "hostile"

REFUSED = {
    # Nothing in it.
    "empty.fasta": ["the file is empty"],
    "blank.fasta": ["the file is empty"],
    "bom_alone.fasta": ["the file is empty"],
    "gzip_of_nothing.fasta.gz": ["the file is empty"],
    "zstd_of_nothing.fasta.zst": ["the file is empty"],
    # Something else.
    "csv.fasta": ["not FASTA", "byte 0, line 1", "'id,sequence'", "should begin with '>'"],
    "no_header.fasta": ["not FASTA", "byte 0, line 1", "'MKVLA'"],
    "text_before_header.fasta": ["not FASTA", "byte 2, line 3", "'# proteins of 2024'"],
    "semicolon_comment.fasta": ["not FASTA", "'; a comment of old'"],
    "space_before_mark.fasta": ["not FASTA", "' >a'"],
    "html.fasta": ["not FASTA", "'<!DOCTYPE html>'"],
    "png.fasta": ["not FASTA", "PNG"],
    "nul_only.fasta": ["not FASTA", r"'\x00"],
    "fastq.fasta": ["not FASTA", "FASTQ"],
    "genbank.fasta": ["not FASTA", "GenBank"],
    "uniprot_flat.fasta": [
        "not FASTA",
        "byte 0, line 1",
        "'ID   HBA_HUMAN",
        "should begin with '>'; give a FASTA file",
    ],
    "sam.fasta": ["not FASTA", "byte 0, line 1", r"'@HD\tVN:1.6", "should begin with '>'"],
    "pir.fasta": ["not FASTA", "PIR"],
    "pir_title_of_letters.fasta": ["not FASTA", "PIR"],
    "pdb.fasta": ["not FASTA", "PDB"],
    "pdb_title.fasta": ["not FASTA", "PDB"],
    "pdb_expdta.fasta": ["not FASTA", "PDB"],
    "mmcif.fasta": ["not FASTA", "byte 0, line 1", "'data_4HHB'", "should begin with '>'"],
    "mmcif_comment.fasta": ["not FASTA", "byte 0, line 1", "'#'", "should begin with '>'"],
    "stockholm.fasta": ["not FASTA", "an alignment"],
    "clustal.fasta": ["not FASTA", "an alignment"],
    "utf16_bom.fasta": ["not FASTA", "UTF-16"],
    "utf16_be_bom.fasta": ["not FASTA", "UTF-16"],
    "utf16_no_bom.fasta": ["not FASTA", "UTF-16"],
    "utf16_be_no_bom.fasta": ["not FASTA", "UTF-16"],
    "utf32_bom.fasta": ["not FASTA", "UTF-32"],
    "utf32_no_bom.fasta": ["not FASTA", "UTF-32"],
    "utf32_be_no_bom.fasta": ["not FASTA", "UTF-32"],
    "bzip2.fasta": ["not FASTA", "bzip2"],
    "xz.fasta": ["not FASTA", "xz"],
    "zip.fasta": ["not FASTA", "zip archive"],
    "gzip_of_gzip.fasta.gz": ["not FASTA", "compressed twice"],
    "gzip_of_csv.fasta.gz": ["not FASTA", "'id,sequence'"],
    "dna.fasta": ["looks like nucleotides", "byte 0, line 1", "120 of 120 letters", "nucleotides: allow"],
    "rna.fasta": ["looks like nucleotides", "120 of 120 letters"],
    "dna_with_n.fasta": ["looks like nucleotides", "220 of 220 letters"],
    "dna_blocks_of_ten.fasta": ["looks like nucleotides", "120 of 120 letters"],
    "dna_numbered.fasta": ["looks like nucleotides", "120 of 120 letters"],
    "dna_trailing_spaces.fasta": ["looks like nucleotides", "120 of 120 letters"],
    "dna_aligned.fasta": ["looks like nucleotides", "120 of 120 letters"],
    "dna_primers.fasta": ["looks like nucleotides", "192 of 192 letters"],
    "dna_after_one_protein.fasta": ["looks like nucleotides", "270 of 370 letters", "byte 104, line 3"],
    # Broken on its way.
    "gzip_cut_in_header.fasta.gz": ["broken gzip", "cut short at byte 6"],
    "gzip_cut_in_data.fasta.gz": ["broken gzip", "cut short at byte 2,234"],
    "gzip_cut_in_trailer.fasta.gz": ["broken gzip", "cut short at byte 53"],
    "gzip_second_member_cut.fasta.gz": ["broken gzip", "cut short at byte 68"],
    "gzip_magic_only.fasta.gz": ["broken gzip", "cut short at byte 2"],
    "gzip_wrong_crc.fasta.gz": ["broken gzip", "damaged before byte 56"],
    "gzip_wrong_size.fasta.gz": ["broken gzip", "damaged before byte 56"],
    "gzip_flipped_bytes.fasta.gz": ["broken gzip", "damaged"],
    "gzip_in_name_only.fasta.gz": ["broken gzip", "damaged"],
    "gzip_garbage_after.fasta.gz": ["broken gzip", "garbage from byte 56 on"],
    "gzip_short_garbage_after.fasta.gz": ["broken gzip", "garbage from byte 56 on", "end of the compressed data"],
    "gzip_newline_after.fasta.gz": ["broken gzip", "garbage from byte 56 on", r"'\n'"],
    "gzip_text_after.fasta.gz": ["broken gzip", "garbage from byte 56 on", "'>c"],
    "gzip_zeros_and_text_after.fasta.gz": ["broken gzip", "garbage from byte 156 on", "'>c"],
    "bom_before_gzip.fasta.gz": ["not FASTA", "byte 3, line 1", "compressed data after other bytes"],
    "blank_line_before_gzip.fasta.gz": ["not FASTA", "byte 1, line 2", "compressed data after other bytes"],
    "zstd_cut.fasta.zst": ["broken zstd", "cut short at byte 43"],
    "zstd_second_frame_cut.fasta.zst": ["broken zstd", "cut short at byte 50"],
    "zstd_wrong_checksum.fasta.zst": ["broken zstd", "damaged before byte 50"],
    "zstd_garbage_after.fasta.zst": ["broken zstd", "garbage from byte 50 on"],
    "zstd_large_window.fasta.zst": ["broken zstd", "window is too large", "without --long"],
    # Files put together, of which one would vanish in a record of the other.
    "bom_before_later_header.fasta": ["byte 7, line 3: a byte-order mark", "remove it"],
    "no_break_between_files.fasta": ["byte 6, line 2: '>' inside a line", "line break before it"],
    "no_break_after_bom_crlf.fasta.gz": ["byte 23, line 5 of its decompressed content: '>' inside a line"],
    "mark_inside_line.fasta": ["byte 5, line 2: '>' inside a line"],
    "indented_header.fasta": ["byte 8, line 3: '>' inside a line"],
    "gzip_after_plain.fasta": ["byte 7, line 3: gzip or zstd data", "decompress"],
    "zstd_after_plain.fasta": ["byte 7, line 3: gzip or zstd data", "decompress"],
    "nul_tail.fasta": ["byte 14, line 5: NUL bytes"],
    "nul_tail_in_line.fasta": ["byte 13, line 4: NUL bytes"],
    "fastq_after_fasta.fasta": ["byte 7, line 3: '@' begins a line", "FASTQ"],
    # Ids that stand for two sequences.
    "same_id_other_sequence.fasta": ["records 1 and 3", "'a'", "byte 0, line 1", "byte 13, line 5", "suffix"],
    "same_id_after_bom.fasta": ["byte 3, line 1", "byte 16, line 5"],
    "same_id_in_gzip.fasta.gz": ["byte 0, line 1 of its decompressed content", "byte 13, line 5 of its decompressed"],
    "same_id_accepted_and_rejected.fasta": ["records 1 and 2", "'a'", "byte 7, line 3"],
}

TWO = ["accepted a MKVLAWWC", "accepted b MKTAYIAK"]
GOOD_B = "accepted b MKV"
DNA = "AATACAAAGGGTGCGTGAATGCGGGACCATCGGGGTCTATTTAATCCTAGCACGTAGATAACGCATTTCCAGCCTTGAGCTGTGGTTCAC"

# Of each record its status and id, and its sequence or the reason why there is none; then what was changed.
TAKEN = {
    # Two plain records, however they are packed.
    "gzip.fasta.gz": TWO,
    "gzip_under_plain_name.fasta": TWO,
    "plain_under_gzip_name.fasta.gz": TWO,
    "gzip_two_members.fasta.gz": TWO,
    "gzip_empty_member_between.fasta.gz": TWO,
    "gzip_zeros_after.fasta.gz": TWO,
    "bgzip.fasta.gz": TWO,
    "zstd.fasta.zst": TWO,
    "zstd_two_frames.fasta.zst": TWO,
    "zstd_skippable_first.fasta.zst": TWO,
    "bom.fasta": TWO,
    "crlf.fasta": TWO,
    "crlf_doubled.fasta": TWO,
    "cr.fasta": TWO,
    "mixed_line_ends.fasta": TWO,
    "no_final_newline.fasta": TWO,
    "blank_lines_everywhere.fasta": TWO,
    "one_letter_per_line.fasta": TWO,
    "trailing_whitespace.fasta": TWO,
    "space_after_mark.fasta": TWO,
    "tab_after_id.fasta": TWO,
    # Letters.
    "lowercase.fasta": ["accepted a MKVLAWWC uppercased", "accepted b MKVLA uppercased"],
    "trailing_stop.fasta": ["accepted a MKVLAWWC stop_stripped"],
    "two_trailing_stops.fasta": ["rejected a invalid_byte: '*' (0x2A) at position 4", GOOD_B],
    "stop_alone.fasta": ["rejected a empty", GOOD_B],
    "internal_stop.fasta": ["rejected a invalid_byte: '*' (0x2A) at position 3", GOOD_B],
    "j.fasta": ["accepted a MXV j_to_x"],
    "rare_residues.fasta": ["accepted a MUOBZX"],
    "all_x.fasta": ["rejected a all_x", "rejected b all_x", "accepted c MX"],
    "gap_dash.fasta": ["rejected a invalid_byte: '-' (0x2D) at position 3", GOOD_B],
    "gap_dot.fasta": ["rejected a invalid_byte: '.' (0x2E) at position 3", GOOD_B],
    "space_inside.fasta": ["accepted a MKVL spaces_removed"],
    "spaces_between_blocks_of_ten.fasta": ["rejected a invalid_byte: '1' (0x31) at position 9", GOOD_B],
    "digit.fasta": ["rejected a invalid_byte: '1' (0x31) at position 4", GOOD_B],
    "tab_inside.fasta": ["rejected a invalid_byte: (0x09) at position 3", GOOD_B],
    "mask_literal.fasta": ["rejected a invalid_byte: '<' (0x3C) at position 3", GOOD_B],
    "cls_literal.fasta": ["rejected a invalid_byte: '<' (0x3C) at position 1", GOOD_B],
    "pad_literal.fasta": ["rejected a invalid_byte: '<' (0x3C) at position 4", GOOD_B],
    "nul_inside.fasta": ["rejected a invalid_byte: (0x00) at position 3", GOOD_B],
    "dos_end_of_file.fasta": ["accepted a MKV", "rejected b invalid_byte: (0x1A) at position 5"],
    "utf8_letter.fasta": ["rejected a invalid_byte: (0xC3) at position 3", GOOD_B],
    "latin1_letter.fasta": ["rejected a invalid_byte: (0xE9) at position 3", GOOD_B],
    "cyrillic_lookalike.fasta": ["rejected a invalid_byte: (0xD0) at position 3", GOOD_B],
    "non_breaking_space.fasta": ["rejected a invalid_byte: (0xC2) at position 3", GOOD_B],
    "escape_codes.fasta": ["accepted a\x1b[31m MKV", "rejected b invalid_byte: (0x1B) at position 2"],
    "ambiguous_peptides.fasta": ["accepted a GATTACA", "accepted b CAT"],
    # Nucleotides or not: half of the letters must be in records like them.
    "dna_before_proteins.fasta": [f"accepted d {DNA} like_nucleotides", f"accepted p {'MKVLAWWCHH' * 10}"],
    "dna_after_proteins.fasta": [f"accepted p {'MKVLAWWCHH' * 10}", f"accepted d {DNA} like_nucleotides"],
    "antifreeze.fasta": [f"accepted a {'AAT' * 40}", f"accepted b {'G' * 80}", f"accepted c {'GGAGA' * 30}"],
    # Records.
    "no_id.fasta": ["rejected  no_id", "accepted b MKVL", "rejected  no_id"],
    "mark_alone.fasta": ["rejected  no_id"],
    "empty_sequence.fasta": ["rejected a empty", GOOD_B, "rejected c empty"],
    "empty_last_record.fasta": ["accepted a MKV", "rejected b empty"],
    "only_headers.fasta": ["rejected a empty", "rejected b empty", "rejected c empty"],
    "same_id_same_sequence.fasta": ["accepted a MKV", "duplicate a MKV uppercased"],
    "same_id_both_rejected.fasta": [
        "rejected a invalid_byte: '.' (0x2E) at position 2",
        "rejected a invalid_byte: '-' (0x2D) at position 2",
        GOOD_B,
    ],
    "same_sequence_other_ids.fasta": [
        "accepted a MKVLA",
        "duplicate b MKVLA",
        "duplicate c MKVLA uppercased,stop_stripped",
    ],
    "header_not_utf8.fasta": [r"accepted a\xe9 MKV"],
    "id_like_an_escape.fasta": [r"accepted a\x5cxe9 MKV", r"accepted a\xe9 MKVL"],
    "pir_like_id.fasta": ["accepted P1;CRAB MKV stop_stripped"],
    "long_id.fasta": [f"accepted {'i' * 10_000} MKV"],
    "long_description.fasta": ["accepted a MKV"],
    "odd_ids.fasta": [
        "accepted ../../etc/passwd MKV",
        "accepted $(touch MKVL",
        "accepted '\"`;|& MKVLA",
        "accepted a/b\\c MKVLAW",
        "accepted {dataset} MKVLAWW",
        "accepted \N{DNA DOUBLE HELIX} MKVLAWWC",
        "accepted .. MK",
        "accepted -rf MKK",
        "accepted %s%n MKKK",
        "accepted NA MKKKK",
    ],
}


@pytest.fixture
def take(tmp_path):
    """Ingests a hostile file; returns the lines of `TAKEN` and the summary."""

    def ingest_file(name: str):
        tables = ("records.parquet", "sequences.parquet", "summary.json")
        paths = [tmp_path / f"of {name}" / table for table in tables]
        summary = ingest(HOSTILE / name, *paths)
        records, sequences = (pq.read_table(path).to_pylist() for path in paths[:2])
        sequence_of = {row["digest"]: row["sequence"].decode() for row in sequences}
        lines = []
        for row in records:
            fate = row["reason"] if row["status"] == "rejected" else sequence_of[row["digest"]]
            lines.append(
                " ".join(filter(None, [row["status"], row["id"] or " ", fate, row["changes"]])).replace("   ", "  ")
            )
        return lines, summary, records

    return ingest_file


def test_every_hostile_file_has_its_end_in_a_table_and_there_are_many():
    files = {path.name for path in HOSTILE.iterdir()}
    assert files == REFUSED.keys() | TAKEN.keys()
    assert not REFUSED.keys() & TAKEN.keys()
    assert len(files) >= 60
    assert max(path.stat().st_size for path in HOSTILE.iterdir()) < 20_000


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_one_line_and_nothing_is_left(name, take, refused, tmp_path, files_in):
    with refused(name, *REFUSED[name]):
        take(name)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", TAKEN)
def test_every_record_of_a_file_has_its_fate(name, take):
    lines, summary, records = take(name)
    assert lines == TAKEN[name]
    assert summary["records"] == len(lines) == summary["accepted"] + summary["duplicate"] + summary["rejected"]
    assert sum(summary["reasons"].values()) == summary["rejected"]
    if TAKEN[name] is TWO:
        assert [row["description"] for row in records] == ["first", "second"]


def test_a_long_description_is_cut_and_a_long_id_is_not(take):
    assert len(take("long_description.fasta")[2][0]["description"]) == 1_000
    assert len(take("long_id.fasta")[2][0]["id"]) == 10_000


def test_rare_residues_are_counted(take):
    assert take("rare_residues.fasta")[1]["rare_residues"] == dict.fromkeys("BOUXZ", 1)
