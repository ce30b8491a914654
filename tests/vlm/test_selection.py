from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from atr.core.tokens import budget, shares, top_k_BK
from atr.reduction import EncoderOutput, FeatureSelector, Full, NoImage, Scorer, SelectorReducer
from atr.reduction.determinantal import CDPruner
from atr.reduction.distilled import DistilledReducer
from atr.reduction.peers.class_attention import ClassAttention
from atr.reduction.peers.hired import HiRED, apportion
from atr.reduction.peers.random import Random
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families import Tiling, family_of
from atr.vlm.families.tower import encode_tiles
from atr.vlm.policy import Policy
from atr.vlm.selection import as_reducer, select_tokens
from atr.vlm.tiling import TileLayout

TILED = pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
SHAPES = [(30, 30), (20, 60), (84, 50), (3, 500)]


def choose(reducer, encoded, layout, policy):
    """`select_tokens` for tiles of one grid."""
    return select_tokens(reducer, EncodedTiles.of_one_grid(encoded), layout, policy)


class Scored:
    """Scores that are given, and no other way to choose."""

    needs = frozenset()
    threshold = None

    def __init__(self, scores_BN):
        self.scores_BN = scores_BN

    def scores(self, encoded):
        return self.scores_BN

    def __call__(self, encoded, budget):
        raise AssertionError("asked for a tile alone")


class OfGrid(Random):
    """Chooses by where a token lies on the grid of its tile."""

    needs = frozenset({"grid"})


@pytest.fixture
def seen(model, process):
    """EncoderOutput tiles and layout of four images of several tiles each."""
    random = np.random.default_rng(0)
    pictures = [[Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8))] for shape in SHAPES]
    inputs = process(*["<image>"] * len(SHAPES), images=pictures)
    tiling = family_of(model).tiling(model, inputs)
    with torch.no_grad():
        return encode_tiles(model, inputs, tiling), TileLayout(model, tiling)


@pytest.fixture
def attended(seen):
    """The same with random attention, of which the upper left of each tile has most in the first layer."""
    encoded, layout = seen
    shape, generator = encoded.features_BND.shape[:2], torch.Generator().manual_seed(3)
    own, first = torch.rand(2, *shape, generator=generator)
    first[:, [0, 1, 4, 5]] += 4
    return replace(encoded, attention_BN=own, first_attention_BN=first), layout


def random_scores(encoded, seed=0):
    shape = encoded.features_BND.shape[:2]
    return Scored(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def selector():
    torch.manual_seed(1)
    selector = FeatureSelector(width=24, grid=(4, 4), layers=1, heads=2, initial_bias=0.0).eval()
    torch.nn.init.normal_(selector.trunk.head.weight)
    return SelectorReducer(selector)


@TILED
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0, 7])
def test_the_tiles_of_an_image_share_its_budget_best_first(seen, keep):
    encoded, layout = seen
    reducer = random_scores(encoded)
    kept = choose(reducer, encoded, layout, Policy(keep))
    packed = layout.values(reducer.scores_BN[..., None])
    for kept_K, scores, tile_of in zip(kept, packed, layout.tile_of, strict=True):
        tokens = [place for place, tile in enumerate(tile_of.tolist()) if tile >= 0]
        best = sorted(tokens, key=lambda place: -scores[place, 0])[: budget(keep, len(tokens))]
        assert kept_K.tolist() == sorted(best)


@TILED
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0, 7])
def test_each_tile_keeps_its_share_best_first(seen, keep):
    encoded, layout = seen
    reducer = random_scores(encoded)
    kept = choose(reducer, encoded, layout, Policy(keep, budget="tile"))
    packed = layout.values(reducer.scores_BN[..., None])
    for kept_K, scores, tile_of, tiles in zip(kept, packed, layout.tile_of, layout.tiling.tiles, strict=True):
        parts = [(tile_of == tile).nonzero()[:, 0].tolist() for tile in range(tiles)]
        counts = shares(budget(keep, sum(map(len, parts))), [len(part) for part in parts])
        best = [
            place
            for part, count in zip(parts, counts, strict=True)
            for place in sorted(part, key=lambda place: -scores[place, 0])[:count]
        ]
        assert kept_K.tolist() == sorted(best)


@TILED
@pytest.mark.parametrize("keep", [1, 0.3, 12])
def test_a_taught_selector_compares_tiles_by_its_scores(seen, selector, keep):
    chosen = [
        choose(reducer, *seen, Policy(keep)) for reducer in (selector, DistilledReducer(selector.selector))
    ]
    assert all(map(torch.equal, *chosen))


def test_a_selector_is_asked_by_who_taught_it(selector):
    assert type(as_reducer(selector.selector)) is SelectorReducer
    selector.selector.note(taught_by="micro")
    assert type(as_reducer(selector.selector)) is DistilledReducer


@TILED
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0, 7])
def test_hired_splits_the_budget_over_the_tiles_and_keeps_the_most_attended_of_each(attended, keep):
    encoded, layout = attended
    kept = choose(HiRED(), encoded, layout, Policy(keep))
    packed = layout.values(encoded.attention_BN[..., None])
    first, differ = 0, False
    for kept_K, attention, tile_of, tiles, arrangement in zip(
        kept, packed, layout.tile_of, layout.tiling.tiles, layout.tiling.arrangements, strict=True
    ):
        parts = [(tile_of == tile).nonzero()[:, 0].tolist() for tile in range(tiles)]
        sizes = [len(part) for part in parts]
        total = budget(keep, sum(sizes))
        counts = apportion(total, encoded.first_attention_BN[first], (4, 4), arrangement, sizes)
        best = [
            place
            for part, count in zip(parts, counts, strict=True)
            for place in sorted(part, key=lambda place: -attention[place, 0])[:count]
        ]
        assert kept_K.tolist() == sorted(best) and len(kept_K) == total
        differ |= counts != shares(total, sizes)
        first += tiles
    assert differ or keep == 1.0


@TILED
def test_hired_leaves_the_budget_alone_where_each_tile_has_its_own(attended):
    encoded, layout = attended
    chosen = [
        choose(reducer, encoded, layout, Policy(0.4, budget="tile"))
        for reducer in (HiRED(), ClassAttention())
    ]
    assert all(map(torch.equal, *chosen))
    with pytest.raises(ValueError, match="HiRED needs first_attention_BN, which was not encoded"):
        choose(HiRED(), replace(encoded, first_attention_BN=None), layout, Policy(0.4))


@TILED
@pytest.mark.parametrize("per", ["image", "tile"])
def test_scores_and_sets_keep_the_same_counts(seen, selector, per):
    encoded, layout = seen
    for keep in (0.01, 0.33, 0.9, 1.0, 16):
        policy = Policy(keep, budget=per)
        chosen = [choose(reducer, encoded, layout, policy) for reducer in (selector, Random(2))]
        wanted = [budget(keep, len(tokens)) for [tokens] in layout.groups("image")]
        assert [[len(kept_K) for kept_K in kept] for kept in chosen] == [wanted, wanted]


@TILED
def test_random_is_uniform_over_an_images_tokens(seen):
    encoded, layout = seen
    draws = [choose(Random(seed), encoded, layout, Policy(0.25)) for seed in range(400)]
    for image, [tokens] in enumerate(layout.groups("image")):
        drawn = torch.bincount(torch.cat([kept[image] for kept in draws]), minlength=layout.lengths[image])
        expected = budget(0.25, len(tokens)) / len(tokens)
        assert drawn.sum() == drawn[tokens].sum()  # no newline
        torch.testing.assert_close(
            drawn[tokens] / 400, torch.full((len(tokens),), expected), atol=0.11, rtol=0
        )


@TILED
def test_a_choice_does_not_depend_on_the_other_images(seen, selector):
    encoded, layout = seen
    first = 0
    for image, tiles in enumerate(layout.tiling.tiles):
        alone = encoded.of(range(first, first + tiles))
        alone_layout = TileLayout(
            layout.model, Tiling.of_one_grid((tiles,), layout.tiling.grid, [layout.tiling.sizes[image]])
        )
        for reducer in (selector, Random(0)):
            for policy in (Policy(0.4), Policy(0.4, budget="tile")):
                [kept_K] = choose(reducer, alone, alone_layout, policy)
                assert torch.equal(kept_K, choose(reducer, encoded, layout, policy)[image])
        first += tiles


@TILED
def test_random_draws_each_tile_by_its_own_pixels(seen):
    encoded, layout = seen
    parts = layout.groups("tile")
    kept = choose(Random(0), encoded, layout, Policy(0.25, budget="tile"))
    places = [
        tuple(torch.isin(part, kept_K).nonzero()[:, 0].tolist())
        for tiles, kept_K in zip(parts, kept, strict=True)
        for part in tiles
        if len(part) == 16
    ]
    assert len(set(places)) > len(places) / 2
    other = replace(encoded, features_BND=torch.randn_like(encoded.features_BND))
    again = choose(Random(0), other, layout, Policy(0.25, budget="tile"))
    assert all(map(torch.equal, kept, again))


@TILED
def test_adaptive_is_the_selectors_own_mask_within_its_bounds(seen, selector):
    encoded, layout = seen
    packed = layout.values(selector.scores(encoded)[..., None])
    masks = [
        ((scores[:, 0] > 0) & (tile_of >= 0)).nonzero()[:, 0].tolist()
        for scores, tile_of in zip(packed, layout.tile_of, strict=True)
    ]
    sizes = [len(tokens) for [tokens] in layout.groups("image")]
    for per in ("image", "tile"):
        kept = choose(selector, encoded, layout, Policy("adaptive", budget=per))
        assert [kept_K.tolist() for kept_K in kept] == masks
    assert any(0 < len(mask) < size for mask, size in zip(masks, sizes, strict=True))
    few = choose(selector, encoded, layout, Policy("adaptive", bounds=(0, 5)))
    assert [len(kept_K) for kept_K in few] == [min(len(mask), 5) for mask in masks]
    assert all(set(kept_K.tolist()) <= set(mask) for kept_K, mask in zip(few, masks, strict=True))
    many = choose(selector, encoded, layout, Policy("adaptive", bounds=(0.9, 1.0)))
    assert [len(kept_K) for kept_K in many] == [
        max(len(mask), budget(0.9, size)) for mask, size in zip(masks, sizes, strict=True)
    ]
    most = choose(selector, encoded, layout, Policy("adaptive", bounds=(10_000, 20_000)))
    assert [len(kept_K) for kept_K in most] == sizes
    tile = choose(selector, encoded, layout, Policy("adaptive", budget="tile", bounds=(0, 2)))
    for kept_K, tile_of in zip(tile, layout.tile_of, strict=True):
        assert torch.bincount(tile_of[kept_K], minlength=1).max() <= 2


def test_adaptive_counts_differ_between_images_of_one_tile(model, process, selector):
    inputs = process("<image> a", "<image> b", "<image> c")
    tiling = family_of(model).tiling(model, inputs)
    encoded = encode_tiles(model, inputs, tiling)
    kept = choose(selector, encoded, TileLayout(model, tiling), Policy("adaptive"))
    logits = selector.selector(encoded.features_BND)
    assert [kept_K.tolist() for kept_K in kept] == [row.nonzero()[:, 0].tolist() for row in logits > 0]


@TILED
def test_what_keeps_all_or_none_does(seen):
    encoded, layout = seen
    for reducer, keep in ((Full(), 1.0), (NoImage(), 0.0)):
        kept = choose(reducer, encoded, layout, Policy(keep))
        for kept_K, [tokens] in zip(kept, layout.groups("image"), strict=True):
            assert torch.equal(kept_K, tokens if keep else tokens[:0])
    with pytest.raises(ValueError, match="reducer full: budget"):
        choose(Full(), encoded, layout, Policy(0.5))


@TILED
def test_a_reducer_that_cannot_compare_tiles_is_refused_by_name(seen):
    encoded, layout = seen
    with pytest.raises(ValueError, match=r"reducer OfGrid needs grid and gives no scores .* not of 7"):
        choose(OfGrid(), encoded, layout, Policy(0.5))

    class Gazing(Scored):
        needs = frozenset({"attention_BN"})

    with pytest.raises(ValueError, match="Gazing needs attention_BN, which was not encoded"):
        choose(Gazing(random_scores(encoded).scores_BN), encoded, layout, Policy(0.5))


@TILED
def test_on_images_of_one_tile_any_reducer_will_do(model):
    encoded = EncoderOutput(torch.randn(2, 16, 24), (4, 4))
    layout = TileLayout(model, Tiling.of_one_grid((1, 1), (4, 4)))
    kept = choose(OfGrid(3), encoded, layout, Policy(0.5))
    assert torch.equal(torch.stack(kept), Random(3)(encoded, 8))


@TILED
def test_a_token_whose_score_is_the_threshold_itself_is_not_above_it(seen):
    encoded, layout = seen
    scored = Scored(torch.zeros(encoded.features_BND.shape[:2]))
    scored.threshold = 0.0
    assert [len(kept_K) for kept_K in choose(scored, encoded, layout, Policy("adaptive"))] == [0] * 4
    scored.threshold = -1e-6
    kept = choose(scored, encoded, layout, Policy("adaptive"))
    assert [len(kept_K) for kept_K in kept] == layout.sizes


@TILED
def test_each_image_of_several_tiles_is_chosen_by_its_own_text(seen):
    encoded, layout = seen
    of_image = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(5)))
    texts = of_image.repeat_interleave(torch.tensor(layout.tiling.tiles), 0)
    policy, asked = Policy(0.3), replace(encoded, text_BD=texts)
    kept = choose(CDPruner(), asked, layout, policy)
    for image, kept_K in enumerate(kept):
        (visual,) = layout.groups("image")[image]
        alone = EncoderOutput(
            layout.values(encoded.features_BND)[image][None, visual],
            None,
            projected_BND=layout.values(encoded.projected_BND)[image][None, visual],
            text_BD=of_image[image : image + 1],
        )
        assert kept_K.tolist() == visual[CDPruner()(alone, budget(0.3, len(visual)))[0]].tolist()
    others = choose(CDPruner(), replace(asked, text_BD=texts.flip(0)), layout, policy)
    assert any(one.tolist() != other.tolist() for one, other in zip(kept, others, strict=True))


def test_adaptive_needs_a_threshold(model):
    encoded = EncoderOutput(torch.randn(1, 16, 24), (4, 4))
    for reducer in (Random(), random_scores(encoded)):
        with pytest.raises(ValueError, match=f"adaptive is not allowed for reducer {type(reducer).__name__}"):
            choose(reducer, encoded, TileLayout(model, Tiling.of_one_grid((1,), (4, 4))), Policy("adaptive"))


def test_bounds_that_exclude_each_other_are_refused(model, selector):
    encoded, layout = (
        EncoderOutput(torch.randn(1, 16, 24), (4, 4)),
        TileLayout(model, Tiling.of_one_grid((1,), (4, 4))),
    )
    with pytest.raises(ValueError, match=r"bounds: \(0.5, 3\) are 8 and 3 of 16 tokens"):
        choose(selector, encoded, layout, Policy("adaptive", bounds=(0.5, 3)))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_counts_and_bounds_of_other_libraries_are_counts(seen, selector, kind):
    encoded, layout = seen
    assert [len(kept_K) for kept_K in choose(selector, encoded, layout, Policy(kind(1)))] == [1] * len(
        layout.sizes
    )
    few = choose(selector, encoded, layout, Policy("adaptive", bounds=(kind(2), kind(2))))
    assert {len(kept_K) for kept_K in few} == {2}
    policy = Policy("adaptive", bounds=(np.float32(0.25), torch.tensor(0.25)))
    quarter = choose(selector, encoded, layout, policy)
    assert [len(kept_K) for kept_K in quarter] == [budget(0.25, size) for size in layout.sizes]


def test_who_scores(selector):
    assert isinstance(selector, Scorer)
    assert not any(isinstance(reducer, Scorer) for reducer in (Random(), Full(), NoImage(), OfGrid()))


class Attentive:
    """Keeps what is attended to most, without saying that its scores compare."""

    needs = frozenset({"attention_BN"})

    def __call__(self, encoded, budget):
        return top_k_BK(encoded.attention_BN, budget)

    def counts(self, encoded):
        return (encoded.attention_BN > encoded.attention_BN.mean(1, keepdim=True)).sum(1)


@TILED
def test_what_is_known_of_a_token_goes_with_it_over_all_tiles(seen):
    encoded, layout = seen
    attention_BN = torch.rand(encoded.features_BND.shape[:2])
    encoded = replace(encoded, attention_BN=attention_BN)
    kept = choose(Attentive(), encoded, layout, Policy(0.5))
    packed = layout.values(attention_BN[..., None])
    for kept_K, scores_P1, [tokens] in zip(kept, packed, layout.groups("image"), strict=True):
        best = scores_P1[tokens, 0].topk(len(kept_K)).indices
        assert torch.equal(kept_K, tokens[best].sort().values)


@TILED
def test_what_merges_is_refused_for_several_tiles(seen):
    encoded, layout = seen

    class Merging(Random):
        def merge(self, encoded, budget):
            raise AssertionError

    with pytest.raises(ValueError, match=r"reducer Merging merges tokens: .* not of 7"):
        choose(Merging(), encoded, layout, Policy(0.5))


def test_a_reducers_own_counts_within_bounds(model):
    attention_BN = torch.tensor([[0.9] + [0.1] * 15, [0.9] * 6 + [0.1] * 10, [0.9] * 6 + [0.1] * 10])
    encoded = EncoderOutput(torch.randn(3, 16, 24), (4, 4), attention_BN)
    layout = TileLayout(model, Tiling.of_one_grid((1, 1, 1), (4, 4)))
    kept = choose(Attentive(), encoded, layout, Policy("adaptive"))
    assert [kept_K.tolist() for kept_K in kept] == [[0], list(range(6)), list(range(6))]
    kept = choose(Attentive(), encoded, layout, Policy("adaptive", bounds=(2, 4)))
    assert [kept_K.tolist() for kept_K in kept] == [[0, 1], list(range(4)), list(range(4))]
