"""The workflow on a real SLURM: a whole run, faults, and what a login node goes through."""

import os
import re
import time
import warnings
from itertools import combinations

import pandas as pd
import pytest
from project import Project, random_sequences

from lengthwise.maintain.cleanup import leftovers
from lengthwise.plan.planner import read_jobs
from slurm import ClusterProject

# The scenarios run side by side before the first test, and each wait in them has a limit of its own.
pytestmark = pytest.mark.timeout(1800)
GPU_RULES = ("embed", "scaling")
MANY_JOBS = 500


@pytest.fixture(scope="module")
def whole(ends):
    return ends["whole"].result()


@pytest.fixture(scope="module")
def login(ends):
    return ends["login"].result()


@pytest.fixture(scope="module")
def last_ends(ends):
    return ends["last_ends"].result()


@pytest.fixture(scope="module")
def faults(ends):
    return ends["faults"].result()


def test_the_example_and_2000_sequences_complete_in_20_jobs(whole):
    assert whole.first.code == 0, whole.first.output
    assert "Records     2,079 = 2,079 accepted + 0 duplicate + 0 rejected" in whole.first.output
    assert (whole.project.store / "report" / "index.html").exists()
    assert len(whole.jobs) >= 20
    assert set(whole.jobs["JobState"]) == {"COMPLETED"}


def test_a_second_submission_does_nothing(whole):
    assert "Nothing to be done" in whole.second.output
    assert whole.second.code == 0


def test_rules_of_the_model_get_one_gpu_each_and_no_others_do(whole):
    gpus = whole.jobs["TRES"].str.extract(r"gres/gpu=(\d+)")[0].fillna("0")
    assert set(gpus[whole.jobs["rule"].isin(GPU_RULES)]) == {"1"}
    assert set(gpus[~whole.jobs["rule"].isin(GPU_RULES)]) == {"0"}


def test_the_profiles_examples_are_what_a_site_gets(whole):
    """Account, partitions and model of GPU, as in the comment lines of the profile."""
    of_model = whole.jobs["rule"].isin(GPU_RULES)
    assert set(whole.jobs["Account"]) == {"my_account"}
    assert set(whole.jobs[of_model]["Partition"]) == {"gpu"}
    assert set(whole.jobs[~of_model]["Partition"]) == {"cpu"}
    assert all("gpu:a100:1" in tres for tres in whole.jobs[of_model]["TresPerJob"])


def test_two_jobs_embed_at_once_on_different_devices(whole):
    jobs = whole.jobs.assign(**{name: pd.to_datetime(whole.jobs[name]) for name in ("StartTime", "EndTime")})
    embed = [job | {"gpu": gpu_of(whole.project, job)} for job in jobs[jobs["rule"] == "embed"].to_dict("records")]
    at_once = [(a, b) for a, b in combinations(embed, 2) if overlap(a, b)]
    assert {frozenset((a["gpu"], b["gpu"])) for a, b in at_once} == {frozenset("01")}


def overlap(a, b) -> bool:
    """By more than the second that SLURM's times are rounded to."""
    return min(a["EndTime"], b["EndTime"]) - max(a["StartTime"], b["StartTime"]) > pd.Timedelta("1s")


def gpu_of(project, job) -> str:
    """The device that a job's log speaks of."""
    logs = [path.read_text() for path in (project.store / "logs" / "embed").iterdir()]
    (log,) = [log for log in logs if f"SLURM job {job['id']}, GPU " in log]
    return log.partition("GPU ")[2][0]


def test_logs_are_where_the_page_says(whole):
    logs = whole.project.store / "logs"
    assert {path.stem for path in (logs / "embed").iterdir()} == set(whole.project.jobs)
    assert {path.stem for path in (logs / "ingest").iterdir()} == {"many", "example"}
    assert not list((whole.project.folder / "logs" / "slurm").rglob("*.log"))  # kept of failed jobs only


def test_jobs_ask_for_what_the_plan_says(whole):
    planned = read_jobs(whole.project.store / "plan" / "jobs.tsv").set_index("job")
    for job in whole.jobs[whole.jobs["rule"] == "embed"].to_dict("records"):
        row = planned.loc[job["Comment"].rpartition("_")[2]]
        assert f"mem={row['mem_mb']}M" in job["TRES"]
        assert job["TimeLimit"] == f"00:{row['runtime_minutes']:02}:00"


def test_every_fault_ends_in_the_same_rows(faults, undisturbed):
    assert faults.end.code == 0, faults.end.output
    assert faults.project.contents() == undisturbed


def test_no_fault_costs_a_finished_shard(faults):
    after = faults.project.shards()
    for fault, before in faults.finished_before.items():
        assert before
        assert before.items() <= after.items(), fault


@pytest.mark.parametrize(
    ("fault", "states"),
    [
        ("term", ["FAILED", "COMPLETED"]),
        ("kill", ["FAILED or CANCELLED", "COMPLETED"]),  # whichever of the job and its step SLURM sees end first
        ("cancel", ["CANCELLED", "COMPLETED"]),
        ("walltime", ["TIMEOUT", "COMPLETED"]),
        ("memory", ["FAILED", "COMPLETED"]),
        ("requeue", ["COMPLETED"]),
        ("unknown", ["COMPLETED", "COMPLETED"]),
        ("controller", ["COMPLETED"]),
        ("node", ["COMPLETED"]),
    ],
)
def test_a_fault_was_real_and_the_job_was_tried_again(faults, fault, states):
    tries = faults.tries[fault][-len(states) :]  # SLURM itself loses one at times, before it comes to the fault
    for job, state in zip(tries, states, strict=True):
        assert job["JobState"] in state.split(" or ")


def test_slurms_own_log_of_a_failed_job_is_kept_and_says_why(faults):
    (log,) = (faults.project.folder / "logs" / "slurm" / "rule_embed" / faults.names["memory"]).iterdir()
    assert "memory limit" in log.read_text()


@pytest.mark.parametrize(("fault", "restarts"), [("requeue", "1"), ("node", "2")])
def test_a_requeued_job_goes_on_under_its_number(faults, fault, restarts):
    assert faults.tries[fault][-1]["Restarts"] == restarts


@pytest.mark.parametrize("fault", ["walltime", "memory"])
def test_a_retry_asks_for_more(faults, fault):
    first, second = faults.tries[fault]
    row = read_jobs(faults.project.store / "plan" / "jobs.tsv").set_index("job").loc[faults.names[fault]]
    assert f"mem={row['mem_mb']}M" in first["TRES"]
    assert f"mem={2 * row['mem_mb']}M" in second["TRES"]
    assert second["TimeLimit"] == f"{2 * row['runtime_minutes'] // 60:02}:{2 * row['runtime_minutes'] % 60:02}:00"


@pytest.mark.parametrize(
    ("end", "words", "asked", "advice"),
    [
        (
            "memory",
            r"killed for memory \({log}: .* exceeded memory limit \(\d+ > 419430400\), being killed",
            "400",
            "embed:mem_mb=800",
        ),
        ("walltime", r"out of time \({log}: .* CANCELLED AT \S+ DUE TO TIME LIMIT", r"\d+", "embed:runtime=60"),
        ("kill", r"killed by a signal \({log}: .died with <Signals.SIGKILL: 9>", r"\d+", "look for a watchdog"),
        ("cancel", r"cancelled in SLURM \({log}: .* CANCELLED AT", r"\d+", "run again, or with more --retries"),
    ],
)
def test_the_last_lines_say_how_a_job_ended_and_what_to_do(last_ends, end, words, asked, advice):
    job = last_ends.names[end]
    words = words.replace("{log}", rf"logs/slurm/rule_embed/{job}/\d+\.log")
    line = last_ends.lines[end]
    assert re.match(f"lengthwise: error: embed, job {job}: {words}", line), line
    assert re.search(f"; it had asked for mem_mb={asked}, runtime=30: .*{advice}", line), line


def test_a_killed_job_whose_retry_succeeds_is_no_failure(faults):
    assert "it had asked for" not in faults.end.output
    assert leftovers(faults.project.store) == []


def test_the_last_lines_name_each_job_once(last_ends):
    *errors, closing = last_ends.last_lines
    assert len(errors) == len(last_ends.names)
    assert closing.startswith("Finished work is kept: mend that")


def test_a_job_that_a_control_group_kills_is_named_and_the_advice_of_the_last_line_lets_it_finish(by_group):
    assert by_group.first.run.code != 0
    assert re.search(r'killed for memory \(\S+: "Detected \d+ oom[-_]kill event', by_group.first.lines["memory"])
    assert by_group.advised == "embed:mem_mb=600"
    assert by_group.second.code == 0, by_group.second.output


def test_the_login_node_sees_how_far_jobs_on_nodes_are(login):
    said = re.search(r" tiny: ([\d,]+) of ([\d,]+) residues .*, 0 of [\d,]+ jobs done, 2 running,", login.progress)
    assert said, login.progress
    done, total = (int(number.replace(",", "")) for number in said.groups())
    assert 0 < done < total


def test_a_second_run_at_once_is_refused_and_says_who_is_at_work(login):
    assert login.second_at_once.code != 0
    (line,) = login.second_at_once.errors
    assert "is at work in this store: let it finish" in line


def test_after_a_killed_login_process_the_refusal_says_what_to_do(login):
    assert login.without_unlock.code != 0
    (line,) = login.without_unlock.errors
    assert "was killed: run snakemake --unlock" in line


def test_gres_in_the_place_of_gpu_gives_each_job_a_device(login):
    assert all("gres/gpu=1" in job["TRES"] for job in login.last_jobs)
    assert not any("gres/gpu" in job["TRES"] for job in login.dead_jobs)


def test_a_new_run_beside_the_jobs_of_a_dead_one_computes_nothing_twice(login, undisturbed):
    assert login.last.code == 0, login.last.output
    assert {job["JobState"] for job in login.dead_jobs} == {"COMPLETED"}
    assert login.finished_before.items() <= login.project.shards().items()
    assert login.project.contents().items() <= undisturbed.items()
    for job, made in login.made.items():
        assert len(made) == 2
        assert sum(made) == len(login.project.shards_of(job))


@pytest.mark.huge
def test_five_hundred_jobs_of_one_protein_complete(cluster, tmp_path):
    """Says what Snakemake itself takes for a job."""
    project = ClusterProject.with_tiny_model(tmp_path / "project", a=random_sequences(MANY_JOBS, seed=5))
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", device="cpu", job_minutes=1e-9)
    run = Project(project.folder).snakemake("results/tiny/plan/jobs.tsv")
    assert run.code == 0, run.output
    assert len(project.jobs) == MANY_JOBS
    started = time.monotonic()
    submission = project.submit("results/tiny/datasets/a/manifest.json")
    _, status, usage = os.wait4(submission.process.pid, 0)
    seconds = time.monotonic() - started
    assert status == 0, submission.output
    assert len(submission.slurm_jobs("rule_embed/")) == MANY_JOBS
    warnings.warn(
        f"{MANY_JOBS} jobs: {seconds / MANY_JOBS:.2f} s each with {os.cpu_count()} cores for all of them;"
        f" the run itself takes {(usage.ru_utime + usage.ru_stime) / MANY_JOBS:.3f} s of a core and {usage.ru_maxrss >> 10} MiB",
        stacklevel=1,
    )
