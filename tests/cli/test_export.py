"""What the command prints and refuses; the graphs have their tests beside `atr.vlm.export`."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from atr.cli import export as command
from atr.cli.export import keeps_same, parse_keep
from atr.cli.main import main
from atr.micro import world

MICRO = Path(__file__).parents[2] / "data/micro"
SELECTOR = str(MICRO / "selectors/selector")


def run(*arguments, vlm=str(MICRO / "llava"), selector=SELECTOR):
    main(["export", "--vlm", vlm, "--selector", selector, *map(str, arguments)])


@pytest.mark.parametrize(
    ("text", "keep"), [("0.4", 0.4), ("58", 58), ("1", 1), ("1.0", 1.0), ("most", "most")]
)
def test_a_number_without_a_point_is_a_count(text, keep):
    assert parse_keep(text) == keep and type(parse_keep(text)) is type(keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--keep", "adaptive"],
            "keep: 'adaptive' is not allowed in a graph, allowed: a fraction or a count",
        ),
        (["--keep", "1.5"], "keep: 1.5 is out of range"),
        (["--keep", "[0.4]"], "keep: '[0.4]' is not allowed in a graph"),
        (["--keep", "0.4", "--check", "."], "check: . holds no images"),
        (["--keep", "0.4", "--check", "nowhere"], "[Errno 2] No such file or directory: 'nowhere'"),
    ],
)
def test_wrong_options_end_with_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*options, "--to", "torch", "out")
    assert str(stop.value.code).startswith(f"atr export: {message}")
    assert "\n" not in str(stop.value.code)
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"atr export: no-selector"):
        run("--keep", "0.4", "--to", "torch", tmp_path / "out", selector="no-selector")
    with pytest.raises(SystemExit, match=r"atr export: no-model"):
        run("--keep", "0.4", "--to", "torch", tmp_path / "out", vlm="no-model")


def test_other_indices_are_listed_and_end_with_1(tmp_path, monkeypatch, capsys):
    """A graph that keeps other tokens of white images than the model does."""
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("L", (4, 4), colour).save(tmp_path / f"{name}.png")
    exported = SimpleNamespace(
        folder=tmp_path, format="torch", bytes=2e6, kept=1, of=4,
        pixels=lambda image: torch.tensor([[max(max(each) for each in image.getextrema())]]),
        run_eagerly=lambda pixels: (None, torch.zeros(1, 1)),
    )  # fmt: skip
    monkeypatch.setattr(command, "export_vision", lambda *_: exported)
    monkeypatch.setattr(command, "load_exported", lambda *_: lambda pixels: (None, (pixels > 100).float()))
    monkeypatch.setattr(command, "_SECONDS", 0.001)
    with pytest.raises(SystemExit) as stop:
        run("--keep", 1, "--to", "torch", "--check", tmp_path, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1
    assert lines[0] == f"{tmp_path}/vision.pt2: 2.0 MB in float32; keeps 1 of 4 tokens"
    assert lines[2:] == [
        f"kept indices: equal to eager's for 1 of 2 images of {tmp_path}",
        f"other indices: {tmp_path}/white.png",
    ]
    assert keeps_same(exported, lambda pixels: (None, torch.zeros(1, 1)), Image.new("RGB", (4, 4)))


@pytest.mark.exhaustive
def test_the_command_exports_the_micro_model(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for index in range(3):
        image = world.sample("docs", "evaluate", index, seed=0).image
        image.save(tmp_path / f"images/{index}.png")
    with pytest.raises(SystemExit) as stop:
        run("--keep", "0.4", "--to", "torch", "--check", tmp_path / "images", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert "keeps 58 of 144 tokens" in lines[0] and "eager" in lines[1]
    assert lines[2].startswith("kept indices: equal to eager's for 3 of 3 images")
