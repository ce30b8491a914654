"""Prompts, batches and answers of models of the rule, with processors of their own classes."""

import json
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from atr.config import Evaluate
from atr.core.fingerprint import fingerprint
from atr.core.records import Question, Trial
from atr.core.serving import SEVERAL_LAYERS
from atr.features.merged import vision_tower
from atr.reduction import FeatureSelector, Full, SelectorReducer
from atr.reduction.marginal_relevance import MMR
from atr.vlm.checkpoint import load_vlm
from atr.vlm.compatibility import check_selector
from atr.vlm.generation import Generator, ReducedGenerator
from atr.vlm.inputs import ImageInputs, Prompts
from atr.vlm.policy import Policy
from atr.vlm.processors import load_processor
from atr.vlm.reduce import layer_of
from atr.vlm.selection import as_reducer

SIZES = {"a": (40, 30), "b": (20, 50), "c": (90, 30), "d": (9, 9)}
TYPES = [
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "internvl",
    "idefics3",
    pytest.param("smolvlm", marks=pytest.mark.exhaustive),
]
TILED = ("internvl", "smolvlm", "idefics3")


class Pictures:
    def image(self, name):
        width, height = SIZES[name]
        generator = torch.Generator().manual_seed(ord(name))
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module", autouse=True)
def words_of_numbers():
    """A package that SmolVLM's processor asks for, and needs for videos alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
        yield


@pytest.fixture(scope="module", params=TYPES)
def folder(request, checkpoints, tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def model_type(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.fixture(scope="module")
def generator(folder):
    vlm = SimpleNamespace(path=str(folder), stored=True, min_pixels=None, max_pixels=None)
    return Generator.load(
        vlm, "32-true", torch.device("cpu"), Pictures, lambda: None, Evaluate(max_new_tokens=4)
    )


def own_inputs(processor, images, questions):
    texts = [Prompts(processor).text(text, len(names)) for names, text in zip(images, questions, strict=True)]
    pictures = [[Pictures().image(name) for name in names] for names in images]
    return processor(images=pictures, text=texts, padding=True, return_tensors="pt")


def test_prompts_are_those_that_the_processor_makes(generator):
    images, questions = [["a", "b"], ["c", "a"], ["d", "d"]], ["w10 w11", "w12", "w13"]
    prepared = generator.source.prepare(images, questions)
    own = own_inputs(generator.processor, images, questions)
    same = {name for name in own if name in prepared.inputs}
    assert same >= {"input_ids", "attention_mask"}
    assert all(torch.equal(own[name], prepared.inputs[name]) for name in same)
    types = {"qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
    assert types.get(generator.model.config.model_type, "input_ids") in same


@torch.inference_mode()
def test_answers_with_all_tokens_are_the_untouched_models(generator):
    """Questions of a batch that share an image, of different lengths, and one with two images."""
    for images, questions in (
        ([["a"], ["a"], ["b"]], ["w10 w11", "w12", "w13 w14 w15"]),
        ([["a", "b"], ["c", "d"]], ["w16", "w17 w18"]),
        ([[], []], ["w19", "w20 w21"]),
    ):
        replies = generator.answer(generator.prepare(images, questions), Full(), 1.0)
        for names, question, reply in zip(images, questions, replies, strict=True):
            if names:
                inputs = own_inputs(generator.processor, [names], [question])
            else:
                inputs = generator.processor.tokenizer(
                    [Prompts(generator.processor).text(question, 0)], return_tensors="pt"
                )
            ids = generator.model.generate(**inputs, do_sample=False, max_new_tokens=4)[0]
            behind = ids[inputs["input_ids"].shape[1] :]
            assert reply.prediction == generator.processor.decode(behind, skip_special_tokens=True).strip()
            assert (
                reply.tokens
                == reply.tokens_full
                == int((inputs["input_ids"] == generator.model.config.image_token_id).sum())
            )


def test_batches_count_the_tokens_of_each_image(generator, model_type):
    counted = generator.source.count_tokens("abcd")
    lengths = generator.source.prepare([[name] for name in "abcd"], ["w10"] * 4).layout.lengths
    assert all(counted[name] >= length for name, length in zip("abcd", lengths, strict=True))
    assert all(counted[name] <= 1.5 * length + 2 for name, length in zip("abcd", lengths, strict=True))
    asked = [Question(name, "docs", "text", [name], "w10", ["17"]) for name in "dabc"]
    most = max(counted.values()) + 20
    batches = generator.batches(asked, tokens=most)
    assert sorted(chain(*batches)) == [0, 1, 2, 3]
    assert all(sum(counted[asked[index].images[0]] for index in batch) <= most for batch in batches)


def test_masks_are_of_the_whole_image_on_its_own_grid(generator, model_type):
    made = ReducedGenerator.build(generator, "random", [0], "")
    masks = made.masks({"a": "w9", "c": "w10"}, Trial(0.5, 0))
    if model_type.startswith("qwen"):
        assert masks["grids"] == {"a": [4, 5], "c": [2, 8]}
        assert {image: len(kept) for image, kept in masks["masks"].items()} == {"a": 10, "c": 8}
    else:
        assert masks["grid"] == [3, 3]
        assert all(0 <= index < 9 for kept in masks["masks"].values() for index in kept)


def test_the_tile_of_the_whole_image_is_found(generator, model_type):
    """The last of the tiles: its tokens alone are kept, and all of them are told."""
    prepared = generator.source.prepare([["a"]], ["w10"])
    (tile_P,), (tiles,) = prepared.layout.tile_of, prepared.layout.tiling.tiles
    assert (tiles > 1) == (model_type in TILED)
    ((whole, grid),) = prepared.layout.in_whole_image([(tile_P == tiles - 1).nonzero()[:, 0]])
    assert whole.tolist() == list(range(grid[0] * grid[1]))


def test_reducers_of_one_tile_or_between_layers_are_refused_by_name(generator, model_type):
    if model_type in TILED:
        with pytest.raises(
            ValueError, match=f"^reducer uniform cannot serve {model_type}, which cuts images"
        ):
            generator.reducer("uniform", 0, "")
    else:
        generator.reducer("uniform", 0, "")
    for name in ("fastv", "pyramiddrop"):
        refusal = f"^reducer {name} prunes .*{model_type}.*, allowed: "
        with pytest.raises(ValueError, match=refusal):
            generator.reducer(name, 0, "")
        with pytest.raises(ValueError, match=refusal):
            generator.reachable(name, [0.5])


def test_a_selectors_layer_reaches_the_encoder(generator, monkeypatch):
    selector = FeatureSelector(32, (4, 4), layers=1, heads=2, layer="merged")
    asked = []
    prepare = generator.source.prepare
    monkeypatch.setattr(
        ImageInputs, "prepare", lambda self, *given: (asked.append(given[3]), prepare(*given))[1]
    )
    reduced = ReducedGenerator(generator, {0: as_reducer(selector)})
    batch = reduced.prepare([["a"]], ["w10"])
    (reply,) = reduced.answer(batch, Trial(0.5, 0))
    assert asked == ["merged"] and reply.tokens == round(0.5 * reply.tokens_full + 1e-9)


def test_a_selector_of_another_tower_or_width_is_refused(generator):
    selector = FeatureSelector(32, (4, 4), layers=1, heads=2, layer="merged", encoder="other")
    own = fingerprint(vision_tower(generator.model))
    selector.note(fingerprint=own)
    check_selector(generator.model, selector)
    selector.note(fingerprint=f"{int(own, 16) ^ (2**256 - 1):064x}")
    with pytest.raises(ValueError, match="trained on encoder other, whose weights are not those"):
        check_selector(generator.model, selector)
    for layer in ("merged", 1):
        other = FeatureSelector(16, (4, 4), layers=1, heads=2, layer=layer, encoder="other")
        with pytest.raises(ValueError, match=f"layer {layer} of encoder other, features of width 16; .* 32"):
            check_selector(generator.model, other)


@torch.inference_mode()
def test_a_selector_may_read_patches_of_a_layer(generator):
    """Averaged over those of a token: one feature for each, which are not the merged ones."""
    merged, states = (
        generator.source.prepare([["a"]], ["w10"], layer=layer).encoded.value("features_BND")
        for layer in ("merged", 1)
    )
    for one, other in zip(merged, states, strict=True):
        assert one.shape == other.shape and not torch.equal(one, other)


@pytest.mark.parametrize("wrap", [as_reducer, lambda selector: MMR(SelectorReducer(selector))])
def test_images_that_were_encoded_at_another_layer_are_refused(generator, wrap):
    """Both widths are 32 here: nothing else would tell."""
    merged, states = (
        wrap(FeatureSelector(32, (4, 4), layers=1, heads=2, layer=layer)) for layer in ("merged", 1)
    )
    assert layer_of(generator.model, merged, Full()) == "merged"
    assert layer_of(generator.model, states, Full()) == 1
    with pytest.raises(ValueError, match=r"^layer: selectors of layers 1, merged read the same images"):
        layer_of(generator.model, merged, states)
    with torch.inference_mode():
        whole = generator.prepare([["d"]], ["w10"]).whole
    with pytest.raises(ValueError, match=r"^layer: the images were encoded at merged, the selector reads 1"):
        whole.choose(states, Policy(0.5))


@torch.inference_mode()
def test_a_selector_chooses_its_own_count_of_each_image(generator):
    torch.manual_seed(0)
    selector = FeatureSelector(32, (4, 4), layers=1, heads=2, layer="merged", initial_bias=0.0)
    torch.nn.init.normal_(selector.trunk.head.weight)
    batch = generator.prepare([["a"], ["b"]], ["w10", "w11"], layer="merged")
    replies = generator.answer(batch, as_reducer(selector), None)
    encoded, layout = batch.whole.encoded, batch.whole.layout
    logits = encoded.map(lambda tiles: selector(tiles.features_BND, tiles.grid)[..., None])
    above = [max(1, int((logits_P1 > 0).sum())) for logits_P1 in layout.values(logits)]
    assert [reply.tokens for reply in replies] == above


@torch.inference_mode()
def test_merged_tokens_take_the_places_of_kept_ones(generator, model_type):
    """Where an image is one tile, and has no further features that merging would leave behind."""
    if model_type in TILED:
        return
    if model_type in SEVERAL_LAYERS:
        with pytest.raises(ValueError, match=r"^reducer average_pooling merges tokens of one layer"):
            generator.reducer("average_pooling", 0, "")
        return
    reducer = generator.reducer("average_pooling", 0, "")
    batch = generator.prepare([["a"], ["b"]], ["w10", "w11"], reducer.needs)
    for reply in generator.answer(batch, reducer, 0.5):
        assert reply.tokens == int(0.5 * reply.tokens_full + 0.5)


def test_a_placeholder_in_a_question_is_refused(generator):
    token = generator.processor.image_token
    with pytest.raises(ValueError, match=r"contains the placeholder"):
        generator.source.prepare([["a"]], [f"w10 {token} w11"])


def test_a_processor_that_needs_torchvision_is_refused_in_one_line(checkpoints, tmp_path):
    checkpoints.write(tmp_path, "mistral3")
    with pytest.raises(ValueError, match=f"^{tmp_path}: its processor lacks a package.*: torchvision$"):
        load_processor(str(tmp_path))


def test_smolvlms_package_for_videos_is_named(checkpoints, tmp_path, monkeypatch):
    checkpoints.write(tmp_path, "smolvlm")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(
        ValueError, match=r"its processor lacks a package that it needs: .*num2words"
    ) as error:
        load_processor(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_processor_of_another_patch_size_is_refused_before_weights_are_read(checkpoints, tmp_path):
    checkpoints.write(tmp_path, "qwen2_5_vl")
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"merge_size": 4}))
    with pytest.raises(ValueError, match=r"3 image placeholders for 12 tokens .*: patch size, merge"):
        load_vlm(str(tmp_path), torch.float32)


def test_a_folder_without_a_processor_is_refused(checkpoints, tmp_path):
    checkpoints.write(tmp_path, "qwen2_5_vl")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}: ") as error:
        load_vlm(str(tmp_path), torch.float32)
    assert "\n" not in str(error.value)
