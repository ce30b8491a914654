"""`atr check-family`: proves a model type on a tiny copy, and lets the rule admit it from then on."""

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from atr.vlm.families import family_named, family_of
from atr.vlm.families.checked import check_writable, checked_file, on_trial, record_checked
from atr.vlm.families.proof import ProofResult, prove
from atr.vlm.families.tiny import load_config, tiny_config, tiny_inputs, tiny_model


def check_family(folder_or_type: str) -> int:
    """Print a table of the checks of a model's type; 0 if all hold, which is then recorded, else 1.

    The model is that of a local folder's config.json, or the default one of a type. Raises ValueError, one
    line, for a model that is no vision-language model, cannot be shrunk or built, or lacks what a family
    needs, and for pixels of no known layout; and OSError naming the file if nothing could be recorded.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its advice is on real models
    config = tiny_config(load_config(folder_or_type))
    model_type = config.model_type
    check_writable()  # the checks take minutes
    model = tiny_model(config)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{model_type}, transformers {version('transformers')}: a tiny copy of {weights:,} random weights")
    with on_trial(model_type):
        family_of(model)
        tiny_inputs(model)  # what cannot be made is said once, and not by each check
        results = list(prove(config))
    family_named.cache_clear()  # it may have admitted the type on trial
    print("\n".join(table_lines(results)))
    failures = [result for result in results if not result.ok]
    for result in failures:
        print(f"failed: {_describe(result)}")
    if failures:
        return 1
    record_checked(model_type)
    print(f"proven; recorded in {Path(checked_file())}")
    return 0


def table_lines(results: Sequence[ProofResult]) -> list[str]:
    """A row for each check, a column for each attention and dtype: the largest difference of all batches."""
    columns = list(dict.fromkeys((result.attention, result.dtype) for result in results))
    names = list(dict.fromkeys(result.check for result in results))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {attention + ' ' + dtype:>14}" for attention, dtype in columns)]
    for name in names:
        cells = [
            _cell([r for r in results if (r.check, r.attention, r.dtype) == (name, *column)])
            for column in columns
        ]
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>14}" for cell in cells))
    notes = dict.fromkeys(f"{result.check}: {result.note}" for result in results if result.ok and result.note)
    return [*lines, *notes]


def _cell(results: Sequence[ProofResult]) -> str:
    if not results:
        return "-"
    if all(result.note.startswith("refused") for result in results):
        return "refused"
    largest = max(result.difference for result in results)
    failed = "" if all(result.ok for result in results) else "!"
    return f"{failed}{largest:.1e}" if largest else f"{failed}0"


def _describe(result: ProofResult) -> str:
    where = f"{result.check}, {result.case}, {result.attention} {result.dtype}"
    found = f"difference {result.difference:.1e}, allowed {result.allowed:.0e}"
    return f"{where}: {found}{'; ' if result.note else ''}{result.note}"
