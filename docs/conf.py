"""The documentation site: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import ids

from passion_monai import __version__

project = "passion-monai"
copyright = "the passion-monai contributors"
release = __version__
extensions = [
    "myst_nb",  # Markdown, and notebooks with the outputs that they were committed with
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"passion-monai {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"
smartquotes = False  # which makes a dash of the -- of an option
autodoc_typehints = "signature"
autodoc_typehints_format = "fully-qualified"
autodoc_member_order = "bysource"
autosummary_generate = True
napoleon_google_docstring = True
napoleon_use_ivar = True
# Files of the repository that are no page of the site.
suppress_warnings = ["myst.xref_missing"]

ids.write(Path(__file__).parent / "reference" / "ids.md")
