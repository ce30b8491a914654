#!/usr/bin/env bash
# Pillow 13.0.0: resize(size, filter, box=box) reads pixels outside of the box, as far as the filter reaches; cropping
# first does not. Two images that agree inside the box and differ outside of it are resized differently.
# Seen: by BICUBIC, 2 of 25 columns differ, by up to 33 grey levels; after crop(box), none.
# Crops that shall share no pixel, of training and evaluation say, share some in spite of disjoint boxes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import numpy as np
from PIL import Image

one = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
other = one.copy()
other[:, 60:] = 255 - other[:, 60:]
box, size, bicubic = (10, 10, 60, 60), (25, 25), Image.Resampling.BICUBIC


def difference(resize):
    first, second = (np.asarray(resize(Image.fromarray(image))).astype(int) for image in (one, other))
    return np.abs(first - second)


in_the_box = difference(lambda image: image.resize(size, bicubic, box=box))
cropped = difference(lambda image: image.crop(box).resize(size, bicubic))
columns = int((in_the_box.max((0, 2)) > 0).sum())
print(f"resize(box=...): {columns} of 25 columns differ, by up to {in_the_box.max()}; crop first: {cropped.max()}")
assert columns == 2 and in_the_box.max() == 33 and cropped.max() == 0, "the behaviour has changed"
PY
