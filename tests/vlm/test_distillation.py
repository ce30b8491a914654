"""Training a selector on the answers of tiny models: weighted attention, and what is learned."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from atr.config import Distill, Evaluate
from atr.core.tokens import mask_of
from atr.reduction import FeatureSelector, Full
from atr.reduction.checkpoints import Checkpoints
from atr.vlm import distillation
from atr.vlm.distillation import Distillation, PromptedImageData, train_selector
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs, Prompts
from atr.vlm.policy import Policy
from atr.vlm.reduce import shorten
from atr.vlm.tiling import ROW_END

FAMILIES = ("llava", "llava_next", "llava_onevision")
BATCH = [("one", ["a", "b c"]), ("two", ["d"]), ("three", ["e f g", "a", "h"])]


SIZES = {"one": (30, 30), "two": (20, 60), "three": (84, 50)}
"""(height, width) of the images of families that cut tiles; all others get squares."""


class Pictures:
    """Images of noise that depends on their name alone."""

    def __init__(self, family):
        self.family = family

    def image(self, name):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = (28, 28) if self.family == "llava" else SIZES[name]
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())


@pytest.fixture
def generator(model, processor, family):
    source = ImageInputs(model, processor, Pictures(family))
    return Generator(model, processor, source, Evaluate(max_new_tokens=3))


def make_training(generator, **changes):
    torch.manual_seed(1)
    selector = FeatureSelector(24, (4, 4), layers=1, heads=2, initial_bias=0.0)
    return Distillation(selector, generator, Distill(**{"batch_size": 3} | changes), seed=0)


@pytest.fixture
def module(generator):
    return make_training(generator)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_token_the_model_answers_as_it_is(module):
    [(divergence, agreement)] = module._compare(BATCH, [torch.ones_like])
    assert divergence.item() == pytest.approx(0, abs=1e-5) and agreement == 1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_tokens_of_zero_weight_act_as_removed_tokens(
    generator, make_model, attention, positions, monkeypatch
):
    """Compared with the log probabilities on the shorter sequence, at the same positions."""
    monkeypatch.setattr(distillation, "DROPPED_WEIGHT", 1e-12)
    module = make_training(replace(generator, settings=Evaluate(positions=positions, max_new_tokens=3)))
    module.generator.model.set_attn_implementation(attention)
    prepared, answers = module._conversations(BATCH)
    whole, sizes = prepared.reduce(Full(), Policy(1.0)), prepared.layout.lengths
    stay = [(tile_P == ROW_END) | (torch.arange(size) % 3 == 1)
            for tile_P, size in zip(prepared.layout.tile_of, sizes, strict=True)]  # fmt: skip
    actual = module._log_probabilities(whole, answers, torch.cat(stay).float())

    keep = [stay_P.nonzero()[:, 0] for stay_P in stay]
    shorter = shorten(module.generator.model, prepared.inputs, prepared.tokens, keep, positions)
    logits = module.generator.model(**shorter).logits
    expected = []
    for row, answers_L in enumerate(answers):
        ahead = len(answers_L) - answers_L.nonzero()[:, 0]  # the same from the end, whatever was dropped
        expected.append(logits[row, -1 - ahead].log_softmax(-1))
    torch.testing.assert_close(actual, torch.cat(expected), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_placeholder_that_the_model_spells_out_stands_for_no_image(module, monkeypatch):
    monkeypatch.setattr(Generator, "answer", lambda *_: [("b <image> c", 16, 16, 16)] * 6)
    prepared, _ = module._conversations(BATCH)
    assert [len(kept) for kept in prepared.layout.values(prepared.encoded.features_BND)] == [16, 16, 16]
    assert (prepared.inputs["input_ids"] == module.generator.model.config.image_token_id).sum() == 3 * 16


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_selector_and_leave_the_model_unchanged(module):
    before = {name: value.clone() for name, value in module.generator.model.state_dict().items()}
    module.generator.model.requires_grad_(False)
    [(divergence, _)] = module._compare(BATCH, [lambda scores_P: scores_P.sigmoid()])
    divergence.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.selector.parameters())
    assert any(parameter.grad.abs().max() > 1e-8 for parameter in module.selector.parameters())
    after = module.generator.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(name.startswith("generator") for name in module.state_dict())


def test_the_gradient_of_a_weight_agrees_with_finite_differences(module):
    """Of a token that is not there as of one that is: by finite differences, in float64."""
    module.generator.model.double()
    prepared, answers = module._conversations(BATCH[:1])
    whole = prepared.reduce(Full(), Policy(1.0))
    weights = mask_of(torch.tensor([1, 2, 5, 11]), 16).requires_grad_()
    expected = module._log_probabilities(whole, answers, None).detach()

    def loss(values):
        return (expected.exp() * (expected - module._log_probabilities(whole, answers, values))).sum()

    loss(weights).backward()
    for token in (0, 2, 9, 11):
        step = torch.zeros(16).index_fill_(0, torch.tensor(token), 2**-14)
        with torch.no_grad():
            slope = (loss(weights + step) - loss(weights - step)) / 2**-13
        assert weights.grad[token] == pytest.approx(slope.item(), rel=0.05, abs=1e-3), token
    assert (weights.grad != 0).all()  # what is gone can come back


def test_answers_are_marked_and_nothing_else(module):
    prepared, answers = module._conversations(BATCH)
    tokenizer = module.generator.processor.tokenizer
    for (name, _), ids_L, answers_L in zip(BATCH, prepared.inputs["input_ids"], answers, strict=True):
        marked = tokenizer.convert_ids_to_tokens(ids_L[answers_L])
        assert marked == " ".join(module._answered[name]).split()


def test_each_prompt_is_answered_once(module, monkeypatch):
    calls = []
    answer = Generator.answer
    monkeypatch.setattr(Generator, "answer", lambda self, *given: calls.append(1) or answer(self, *given))
    module._conversations(BATCH)
    module._conversations(BATCH[::-1])
    assert len(calls) == 1
    batch = module.generator.prepare([["three"]], ["h"])
    [(alone, *_)] = answer(module.generator, batch, Full(), 1.0)
    assert module._answered["three"][2] == alone


def test_images_weigh_the_same_whatever_the_length_of_their_answers():
    answers = torch.tensor([[True, True, True], [False, False, True]])
    values = torch.tensor([3.0, 3.0, 3.0, 5.0])
    assert distillation._mean_of_rows(values, answers) == 4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_newlines_are_never_dropped(module):
    prepared, _ = module._conversations(BATCH)
    scored = []
    weights = module._weights(prepared, lambda scores_P: scored.append(len(scores_P)) or scores_P * 0)
    ends = torch.cat([tile_P == ROW_END for tile_P in prepared.layout.tile_of])
    assert torch.equal(weights, ends.float())
    assert scored == prepared.layout.sizes


@torch.no_grad()
def test_the_divergence_is_that_of_the_answers_with_all_tokens_from_those_without_some(module):
    """KL(all || some), the sum over words, by `torch.distributions`, a mean over answers and then images."""
    prepared, answers = module._conversations(BATCH)
    whole = prepared.reduce(Full(), Policy(1.0))
    half = (torch.arange(16) % 2).float()
    every, some = (module._log_probabilities(whole, answers, weights) for weights in (None, half.repeat(3)))
    categorical = torch.distributions.Categorical
    kl_A = torch.distributions.kl_divergence(categorical(logits=every), categorical(logits=some))
    counts = answers.sum(1).tolist()
    expected = sum(part.mean() for part in kl_A.split(counts)) / len(counts)
    same = (every.argmax(1) == some.argmax(1)).float().mean()
    [(actual, agreement)] = module._compare(BATCH, [lambda _: half])
    torch.testing.assert_close(actual, expected)
    assert agreement == same


def test_every_count_from_the_lowest_to_the_highest_is_sampled_as_often(generator):
    module = make_training(generator, lowest=0.25, highest=0.5)
    draws = torch.Generator().manual_seed(0)
    masks = [module._sample_mask(torch.zeros(16), draws) for _ in range(1000)]
    counts = [int(mask_P.sum()) for mask_P in masks]
    assert set(counts) == {4, 5, 6, 7, 8}
    assert all(150 < counts.count(count) < 250 for count in range(4, 9))


def test_empty_answers_give_no_divergence(module, monkeypatch):
    monkeypatch.setattr(Generator, "answer", lambda self, batch, *_: [("", 0, 0, 0)])
    [(divergence, agreement)] = module._compare([("one", ["a"])], [torch.zeros_like])
    assert (divergence, agreement) == (0, 0)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_weights_is_refused(generator, attention):
    generator.model.config.get_text_config()._attn_implementation = attention
    with pytest.raises(ValueError, match=f"attention: {attention} takes no additive mask"):
        make_training(generator)


class TenImages:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return f"image {index}", ["a", "b c"]


def fit(generator, folder, images, **recipe):
    module = make_training(generator, learning_rate=0.001, warmup=0.0, **recipe)
    data = PromptedImageData(images, module.recipe.batch_size, validation=0.1, seed=0)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    assert train_selector(module, data, Checkpoints(folder), DummyLogger(), **quiet)
    return module


def test_a_new_selector_prefers_no_number_of_tokens_and_says_what_it_is_for():
    images = list(torch.randn(10, 16, 24) + 2)
    selector = distillation.new_selector(Distill(heads=2), 24, (4, 4), "tiny", -2, images)
    assert (selector(torch.stack(images)) == 0).all()
    assert (selector.encoder, selector.layer, selector.grid) == ("tiny", -2, (4, 4))
    torch.testing.assert_close(selector.standardise.mean_D, torch.stack(images).mean((0, 1)))


class OneImage:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return "one", ["a", "b c"]


@torch.no_grad()
def divergence(module, scores_P):
    """Divergence of the answers about the one image with the best quarter of its tokens."""
    [(actual, _)] = module._compare([OneImage()[0]], [lambda _: module._best_mask(scores_P, 0.25)])
    return actual.item()


def test_the_trained_selector_keeps_the_tokens_that_answers_depend_on(generator, tmp_path):
    """Among the sets of four tokens, of which a hundred are drawn, one of the better quarter."""
    generator.model.requires_grad_(False)
    quarter = {"lowest": 0.25, "highest": 0.25}
    module = fit(generator, tmp_path, OneImage(), epochs=80, batch_size=1, **quarter)
    prepared, _ = module._conversations([OneImage()[0]])
    learned = divergence(module, module.selector.rank(prepared.encoded.features_BND)[0])
    drawn = torch.rand(100, 16, generator=torch.Generator().manual_seed(0))
    assert learned < sorted(divergence(module, scores_P) for scores_P in drawn)[25]
    last = {name.removesuffix("_epoch") for name in module.history[-1]}
    assert {"train/divergence", "validation/divergence_0.3", "validation/agreement_0.5"} <= last
    assert len(module.history) == 80


def test_a_resumed_training_is_the_unbroken_one(generator, tmp_path):
    generator.model.requires_grad_(False)
    whole = fit(generator, tmp_path / "whole", TenImages(), epochs=2)

    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    original = lightning.Trainer.__init__

    def stopped(self, callbacks, **kwargs):
        original(self, callbacks=[*callbacks, Stop()], **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(lightning.Trainer, "__init__", stopped)
        fit(generator, tmp_path / "broken", TenImages(), epochs=2)
    resumed = fit(generator, tmp_path / "broken", TenImages(), epochs=2)
    assert resumed.history == whole.history
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


@pytest.fixture
def step(module, monkeypatch):
    """One step of a rank: what it logs, and the tokens that are left of sixteen alike."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    monkeypatch.setattr(Distillation, "trainer", SimpleNamespace(optimizers=[optimizer]))
    monkeypatch.setattr(Distillation, "global_step", 0)

    def step(rank=0):
        logged, masks = {}, []
        monkeypatch.setattr(Distillation, "global_rank", rank)
        monkeypatch.setattr(Distillation, "log", lambda self, name, value, **how: logged.update({name: how}))
        compared = [(torch.zeros(()), torch.zeros(()))]
        monkeypatch.setattr(
            module, "_compare", lambda batch, mask: masks.append(mask[0](torch.zeros(16))) or compared
        )
        module.training_step(BATCH, 0)
        return logged, masks[0].tolist()

    return step


def test_every_rank_draws_tokens_of_its_own(step):
    (_, first), (_, second), (_, again) = step(0), step(1), step(0)
    assert first == again and first != second


def test_metrics_of_a_step_are_synchronised_over_ranks(step):
    logged, _ = step()
    assert {name for name, how in logged.items() if not how.get("sync_dist")} == {"train/learning_rate"}
    assert "train/divergence" in logged


def test_fewer_images_than_a_batch_are_refused(generator, tmp_path):
    data = PromptedImageData(TenImages(), batch_size=10, validation=0.1, seed=0)
    with pytest.raises(ValueError, match=r"distill\.batch_size: 10 is out of range, allowed: at most 9"):
        train_selector(make_training(generator), data, Checkpoints(tmp_path), DummyLogger())


def test_a_conversation_is_what_the_template_makes_of_its_turns(processor):
    prompts = Prompts(processor)
    assert prompts.text(["a b", "c", "d"], 1).split() == ["<image>", "a", "b", "c", "d"]
    assert prompts.text(["a b"], 1) == prompts.text("a b", 1)
    assert prompts.length(["a b", "c"]) == 1 + 3
