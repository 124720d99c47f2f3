"""A forecast in words, for a terminal."""

import textwrap

from lengthwise.esm2.shapes import TRAINED_RESIDUES
from lengthwise.system.text import count, duration, size

DATASETS_SHOWN = 20


def text(made: dict) -> str:
    """The forecast for a terminal."""
    lines = [f"Forecast    {made['store']}: {_numbers(made)}"]
    for row in made["datasets"][:DATASETS_SHOWN]:
        lines += ["", f"{row['dataset']}", *(f"            {line}" for line in _dataset_lines(row))]
    if (more := len(made["datasets"]) - DATASETS_SHOWN) > 0:
        lines += ["", f"and {count(more, 'dataset')} more; forecast.json has them all"]
    lines += ["", f"To embed    {_work_line(made)}"]
    lines += _requirements(made) if made["work"]["sequences"] else []
    if made["random_weights"]:
        lines.append("RANDOM WEIGHTS: the embeddings will mean nothing")
    return "\n".join(lines)


def _requirements(made: dict) -> list[str]:
    """Lines on the disk, memory, jobs and time of the work that is left."""
    work, disk, memory = made["work"], made["disk"], made["memory"]
    verdict = "" if disk["fits"] else "; IT DOES NOT FIT"
    exported = f", {size(disk['exports_bytes'])} of them for exports" if disk["exports_bytes"] else ""
    lines = [f"Disk        {size(disk['needed_bytes'])} to write{exported}, {size(disk['free_bytes'])} free{verdict}"]
    if download := disk["download"]:
        most, free = size(download["bytes"]), size(download["free_bytes"])
        lines.append(f"              and first the weights, {download['path']}: {most} in float32, {free} free")
    if not disk["fits"]:
        new = "in a new store, " if work["finished_sequences"] else ""
        lines += [f"{'':14}instead: {new}{_way_line(way)}" for way in disk["ways"] if not way["chosen"]]
    lines.append(
        f"Memory      {size(memory['batch_bytes'])} for {_batches(memory)}, {size(memory['longest_bytes'])} for the longest"
        f" protein ({count(memory['longest_residues'], 'residue')}); {memory['measure']}"
    )
    if card := memory.get("card"):
        lines.append(f"{'':14}on {card['name']}, {card['precision']}: {_card_line(card)}")
    lines.append(f"Jobs        {count(work['jobs'], 'job')}, {count(work['shards'], 'shard')}")
    for number, row in enumerate(made["time"]):
        lines.append(f"{'Time' if not number else '':12}{_time_line(row)}")
        basis = f"{row['source']}: {row['basis']}"
        lines += textwrap.wrap(basis, 100, initial_indent=" " * 14, subsequent_indent=" " * 14)
    return lines


def _numbers(made: dict) -> str:
    return (
        f"{made['model']}, {made['precision']} on {made['device']}, layers {', '.join(map(str, made['layers']))},"
        f" {_way_name(made)}"
    )


def _way_name(way: dict) -> str:
    """How outputs are stored, in words."""
    if "residue" not in way["outputs"]:
        return f"{' and '.join(way['outputs'])} alone"
    return f"{' and '.join(way['outputs'])}, residues in {way['storage_dtype']}"


def _dataset_lines(row: dict) -> list[str]:
    lines = [
        f"{count(row['records'], 'record')} = {row['accepted']:,} accepted + {row['duplicate']:,} duplicate"
        f" + {row['rejected']:,} rejected"
    ]
    if row["reasons"]:
        lines[0] += " (" + ", ".join(f"{n:,} {reason}" for reason, n in row["reasons"].items()) + ")"
    if row["longest"]:
        first = f"{row['shortest']:,} to " if row["shortest"] != row["longest"] else ""
        lines.append(f"{first}{count(row['longest'], 'residue')}, median {row['median']:,}")
    if row["beyond_trained"]:
        lines.append(
            f"{row['beyond_trained']:,} longer than the {TRAINED_RESIDUES:,} residues that ESM-2 was trained on"
        )
    return lines


def _way_line(way: dict) -> str:
    return f"{_way_name(way)}: {size(way['bytes'])}" + ("" if way["fits"] else ", which does not fit either")


def _work_line(made: dict) -> str:
    work = made["work"]
    if not work["sequences"]:
        return f"nothing; {work['finished_sequences']:,} are finished" if work["finished_sequences"] else "nothing"
    left = f"{count(work['sequences'], 'sequence')}, {count(work['residues'], 'residue')}"
    return left + (f"; {work['finished_sequences']:,} are finished" if work["finished_sequences"] else "")


def _batches(memory: dict) -> str:
    tokens = f"batch of {memory['batch_tokens']:,} tokens"
    n = memory["batches_at_once"]
    return f"a {tokens}" if n == 1 else f"{n} batches of {memory['batch_tokens']:,} tokens at once"


def _card_line(card: dict) -> str:
    if not card["longest_residues"]:
        return "not even two layers fit"
    beyond = f"{count(card['sequences_beyond'], 'sequence')} beyond it" if card["sequences_beyond"] else "all fit"
    streamed = f"weights ({size(card['weights_bytes'])}) streamed; " if card["streamed"] else ""
    return (
        f"{streamed}{size(card['batch_bytes'])} for a batch of {card['batch_tokens']:,} tokens; the longest protein that fits has"
        f" {count(card['longest_residues'], 'residue')}; {beyond}"
    )


def _time_line(row: dict) -> str:
    low, high = duration(row["seconds_low"]), duration(row["seconds_high"])
    return f"{duration(row['seconds'])} ({low} to {high}) on {row['device']}, {row['precision']}"
