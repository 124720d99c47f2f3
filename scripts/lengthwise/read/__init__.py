"""Reading a finished dataset: ids, arrays, frames, and torch's datasets.

In: the folder of a dataset. Out: `Dataset`, which `lengthwise.open` gives.
May import: `store` and below. Only `read.torch` imports torch.
"""
