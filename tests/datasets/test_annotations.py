import json

import pytest
from PIL import Image

from atr.core.files import sha256
from atr.datasets import PreparedImages, annotations, load_prompts, load_text_centres
from atr.datasets.prepared import save_images

PARAMETERS = {"seed": 3, "prepare": {"source": "micro", "prompts": [], "split": "test"}}
PROMPTS = {"docs/0": ["na\u2028me", "é"], "docs/1": []}
CENTRES = {"docs/0": [(0.1 + 0.2, 1 / 3), (0.0, 2**-60)], "docs/1": []}


def save(folder, values, annotation):
    images = ((name, Image.new("RGB", (8, 8)), value) for name, value in values.items())
    save_images(folder, images, PARAMETERS, annotation)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, PROMPTS, annotations.PROMPT_ANNOTATION)
    return tmp_path


def test_values_come_back_bit_by_bit(tmp_path):
    save(tmp_path / "pretrain", PROMPTS, annotations.PROMPT_ANNOTATION)
    save(tmp_path / "evaluate", CENTRES, annotations.TEXT_ANNOTATION)
    assert load_prompts(tmp_path / "pretrain") == PROMPTS
    assert load_text_centres(tmp_path / "evaluate") == CENTRES
    assert PreparedImages(tmp_path / "pretrain").ids == list(PROMPTS)


def test_a_folder_without_images_has_nothing_to_say(tmp_path):
    save(tmp_path, {}, annotations.TEXT_ANNOTATION)
    assert load_text_centres(tmp_path) == {}


def test_a_folder_whose_manifest_lists_none_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"manifest.json lists no text_centres.jsonl; the stage prepare writes"
    ):
        load_text_centres(folder)
    with pytest.raises(ValueError, match=r"manifest.json is missing; the stage prepare writes it"):
        load_text_centres(folder / "elsewhere")


def test_a_missing_or_edited_file_is_refused(folder):
    path = folder / "prompts.jsonl"
    path.write_text(path.read_text().replace("é", "e"))
    with pytest.raises(ValueError, match=r"prompts.jsonl is not the file that .*manifest.json lists"):
        load_prompts(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"prompts.jsonl is missing, though .*manifest.json lists it"):
        load_prompts(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"image": "docs/0", "prompts": "a"}'],
            r"prompts.jsonl line 1: prompts: 'a' is not allowed, allowed: list",
        ),
        (['{"image": "docs/0"}'], "prompts.jsonl line 1: prompts is missing"),
        (['{"image": "docs/0", "prompts": []}'] * 2, "prompts.jsonl: image: 'docs/0' occurs twice"),
        (['{"image": "docs/0", "prompts": []}'], "prompts.jsonl is not the file that .* lists"),
    ],
)
def test_lines_that_are_not_allowed_are_named(folder, lines, message):
    (folder / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["annotations"][0]["sha256"] = sha256(folder / "prompts.jsonl")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        load_prompts(folder)
