import doctest
import shutil

import pytest
from huggingface_hub import constants

import atr.core.hub
from atr.core.hub import checkpoint_digest, hub_commit, pretrained_arguments

FILES = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "model-00001-of-00002.safetensors": "first",
    "model-00002-of-00002.safetensors": "second",
    "model.safetensors.index.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "processor_config.json": "{}",
    "preprocessor_config.json": "{}",
}


def write(folder, files=FILES):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def commits(hub, tmp_path, monkeypatch):
    """Two commits of org/model in a hub cache, with different config.json."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    old, main = (write(tmp_path / name) for name in ("old", "main"))
    (main / "config.json").write_text("other")
    return hub.cache(tmp_path / "cache", "org/model", {"old": old, "main": main})


@pytest.mark.parametrize("name", FILES)
def test_the_digest_of_a_folder_changes_with_each_file_alone(tmp_path, name):
    before = checkpoint_digest(str(write(tmp_path / "model")))
    assert checkpoint_digest(str(shutil.copytree(tmp_path / "model", tmp_path / "copy"))) == before
    (tmp_path / "copy" / name).write_text("other")
    changed = checkpoint_digest(str(tmp_path / "copy"))
    (tmp_path / "copy" / name).unlink()
    assert len({before, changed, checkpoint_digest(str(tmp_path / "copy"))}) == 3


def test_swapped_files_change_the_digest(tmp_path):
    folder = write(tmp_path)
    before = checkpoint_digest(str(folder))
    one, two = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    one.write_text("second")
    two.write_text("first")
    assert checkpoint_digest(str(folder)) != before


def test_files_that_no_loader_reads_do_not_change_the_digest(tmp_path):
    before = checkpoint_digest(str(write(tmp_path)))
    write(tmp_path, {"README.md": "about", ".cache/huggingface/download/config.json.metadata": "at"})
    assert checkpoint_digest(str(tmp_path)) == before


def test_the_digest_of_a_hub_id_depends_on_its_commit(commits, tmp_path):
    main, old = (checkpoint_digest(f"org/model{revision}") for revision in ("", "@old"))
    assert main == checkpoint_digest(f"org/model@{commits['main']}") != old
    home = tmp_path / "cache/models--org--model"
    (home / "refs" / "main").write_text(commits["old"])
    assert checkpoint_digest("org/model") == old
    (home / "snapshots" / commits["old"] / "generation_config.json").unlink()
    assert checkpoint_digest("org/model") != old


def test_the_commit_is_the_cached_one(commits, tmp_path):
    assert {"main": hub_commit("org/model"), "old": hub_commit("org/model@old")} == commits
    assert hub_commit(str(tmp_path)) is None
    for absent in ("org/model@new", "org/another"):
        for read in (hub_commit, checkpoint_digest):
            with pytest.raises(ValueError, match=f"^{absent} is neither a folder nor in the hub's cache$"):
                read(absent)


def test_a_revision_belongs_to_a_hub_id_and_not_to_a_folders_name(tmp_path):
    folder = write(tmp_path / "model@home")
    assert pretrained_arguments(str(folder)) == {
        "pretrained_model_name_or_path": str(folder),
        "revision": "main",
    }
    assert pretrained_arguments("org/model@v1.5") == {
        "pretrained_model_name_or_path": "org/model",
        "revision": "v1.5",
    }
    assert pretrained_arguments("org/model") == {
        "pretrained_model_name_or_path": "org/model",
        "revision": "main",
    }


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(atr.core.hub).attempted == 1 and doctest.testmod(atr.core.hub).failed == 0
