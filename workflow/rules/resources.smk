"""What jobs request: devices, threads, memory, disk and minutes. A retry requests a multiple of memory and minutes.

In: the config, the plan, the sizes of the inputs. Out: the functions under `threads` and `resources` of the rules.
They change no results. The command line may override each of them: --set-resources embed:mem_mb=64000.
"""

from lengthwise.report.study.budget import SKIPPED_MB, asked_mb, asked_minutes
from lengthwise.system.machine import usable_cores
from lengthwise.system.gpus import auto_device

# For plans of earlier versions, which lack these columns.
DEFAULT_REQUESTS = {"mem_mb": 16000, "disk_mb": 4000, "runtime_minutes": 120}


def on_cluster(wildcards=None):
    """1 if a scheduler assigns devices: in a run that submits jobs, in a submitted job, in a dry run of such a run; else 0."""
    executor = getattr(command_line(), "executor", None) if workflow.dryrun else None
    return int(workflow.non_local_exec or workflow.remote_exec or executor not in (None, "local", "dryrun"))


def uses_gpu():
    """Whether models run on CUDA. `device: auto` means the device in the store's settings."""
    if config["device"] != "auto":
        return config["device"] == "cuda"
    settings = load(Path(STORE))
    return (settings["device"] if settings else auto_device(bool(on_cluster()))) == "cuda"


def device_of_new_store(wildcards):
    """The device that a store gets with `device: auto`."""
    return "cuda" if uses_gpu() else "cpu"


def gpus(wildcards):
    """GPUs of a job that runs a model."""
    return int(uses_gpu())


def model_threads(wildcards):
    """All cores on a CPU, a few beside a GPU, a fixed number on a cluster's CPU nodes."""
    if uses_gpu():
        return 4
    return 8 if on_cluster() else workflow.cores


def computing_threads(wildcards):
    """`model_threads`, locally at most the usable cores: what the forecast computes with."""
    threads = model_threads(wildcards)
    return threads if on_cluster() else min(threads, usable_cores())


def planned_request(wildcards, column):
    """A job's request in plan/jobs.tsv."""
    return int(job_rows(JOBS).get(wildcards.job, {}).get(column) or DEFAULT_REQUESTS[column])


def embed_mem_mb(wildcards, attempt):
    return planned_request(wildcards, "mem_mb") * attempt


def embed_disk_mb(wildcards):
    return planned_request(wildcards, "disk_mb")


def embed_minutes(wildcards, attempt):
    return planned_request(wildcards, "runtime_minutes") * attempt


def input_bytes(entry):
    """Size of a FASTA file; 0 if another workflow has yet to make it."""
    if "bytes" in entry:
        return entry["bytes"]
    return os.path.getsize(entry["path"]) if os.path.exists(entry["path"]) else 0


def input_gigabytes(wildcards):
    """Uncompressed size of the dataset's FASTA files, or of all; compressed files count four times their size."""
    datasets = [wildcards.dataset] if "dataset" in wildcards.keys() else DATASETS
    entries = [entry for dataset in datasets for entry in INPUTS[dataset]]
    compressed = (".gz", ".bgz", ".zst")
    return sum(input_bytes(entry) * (4 if entry["path"].lower().endswith(compressed) else 1) for entry in entries) / 1e9


def bounded_mem_mb(wildcards, attempt):
    """For rules that spill to disk, so that their memory does not grow with their input."""
    return 2000 * attempt


def assemble_mem_mb(wildcards, attempt):
    """The lookup takes at most 200 bytes of memory per record. Before ingest, assume 100 bytes of FASTA per record."""
    summary = read_summary(Path(STORE) / "inputs" / wildcards.dataset)
    records = summary["records"] if summary else input_gigabytes(wildcards) * 1e9 / 100
    return int(2000 + records * 200 / 1e6) * attempt


def reading_minutes(wildcards, input, attempt):
    """Three minutes per gigabyte of FASTA: about ten times what ingest or plan takes on two cores."""
    for fasta in input.get("fasta", ()):
        os.stat(fasta)  # where it is not made yet, Snakemake asks again later
    return int(10 + 3 * input_gigabytes(wildcards)) * attempt


def scaling_mem_mb(wildcards, attempt):
    """Both engines and the passes, at most what jobs that embed ask for; little where the study will be skipped."""
    settings = load(Path(STORE))
    return (asked_mb(Path(STORE), settings) if settings else SKIPPED_MB) * attempt


def scaling_minutes(wildcards, attempt):
    settings = load(Path(STORE))
    return (asked_minutes(Path(STORE), settings, config["scaling_seconds"]) if settings else 20) * attempt


def summarize_mem_mb(wildcards, attempt):
    """4,000 MB at the first attempt."""
    return 4000 * attempt


def short_minutes(wildcards, attempt):
    """For rules of one or two minutes; the margin is for slow file systems."""
    return 20 * attempt
