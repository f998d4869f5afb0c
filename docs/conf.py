"""Sphinx configuration of the site that `make docs` builds. It needs no network, and any warning ends the build."""

import logging
import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode, Text
from latex2mathml.converter import convert as to_mathml
from sphinx.addnodes import desc_annotation
from sphinx.errors import ExtensionError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the library of this tree, whichever is installed

import generate  # noqa: E402

import diffusion  # noqa: E402

project = "jax-fast-diffusion"
version = release = diffusion.__version__
author = "the authors of jax-fast-diffusion"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"  # the default loads a script from elsewhere

autodoc_mock_imports = ["torch", "diffusers"]  # one file is for those who have them

myst_enable_extensions = ["deflist", "dollarmath"]
smartquotes = False  # "" and -- in the text mean themselves
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` has run them
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_param = False  # leaves "t, s: int [B]" one entry
napoleon_use_rtype = False

# A pattern in a toctree may name a folder that is still empty.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(
    lambda record: getattr(record, "subtype", None) != "empty_glob"
)

default_role = "py:obj"  # `name` in a docstring links where it can
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!diffusion\.).*")]  # what is ours must be found
TYPE_VARIABLES = ("evaluation.cache.Result", "keys.P", "keys.R")
nitpick_ignore = [("py:class", f"diffusion.{name}") for name in TYPE_VARIABLES]


COLON = "\N{FULLWIDTH COLON}"  # stands for a colon where napoleon would take what is before it for a type


def read_as_plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: * and | mean themselves, an indented block is code; only `names` are markup."""
    result, in_code, text_before = [], False, ""
    for before, line in zip(["", *lines], lines, strict=False):
        if line.strip():
            if in_code and not line.startswith("    "):
                in_code = False
            elif not in_code and line.startswith("    ") and not before.strip() and text_before[:1] not in ("", " "):
                in_code = True
                result += ["::", ""]
            text_before = line
        if not in_code:
            line = re.sub(r"[*|]", r"\\\g<0>", line)
            line = re.sub(r"(?<=\w)_(?!\w)", r"\\_", line)  # not a link
            line = re.sub(r"\b([A-Z])\.(?= |$)", r"\1\\.", line)  # not an item of a list
        result.append(line)
    if what in ("attribute", "data", "property"):
        result = [line.replace(":", COLON) for line in result]
    lines[:] = result


def shorten(app, what, name, obj, options, signature, returns):
    """Annotations as they read in the source; a default that is no Python, such as <factory>, becomes dots."""
    signature = signature and re.sub(r"= <[^<>]+>", "= ...", signature)
    return tuple(text and re.sub(r"jaxlib\._jax\.|jaxtyping\.", "", text) for text in (signature, returns))


def hide_long_values(app, domain, kind, content):
    """Drops the value of a constant where it would be a dump on one line: of a dict, or of many numbers."""
    for node in list(content.parent.findall(desc_annotation)) if kind in ("data", "attribute") else ():
        text = node.astext()
        if text.startswith(" = ") and (len(text) > 60 or text[3] == "{"):
            node.parent.remove(node)


def restore_colons(app, what, name, obj, options, lines):
    lines[:] = [line.replace(COLON, ":") for line in lines]


def draw_dashes(app, doctree):
    """Makes a dash of the two hyphens that autodoc puts between a name and its description."""
    for text in list(doctree.findall(Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, Text(text.replace(" -- ", " \N{EN DASH} ", 1)))


def skip_tuple_fields(app, what, name, obj, skip, options):
    """The fields of a NamedTuple stand in its docstring, if anywhere."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def fill_page(app, name, source):
    source[0] = generate.fill(source[0])


def require_all_modules(app, env):
    """A public module that no page of docs/reference has a section for ends the build."""
    pages = "".join(generate.fill(page.read_text()) for page in HERE.glob("reference/*.md"))
    missing = [name for name in generate.public_modules() if f"automodule:: {name}\n" not in pages]
    if missing:
        raise ExtensionError(f"docs/reference has no entry for {', '.join(missing)}")


def _inline_math(self, node):
    self.body.append(to_mathml(node.astext()))
    raise SkipNode


def _display_math(self, node):
    self.body.append(to_mathml(node.astext(), display="block"))
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
    app.connect("autodoc-process-docstring", read_as_plain_text, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore_colons, priority=600)  # after it
    app.connect("autodoc-process-signature", shorten)
    app.connect("object-description-transform", hide_long_values)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("doctree-read", draw_dashes)
    app.connect("source-read", fill_page)
    app.connect("env-check-consistency", require_all_modules)
