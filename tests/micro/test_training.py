import copy
import math
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from atr import config
from atr.micro import world
from atr.micro.curriculum import BLANK, IGNORE, TURN_TOKENS, Collator, LessonDataset, StoredLessons
from atr.micro.model import build_model, build_processor
from atr.micro.training import MicroTraining, Seen, answer_loss, stored_states, tower_states, train
from atr.reduction.checkpoints import Checkpoints


def recipe(**changes):
    values = {
        "width": 64,
        "layers": 1,
        "text_layers": 1,
        "reading_layer": 0,
        "naming_layer": 1,
        "steps": 4,
        "epochs": 2,
        "batch_size": 2,
        "warmup_steps": 1,
        "workers": 0,
    }
    return config.Micro(**{**values, "compile": False, "reading": 0.5, **changes})


@pytest.fixture(scope="module")
def processor():
    return build_processor((*world.QUESTIONS, *world.ANSWERS), world.SIZE)


def new_module(processor, examine=lambda model, benchmark: 0.5, **changes):
    torch.manual_seed(0)
    model = build_model(processor, world.SIZE, width=64, layers=1, text_layers=1).train()
    return MicroTraining(model, recipe(**changes), examine, partial(tower_states, model, 0, 1))


def frozen_module(processor, examine=lambda model, benchmark: 0.5, **changes):
    """Of a model whose tower learns nothing, on features that were stored."""
    torch.manual_seed(0)
    model = build_model(processor, world.SIZE, width=64, layers=1, text_layers=2).train()
    model.model.vision_tower.requires_grad_(False)
    see = partial(stored_states, torch.Tensor.float)
    return MicroTraining(model, recipe(**changes), examine, see, new_layers=1)


@pytest.fixture
def module(processor):
    return new_module(processor).eval()


def draw(index):
    return world.lesson(index, seed=0, reading=False, transcribe=0.5)


def lessons(count):
    return [draw(index) for index in range(count)]


def shown(lessons):
    """As the dataset shows them."""
    return [(torch.tensor(bytearray(each.image.tobytes())).view(168, 168, 3), each) for each in lessons]


def test_logits_are_those_of_the_untouched_model(module, processor):
    batch = Collator(processor.tokenizer, world.SIZE, TURN_TOKENS)(shown(lessons(4)))
    ids = torch.cat(
        [torch.full((4, 1), 1), torch.full((4, 144), module.model.config.image_token_id), batch["text"]], 1
    )
    pixels = batch["shown"].permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        whole = module.model(input_ids=ids, pixel_values=pixels).logits[:, 144:-1]
        image = module.model.model.multi_modal_projector(module.see(batch["shown"]).features_BND)
        parts, named = module.language(image, batch["text"])
    torch.testing.assert_close(parts, whole)
    assert named is image
    torch.testing.assert_close(module.named(image, batch["text"]), image)


@torch.no_grad()
def test_a_patch_is_named_by_what_the_language_model_makes_of_it_and_of_those_before(processor):
    module = frozen_module(processor).eval()
    image, text = torch.randn(2, 9, 64), torch.randint(5, 30, (2, 4))
    logits, named = module.language(image, text)
    alone, also_named = module.language(image, text[:, :0])
    assert logits.shape[1] == 4 and alone.shape[1] == 0
    torch.testing.assert_close(named, also_named)
    torch.testing.assert_close(named, module.named(image, text))
    first_layer = module.model.model.language_model
    states = first_layer(
        inputs_embeds=torch.cat([module.model.get_input_embeddings()(torch.ones(2, 1).long()), image], 1),
        output_hidden_states=True,
    ).hidden_states[1]
    torch.testing.assert_close(named, states[:, 1:])


@torch.no_grad()
def test_the_tower_is_seen_behind_three_of_its_layers(processor):
    model = build_model(processor, world.SIZE, width=64, layers=3, text_layers=1).eval()
    images = torch.randint(0, 256, (2, 168, 168, 3), dtype=torch.uint8)
    features, read, named = tower_states(model, 1, 2, images)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    tower = model.model.vision_tower
    state = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer, expected in zip(tower.encoder.layers, (read, named, features), strict=True):
        state = layer(state, None)
        torch.testing.assert_close(expected, (state[0] if isinstance(state, tuple) else state)[:, 1:])


@torch.no_grad()
def test_characters_are_told_in_the_midst_of_a_tower_that_learns_and_names_later(processor):
    """Each loss is the mean of that in the midst and that at the end; a frozen tower has the latter alone."""
    module = new_module(processor).eval()
    batch = Collator(processor.tokenizer, world.SIZE, TURN_TOKENS)(shown(lessons(4)))
    seen, written = module.see(batch["shown"]), batch["characters"][..., 0] != BLANK
    image = module.model.model.multi_modal_projector(seen.features_BND)
    reading, naming = module.patch_losses(seen, image, image, batch).values()
    midst = torch.nn.functional.layer_norm(seen.named_BND, (64,))
    read = [module.reading_loss(state, batch["characters"]) for state in (seen.read_BND, seen.features_BND)]
    named = [module.naming_loss(state, batch["names"], written) for state in (module.namer(midst), image)]
    torch.testing.assert_close(reading, (read[0] + read[1]) / 2)
    torch.testing.assert_close(naming, (named[0] + named[1]) / 2)
    frozen = frozen_module(processor).eval()
    reading, naming, telling = frozen.patch_losses(Seen(image), image, image, batch).values()
    torch.testing.assert_close(reading, frozen.reading_loss(image, batch["characters"]))
    torch.testing.assert_close(naming, frozen.naming_loss(image, batch["names"], written))
    torch.testing.assert_close(telling, frozen.telling_loss(image, batch["digits"]))


@torch.no_grad()
def test_each_place_of_a_number_is_told_by_a_head_of_its_own(processor):
    """Mean over the digits of patches with text; one without is told nothing of."""
    module = frozen_module(processor)
    states = torch.randn(1, 3, 64)
    digits = torch.tensor([[[3, 9, 0, 0], [IGNORE] * 4, [1, 0, 0, 0]]])
    normed = torch.nn.functional.layer_norm(states[0], (64,))
    expected = [
        -teller(normed[patch]).log_softmax(-1)[digits[0, patch, place]]
        for patch in (0, 2)
        for place, teller in enumerate(module.tellers)
    ]
    torch.testing.assert_close(module.telling_loss(states, digits), torch.stack(expected).mean())
    assert module.telling_loss(states, torch.full_like(digits, IGNORE)) == 0


@torch.no_grad()
def test_a_patch_without_text_weighs_a_tenth_of_one_with_it(processor):
    module = new_module(processor).eval()
    states, names = torch.randn(1, 3, 64), torch.tensor([[[7, 7], [8, 9], [10, 10]]])
    log = (
        torch.nn.functional.layer_norm(states[0], (64,)) @ module.model.get_input_embeddings().weight.T
    ).log_softmax(-1)
    of = [-log[0, 7], -(log[1, 8] + log[1, 9]) / 2, -log[2, 10]]
    loss = module.naming_loss(states, names, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(loss, (of[0] + 0.1 * of[1] + of[2]) / 2.1)


def test_long_answers_do_not_drown_short_ones():
    """Two samples with losses 0 and log 2 weigh the same, whatever their lengths."""
    logits = torch.zeros(2, 5, 2)
    logits[0, :, 1] = 100.0
    labels = torch.tensor([[1, 1, 1, 1, 1], [1, IGNORE, IGNORE, IGNORE, IGNORE]])
    assert answer_loss(logits, labels).item() == pytest.approx(math.log(2) / 2)


def test_learning_rate_rises_stays_and_falls():
    module = MicroTraining.__new__(MicroTraining)
    lightning.LightningModule.__init__(module)
    module.recipe = recipe(steps=100, epochs=1, warmup_steps=10, constant=0.6)
    rates = [module._rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5) and rates[99] == pytest.approx(0.025)
    assert module._rate(100) == 0.02


class Store:
    """Features of images, told apart by their first number."""

    def __len__(self):
        return 5

    def __getitem__(self, position):
        features = torch.randn(144, 64, generator=torch.Generator().manual_seed(position)).bfloat16()
        features[0, 0] = position
        return features


def fit(module, processor, folder):
    seen = []

    def watched(index, reading, transcribe, again=0):
        seen.append(index)
        return draw(index)

    if module.tower_learns:
        lessons = LessonDataset(watched, module.recipe)
    else:
        lessons = StoredLessons(watched, Store(), 2, module.recipe)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    train(module, lessons, processor, Checkpoints(folder), DummyLogger(), options)
    return seen


def test_only_tower_and_projector_learn_in_the_reading_phase(processor, tmp_path):
    module = new_module(processor, steps=2, epochs=1, reading=0.999)
    llava = module.model.model
    layers, *learning = llava.language_model.layers, llava.vision_tower, llava.multi_modal_projector
    before = [copy.deepcopy(part.state_dict()) for part in (layers, *learning)]
    fit(module, processor, tmp_path)
    unlike = [
        any(not torch.equal(old[name], new) for name, new in part.state_dict().items())
        for old, part in zip(before, (layers, *learning), strict=True)
    ]
    assert unlike == [False, True, True]


def test_before_a_frozen_tower_projector_and_first_layers_learn_to_read(processor, tmp_path):
    module = frozen_module(processor, steps=2, epochs=1, reading=0.999)
    llava = module.model.model
    parts = (*llava.language_model.layers, llava.vision_tower, llava.multi_modal_projector)
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    fit(module, processor, tmp_path)
    unlike = [
        any(not torch.equal(old[name], new) for name, new in part.state_dict().items())
        for old, part in zip(before, parts, strict=True)
    ]
    assert unlike == [True, False, False, True]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("make, rest", [(new_module, [4, 5, 6, 7]), (frozen_module, None)])
def test_a_resumed_training_is_the_unbroken_one(processor, tmp_path, make, rest, workers):
    def interrupted(model, benchmark):
        assert not model.training and benchmark in config.BENCHMARKS
        raise RuntimeError("power cut")

    broken = make(processor, interrupted, workers=workers)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, processor, tmp_path / "a")
    resumed, unbroken = make(processor, workers=workers), make(processor, workers=workers)
    seen = fit(resumed, processor, tmp_path / "a")
    whole = fit(unbroken, processor, tmp_path / "b")
    if not workers:  # what they draw is not seen here
        assert len(whole) == 8 and seen == whole[4:] and rest in (seen, None)
    assert resumed.seconds > torch.load(next((tmp_path / "a").glob("*.ckpt")))["seconds"] > 0
    for name, weight in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)
