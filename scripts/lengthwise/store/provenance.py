"""Provenance: what made the numbers, for a dataset's manifest and its README.md."""

import hashlib
import json
from pathlib import Path

from lengthwise.esm2.tensors import POOLED
from lengthwise.store.shard import Shard
from lengthwise.system.text import count

_STORED_TEXTS = {
    "residue": "a row for each residue",
    "mean": "the mean of its rows",
    "bos": "the BOS token's vector",
    "max": "the maximum of its rows in each channel",
    "std": "the standard deviation of its rows in each channel",
    "logits": "a logit for each residue and token, and its pseudo-perplexity",
    "contacts": "a probability of contact for each pair of residues",
}


def content_sha256(shard: Shard) -> str:
    """The checksum of a shard: SHA-256 of its `offsets` and `crc32c` tensors, little-endian.

    A sequence's `crc32c` covers its digest, status and rows. So this checksum covers the whole shard without reading its rows.
    """
    return hashlib.sha256(shard.read("offsets").tobytes() + shard.read("crc32c").tobytes()).hexdigest()


def makers(job_records: list[dict]) -> list[dict]:
    """The distinct combinations of device, versions and parity receipt among job records, each with the names of its jobs."""
    found: dict[str, dict] = {}
    for job_record in job_records:
        maker = {key: job_record.get(key) for key in ("device", "versions", "parity")}
        found.setdefault(json.dumps(maker, sort_keys=True), {**maker, "jobs": []})["jobs"].append(job_record["job"])
    return list(found.values())


def readme(manifest: dict) -> str:
    """README.md of a dataset's folder, from `dataset_readme.md.j2`: the files, how to read them, where the numbers come from.

    Parameters
    ----------
    manifest
        The dataset's manifest.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {
        "code_span": _code_span,
        "json": json.dumps,
        "maker_line": _maker_line,
        "policy_text": _policy_text,
        "thousands": "{:,}".format,
    }
    outputs = manifest["settings"]["outputs"]
    return environment.get_template("dataset_readme.md.j2").render(
        manifest,
        stored=[_STORED_TEXTS[output] for output in outputs],
        pooled_outputs=[output for output in outputs if output in POOLED],
    )


def _code_span(text: str) -> str:
    """Text as one Markdown code span, also if it has backticks or line breaks."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _maker_line(maker: dict) -> str:
    """A line of the README for one of `makers`."""
    versions = ", ".join(f"{name} {version}" for name, version in maker["versions"].items() if version)
    parity = maker["parity"] or {"skipped": "made by an earlier version"}
    if "skipped" in parity:
        comparison = f"not compared with fair-esm ({parity['skipped']})"
    else:
        lengths = ", ".join(str(sequence["residues"]) for sequence in parity["compared"])
        comparison = f"compared with fair-esm, sequences of {lengths} residues: {_parity_in_words(parity)}"
    return f"{count(len(maker['jobs']), 'job')} on {_code_span(maker['device'])} with {versions}; {comparison}."


def _parity_in_words(parity: dict) -> str:
    if "stored" not in parity:  # by an earlier version, in float32
        return (
            f"largest error {parity['max_error_over_rms']:.1g} of a layer's RMS, smallest cosine {parity['min_cosine']:.7f} "
            f"({parity['bound']})"
        )
    if "miss" in parity:
        return f"MISSED, {parity['miss']}"
    parts = {"its rounding explains all errors of the engine": parity["engine"], "of the stored rows": parity["stored"]}
    return " and ".join(f"{what} ({part['share_of_limit']:.0%} of the limit)" for what, part in parts.items() if part)


def _policy_text(policy: dict | None) -> str:
    if policy is None:
        return "not recorded (read by an earlier version)"
    flat = {key: value for key, value in policy.items() if key != "letters"} | policy["letters"]
    return ", ".join(f"{key} {value}" for key, value in flat.items())
