"""Fills two pages from the source when the site is built, so that they cannot go stale.

`<!-- settings -->` in configuration.md becomes the tables of all keys of configs/common.py: key, default, comment, the
allowed values and the rule for a run that goes on.
`<!-- api: FILE -->` in api.md becomes the public classes and functions of FILE with their signatures and docstrings.
"""

import ast
import html
import re
import sys
from pathlib import Path

from vdm_jax.settings import flat, setting

ROOT = Path(__file__).resolve().parents[1]
COMMON = ROOT / "configs" / "common.py"
STAGES = ("video_autoencoder", "audio_autoencoder", "clip", "denoiser")


def on_page_markdown(markdown, page, config, files):
    """Called by properdocs for each page."""
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", settings_tables())
    return re.sub(r"<!-- api: (\S+) -->", lambda found: api(ROOT / found[1]), markdown)


# ------------------------------------------------------------------------------------------------------- settings


def settings():
    """[(key of configs/common.py, such as 'data.size', its default or None for a group, its comment)].

    Raises KeyError where the file sets a key in a way that this reader does not understand.
    """
    sys.path.insert(0, str(ROOT))
    from configs import common

    source = COMMON.read_text()
    reader = Comments(source.splitlines())
    reader.visit(ast.parse(source))
    values, places = flat(common.get_config().to_dict()), list(reader.at)

    def shared(key):
        stage, _, rest = key.partition(".")
        return f"optimizer.{rest}" if stage in STAGES else ""

    def place(key):  # as in the file; the keys that all stages share come first in each stage
        own = places.index(shared(key)) - len(places) if shared(key) in places else places.index(key)
        return places.index(key.partition(".")[0]), own

    if missing := [key for key in values if key not in reader.at and shared(key) not in reader.at]:
        raise KeyError(f"docs/hooks.py does not find where configs/common.py sets {', '.join(missing)}")
    rows, seen = [], set()
    for key in sorted(values, key=place):
        comment = reader.at.get(key) or reader.at.get(shared(key), "")
        parts = key.split(".")
        for group in (".".join(parts[:i]) for i in range(1, len(parts))):
            text = reader.at.get(group)
            alone = sum(other.startswith(f"{group}.") for other in values) == 1
            if text and alone:
                comment = text
            elif text and group not in seen:
                rows.append((group, None, text))
            seen.add(group)
        rows.append((key, values[key], comment))
    return rows


class Comments(ast.NodeVisitor):
    """Reads get_config(): `at` is {dotted key: the comment beside or above it}."""

    def __init__(self, lines):
        self.lines, self.at, self.names = lines, {}, {"config": ""}
        self.start = 0  # line of the statement that is read

    def visit_FunctionDef(self, node):
        if node.name == "optimizer":  # the keys that all stages share
            base = next(part for part in node.body if isinstance(part, ast.Assign))
            self.record("optimizer", base.value)
        else:
            self.generic_visit(node)

    def visit_Assign(self, node):
        path = None
        for target in node.targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                if target.value.id in self.names:
                    above = self.names[target.value.id]
                    path = f"{above}.{target.attr}".strip(".")
        for target in node.targets:
            if path is not None and isinstance(target, ast.Name):
                self.names[target.id] = path
        if path is not None:
            self.start = node.lineno
            self.at[path] = self.comment(node.lineno, node.end_lineno)
            self.record(path, node.value)

    def record(self, path, value):
        """Takes in the keys of `dict(...)`, `{...}`, `ConfigDict(...)` or `optimizer(...)` under `path`."""
        if isinstance(value, ast.Dict):
            pairs = [(key.value, item, key.lineno) for key, item in zip(value.keys, value.values)]
        elif isinstance(value, ast.Call) and value.args:
            return self.record(path, value.args[0])
        elif isinstance(value, ast.Call):
            pairs = [(word.arg, word.value, word.value.lineno) for word in value.keywords]
        else:
            return
        for key, item, line in pairs:
            alone = line != self.start and sum(line == other for _, _, other in pairs) == 1
            text = self.comment(line, item.end_lineno) if alone else ""
            shared = f"optimizer.{key}" if path in STAGES else ""
            self.at[f"{path}.{key}"] = text or self.at.get(shared, "")
            self.record(f"{path}.{key}", item)

    def comment(self, first, last):
        """Comment lines above line `first`, then those at the ends of lines `first` and `last`."""
        above, number = [], first - 2
        while number >= 0 and re.fullmatch(r"\s*#(?! -+).*", self.lines[number]):
            above.insert(0, self.lines[number].strip(" #"))
            number -= 1
        beside = [re.search(r"#\s*(.*)$", self.lines[i - 1]) for i in dict.fromkeys((first, last))]
        return " ".join([*above, *(found[1] for found in beside if found)])


def settings_tables():
    """Markdown: a heading and a table for each top-level group of keys."""
    tables = {}
    for key, value, comment in settings():
        group = key.partition(".")[0]
        alone = "." not in key and value is not None
        default = "" if value is None else f"`{value!r}`"
        found = setting(key) if value is not None else None
        allowed, rule = (found.allowed.words, found.rule) if found else ("", "")
        row = f"| `{key}` | {default} | {html.escape(comment, quote=False)} | {allowed} | {rule} |"
        tables.setdefault("The run as a whole" if alone else group, []).append(row)
    return "\n".join(
        "\n".join(
            [f"## {group}", "", "| key | default | meaning | allowed | in a run |", "|---|---|---|---|---|", *rows, ""]
        )
        for group, rows in tables.items()
    )


# ------------------------------------------------------------------------------------------------------------ API


def api(path):
    """Markdown: what the module `path` says of itself, then of its public classes and functions."""
    source = path.read_text()
    tree, lines = ast.parse(source), source.splitlines()
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    parts = [f"## {name}", "", text(ast.get_docstring(tree))]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_public(node):
            parts += ["", f"### {node.name}", "", *described(node, lines)]
        if isinstance(node, ast.ClassDef) and is_public(node):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and is_public(method):
                    parts += ["", *described(method, lines, f"{node.name}.")]
    return "\n".join(parts) + "\n"


def is_public(node):
    return (not node.name.startswith("_") or node.name == "__call__") and bool(ast.get_docstring(node))


def described(node, lines, owner=""):
    """[the signature, the docstring]; a class has its fields, as the source has them, or the arguments of __init__."""
    head = owner + node.name
    if isinstance(node, ast.ClassDef):
        first = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [lines[n.lineno - 1] for n in node.body if isinstance(n, ast.AnnAssign)]
        head = "\n".join([f"class {head}{signature(first) if first else ''}", *fields])
    else:
        head = (owner.strip(".").lower() if node.name == "__call__" else head) + signature(node)
    return [f"<pre><code>{html.escape(head)}</code></pre>", "", text(ast.get_docstring(node))]


def signature(node):
    words = re.sub(r"^self(, )?", "", ast.unparse(node.args))
    return f"({words})"


def text(docstring):
    """A docstring as it stands in the source: its lines are its layout."""
    if not docstring:
        return ""
    return f'<div style="white-space: pre-wrap; margin-bottom: 1.5em">{html.escape(docstring)}</div>'
