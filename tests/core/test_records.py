import subprocess
import sys
from dataclasses import replace

import pytest

from atr.core.records import STATUSES, Question, Reply, Row, Trial


@pytest.mark.parametrize(("key", "fields"), [("id", ("", ["7"])), ("answers", ("docs/1#0", []))])
def test_a_question_without_id_or_answer_is_refused(key, fields):
    name, answers = fields
    with pytest.raises(ValueError, match=f"^{key}: .* is not allowed, allowed: "):
        Question(name, "docs", "text", ["docs/1"], "which", answers)


def test_a_reply_is_a_plain_tuple():
    assert Reply("it", 3, 5, 9) == ("it", 3, 5, 9)


def test_trials_are_keys():
    assert len({Trial(0.5), Trial(0.5, None), Trial(0.5, 1)}) == 2


def test_a_row_is_answered_unless_it_says_otherwise():
    row = Row("a", "docs", "text", "what?", ["it", "that"], 0.5, None, 1, 1, 2, "it", 1.0, 1.0)
    assert row.status == STATUSES[0] == "answered" and (row.error, row.images, row.unit) == ("", [], "")
    assert (row.image, row.answer) == ("", "it") and replace(row, images=["b", "c"]).image == "b"


def test_importing_the_records_imports_nothing_heavy():
    code = "import sys, atr.core.records; print(sorted({'numpy', 'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
