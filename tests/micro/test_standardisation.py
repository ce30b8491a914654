import torch

from atr.micro import standardisation
from atr.micro.drawing import SIZE
from atr.micro.model import build_model, build_processor
from atr.micro.standardisation import fold_standardisation, measure_standardisation
from atr.micro.vocabulary import VOCABULARY


class Store:
    """Features of ten images, and the positions that are read."""

    width = 64

    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, position):
        self.read.append(position)
        generator = torch.Generator().manual_seed(position)
        return (10 + 3 * torch.randn(9, self.width, generator=generator)).bfloat16()


def test_statistics_are_those_of_evenly_spaced_images(monkeypatch):
    monkeypatch.setattr(standardisation, "STATISTICS_IMAGES", 5)
    store = Store()
    standardise = measure_standardisation(store)
    assert store.read == [0, 2, 4, 6, 8]
    features = torch.cat([store[position] for position in (0, 2, 4, 6, 8)]).float()
    torch.testing.assert_close(standardise.mean_D, features.mean(0))
    torch.testing.assert_close(standardise.deviation_D, features.std(0, correction=0))


@torch.no_grad()
def test_a_folded_model_takes_raw_features():
    standardise = measure_standardisation(Store())
    model = build_model(build_processor(VOCABULARY, SIZE), SIZE, width=64, layers=1, text_layers=1)
    features = torch.stack([Store()[position] for position in range(3)]).float()
    expected = model.model.multi_modal_projector(standardise(features))
    folded = fold_standardisation(model, standardise, torch.float32)
    torch.testing.assert_close(folded.model.multi_modal_projector(features), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.model.multi_modal_projector(standardise(features)), expected)
