"""The report: batch metrics, ledgers and the scaling study, as tables, figures and one page.

In: a store whose jobs are done. Out: the folder report/ with index.html, figures (SVG, PNG) and tables (TSV, Parquet).
May import: `jobs`, `plan`, `store` and below. Captions of figures are in `page.html`, and for
Snakemake's report in workflow/report.
"""
