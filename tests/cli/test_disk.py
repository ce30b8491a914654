import os
from pathlib import Path

import pytest

from atr.cli import disk


@pytest.fixture
def project(tmp_path):
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def configure(project, text):
    (project / ".dvc/config").write_text(f"[cache]\n{text}")


@pytest.mark.parametrize(
    ("types", "links", "linked"),
    [
        ("hardlink,copy", True, True),
        ("hardlink,copy", False, False),
        ("copy", True, False),
        ("reflink,copy", True, False),
        ("symlink", False, True),
    ],
)
def test_the_cache_holds_a_second_copy_unless_links_are_asked_for_and_work(
    project, monkeypatch, types, links, linked
):
    configure(project, f"    type = {types}\n")
    if not links:

        def refuse(source, target):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    assert disk.inspect_disks(project / "data", project).linked is linked


def test_looking_leaves_nothing_behind(project):
    configure(project, "    type = hardlink\n")
    before = sorted(project.rglob("*"))
    disk.inspect_disks(project / "data/features", project)
    assert sorted(project.rglob("*")) == before


def test_the_cache_is_where_the_configuration_says(project):
    configure(project, "    dir = ../elsewhere/cache\n")
    assert disk.inspect_disks(project / "data", project).cache.resolve() == project / "elsewhere/cache"


def test_without_a_configuration_it_is_in_the_repository(tmp_path):
    disks = disk.inspect_disks(tmp_path / "data", tmp_path)
    assert disks.cache == tmp_path / ".dvc/cache"
    assert disks.one_disk and disks.data_free > 0 and disks.cache_free > 0


def test_a_configuration_that_cannot_be_read_is_named(project):
    (project / ".dvc/config").write_text("[cache\n")
    with pytest.raises(ValueError, match=r"\.dvc"):
        disk.inspect_disks(project / "data", project)


def test_two_file_systems_are_told_apart(project):
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == project.stat().st_dev:
        pytest.skip("there is one file system")
    configure(project, "    type = hardlink\n    dir = /dev/shm/atr-no-such-cache\n")
    disks = disk.inspect_disks(project / "data", project)
    assert not disks.one_disk and not disks.linked
