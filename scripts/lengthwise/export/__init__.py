"""Exports: a finished dataset in the layouts of other tools, each a folder that is there whole or not at all.

In: a dataset. Out: its folder exports/<kind>; `run` starts one, `source` gives the records, and each layout has a file.
May import: `read`, `store` and below.
"""
