"""Plan: cuts the sequences that no finished shard holds into shards and jobs, and forecasts what they will take.

In: tables of sequences; the store's work orders, job records and shards. Out: work orders, the table of jobs with each job's
requests, a forecast.
May import: `read`, `store` and below.
"""
