"""Sphinx's configuration: the Markdown files of this repository as a site.

The source folder is the repository itself, so that a link is the same on the site and in a clone.

`sphinx-build -W -n -c docs . build/site` builds it; `build/site/index.html` is where to begin.
"""

from pygments.lexers import PythonLexer
from sphinx.highlighting import lexers

project = "Lengthwise"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "config/**"]

myst_heading_anchors = 3
lexers["snakemake"] = PythonLexer()  # Pygments has none of its own

html_theme = "furo"
html_title = "Lengthwise"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_copyright = False
