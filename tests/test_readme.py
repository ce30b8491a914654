"""What README tells a user to type is run as it is printed."""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_as_printed(tmp_path, monkeypatch):
    from atr import FeatureSelector
    from atr.micro import world
    from atr.vlm.checkpoint import load_vlm

    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    model, processor = load_vlm(str(ROOT / "data/micro/llava"), torch.float32)
    selector = FeatureSelector(192, (12, 12), encoder="micro", layer=-1)
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.note(taught_by="micro")
    selector.save_pretrained(tmp_path / "experiments/distill/selector")
    monkeypatch.chdir(tmp_path)
    lengths = []
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda *args, _forward=model.model.language_model.forward, **kwargs: (
            lengths.append(kwargs["inputs_embeds"].shape[1]) or _forward(*args, **kwargs)
        ),
    )
    image = world.sample("docs", "evaluate", 0, 0).image
    exec(example, {"model": model, "processor": processor, "image": image, "prompt": "<image> total"})
    assert lengths[0] == 1 + round(0.4 * 144) + 1, (
        "the language model sees <s>, 40 % of 144 tokens, the question"
    )


COMMANDS = re.findall(r"^atr (.*)$", README.replace("\\\n", ""), flags=re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_an_atr_command_runs_as_printed(line, tmp_path, monkeypatch, capsys):
    from atr import config
    from atr.cli import main as command

    for name in ("experiments", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    command.main(shlex.split(line))
    assert capsys.readouterr().out
    if "--set" in line:
        flat = config.flat()
        assert flat["trainer.devices"] * flat["pretrain.batch_size"] == 32, "as many images a step as on one"


def test_the_table_of_peers_says_which_take_no_tiles():
    from atr import config

    rows = re.findall(r"^\| \[\w+\.py\]\(.*?\) \|(.*)\|(.*)\|$", README, flags=re.MULTILINE)
    tiled, whole = (set(re.findall(r"`([\w-]+)`", " ".join(column))) for column in zip(*rows, strict=True))
    assert whole == set(config.ONE_TILE)
    every = {*config.REDUCERS, *config.SELECTORS, *config.DISTILLED} - {"full", "none"}
    assert tiled - {"keep"} == every - whole


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_what_readme_links_to_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"`make (\w+)`|^make (\w+)", README, flags=re.MULTILINE)))
)
def test_what_readme_makes_is_a_target(target):
    assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
