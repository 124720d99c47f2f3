"""What control groups tell: the memory that this process may take, and the processes that the kernel killed for memory."""

from pathlib import Path

import psutil
import pytest

from lengthwise.system import control_groups
from lengthwise.system.control_groups import count_oom_kills
from lengthwise.system.machine import host_available, host_total

GB = 1_000_000_000
INSIDE = "job_7/step_0/task"
UNSET = 9_223_372_036_854_771_712  # the limit that version 1 shows where nobody set one
STAT = {2: "inactive_file {}\nactive_file {}\n", 1: "cache 1\ntotal_inactive_file {}\ntotal_active_file {}\n"}
FILES = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
COUNTERS = {2: "low 0\noom 3\noom_kill {}\noom_group_kill 0\n", 1: "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"}


class Groups:
    """A process in the group job_7/step_0/task, as /proc and the mounted hierarchy show it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: int = 2):
        self.folder, self.version = folder / "mounted", version
        folder.mkdir(exist_ok=True)
        self.describe(INSIDE, "/")
        monkeypatch.setattr(control_groups, "_PROCESS", folder)
        monkeypatch.setattr(control_groups, "_MACHINE_COUNTERS", folder / "vmstat")

    def describe(self, group: str, root: str) -> None:
        """Say in /proc where the process is, and from which group on its hierarchy is mounted."""
        hierarchy = "0::" if self.version == 2 else "4:cpu,memory:"
        (self.folder.parent / "cgroup").write_text(f"7:pids:/elsewhere\n{hierarchy}/{group}\n")
        kind = "cgroup2 cgroup2 rw" if self.version == 2 else "cgroup cgroup rw,cpu,memory"
        (self.folder.parent / "mountinfo").write_text(
            "21 1 0:5 / /proc rw,nosuid - proc proc rw\n"
            "31 1 0:6 / /sys/fs/cgroup/pids rw shared:9 - cgroup cgroup rw,pids\n"
            f"35 31 0:32 {root} {self.folder} rw,relatime shared:10 - {kind}\n"
        )

    def path(self, name: str) -> Path:
        folder = self.folder / INSIDE[: INSIDE.index(name) + len(name)]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def limit(self, name: str, limit: int | str, used: int, cached: int = 0) -> None:
        folder, (limit_file, used_file) = self.path(name), FILES[self.version]
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / used_file).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{STAT[self.version].format(cached // 2, cached // 2)}")

    def count(self, name: str, kills: int) -> Path:
        file = self.path(name) / ("memory.events" if self.version == 2 else "memory.oom_control")
        file.write_text(COUNTERS[self.version].format(kills))
        return file


@pytest.fixture(params=[1, 2])
def groups(request, tmp_path, monkeypatch) -> Groups:
    return Groups(tmp_path, monkeypatch, request.param)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 64 GB, 48 of them available."""
    found = psutil.virtual_memory()._replace(total=64 * GB, available=48 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def test_without_control_groups_a_host_has_what_the_machine_has(groups):
    assert (host_total(), host_available()) == (64 * GB, 48 * GB)


def test_the_limit_of_the_processs_own_group_counts(groups):
    groups.limit("task", 8 * GB, 3 * GB)
    assert (host_total(), host_available()) == (8 * GB, 5 * GB)


def test_the_limit_of_a_jobs_group_counts_for_the_task_inside(groups):
    groups.limit("job_7", 8 * GB, 3 * GB)
    groups.limit("task", "max" if groups.version == 2 else UNSET, GB)
    assert (host_total(), host_available()) == (8 * GB, 5 * GB)


@pytest.mark.parametrize("tightest", ["job_7", "step_0", "task"])
def test_the_least_that_any_group_above_leaves_is_what_is_free(groups, tightest):
    for name in ("job_7", "step_0", "task"):
        groups.limit(name, *((20 * GB, 17 * GB) if name == tightest else (10 * GB, GB)))
    assert (host_total(), host_available()) == (10 * GB, 3 * GB)


def test_a_group_in_use_beyond_its_limit_leaves_nothing(groups):
    groups.limit("job_7", 8 * GB, 9 * GB)
    assert host_available() == 0


def test_a_group_whose_statistics_lack_the_cached_files_counts_them_as_used(groups):
    groups.limit("job_7", 8 * GB, 7 * GB, cached=4 * GB)
    (groups.path("job_7") / "memory.stat").write_text("anon 1\n")
    assert host_available() == GB


def test_limits_of_both_versions_count_where_both_are_mounted(tmp_path, monkeypatch):
    old, new = (Groups(tmp_path / str(version), monkeypatch, version) for version in (1, 2))
    process = tmp_path / "process"
    process.mkdir()
    for name in ("cgroup", "mountinfo"):
        (process / name).write_text("".join((each.folder.parent / name).read_text() for each in (old, new)))
    monkeypatch.setattr(control_groups, "_PROCESS", process)
    old.limit("job_7", 8 * GB, 3 * GB)
    new.limit("step_0", 6 * GB, 2 * GB)
    assert (host_total(), host_available()) == (6 * GB, 4 * GB)


def test_cached_files_in_a_group_are_available(groups):
    groups.limit("task", 8 * GB, 7 * GB, cached=4 * GB)
    assert host_available() == 5 * GB


def test_a_limit_above_the_machines_memory_is_none(groups):
    groups.limit("task", 100 * GB, 3 * GB)
    assert (host_total(), host_available()) == (64 * GB, 48 * GB)


def test_kills_for_memory_are_counted_in_the_processs_own_group(groups):
    groups.count("job_7", 9)  # other programs are in the groups around it
    file = groups.count("task", 2)
    assert count_oom_kills() == {file: 2}


def test_a_group_without_a_counter_leaves_it_to_the_one_around_it(groups):
    file = groups.count("job_7", 9)
    groups.path("task")
    assert count_oom_kills() == {file: 9}


def test_a_container_mounts_its_own_group_as_the_root(groups):
    groups.describe(f"docker/{INSIDE}", "/docker/job_7")
    (groups.folder / "step_0" / "task").mkdir(parents=True)
    file = groups.folder / "memory.events"
    file.write_text("oom_kill 4\n")
    assert count_oom_kills() == {file: 4}


@pytest.mark.parametrize("group", ["../../other", "other"])
def test_a_group_outside_of_what_is_mounted_is_read_at_the_mount(groups, group):
    groups.describe(group, "/docker/job_7")
    groups.folder.mkdir()
    file = groups.folder / "memory.oom_control"
    file.write_text("oom_kill 4\n")
    assert count_oom_kills() == {file: 4}


def test_without_a_group_the_machines_kills_are_counted(groups, tmp_path):
    assert count_oom_kills() == {}
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 5\n")
    assert count_oom_kills() == {tmp_path / "vmstat": 5}


def test_a_system_without_control_groups_has_no_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(control_groups, "_PROCESS", tmp_path)
    monkeypatch.setattr(control_groups, "_MACHINE_COUNTERS", tmp_path / "vmstat")
    assert (count_oom_kills(), host_total()) == ({}, 64 * GB)
