"""As a module of another workflow, from another folder, with a checkout that nobody may write to."""

import os
import re
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml
from project import ROOT, Project, of_file, served, wait_for

import lengthwise
from lengthwise.system.files import read_json
from lengthwise.system.locks import run_lock_holder

PARTS = ("workflow", "scripts", "envs")
TAG = "v1"
NOTHING = "Nothing to be done"


class Outer(Project):
    """A folder with another workflow, whose module this is."""

    @classmethod
    def over(cls, folder: Path, checkout: Path = ROOT, **inputs: list[bytes]) -> "Outer":
        made = cls.with_tiny_model(folder, **inputs)
        shutil.rmtree(folder / "config")
        made.checkout = checkout
        return made

    def configure(self, **config) -> None:
        """The other workflow's config, which has this one's under a key."""
        config = {"model": "tiny.pt", "scaling": False} | config
        (self.folder / "config.yaml").write_text(yaml.safe_dump({"samples": ["x"], "lengthwise": config}))

    def write(self, text: str, snakefile: Path | None = None) -> None:
        """The other Snakefile; MODULE stands for the two statements."""
        use = f"""
            module lengthwise:
                snakefile: {str(snakefile or self.checkout / "workflow" / "Snakefile")!r}
                config: config["lengthwise"]
            use rule * from lengthwise as lengthwise_*
        """
        text = textwrap.dedent(text).replace("MODULE", textwrap.dedent(use))
        (self.folder / "Snakefile").write_text("configfile: 'config.yaml'\n" + text)

    def command(self, *arguments: str) -> list[str]:
        command = super().command(*arguments)
        command[command.index("--snakefile") + 1] = str(self.folder / "Snakefile")
        return command

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def outer(tmp_path) -> Outer:
    made = Outer.over(tmp_path / "outer", a=[b"MKV", b"MKTAYIAK"])
    made.configure(inputs=["in/a.fasta"])
    return made


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


WORKFLOW = """
rule all:
    input: "counts.txt", "results/tiny/report/index.html"

rule translate:
    input: "b.txt"
    output: "made/b.fasta"
    shell: "cp {input} {output}"

MODULE

use rule plan from lengthwise as lengthwise_plan with:
    threads: 1

rule count:
    input:
        a="results/tiny/datasets/a/manifest.json",
        b=lengthwise.MANIFEST.format(dataset="b"),
    output: "counts.txt"
    script: "code/count.py"

onstart:
    lengthwise.onstart()

onsuccess:
    lengthwise.onsuccess()
"""
COUNT = """
from pathlib import Path
import lengthwise
lines = [f"{len(ds)} {ds[0].shape[1]}" for ds in (lengthwise.open(Path(path).parent) for path in snakemake.input)]
Path(snakemake.output[0]).write_text("\\n".join(lines))
"""


@pytest.mark.slow  # four runs: 40 s of processor
def test_another_workflow_makes_the_input_and_reads_the_dataset(tmp_path):
    """The default target stays the other's; a run after it finds nothing to do; an input that is made again is read again."""
    checkout = tmp_path / "outer/lengthwise"  # a submodule
    outer = Outer.over(tmp_path / "outer", checkout, a=[b"MKV", b"MKTAYIAK"])
    for part in PARTS:
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in checkout.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(checkout)
    outer.configure(inputs=["in/a.fasta", "made/b.fasta"])
    outer.write(WORKFLOW, Path("lengthwise/workflow/Snakefile"))
    (outer.folder / "code").mkdir()
    (outer.folder / "code/count.py").write_text(COUNT)
    (outer.folder / "b.txt").write_text(">b\nMKVL\n")

    first = outer.snakemake()
    assert first.code == 0, first.output
    assert first.rules["lengthwise_ingest"] == 2
    assert first.rules["count"] == first.rules["lengthwise_plan"] == first.rules["all"] == 1
    assert "Records     3 = 3 accepted" in first.output
    assert (outer.folder / "counts.txt").read_text().split() == ["2", "32", "1", "32"]
    assert read_json(outer.folder / ".snakemake/lengthwise.json")["folder"] == str(outer.folder)
    assert contents(checkout) == before

    second = outer.snakemake()
    assert (second.code, NOTHING in second.output, second.rules) == (0, True, {}), second.output
    assert "Records " not in second.output

    (outer.folder / "b.txt").write_text(">b\nMKVL\n>c\nMMKKLV\n")
    third = outer.snakemake()
    assert third.code == 0, third.output
    assert third.rules["lengthwise_ingest"] == third.rules["lengthwise_embed"] == third.rules["count"] == 1
    assert served(outer, "b") == of_file(outer.folder / "made/b.fasta")
    fourth = outer.snakemake()
    assert (fourth.code, NOTHING in fourth.output) == (0, True), fourth.output


def test_two_models_are_two_modules_and_one_store_is_one(outer):
    shutil.copy(outer.folder / "tiny.pt", outer.folder / "other.pt")
    two = """
        rule all:
            input: "results/tiny/datasets/a/manifest.json", "results/other/datasets/a/manifest.json"
        rule translate:
            output: "in/made.fasta"
            shell: "echo > {{output}}"
        MODULE
        module second:
            snakefile: {snakefile!r}
            config: config["lengthwise"] | dict({changes})
        use rule * from second as second_*
    """
    snakefile = str(ROOT / "workflow/Snakefile")
    outer.write(two.format(snakefile=snakefile, changes="model='other.pt', inputs={'a': 'in/made.fasta'}"))
    run = outer.snakemake("--dry-run")
    assert run.code == 0, run.output
    assert run.rules["lengthwise_plan"] == run.rules["second_plan"] == run.rules["translate"] == 1
    assert "runtime=<TBD>" in run.output  # of the input that has no size yet
    outer.write(two.format(snakefile=snakefile, changes="strict=True"))
    run = outer.snakemake("--dry-run")
    (line,) = run.errors
    assert run.code == 1
    assert "two modules" in line


def test_the_documented_example_is_planned(tmp_path):
    outer = Outer(tmp_path / "outer")
    outer.folder.mkdir()
    text = (ROOT / "docs/module.md").read_text()
    snakefile, config, script = re.findall(r"```(?:snakemake|yaml|python)\n(.*?)```", text, re.DOTALL)[:3]
    for name, content in {"Snakefile": snakefile, "config.yaml": config, "write_table.py": script}.items():
        (outer.folder / name).write_text(content)
    (outer.folder / "genes.fna").touch()
    (outer.folder / "translate.py").touch()
    (outer.folder / "lengthwise").symlink_to(ROOT)
    run = outer.snakemake("--dry-run")
    assert run.code == 0, run.output
    rules = [
        "all",
        "translate",
        "write_table",
        *(f"lengthwise_{name}" for name in ("fetch_model", "ingest", "plan", "assemble")),
    ]
    assert run.rules == dict.fromkeys(rules, 1)


def test_a_rule_called_forecast_is_no_forecast(outer):
    """A run holds the store's lock. The names of local rules are those that this workflow's rules have here."""
    outer.write("""
        rule forecast:
            output: "weather.txt"
            shell: "echo rain > {output}"
        MODULE
        print("local", *sorted(workflow._localrules), "default", workflow.default_target)
        print("gpu is", workflow.resource_scopes["gpu"])
    """)
    run = outer.snakemake("forecast")
    assert (run.code, run.rules) == (0, {"forecast": 1}), run.output
    assert (outer.store / "run.lock").exists()
    local = "lengthwise_all lengthwise_fetch_model lengthwise_forecast"
    assert f"local {local} default forecast" in run.output.splitlines()
    assert "gpu is local" in run.output.splitlines()


def test_the_other_workflows_failure_is_its_own(outer):
    """Also where it calls this one's `onerror`."""
    outer.write("""
        MODULE
        rule broken:
            output: "never.txt"
            log: "broken.log"
            shell: "echo 'Fatal Python error: Segmentation fault' > {log}; kill -9 $$"
        onerror:
            lengthwise.onerror()
    """)
    run = outer.snakemake("broken")
    assert (run.code, run.errors) == (1, []), run.output
    assert "Snakemake's lines above say why" in run.output


def test_a_run_that_was_killed_is_explained_once(outer):
    """Without `onstart`, and with two modules."""
    shutil.copy(outer.folder / "tiny.pt", outer.folder / "other.pt")
    outer.write(f"""
        rule sleep:
            output: "never.txt"
            shell: "touch asleep; sleep 100"
        MODULE
        module second:
            snakefile: {str(ROOT / "workflow/Snakefile")!r}
            config: config["lengthwise"] | dict(model="other.pt")
        use rule * from second as second_*
    """)
    first = outer.begin()
    try:
        wait_for((outer.folder / "asleep").exists)
        refused = outer.snakemake()
        (line,) = refused.errors
        assert f"process {first.pid}" in line
        assert "is at work in this store" in line
        first.kill()
        first.wait()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    wait_for(lambda: run_lock_holder(outer.store) is None)
    (line,) = outer.snakemake().errors
    assert f"(process {first.pid}) was killed: run snakemake --unlock" in line


def test_an_input_that_no_rule_makes_is_missing(outer):
    outer.configure(inputs=["in/a.fasta", "in/typo.fasta"])
    outer.write("MODULE")
    run = outer.snakemake("--dry-run", "lengthwise_all")
    assert run.code == 1
    assert "MissingInputException in rule lengthwise_ingest" in run.output
    assert "in/typo.fasta" in run.output


@pytest.mark.parametrize(
    "moved", ['prefix: "up"', 'replace_prefix: {"results/": "up/"}', 'replace_prefix: {"in/": "up/"}']
)
def test_a_modules_prefix_for_paths_is_refused(outer, moved):
    outer.write("MODULE")
    text = (outer.folder / "Snakefile").read_text()
    (outer.folder / "Snakefile").write_text(text.replace("    config:", f"    {moved}\n    config:"))
    run = outer.snakemake("--list-rules")
    (line,) = run.errors
    assert run.code == 1
    assert "prefix" in line


@pytest.fixture
def hosted(outer, tmp_path) -> Outer:
    """`github(...)`, whose address git takes from a repository on this machine."""
    pytest.importorskip("git")
    repository, name = tmp_path / "repository", "someone/lengthwise"
    for part in PARTS:
        shutil.copytree(ROOT / part, repository / part, ignore=shutil.ignore_patterns("__pycache__"))
    outer.write("MODULE")
    text = (outer.folder / "Snakefile").read_text()
    fetched = f'github("{name}", path="workflow/Snakefile", tag="{TAG}")'
    (outer.folder / "Snakefile").write_text(text.replace(repr(str(ROOT / "workflow/Snakefile")), fetched))
    settings = {f"url.file://{repository}.insteadOf": f"https://github.com/{name}", "safe.directory": "*"}
    git = {"GIT_CONFIG_COUNT": str(len(settings)), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for i, (key, value) in enumerate(settings.items()):
        git |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}

    class Hosted(Outer):
        extra: dict[str, str]

        @property
        def environment(self) -> dict[str, str]:
            return super().environment | git | self.extra

        def commit(self) -> None:
            for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"], ["tag", "-f", TAG]):
                author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
                subprocess.run(["git", *author, *arguments], cwd=repository, check=True, capture_output=True)

    made = Hosted(outer.folder)
    made.extra = {"PYTHONPATH": str(ROOT / "scripts")}
    made.repository = repository
    return made


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_fetched_copy_runs_on_the_installed_package(hosted):
    hosted.commit()
    run = hosted.snakemake("results/tiny/inputs/a/records.parquet")
    assert (run.code, run.rules) == (0, {"lengthwise_ingest": 1}), run.output


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("case", ["absent", "other version", "conda"])
def test_a_fetched_copy_without_its_package_is_one_line(hosted, case):
    arguments, words = [], f"pip install 'lengthwise[workflow] @ git+https://github.com/someone/lengthwise@{TAG}'"
    if case == "absent":
        hosted.extra = {"PYTHONPATH": str(ROOT / "tests/bare"), "LENGTHWISE_WITHOUT": "module:lengthwise"}
    elif case == "other version":
        version = hosted.repository / "scripts/lengthwise/_version.py"
        version.write_text(version.read_text().replace(lengthwise.__version__, "9.8.7"))
    else:
        arguments, words = ["--software-deployment-method", "conda"], "the path of a clone"
    hosted.commit()
    run = hosted.snakemake("--list-rules", *arguments)
    (line,) = run.errors
    assert run.code == 1
    assert words in line
    assert ("9.8.7" in line) == (case == "other version")
