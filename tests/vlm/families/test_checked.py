import json
from importlib.metadata import version

import pytest

from atr.vlm.families.checked import checked_file, checked_types, on_trial, record_checked


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_recorded_type_is_known_in_this_version_of_transformers_alone(monkeypatch):
    assert checked_types() == frozenset()
    record_checked("first")
    record_checked("second")
    record_checked("first")
    assert checked_types() == {"first", "second"}
    assert json.loads(checked_file().read_text()) == {version("transformers"): ["first", "second"]}
    monkeypatch.setattr("atr.vlm.families.checked.version", lambda _: "99.0")
    assert checked_types() == frozenset()
    record_checked("third")
    assert checked_types() == {"third"}


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", '{"a": 3}', "\xff\xfe", '{"%s": [1, null, {}]}'])
def test_a_damaged_file_counts_as_empty_and_is_written_anew(damage):
    checked_file().parent.mkdir(parents=True)
    checked_file().write_bytes((damage.replace("%s", version("transformers"))).encode("latin-1"))
    assert checked_types() == frozenset()
    record_checked("type")
    assert checked_types() == {"type"}


def test_what_is_no_name_is_left_out():
    checked_file().parent.mkdir(parents=True)
    checked_file().write_text(json.dumps({version("transformers"): ["good", 1, None]}))
    assert checked_types() == {"good"}


def test_a_type_on_trial_is_admitted_only_meanwhile():
    with on_trial("type"):
        with on_trial("type"):
            assert checked_types() == {"type"}
        assert checked_types() == {"type"}
    assert checked_types() == frozenset()
    with pytest.raises(KeyError), on_trial("type"):
        raise KeyError
    assert checked_types() == frozenset()


def test_the_file_is_in_the_users_cache(cache, monkeypatch):
    assert checked_file() == cache / "atr/checked-families.json"
    for other in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        monkeypatch.setenv("HOME", "/home/someone")
        assert str(checked_file()) == "/home/someone/.cache/atr/checked-families.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(checked_file()) == "/home/someone/.cache/atr/checked-families.json"


def test_a_file_that_cannot_be_written_is_named(cache):
    (cache / "atr").write_text("a file where the folder should be")
    assert checked_types() == frozenset()
    with pytest.raises(OSError):
        record_checked("type")
