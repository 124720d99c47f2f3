"""The engines of the benchmark."""

import importlib.util
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.config import ModelConfig
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import AUTO_BATCH_TOKENS, Engine, Output
from lengthwise.esm2.tokens import PAD, tokenize
from lengthwise.ingest.digests import digest

SHARD_BYTES = 1 << 30  # the config's default

EXTRACT_TOKENS = 4_096  # extract.py's --toks_per_batch

Rows = list[np.ndarray]  # of each sequence, [L, D]


@dataclass
class Contender:
    """An engine in the run. `load` returns what embeds a list of sequences, shortest first, and gives the last layer's rows."""

    engine: str
    precision: str
    load: Callable[[], Callable[[list[bytes]], Rows]]
    run: Callable[[list[bytes]], Rows] | None = None
    load_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    own_bytes: int = 0  # what it holds on a GPU between runs
    peak_bytes: int | None = None


@torch.inference_mode()
def reference(weights: Path, sequences: list[bytes], device: torch.device) -> Rows:
    """fair-esm's own last layer in float32, one sequence at a time: [L, D] of each."""
    model = checkpoint.reference_model(weights).to(device)
    rows = []
    for sequence in sequences:
        tokens = torch.from_numpy(tokenize(sequence)).long()[None].to(device)
        result = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
        rows.append(result[0, 1:-1].cpu().numpy())
    return rows


def contenders_of(
    weights: Path, config: ModelConfig, device: torch.device, say: Callable[[str], None]
) -> Iterator[Contender]:
    yield Contender("fair-esm extract.py", "float32", lambda: _extract_loop(weights, device))
    half = "float16" if device.type == "cuda" else "bfloat16"
    if importlib.util.find_spec("transformers"):
        for precision in ("float32", half) if device.type == "cpu" else (half,):
            yield Contender("transformers", precision, lambda p=precision: _transformers(weights, config, device, p))
    if importlib.util.find_spec("esm_cpp") and importlib.util.find_spec("transformers") and device.type == "cpu":
        yield Contender("esm-cpp", "float32", lambda: _esm_cpp(weights, config))
    cuda = device.type == "cuda"
    for precision in ("float32", "float16", "bfloat16") if cuda else ("float32", "bfloat16"):
        yield Contender("Lengthwise", precision, lambda p=precision: _lengthwise(weights, config, device, p))
    production = "float16" if cuda else "float32"
    yield Contender(
        "Lengthwise, means alone", production, lambda: _lengthwise(weights, config, device, production, ("mean",))
    )
    try:
        import lengthwise.jobs.embed_job  # noqa: F401
    except ImportError as error:  # missing, or (pyarrow) built for another numpy than the peers'
        say(f"left out, rows written to disk: {error}")
    else:
        yield Contender("Lengthwise, to disk", production, lambda: _to_disk(weights, config, device, production))


def _engine(weights: Path, config: ModelConfig, device: torch.device, precision: str, outputs: tuple[str, ...]):
    output = Output((config.num_layers,), outputs, "float32" if precision == "float32" else "float16")
    engine = Engine(weights, device, precision, output, compile=True)
    return engine, engine.auto_batch_tokens()


def _lengthwise(weights, config, device, precision, outputs=("residue",)):
    engine, batch_tokens = _engine(weights, config, device, precision, outputs)

    def run(sequences: list[bytes]) -> Rows:
        lengths, rows = np.array([len(sequence) for sequence in sequences]), []
        bounds = list(cut_batches(lengths, batch_tokens))
        results = engine.embed(sequences[start:stop] for start, stop in bounds)
        for (start, stop), result in zip(bounds, results, strict=True):
            if "mean" in outputs:
                rows += list(result.arrays[f"mean_{config.num_layers}"][:, None])
            else:
                rows += np.split(result.arrays[f"layer_{config.num_layers}"], np.cumsum(lengths[start : stop - 1]))
        return rows

    return run


def _to_disk(weights: Path, config: ModelConfig, device: torch.device, precision: str):
    """Production's own way, shards written and synced, into a folder for temporary files; the last run's are removed."""
    from lengthwise.jobs.pipeline import Progress, ShardPipeline
    from lengthwise.plan.work_orders import PlannedShard
    from lengthwise.store.paths import shard_path
    from lengthwise.store.shard import Shard

    engine, batch_tokens = _engine(weights, config, device, precision, ("residue",))
    layer, folder = config.num_layers, tempfile.TemporaryDirectory()
    settings = {"layers": [layer], "outputs": ["residue"], "embed_dim": config.embed_dim, "fingerprint": ""}
    settings["storage_dtype"] = engine.output.storage_dtype
    runs = itertools.count()

    def run(sequences: list[bytes]) -> Rows:
        store = Path(folder.name) / str(next(runs))
        shutil.rmtree(store.with_name(str(int(store.name) - 1)), ignore_errors=True)
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        row_bytes = config.embed_dim * np.dtype(settings["storage_dtype"]).itemsize
        numbers = lengths.cumsum(dtype=np.int64) * row_bytes // SHARD_BYTES
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
        shards = [
            PlannedShard(
                f"{start:032x}",
                [digest(s) for s in sequences[start:stop]],
                lengths[start:stop],
                sequences[start:stop],
            )
            for start, stop in itertools.pairwise(bounds)
        ]
        with ShardPipeline(store, settings, engine, Progress("benchmark", int(lengths.sum()))) as walk:
            walk.make(shards[::-1], batch_tokens)
        made = [Shard(shard_path(store, shard.name)) for shard in shards]
        return [rows for one in made for rows in np.split(one[f"layer_{layer}"], one["offsets"][1:-1])]

    return run


def _extract_loop(weights: Path, device: torch.device):
    """The loop of fair-esm's scripts/extract.py with its defaults, but for the files that it writes."""
    from esm.data import FastaBatchedDataset

    model = checkpoint.reference_model(weights).to(device)
    convert, layer = model.alphabet.get_batch_converter(), model.num_layers

    @torch.no_grad()
    def run(sequences: list[bytes]) -> Rows:
        dataset = FastaBatchedDataset([str(i) for i in range(len(sequences))], [s.decode() for s in sequences])
        batches = dataset.get_batch_indices(EXTRACT_TOKENS, extra_toks_per_seq=1)
        loader = torch.utils.data.DataLoader(dataset, collate_fn=convert, batch_sampler=batches)
        rows: Rows = [None] * len(sequences)
        for labels, strings, tokens in loader:
            result = model(tokens.to(device, non_blocking=True), repr_layers=[layer], return_contacts=False)
            hidden = result["representations"][layer].to("cpu")  # [N, L, D]
            for i, label in enumerate(labels):
                rows[int(label)] = hidden[i, 1 : len(strings[i]) + 1].clone().numpy()
        return rows

    return run


def _hugging_face_names(weights: Path) -> dict[str, torch.Tensor]:
    """A fair-esm checkpoint's encoder under the names that Hugging Face gives it."""
    parts = {
        "self_attn_layer_norm": "attention.LayerNorm",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn.rot_emb": "attention.self.rotary_embeddings",
        "final_layer_norm": "LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in checkpoint.read(weights)[1].items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            renamed[f"encoder.layer.{number}.{parts[part]}.{kind}"] = tensor
        elif name.startswith("emb_layer_norm_after"):
            renamed[f"encoder.{name}"] = tensor
        elif name == "embed_tokens.weight":
            renamed["embeddings.word_embeddings.weight"] = tensor
    return renamed


def _hugging_face_config(config: ModelConfig):
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=config.vocabulary_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.attention_heads,
        intermediate_size=4 * config.embed_dim,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        pad_token_id=PAD,
        mask_token_id=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )


def _transformers(weights: Path, config: ModelConfig, device: torch.device, precision: str):
    from transformers import EsmModel

    model = EsmModel(_hugging_face_config(config), add_pooling_layer=False)
    missing = model.load_state_dict(_hugging_face_names(weights), strict=False).missing_keys
    if wanted := [name for name in missing if not name.startswith(("embeddings.position", "contact_head"))]:
        raise LengthwiseError(f"benchmark: this transformers names its weights otherwise: {wanted[0]}")
    model = model.eval().to(device, DTYPES[precision])

    @torch.inference_mode()
    def run(sequences: list[bytes]) -> Rows:
        rows: Rows = []
        for start, stop in cut_batches(np.array([len(s) for s in sequences]), AUTO_BATCH_TOKENS[device.type]):
            batch = [torch.from_numpy(tokenize(sequence)).long() for sequence in sequences[start:stop]]
            tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD).to(device)
            hidden = model(tokens, attention_mask=(tokens != PAD).long()).last_hidden_state  # [N, L, D]
            hidden = hidden.half().cpu() if precision != "float32" else hidden.cpu()
            rows += [hidden[i, 1 : len(sequences[start + i]) + 1].numpy() for i in range(stop - start)]
        return rows

    return run


def _esm_cpp(weights: Path, config: ModelConfig):
    """esm-cpp's own packed scheduler; it returns logits, so the rows that are compared come from its hidden states."""
    import esm_cpp
    from safetensors.torch import save_file

    state = checkpoint.read(weights)[1]
    tensors = {f"esm.{name}": tensor for name, tensor in _hugging_face_names(weights).items()}
    tensors |= {
        name: tensor for name, tensor in state.items() if name.startswith("lm_head.") and name != "lm_head.weight"
    }
    tensors["lm_head.decoder.weight"] = state["lm_head.weight"]
    with tempfile.TemporaryDirectory() as folder:
        _hugging_face_config(config).save_pretrained(folder)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, Path(folder) / "model.safetensors")
        model = esm_cpp.Model.load_from_safetensors(str(Path(folder) / "model.safetensors"))
    first = True

    def run(sequences: list[bytes]) -> Rows:
        nonlocal first
        ids = [tokenize(sequence).astype(np.int32) for sequence in sequences]
        if not first:
            model.forward_scheduled(ids)
            return []
        first = False
        return [model.forward_with_hidden_states(one)[1][-1][1:-1] for one in ids]

    return run
