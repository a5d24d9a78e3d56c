"""The site of the documentation, which `make docs` builds with Sphinx.

Sphinx is maintained, reads the same Markdown as GitHub through MyST, and makes the reference from the docstrings;
mkdocs-material, the alternative, only receives fixes by now.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

project = "convoy"
author = "The convoy authors"
version = release = importlib.metadata.version("convoy")

# The pages link to each other and to files beside docs/ as they do on GitHub, so the source folder is the project's.
root_doc = "docs/index"
exclude_patterns = ["docs/_build", "docs/_templates"]
include_patterns = ["docs/**", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"convoy {version}"
html_show_sphinx = False
html_show_copyright = False

templates_path = [str(Path(__file__).with_name("_templates"))]
# It is an extra.
autodoc_mock_imports = ["ray"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Show formulas as MathML, which browsers draw themselves, as MathJax would be loaded from the network."""
    app.add_html_math_renderer("mathml", (show_formula, None), (show_formula, None))


def show_formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula in LaTeX as MathML."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode
