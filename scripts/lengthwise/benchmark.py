"""Benchmark: this engine beside others, on the same sequences in one run, interleaved.

It needs torch, numpy, safetensors and fair-esm only; peers take part where they are installed, and so does the figure.
"""

import csv
import importlib.util
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lengthwise import alphabet, checkpoint
from lengthwise.engine import AUTO_BATCH_TOKENS, DTYPES, Engine, Output, cut_batches
from lengthwise.errors import LengthwiseError
from lengthwise.shapes import ModelConfig

SHARD_BYTES = 1 << 30  # the config's default
EXTRACT_TOKENS = 4_096  # extract.py's --toks_per_batch
PRODUCT_SECONDS = 0.3  # of matrix products in each round
SAMPLE = 24  # sequences whose rows are compared with fair-esm's, spread over the lengths
COLUMNS = (
    "engine",
    "precision",
    "residues_per_second",
    "times_extract",
    "end_to_end_residues_per_second",
    "share_of_matmul",
    "peak_bytes",
    "max_error",
    "rms_error",
    "min_cosine",
)

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


def benchmark(
    weights: Path, sequences: list[bytes], device: torch.device, rounds: int = 5, say: Callable[[str], None] = print
) -> list[dict]:
    """Time every engine on the same sequences.

    The sequences are dealt into `rounds` hands of the same distribution of lengths; in each round every engine runs one
    hand, one engine after the other, beside a measurement of the device's matrix products in the model's own shapes.

    Parameters
    ----------
    weights
        A fair-esm checkpoint.
    sequences
        Normalised residues.
    device
        Where to run.
    rounds
        Number of hands.
    say
        Takes a line of progress.

    Returns
    -------
    A row for each engine and precision with `COLUMNS`: throughput without warm-up; the same with the model's load and
    warm-up; floating-point operations per second as a share of the matrix products' in that precision; peak allocated
    memory (CUDA); and, against fair-esm in float32 one sequence at a time, the largest and the root mean square error,
    both over the RMS of the layer, and the smallest cosine of a residue.
    """
    config = checkpoint.read(weights)[0]
    sequences = sorted(sequences, key=len)
    hands = [sequences[i::rounds] for i in range(rounds)]
    residues = sum(map(len, sequences))
    flops = sum(config.flops(len(sequence)) for sequence in sequences)
    sample = sequences[:: max(1, len(sequences) // SAMPLE)]
    expected = reference(weights, sample, device)
    contenders = list(_contenders(weights, config, device, say))
    errors = {}
    for number, contender in enumerate(contenders):
        before = _allocated(device)
        began = time.perf_counter()
        contender.run = contender.load()
        rows = contender.run(sample)  # and the warm-up
        _synchronize(device)
        contender.load_seconds = time.perf_counter() - began
        contender.own_bytes = _allocated(device) - before
        errors[number] = _errors(rows, expected)
    products: dict[str, list[float]] = {contender.precision: [] for contender in contenders}
    for number, hand in enumerate(hands, start=1):
        for precision, rates in products.items():
            rates.append(_product_rate(config, device, DTYPES[precision]))
        for contender in contenders:
            contender.seconds.append(_timed(contender, hand, device))
        say(
            f"round {number} of {rounds}: "
            + ", ".join(f"{c.engine} {c.precision} {c.seconds[-1]:.2f} s" for c in contenders)
        )
    first = next(c for c in contenders if c.engine == "fair-esm extract.py")
    return [
        {
            "engine": c.engine,
            "precision": c.precision,
            "residues_per_second": residues / sum(c.seconds),
            "times_extract": statistics.median(a / b for a, b in zip(first.seconds, c.seconds, strict=True)),
            "end_to_end_residues_per_second": residues / (sum(c.seconds) + c.load_seconds),
            "share_of_matmul": flops / sum(c.seconds) / statistics.median(products[c.precision]),
            "peak_bytes": c.peak_bytes,
            **errors[number],
        }
        for number, c in enumerate(contenders)
    ]


def read_fasta(path: Path) -> list[bytes]:
    """Normalised sequences of a FASTA file, rejected ones left out; by fair-esm's own reader, which is always there."""
    from esm.data import FastaBatchedDataset

    found = (alphabet.normalize(sequence.encode()) for sequence in FastaBatchedDataset.from_file(path).sequence_strs)
    return [sequence for sequence, _, reason in found if not reason]


def random_sequences(length: int, residues: int, seed: int = 0) -> list[bytes]:
    """Random proteins of one length, so many residues in all."""
    letters = np.frombuffer(alphabet.RESIDUES[:20], np.uint8)
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.choice(letters, length).tobytes() for _ in range(max(1, residues // length))]


def write_table(rows: list[dict], path: Path) -> None:
    """The rows as TSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict]) -> str:
    """The rows as a table for a README."""
    lines = [
        "| engine | precision | residues/s | x extract.py | with load | share of matmul | peak GB | max error | rms error "
        "| min cosine |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {row['engine']} | {row['precision']} | {row['residues_per_second']:,.0f} | {row['times_extract']:.2f} "
            f"| {row['end_to_end_residues_per_second']:,.0f} | {row['share_of_matmul']:.0%} | {peak} "
            f"| {row['max_error']:.1e} | {row['rms_error']:.1e} | {row['min_cosine']:.6f} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict], title: str, path: Path) -> bool:
    """Bars of residues per second; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    names = [f"{row['engine']}, {row['precision']}" for row in rows][::-1]
    rates = [row["residues_per_second"] for row in rows][::-1]
    colours = ["#0072b2" if name.startswith("Lengthwise") else "#999999" for name in names]
    drawing = Figure(figsize=(7.5, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = drawing.subplots()
    bars = axes.barh(names, rates, color=colours)
    axes.bar_label(bars, [f"{row['times_extract']:.1f}x" for row in rows][::-1], padding=4)
    axes.set_xlabel("residues per second (labels: times fair-esm's extract.py)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path)
    return True


def _timed(contender: Contender, hand: list[bytes], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _synchronize(device)
    before = _allocated(device)  # the other engines' weights among it
    began = time.perf_counter()
    contender.run(hand)
    _synchronize(device)
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before + contender.own_bytes
        contender.peak_bytes = max(contender.peak_bytes or 0, peak)
    return seconds


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _product_rate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of plain matrix products in the shapes of one layer."""
    d, tokens = config.embed_dim, AUTO_BATCH_TOKENS[device.type]
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    pairs = [
        (torch.randn(tokens, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
        for k, n in shapes
    ]
    operations = sum(2 * tokens * k * n for k, n in shapes)
    done, began = -1, 0.0
    while done < 1 or time.perf_counter() - began < PRODUCT_SECONDS:
        for x, weight in pairs:
            x @ weight.T
        _synchronize(device)
        done += 1
        if done == 0:  # the first is the warm-up
            began = time.perf_counter()
    return done * operations / (time.perf_counter() - began)


@torch.inference_mode()
def reference(weights: Path, sequences: list[bytes], device: torch.device) -> Rows:
    """fair-esm's own last layer in float32, one sequence at a time: [L, D] of each."""
    model = checkpoint.reference_model(weights).to(device)
    rows = []
    for sequence in sequences:
        tokens = torch.from_numpy(alphabet.tokenize(sequence)).long()[None].to(device)
        result = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
        rows.append(result[0, 1:-1].cpu().numpy())
    return rows


def _errors(rows: Rows, expected: Rows) -> dict[str, float]:
    if any(len(row) != len(other) for row, other in zip(rows, expected, strict=True)):  # means
        expected = [other.mean(0, keepdims=True) for other in expected]
    ours, theirs = (np.concatenate(part).astype(np.float64) for part in (rows, expected))
    rms = np.sqrt(np.mean(theirs**2))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return {
        "max_error": float(np.abs(ours - theirs).max() / rms),
        "rms_error": float(np.sqrt(np.mean((ours - theirs) ** 2)) / rms),
        "min_cosine": float(((ours * theirs).sum(1) / lengths).min()),
    }


def _contenders(
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
        import lengthwise.embed  # noqa: F401
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
    from lengthwise.embed import PlannedShard, Progress, Walk
    from lengthwise.store import Shard, shard_path

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
                [alphabet.digest(s) for s in sequences[start:stop]],
                lengths[start:stop],
                sequences[start:stop],
            )
            for start, stop in itertools.pairwise(bounds)
        ]
        with Walk(store, settings, engine, Progress("benchmark", int(lengths.sum()))) as walk:
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
        pad_token_id=alphabet.PAD,
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
            batch = [torch.from_numpy(alphabet.tokenize(sequence)).long() for sequence in sequences[start:stop]]
            tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=alphabet.PAD).to(device)
            hidden = model(tokens, attention_mask=(tokens != alphabet.PAD).long()).last_hidden_state  # [N, L, D]
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
        ids = [alphabet.tokenize(sequence).astype(np.int32) for sequence in sequences]
        if not first:
            model.forward_scheduled(ids)
            return []
        first = False
        return [model.forward_with_hidden_states(one)[1][-1][1:-1] for one in ids]

    return run
