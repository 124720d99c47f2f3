"""Sphinx's configuration: the Markdown files of this repository as a site. The source folder is the repository itself, so that a link
is the same on the site and in a clone.

`sphinx-build -W -n -c docs . build/site` builds it; `build/site/index.html` is where to begin.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "Lengthwise"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "config/**"]
exclude_patterns = ["docs/site"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "Lengthwise"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
# Examples of commands and configs are read by their names in the fences; a comment beside a value is no error.
suppress_warnings = ["misc.highlighting_failure"]
