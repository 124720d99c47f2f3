"""`Store`: all finished datasets of a store, by name."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.read.dataset import Dataset
from lengthwise.system.text import count


class Store(Mapping[str, Dataset]):
    """The finished datasets of a store, a mapping of names to `Dataset`. A dataset is opened when it is asked for.

    Parameters
    ----------
    path
        The folder ``results/<model>``.

    Raises
    ------
    LengthwiseError
        The store has no finished dataset.

    Examples
    --------
    >>> store = lengthwise.open("results/demo")
    >>> list(store)
    ['example']
    >>> store["example"].pooled().shape
    (79, 320)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not len(self):
            raise LengthwiseError(f"{path}: no dataset in this store is finished; run snakemake to make them")

    def __getitem__(self, name: str) -> Dataset:
        """Open a dataset by its name.

        Raises
        ------
        KeyError
            There is no such dataset; the error names those that there are.
        LengthwiseError
            It is not complete, or damaged.
        """
        if name not in self._names():
            raise KeyError(f"no finished dataset {name!r} in {self.path}; there are: {', '.join(self)}")
        return Dataset(self.path / "datasets" / name)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return f"<lengthwise.Store {self.path.resolve().name}: {count(len(self), 'dataset')}: {', '.join(self)}>"

    def _names(self) -> list[str]:
        """Names in alphabetical order; a run may add some."""
        return sorted(path.parent.name for path in self.path.glob("datasets/*/manifest.json"))
