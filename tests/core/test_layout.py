from dataclasses import fields

from atr.config.evaluate import Evaluate
from atr.core.layout import LAYOUT
from atr.vlm.policy import Policy


def test_the_defaults_of_parameters_and_library_are_choices_and_agree():
    evaluate = Evaluate()
    for key, choices in LAYOUT.items():
        assert getattr(evaluate, key) in choices
    shared = {field.name for field in fields(Policy)} & set(LAYOUT)
    assert shared == {"positions", "budget", "newline"}
    policy = Policy(0.5)
    assert {key: getattr(policy, key) for key in shared} == {key: getattr(evaluate, key) for key in shared}
