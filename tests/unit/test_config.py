"""The config: the shipped file is valid, every key is documented, and every mistake is one line that names its key."""

import json
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lengthwise import config
from lengthwise.esm2.shapes import MODELS
from lengthwise.store import paths

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_PATH = ROOT / "workflow" / "schemas" / "config.schema.yaml"
SCHEMA = yaml.safe_load(SCHEMA_PATH.read_text())
README = ROOT / "config" / "README.md"


def validate(**values) -> dict:
    return config.validate({"inputs": ["in.fasta"], **values}, SCHEMA_PATH)


def properties(schema: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    for key, sub in schema.get("properties", {}).items():
        yield prefix + key, sub
        yield from properties(sub, f"{prefix}{key}.")


KEYS = dict(properties(SCHEMA))
# Their defaults are filled in with this policy alone: Snakemake would read every file again where a parameter is new.
WINDOW_KEYS = ["long_sequences.window_residues", "long_sequences.overlap"]


def test_the_shipped_config_is_valid_and_its_inputs_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = config.validate(yaml.safe_load(Path("config/config.yaml").read_text()), SCHEMA_PATH)
    assert config.datasets(shipped["inputs"]) == {"example": ["config/example.fasta"]}


@pytest.mark.parametrize("key", [key for key, sub in KEYS.items() if "default" in sub])
def test_a_key_left_out_has_the_default_of_the_schema(key):
    value, expected = validate(), KEYS[key]["default"]
    for step in key.split("."):
        value = value[step]
    subkeys = [f"{key}.{sub}" for sub in KEYS[key].get("properties", {})]
    nested = {sub.split(".")[-1]: KEYS[sub]["default"] for sub in subkeys if sub not in WINDOW_KEYS}
    assert value == (nested or expected)


def test_every_key_but_inputs_and_those_of_windows_has_a_default():
    assert [key for key, sub in KEYS.items() if "default" not in sub] == ["inputs", *WINDOW_KEYS]


def test_defaults_fill_in_beside_what_is_given_and_the_given_config_stays():
    given = {"inputs": ["in.fasta"], "long_sequences": {"policy": "skip"}}
    before = json.dumps(given)
    assert config.validate(given, SCHEMA_PATH)["long_sequences"] == {"policy": "skip", "max_residues": 1022}
    assert json.dumps(given) == before


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_described_in_the_schema(key):
    assert len(KEYS[key].get("description", "")) > 20


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_explained_in_the_readme(key):
    assert f"`{key.split('.')[-1]}`" in README.read_text()


@pytest.mark.parametrize("key", [key for key in KEYS if "." not in key])
def test_a_key_with_two_letters_swapped_is_named_and_the_right_one_suggested(refused, key):
    mistyped = key[1] + key[0] + key[2:]
    with refused("unknown key", repr(mistyped), f"did you mean {key!r}?"):
        validate(**{mistyped: 1})


def test_an_unknown_key_without_a_near_match_lists_all_keys(refused):
    with refused("unknown key 'zzz'", *(key for key in KEYS if "." not in key)) as caught:
        validate(zzz=1)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_nested_key_is_named_with_its_place(refused):
    with refused("unknown key 'long_sequences.polcy'", "did you mean 'policy'?"):
        validate(long_sequences={"polcy": "full"})


def test_a_config_without_inputs_names_the_missing_key(refused):
    with refused("'inputs' is missing"):
        config.validate({}, SCHEMA_PATH)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inputs", 5),
        ("inputs", None),
        ("inputs", []),
        ("inputs", {}),
        ("inputs", [5]),
        ("inputs", [""]),
        ("inputs", {"a": 5}),
        ("model", 8),
        ("model", "esm2_t6_8M"),
        ("model", "no/such/file.pt"),
        ("model", None),
        ("results", 1),
        ("results", ""),
        ("results", "{model}"),
        ("weights", ["w"]),
        ("weights", ""),
        ("device", "gpu"),
        ("device", 0),
        ("precision", "fp16"),
        ("precision", 16),
        ("storage_dtype", "bfloat16"),
        ("storage_dtype", None),
        ("layers", "last"),
        ("layers", 1.5),
        ("layers", True),
        ("layers", {"last": -1}),
        ("layers", None),
        ("layers", []),
        ("layers", ["last"]),
        ("layers", [1.5]),
        ("layers", [True]),
        ("layers", [1, 1]),
        ("outputs", "median"),
        ("exports", "h6"),
        ("outputs", []),
        ("outputs", ["mean", "mean"]),
        ("outputs", ["median"]),
        ("batch_tokens", "many"),
        ("batch_tokens", 2.5),
        ("batch_tokens", 15),
        ("job_minutes", "20"),
        ("job_minutes", 0),
        ("shard_bytes", "1G"),
        ("shard_bytes", 65_535),
        ("long_sequences", "skip"),
        ("long_sequences", None),
        ("long_sequences.policy", "split"),
        ("long_sequences.max_residues", 0),
        ("long_sequences.max_residues", "many"),
        ("letters", "keep"),
        ("letters.lowercase", "keep"),
        ("letters.j", "I"),
        ("letters.stop", "remove"),
        ("letters.gaps", "to_x"),
        ("letters.spaces", None),
        ("letters.digits", 1),
        ("duplicate_ids", "first"),
        ("nucleotides", True),
        ("strict", "yes"),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line_that_names_its_key(refused, key, value):
    for step in reversed(key.split(".")):
        value = {step: value}
    with refused("config: ", key):
        validate(**value)


@pytest.mark.parametrize("content", [None, [], "inputs", 5])
def test_a_file_that_is_no_mapping_is_one_line(refused, content):
    with refused("config: ", "'object'"):
        config.validate(content, SCHEMA_PATH)


def test_the_nearest_model_name_is_suggested(refused):
    with refused("did you mean 'esm2_t6_8M_UR50D'?"):
        validate(model="esm2_t6_8m_UR50D")


@pytest.mark.parametrize("model", ["demo", *MODELS])
def test_every_model_has_a_store_of_its_name(model):
    assert paths.store_name(validate(model=model)["model"]) == model


def test_a_checkpoint_given_by_path_has_a_store_of_its_stem(tiny_checkpoint):
    assert paths.store_name(validate(model=str(tiny_checkpoint))["model"]) == "tiny"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.fasta", "a"),
        ("in/a.fa", "a"),
        ("in/a.faa.gz", "a"),
        ("A.FASTA.GZ", "A"),
        ("a.pep.bgz", "a"),
        ("a.fasta.zst", "a"),
        ("UP000005640_9606.fasta.gz", "UP000005640_9606"),
        ("v1.2.fasta", "v1.2"),
        ("a.fasta.fasta", "a.fasta"),
        ("proteins", "proteins"),
        ("a.txt", "a.txt"),
        ("My proteins (new).fasta", "My_proteins__new_"),
        ("größe.fasta", "gr__e"),
        ("sp|P1.fasta", "sp_P1"),
        (".hidden.fasta", "hidden"),
        ("-rf.fasta", "rf"),
        (".fasta", "_"),
        ("...fasta", "_"),
    ],
)
def test_a_dataset_is_named_by_the_stem_of_its_file(path, name):
    assert paths.dataset_name(path) == name


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of FASTA files, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for path in ("a.fasta", "b.fasta.gz", "in/c.fa", "in/deep/d.fa", "other/a.faa", "odd[1].fasta"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (["a.fasta", "b.fasta.gz"], {"a": ["a.fasta"], "b": ["b.fasta.gz"]}),
        (["[ab].fasta*"], {"a": ["a.fasta"], "b": ["b.fasta.gz"]}),
        (["in/*"], {"c": ["in/c.fa"]}),
        (["in/**/*.fa"], {"c": ["in/c.fa"], "d": ["in/deep/d.fa"]}),
        (["a.fasta", "a.fasta", "./a.fasta"], {"a": ["a.fasta"]}),
        (["odd[1].fasta"], {"odd_1_": ["odd[1].fasta"]}),
        ({"x": "a.fasta", "y": "other/a.faa"}, {"x": ["a.fasta"], "y": ["other/a.faa"]}),
        ({"x": ["other/a.faa", "a.fasta"]}, {"x": ["other/a.faa", "a.fasta"]}),
        ({"x": "[ab].fasta*", "a": "a.fasta"}, {"x": ["a.fasta", "b.fasta.gz"], "a": ["a.fasta"]}),
        (
            {"x": ["b.*", "in/**/*.fa", "./b.fasta.gz", "a.fasta"]},
            {"x": ["b.fasta.gz", "in/c.fa", "in/deep/d.fa", "a.fasta"]},
        ),
        ({"x": "odd[1].fasta"}, {"x": ["odd[1].fasta"]}),
    ],
    ids=str,
)
def test_inputs_become_datasets(here, inputs, found):
    assert config.datasets(validate(inputs=inputs)["inputs"]) == found


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["none.fasta"], ["no file 'none.fasta'"]),
        ({"x": "none.fasta"}, ["no file 'none.fasta'"]),
        (["*.faa"], ["no file matches '*.faa'"]),
        (["in"], ["'in' is a folder", "in/*.fasta"]),
        (["in/"], ["'in/' is a folder", "'in/*.fasta'"]),
        (["a.fasta", "other/a.faa"], ["a.fasta", "other/a.faa", "'a'"]),
        (["**/a.*"], ["a.fasta", "other/a.faa", "'a'"]),
        ({"my proteins": "a.fasta"}, ["'my proteins'"]),
        ({"../up": "a.fasta"}, ["'../up'"]),
        ({"": "a.fasta"}, ["''"]),
        ({"x": ["a.fasta", "none.fasta"]}, ["no file 'none.fasta'"]),
        ({"x": ["a.fasta", "*.faa"]}, ["no file matches '*.faa'"]),
        ({"x": ["a.fasta", "in"]}, ["'in' is a folder"]),
        (["a.fasta", "other/a.faa"], ["a: [a.fasta, other/a.faa] makes them one dataset"]),
    ],
    ids=str,
)
def test_unusable_inputs_are_one_line(here, refused, inputs, words):
    with refused("config: inputs: ", *words):
        config.datasets(validate(inputs=inputs)["inputs"])


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (["none.fasta", "a.fasta"], {"none": ["none.fasta"], "a": ["a.fasta"]}),
        ({"x": ["a.fasta", "deep/none.fasta"]}, {"x": ["a.fasta", "deep/none.fasta"]}),
    ],
)
def test_inputs_that_another_workflow_makes_need_not_be_there(here, inputs, found):
    assert config.datasets(validate(inputs=inputs)["inputs"], may_be_made=True) == found


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["none/*.fasta"], ["no file matches"]),
        (["none{x}.fasta"], ["does not support"]),
        (["none.fasta", "other/none.fasta"], ["would both be the dataset 'none'"]),
        (["in"], ["'in' is a folder"]),
    ],
)
def test_inputs_that_another_workflow_makes_have_usable_names(here, refused, inputs, words):
    with refused("config: inputs: ", *words):
        config.datasets(validate(inputs=inputs)["inputs"], may_be_made=True)


@pytest.mark.parametrize("files", [[], {}, None, 5, [5], [""], {"y": "a.fasta"}, [["a.fasta"]]], ids=str)
def test_a_dataset_without_files_is_one_line(refused, files):
    with refused("config: inputs.x"):
        validate(inputs={"x": files})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inputs:\n  human: a.fasta\n  human: b.fasta\n", ["line 3", "'human'"]),
        ("inputs: [a.fasta]\nmodel: demo\n\ninputs: [b.fasta]\n", ["line 4", "'inputs'"]),
        ('{"inputs": {"x": "a", "x": "b"}}', ["line 1", "'x'"]),
        ('{\n\t"inputs": {"x": "a"},\n\t"inputs": {"x": "b"}}', ["line 3", "'inputs'"]),
        ("inputs:\n  - {a: 1, a: 2}\n", ["line 2", "'a'"]),
    ],
)
def test_a_key_that_is_there_twice_is_one_line(tmp_path, refused, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with refused(str(path), "is there twice", *words):
        config.require_distinct_keys(path)


@pytest.mark.parametrize(
    "text", ["", "a: {x: 1}\nb: {x: 1}\n", "a: &a {x: 1}\nb: {<<: *a, <<: *a, x: 2}\n", "[1, 1]", "a: [x, x]"]
)
def test_keys_that_are_there_once_are_fine(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    config.require_distinct_keys(tmp_path / "config.yaml")


def test_a_number_as_the_name_of_a_dataset_is_one_line(here, refused):
    with refused("config: inputs", "2024"):
        config.datasets(validate(inputs={2024: "a.fasta"})["inputs"])


def test_integers_as_text_of_the_command_line_become_numbers():
    """`--config layers=[-1,0] inputs=a.fasta` gives strings inside of lists."""
    given = {"inputs": "in.fasta", "layers": ["-1", "0"], "long_sequences": {"policy": "skip", "max_residues": "100"}}
    taken = config.validate(given, SCHEMA_PATH)
    assert (taken["inputs"], taken["layers"]) == (["in.fasta"], [-1, 0])
    assert taken["long_sequences"]["max_residues"] == 100


def test_a_tilde_in_a_path_is_a_home_folder(here, monkeypatch, tiny_checkpoint):
    (here / "tiny.pt").symlink_to(tiny_checkpoint)
    monkeypatch.setenv("HOME", str(here))
    taken = validate(inputs=["~/a.fasta", "~/in/*.fa"], results="~/results", weights="~/weights", model="~/tiny.pt")
    assert config.datasets(taken["inputs"]) == {"a": [f"{here}/a.fasta"], "c": [f"{here}/in/c.fa"]}
    assert {key: taken[key] for key in ("results", "weights", "model")} == {
        "results": f"{here}/results",
        "weights": f"{here}/weights",
        "model": f"{here}/tiny.pt",
    }
    assert validate(inputs={"x": "~/a.fasta"})["inputs"] == {"x": [f"{here}/a.fasta"]}
    assert validate(inputs={"x": ["a.fasta", "~/b.fasta"]})["inputs"] == {"x": ["a.fasta", f"{here}/b.fasta"]}
    assert validate(inputs="~/a.fasta")["inputs"] == [f"{here}/a.fasta"]
    user = pwd.getpwuid(os.getuid())
    assert validate(weights=f"~{user.pw_name}/weights")["weights"] == f"{user.pw_dir}/weights"


def test_a_path_without_a_leading_tilde_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    for path in ("results", "./x//y/", "a~", "in/~/b", "~no such user/c", "/d/../e"):
        taken = validate(inputs=[path], results=path, weights=path)
        assert (taken["inputs"], taken["results"], taken["weights"]) == ([path], path, path)


LISTS = [key for key, sub in KEYS.items() if "array" in {kind.get("type") for kind in sub.get("oneOf", [sub])}]


@pytest.mark.parametrize("key", LISTS)
def test_a_scalar_is_a_list_of_one(key):
    """`layers: -1` and `--config layers=-1`."""
    (scalar,) = {"inputs": ["a.fasta"], "layers": [-1], "outputs": ["mean"], "exports": ["pt"]}[key]
    assert config.validate({"inputs": ["in.fasta"], key: scalar}, SCHEMA_PATH)[key] == [scalar]
    assert config.validate({"inputs": ["in.fasta"], key: str(scalar)}, SCHEMA_PATH)[key] == [scalar]


def test_a_bare_off_which_yaml_reads_as_false_is_off(refused):
    for text in ("parity: off", 'parity: "off"', "parity: false"):
        assert validate(**yaml.safe_load(text))["parity"] == "off"
    assert (validate()["parity"], validate(parity="warn")["parity"]) == ("fail", "warn")
    with refused("parity: 'on' is not one of ['fail', 'warn', 'off']"):
        validate(parity="on")


def test_a_wrong_scalar_is_explained_like_a_wrong_item(refused):
    for value in ("last", ["last"]):
        with refused("config: layers: 'last' is not of type 'integer' (Which hidden layers to store"):
            validate(layers=value)
    with refused(
        "config: outputs: 'median' is not one of ['residue', 'mean', 'bos', ", "(What to store of each protein"
    ):
        validate(outputs="median")


@pytest.mark.parametrize("text", ["true", "True", "FALSE", "false"])
def test_booleans_as_text_of_the_command_line_become_booleans(text):
    """`--config strict=true` gives a string."""
    keys = [key for key, sub in KEYS.items() if sub.get("type") == "boolean"]
    taken = validate(**dict.fromkeys(keys, text))
    assert len(keys) > 2
    assert {key: taken[key] for key in keys} == dict.fromkeys(keys, text.lower() == "true")


def test_the_key_of_a_wrong_value_is_explained_in_a_whole_sentence(refused):
    with refused("(What happens to gaps, '-' and '.', in a sequence"):
        validate(letters={"gaps": "keep"})


def test_an_input_that_is_no_regular_file_is_one_line(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.fasta")
    with refused("config: inputs: ", "pipe.fasta", "is not a regular file"):
        config.datasets([str(tmp_path / "pipe.fasta")])


@pytest.mark.parametrize("name", ["a\nb.fasta", "a\rb.fasta"])
def test_a_line_break_in_an_inputs_name_is_one_line(tmp_path, refused, name):
    (tmp_path / name).write_text(">a\nM\n")
    for inputs in (
        [str(tmp_path / name)],
        [str(tmp_path / "*.fasta")],
        {"a": [str(tmp_path / name)]},
        ["none\n.fasta"],
    ):
        with refused("config: inputs", "line break", "rename it"):
            config.datasets(inputs)


@pytest.mark.parametrize("name", ["a{b}.fasta", "<c>.fasta"])
def test_names_that_snakemake_does_not_support_are_one_line(tmp_path, refused, name):
    (tmp_path / name).write_text(">a\nM\n")
    for inputs in ([str(tmp_path / name)], [str(tmp_path / "*.fasta")], {"a": [str(tmp_path / name)]}):
        with refused("config: inputs", name, "rename it"):
            config.datasets(inputs)


@pytest.mark.parametrize(
    ("export", "outputs", "missing"),
    [
        ("h5", ["mean"], "residue"),
        ("h5", ["residue"], "mean"),
        ("biotrainer", ["mean", "bos"], "residue"),
        ("parquet", ["residue", "bos"], "mean"),
    ],
)
def test_an_export_of_what_is_not_stored_is_refused(refused, export, outputs, missing):
    with refused("exports", export, f"'outputs' has no {missing}"):
        validate(exports=["pt", export], outputs=outputs)
    assert validate(exports=["pt"], outputs=outputs)["exports"] == ["pt"]


def test_datasets_that_differ_in_case_alone_are_refused_where_they_would_be_one_folder(tmp_path, refused, monkeypatch):
    config.require_own_folders(["Yeast", "yeast"], tmp_path / "results")
    monkeypatch.setattr(config, "ignores_case", lambda folder: folder == tmp_path / "results")
    with refused("'Yeast' and 'yeast' would be one folder", str(tmp_path / "results"), "rename one"):
        config.require_own_folders(["Yeast", "human", "yeast"], tmp_path / "results")
    config.require_own_folders(["Yeast", "human"], tmp_path / "results")
