"""What a host has: the machine's memory, and the limits of control groups."""

from pathlib import Path

import psutil
import pytest

from lengthwise.esm2 import meters

GB = 1_000_000_000


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups as version 2 shows them, each by (limit, in use, cached files); the process is in the last."""
    monkeypatch.setattr(meters, "_CONTROL_GROUPS", tmp_path)
    read = Path.read_text
    proc, inside = Path("/proc/self/cgroup"), "job_7/step_0/task"
    monkeypatch.setattr(Path, "read_text", lambda path: f"0::/{inside}\n" if path == proc else read(path))

    def make(**found):
        for name, (limit, used, cached) in found.items():
            folder = tmp_path / inside[: inside.index(name) + len(name)]
            folder.mkdir(parents=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached // 2}\nactive_file {cached // 2}\n")

    return make


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 64 GB, 48 of them available."""
    found = psutil.virtual_memory()._replace(total=64 * GB, available=48 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def test_without_control_groups_a_host_has_what_the_machine_has(groups):
    assert (meters.host_total(), meters.host_available()) == (64 * GB, 48 * GB)


def test_the_limit_of_the_processs_own_group_counts(groups):
    groups(task=(8 * GB, 3 * GB, 0))
    assert (meters.host_total(), meters.host_available()) == (8 * GB, 5 * GB)


def test_the_limit_of_a_jobs_group_counts_for_the_task_inside(groups):
    groups(job_7=(8 * GB, 3 * GB, 0), task=("max", GB, 0))
    assert (meters.host_total(), meters.host_available()) == (8 * GB, 5 * GB)


def test_cached_files_in_a_group_are_available(groups):
    groups(task=(8 * GB, 7 * GB, 4 * GB))
    assert meters.host_available() == 5 * GB


def test_a_limit_above_the_machines_memory_is_none(groups):
    groups(task=(100 * GB, 3 * GB, 0))
    assert (meters.host_total(), meters.host_available()) == (64 * GB, 48 * GB)
