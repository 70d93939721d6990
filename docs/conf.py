"""How Sphinx builds the documentation: `sphinx-build -W -n docs site`, and open site/index.html.

Nothing is loaded from a network, neither when the site is built nor when it is read.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc
from pkgutil import resolve_name, walk_packages

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

import rsm_probe
from rsm_probe.cli import app as command_line
from rsm_probe.config import described_keys
from rsm_probe.studies import STUDIES

project = "rsm_probe"
version = release = rsm_probe.__version__
language = "en"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "matplotlib.sphinxext.plot_directive",
]

# Pages: GitHub shows the same files, so headings have the anchors that it gives them.
myst_heading_anchors = 6
myst_enable_extensions = ["colon_fence"]

# Docstrings: names in single backticks link to their documentation where it exists, and are code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 70
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

# Types of other libraries appear as text. Names of rsm_probe that do not exist fail the build; see `missing_reference`.
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*")]

plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = True
plot_formats = [("png", 120)]
plot_rcparams = {"figure.constrained_layout.use": True, "font.size": 9}

html_title = f"rsm_probe {version}"
html_theme = "pydata_sphinx_theme"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}
html_sidebars = {"gallery": [], "changelog": []}
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
# Excerpts below search results are fetched from the pages, which browsers refuse for files on disk.
html_show_search_summary = False


def documented_names() -> dict[str, str]:
    """Full names of classes and functions, and those of classes alone -> the name by which users import them."""
    rooms = [name for _, name, is_room in walk_packages(rsm_probe.__path__, "rsm_probe.") if is_room]
    names: dict[str, str] = {}
    for face in map(import_module, ["rsm_probe", *rooms, "rsm_probe.errors"]):
        errors = [name for name in vars(face) if name.endswith("Error")] if face.__name__ == "rsm_probe.errors" else []
        for name in getattr(face, "__all__", errors):
            value = getattr(face, name)
            if hasattr(value, "__qualname__"):
                public = names.setdefault(f"{value.__module__}.{value.__qualname__}", f"{face.__name__}.{name}")
                names.setdefault(f"{face.__name__}.{name}", public)
                if isinstance(value, type):
                    names.setdefault(name, public)
    return names


NAMES = documented_names()


def missing_reference(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Link a name to where users import it from. Names of the package must exist; those of other libraries are text."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    public = NAMES.get(target) or NAMES.get(f"{node.get('py:module')}.{target}")
    if public is not None and public != target:
        domain = env.domains.python_domain
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content) or content
    if not re.fullmatch(r"rsm_probe(\.\w+)+", target):
        return content
    try:
        resolve_name(target)
    except (ImportError, AttributeError):
        return None
    return content


def plain_text(app: Sphinx, kind: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: escape what reStructuredText would take for markup."""
    code_or_mark = re.compile(r"(?P<code>`[^`]+`)(?P<next>\w?)|[*|\\]|(?<=\w)_(?=\W|$)")

    def escaped(match: re.Match[str]) -> str:
        if match["code"] is None:
            return "\\" + match[0]
        return match["code"].replace("\\", "\\\\") + ("\\ " + match["next"] if match["next"] else "")

    examples = re.compile(r"(^ *>>> (?:.+\n)+)", re.MULTILINE)
    parts = examples.split("\n".join([*lines, ""]))
    parts[::2] = [code_or_mark.sub(escaped, part) for part in parts[::2]]
    if kind == "property":
        parts[0] = parts[0].replace(":", COLON, 1)
    lines[:] = "".join(parts).split("\n")


# Napoleon would read a type before the first colon of a property.
COLON = "\N{MODIFIER LETTER COLON}"


def colon(app: Sphinx, kind: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Put back what `plain_text` hid from napoleon."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def source_read(app: Sphinx, page: str, content: list[str]) -> None:
    """Lead links that GitHub resolves to pages that include a file beside README.md, or to a file as it is."""
    above = r"\]\(((?:\.\./)+)"
    content[0] = re.sub(f"{above}(CONTRIBUTING|CHANGELOG)\\.md", lambda match: f"](/{match[2].lower()}.md", content[0])
    content[0] = re.sub(f"{above}README\\.md(#[^)]*)?", "](/index.md", content[0])
    content[0] = re.sub(f"{above}(benchmarks/[^)]+\\.md)", r"](path:\1\2", content[0])


def module_of(app: Sphinx, module: str, name: str) -> str:
    """The module with the source of a name, or of the class of a member; for aliases the module that exports them."""
    value = getattr(import_module(module), name.partition(".")[0], None)
    defined = str(getattr(value, "__module__", module))
    return defined if defined.startswith("rsm_probe.") else module


def cell(text: object) -> str:
    """Text for a cell of a table, in one line."""
    return re.sub(r"([|<]|(?<!`)\*)", r"\\\1", " ".join(str(text).split()))


def commands() -> Iterator[str]:
    """All commands of the command line, with their help as Markdown."""
    for name, command in get_command(command_line).commands.items():  # type: ignore[attr-defined]
        parameters = [parameter for parameter in command.params if parameter.name != "help"]
        arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
        words = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
        yield f"## rsm-probe {name}\n\n```text\nrsm-probe {' '.join([name, *words])} [OPTIONS]\n```\n"
        yield f"{cleandoc(command.help or '')}\n\n| argument or option | meaning |\n|---|---|"
        for parameter in parameters:
            if parameter in arguments:
                written = parameter.name.upper()
            else:
                written = ", ".join([*parameter.opts, *parameter.secondary_opts])
            yield f"| `{written}` | {cell(parameter.help or '')} |"
        yield ""


def configuration_keys() -> Iterator[str]:
    """All keys of every study, with their defaults, as Markdown."""
    for study, settings in sorted(STUDIES.items(), key=lambda item: item[0] != "sweep"):
        yield f"## study: {study}\n\n{cleandoc(settings.__doc__ or '').splitlines()[0]}\n"
        yield "| key | meaning |\n|---|---|"
        for key, default, description in described_keys(settings):
            meaning = f"{cell(description)}; " if description else ""
            default = "required" if default == "required" else "by default `" + default.replace("|", "\\|") + "`"
            yield f"| `{key}` | {meaning}{default} |"
        yield ""


class Commands(SphinxDirective):
    """Inserts what `commands` yields."""

    def run(self) -> list[nodes.Node]:
        """Parse the text as a part of the page, which is read again whenever the site is built."""
        self.env.note_reread()
        return self.parse_text_to_nodes("\n".join(commands()), allow_section_headings=True)


class ConfigurationKeys(SphinxDirective):
    """Inserts what `configuration_keys` yields."""

    def run(self) -> list[nodes.Node]:
        """Parse the text as a part of the page, which is read again whenever the site is built."""
        self.env.note_reread()
        return self.parse_text_to_nodes("\n".join(configuration_keys()), allow_section_headings=True)


def setup(app: Sphinx) -> None:
    """Register what is defined above."""
    app.connect("missing-reference", missing_reference)
    app.connect("source-read", source_read)
    app.connect("viewcode-follow-imported", module_of)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", colon, priority=600)
    app.add_directive("commands", Commands)
    app.add_directive("configuration-keys", ConfigurationKeys)
