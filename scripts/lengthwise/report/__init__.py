"""The report: batch metrics, counts of records and the scaling study, as tables, figures and one page.

In: a store whose jobs are done. Out: the folder report/ with index.html, figures (SVG, PNG) and tables (TSV, Parquet).
May import: `jobs`, `plan`, `store` and below.

Where a figure's caption is: on the page in `page.html` (the block `plot("<figure>", title)`), in Snakemake's report in
workflow/report/<figure>.rst. `figures.py` draws the figures.
"""
