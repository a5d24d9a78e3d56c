"""The lesson, executed: each block of Python in README.md runs, and must print what stands below it."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def run(page: Path, output: Path) -> None:
    """Execute the page in the current project, and write its pictures into `output`."""
    sys.path.insert(0, str(FOLDER))
    import draw

    draw.OUTPUT = output
    text = page.read_text()
    names: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        printed = io.StringIO()
        line = text.count("\n", 0, block.start(1)) + 1
        with contextlib.redirect_stdout(printed):
            # Errors name the line of the page.
            exec(compile("\n" * (line - 1) + block[1], str(page), "exec"), names)
        if (block[2] or "") != printed.getvalue():
            sys.exit(f"{page}, line {line}: it prints\n{printed.getvalue()}and not\n{block[2] or ''}")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    run(FOLDER / "README.md", target.resolve())
    print(f"every step agrees with NumPy, SciPy and PyTorch; the pictures are in {os.path.relpath(target)}")
