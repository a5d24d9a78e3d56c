"""The scheduled job on this machine: the `run:` lines of its workflow, in fresh clones with remotes of their own."""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image, ImageOps

from convoy.core import config
from repositories import init_git, run_git
from servers import find_free_port, run_mlflow
from small_project import ROOT, draw_images

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/retrain.yml").read_text())
STEPS = WORKFLOW["jobs"]["retrain"]["steps"]
SMALL = {
    "dataset: folder ": "dataset: shapes ",
    "[lenet, alexnet, vgg, googlenet, resnet]": "[lenet]",
    "max_epochs: 16": "max_epochs: 6",
    "min_accuracy: 0.9": "min_accuracy: 0.5",
    "min_test_images: 300": "min_test_images: 50",
    "min_images_per_class: 30": "min_images_per_class: 5",
    "    mode: better": "    mode: non_inferior",
    "    margin: 0.01": "    margin: 0.2",
}
# The options of `gh` that the job may use; any other ends with status 2.
FORGE = """#!{python}
import argparse, json, pathlib
file = pathlib.Path({file!r})
opened = json.loads(file.read_text()) if file.exists() else []
parser = argparse.ArgumentParser("gh", allow_abbrev=False)
requests = parser.add_subparsers(required=True).add_parser("pr").add_subparsers(dest="action", required=True)
listing, creation = (requests.add_parser(name, allow_abbrev=False) for name in ("list", "create"))
listing.add_argument("--head", required=True)
listing.add_argument("--json", choices=["number"], required=True)
for name in ("--head", "--title", "--body-file"):
    creation.add_argument(name, required=True)
options = parser.parse_args()
if options.action == "list":
    print(json.dumps([{{"number": number}} for number, each in enumerate(opened) if each["head"] == options.head]))
else:
    text = pathlib.Path(options.body_file).read_text()
    file.write_text(json.dumps([*opened, {{"head": options.head, "title": options.title, "body": text}}]))
    print("https://forge.example/pulls/1")
"""


@dataclasses.dataclass
class Schedule:
    """What outlives a job: the repository, the bucket of images, the remotes, and the caches of the CI."""

    folder: Path
    port: int

    @property
    def images(self) -> Path:
        return self.folder / "bucket/images"

    @property
    def clone(self) -> Path:
        """The folder of the job, which is always the same, as on a runner."""
        return self.folder / "runner/convoy"

    @property
    def kept(self) -> Path:
        """What the CI caches from job to job, besides the environment."""
        return self.folder / "kept"

    @property
    def pull_requests(self) -> list[dict[str, str]]:
        file = self.folder / "pulls.json"
        return yaml.safe_load(file.read_text()) if file.exists() else []

    @property
    def summary(self) -> str:
        return (self.clone / "artifacts/retrain/summary.md").read_text()

    @contextlib.contextmanager
    def server(self) -> Iterator[None]:
        """MLflow's server, which keeps everything in a folder."""
        (self.folder / "mlflow").mkdir(exist_ok=True)
        with run_mlflow(self.folder / "mlflow", self.port):
            yield

    def champion(self) -> tuple[str, int]:
        """Return the version of the champion, and how many versions there are."""
        client = mlflow.MlflowClient(f"http://127.0.0.1:{self.port}")
        versions = client.search_model_versions("name = 'shapes'")
        with contextlib.suppress(MlflowException):
            return str(client.get_model_version_by_alias("shapes", "champion").version), len(versions)
        return "", len(versions)

    def draw(self, folder: Path, each: int, batch: str, *, is_inverted: bool = False) -> None:
        """Draw images of each class into a folder."""
        draw_images(folder, each, seed=sum(map(ord, batch)))
        for file in folder.rglob("*.png") if is_inverted else ():
            with Image.open(file) as image:
                ImageOps.invert(image).save(file)

    def add_images(self, each: int, batch: str, *, is_inverted: bool = False) -> None:
        """Add images to each class of the bucket."""
        drawn = self.folder / "drawn"
        self.draw(drawn, each, batch, is_inverted=is_inverted)
        for file in drawn.rglob("*.png"):
            target = self.images / file.parent.name / f"{batch.replace('/', '-')}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        shutil.rmtree(drawn)

    def change_setting(self, old: str, new: str) -> None:
        """Change a line of conf/config.yaml, as a person does."""
        desk = self.open_desk()
        settings = desk / "conf/config.yaml"
        assert old in settings.read_text()
        settings.write_text(settings.read_text().replace(old, new))
        config.compose(desk)
        run_git(desk, "commit", "--all", "--quiet", "--message", "Change a setting")
        run_git(desk, "push", "--quiet", "origin", "main")

    def open_desk(self) -> Path:
        """Return a clone of a person."""
        desk = self.checkout(self.folder / "desk")
        run_git(desk, "config", "user.name", "person")
        run_git(desk, "config", "user.email", "person@localhost")
        return desk

    def checkout(self, clone: Path | None = None) -> Path:
        """Clone the repository as a new job does."""
        clone = clone or self.clone
        shutil.rmtree(clone, ignore_errors=True)
        run_git(self.folder, "clone", "--quiet", str(self.folder / "origin.git"), str(clone))
        return clone

    def environment(self, **inputs: bool) -> dict[str, str]:
        """The environment of the job: its `env:` with the secrets of a repository, and no other variables of ours."""
        secrets = {
            "DVC_REMOTE_URL": str(self.folder / "store"),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}",
        }
        expressions = {
            "${{ github.token }}": "token",
            "${{ inputs.now && '--now' || '' }}": "--now" if inputs.get("now") else "",
            WORKFLOW["env"]["EXIT"]: "" if inputs.get("fail_unless_promoted") else "--exit-zero",
        }

        def evaluate(text: str) -> str:
            if text in expressions:
                return expressions[text]
            return re.sub(r"\$\{\{ (?:secrets|vars)\.(\w+) \}\}", lambda match: secrets.get(match[1], ""), text)

        kept = {
            name: value
            for name, value in os.environ.items()
            if not re.match("MLFLOW_|DVC_|CONVOY_|AWS_|GIT_|PYTHONPATH|VIRTUAL_ENV|OMP_", name)
        }
        # The environment of the tests is active, that of a job is not.
        others = [folder for folder in kept["PATH"].split(os.pathsep) if folder != str(Path(sys.executable).parent)]
        path = os.pathsep.join([str(self.folder / "bin"), *others])
        return kept | {name: evaluate(text) for name, text in WORKFLOW["env"].items()} | {"PATH": path}

    def run_job(self, **inputs: bool) -> subprocess.CompletedProcess[str]:
        """Run the steps of the job in a fresh clone, and return the last of its processes that ran."""
        # An environment can't be moved, so it stays in its place on the runner.
        venv = self.clone.parent / "venv"
        if (self.clone / ".venv").exists():
            (self.clone / ".venv").rename(venv)
        clone, failed = self.checkout(), None
        done = subprocess.CompletedProcess[str]([], 0)
        for step in STEPS:
            if failed and step.get("if") != "always()":
                continue
            action = step.get("uses", "").partition("@")[0]
            paths = step.get("with", {}).get("path", "").split()
            if action == "actions/cache" and venv.exists():
                venv.rename(clone / ".venv")
            elif action == "actions/cache/restore":
                _copy_existing(paths, self.kept, clone)
            elif action == "actions/cache/save":
                self.save_caches()
            elif "run" in step:
                done = self.run_line(step["run"], **inputs)
                failed = done if done.returncode else None
        return failed or done

    def save_caches(self) -> None:
        """Save the caches as the last step of a job does."""
        (paths,) = (step["with"]["path"] for step in STEPS if step.get("uses", "").startswith("actions/cache/save@"))
        _copy_existing(paths.split(), self.clone, self.kept)

    def run_line(self, line: str, clone: Path | None = None, **inputs: bool) -> subprocess.CompletedProcess[str]:
        """Run a line as a runner does."""
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", line]
        return subprocess.run(
            command, cwd=clone or self.clone, env=self.environment(**inputs), capture_output=True, text=True
        )

    def merge(self) -> None:
        """Merge the newest pull request, as a person does."""
        desk = self.open_desk()
        run_git(desk, "merge", "--quiet", f"origin/{self.pull_requests[-1]['head']}")
        run_git(desk, "push", "--quiet", "origin", "main")

    def snapshot(self) -> tuple[str, set[Path], tuple[str, int], int]:
        """Everything that a job may change: branches, the DVC remote, the champion and the pull requests."""
        refs = subprocess.check_output(["git", "for-each-ref"], cwd=self.folder / "origin.git", text=True)
        return refs, set((self.folder / "store").rglob("*")), self.champion(), len(self.pull_requests)


def _copy_existing(paths: list[str], source: Path, target: Path) -> None:
    for path in paths:
        if (source / path).exists():
            shutil.rmtree(target / path, ignore_errors=True)
            shutil.copytree(source / path, target / path, symlinks=True)


def link_environment(target: Path) -> None:
    """Make a copy of this environment in another place, as if the CI had cached it there."""
    target.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name == "ready":
            continue
        if path.is_dir():
            # Files of packages are replaced and never rewritten, so that links are as good as copies, and quick.
            copy = shutil.copy2 if path.name == "bin" else _link
            shutil.copytree(path, target / path.name, symlinks=True, copy_function=copy)
        else:
            shutil.copy2(path, target / path.name, follow_symlinks=False)
    (target / "ready").write_text(f"{target}\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def make_schedule(folder: Path) -> Schedule:
    """A project with small settings in a bare repository, and 300 images in a folder that stands for a bucket."""
    schedule, project = Schedule(folder, find_free_port()), folder / "project"
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, listed):
        if name not in ("data.dvc", "data.lock", "dvc.lock") and (ROOT / name).exists():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    schedule.add_images(100, "first")
    init_git(project)
    shutil.copy(project / "conf/dataset/folder.yaml", project / "conf/dataset/shapes.yaml")
    dataset, settings = project / "conf/dataset/shapes.yaml", project / "conf/config.yaml"
    text = re.sub("^name: .*", "name: shapes", dataset.read_text(), flags=re.MULTILINE)
    dataset.write_text(text)
    for old, new in SMALL.items():
        assert old in settings.read_text(), old
        settings.write_text(settings.read_text().replace(old, new, 1))
    config.compose(project)
    import_images = [sys.executable, "-m", "dvc", "import-url", "--quiet", str(schedule.images), "data"]
    subprocess.run(import_images, cwd=project, check=True)
    run_git(project, "add", "--all")
    run_git(project, "commit", "--quiet", "--message", "Begin")
    run_git(folder, "init", "--quiet", "--bare", "--initial-branch=main", "origin.git")
    run_git(project, "push", "--quiet", str(folder / "origin.git"), "main")
    schedule.checkout()
    link_environment(schedule.clone / ".venv")
    forge = folder / "bin/gh"
    forge.parent.mkdir()
    forge.write_text(FORGE.format(python=sys.executable, file=str(folder / "pulls.json")))
    forge.chmod(0o755)
    return schedule
