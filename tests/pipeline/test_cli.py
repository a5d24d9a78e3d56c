"""The command line `convoy`: its commands, exit codes and errors, and where it finds the project."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from convoy import launcher
from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.launcher import CALLER_FOLDER, find_project
from pipeline.cli import app, main
from pipeline.errors import exit_on_error
from small_project import ROOT, make_project

CONVOY = Path(sys.executable).with_name("convoy")
COMMANDS = [
    [name, *subcommand]
    for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    for subcommand in [[each] for each in getattr(command, "commands", [])] or [[]]
]
LIGHT_COMMANDS = [["--help"], ["run", "--help"], ["leaderboard"], ["settings", "show"]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a leaderboard of two architectures, one of which failed."""
    root = make_project(tmp_path_factory.mktemp("project"))
    (root / "artifacts/register").mkdir(parents=True)
    table = {"model": ["lenet", "vgg"], "val_accuracy": [0.9, None], "epoch": [3, None], "parameters": [10, 20]}
    pd.DataFrame(table).to_csv(root / "artifacts/register/leaderboard.csv", index=False)
    return root


@pytest.fixture
def runner(project: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Runs commands in the project."""
    monkeypatch.chdir(project)
    monkeypatch.delenv(CALLER_FOLDER, raising=False)
    return CliRunner()


# Help


def test_commands_are_those_of_the_documentation() -> None:
    documented = "run use gc settings leaderboard ui predict serve package verify rollback sync migrate find-lr tune"
    documented += " retrain report monitor replay diff"
    assert {name for name, *_ in COMMANDS} == set(documented.split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_an_example(command: list[str], runner: CliRunner) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"convoy {' '.join(command)}" in result.output.partition("Example: ")[2]


def test_help_explains_exit_codes_and_completion(runner: CliRunner) -> None:
    result = runner.invoke(app, ["--help"])
    assert "\n    1          an error that the message explains, or a stage that failed\n" in result.output
    assert "`convoy --install-completion` makes the shell complete" in result.output


# What programs read


def test_settings_are_shown_as_yaml_and_as_json(project: Path, runner: CliRunner) -> None:
    before = (project / "params.yaml").read_bytes()
    shown = runner.invoke(app, ["settings", "show", "train.max_epochs=4"]).output
    assert yaml.safe_load(shown) == config.parse(config.compose_text(project, ["train.max_epochs=4"]))
    assert json.loads(runner.invoke(app, ["settings", "show", "--json"]).output)["train"]["max_epochs"] == 16
    assert (project / "params.yaml").read_bytes() == before


def test_leaderboard_is_shown_as_a_table_and_as_json(runner: CliRunner) -> None:
    assert "failed" in runner.invoke(app, ["leaderboard"]).output
    lenet, vgg = json.loads(runner.invoke(app, ["leaderboard", "--json"]).output)
    assert lenet == {"model": "lenet", "val_accuracy": 0.9, "epoch": 3, "parameters": 10}
    assert vgg["val_accuracy"] is None


# Errors


def test_failed_experiment_says_how_to_restore_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root, is_explained in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        monkeypatch.setenv("DVC_EXP_NAME", "bold")
        monkeypatch.setenv("DVC_ROOT", str(root))
        with pytest.raises(SystemExit) as end, exit_on_error("train"):
            raise ConvoyError("no")
        assert str(end.value).startswith("convoy: train: no")
        assert ("git checkout params.yaml dvc.lock" in str(end.value)) == is_explained


def test_error_of_the_user_is_one_line_and_exit_code_1(runner: CliRunner) -> None:
    result = runner.invoke(app, ["settings", "show", "model=resnett"])
    assert result.exit_code == 1
    assert result.output == "convoy: conf/model/resnett.yaml: there is no such file; did you mean resnet?\n"


@pytest.mark.parametrize("wrong", [["train"], ["leaderboard", "--yaml"], ["predict"], ["rollback"], ["sync", "now"]])
def test_wrong_usage_is_exit_code_2(wrong: list[str], runner: CliRunner) -> None:
    result = runner.invoke(app, wrong)
    assert result.exit_code == 2
    assert "--help' for help." in result.output


def test_full_disk_is_one_line(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.leaderboard.print_leaderboard", fail)
    result = runner.invoke(app, ["leaderboard"])
    assert result.exit_code == 1
    assert result.output.startswith("convoy: the disk is full: make room and run this again; ")


def test_unexpected_error_keeps_its_traceback(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.leaderboard.print_leaderboard", lambda *_, **__: 1 / 0)
    assert isinstance(runner.invoke(app, ["leaderboard"]).exception, ZeroDivisionError)


# The run


@pytest.mark.parametrize("status", [0, 1, 128 + signal.SIGTERM, 255])
def test_run_passes_its_options_on_and_exits_with_its_status(
    status: int, project: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = []
    monkeypatch.setattr("pipeline.run.run", lambda *args, **options: passed.append((args, options)) or status)
    overrides = ["model=resnet", "train.max_epochs=4"]
    assert runner.invoke(app, ["run", *overrides, "--update"]).exit_code == status
    assert passed == [((project, overrides), {"update": True, "pull": False, "jobs": 1})]


def test_python_m_pipeline_is_the_run(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("Usage: convoy run ")


def test_run_checks_settings_with_overrides_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "project", [])
    (root / ".git").mkdir()
    monkeypatch.chdir(root)
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(SystemExit, match=r"^convoy: train\.max_epochs=0: "):
        main(["run", "train.max_epochs=0"])
    assert (root / "params.yaml").read_bytes() == before


# Start


@pytest.mark.parametrize("command", LIGHT_COMMANDS, ids=" ".join)
def test_light_commands_import_neither_torch_nor_mlflow(command: list[str], project: Path) -> None:
    code = (
        f"import sys\nfrom pipeline.cli import app\napp({command}, standalone_mode=False)\n"
        "print(sorted({'mlflow', 'torch'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=project, env=environment, text=True)
    assert printed.splitlines()[-1] == "[]"


def test_launcher_imports_the_standard_library_only() -> None:
    code = "import sys, convoy.launcher; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {code}"]
    imported = set(yaml.safe_load(subprocess.check_output(command, text=True)))
    assert imported - set(sys.stdlib_module_names) <= {"__main__", "convoy"}


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"^convoy: Windows is not supported: install WSL"):
        launcher.main()


# The project


def test_project_is_found_from_any_folder_below_it(tmp_path: Path) -> None:
    (tmp_path / "project/pipeline").mkdir(parents=True)
    (tmp_path / "project/dvc.yaml").touch()
    below = tmp_path / "project/data/cats"
    below.mkdir(parents=True)
    assert find_project(below) is None
    (tmp_path / "project/pipeline/stage.py").touch()
    assert find_project(below) == find_project(tmp_path / "project") == tmp_path / "project"
    assert find_project(tmp_path) is None


def run_installed(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", CALLER_FOLDER)}
    return subprocess.run(
        [str(CONVOY), *arguments], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )


def test_installed_command_runs_in_a_folder_below_the_project() -> None:
    result = run_installed(ROOT / "samples", "settings", "show")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == config.compose_text(ROOT)


def test_installed_command_says_what_is_missing_elsewhere(tmp_path: Path) -> None:
    result = run_installed(tmp_path, "run", "model=resnet")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"convoy: {tmp_path} is in no project, which has dvc.yaml and pipeline/: ")


def test_version_help_and_completion_work_everywhere(tmp_path: Path) -> None:
    version = run_installed(tmp_path, "--version")
    assert version.stdout == run_installed(ROOT, "--version").stdout
    assert version.stdout.startswith("convoy ")
    assert "in any\n  folder below it, `convoy --help` lists the commands" in run_installed(tmp_path, "--help").stdout
    silent = run_installed(tmp_path, _CONVOY_COMPLETE="complete_bash")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_shell_completes_commands() -> None:
    result = run_installed(ROOT, _CONVOY_COMPLETE="complete_bash", COMP_WORDS="convoy ro", COMP_CWORD="1")
    assert result.stdout.split() == ["rollback"]


def test_paths_are_relative_to_the_folder_of_the_user(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv(CALLER_FOLDER, str(tmp_path))
    with pytest.raises(SystemExit, match=rf"^convoy: {os.path.relpath(tmp_path, project)}/lenet/\S+ does not exist"):
        main(["verify", "models:/convoy@champion", "lenet"])
