"""Write docs/commands.md and docs/settings.md from the command line and conf/: `python docs/reference.py`."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 84  # characters of a line of code in the site
COMMANDS = """\
# Commands

All commands with their options and exit codes, as `--help` prints them.
"""
SETTINGS = """\
# Settings

The settings with their default values; a comment says what each means and between which values it makes sense. The
files that are not shown, in the same folders of `conf/`, have the same settings with other values.
[Configuration](configuration.md) says how to change them: for one run, `convoy run model.resnet.recipe.lr=0.05`; for
good, in these files. `model.x` stands for an architecture, `recipe.lr` is `model.x.recipe.lr` in full.
"""
# Sections of the page of settings: title, introduction, and the files in conf/ that it shows.
SECTIONS = (
    ("The pipeline", "", ["config.yaml"]),
    ("The data set", "`dataset=NAME` chooses a file, and `convoy use` writes one.", ["dataset/folder.yaml"]),
    (
        "Recipes",
        "The training recipe of all architectures, from which the file of an architecture differs.",
        ["recipe/default.yaml"],
    ),
    (
        "Architectures",
        "`model=[resnet,vgg]` chooses files. These are some, with the differences in their recipes.",
        ["model/lenet.yaml", "model/resnet.yaml", "model/convnext_tiny.yaml"],
    ),
    (
        "Networks of torchvision and timm",
        "Settings of [any network of torchvision and timm](models.md#add-a-network-of-torchvision-or-timm).",
        ["builder/default.yaml"],
    ),
    ("Hardware", "`trainer=NAME` chooses a file; `cpu`, `gpu` and `ddp` have the same settings as `auto`.",
     ["trainer/auto.yaml", "trainer/ray.yaml"]),
    (
        "Experiments",
        "`experiment=NAME` chooses a file, whose settings override those of the other files.",
        [
            f"experiment/{name}.yaml"
            for name in ("photographs", "finetune_small", "finetune", "cifar10", "cifar10_classics", "mnist")
        ],
    ),
)  # fmt: skip


def main() -> None:
    (ROOT / "docs/commands.md").write_text(render_commands())
    (ROOT / "docs/settings.md").write_text(render_settings())


def render_commands() -> str:
    """Return the page of all commands, made by Typer."""
    command = [sys.executable, "-m", "typer", "pipeline.cli", "utils", "docs", "--name", "convoy"]
    page = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    page = page.replace("# `convoy`\n", COMMANDS, 1)
    # Click's mark of a paragraph that is not wrapped.
    page = page.replace("\b\n", "")
    # The list of all commands has shortened descriptions.
    for name, first_line in re.findall(r"(?m)^## `convoy ([a-z-]+)`\n\n(.*)$", page):
        page = re.sub(rf"(?m)^\* `{name}`: .*$", f"* [`{name}`](#convoy-{name}): {first_line}", page, count=1)
    # Indented lines of a help text are a list.
    page = re.sub(r"(?m)^  (\S.*?)(?:  +(\S.*))?$", lambda line: f"* `{line[1]}`: {line[2]}", page)
    page = page.replace("Exit codes:\n*", "Exit codes:\n\n*")
    return re.sub(r"(?m)^Example: (.*)$", r"Example: `\1`", page).strip() + "\n"


def render_settings() -> str:
    """Return the page of all settings, with the files in conf/."""
    parts = [SETTINGS]
    for title, introduction, files in SECTIONS:
        blocks = [f"`conf/{file}`:\n\n```yaml\n{wrap_comments(ROOT / 'conf' / file)}```\n" for file in files]
        parts += [f"## {title}\n", *([f"{introduction}\n"] if introduction else []), *blocks]
    return "\n".join(parts)


def wrap_comments(file: Path) -> str:
    """Return the text of a YAML file with long comments above their lines, so that the page need not be scrolled."""
    lines = []
    for line in file.read_text().splitlines():
        setting, mark, comment = line.partition("# ")
        # Whatever the value, so that another one does not move a comment.
        if not mark or len(setting.partition(":")[0].rstrip()) + len(comment) <= WIDTH - 15:
            lines.append(line)
            continue
        start = setting[: len(setting) - len(setting.lstrip())] + mark
        lines += textwrap.wrap(comment, WIDTH, initial_indent=start, subsequent_indent=start)
        lines += [setting.rstrip()] if setting.strip() else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
