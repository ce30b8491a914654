from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atr import config
from atr.config import loader

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    """Writes the shipped parameters with changes by dotted key (`__` for the dot)."""

    def write(**changes):
        tree = OmegaConf.load(ROOT / "params.yaml")
        for key, value in changes.items():
            OmegaConf.update(tree, key.replace("__", "."), value, force_add=True)
        path = tmp_path / "params.yaml"
        OmegaConf.save(tree, path)
        return path

    return write


@pytest.fixture
def message():
    """The one line of the error that a file gives."""

    def message(path):
        with pytest.raises(config.ConfigError) as caught:
            config.load("pretrain", path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


@pytest.fixture
def check_refused(write, message, monkeypatch):
    """Asserts that a value is refused by its key in one line that says what is allowed."""

    def check_refused(key, value, allowed):
        monkeypatch.chdir(ROOT)
        text = message(write(**{key.replace(".", "__"): value}))
        assert text.startswith(f"{key}: ")
        assert any(str(shown) in text for shown in (value, *(value if isinstance(value, list) else ())))
        assert allowed in text.partition("allowed: ")[2]

    return check_refused


@pytest.fixture
def check_allowed():
    """Asserts that a section takes the values."""

    def check_allowed(kind, values):
        section = loader.build(kind, "", values)
        assert {key: getattr(section, key) for key in values} == values

    return check_allowed


@pytest.fixture
def check_beyond():
    """Asserts that a section refuses the values, by the first one's name."""

    def check_beyond(kind, values):
        with pytest.raises(config.ConfigError, match=f"^{next(iter(values))}: .* allowed: "):
            loader.build(kind, "", values)

    return check_beyond
