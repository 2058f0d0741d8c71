"""Configuration of Sphinx: `make docs` builds these pages."""

from importlib.metadata import version as installed_version

project = "ace"
version = release = installed_version("ace-equivariance")
copyright = "2026, the ace developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["results/*.md", "_build"]
default_role = "literal"
suppress_warnings = ["config.cache"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"ace {release}"
