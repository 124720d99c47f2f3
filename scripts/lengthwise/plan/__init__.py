"""Plan: what no finished shard holds yet, cut into shards and jobs; and what that will take.

In: tables of sequences, and the store's finished work. Out: work orders, the table of jobs with what each asks for, a forecast.
May import: `read`, `store` and below.
"""
