"""What jobs ask for: devices, threads, memory, disk and minutes; more of it when a job is tried again.

In: the config, the plan, the sizes of the inputs. Out: the functions that rules name under threads and resources.
They change no results, and a site may replace each of them: --set-resources embed:mem_mb=64000.
"""

from lengthwise.system.machine import usable_cores
from lengthwise.system.gpus import auto_device
from lengthwise.system.files import read_json
from lengthwise.plan.job_requests import READ_BYTES_PER_SECOND

# Of jobs that a plan says nothing about: one of an earlier version.
UNKNOWN = {"mem_mb": 16000, "disk_mb": 4000, "runtime_minutes": 120}


def on_cluster(wildcards=None):
    """1 where a scheduler gives out the devices: in a run that submits jobs, in such a job, in a dry run of such a run."""
    asked = getattr(options(), "executor", None) if workflow.dryrun else None
    return int(workflow.non_local_exec or workflow.remote_exec or asked not in (None, "local", "dryrun"))


def uses_gpu():
    """The config's device; auto means what the store was made for."""
    if config["device"] != "auto":
        return config["device"] == "cuda"
    settings = load(Path(STORE))
    return (settings["device"] if settings else auto_device(bool(on_cluster()))) == "cuda"


def device_of_new_store(wildcards):
    return "cuda" if uses_gpu() else "cpu"


def gpus(wildcards):
    return int(uses_gpu())


def model_threads(wildcards):
    """All cores where the CPU computes; a few beside a GPU. A node's cores are the scheduler's to give."""
    if uses_gpu():
        return 4
    return 8 if on_cluster() else workflow.cores


def computing_threads(wildcards):
    """Those of `model_threads` that have a core; on a cluster, all of them."""
    threads = model_threads(wildcards)
    return threads if on_cluster() else min(threads, usable_cores())


def planned_request(wildcards, column):
    return int(planned()[0].get(wildcards.job, {}).get(column) or UNKNOWN[column])


def embed_mem_mb(wildcards, attempt):
    return planned_request(wildcards, "mem_mb") * attempt


def embed_disk_mb(wildcards):
    return planned_request(wildcards, "disk_mb")


def embed_minutes(wildcards, attempt):
    return planned_request(wildcards, "runtime_minutes") * attempt


def input_gigabytes(wildcards):
    """Of the rule's FASTA files, or of all; a compressed one holds about four times its size."""
    names = [wildcards.dataset] if "dataset" in wildcards.keys() else list(DATASETS)
    return (
        sum(
            os.path.getsize(path) * (4 if path.lower().endswith((".gz", ".bgz", ".zst")) else 1)
            for path in map(DATASETS.get, names)
        )
        / 1e9
    )


def bounded_mem_mb(wildcards, attempt):
    """Of rules whose memory does not grow with their input: they spill to disk."""
    return 2000 * attempt


def assemble_mem_mb(wildcards, attempt):
    """A dataset's lookup is made in memory, of at most 200 bytes a record; a dry run before ingest knows the file's size alone."""
    summary = Path(STORE) / "inputs" / wildcards.dataset / "summary.json"
    records = read_json(summary)["records"] if summary.exists() else input_gigabytes(wildcards) * 1e9 / 100
    return int(2000 + records * 200 / 1e6) * attempt


def reading_minutes(wildcards, attempt):
    """Measured on two cores: 13 s per gigabyte for ingest, 15 s for plan."""
    return int(10 + 3 * input_gigabytes(wildcards)) * attempt


def float32_bytes():
    """Of the model's weights: its file holds at most so much."""
    name = config["model"]
    if name.endswith(".pt"):
        return os.path.getsize(name) * 3 // 2  # fair-esm's own files have some in float16
    return 4 * MODELS["esm2_t6_8M_UR50D" if name == "demo" else name].parameters


def scaling_mem_mb(wildcards, attempt):
    """The study runs fair-esm's model too, which it builds in float32, and keeps graphs for gradients."""
    return int(16000 + 2 * float32_bytes() / 1e6) * attempt


def scaling_minutes(wildcards, attempt):
    """The study's own few or what it was given, and the weights read twice."""
    given = 0 if config["scaling_seconds"] == "auto" else config["scaling_seconds"] / 60
    return int(20 + 1.2 * given + 2 * float32_bytes() / READ_BYTES_PER_SECOND / 60) * attempt


def summarize_mem_mb(wildcards, attempt):
    return 4000 * attempt


def short_minutes(wildcards, attempt):
    """Of rules that take a minute or two, with slow file systems in mind."""
    return 20 * attempt
