"""The scaling study: time and memory of forward passes at controlled lengths on this device, and fits of them.

In: a checkpoint and a device. Out: scaling.tsv (`measure`, of what `engines` loads, with the columns of `schema`), fits
of it (`fits`), facts for the page (`facts`).
"""
