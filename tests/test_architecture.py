"""Rules of the code base: where things are, what may import what, and that one thing has one name."""

import ast
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from convoy import models
from convoy.core import config
from convoy.core.config import validate
from convoy.data.sources.base import DatasetConfig

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "convoy"
# How a process ends, which library it imports, who watches it and on which machines it trains changes no output.
NO_INPUT = {f"pipeline/{name}.py" for name in ("__init__", "errors", "fork_server", "live", "signals")}
NO_INPUT |= {str(file.relative_to(ROOT)) for file in (LIBRARY / "cluster").iterdir()}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PYTHON = sorted(
    file
    for folder in ("src", "pipeline", "samples", "tests", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in file.parts
)
# the files that speak with MLflow
MLFLOW = (
    "inference/pyfunc_model.py",
    "promotion/champion.py",
    "promotion/migrate.py",
    "promotion/retention.py",
    "registry/model_loader.py",
    "registry/verification.py",
    "registry/versions.py",
    "serving/mlflow_client.py",
    "tracking/database.py",
    "tracking/logged_run.py",
    "tracking/runs.py",
    "tracking/store.py",
    "tracking/ui_views.py",
)
ALL_NETWORKS = sorted(file.stem for file in (ROOT / "conf/model").iterdir())
every_file = pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
every_stage = pytest.mark.parametrize("stage", STAGES)
every_library_file = pytest.mark.parametrize(
    "file", sorted(LIBRARY.rglob("*.py")), ids=lambda file: str(file.relative_to(LIBRARY))
)


def find_imports(tree: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """The dotted names that code imports, but for those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not inside_functions:
                pass
            case _:
                yield from find_imports(node, inside_functions)


def list_imports(file: Path, inside_functions: bool = True) -> set[str]:
    return set(find_imports(ast.parse(file.read_text()), inside_functions))


def list_packages(file: Path, inside_functions: bool = True) -> set[str]:
    return {name.partition(".")[0] for name in list_imports(file, inside_functions)}


# Layers: import-linter holds the contract in pyproject.toml


def test_layers_of_the_library_are_kept() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_package_of_the_library_is_in_a_layer() -> None:
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {name for layer in contract["layers"] for name in re.split(r" [|:] ", layer)}
    assert named == {
        f"convoy.{file.relative_to(LIBRARY).parts[0].removesuffix('.py')}" for file in LIBRARY.rglob("*.py")
    } - {"convoy.__init__"}


def test_imports_are_found_in_every_form() -> None:
    code = (
        "import a.b\nfrom c import d\nfrom . import i\n"
        "def f():\n    from e.f import g\n"
        "class A:\n    async def f(self):\n        import j\n"
        "if TYPE_CHECKING:\n    import h\n"
        "if True:\n    import k\n"
    )
    assert set(find_imports(ast.parse(code))) == {"a.b", "c.d", "e.f.g", "j", "k", "None.i"}
    assert set(find_imports(ast.parse(code), inside_functions=False)) == {"a.b", "c.d", "k", "None.i"}


@every_library_file
def test_library_knows_no_stage_and_imports_by_full_names(file: Path) -> None:
    assert not list_packages(file) & {"pipeline", "None"}


@every_library_file
def test_only_config_imports_hydra_and_few_files_mlflow(file: Path) -> None:
    allowed = {"core/config.py": {"hydra", "omegaconf", "dvc"}} | {name: {"mlflow"} for name in MLFLOW}
    doors = {"hydra", "omegaconf", "dvc", "mlflow"}
    assert list_packages(file) & doors <= allowed.get(str(file.relative_to(LIBRARY)), set())


@pytest.mark.parametrize("file", sorted((ROOT / "pipeline").glob("*.py")), ids=lambda file: file.name)
def test_stages_know_neither_hydra_nor_mlflow(file: Path) -> None:
    allowed = {"dvc_files.py": {"dvc"}, "dvc_state.py": {"dvc"}}
    assert list_packages(file) & {"hydra", "omegaconf", "dvc", "mlflow"} <= allowed.get(file.name, set())


@every_library_file
def test_data_and_ground_modules_import_no_torch_at_once(file: Path) -> None:
    if file.relative_to(LIBRARY).parts[0] in ("core", "data", "recipe.py"):
        assert not list_packages(file, inside_functions=False) & {"torch", "torchvision", "pytorch_lightning"}


def test_main_command_starts_without_mlflow_and_torch() -> None:
    code = "import sys, pipeline.cli, pipeline.run; print(sorted({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_register_stage_starts_without_torch() -> None:
    code = "import sys, pipeline.register; print('mlflow' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "True False\n"


@pytest.mark.parametrize("folder", [LIBRARY, ROOT / "pipeline"], ids=lambda folder: folder.name)
def test_nothing_waits_for_onnx_but_what_needs_it(folder: Path) -> None:
    users = {file.name for file in folder.rglob("*.py") if list_packages(file) & {"onnx", "onnxruntime", "onnxscript"}}
    assert users == ({"onnx_export.py", "onnx_model.py"} if folder == LIBRARY else set())
    for file in folder.rglob("*.py"):
        assert not list_packages(file, inside_functions=False) & {"onnx", "onnxruntime", "onnxscript"}


# One word, six places


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of conf/ and the params.yaml that it composes to."""
    folder = tmp_path_factory.mktemp("composed")
    shutil.copytree(ROOT / "conf", folder / "conf")
    config.compose(folder)
    return folder


def test_params_yaml_is_what_conf_composes_to(composed: Path) -> None:
    assert (ROOT / "params.yaml").read_bytes() == (composed / "params.yaml").read_bytes()


def get_stage(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


@every_stage
def test_stage_names_its_module_command_and_output_folder(stage: str) -> None:
    parts = get_stage(stage)
    assert (ROOT / "pipeline" / f"{stage}.py").is_file()
    assert parts["cmd"].split()[:3] == ["python", "-m", f"pipeline.{stage}"]
    outs = [out if isinstance(out, str) else next(iter(out)) for out in parts["outs"]]
    made = [*outs, *(next(iter(plot)) for plot in parts.get("plots", [])), *parts.get("metrics", [])]
    made = [path for path in made if path != "data.lock"]
    assert {"/".join(path.split("/")[:2]) for path in made} == {f"artifacts/{stage}"}


@every_stage
def test_settings_that_a_stage_watches_are_there(stage: str, composed: Path) -> None:
    params = config.load(composed / "params.yaml")
    for section in get_stage(stage)["params"]:
        name, _, key = section.partition(".")
        assert name in params
        assert key in ("", "${key}")


def test_every_section_of_the_settings_is_watched_by_a_stage(composed: Path) -> None:
    watched = {section.split(".")[0] for stage in STAGES for section in get_stage(stage)["params"]}
    # `convoy retrain` reads its section itself.
    assert watched == set(config.load(composed / "params.yaml")) - {"retrain"}


def test_every_network_names_its_module_and_yaml_file(composed: Path) -> None:
    params = config.compose(composed, [f"model=[{','.join(ALL_NETWORKS)}]"])["model"]
    assert {name for name in ALL_NETWORKS if params[name]["module"] == name} == set(models.names())
    assert {settings["module"] for settings in params.values()} == {*models.names(), "builders"}


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_settings_of_every_architecture_fit_its_schema(name: str, composed: Path) -> None:
    params = config.compose(composed, [f"model=[{name}]"])
    assert list(params["model"]) == [name]
    models.check_settings(name, params["model"][name])


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "conf/dataset").iterdir()))
def test_settings_of_every_dataset_fit_the_schema(name: str, composed: Path) -> None:
    dataset = validate(DatasetConfig, config.compose(composed, [f"dataset={name}"])["dataset"], "dataset")
    assert name in (dataset.name, "folder")


# What a stage depends on


def list_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("convoy", "pipeline")}


@contextlib.contextmanager
def forget_imports() -> Iterator[None]:
    """As in an interpreter that has not imported the project yet."""
    before = list_modules()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in list_modules():
            del sys.modules[name]
        sys.modules.update(before)


def list_imported_files(stage: str, key: str) -> set[str]:
    """The files of the project that a stage brings in, but for those that hold a docstring alone."""
    with forget_imports():
        module = importlib.import_module(f"pipeline.{stage}")
        for name in list_imports(Path(str(module.__file__))):
            if name.startswith("pipeline."):
                with contextlib.suppress(ModuleNotFoundError):  # the name of a function
                    importlib.import_module(name)
        if key:
            importlib.import_module(f"convoy.models.{key}")
        files = [Path(str(module.__file__)) for module in list_modules().values()]
    named = {str(file.relative_to(ROOT)) for file in files if len(ast.parse(file.read_text()).body) > 1}
    return named - NO_INPUT


def list_code_deps(stage: str, key: str) -> set[str]:
    deps = {dep.replace("${item.module}", key) for dep in get_stage(stage)["deps"]}
    return {dep for dep in deps if dep.startswith(("src/", "pipeline/"))}


@pytest.mark.parametrize(
    ("stage", "key"),
    [(stage, key) for stage in STAGES for key in ([*models.names(), "builders"] if "do" in STAGES[stage] else [""])],
)
def test_stage_depends_on_the_very_files_that_it_imports(stage: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / "src")  # before the copy that a registered model brings with it
    named = list_code_deps(stage, key)
    folders = tuple(f"{dep}/" for dep in named if (ROOT / dep).is_dir())
    files = {dep for dep in named if (ROOT / dep).is_file()}
    assert {file for file in list_imported_files(stage, key) if not file.startswith(folders)} == files
    assert len(files) + len(folders) == len(named)  # all there


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "register"])
def test_nothing_that_a_stage_imports_later_is_left_out(stage: str) -> None:
    key = models.names()[0] if "do" in STAGES[stage] else ""
    named = {
        str(file.relative_to(ROOT))
        for dep in list_code_deps(stage, key)
        for file in ([ROOT / dep] if (ROOT / dep).is_file() else sorted((ROOT / dep).rglob("*.py")))
    }
    modules = {re.sub(r"(/__init__)?\.py$", "", dep.removeprefix("src/")).replace("/", ".") for dep in named}
    modules |= {"pipeline.errors", "pipeline.fork_server", "pipeline.live", "pipeline.signals"}
    modules |= {"convoy.cluster", "convoy.cluster.config", "convoy.cluster.training"}
    for file in named:
        for name in list_imports(ROOT / file):
            if name.partition(".")[0] in ("convoy", "pipeline"):
                assert {name, name.rpartition(".")[0]} & modules


def test_stages_list_at_most_60_dependencies_on_code() -> None:
    assert sum(len(list_code_deps(stage, "lenet")) for stage in STAGES) <= 60


@every_stage
def test_stage_reads_only_what_an_earlier_one_makes(stage: str) -> None:
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    others = {dep for dep in get_stage(stage)["deps"] if not dep.startswith(("src/", "pipeline/"))}
    assert others <= {"data"} | {
        f"artifacts/{name}{item}" for name in earlier for item in ("", "/${key}", "/${item.size}")
    }  # register takes the folders of all architectures


# Files


@every_file
def test_every_file_begins_with_a_docstring(file: Path) -> None:
    first = file.read_text().partition("\n")[0]
    assert re.fullmatch(r'"""\S.{10,}', first)
    assert first.endswith(('."""', ".", "`.")), "the first line is a sentence"


def test_names_of_tests_have_at_most_60_characters() -> None:
    code = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"\bdef (test_\w+)", code) if len(name) > 60] == []


@every_file
def test_no_file_knows_the_machine_it_was_written_on(file: Path) -> None:
    assert not re.findall(r"/(?:work|root|home)\b", file.read_text())


@pytest.mark.parametrize(("name", "least"), [("requirements.lock", 50), ("cluster.lock", 5)])
def test_lock_is_of_hashes_alone_and_names_no_address(name: str, least: int) -> None:
    lock = (ROOT / name).read_text()
    requirements = re.split(r"\n(?=\S)", lock.strip())
    assert len(requirements) >= least
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement
    for word in ("http:", "https:", "--index", "--extra-index", "--find-links", "file:", "git+"):
        assert word not in lock


def test_lock_holds_every_package_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    locked, added = (
        re.findall(r"^([a-z0-9._-]+)", (ROOT / name).read_text(), re.MULTILINE)
        for name in ("requirements.lock", "cluster.lock")
    )
    assert not set(locked) & set(added)
    assert {re.match(r"[\w.-]+", name).group().lower() for name in asked} <= {*locked, *added}  # type: ignore[union-attr]


def test_every_make_target_that_is_named_anywhere_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {}
    workflows = (f".github/workflows/{name}.yml" for name in ("ci", "retrain", "upgrade"))
    for file in ("README.md", "Dockerfile", ".ci/run", *workflows):
        found = re.findall(r"(?:`|^ *|run: |RUN )make ([a-z-]+)(?:`| |$)", (ROOT / file).read_text(), re.MULTILINE)
        named[file] = set(found)
    assert {"install", "repro"} <= named["README.md"]
    assert {"install"} <= named[".github/workflows/retrain.yml"]
    assert set().union(*named.values()) <= targets


def test_table_of_stages_lists_their_settings() -> None:
    rows = re.findall(
        r"^\| ([a-z]+)(?:@x)? \|(?:[^|]*\|){2} ([^|]*) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    watched = {
        stage: [param.replace("${key}", "x") for param in described.get("do", described)["params"]]
        for stage, described in STAGES.items()
    }
    assert {stage: params.split(", ") for stage, params in rows if stage in watched} == watched
