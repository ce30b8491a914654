from pathlib import Path

from atr.micro.model_card import render_card, render_dinov2_card
from atr.micro.params import load_micro
from atr.micro.world import DRAW

SHIPPED = Path(__file__).parents[2] / "data/micro/params.yaml"
SCORES = dict.fromkeys(DRAW, 0.98765)


def test_the_card_states_recipe_seed_time_and_scores():
    card = render_card(load_micro("micro", SHIPPED), SCORES, minutes=12.4)
    assert "CLIP tower of 4 layers" in card and "416,000 images" in card
    assert "**Seed**: 0. **Time**: 12 minutes" in card
    assert "| reading_layer | 2 |" in card and "500 held-out questions" in card
    assert all(f"| {name} | 0.988 |" in card for name in DRAW)


def test_the_card_on_dinov2_states_the_accuracies_of_the_probe_too():
    probe = {"images": 400, "accuracy": {"224": {"1": 0.25, "2": 0.5}, "336": {"1": 0.125, "2": 1.0}}}
    card = render_dinov2_card(load_micro("micro_dinov2", SHIPPED), probe, SCORES, minutes=1.0)
    assert "base_model: facebook/dinov2-small\n" in card and "at 224x224 as 256 visual tokens" in card
    assert "24,000 images" in card and "4.0 times" in card.replace("\n  ", " ")
    assert "| size | 1 | 2 |\n| --- | --- | --- |\n| 224 | 0.25 | 0.50 |\n| 336 | 0.12 | 1.00 |" in card
    assert "| micro_features.images | 24000 |" in card and "| micro_dinov2.new_layers | 2 |" in card
