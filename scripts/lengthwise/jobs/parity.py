"""Parity: hold this engine and a job's first stored rows against fair-esm; the result is the parity receipt.

fair-esm in float64 is the truth, and fair-esm's own rounding is the measure (`lengthwise.esm2.accuracy`). Is the engine right:
its float32 pass beside fair-esm's? Are the stored rows right: beside fair-esm in the run's own type? A receipt holds for a device
and versions. A miss is recorded too, and stops the store's other jobs there.
"""

import gc
import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.devices import is_out_of_memory
from lengthwise.esm2.engine import Engine
from lengthwise.jobs import comparison
from lengthwise.jobs.parity_sample import choose_sample
from lengthwise.plan.process import PARITY_SECONDS, PARITY_SHARE
from lengthwise.store.metrics import maker_of
from lengthwise.store.paths import quarantined, shard_path
from lengthwise.system.descriptors import flush_folder
from lengthwise.system.files import read_json, write_json, writing
from lengthwise.system.machine import host_available

if TYPE_CHECKING:
    from lengthwise.plan.work_orders import PlannedShard

log = logging.getLogger("lengthwise")
# Above this share of a channel's spread a type is too coarse for the model.
COARSE = 0.05


class ParityError(LengthwiseError):
    """The engine or stored rows are further from the truth than fair-esm's rounding explains."""


class Parity:
    """The parity receipt of a store for one device and set of versions.

    Parameters
    ----------
    store, settings
        The store and its settings.
    maker
        The device's name and the versions; each combination has a receipt of its own.
    policy
        fail: a miss ends the job. warn: it is recorded and warned of. off: nothing is compared.
    """

    def __init__(self, store: Path, settings: dict, maker: dict, policy: str):
        self.store, self.settings, self.maker, self.policy = store, settings, maker, policy
        name = re.sub(r"[^A-Za-z0-9]+", "_", maker["device"])[:60].strip("_")
        key = hashlib.sha256(json.dumps(maker, sort_keys=True).encode()).hexdigest()[:8]
        self.path = _receipt_path(store, f"{name}-{key}")
        self.skipped = "parity: off" if policy == "off" else ""  # why nothing was compared
        self._warned = False

    @property
    def maker_name(self) -> str:
        """Names device and versions, in metrics and in quarantine."""
        return self.path.stem

    @property
    def is_due(self) -> bool:
        """Whether a comparison is to be made."""
        return not self.skipped and self.read() is None

    def read(self) -> dict | None:
        """The receipt; None where there is none, or a damaged one."""
        return _read(self.path)

    def result(self) -> dict:
        """What the job record says: the receipt, or {"skipped": why there is none}."""
        receipt = None if self.policy == "off" else self.read()
        return receipt or {"skipped": self.skipped}

    def require_no_miss(self) -> None:
        """Stop, or warn once, where any job has recorded a miss.

        Raises
        ------
        ParityError
            There is a miss, and the policy is `fail`.
        """
        receipt = self.read()
        if self.policy == "off" or not receipt or "miss" not in receipt:
            return
        if self.policy == "fail":
            raise ParityError(
                f"{receipt['miss']}; recorded in {self.path}; {_WAY_OUT}, or remove that file to compare again"
            )
        if not self._warned:
            self._warned = True
            log.warning("parity: %s (%s)", receipt["miss"], self.path)

    def compare(self, engine: Engine, shards: "list[PlannedShard]", made: Collection[str], job_seconds: float) -> None:
        """Take the receipt, once the job's first shard is there.

        Where nothing can be compared no receipt is written, and the store's next job tries again.

        Parameters
        ----------
        engine
            The job's engine. In half precision its float32 twin is loaded beside it, and released.
        shards
            Finished shards, of ascending lengths.
        made
            The names of those that this process made.
        job_seconds
            What the whole job takes.

        Raises
        ------
        ParityError
            There is a miss, and the policy is `fail`.
        """
        began = perf_counter()
        seconds = max(PARITY_SECONDS, PARITY_SHARE * job_seconds)
        sample = choose_sample(
            self.store, self.settings, engine.device.type, shards, seconds, _free_bytes(engine.device)
        )
        if isinstance(sample, str):
            self._skip(sample)
            return
        had_twin = engine.twin is not None
        try:
            receipt = comparison.compare(self.settings, engine, sample)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            receipt = {"skipped": "memory ran out"}
        if not had_twin:
            engine.twin = None
        _free_bytes(engine.device)
        if "skipped" not in receipt and not receipt["engine"] and not receipt["stored"]:
            receipt = {"skipped": "; ".join(f"{what}: {why}" for what, why in receipt["not_compared"].items())}
        if "skipped" in receipt:
            self._skip(receipt["skipped"])
            return
        receipt["seconds"] = round(perf_counter() - began, 3)
        self._judge(receipt, {path.stem for path in sample.shards}, [shard.name for shard in shards], made)

    def quarantine_missed(self, shards: Iterable[str]) -> str:
        """Quarantine those shards that this device and these versions made, if a miss is recorded; nothing reads them then.

        Returns
        -------
        What was moved, to end an error with.
        """
        if "miss" not in (self.read() or {}):
            return ""
        return self._quarantine(shard for shard in shards if maker_of(self.store, shard) in (self.maker_name, ""))

    def quarantine_unproven(self, shards: Iterable[str]) -> set[str]:
        """Quarantine shards of an unfinished job whose makers have a miss, or no receipt where there is one here.

        Returns
        -------
        The shards that are to be made again.
        """
        if self.policy != "fail":
            return set()
        comparable = self.read() is not None  # what fair-esm takes too long for is compared nowhere
        proven = {self.maker_name, ""}  # and those of earlier versions, which do not say who made them
        moved = set()
        for shard in shards:
            maker = maker_of(self.store, shard)
            if maker in proven:
                continue
            receipt = _read(_receipt_path(self.store, maker))
            if "miss" not in receipt if receipt else not comparable:
                proven.add(maker)
            elif where := self._quarantine([shard], maker):
                log.warning("made by %s without a good parity receipt, and made again here%s", maker, where)
                moved.add(shard)
        return moved

    def bring_back(self, shards: Iterable[str]) -> None:
        """Take shards out of quarantine that a miss on this device put there, where the policy accepts it."""
        if self.policy == "fail":
            return
        for shard in shards:
            path = shard_path(self.store, shard)
            there = quarantined(path, self.maker_name)
            if there.exists() and not path.exists():
                with writing(path):
                    there.rename(path)
                log.warning("%s is back from quarantine (parity: %s)", path, self.policy)

    def _skip(self, reason: str) -> None:
        self.skipped = reason
        log.info("not compared with fair-esm: %s", reason)

    def _judge(self, receipt: dict, compared: set[str], shards: list[str], made: Collection[str]) -> None:
        """Write the receipt, and act on a miss."""
        missed = [part for part in ("engine", "stored") if receipt[part] and not receipt[part]["share_of_limit"] <= 1]
        _log(receipt, self.settings["precision"], warns="engine" not in missed)
        earlier = self.read()
        if earlier and "miss" in earlier:  # of another job, meanwhile
            self.require_no_miss()
            return
        if not missed:
            self._write(receipt)
            return
        receipt["miss"] = _miss_in_words(missed[0], receipt, self.settings["precision"])
        made_elsewhere = missed == ["stored"] and compared.isdisjoint(made)
        if made_elsewhere and self.policy == "fail":  # which says nothing of this device
            raise ParityError(f"{receipt['miss']}; run again, which makes them again{self._quarantine(shards)}")
        self._write(receipt)
        self.require_no_miss()

    def _write(self, receipt: dict) -> None:
        write_json(self.path, {**self.maker, "parity": receipt})

    def _quarantine(self, shards: Iterable[str], maker: str = "") -> str:
        """Rename shards, with their maker's name or this one's; returns what was moved, in words."""
        moved = []
        for shard in shards:
            path = shard_path(self.store, shard)
            if path.exists():
                with writing(path):
                    path.rename(quarantined(path, maker or self.maker_name))
                    flush_folder(path.parent)
                moved.append(quarantined(path, maker or self.maker_name))
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        return f"; in quarantine: {moved[0]}{more}" if moved else ""


def _receipt_path(store: Path, maker: str) -> Path:
    return store / "parity" / f"{maker}.json"


def _read(path: Path) -> dict | None:
    with suppress(FileNotFoundError, LengthwiseError):
        receipt = read_json(path, "parity")["parity"]
        return receipt if "stored" in receipt else None  # earlier versions had another form
    return None


_WAY_OUT = "use another device or other versions, or set parity: warn to go on with these rows"


def _miss_in_words(part: str, receipt: dict, precision: str) -> str:
    worst = receipt[part]
    lengths = ", ".join(str(each["residues"]) for each in receipt["compared"])
    where = "the typical channel" if worst["channel"] is None else f"channel {worst['channel']}"
    what = "in this engine's float32 pass" if part == "engine" else f"as it is stored ({precision})"
    return (
        f"{worst['tensor']} {what} is not what fair-esm computes: {where} is off by {_percent(worst['error'])} of its spread, "
        f"{worst['share_of_limit']:.3g} times the limit (sequences of {lengths} residues)"
    )


def _log(receipt: dict, precision: str, warns: bool) -> None:
    """Say what was compared; `warns` of a type that is too coarse, which says nothing where the engine is wrong."""
    lengths = ", ".join(str(each["residues"]) for each in receipt["compared"])
    parts = [
        f"{name} at {receipt[part]['share_of_limit']:.0%} of the limit"
        for part, name in (("engine", "the engine"), ("stored", "stored rows"))
        if receipt[part]
    ]
    log.info(
        "compared with fair-esm, sequences of %s residues, in %.1f s: %s", lengths, receipt["seconds"], "; ".join(parts)
    )
    moves = receipt["moves"]
    if moves is not None:
        log.info("%s", moves_in_words(receipt, precision))
        if warns and moves > COARSE and precision != "float32":
            log.warning(
                "%s is too coarse for this model: it moves a channel by %s of its spread; take precision: %s",
                precision,
                _percent(moves),
                "float16 or float32" if precision == "bfloat16" else "float32",
            )
    for what, why in receipt["not_compared"].items():
        log.info("not compared: %s, because %s", what, why)


def moves_in_words(receipt: dict, precision: str) -> str:
    """How far the type moves a channel, computing and storing."""
    text = f"{precision} moves a channel by {_percent(receipt['moves'])} of its spread"
    if receipt["fair_esm_moves"] is not None:
        text += f" (in fair-esm by {_percent(receipt['fair_esm_moves'])})"
    return f"{text}, storing by {_percent(receipt['storage_moves'])}" if receipt["storage_moves"] else text


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _free_bytes(device: torch.device) -> int:
    """Free memory of the device, after what is not used is released."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return host_available()
