"""The documentation's settings: `sphinx-build -W docs build/docs`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("AEP_FORCE_REFERENCE", "1")  # the docstrings are Python's; no native module is needed

import aep_ext  # noqa: E402

project = "aep_ext"
author = "aep_ext developers"
copyright = author
release = aep_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has defaults, the text has shapes, dtypes and units
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"aep_ext {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}
