"""Every code block of the pages is run, or at least read by the program that it is for."""

import io
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import snakemake.cli
import yaml
from snakefmt.formatter import Formatter
from snakefmt.parser.parser import Snakefile

from lengthwise import __main__ as command_line
from lengthwise import config
from lengthwise.esm2.checkpoint import write_random, write_random_regression
from lengthwise.esm2.fair_esm_layout import contact_regression_path
from lengthwise.esm2.shapes import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("config/*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```([\w{}]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
READ_BY = {"python", "bash", "yaml", "snakemake", "{toctree}"}
OWN_TEST = {"python.md"}  # tests/unit/direct runs its Python, with a small checkpoint in the demo's place
# Programs that begin a line of a shell block, beside those that the tests below read: they come with the system.
OF_THE_SYSTEM = {"cd", "git", "pipx", "docker", "$EDITOR", "."}
PYTHON_PAGES = [page for page in PAGES if page.name not in OWN_TEST and "```python" in page.read_text()]
# Commands that read a store and end by themselves.
READERS = {"verify", "prune", "info"}
# A block that begins with this comment is a file of the reader's own: a script, a config with another program's keys.
OTHER_FILE = re.compile(r"# \S+\.(yaml|py)\b")


def blocks(language: str) -> list:
    """The blocks of a language, as parameters with names: page and number."""
    found = []
    for page in PAGES:
        for number, (name, text) in enumerate(BLOCK.findall(page.read_text())):
            if name == language:
                found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("&&", ";", "||", "|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


@pytest.fixture(scope="module")
def folder(small_store, tmp_path_factory) -> Path:
    """A folder in which results/demo holds the example with all outputs, embedded by a model of the demo's width."""
    folder = tmp_path_factory.mktemp("pages")
    shape = ModelConfig(1, 320, 20)
    write_random(folder / "wide.pt", shape)
    write_random_regression(contact_regression_path(folder / "wide.pt"), shape)
    made = small_store(folder / "wide.pt", folder, outputs=["residue", "mean", "logits", "contacts"])
    records = (ROOT / "config/example.fasta").read_text().split(">")[1:]
    made.ingest("example", dict(record.split("\n", 1) for record in records))
    made.run()
    (folder / "results/demo").symlink_to("tiny")
    return folder


def test_every_block_says_what_reads_it():
    unread = [
        f"{page.relative_to(ROOT)}: {name or 'no language'}"
        for page in PAGES
        for name, _ in BLOCK.findall(page.read_text())
        if name not in READ_BY
    ]
    assert unread == []


@pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_its_first_line_to_its_last(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    for name, text in BLOCK.findall(page.read_text()):
        if name == "python":
            code = compile(text, page.name, "exec")
            if not OTHER_FILE.match(text):
                exec(code, names)
    if page.name == "README.md":
        assert names["ds"]["P02135"].shape == (140, 320)  # as its comment says
        assert 0 < len(names["short"]) < len(names["ds"])


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_config_is_valid(text):
    keys = yaml.safe_load(text)
    if OTHER_FILE.match(text):
        keys = keys.get("lengthwise", {})  # below this key in the config of a workflow that has Lengthwise as a module
    config.validate({"inputs": ["proteins.fasta"]} | keys, SCHEMA)


@pytest.mark.parametrize("text", blocks("snakemake"))
def test_a_snakefile_is_read_by_snakefmt(text):
    assert Formatter(Snakefile(io.StringIO(text))).get_formatted()


@pytest.mark.parametrize("text", blocks("bash"))
def test_a_shell_block_is_read_by_what_it_calls(text, folder, monkeypatch, capsys):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    monkeypatch.chdir(ROOT)
    for words in commands(text):
        program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if program == "snakemake":
            snakemake.cli.parse_args(rest)
        elif program.startswith("python") and rest[:2] == ["-m", "lengthwise"]:
            options = command_line._parser().parse_args(rest[2:])
            if options.command in READERS:
                monkeypatch.chdir(folder)
                assert command_line.main(rest[2:]) == 0, capsys.readouterr().err
                monkeypatch.chdir(ROOT)
        elif program.startswith("python"):
            assert rest[0] in ("-m", "-c") or (ROOT / rest[0]).is_file(), words
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), words
        elif program.rpartition("/")[2] == "pip":
            asked = {name for extras in re.findall(r"\[(.*?)\]", " ".join(rest)) for name in extras.split(",")}
            assert asked <= EXTRAS.keys(), words
        else:
            assert program in OF_THE_SYSTEM or (ROOT / program).is_file(), words


def test_the_readme_is_read_in_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert len(re.findall(r"^pip install -e", text, re.MULTILINE)) == 2  # the lines that .ci/run runs


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_and_in_a_page(picture):
    assert picture.stat().st_size <= 200_000
    assert any(f"pictures/{picture.name})" in page.read_text() for page in PAGES)
