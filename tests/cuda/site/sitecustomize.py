"""On PYTHONPATH this puts a pretended card (`pretend.Device`) in the place of CUDA in every Python process that imports torch.

The folder `LENGTHWISE_PRETEND` holds card.json, the fields of `pretend.Card`, and version.py, which replaces torch's own. Each
process leaves there, as it ends, what its device noticed: <process id>.json.
"""

import atexit
import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path

FOLDER = os.environ.get("LENGTHWISE_PRETEND")


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torch" else None
        if spec:
            spec.submodule_search_locations.insert(0, FOLDER)
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module) -> None:
        super().exec_module(module)
        sys.path.append(str(Path(__file__).parents[1]))
        from pretend import Card, Device

        card = json.loads(Path(FOLDER, "card.json").read_text())
        device = Device(Card(**{name: tuple(each) if isinstance(each, list) else each for name, each in card.items()}))
        installed = device.installed()
        installed.__enter__()
        atexit.register(_report, device, installed)


def _report(device, _) -> None:
    noticed = {"arguments": sys.argv, "settings": os.environ.get("PYTORCH_ALLOC_CONF")}
    noticed |= {name: getattr(device, name) for name in ("counts", "waits", "out_of_order", "peak_bytes")}
    Path(FOLDER, f"{os.getpid()}.json").write_text(json.dumps(noticed))


if FOLDER:
    sys.meta_path.insert(0, _Finder())
