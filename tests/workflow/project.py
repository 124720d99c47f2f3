"""A user's folder, and snakemake commands in it."""

import contextlib
import fcntl
import gzip
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from Bio import SeqIO

import lengthwise
from lengthwise.esm2 import checkpoint, tokens
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.ingest.digests import digest, digest_name
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json, write_json
from lengthwise.system.locks import shared_store_lock

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """How a snakemake command ended."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell a user why."""
        return [line for line in self.output.splitlines() if line.startswith("lengthwise: error: ")]

    @property
    def rules(self) -> Counter:
        """How many jobs of each rule ran."""
        return Counter(re.findall(r"^(?:local)?(?:rule|checkpoint) (\w+):$", self.output, re.MULTILINE))


class Project:
    """A folder with a config and inputs, on which a checkout's workflow runs."""

    cores = 4

    def __init__(self, folder: Path, checkout: Path = ROOT):
        self.folder, self.checkout = folder, checkout

    @classmethod
    def with_example(cls, folder: Path) -> "Project":
        (folder / "config").mkdir(parents=True)
        shutil.copy(ROOT / "config" / "example.fasta", folder / "config")
        shutil.copy(ROOT / "config" / "config.yaml", folder / "config")
        return cls(folder)

    @classmethod
    def with_tiny_model(cls, folder: Path, **inputs: list[bytes]) -> "Project":
        """A model of two layers and 32 channels, and one FASTA in a globbed folder for each list of sequences."""
        (folder / "config").mkdir(parents=True)
        (folder / "in").mkdir()
        project = cls(folder)
        checkpoint.write_random(folder / "tiny.pt", ModelConfig(2, 32, 2))
        for name, sequences in inputs.items():
            project.write_fasta(name, sequences)
        project.configure(inputs=["in/*.fasta"], model="tiny.pt")
        return project

    @property
    def store(self) -> Path:
        return self.folder / "results" / "tiny"

    def write_fasta(self, name: str, sequences: list[bytes]) -> None:
        (self.folder / "in" / f"{name}.fasta").write_text(fasta_text(name, sequences))

    def configure(self, **config) -> None:
        """Without the scaling study, which takes longer than all the rest of a small run."""
        config = {"inputs": ["config/example.fasta"], "model": "demo", "scaling": False} | config
        (self.folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))

    def command(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "snakemake", *arguments, "--cores", str(self.cores), "--resources", "gpu=1"]
        return [*command, "--snakefile", str(self.checkout / "workflow" / "Snakefile"), "--directory", str(self.folder)]

    @property
    def shell_folder(self) -> Path:
        """The folder of the shell in which commands are typed."""
        return self.folder

    @property
    def environment(self) -> dict[str, str]:
        # Snakemake's plugin asks SLURM's controller at every start, and waits where that is installed and not running.
        own = {"PYTHONPATH": str(self.checkout / "scripts"), "SLURM_CONF": os.devnull}
        return os.environ | own | {"PWD": str(self.shell_folder)}

    def snakemake(self, *arguments: str, timeout: float = 600) -> Run:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.shell_folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        return Run(done.returncode, done.stdout + done.stderr)

    def make(self, *datasets: str) -> Run:
        """Run for these datasets alone, without the report."""
        return self.snakemake(*(f"results/tiny/datasets/{name}/manifest.json" for name in datasets))

    def begin(self, *arguments: str) -> subprocess.Popen:
        """Begin a command in a process group of its own, with its output in a pipe."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def start(self, *arguments: str) -> subprocess.Popen:
        """Begin a command in the background; its output goes to `snakemake.out` in the folder."""
        with open(self.folder / "snakemake.out", "w") as output:
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def script_processes(self) -> list[int]:
        """Ids of the processes in which the scripts of rules run now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                if f"{self.folder}/.snakemake/scripts" in command and "pipefail" not in command:
                    found.append(int(folder.name))
        return found

    def shards(self) -> dict[str, tuple[int, int]]:
        """{shard: (time of its making, number of its sequences)}."""
        paths = self.store.glob("shards/*/*.safetensors")
        return {path.stem: (path.stat().st_mtime_ns, len(Shard(path)["status"])) for path in paths}

    def contents(self) -> dict[str, str]:
        """{file: hash of its bytes} of what a run makes for good."""
        return {
            str(path.relative_to(self.store)): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in ("shards/*/*", "datasets/*/*.parquet", "datasets/*/*.tsv", "plan/jobs/*")
            for path in self.store.glob(pattern)
        }

    @property
    def jobs(self) -> list[str]:
        return sorted(path.stem for path in self.store.glob("plan/jobs/*.parquet"))

    def shards_of(self, job: str) -> list[str]:
        """A job's shards in the order in which they are made: the longest proteins first."""
        table = pq.read_table(self.store / "plan" / "jobs" / f"{job}.parquet", columns=["shard"])
        return list(dict.fromkeys(table.column("shard").to_pylist()))[::-1]

    def keep(self) -> None:
        """Keep a copy of the folder beside it, for `reset`."""
        shutil.copytree(self.folder, self._kept, symlinks=True)

    def reset(self) -> "Project":
        """Bring the folder back to what `keep` kept, at its own path: inputs under another path are read again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._kept, self.folder, symlinks=True)
        return self

    @property
    def _kept(self) -> Path:
        return self.folder.with_name(self.folder.name + ".kept")

    def copy(self, folder: Path) -> "Project":
        """The same project elsewhere, with the times of its files, as if it had been made there."""
        shutil.copytree(self.folder, folder)
        for path in folder.glob("results*/*/inputs/*/summary.json"):
            summary = read_json(path)
            for stamp in (
                one for known in summary["inputs"] for one in (known if isinstance(known, list) else [known])
            ):
                stamp["path"] = stamp["path"].replace(f"{self.folder}/", f"{folder}/")
            write_json(path, summary)
        return type(self)(folder, self.checkout)


class ShardLock:
    """Keeps a job in its middle: holds the lock of a shard, as if another process were making it."""

    def __init__(self, project: Project, job: str):
        *earlier, shard = project.shards_of(job)[:3]
        folder = project.store / "shards"
        self.earlier = [folder / name[:2] / f"{name}.safetensors" for name in earlier]
        self.path = folder / shard[:2] / f".{shard}.tmp"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.shared_store_lock = ExitStack()
        self.shared_store_lock.enter_context(
            shared_store_lock(project.store)
        )  # or a run that begins would remove the file
        self.descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        self.waiting_process = rf"-> FLOCK +\w+ +\w+ +(\d+) \S+:{os.fstat(self.descriptor).st_ino} 0 EOF"

    def has(self, processes: int = 1) -> bool:
        """Whether so many processes wait here, and the shards before this one are on the disk: a thread sees to that."""
        return len(self.waiting()) == processes and (not processes or all(map(Path.exists, self.earlier)))

    def waiting(self) -> list[int]:
        return [int(process) for process in re.findall(self.waiting_process, Path("/proc/locks").read_text())]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the processes that wait here."""
        for process in self.waiting():
            os.kill(process, number)

    def open(self) -> None:
        """Let the job go on; again, it does nothing."""
        if self.descriptor is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        self.descriptor = None
        self.shared_store_lock.close()


def fasta_text(name: str, sequences: list[bytes]) -> str:
    return "".join(f">{name}_{i}\n{sequence.decode()}\n" for i, sequence in enumerate(sequences))


def second_folder(one: Project, folder: Path, **inputs: list[bytes]) -> Project:
    """Another working folder over the store of `one`, with FASTA files of its own."""
    two = type(one)(folder, one.checkout)
    (folder / "config").mkdir(parents=True)
    (folder / "in").mkdir()
    for name, sequences in inputs.items():
        two.write_fasta(name, sequences)
    (folder / "results").symlink_to(one.folder / "results")
    shutil.copy2(one.folder / "tiny.pt", folder / "tiny.pt")
    two.configure(inputs=["in/*.fasta"], model="tiny.pt")
    return two


def served(project: Project, dataset: str) -> dict[str, str]:
    """{id: digest} of a dataset; each id's rows are read, and belong to that digest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM WEIGHTS")
        ds = lengthwise.open(project.store / "datasets" / dataset)
    records = ds.records[ds.records["status"] != "rejected"]
    assert [len(rows) for rows in ds.values()] == records["length"].tolist()
    return dict(zip(records["id"], records["digest"], strict=True))


def of_file(path: Path) -> dict[str, str]:
    """{id: digest} of a FASTA file, by another reader."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    records = SeqIO.parse(io.StringIO(text.decode()), "fasta")
    return {record.id: digest_name(digest(str(record.seq).encode())) for record in records}


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


@contextlib.contextmanager
def held(process: subprocess.Popen) -> Iterator[None]:
    """A process begins nothing while this lasts, however busy the machine is."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def random_sequences(n: int, seed: int, longest: int = 60) -> list[bytes]:
    rng = random.Random(seed)
    return [bytes(rng.choices(tokens.RESIDUES, k=rng.randint(5, longest))) for _ in range(n)]
