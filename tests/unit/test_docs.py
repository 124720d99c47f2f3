"""Snakemake commands in docs, comments and messages do what they say."""

import re
from pathlib import Path

import snakemake.cli

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    path
    for pattern in ("*.md", "config/*.md", "docs/*.md", "workflow/**/*", "scripts/**/*")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".md", ".py", ".smk", ".rst", ".yaml", ".html", ".j2")
]
# The program's name, and the words up to a punctuation mark.
COMMAND = re.compile(r"\bsnakemake((?: +(?:'[^']+'|[-\w=./:\[\]]*[-\w=/\]]))+)")
RULE = re.compile(r"^(?:rule|checkpoint) (\w+):", re.MULTILINE)


def test_snakemake_takes_the_target_of_every_example_for_a_target(monkeypatch):
    """--config, --configfile, --resources and others take all words that follow them: a target comes first."""
    monkeypatch.chdir(ROOT)
    rules = {name for path in ROOT.glob("workflow/rules/*.smk") for name in RULE.findall(path.read_text())}
    seen, wrong = [], []
    for path in TEXTS:
        for found in COMMAND.finditer(text := path.read_text()):
            words = found[1].replace("'", "").split()
            if not (rules & {*words} or words[0].startswith("-")) or text.startswith(" <", found.end()):
                continue  # prose, "run snakemake again", or a placeholder
            options = snakemake.cli.parse_args(words)[1]
            targets = {*options.targets}
            seen.append(words)
            if not rules & {*words} <= targets | {*options.forcerun} or (targets and words[0] not in targets):
                wrong.append(f"{path.relative_to(ROOT)}: {found[0]}")
    assert wrong == []
    assert ["forecast", "--configfile", "other.yaml"] in seen
    assert len(seen) > 20


def test_a_target_after_a_config_file_is_taken_for_another_config_file():
    assert snakemake.cli.parse_args(["--configfile", "other.yaml", "forecast"])[1].targets == set()
