import copy
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from atr.micro.curriculum import LessonDataset, StoredLessons
from atr.micro.drawing import SIZE
from atr.micro.lessons import draw_lesson
from atr.micro.losses import name_loss
from atr.micro.model import build_model, build_processor
from atr.micro.params import Micro
from atr.micro.targets import BLANK, TURN_TOKENS, Collator
from atr.micro.training import MicroTraining, TowerStates, encode_pictures, encode_stored, train_micro_model
from atr.micro.vocabulary import VOCABULARY
from atr.micro.world import DRAW
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
    return Micro(**{**values, "compile": False, "reading": 0.5, **changes})


@pytest.fixture(scope="module")
def processor():
    return build_processor(VOCABULARY, SIZE)


def new_module(processor, score=lambda model, benchmark: 0.5, **changes):
    torch.manual_seed(0)
    model = build_model(processor, SIZE, width=64, layers=1, text_layers=1).train()
    return MicroTraining(model, recipe(**changes), score, partial(encode_pictures, model, 0, 1))


def frozen_module(processor, score=lambda model, benchmark: 0.5, **changes):
    """A module on stored features, whose tower is frozen."""
    torch.manual_seed(0)
    model = build_model(processor, SIZE, width=64, layers=1, text_layers=2).train()
    model.model.vision_tower.requires_grad_(False)
    see = partial(encode_stored, torch.Tensor.float)
    return MicroTraining(model, recipe(**changes), score, see, new_layers=1)


@pytest.fixture
def module(processor):
    return new_module(processor).eval()


def draw(index):
    return draw_lesson(index, seed=0, reading=False, transcribe=0.5)


def lessons(count):
    return [draw(index) for index in range(count)]


def pair(lessons):
    """Images with their lessons, as a dataset gives them."""
    return [(torch.tensor(bytearray(each.image.tobytes())).view(168, 168, 3), each) for each in lessons]


def test_logits_equal_those_of_the_model_run_as_a_whole(module, processor):
    batch = Collator(processor.tokenizer, SIZE, TURN_TOKENS)(pair(lessons(4)))
    ids = torch.cat(
        [torch.full((4, 1), 1), torch.full((4, 144), module.model.config.image_token_id), batch["text"]], 1
    )
    pixels = batch["inputs"].permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        whole = module.model(input_ids=ids, pixel_values=pixels).logits[:, 144:-1]
        image = module.model.model.multi_modal_projector(module.encode(batch["inputs"]).features_BND)
        parts, named = module.run_language_model(image, batch["text"])
    torch.testing.assert_close(parts, whole)
    assert named is image
    torch.testing.assert_close(module.compute_naming_states(image, batch["text"]), image)


@torch.no_grad()
def test_naming_states_come_from_the_first_layers_of_the_language_model(processor):
    module = frozen_module(processor).eval()
    image, text = torch.randn(2, 9, 64), torch.randint(5, 30, (2, 4))
    logits, named = module.run_language_model(image, text)
    alone, also_named = module.run_language_model(image, text[:, :0])
    assert logits.shape[1] == 4 and alone.shape[1] == 0
    torch.testing.assert_close(named, also_named)
    torch.testing.assert_close(named, module.compute_naming_states(image, text))
    first_layer = module.model.model.language_model
    states = first_layer(
        inputs_embeds=torch.cat([module.model.get_input_embeddings()(torch.ones(2, 1).long()), image], 1),
        output_hidden_states=True,
    ).hidden_states[1]
    torch.testing.assert_close(named, states[:, 1:])


@torch.no_grad()
def test_tower_states_are_those_after_three_of_its_layers(processor):
    model = build_model(processor, SIZE, width=64, layers=3, text_layers=1).eval()
    images = torch.randint(0, 256, (2, 168, 168, 3), dtype=torch.uint8)
    features, read, named = encode_pictures(model, 1, 2, images)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    tower = model.model.vision_tower
    state = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer, expected in zip(tower.encoder.layers, (read, named, features), strict=True):
        state = layer(state, None)
        torch.testing.assert_close(expected, (state[0] if isinstance(state, tuple) else state)[:, 1:])


@torch.no_grad()
def test_a_trained_tower_gets_the_patch_losses_after_inner_layers_too(processor):
    """Each loss is the mean over inner and final states; a frozen tower has no inner ones."""
    module = new_module(processor).eval()
    batch = Collator(processor.tokenizer, SIZE, TURN_TOKENS)(pair(lessons(4)))
    tower, has_text = module.encode(batch["inputs"]), batch["characters"][..., 0] != BLANK
    embedding = module.model.get_input_embeddings().weight
    image = module.model.model.multi_modal_projector(tower.features_BND)
    characters, names = module.patch_losses(tower, image, image, batch).values()
    inner = torch.nn.functional.layer_norm(tower.naming_BND, (64,))
    read = [
        module.character_heads.loss(state, batch["characters"])
        for state in (tower.reading_BND, tower.features_BND)
    ]
    named = [
        name_loss(state, embedding, batch["names"], has_text)
        for state in (module.naming_projection(inner), image)
    ]
    torch.testing.assert_close(characters, (read[0] + read[1]) / 2)
    torch.testing.assert_close(names, (named[0] + named[1]) / 2)
    frozen = frozen_module(processor).eval()
    characters, names, digits = frozen.patch_losses(TowerStates(image), image, image, batch).values()
    torch.testing.assert_close(characters, frozen.character_heads.loss(image, batch["characters"]))
    torch.testing.assert_close(
        names, name_loss(image, frozen.model.get_input_embeddings().weight, batch["names"], has_text)
    )
    torch.testing.assert_close(digits, frozen.digit_heads.loss(image, batch["digits"]))


def test_learning_rate_rises_stays_and_falls():
    module = MicroTraining.__new__(MicroTraining)
    lightning.LightningModule.__init__(module)
    module.recipe = recipe(steps=100, epochs=1, warmup_steps=10, constant=0.6)
    rates = [module._rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5) and rates[99] == pytest.approx(0.025)
    assert module._rate(100) == 0.02


class Store:
    """Features of five images, whose first number is the position."""

    def __len__(self):
        return 5

    def __getitem__(self, position):
        features = torch.randn(144, 64, generator=torch.Generator().manual_seed(position)).bfloat16()
        features[0, 0] = position
        return features


def fit(module, processor, folder):
    seen = []

    def record(index, reading, transcribe, again=0):
        seen.append(index)
        return draw(index)

    if module.trains_tower:
        lessons = LessonDataset(record, module.recipe)
    else:
        lessons = StoredLessons(record, Store(), 2, module.recipe)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    train_micro_model(module, lessons, processor, Checkpoints(folder), DummyLogger(), options)
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


def test_with_a_frozen_tower_projector_and_first_layers_learn_to_read(processor, tmp_path):
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
        assert not model.training and benchmark in DRAW
        raise RuntimeError("power cut")

    broken = make(processor, interrupted, workers=workers)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, processor, tmp_path / "a")
    resumed, unbroken = make(processor, workers=workers), make(processor, workers=workers)
    seen = fit(resumed, processor, tmp_path / "a")
    whole = fit(unbroken, processor, tmp_path / "b")
    if not workers:  # draws in other processes are not recorded
        assert len(whole) == 8 and seen == whole[4:] and rest in (seen, None)
    assert resumed.seconds > torch.load(next((tmp_path / "a").glob("*.ckpt")))["seconds"] > 0
    for name, weight in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)
