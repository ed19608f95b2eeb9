"""Configuration of the documentation site (Sphinx, MyST, furo)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from reference import shield, write_api, write_tutorials  # noqa: E402

from probkit._version import __version__  # noqa: E402

project = "probkit"
author = "The probkit developers"
copyright = author
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# tutorials are executed, and their values checked, by notebooks/run.py
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# single backticks in docstrings are code
default_role = "code"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    # made by scikit-learn on each estimator, with references into its own glossary
    "exclude-members": "set_fit_request, set_predict_request, set_score_request",
}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"probkit {release}"
html_static_path: list[str] = []


def setup(app):
    """Write the pages that follow from the code, and make docstrings safe for Sphinx."""
    write_api(HERE / "api")
    write_tutorials(HERE / "tutorials")
    # before napoleon, whose own markup must stay
    app.connect("autodoc-process-docstring", shield, priority=400)
