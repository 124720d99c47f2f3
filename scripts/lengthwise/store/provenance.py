"""Provenance: what made the numbers, for a manifest, and in words for whoever finds a dataset's folder."""

import hashlib
import json

from lengthwise.store.shard import Shard
from lengthwise.system.text import count


def content_sha256(shard: Shard) -> str:
    """A shard's checksum without reading its rows: SHA-256 of its `offsets` and `crc32c` tensors, little-endian.

    A sequence's `crc32c` covers its digest, status and rows, so this covers all that the shard says of its sequences.
    """
    return hashlib.sha256(shard.read("offsets").tobytes() + shard.read("crc32c").tobytes()).hexdigest()


def makers(job_records: list[dict]) -> list[dict]:
    """Device, versions and parity receipt of what made a dataset's shards, each combination once, with its jobs."""
    found: dict[str, dict] = {}
    for job_record in job_records:
        maker = {key: job_record.get(key) for key in ("device", "versions", "parity")}
        found.setdefault(json.dumps(maker, sort_keys=True), {**maker, "jobs": []})["jobs"].append(job_record["job"])
    return list(found.values())


def readme(manifest: dict) -> str:
    """README.md of a dataset's folder: what is here, how to read it, and where the numbers come from."""
    settings, name = manifest["settings"], manifest["dataset"]
    random = "**RANDOM WEIGHTS: the model is a stand-in, and these embeddings mean nothing.**\n\n"
    return f"""# {name}: ESM-2 embeddings

{random if manifest["random_weights"] else ""}\
Embeddings of the proteins in {_code(manifest["input"])} by {_code(settings["model"])}, made with Lengthwise.
Row `i` of a protein's array is residue `i` of its sequence; the model's own BOS and EOS tokens are left out.

| | |
|---|---|
| records in the input | {manifest["records"]:,} |
| accepted: embedded | {manifest["accepted"]:,} |
| duplicate: the sequence of an earlier record, whose rows they share | {manifest["duplicate"]:,} |
| rejected: not embedded, `rejected.tsv` says why | {manifest["rejected"]:,} |
| residues of the distinct sequences | {manifest["residues"]:,} |
| layers, of 0 to {settings["num_layers"]} | {_list(settings["layers"])} |
| numbers in a row | {settings["embed_dim"]} |
| stored of each protein | {_stored(settings)} |

## Files

- `index.parquet`: every record of the input in its order: id, description, digest (GA4GH refget), length, status, reason, and the
  shard, the number in it and the first row of its embedding.
- `lookup.arrow`: what Lengthwise reads of that to find a record at once; it can be made from the index again.
- `rejected.tsv`: the rejected records and why.
- `manifest.json`: the numbers above, the settings, and what made them; there if and only if the dataset is complete.
- `exports/`, if there: the same embeddings in the layouts of other tools, each complete in itself.
- `../../shards/`: the embeddings themselves, in {len(manifest["shards"]):,} files that other datasets may share. **Without them
  there is nothing to read here**: copy or archive all of `../..`, or an export.

## Reading

With Lengthwise (`pip install` it from its repository), in this folder:

```python
import lengthwise

ds = lengthwise.open(".")
{_lengthwise_example(settings)}
```

With nothing but pandas and [safetensors](https://github.com/huggingface/safetensors):

```python
import pandas as pd
from safetensors import safe_open

records = pd.read_parquet("index.parquet", dtype_backend="pyarrow")
record = records[records["status"] != "rejected"].iloc[0]
with safe_open(f"../../shards/{{record.shard[:2]}}/{{record.shard}}.safetensors", "np") as shard:
{_safetensors_example(settings)}
```

## Where the numbers come from

- Input: {_code(manifest["input"])}, {manifest["input_bytes"]:,} bytes, SHA-256 `{manifest["input_sha256"]}`.
- Weights: {_code(manifest["weights"]["origin"])}, SHA-256 `{settings["weights_sha256"]}`.
- Computed in {settings["precision"]}; rows stored as {settings["storage_dtype"]}, pooled vectors as float32.
{chr(10).join(_made(maker) for maker in manifest["made_by"])}
- How records were treated: {_policy(manifest["policy"])}.
- Assembled {manifest["created"]}.

The same numbers again: Lengthwise with these lines in its config, on the same input.

```yaml
model: {json.dumps(settings["model"])}
model_sha256: {settings["weights_sha256"]}
precision: {settings["precision"]}
storage_dtype: {settings["storage_dtype"]}
layers: {settings["layers"]}
outputs: [{", ".join(settings["outputs"])}]
```

Lengthwise claims no rights in these files; the terms of the sequences and of the model are their owners'.
"""


def _code(text: str) -> str:
    """Text in a code span, whatever is in it."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _list(items: list) -> str:
    return ", ".join(map(str, items))


def _stored(settings: dict) -> str:
    words = {"residue": "a row for each residue", "mean": "the mean of its rows", "bos": "the BOS token's vector"}
    return _list([words[output] for output in settings["outputs"]])


def _lengthwise_example(settings: dict) -> str:
    lines = []
    if "residue" in settings["outputs"]:
        lines.append(f"ds[ds.ids[0]]  # (L, {settings['embed_dim']}) array of the first protein")
    pooled = [output for output in settings["outputs"] if output != "residue"]
    lines += [f'ds.pooled("{output}")  # (N, {settings["embed_dim"]}), a row for each of ds.ids' for output in pooled]
    return "\n".join([*lines, "ds.records  # all of index.parquet"])


def _safetensors_example(settings: dict) -> str:
    layer, lines = settings["layers"][0], []
    if "residue" in settings["outputs"]:
        lines.append(
            f'    rows = shard.get_slice("layer_{layer}")[record.row_start : record.row_start + record.length]'
        )
    pooled = [output for output in settings["outputs"] if output != "residue"]
    lines += [f'    {output} = shard.get_slice("{output}_{layer}")[record.sequence_no]' for output in pooled]
    return "\n".join(lines)


def _made(maker: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in maker["versions"].items() if version)
    parity = maker["parity"] or {"skipped": "made by an earlier version"}
    if "skipped" in parity:
        checked = f"not compared with fair-esm ({parity['skipped']})"
    else:
        lengths = _list([each["residues"] for each in parity["compared"]])
        checked = (
            f"compared with fair-esm in float32, sequences of {lengths} residues one at a time: largest error "
            f"{parity['max_error_over_rms']:.1g} of a layer's RMS, smallest cosine {parity['min_cosine']:.7f} ({parity['bound']})"
        )
    return f"- {count(len(maker['jobs']), 'job')} on {_code(maker['device'])} with {versions}; {checked}."


def _policy(policy: dict | None) -> str:
    if policy is None:
        return "not recorded (read by an earlier version)"
    flat = {key: value for key, value in policy.items() if key != "letters"} | policy["letters"]
    return ", ".join(f"{key} {value}" for key, value in flat.items())
