"""Documentation: its links, and that every command, setting and file that it names exists."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.testing import CliRunner

from convoy import models
from convoy.core import config
from pipeline.check_settings import check_settings
from pipeline.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")])
MAX_README_LINES = 130
# The changelog also names what is gone.
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_current_page = pytest.mark.parametrize("page", CURRENT_PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def parse(page: Path) -> list[Token]:
    """The tokens of a page, with those inside paragraphs, headings and tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    return [each for token in tokens for each in (token, *(token.children or []))]


def list_commands(page: Path) -> list[str]:
    """The commands in the blocks of a page, without comments; one that continues after a pipe is one command."""
    blocks = [token.content for token in parse(page) if token.type == "fence" and token.info == "bash"]
    lines = re.sub(r"(?<=\|)\n\s*", " ", "\n".join(blocks)).splitlines()
    return [command for line in lines if (command := re.sub(r"\s+# .*", "", line).strip())]


def list_spans(page: Path) -> list[str]:
    """The code within the text of a page."""
    return [token.content for token in parse(page) if token.type == "code_inline"]


def list_links(page: Path) -> Iterator[str]:
    """The addresses of links and images that are not on the web."""
    for token in parse(page):
        links = [token.attrGet("href"), token.attrGet("src")]
        links += re.findall(r'src="([^"]+)"', token.content) if token.type == "html_block" else []
        yield from (str(link) for link in links if link and not re.match(r"https?:|\.\./\.\./actions/", str(link)))


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    tokens = parse(page)
    titles = [tokens[number + 1].content for number, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_relative_links_and_images_exist(page: Path) -> None:
    for link in list_links(page):
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in list_anchors(target), link


@every_page
def test_convoy_commands_and_their_options_exist(page: Path) -> None:
    for command in [*list_commands(page), *list_spans(page)]:
        if re.match(r"convoy( |$)(?!\.)", command):
            # With --help, options are checked and nothing is run.
            result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--help"])
            assert result.exit_code == 0, f"{command}: {result.output}"


def test_overrides_of_documented_runs_are_valid_settings() -> None:
    commands = {command for page in PAGES for command in list_commands(page) if command.startswith("convoy run ")}
    assert len(commands) > 3
    for command in commands:
        overrides = [word for word in shlex.split(command)[2:] if not word.startswith("--")]
        check_settings(config.parse(config.compose_text(ROOT, overrides)))


@every_current_page
def test_make_targets_and_modules_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join([*list_commands(page), *list_spans(page)])
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= targets
    for module in re.findall(r"-m (pipeline[\w.]*)", code):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@every_current_page
def test_settings_that_are_named_exist(page: Path) -> None:
    params = config.load(ROOT / "params.yaml")
    # x is any architecture, and a recipe is that of any.
    params["model"]["x"] = params["model"]["lenet"] | {"weights": "DEFAULT"}
    params["recipe"] = params["model"]["lenet"]["recipe"]
    params["trainer"] |= yaml.safe_load((ROOT / "conf/trainer/ray.yaml").read_text())
    for code in list_spans(page):
        setting = re.match(r"([a-z]+)(\.[a-z_]+)+(?=$|[:=])", code)
        if setting and setting[1] in params and code != "model.onnx":
            values = params
            for key in setting[0].split("."):
                assert key in values, code
                values = values[key]


@every_current_page
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    # x and mynet are any architecture.
    for code in list_spans(page):
        if re.match(r"(conf|docs|pipeline|samples|src|tests|benchmarks|\.ci|\.github)/", code):
            assert (ROOT / code).exists() or Path(code).stem in ("x", "mynet"), code


@pytest.mark.parametrize(
    ("module", "function", "page"),
    [("messages", "render", "messages.md"), ("reference", "render_commands", "commands.md")],
)
def test_page_made_from_the_source_is_that_of_the_source(
    monkeypatch: pytest.MonkeyPatch, module: str, function: str, page: str
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    rendered = getattr(importlib.import_module(module), function)()
    assert (ROOT / "docs" / page).read_text() == rendered, f"run `python docs/{module}.py`"


def test_page_of_settings_lists_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    listed, current = (
        # The values are those of this project, which may differ.
        [(line.partition(":")[0], line.partition("#")[2]) for line in text.splitlines()]
        for text in ((ROOT / "docs/settings.md").read_text(), importlib.import_module("reference").render_settings())
    )
    assert listed == current, "run `python docs/reference.py`"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in list_links(ROOT / "README.md")}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


def test_every_architecture_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text().lower().replace("resnet-9", "resnet9")
    assert all(name in readme for name in models.names())


def test_hooks_run_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"].removeprefix("env ").replace(".venv/bin/", "") for hook in repository["hooks"]]
    assert hooks == [line.strip() for line in recipe[1].splitlines()]


def test_version_is_the_same_in_all_files() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
