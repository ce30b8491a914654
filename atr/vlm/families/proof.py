"""Proves on a tiny copy that a family's reduction is exact: each check compares `reduce` with a reference.

The references know nothing of how an input is shortened: the untouched model, the full sequence with tokens
masked, a loop without cache, each row by itself. Shapes: B rows, L tokens of a row, P placeholders of all
rows, V words.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.reduction import EncoderOutput
from atr.vlm.families import family_of
from atr.vlm.families.exactness import why_not_exact
from atr.vlm.families.rule import Rule
from atr.vlm.families.tiny import attention_kinds, tiny_model
from atr.vlm.families.tiny_inputs import ROWS, tiny_inputs
from atr.vlm.reduce import Reduced, prepare, reduce

TOLERANCE = 1e-5
"""Largest difference of logits in float32 between removing tokens and masking them."""
SUMMATION = 3e-5
"""The same between a loop and a cache, a batch and its rows: their sums have other orders at every step."""
MATTERS = 1e-3
"""Dropping half of the tokens must move the logits by more, or no check of them would mean anything."""
NEW_TOKENS = 4
Rows = Sequence[Sequence[int]]
CASES: dict[str, Rows] = {
    "one row": ((0,),),
    "ragged batch": ROWS,
    "two images in a row": ((1, 2),),
    "one image in two rows": ((0,), (2, 0)),
}
"""Images of each row, as in `tiny_inputs`."""


@dataclass(frozen=True)
class ProofResult:
    """The outcome of one check: the largest `difference`, and what is `allowed`.

    `note` says what was refused, why a difference is allowed, or what was raised (then the difference is
    infinite).
    """

    check: str
    case: str
    attention: str
    dtype: str
    difference: float
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is allowed."""
        return self.difference <= self.allowed


class HalfByFeature:
    """A scorer whose order follows from the features alone, so that it is the same in any batch."""

    needs: frozenset[str] = frozenset()
    threshold = None

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """A fixed projection of each token's features; scores_BN."""
        features_BND = encoded.features_BND.float()
        weight_D = torch.linspace(-1, 1, features_BND.shape[-1], device=features_BND.device).cos()
        return features_BND @ weight_D

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """The tokens of the highest scores; keep_BK."""
        return self.scores(encoded).topk(budget, dim=1).indices.sort(dim=1).values


class Refused(Exception):
    """A call that the library refuses, in one line."""


@torch.no_grad()
def all_kept_forward(model: Any, rows: Rows) -> float:
    """Logits with all tokens kept against the untouched model's."""
    inputs = tiny_inputs(model, rows)
    return _distance(model(**_all_kept(model, inputs)).logits, model(**inputs).logits)


def all_kept_generate(model: Any, rows: Rows) -> float:
    """Generated tokens and their logits with all tokens kept against the untouched model's."""
    inputs = tiny_inputs(model, rows)
    return _compare(_generate(model, _all_kept(model, inputs)), _generate(model, inputs))


@torch.no_grad()
def half_dropped_masked(model: Any, rows: Rows) -> float:
    """Logits with half dropped against the full sequence with these tokens masked, at the same positions."""
    inputs = tiny_inputs(model, rows)
    reduced = _half(model, inputs)
    stay_BL = _stay(model, inputs, reduced)
    mask_BL = inputs["attention_mask"] if own_choice(model) == "original" else stay_BL.long()
    position_ids = own_positions(model, {**inputs, "attention_mask": mask_BL})
    masked = {**inputs, "attention_mask": stay_BL.long(), "position_ids": position_ids}
    shorter, full = model(**reduced).logits, model(**masked).logits
    if any(rows) and _distance(_last(shorter), _last(model(**inputs).logits)) < MATTERS:
        raise ValueError("the dropped tokens make no difference")
    return _distance(shorter[reduced["attention_mask"].bool()], full[stay_BL])


def greedy_loop(model: Any, rows: Rows, positions: str | None = None) -> float:
    """Greedy generation from a shortened input against a loop that computes each token from the beginning."""
    reduced = _half(model, tiny_inputs(model, rows), positions)
    return _compare(_generate(model, reduced), _loop(model, reduced))


def greedy_loop_contiguous(model: Any, rows: Rows) -> float:
    """As `greedy_loop`, with contiguous positions."""
    return greedy_loop(model, rows, "contiguous")


def rows_alone(model: Any, rows: Rows) -> float:
    """Generation of a batch against that of each of its rows alone, with half dropped."""
    return _compare(
        _generate(model, _half(model, tiny_inputs(model, rows))),
        _stack(_generate(model, _half(model, tiny_inputs(model, [row]))) for row in rows),
    )


def beams(model: Any, rows: Rows) -> float:
    """Two beams of a batch against those of each row alone; raises Refused if refused by name."""

    def search(some: Rows) -> tuple[Tensor, Tensor]:
        made = _call_generate(model, _half(model, tiny_inputs(model, some)), num_beams=2, output_scores=True)
        return made.sequences[:, -NEW_TOKENS:], made.sequences_scores

    return _compare(search(rows), _stack(search([row]) for row in rows))


def sampling(model: Any, rows: Rows) -> float:
    """First logits of two samples of each row against those of the row alone; raises Refused as `beams`."""

    def first(some: Rows) -> Tensor:
        settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 1}
        made = _call_generate(model, _half(model, tiny_inputs(model, some)), **settings)
        logits_BV: Tensor = made.logits[0]
        return logits_BV

    return _distance(first(rows), torch.cat([first([row]) for row in rows]))


EXACT: dict[str, Callable[[Any, Rows], float]] = {
    "all kept, forward": all_kept_forward,
    "all kept, generate": all_kept_generate,
}
"""Checks that allow no difference, in any attention and dtype."""
MASKED = "half dropped = masked"
CLOSE: dict[str, Callable[[Any, Rows], float]] = {
    MASKED: half_dropped_masked,
    "greedy = loop": greedy_loop,
    "greedy = loop, contiguous": greedy_loop_contiguous,
    "batch = rows alone": rows_alone,
    "beams": beams,
    "sampling": sampling,
}
"""Checks in float32 alone, of which MASKED allows TOLERANCE and the others SUMMATION."""


def prove(
    config: Any,
    cases: Mapping[str, Rows] = CASES,
    attentions: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Iterator[ProofResult]:
    """Run every check on a tiny copy of a configuration of `tiny_config`; raises ValueError as `tiny_model`.

    Without `attentions`, those that the model supports. A check that raises has an infinite difference.
    """
    for attention, dtype in product(attentions or attention_kinds(config), dtypes):
        model = tiny_model(config, attention, dtype)
        checks = EXACT if dtype != torch.float32 else {**EXACT, **CLOSE}
        for (name, check), (case, rows) in product(checks.items(), cases.items()):
            allowed = 0.0 if name in EXACT else TOLERANCE if name == MASKED else SUMMATION
            yield run_check(model, name, check, case, rows, attention, dtype, allowed)


def run_check(
    model: Any,
    name: str,
    check: Callable[[Any, Rows], float],
    case: str,
    rows: Rows,
    attention: str,
    dtype: torch.dtype,
    allowed: float,
) -> ProofResult:
    """The result of one check of one batch."""
    note = ""
    try:
        difference = check(model, rows)
    except Refused as refusal:
        difference, note = 0.0, f"refused: {refusal}"
    except Exception as error:  # a model's own code may raise anything
        difference, note = math.inf, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if check is half_dropped_masked and not note:
        note = why_not_exact(model, tiny_inputs(model, rows)["input_ids"].shape[1])
        allowed = math.inf if note else allowed
    return ProofResult(name, case, attention, str(dtype).removeprefix("torch."), difference, allowed, note)


def own_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Positions of the full sequence by the model's documented rule: (B, L), or (axes, B, L)."""
    position_BL: Tensor = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    rule = getattr(model.base_model, "get_rope_index", None)
    if rule is None:
        return position_BL
    known = inspect.signature(rule).parameters
    positions: Tensor = rule(**{key: value for key, value in inputs.items() if key in known})[0]
    return positions


def own_choice(model: Any) -> str:
    """Original positions, unless the family's `generate` drops position ids."""
    family = family_of(model)
    return family.entry.positions[0] if isinstance(family, Rule) else "original"


def _all_kept(model: Any, inputs: Mapping[str, Any]) -> Reduced:
    return reduce(model, inputs, HalfByFeature(), 1.0, own_choice(model))


def _half(model: Any, inputs: Mapping[str, Any], positions: str | None = None) -> Reduced:
    return reduce(model, inputs, HalfByFeature(), 0.5, positions or own_choice(model))


def _stay(model: Any, inputs: Mapping[str, Any], reduced: Reduced) -> Tensor:
    """Mask (B, L) of the tokens of the full sequence that the reduced one has."""
    real_BL: Tensor = inputs["attention_mask"].bool()
    if not reduced.kept:
        return real_BL
    prepared = prepare(model, inputs)
    marks = []
    for kept, image in zip(reduced.kept, prepared.image_of, strict=True):
        mark_P = torch.zeros(prepared.layout.lengths[image], dtype=torch.bool)
        mark_P[kept.indices_K.cpu()] = True
        marks.append(mark_P)
    placeholder_BL = inputs["input_ids"] == model.config.image_token_id
    return real_BL.masked_scatter(placeholder_BL, torch.cat(marks))


@torch.no_grad()
def _loop(model: Any, reduced: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, T) and their logits (B, T, V), each computed from the beginning."""
    inputs = {key: reduced[key] for key in reduced if key != "use_cache"}
    tokens, logits = [], []
    for _ in range(NEW_TOKENS):
        fresh = {key: reduced[key] for key in reduced if key == "mm_encoder_outputs"}
        logits_BV = _last(model(**{**inputs, **fresh}, use_cache=False).logits).float()
        tokens.append(logits_BV.argmax(-1))
        logits.append(logits_BV)
        inputs = _append(model, inputs, tokens[-1])
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def _append(model: Any, inputs: Mapping[str, Any], token_B: Tensor) -> dict[str, Any]:
    """The inputs with one more token of text in each row."""
    suffix = {"attention_mask": 1, "token_type_ids": int(model.config.model_type == "paligemma")}
    longer = dict(inputs)
    for key, values in inputs.items():
        if key == "input_ids":
            longer[key] = torch.cat([values, token_B[:, None]], 1)
        elif key == "position_ids":
            longer[key] = torch.cat([values, values[..., -1:] + 1], -1)
        elif key in ("attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            longer[key] = F.pad(values, (0, 1), value=suffix.get(key, 0))
    return longer


def _generate(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, T) and their logits (B, T, V)."""
    made = _call_generate(model, inputs)
    return made.sequences[:, -NEW_TOKENS:], torch.stack(made.logits, 1)


def _call_generate(model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
    """`generate`; raises Refused for a one-line ValueError that names the model type."""
    known = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "output_logits": True}
    try:
        return model.generate(**inputs, return_dict_in_generate=True, **{**known, **settings})
    except ValueError as error:
        if model.config.model_type in str(error):
            raise Refused(str(error)) from error
        raise


def _stack(parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, values = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(values)


def _compare(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Largest difference of the values; infinite if the tokens differ."""
    same = torch.equal(given[0], expected[0])
    return _distance(given[1], expected[1]) if same else math.inf


def _last(logits_BLV: Tensor) -> Tensor:
    return logits_BLV[:, -1]


def _distance(given: Tensor, expected: Tensor) -> float:
    if given.shape != expected.shape:
        raise ValueError(f"shapes {tuple(given.shape)} and {tuple(expected.shape)} differ")
    return float((given.float() - expected.float()).abs().max())
