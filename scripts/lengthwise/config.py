"""The config: validation against its schema, default values, and the datasets of its inputs."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import TRAINED_RESIDUES
from lengthwise.esm2.sources import require_model, require_secure
from lengthwise.store.paths import dataset_name
from lengthwise.store.settings import EXPORT_OUTPUTS, WINDOWED_OUTPUTS
from lengthwise.system.files import ignores_case
from lengthwise.system.text import did_you_mean


def validate(config: dict, schema_path: Path) -> dict:
    """Check a config and fill in its default values.

    Parameters
    ----------
    config
        The config as read from YAML and the command line; it is not changed.
    schema_path
        The JSON schema, as YAML.

    Returns
    -------
    dict
        The config with a value for every key.

    Raises
    ------
    LengthwiseError
        An unknown key, a wrong type, a value out of range, or values that contradict each other. The message names the
        first such key.
    """
    schema = yaml.safe_load(Path(schema_path).read_text())
    config = _coerce(config, schema)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(config)
    if error := jsonschema.exceptions.best_match(errors):
        raise LengthwiseError(f"config: {_explain(error, schema)}")
    filled = _with_defaults(config, schema)
    _require_model(filled["model"])
    require_secure(filled["weights_url"])
    filled["long_sequences"] = _long_sequences(filled["long_sequences"], filled["outputs"])
    filled["contact_regression"] |= "contacts" in filled["outputs"]
    for export in filled["exports"]:
        if missing := [output for output in EXPORT_OUTPUTS[export] if output not in filled["outputs"]]:
            raise LengthwiseError(
                f"config: exports: {export} needs the outputs {' and '.join(EXPORT_OUTPUTS[export])}, but 'outputs' has no "
                f"{missing[0]}; take {export} out, or store that too"
            )
    return filled


def _long_sequences(policy: dict, outputs: list[str]) -> dict:
    """The policy for long sequences.

    Windows have the length that ESM-2 was trained on and share a quarter unless it says otherwise.

    Raises
    ------
    LengthwiseError
        Windows would not get on, or an output cannot be joined from windows.
    """
    if policy["policy"] != "window":
        return policy
    policy = {"window_residues": TRAINED_RESIDUES, **policy}
    policy = {"overlap": policy["window_residues"] // 4, **policy}
    if policy["overlap"] >= policy["window_residues"]:
        raise LengthwiseError(
            f"config: long_sequences: overlap: {policy['overlap']} is not less than window_residues "
            f"({policy['window_residues']}); make it less, half of it at most is usual"
        )
    if unfit := [output for output in outputs if output not in WINDOWED_OUTPUTS]:
        raise LengthwiseError(
            f"config: long_sequences: {unfit[0]} cannot be joined from windows; take it out of 'outputs', or set another policy"
        )
    if "residue" not in outputs:
        raise LengthwiseError(
            f"config: long_sequences: {outputs[0]} of a protein in windows is that of its joined rows; add residue to 'outputs'"
        )
    return policy


def _require_model(model: str) -> None:
    try:
        require_model(model)
    except LengthwiseError as error:
        raise LengthwiseError(f"config: model: {error}") from error


def require_distinct_keys(path: Path) -> None:
    """Refuse a config file that names a key twice: YAML takes the last one, and a dataset would be lost silently.

    Raises
    ------
    LengthwiseError
        There is such a key.
    """
    text = path.read_text(encoding="utf-8").replace("\t", " ")  # JSON may be indented with tabs, YAML may not
    todo = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: set[str] = set()
        for key, value in node.value:
            todo.append(value)
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                raise LengthwiseError(
                    f"{path}: line {key.start_mark.line + 1}: the key {key.value!r} is there twice, and only one of the two "
                    "would count; rename one, or write both values under one key"
                )
            seen.add(str(key.value))


def datasets(inputs: list[str] | dict[str, list[str]], may_be_made: bool = False) -> dict[str, list[str]]:
    """Return {dataset: paths of its FASTA files, in order} for the config's inputs, with globs expanded.

    Of a list, each file is a dataset. Of a mapping, all files under a name are one. With `may_be_made` a file that is named in
    full need not be there yet.

    Raises
    ------
    LengthwiseError
        A file is missing, unreadable or not a regular file; a glob matches nothing; two files would be one dataset; a name
        is invalid.
    """
    if isinstance(inputs, dict):
        for name in inputs:
            if not isinstance(name, str) or dataset_name(name) != name:
                raise LengthwiseError(
                    f"config: inputs: the name {name!r} should consist of A-Z a-z 0-9 . _ -, quoted, and begin with a letter"
                )
        return {name: _distinct(_expand(patterns, may_be_made)) for name, patterns in inputs.items()}
    found: dict[str, list[str]] = {}
    for path in _expand(inputs, may_be_made):
        name = dataset_name(path)
        (other,) = found.setdefault(name, [path])
        if os.path.realpath(other) != os.path.realpath(path):
            raise LengthwiseError(
                f"config: inputs: {other} and {path} would both be the dataset {name!r}; rename one, or write inputs as a "
                f"mapping of names to paths ({name}: [{other}, {path}] makes them one dataset)"
            )
    return found


def _expand(patterns: list[str], may_be_made: bool) -> Iterator[str]:
    """The files of paths and globs; those of a glob in alphabetical order."""
    for pattern in patterns:
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
            if not paths:
                raise LengthwiseError(f"config: inputs: no file matches {pattern!r}")
        else:
            paths = [pattern]
        for path in paths:
            _require_name(path)
            if os.path.exists(path) or not may_be_made:
                _require_file(path)
            yield path


def _distinct(paths: Iterable[str]) -> list[str]:
    """Each file once, at its first place: a glob may match a file that is named too."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def require_own_folders(names: Iterable[str], results: Path) -> None:
    """Refuse datasets whose folders would be one: their names differ in case alone, and `results` ignores that.

    Raises
    ------
    LengthwiseError
        There are two such datasets.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(name.casefold(), name)
        if other != name and ignores_case(results):
            raise LengthwiseError(
                f"config: inputs: the datasets {other!r} and {name!r} would be one folder: the file system of {results} ignores "
                "case; rename one, or write inputs as a mapping of names to paths"
            )


def _require_name(path: str) -> None:
    if "\n" in path or "\r" in path:
        raise LengthwiseError(f"config: inputs: {path!r}: a file name must not contain a line break; rename it")
    if set(path) & set("{}<>"):
        raise LengthwiseError(
            f"config: inputs: {path!r}: Snakemake does not support {{ }} < > in a file name; rename it"
        )


def _require_file(path: str) -> None:
    if os.path.isdir(path):
        raise LengthwiseError(
            f"config: inputs: {path!r} is a folder; write {path.rstrip('/') + '/*.fasta'!r} for its files"
        )
    if os.path.exists(path) and not os.path.isfile(path):
        raise LengthwiseError(f"config: inputs: {path!r} is not a regular file; write its content into a regular file")
    if not os.path.isfile(path):
        raise LengthwiseError(f"config: inputs: there is no file {path!r}")
    if not os.access(path, os.R_OK):
        raise LengthwiseError(f"config: inputs: {path!r} cannot be read by this user; change its permissions")


def _coerce(value: Any, schema: dict) -> Any:
    """Convert a config's values to what the schema means.

    A scalar in the place of a list becomes a list of one. Text that --config left becomes integers and booleans. YAML reads a
    bare `off` as false. `~` and `~user` in paths become home folders.
    """
    kinds = {kind.get("type"): kind for kind in schema.get("oneOf", [schema])}
    if "array" in kinds and isinstance(value, str | int | float):
        value = [value]
    if isinstance(value, dict):
        mapping = kinds.get("object", {})
        keys, others = mapping.get("properties", {}), mapping.get("additionalProperties") or {}
        return {key: _coerce(sub, keys.get(key, others)) for key, sub in value.items()}
    if isinstance(value, list):
        return [_coerce(item, kinds.get("array", {}).get("items", {})) for item in value]
    if "integer" in kinds and isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if "boolean" in kinds and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value is False and "off" in schema.get("enum", ()):
        return "off"
    return os.path.expanduser(value) if schema.get("format") == "path" and isinstance(value, str) else value


def _with_defaults(values: dict, schema: dict) -> dict:
    filled = dict(values)
    for key, sub in schema.get("properties", {}).items():
        if key not in filled and "default" in sub:
            filled[key] = sub["default"]
        if isinstance(filled.get(key), dict) and "properties" in sub:
            filled[key] = _with_defaults(filled[key], sub)
    return filled


def _explain(error: jsonschema.ValidationError, schema: dict) -> str:
    """One line that names the key, the mistake and, from the schema, what is expected."""
    where = ".".join(str(step) for step in error.absolute_path if not isinstance(step, int))
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        path = f"{where}.{unknown}" if where else unknown
        return f"unknown key {path!r};{did_you_mean(str(unknown), known)} the keys are {', '.join(known)}"
    if error.validator == "required":
        key = next(key for key in error.validator_value if key not in error.instance)
        return f"the key {f'{where}.{key}' if where else key!r} is missing"
    expected = _description(error, schema).split(". ")[0].rstrip(".")
    return f"{where or 'the whole file'}: {error.message.splitlines()[0][:200]}" + (
        f" ({expected})" if expected else ""
    )


def _description(error: jsonschema.ValidationError, schema: Any) -> str:
    """The schema's description of the key that the error is in; a list's items have none of their own."""
    found = schema.get("description", "")
    for step in error.absolute_schema_path:
        schema = schema[step]
        found = schema.get("description", found) if isinstance(schema, dict) else found
    return found
