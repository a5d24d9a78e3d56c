"""Write docs/messages.md, the index of error messages, from the source: `python docs/messages.py`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/messages.md"
# Sections of the page: the modules whose messages they list, by the beginning of their paths. The first that matches
# counts.
SECTIONS = {
    "Images, labels and data sources": ("src/convoy/data", "pipeline/fetch", "pipeline/data_folder", "pipeline/use"),
    "Settings": ("src/convoy/core/config", "src/convoy/core/renamed", "pipeline/settings", "pipeline/conf_files"),
    "Networks and their weights": ("src/convoy/models", "src/convoy/training/init", "src/convoy/training/tor"),
    "Training and search": (
        "src/convoy/training",
        "src/convoy/search",
        "src/convoy/cluster",
        "pipeline/tune",
        "pipeline/trial",
    ),
    "Evaluation, promotion and registry": ("src/convoy/promotion", "src/convoy/evaluation", "src/convoy/registry"),
    "Tracking": ("src/convoy/tracking",),
    "Prediction and serving": ("src/convoy/serving", "src/convoy/inference", "pipeline/serve", "pipeline/predict"),
    "Commands and stages": ("",),
}
INTRODUCTION = """\
# Error messages

A message says what is wrong, where, and how to fix it. This page lists the errors that end a command, refuse a request
or leave a file out, to be searched; *italic words* stand for a name or a value, so search for the words between them.
[Troubleshooting](troubleshooting.md) explains those whose cause lies elsewhere. Also listed are
[what forms of images and tables are refused](data.md#forms-of-labelled-images), [verdicts](promotion.md#examples) and
[messages of a cluster](cluster.md#when-something-is-lost). The page is made from the source by
`python docs/messages.py`.
"""
# Errors, and what stands before their messages.
ERRORS = {
    "ConvoyError": "",
    "DownloadError": "",
    "StoreUnavailableError": "",
    "RequestError": "",
    "UnknownTableError": "*table* ",
    "InvalidImageError": "*image* ",
}


def main() -> None:
    PAGE.write_text(render())


def render() -> str:
    """Return the page."""
    sections: dict[str, set[str]] = {title: set() for title in SECTIONS}
    for file in sorted([*ROOT.glob("src/convoy/**/*.py"), *ROOT.glob("pipeline/*.py")]):
        path = file.relative_to(ROOT).as_posix()
        title = next(title for title, starts in SECTIONS.items() if path.startswith(starts))
        sections[title].update(find_messages(ast.parse(file.read_text())))
    parts = [
        f"## {title}\n\n" + "".join(f"* {message}\n" for message in sorted(messages, key=sort_key))
        for title, messages in sections.items()
    ]
    return "\n".join([INTRODUCTION, *parts])


def find_messages(tree: ast.Module) -> Iterator[str]:
    """Yield the messages of the errors that a module raises, as Markdown."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and (error := name_function(node.func)) in ERRORS:
            # The first argument of RequestError is a status.
            message = node.args[-1] if error == "RequestError" else node.args[0]
            if isinstance(message, ast.Name):
                message = constants.get(message.id, message)
            text = render_text(message)
            # A message without words of its own is another one's that is passed on.
            if re.search(r"[a-z]{3,} [a-z]{2,}", re.sub(r"\*[^*]*\*", "", text)):
                yield ERRORS[error] + text


def name_function(function: ast.expr) -> str:
    """Return the name of a function or class that is called, without its module."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def render_text(node: ast.expr) -> str:
    """Return a string expression as Markdown, with italic names in place of values."""
    if isinstance(node, ast.Constant):
        return re.sub(r"([*_<>`\[\]|\\])", r"\\\1", " ".join(str(node.value).split(" ")).replace("\n", " "))
    if isinstance(node, ast.JoinedStr):
        # Two values beside each other would end and begin the italics at once.
        return "".join(map(render_text, node.values)).replace("**", " ")
    if isinstance(node, ast.BinOp):
        return render_text(node.left) + render_text(node.right)
    return f"*{name_value(node.value if isinstance(node, ast.FormattedValue) else node)}*"


def name_value(node: ast.expr) -> str:
    """Return a name for the value of an expression: that of the variable, attribute or first argument."""
    if isinstance(node, ast.Call) and node.args:
        return name_value(node.args[0])
    names = [getattr(each, "attr", getattr(each, "id", "")) for each in ast.walk(node)]
    return next(filter(None, names), "value").strip("_").replace("_", " ").lower()


def sort_key(message: str) -> str:
    """Return the words of a message, by which it is sorted."""
    return re.sub(r"[^a-z ]", "", message.lower()).strip()


if __name__ == "__main__":
    main()
