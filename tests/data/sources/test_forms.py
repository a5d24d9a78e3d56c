"""The forms of labelled images: those in the tables of docs/data.md are read or refused as the tables say."""

import dataclasses
import io
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from convoy.core.errors import ConvoyError
from convoy.data.sources.base import Selection, TableConfig
from convoy.data.sources.folder import read_folder
from factories import make_png, make_zip, write
from small_project import ROOT


@dataclasses.dataclass
class Form:
    """A row of one of the tables."""

    name: str
    images: list[str]
    files: dict[str, str]  # name -> text
    result: str

    @property
    def selection(self) -> Selection:
        words = shlex.split(self.name.partition("`")[2].rstrip("`"))
        values: dict[str, list[str]] = {}
        for option, value in zip(words[::2], words[1::2], strict=True):
            values.setdefault(option.removeprefix("--"), []).append(value)
        table = {key: values[key][0] for key in ("path", "group") if key in values}
        labels = values.get("label")
        return Selection(
            table=TableConfig(
                **table,
                file=values["table"][0] if "table" in values else None,
                label=labels[0] if labels and len(labels) == 1 else labels,
            ),
            exclude=values.get("exclude"),
        )

    def write(self, data: Path, in_archive: bool = False) -> Path:
        archives: dict[str, dict[str, bytes]] = {}
        content: dict[str, bytes | str] = dict(self.files)
        for number, path in enumerate(self.images):
            archive, _, name = path.rpartition(":")
            if archive or in_archive:
                archives.setdefault(archive or "images.zip", {})[name] = make_png(number)
            else:
                content[name] = make_png(number)
        content |= {archive: make_zip(images) for archive, images in archives.items()}
        for name in [name for name in content if name.endswith(".parquet")]:
            table = pd.read_csv(io.StringIO(str(content[name])))
            table["image"] = [make_png(number) for number in range(len(table))]
            content[name] = table.to_parquet()
        return write(data, content)


def read_forms(heading: str) -> list[Form]:
    text = (ROOT / "docs/data.md").read_text()
    lines = text[text.index(f"| {heading} | images |") :].splitlines()[2:]
    forms = []
    for line in lines[: lines.index("")]:
        name, images, files, content, result = (cell.strip() for cell in re.split(r"(?<= )\|(?= )|^\||\|$", line)[1:-1])
        texts = ["\n".join(re.findall("`([^`]+)`", part)) + "\n" for part in content.split(" and `")]
        names = re.findall("`([^`]+)`", files)
        # The second part has lost its first backtick.
        texts = [texts[0], *("\n".join(re.findall("`([^`]+)`", f"`{part}")) for part in content.split(" and `")[1:])]
        forms.append(Form(name, re.findall("`([^`]+)`", images), dict(zip(names, texts, strict=False)), result))
    return forms


@pytest.mark.parametrize("in_archive", [False, True])
@pytest.mark.parametrize("form", read_forms("form"), ids=lambda form: form.name)
def test_form_is_read_as_the_documentation_says(form: Form, in_archive: bool, tmp_path: Path) -> None:
    samples = list(read_folder(form.write(tmp_path / "data", in_archive), form.selection).samples)
    found = [" ".join([sample.label, sample.split, sample.group]).rstrip() for sample in samples]
    assert sorted(found) == sorted(re.findall("`([^`]+)`", form.result))


@pytest.mark.parametrize("form", read_forms("refused"), ids=lambda form: form.name)
def test_other_form_is_refused_with_what_was_found(form: Form, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError) as refusal:
        read_folder(form.write(tmp_path / "data"), form.selection)
    assert form.result in str(refusal.value)
    assert any(word in str(refusal.value) for word in ("dataset.exclude", "dataset.table"))
