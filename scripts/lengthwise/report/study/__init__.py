"""The scaling study: time and memory of controlled lengths on this device, and the formulas that they follow.

In: a checkpoint and a device. Out: scaling.tsv (`measure`, with the columns of `schema`), fits of it
(`fits`), facts for the page (`facts`).
"""
