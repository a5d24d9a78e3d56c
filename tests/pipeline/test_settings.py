"""params.yaml: composing conf/ never discards other changes to it, and conf/ can adopt them."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from convoy.core import config
from convoy.core.errors import ConvoyError
from pipeline.check_settings import check_settings
from pipeline.conf_files import adopt_settings, differences
from pipeline.settings import CHECKSUM_FILE, compose
from repositories import init_git, run_dvc, run_git
from small_project import ROOT

Edit = Callable[[Path], object]
# little of it, as composing all of the project's conf/ takes a quarter of a second
CONF = {
    "config.yaml": "defaults:\n  - model: [lenet, vgg]\n  - _self_\n"
    "split: {seed: 1}\ntrain: {epochs: 16, patience: 0}\n",
    "model/lenet.yaml": "lenet: {widths: [6, 16]}\n",
    "model/vgg.yaml": "vgg: {depth: 11}\n",
}


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose one stage fails at seed 666; conf/ and params.yaml are committed."""
    root = tmp_path_factory.mktemp("composed") / "a project"
    for name, content in CONF.items():
        (root / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "conf" / name).write_text(content)
    config.compose(root)
    (root / "fail.py").write_text(
        "import pathlib, sys\nsys.exit('seed: 666' in pathlib.Path('params.yaml').read_text())\n"
    )
    (root / "dvc.yaml").write_text(
        f"stages:\n  idle: {{cmd: '{sys.executable} fail.py', params: [split, train, model], always_changed: true}}\n"
    )
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n[hydra]\n    enabled = true\n")
    (root / ".gitignore").write_text("/artifacts/\n/.dvc/tmp/\n/.dvc/cache/\n")
    init_git(root)
    run_dvc(root, "repro", "--quiet")
    commit(root)
    return root


@pytest.fixture
def fresh_clone(composed: Path, tmp_path: Path) -> Path:
    """The repository as it is cloned: nothing is remembered of what was composed."""
    return shutil.copytree(composed, tmp_path / "a project")


@pytest.fixture
def root(fresh_clone: Path) -> Path:
    """The repository after a first run of the main command."""
    compose_project(fresh_clone)
    return fresh_clone


@pytest.fixture
def project_conf(tmp_path: Path) -> Path:
    """A folder with the project's own conf/ and params.yaml."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in ("DVC_EXP_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


def commit(root: Path, *paths: str) -> None:
    run_git(root, "add", "--all", *(paths or ["."]))
    run_git(root, "commit", "--quiet", "--message", "next")


def compose_project(root: Path, *overrides: str, **options: bool) -> dict[str, Any]:
    """Compose as the main command does."""
    return compose(root, lambda params: None, overrides, **options)


def run_experiment(root: Path, name: str, *overrides: str) -> None:
    chosen = [part for override in overrides for part in ("--set-param", override)]
    run_dvc(root, "exp", "run", "--quiet", "--name", name, *chosen)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def edit_conf(root: Path, seed: int = 5) -> None:
    file = root / "conf/config.yaml"
    file.write_text(re.sub(r"(split:\s*\{?seed: )\d+", rf"\g<1>{seed}", file.read_text()))


def edit_params(root: Path, seed: int = 5) -> None:
    file = root / "params.yaml"
    file.write_text(re.sub(r"(split:\s*\{?seed: )\d+", rf"\g<1>{seed}", file.read_text()))


def assert_stops(root: Path, *lines: str) -> None:
    """Composing stops, names each key with both values, and leaves everything as it is."""
    before = (root / "params.yaml").read_bytes()
    for _ in range(2):  # the next scheduled run finds it as this one did
        with pytest.raises(ConvoyError) as refusal:
            compose_project(root)
    assert (root / "params.yaml").read_bytes() == before
    named = [line.strip() for line in str(refusal.value).splitlines() if line.startswith("  ") and ":" in line]
    assert named == list(lines)
    assert "  convoy settings adopt" in str(refusal.value)
    assert "  convoy settings compose" in str(refusal.value)
    assert compose_project(root, discard=True) == config.parse(config.compose_text(root))
    compose_project(root)


def assert_composes(root: Path, seed: int) -> None:
    assert compose_project(root)["split"]["seed"] == seed
    assert (root / "params.yaml").read_text() == config.compose_text(root)
    compose_project(root)


# Ordinary work


@pytest.mark.parametrize("is_committed", [True, False])
def test_edit_of_conf_is_composed(is_committed: bool, root: Path) -> None:
    for seed in (5, 6):
        edit_conf(root, seed)
        if is_committed:
            commit(root, "conf")
        assert_composes(root, seed)


def test_edit_of_conf_is_composed_in_a_fresh_clone(fresh_clone: Path) -> None:
    edit_conf(fresh_clone, 5)
    assert_composes(fresh_clone, 5)


def test_commits_of_conf_alone_are_composed_in_a_fresh_clone(fresh_clone: Path) -> None:
    for seed in (5, 6):
        edit_conf(fresh_clone, seed)
        commit(fresh_clone)
    edit_conf(fresh_clone, 7)
    assert_composes(fresh_clone, 7)


def test_another_branch_is_composed(root: Path) -> None:
    run_git(root, "switch", "--quiet", "--create", "other")
    edit_conf(root, 5)
    compose_project(root)
    commit(root)
    run_git(root, "switch", "--quiet", "main")
    assert_composes(root, 1)
    run_git(root, "switch", "--quiet", "other")
    edit_conf(root, 6)
    commit(root)
    assert_composes(root, 6)
    commit(root)
    edit_conf(root, 7)
    compose_project(root)
    run_git(root, "stash", "--quiet")
    assert_composes(root, 6)
    run_git(root, "stash", "pop", "--quiet")
    assert_composes(root, 7)


def test_params_yaml_that_was_taken_back_is_composed_again(root: Path) -> None:
    edit_conf(root, 5)
    compose_project(root)
    run_git(root, "checkout", "--quiet", "params.yaml")
    assert_composes(root, 5)


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_text("")])
def test_missing_params_yaml_is_composed(change: Edit, root: Path) -> None:
    change(root / "params.yaml")
    assert_composes(root, 1)


def test_comments_in_params_yaml_are_no_settings(root: Path) -> None:
    edit(root / "params.yaml", "seed: 1\n", "seed: 1 # mine\n")
    assert_composes(root, 1)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_run_that_was_killed_while_it_wrote_is_completed(
    written: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = Path.replace, iter([*[True] * written, False])

    def replace_some(file: Path, target: Path) -> Path:
        if next(left):
            return replace(file, target)
        raise KeyboardInterrupt

    edit_conf(root, 5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_some)
        compose_project(root)
    edit_conf(root, 6)
    assert_composes(root, 6)


# Overrides


def test_overrides_hold_for_one_run(fresh_clone: Path) -> None:
    before = config.load(fresh_clone / "params.yaml")
    assert list(compose_project(fresh_clone, "model=lenet", "train.epochs=4")["model"]) == ["lenet"]
    assert config.load(fresh_clone / "params.yaml")["train"]["epochs"] == 4
    assert compose_project(fresh_clone, "split.seed=2")["train"] == before["train"]
    assert compose_project(fresh_clone) == before


def test_overrides_do_not_discard_other_settings(fresh_clone: Path) -> None:
    edit_params(fresh_clone, seed=5)
    with pytest.raises(ConvoyError, match=r"\n  split\.seed: 5 in params\.yaml, 1 in conf/\n"):
        compose_project(fresh_clone, "train.epochs=4")
    assert config.load(fresh_clone / "params.yaml")["split"]["seed"] == 5


def test_overrides_are_adopted_afterwards(root: Path) -> None:
    compose_project(root, "train.epochs=4")
    compose_project(root, adopt=True)
    assert compose_project(root)["train"]["epochs"] == 4


def test_override_of_an_unknown_key_is_named(root: Path) -> None:
    with pytest.raises(
        ConvoyError, match=r"^conf/ does not compose with train\.epoch=4: Could not override .*did you mean epochs"
    ):
        compose_project(root, "train.epoch=4")


# Experiments


def test_settings_left_by_an_experiment_are_composed_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (5, 6):
        run_experiment(root, f"bold-{seed}", f"split.seed={seed}")
    assert config.load(root / "params.yaml")["split"]["seed"] == 6
    assert_composes(root, 1)
    assert "params.yaml held the settings of the last `dvc exp run`: conf/ is composed again" in capsys.readouterr().out


def test_experiment_in_a_fresh_clone_is_composed_again(fresh_clone: Path) -> None:
    run_experiment(fresh_clone, "bold", "split.seed=5", "model=[lenet]", "+more=1")
    assert_composes(fresh_clone, 1)


def test_settings_left_by_a_failed_experiment_are_recomposed(root: Path) -> None:
    run_dvc(root, "exp", "run", "--quiet", "--set-param", "split.seed=666", status=255)
    assert config.load(root / "params.yaml")["split"]["seed"] == 666
    assert_composes(root, 1)


def test_experiment_in_a_temporary_copy_leaves_nothing(root: Path) -> None:
    run_dvc(root, "exp", "run", "--quiet", "--temp", "--set-param", "split.seed=5")
    run_dvc(root, "exp", "run", "--quiet", "--queue", "--set-param", "split.seed=6")
    assert_composes(root, 1)
    edit_params(root, 5)
    assert_stops(root, "split.seed: 5 in params.yaml, 1 in conf/")


@pytest.mark.parametrize("later", ["", "run again"])
def test_applied_experiment_stops_composing(later: str, root: Path) -> None:
    run_experiment(root, "bold", "split.seed=5", "train.epochs=2")
    if later:
        assert_composes(root, 1)
    run_dvc(root, "exp", "apply", "bold")
    assert_stops(root, "split.seed: 5 in params.yaml, 1 in conf/", "train.epochs: 2 in params.yaml, 16 in conf/")
    # an experiment of the same settings that is run once more leaves the same again
    run_experiment(root, "again", "split.seed=5", "train.epochs=2")
    assert_composes(root, 1)


@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("merge", [["--ff"], ["--no-ff"], ["--squash"]])
def test_merged_experiment_stops_composing(merge: list[str], is_fresh: bool, root: Path) -> None:
    run_experiment(root, "bold", "split.seed=5")
    run_dvc(root, "exp", "branch", "bold", "good")
    run_git(root, "checkout", "--quiet", ".")
    run_git(root, "merge", "--quiet", *merge, "good")
    if merge == ["--squash"]:
        commit(root)
    if is_fresh:
        shutil.rmtree(root / "artifacts")
        shutil.rmtree(root / ".dvc/tmp")
    assert_stops(root, "split.seed: 5 in params.yaml, 1 in conf/")


@pytest.mark.parametrize("step", [["add", "params.yaml"], ["commit", "--quiet", "--all", "--message", "take it"]])
def test_staged_or_committed_experiment_stops_composing(step: list[str], root: Path) -> None:
    run_experiment(root, "bold", "split.seed=5")
    run_git(root, *step)
    assert_stops(root, "split.seed: 5 in params.yaml, 1 in conf/")


def test_edit_equal_to_an_old_experiment_stops_composing(root: Path) -> None:
    run_experiment(root, "bold", "split.seed=5")
    compose_project(root)
    edit_params(root, 5)
    assert_stops(root, "split.seed: 5 in params.yaml, 1 in conf/")


# Edits


@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("is_committed", [True, False])
def test_edit_of_params_yaml_stops_composing(is_committed: bool, is_fresh: bool, fresh_clone: Path) -> None:
    if not is_fresh:
        compose_project(fresh_clone)
    edit_params(fresh_clone)
    if is_committed:
        commit(fresh_clone)
        edit_conf(fresh_clone, 3)
        commit(fresh_clone)
    assert_stops(fresh_clone, f"split.seed: 5 in params.yaml, {3 if is_committed else 1} in conf/")


def test_keys_that_came_and_went_are_named(root: Path) -> None:
    params = config.load(root / "params.yaml")
    params["model"] = {"vgg": params["model"]["vgg"], "resnet": {"depth": 18}}
    params["train"] = {"epochs": "16", "more": [1, 2.5, "x"]}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert_stops(
        root,
        "model.resnet: a mapping in params.yaml, nothing in conf/",
        "model.lenet: nothing in params.yaml, a mapping in conf/",
        'train.epochs: "16" in params.yaml, 16 in conf/',
        'train.more: [1, 2.5, "x"] in params.yaml, nothing in conf/',
        "train.patience: nothing in params.yaml, 0 in conf/",
    )


def test_another_order_of_the_architectures_is_named(root: Path) -> None:
    params = config.load(root / "params.yaml")
    params["model"] = dict(reversed(params["model"].items()))
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert_stops(root, 'model: ["vgg", "lenet"] in params.yaml, ["lenet", "vgg"] in conf/')


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> other\n", "seed: [1\n", "- 1\n"])
def test_params_yaml_that_cannot_be_read_stops_composing(text: str, root: Path) -> None:
    (root / "params.yaml").write_text(text)
    with pytest.raises(ConvoyError, match=r"params\.yaml can't be read.* `convoy settings compose`"):
        compose_project(root)
    assert (root / "params.yaml").read_text() == text
    compose_project(root, discard=True)
    assert_composes(root, 1)


def test_settings_that_fail_the_check_are_not_written(project_conf: Path) -> None:
    compose_project(project_conf)
    edit_conf(project_conf, -1)
    before = (project_conf / "params.yaml").read_bytes(), (project_conf / CHECKSUM_FILE).read_bytes()
    with pytest.raises(ConvoyError, match=r"split\.seed=-1"):
        compose(project_conf, check_settings)
    assert ((project_conf / "params.yaml").read_bytes(), (project_conf / CHECKSUM_FILE).read_bytes()) == before


def test_settings_are_checked_again_only_if_they_changed(
    project_conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = config.load(project_conf / "params.yaml")
    weights = tmp_path / "start.safetensors"
    weights.touch()
    params["model"]["lenet"]["init"] = str(weights)
    check_settings(params)
    checked: list[object] = []
    monkeypatch.setattr("pipeline.check_settings._check", checked.append)
    check_settings(params)
    assert checked == []
    weights.unlink()
    check_settings(params)
    params["trainer"]["threads"] = 2
    check_settings(params)
    assert len(checked) == 2


@pytest.mark.parametrize("experiment", ["photographs", "finetune_small"])
def test_experiment_with_settings_of_an_unchosen_model(experiment: str, project_conf: Path) -> None:
    with pytest.raises(
        ConvoyError, match=r"conf/model/(alexnet|resnet)\.yaml is not chosen: choose it with the others.*~model"
    ):
        compose(project_conf, check_settings, [f"experiment={experiment}", "model=[lenet]"])


# Adoption

ADOPTED = [
    ["split.seed=5"],
    ["train.max_epochs=2", "register.gate.min_accuracy=0.5", "dataset.name='010'"],
    ["model=[resnet,lenet]", "model.resnet.blocks=[1,1,1,1]", "model.lenet.recipe.lr=1e-05"],
    ["dataset=mnist", "dataset.longest_side=64"],
    ["trainer=cpu", "trainer.threads=2"],
    ["experiment=finetune_small", "split.seed=7", "model.resnet.recipe.lr=0.02", "model.resnet.recipe.momentum=0.8"],
    ["experiment=photographs", "model.vgg.recipe.augment.hflip=false", "model.vgg.dropout=0.25"],
    [
        "dataset.group='patient-(\\d+)'",
        "register.gate.acknowledged_class_changes=['no','off']",
        "dataset.name='a: b # c'",
    ],
    ["model=[vgg,resnet,lenet,alexnet,googlenet]"],
    ["model.resnet.recipe.momentum=0.8", "model.vgg.recipe.class_balance=weighted_loss"],
]


@pytest.mark.parametrize("overrides", ADOPTED, ids=lambda overrides: " ".join(overrides))
def test_conf_adopts_whatever_an_experiment_may_set(overrides: list[str], project_conf: Path) -> None:
    wanted = config.compose(project_conf, overrides)
    text = (project_conf / "params.yaml").read_text()
    assert compose_project(project_conf, adopt=True) == wanted
    assert (project_conf / "params.yaml").read_text() == config.compose_text(project_conf) == text


def test_adopting_again_takes_back_an_earlier_choice(project_conf: Path) -> None:
    first = config.compose_text(project_conf)
    config.compose(project_conf, ["experiment=finetune", "dataset=mnist"])
    compose_project(project_conf, adopt=True)
    (project_conf / "params.yaml").write_text(first)
    compose_project(project_conf, adopt=True)
    assert config.compose_text(project_conf) == first


def test_adopting_changes_the_lines_that_it_must(project_conf: Path) -> None:
    before = {file: file.read_text().splitlines() for file in (project_conf / "conf").rglob("*.yaml")}
    config.compose(
        project_conf, ["split.seed=5", "model.resnet.blocks=[1,1,1,1]", "model=[resnet]", "dataset.longest_side=64"]
    )
    compose_project(project_conf, adopt=True)
    changed = {
        new
        for file, lines in before.items()
        for old, new in zip(lines, file.read_text().splitlines(), strict=True)
        if old != new
    }
    assert changed == {
        "  seed: 5 # of the random splits of preprocess; 0 or more, below 2^63",
        "  - model: [resnet] # which of the files in model/ are trained and compared",
        "  blocks: [1, 1, 1, 1] # of each of four stages; 1 to 36 each",
        "longest_side: 64 # pixels; 1 or more",
    }


def test_setting_of_the_shared_recipe_is_adopted_for_one_model(project_conf: Path) -> None:
    config.compose(project_conf, ["model.lenet.recipe.lr=0.01", "model.lenet.recipe.augment.hflip=true"])
    before = {file: file.read_text() for file in (project_conf / "conf").rglob("*.yaml")}
    compose_project(project_conf, adopt=True)
    file = project_conf / "conf/model/lenet.yaml"
    assert file.read_text() == before.pop(file) + (
        "  recipe:\n"
        "    lr: 0.01 # maximum learning rate; 0.001 to 0.3\n"
        "    augment:\n"
        "      hflip: true # horizontal flips; true for photographs, alternate: every second epoch, false for digits\n"
    )
    assert {other: other.read_text() for other in before} == before


def test_nothing_is_adopted_where_conf_is_composed_already(project_conf: Path) -> None:
    before = {file: file.read_bytes() for file in (project_conf / "conf").rglob("*.yaml")}
    compose_project(project_conf, adopt=True)
    assert {file: file.read_bytes() for file in (project_conf / "conf").rglob("*.yaml")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda params: params.update(extra=1), "no file there sets extra:"),
        (lambda params: params["train"].update(extra=1), "no file there sets train.extra:"),
        (lambda params: params["train"].pop("patience"), "no file there sets train.patience:"),
        (lambda params: params["model"].update(mynet={}), "params.yaml has model.mynet, for which there is no conf/"),
    ],
)
def test_key_that_no_file_sets_is_refused_and_conf_stays(
    change: Callable[[dict], object], named: str, project_conf: Path
) -> None:
    params = config.load(project_conf / "params.yaml")
    params["split"]["seed"] = 5
    change(params)
    before = {file: file.read_bytes() for file in (project_conf / "conf").rglob("*.yaml")}
    with pytest.raises(ConvoyError, match=re.escape(named)):
        adopt_settings(project_conf, params)
    assert {file: file.read_bytes() for file in (project_conf / "conf").rglob("*.yaml")} == before


def test_wrong_settings_are_not_adopted(project_conf: Path) -> None:
    edit_params(project_conf, -1)
    with pytest.raises(ConvoyError, match=r"split\.seed=-1"):
        compose(project_conf, check_settings, adopt=True)
    assert "split:\n  seed: 1 #" in (project_conf / "conf/config.yaml").read_text()


def test_applied_experiment_is_adopted(root: Path) -> None:
    run_experiment(root, "bold", "split.seed=5")
    run_dvc(root, "exp", "apply", "bold")
    assert compose_project(root, adopt=True)["split"]["seed"] == 5
    assert_composes(root, 5)


def test_numbers_of_another_type_differ() -> None:
    assert differences({"a": 1, "b": {"c": True}}, {"a": 1.0, "b": {"c": 1}}) == {"a": (1, 1.0), "b.c": (True, 1)}
