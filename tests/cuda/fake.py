"""Fake tensors on a GPU that is not there: shapes, types, devices and memory of a pass, and no numbers."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lengthwise.esm2.model import ESM2, Linear, Packing
from lengthwise.esm2.shapes import ModelConfig

GPU = torch.device("cuda", 0)
ALLOCATION = 512  # bytes that a GPU's allocator rounds up to


class Indexing(TorchFunctionMode):
    """Indexing as single operators: a CPU build of torch asks for a device's driver in `tensor[...]`."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is Tensor.__getitem__:
            return indexed(*arguments)
        if function is Tensor.__setitem__:
            tensor, index, value = arguments
            return indexed(tensor, index).copy_(value)
        return function(*arguments, **(keywords or {}))


def indexed(tensor: Tensor, index) -> Tensor:
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, int):
            tensor = tensor.select(dim, one)
            continue
        else:
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1)
        dim += 1
    return tensor


class Memory(TorchDispatchMode):
    """The most bytes that a device's tensors took at one time; refuses operators whose tensors are not all on it."""

    def __init__(self, device: torch.device = GPU):
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, keywords, result)) if isinstance(leaf, Tensor)]
        strangers = [tensor for tensor in tensors if tensor.device != self.device and tensor.dim()]
        assert not strangers, f"{function} takes or gives {strangers}"
        self.operators.append(str(function))
        for tensor in tree_leaves(result):
            self._note(tensor)
        return result

    def _note(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor) or tensor.device != self.device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self.known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def fake_gpu(monkeypatch, capability: tuple[int, int], flash: bool = True) -> Iterator[None]:
    """A GPU of this compute capability, for fake tensors. Whatever would wait for its numbers raises an error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
    with FakeTensorMode(), Indexing(), torch.inference_mode():
        yield


def fake_model(config: ModelConfig, dtype: torch.dtype, device: torch.device = GPU) -> ESM2:
    with torch.device("meta"):
        model = ESM2(config)
    model.inv_freq = torch.empty(model.inv_freq.shape, device=device)
    for module in model.modules():
        kept = dtype if isinstance(module, Linear) else torch.float32
        for name, weight in module.named_parameters(recurse=False):
            setattr(
                module, name, nn.Parameter(torch.empty(weight.shape, dtype=kept, device=device), requires_grad=False)
            )
    return model.eval()


def fake_batch(lengths: list[int]) -> tuple[Tensor, Packing]:
    """The tokens and the packing of sequences of these lengths in tokens."""
    tokens, residues = sum(lengths), sum(lengths) - 2 * len(lengths)
    places = (torch.empty(n, dtype=torch.int32, device=GPU) for n in (len(lengths) + 1, tokens, residues))
    return torch.empty(tokens, dtype=torch.uint8, device=GPU), Packing(tuple(lengths), max(lengths), *places)
