"""Training a selector on the answers of tiny models: weighted attention, and what is learned."""

import zlib
from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from atr.config import Distill, Evaluate
from atr.reduction import FeatureSelector
from atr.reduction.checkpoints import Checkpoints
from atr.vlm import distillation, teacher
from atr.vlm.distillation import Distillation, PromptedImageData, train_selector
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs, Prompts
from atr.vlm.teacher import answer
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
    module = Distillation(selector, generator, Distill(**{"batch_size": 3} | changes), seed=0)
    module.answers = dict(zip([name for name, _ in BATCH], answer(module.reader, BATCH), strict=True))
    return module


def every(scores_N):
    return torch.ones_like(scores_N), torch.ones_like(scores_N).bool()


@pytest.fixture
def module(generator):
    return make_training(generator)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_token_the_model_answers_as_it_is(module):
    [(divergence, agreement)] = module._compare(BATCH, [every])
    assert divergence.item() == pytest.approx(0, abs=1e-5) and agreement == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_selector_and_leave_the_model_unchanged(module):
    before = {name: value.clone() for name, value in module.generator.model.state_dict().items()}
    module.generator.model.requires_grad_(False)
    [(divergence, _)] = module._compare(BATCH, [lambda scores: (scores.sigmoid(), every(scores)[1])])
    divergence.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.selector.parameters())
    assert any(parameter.grad.abs().max() > 1e-8 for parameter in module.selector.parameters())
    after = module.generator.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(name.startswith("generator") for name in module.state_dict())


def test_images_weigh_the_same_whatever_the_length_of_their_answers():
    assert distillation._mean_of_images(torch.tensor([3.0, 3.0, 3.0, 5.0]), [3, 1]) == 4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_newlines_are_never_dropped(module):
    prompted = module.reader.read(BATCH)
    scores = module._scores(prompted)
    nothing = [(scores_N * 0, scores_N.isnan()) for scores_N in scores]
    sequences = module._sequences(prompted, list(module.answers.values()), nothing)
    layout = prompted.prepared.layout
    newlines = [int((tile_P == ROW_END).sum()) for tile_P in layout.tile_of]
    assert [len(sequence.tokens_KD) for sequence in sequences] == newlines
    assert all((sequence.weight_T == 1).all() for sequence in sequences)
    assert [len(scores_N) for scores_N in scores] == layout.sizes


@torch.no_grad()
def test_an_image_that_comes_twice_in_a_batch_is_compared_twice(module):
    [(once, _)] = module._compare(BATCH[:1], [partial(module._best, keep=0.25)])
    [(twice, _)] = module._compare([BATCH[0], BATCH[0]], [partial(module._best, keep=0.25)])
    torch.testing.assert_close(once, twice)


@torch.no_grad()
def test_the_divergence_is_that_of_the_answers_with_all_tokens_from_those_without_some(module):
    """KL(all || some), the sum over words, by `torch.distributions`, a mean over answers and then images."""
    prompted, answers = module.reader.read(BATCH), list(module.answers.values())
    half = (torch.arange(16) % 2).float()
    sequences = module._sequences(prompted, answers, [(half, half.bool())] * 3)
    some = distillation.log_probabilities(module.generator.model, sequences)
    every_AV = torch.cat([of_image.log_probabilities_AV for of_image in answers])
    categorical = torch.distributions.Categorical
    kl_A = torch.distributions.kl_divergence(categorical(logits=every_AV), categorical(logits=some))
    counts = [len(of_image.log_probabilities_AV) for of_image in answers]
    expected = sum(part.mean() for part in kl_A.split(counts)) / len(counts)
    same = (every_AV.argmax(1) == some.argmax(1)).float().mean()
    [(actual, agreement)] = module._compare(BATCH, [lambda _: (half, half.bool())])
    torch.testing.assert_close(actual, expected)
    assert agreement == same


def test_every_count_from_the_lowest_to_the_highest_is_sampled_as_often(generator):
    module = make_training(generator, lowest=0.25, highest=0.5)
    draws = torch.Generator().manual_seed(0)
    masks = [module._sample(torch.zeros(16), draws)[0] for _ in range(1000)]
    counts = [int(mask_P.sum()) for mask_P in masks]
    assert set(counts) == {4, 5, 6, 7, 8}
    assert all(150 < counts.count(count) < 250 for count in range(4, 9))


@pytest.mark.parametrize(("candidates", "read"), [(0.25, 8), (0.5, 12), (1.0, 16)])
def test_the_best_dropped_tokens_are_read_beside_the_kept_ones(generator, candidates, read):
    quarter = {"lowest": 0.25, "highest": 0.25, "temperature": 0.0}
    module = make_training(generator, candidates=candidates, **quarter)
    weight, is_read = module._sample(torch.arange(16.0), torch.Generator())
    assert weight.nonzero()[:, 0].tolist() == [12, 13, 14, 15]
    assert is_read.nonzero()[:, 0].tolist() == list(range(16 - read, 16))


def test_what_is_read_and_dropped_gets_a_gradient(module):
    scores = torch.arange(16.0, requires_grad=True)
    weight, is_read = module._sample(scores, torch.Generator().manual_seed(0))
    module._compare(BATCH[:1], [lambda _: (weight, is_read)])[0][0].backward()
    assert (scores.grad[is_read] != 0).all() and (weight[is_read] == 0).any()


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_mask_of_its_own_is_refused(generator, attention):
    module = make_training(generator)
    generator.model.config.get_text_config()._attn_implementation = attention
    with pytest.raises(ValueError, match=f"cannot teach: attention kernel {attention} takes no mask"):
        Distillation(module.selector, generator, Distill(), seed=0)


class TenImages:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return f"image {index}", ["a", "b c"]


def fit(generator, folder, images, **recipe):
    module = make_training(generator, **{"learning_rate": 0.001, "warmup": 0.0} | recipe)
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
        return 45

    def __getitem__(self, index):
        return "one", ["a", "b c"]


@torch.no_grad()
def mean_divergence(module, scores_P):
    """Over sixty drawn sets of tokens of the one image."""
    noise = torch.Generator().manual_seed(0)
    drawn = [lambda _: module._sample(scores_P, noise)] * 60
    return torch.stack([value for value, _ in module._compare([OneImage()[0]], drawn)]).mean().item()


def test_a_trained_selector_changes_answers_less_than_an_untrained_one(generator, tmp_path):
    generator.model.requires_grad_(False)
    quarter = {"lowest": 0.25, "highest": 0.25}
    module = fit(generator, tmp_path, OneImage(), epochs=4, batch_size=1, learning_rate=0.01, **quarter)
    module.answers = {"one": answer(module.reader, [OneImage()[0]])[0]}
    [scores_P] = module._scores(module.reader.read([OneImage()[0]]))
    assert mean_divergence(module, scores_P) < mean_divergence(module, torch.zeros(16))
    last = {name.removesuffix("_epoch") for name in module.history[-1]}
    assert {"train/divergence", "validation/divergence_0.3", "validation/agreement_0.5"} <= last
    assert len(module.history) == 4


def interrupt(monkeypatch, moment):
    """Has every training stopped at a moment, from which it should resume."""
    original = lightning.Trainer.__init__
    monkeypatch.setattr(
        lightning.Trainer,
        "__init__",
        lambda self, callbacks, **kwargs: original(self, callbacks=[*callbacks, moment()], **kwargs),
    )


class SecondEpoch(lightning.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


class SecondFile(lightning.Callback):
    """Stops the teacher after its first file."""

    def on_train_start(self, trainer, module):
        raise AssertionError("the teacher was not stopped")

    def on_fit_start(self, trainer, module):
        write = teacher.StoredAnswers.write

        def stop(stored, number, answers):
            if number == 1:
                raise KeyboardInterrupt
            write(stored, number, answers)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(teacher.StoredAnswers, "write", stop)

    def on_exception(self, trainer, module, exception):
        self.patch.undo()


@pytest.mark.parametrize(("moment", "left"), [(SecondEpoch, 3), (SecondFile, 1)])
def test_a_resumed_training_is_the_unbroken_one(generator, tmp_path, monkeypatch, moment, left):
    monkeypatch.setattr(teacher, "IMAGES_PER_FILE", 4)
    generator.model.requires_grad_(False)
    whole = fit(generator, tmp_path / "whole", TenImages(), epochs=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, moment)
        fit(generator, tmp_path / "broken", TenImages(), epochs=2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*.answers/*")}
    assert len(kept) == left
    asked = []
    monkeypatch.setattr(distillation, "answer", lambda *given: asked.append(1) or answer(*given))
    resumed = fit(generator, tmp_path / "broken", TenImages(), epochs=2)
    assert len(asked) == 3 - left
    assert resumed.history == whole.history
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
    assert not list(tmp_path.glob("*/*.answers"))


def test_a_finished_training_asks_nothing_again(generator, tmp_path, monkeypatch):
    generator.model.requires_grad_(False)
    fit(generator, tmp_path, TenImages(), epochs=1)
    monkeypatch.setattr(distillation, "answer", None)
    fit(generator, tmp_path, TenImages(), epochs=1)


def test_a_training_that_is_told_to_stop_asks_no_further(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "received_sigterm", True)
    monkeypatch.setattr(distillation, "answer", None)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    checkpoints = Checkpoints(tmp_path)
    module = make_training(generator)
    with pytest.raises(SIGTERMException):
        distillation.AskTeacher(module.reader, TenImages(), checkpoints).on_train_start(trainer, module)


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
            module, "_compare", lambda batch, masked: masks.append(masked[0](torch.zeros(16))[0]) or compared
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
