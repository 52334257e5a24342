"""Settings of Sphinx; build with ``sphinx-build -W -b html docs docs/_build``."""

from __future__ import annotations

import trainbus

project = "trainbus"
author = "the authors of trainbus"
copyright = author
release = version = trainbus.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

# Docstrings are Google style, and name objects in single backticks.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["trainbus.css"]
html_title = f"trainbus {version}"
html_show_copyright = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "

_OF_EVERY_CALLBACK = ("on_", "state_dict", "load_state_dict", "state_key")


def skip_what_the_bus_calls(app, what, name, obj, skip, options):
    """Leave out of each callback's entry what `Callback` describes once."""
    owner = getattr(getattr(obj, "fget", obj), "__qualname__", "").partition(".")[0]
    return True if name.startswith(_OF_EVERY_CALLBACK) and owner != "Callback" else None


def setup(app):
    """Connect it."""
    app.connect("autodoc-skip-member", skip_what_the_bus_calls)
