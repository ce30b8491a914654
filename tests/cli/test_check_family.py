"""The command on real types; the checks themselves have their tests beside `atr.vlm.families.proof`."""

import math

import pytest
import torch
from transformers import AutoConfig

from atr.cli import check_family as command
from atr.cli.check_family import check_family, table_lines
from atr.cli.main import main
from atr.vlm.families import family_named
from atr.vlm.families.checked import checked_types
from atr.vlm.families.proof import ProofResult, prove
from atr.vlm.families.tiny import TINY_TYPES

OUTSIDE = "qianfan_ocr"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    family_named.cache_clear()
    yield
    family_named.cache_clear()


@pytest.fixture
def one_batch(monkeypatch):
    """One batch, attention and dtype, which is what the time of a test allows."""
    cases = {"one row": ((0,),)}
    monkeypatch.setattr(command, "prove", lambda config: prove(config, cases, ["eager"], [torch.float32]))


def test_a_type_outside_the_table_is_admitted_after_its_proof(one_batch, capsys):
    assert OUTSIDE not in TINY_TYPES
    with pytest.raises(ValueError, match="is not supported"):
        family_named(OUTSIDE)
    assert check_family(OUTSIDE) == 0
    printed = capsys.readouterr().out
    assert f"{OUTSIDE}, transformers" in printed
    assert "half dropped = masked" in printed and "eager float32" in printed
    assert checked_types() == {OUTSIDE}
    assert family_named(OUTSIDE)


def test_a_folder_is_checked_by_its_configuration(one_batch, tmp_path, capsys):
    AutoConfig.for_model("internvl").save_pretrained(tmp_path)
    assert check_family(str(tmp_path)) == 0
    assert checked_types() == {"internvl"}


def test_a_failed_check_exits_with_1_and_records_nothing(monkeypatch, capsys):
    results = [
        ProofResult("good", "a", "eager", "float32", 0.0, 0.0),
        ProofResult("bad", "a", "eager", "float32", 0.5, 1e-5),
        ProofResult("raises", "a", "eager", "float32", math.inf, 1e-5, "RuntimeError: why"),
    ]
    monkeypatch.setattr(command, "prove", lambda config: results)
    with pytest.raises(SystemExit) as exited:
        main(["check-family", OUTSIDE])
    assert exited.value.code == 1
    printed = capsys.readouterr().out
    assert "failed: bad, a, eager float32: difference 5.0e-01, allowed 1e-05" in printed
    assert "failed: raises, a, eager float32: difference inf, allowed 1e-05; RuntimeError: why" in printed
    assert "failed: good" not in printed
    assert checked_types() == frozenset()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_type", "'no_such_type' is neither a local folder nor a model type"),
        ("llama", "'llama' is no image-text-to-text model"),
        ("fuyu", "'fuyu': its inputs cannot be made by hand"),
        ("mllama", "'mllama' is not supported: its forward does not name mm_encoder_outputs"),
    ],
)
def test_what_cannot_be_checked_says_so_in_one_line(name, message, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["check-family", name])
    assert str(exited.value.code).startswith("atr check-family: ")
    assert message in str(exited.value.code) and "\n" not in str(exited.value.code)
    assert checked_types() == frozenset()


def test_a_table_has_the_largest_difference_of_all_batches():
    results = [
        ProofResult("first", "a", "eager", "float32", 1e-7, 1e-5),
        ProofResult("first", "b", "eager", "float32", 2e-6, 1e-5),
        ProofResult("first", "a", "sdpa", "float32", 1.0, 1e-5),
        ProofResult("second, longer", "a", "eager", "float32", 0.0, 0.0, "refused: model x"),
        ProofResult("third", "a", "eager", "float32", 3.0, math.inf, "a reason"),
    ]
    assert table_lines(results) == [
        "                 eager float32    sdpa float32",
        "first                  2.0e-06        !1.0e+00",
        "second, longer         refused               -",
        "third                  3.0e+00               -",
        "second, longer: refused: model x",
        "third: a reason",
    ]


def test_a_cache_folder_that_cannot_be_written_is_named_before_the_checks(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(command, "prove", lambda config: pytest.fail("the checks run"))
    with pytest.raises(SystemExit, match=r"^atr check-family: .*checked-families\.json could not be written"):
        main(["check-family", "internvl"])
