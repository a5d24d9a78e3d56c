"""Makes digits.zip from the copy of the UCI digits that scikit-learn carries: `python samples/make_digits.py`.

The same bytes each time: fixed order and dates, and nothing compressed (compressors differ between versions).
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def make(archive: Path) -> None:
    """Write 1,797 grey PNGs of 8x8 pixels as `digits/<class>/<number>.png`."""
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the set counts ink from 0 to 16
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for number, (pixels, label) in enumerate(zip(grey, digits.target, strict=True)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=0)
            name = zipfile.ZipInfo(f"digits/{label}/{number:04}.png", date_time=(1998, 7, 1, 0, 0, 0))
            file.writestr(name, png.getvalue())


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.zip"))
