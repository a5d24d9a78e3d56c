"""The lesson: its computations agree with NumPy, SciPy and PyTorch, and its pictures show a trained network."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from small_project import ROOT, make_project, run_stages

pytestmark = pytest.mark.slow

LESSON = ROOT / "docs/lesson"


def run_lesson(project: Path, output: Path, page: Path = LESSON / "README.md") -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path[:0] = [{str(LESSON)!r}, {str(ROOT / 'src')!r}]; import run; from pathlib import Path; "
    )
    code += f"run.run(Path({str(page)!r}), Path({str(output)!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_project(tmp_path_factory.mktemp("road"))
    run_stages(root, until="train")
    return root


def test_every_step_of_the_lesson_computes_what_it_says(trained_project: Path, tmp_path: Path) -> None:
    done = run_lesson(trained_project, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pictures = sorted(tmp_path.glob("*.png"))
    assert [file.name for file in pictures] == sorted(file.name for file in LESSON.glob("*.png"))
    for file in pictures:
        assert np.asarray(Image.open(file).convert("L")).std() > 10, f"{file.name} is nearly empty"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("result[n] += kernel[k] * signal[n - k]", "result[n] += kernel[k] * signal[n - k] * 1.01"),
        ("full[(k - 1) // 2 :", "full[k // 2 + 1 :"),
        ("image[r * stride : r * stride + size", "image[r * size : r * size + size"),
        ("608 parameters", "600 parameters"),
    ],
)
def test_wrong_computation_stops_the_lesson(trained_project: Path, tmp_path: Path, right: str, wrong: str) -> None:
    text = (LESSON / "README.md").read_text()
    assert right in text
    (tmp_path / "page.md").write_text(text.replace(right, wrong))
    assert run_lesson(trained_project, tmp_path, tmp_path / "page.md").returncode != 0
