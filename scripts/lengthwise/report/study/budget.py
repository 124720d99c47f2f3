"""What the study may take of a run: seconds, and memory. Without torch: the workflow asks before each job."""

from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MEMORY_MARGIN, ModelConfig
from lengthwise.plan.jobs_table import job_rows
from lengthwise.plan.process import PROCESS_BYTES, START_SECONDS
from lengthwise.store.paths import job_record_path
from lengthwise.store.settings import shape_of
from lengthwise.system.files import read_json
from lengthwise.system.machine import READ_BYTES_PER_SECOND

# `scaling_seconds: auto`: study and report together take the larger of this share of the embedding's time and these seconds.
SHARE_OF_EMBEDDING, LEAST_SECONDS = 0.25, 15.0
# The report of a small store on two cores of an AMD EPYC server.
REPORT_SECONDS = 5.0
# More time than this changes no figure.
MOST_SECONDS = {"cpu": 60.0, "cuda": 180.0}
# What the study asks for beside the engines, for its passes. fair-esm takes it for a protein of about 4,000 residues.
PASSES_BYTES = 4e9
# The study asks for no more than the largest job that embeds, or this; and for little where it will be skipped.
LEAST_CAP_MB, SKIPPED_MB = 16_000, 2_000
# Two reads of the checkpoint for each set of engines, of which a study has at most four.
READS = 8


def auto_seconds(store: Path, device: str) -> float:
    """Seconds of the whole study, loading included, where the config says auto."""
    with_report = max(LEAST_SECONDS, SHARE_OF_EMBEDDING * _embedding_seconds(store, device))
    return min(MOST_SECONDS[device], with_report - REPORT_SECONDS)


def _embedding_seconds(store: Path, device: str) -> float:
    """Seconds of all planned jobs, measured or forecast; no more jobs are read than `MOST_SECONDS` can depend on."""
    seconds = 0.0
    with suppress(OSError):
        for job, row in job_rows(store / "plan" / "jobs.tsv").items():
            try:
                job_record = read_json(job_record_path(store, job), "load_seconds", "embed_seconds")
                seconds += job_record["load_seconds"] + job_record["embed_seconds"]
            except (OSError, LengthwiseError):
                seconds += float(row.get("forecast_seconds") or 0)
            if SHARE_OF_EMBEDDING * seconds > MOST_SECONDS[device] + REPORT_SECONDS:
                break
    return seconds


def engines_bytes(shape: ModelConfig, precision: str) -> int:
    """The weights of both engines on one device. fair-esm loads first, in float32 whatever the precision."""
    itemsize = 4 if precision == "float32" else 2
    return shape.parameters * max(4, 2 * itemsize)


def pass_bytes(shape: ModelConfig, gradients: bool, quadratic: bool, n: int, length: int) -> int:
    """Upper bound of what a pass in float32 adds to the weights.

    Parameters
    ----------
    shape
        The model's.
    gradients
        Whether the pass keeps the results of all layers.
    quadratic
        Whether it writes out attention's scores, and softmax's input and output, as fair-esm does.
    n, length
        Number of sequences and their residues.
    """
    tokens = n * (length + 2)
    scores = 12 * shape.attention_heads * tokens * (length + 2) if quadratic else 0
    layers = shape.num_layers if gradients else 1
    return layers * (shape.resident_bytes_alone(4, tokens) + scores)


def asked_mb(store: Path, settings: Mapping) -> int:
    """Megabytes of host memory that the study asks a scheduler for."""
    device = settings["device"]
    needed = PROCESS_BYTES[device]
    if device == "cpu":
        needed += engines_bytes(shape_of(dict(settings)), settings["precision"]) / MEMORY_MARGIN
    largest = 0
    with suppress(OSError):
        largest = max(
            (int(row.get("mem_mb") or 0) for row in job_rows(store / "plan" / "jobs.tsv").values()), default=0
        )
    cap = max(LEAST_CAP_MB, largest)
    needed_mb = ceil(needed / 1e6)
    return min(cap, needed_mb + int(PASSES_BYTES / 1e6)) if needed_mb <= cap else SKIPPED_MB


def asked_minutes(store: Path, settings: Mapping, seconds: float | str) -> int:
    """Minutes that the study asks a scheduler for: a slow start, reading the weights, and the measurements."""
    if isinstance(seconds, str):
        seconds = auto_seconds(store, settings["device"])
    reading = READS * 4 * shape_of(dict(settings)).parameters / READ_BYTES_PER_SECOND
    return ceil((START_SECONDS + reading + 2 * seconds) / 60)
