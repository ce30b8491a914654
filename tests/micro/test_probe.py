"""The reading probe: the patches it gets, and that it tells readable layers from others."""

import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from atr.features.encoder import Encoder
from atr.micro import drawing
from atr.micro.drawing import Sample
from atr.micro.lessons import draw_lesson
from atr.micro.model import build_processor
from atr.micro.probe import TextPatches, collect_text_patches, measure_accuracies
from atr.micro.targets import BLANK, CHARACTERS, Collator
from atr.micro.vocabulary import VOCABULARY

SIZE = 84


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    settings = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**settings, patch_size=14, image_size=56)).save_pretrained(folder)
    BitImageProcessorPil().save_pretrained(folder)
    return Encoder.load(str(folder), -1, size=SIZE)


@torch.inference_mode()
def test_patches_with_characters_are_collected_at_every_layer(encoder):
    tokenizer = build_processor(VOCABULARY, drawing.SIZE).tokenizer
    lessons = [draw_lesson(index, 0, reading=True, transcribe=0.0) for index in range(5)]
    found = collect_text_patches(encoder, lessons, Collator(tokenizer, SIZE, 0), batch_size=2)
    states = encoder.tower(
        encoder.preprocess([lesson.image for lesson in lessons]), output_hidden_states=True
    ).hidden_states
    places, patch = set(), drawing.SIZE / 6
    for number, lesson in enumerate(lessons):
        for character in lesson.characters:
            row, column = int(character.y // patch), int(character.x // patch)
            if 0 <= row < 6 and 0 <= column < 6:
                places.add((number, 1 + row * 6 + column))
    images, tokens = (torch.tensor(part) for part in zip(*sorted(places), strict=True))
    assert found.states_LPD.shape == (3, len(places), 24)
    for layer in (1, 2, 3):
        expected = states[layer][images, tokens].bfloat16()
        torch.testing.assert_close(found.states_LPD[layer - 1], expected, rtol=0.02, atol=1e-3)
    assert len(found.characters_P2) == len(places) and (found.characters_P2[:, 0] != BLANK).all()


def patches(count, seed):
    """Layer 1 is noise; layer 2 encodes characters as sums of directions; most patches have one."""
    generator = torch.Generator().manual_seed(seed)
    characters = torch.randint(1, 2 + len(CHARACTERS), (count, 2), generator=generator)
    characters[: 2 * count // 3, 1] = BLANK
    directions = torch.randn(2, 2 + len(CHARACTERS), 64, generator=torch.Generator().manual_seed(9))
    shown = directions[0, characters[:, 0]] + directions[1, characters[:, 1]]
    noise = torch.randn(count, 64, generator=generator)
    return TextPatches(torch.stack([noise, shown + noise / 10]).bfloat16(), characters)


def test_accuracy_is_high_only_at_a_layer_that_encodes_characters():
    noise, shown = measure_accuracies(patches(3000, 0), patches(600, 1), seed=0)
    assert shown > 0.9
    # Blank slots do not count.
    assert noise < 0.1


def test_the_probe_depends_on_its_seed_alone():
    first, again, other = (measure_accuracies(patches(300, 0), patches(600, 1), seed) for seed in (0, 0, 1))
    assert first == again != other


def test_lessons_without_text_are_refused(encoder):
    tokenizer = build_processor(VOCABULARY, drawing.SIZE).tokenizer
    blank = Sample(draw_lesson(0, 0, reading=True, transcribe=0.0).image, ())
    with pytest.raises(ValueError, match="no text in 2 lessons: use more"):
        collect_text_patches(encoder, [blank, blank], Collator(tokenizer, SIZE, 0))
