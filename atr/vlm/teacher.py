"""The teacher of a distillation: the frozen model's greedy answers with all visual tokens, asked for once.

Answers and their log probabilities lie in files of a few images each, because with a large vocabulary they
would not fit in memory. Shapes: U images of a batch, Q prompts of an image, B prompts of all images, A answer
tokens, V words of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atr.core.files import whole_file
from atr.vlm.prefix import PrefixCache, SplitPrompts
from atr.vlm.prompted import Answers, PromptedBatch, PromptedImage, PromptReader
from atr.vlm.sequence import pad_id

IMAGES_PER_FILE = 32
"""Images that are answered together and lie in one file."""
_KEYS = "ids", "lengths", "log_probabilities"


class PromptedImages(Protocol):
    """A sequence of images with their prompts, such as a list."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> PromptedImage:
        """One image with its prompts."""


@torch.no_grad()
def answer(reader: PromptReader, batch: Sequence[PromptedImage]) -> list[Answers]:
    """The answers of each image with all visual tokens, at most `max_new_tokens` long.

    Images are read once, and their prompts follow over one cache.
    """
    model = reader.generator.model
    prompted = reader.read(batch)
    split = _split(model, prompted)
    cache, _ = PrefixCache.prefill(model, split.prefixes)
    logits_UQV = cache.extend(split.pack(), keep=int(split.branch_B.max()) + 1)
    prompts = _Unfinished(cache, split.prefix_B, split.branch_B, split.suffixes["position_ids"][..., -1])
    log_probabilities_BV = logits_UQV[prompts.row_B, prompts.branch_B].float().log_softmax(-1)
    number_B = torch.arange(len(log_probabilities_BV), device=log_probabilities_BV.device)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in number_B]
    for left in reversed(range(reader.generator.settings.max_new_tokens)):
        ids_B = log_probabilities_BV.argmax(-1)
        for number, pair in zip(
            number_B.tolist(), zip(ids_B, log_probabilities_BV, strict=True), strict=True
        ):
            found[number].append(pair)
        goes_on_B = ~torch.isin(ids_B, _end_ids(model))
        if not left or not goes_on_B.any():
            break
        number_B = number_B[goes_on_B]
        prompts = prompts.select(goes_on_B)
        log_probabilities_BV = prompts.read(ids_B[goes_on_B]).float().log_softmax(-1)
    parts = iter(found)
    return [_joined([next(parts) for _ in prompts]) for prompts in prompted.prompts]


@dataclass(frozen=True)
class _Unfinished:
    """Prompts whose answers have not ended: rows and branches in the cache, positions of the last tokens.

    Positions are (B,) or (axes, B).
    """

    cache: PrefixCache
    row_B: Tensor
    branch_B: Tensor
    position_B: Tensor

    def select(self, stay_B: Tensor) -> Self:
        """Those that stay; the cache keeps the rows that they need."""
        rows_U, row_B = torch.unique(self.row_B[stay_B], return_inverse=True)
        self.cache.select(rows_U)
        return replace(
            self, row_B=row_B, branch_B=self.branch_B[stay_B], position_B=self.position_B[..., stay_B] + 1
        )

    def read(self, ids_B: Tensor) -> Tensor:
        """The logits_BV behind one more token of each."""
        return self.cache.read_next(ids_B, self.position_B, self.row_B, self.branch_B)


def _joined(found: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Answers:
    """Answers from the ids and log probabilities of each token of each."""
    ids = [torch.stack([id_ for id_, _ in tokens]) for tokens in found]
    return Answers(ids, torch.stack([values_V for tokens in found for _, values_V in tokens]))


def _split(model: Any, prompted: PromptedBatch) -> SplitPrompts:
    """All prompts of a batch, behind the prefixes with all visual tokens."""
    fill, prepared = pad_id(model), prompted.prepared
    prefixes: dict[str, Any] = _padded(prompted.prefixes, [at[..., :-1] for at in prompted.positions], fill)
    tokens = prepared.tokens.of(prepared.image_of)
    prefixes["mm_encoder_outputs"] = tokens.keep([torch.arange(len(image)) for image in tokens.images])
    pairs = [(image, branch) for image, part in enumerate(prompted.prompts) for branch in range(len(part))]
    suffixes = [prompted.prompts[image][branch] for image, branch in pairs]
    places = [
        prompted.positions[image][..., -1:] + torch.arange(len(suffix_T), device=suffix_T.device)
        for (image, _), suffix_T in zip(pairs, suffixes, strict=True)
    ]
    behind = _padded(suffixes, places, fill)
    prefixes |= prompted.token_types(prefixes["input_ids"])
    behind |= prompted.token_types(behind["input_ids"])
    image_B, branch_B = torch.tensor(pairs, device=suffixes[0].device).unbind(1)
    return SplitPrompts(prefixes, behind, image_B, branch_B)


def _padded(rows: Sequence[Tensor], places: Sequence[Tensor], fill: int) -> dict[str, Tensor]:
    """Left-padded ids and their position ids, (B, T) or (axes, B, T)."""
    longest = max(map(len, rows))

    def pad(values: Sequence[Tensor], value: int = 0) -> Tensor:
        return torch.stack(
            [F.pad(part, (longest - part.shape[-1], 0), value=value) for part in values], dim=-2
        )

    return {
        "input_ids": pad(rows, fill),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "position_ids": pad(places),
    }


def _end_ids(model: Any) -> Tensor:
    """Ids that end an answer. A placeholder does, as it would stand for one more image in the next input."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return torch.tensor([*(end for end in ends if end is not None), model.config.image_token_id]).to(
        model.device
    )


class StoredAnswers:
    """Answers by the name of their image, read from the files of a folder."""

    def __init__(self, folder: Path, images: PromptedImages) -> None:
        self.folder, self._images = folder, len(images)
        self._places = {images[index][0]: divmod(index, IMAGES_PER_FILE) for index in range(len(images))}

    @property
    def files(self) -> int:
        """Number of files."""
        return -(-self._images // IMAGES_PER_FILE)

    def images_of(self, number: int) -> range:
        """Indices of the images of a file."""
        return range(self._images)[number * IMAGES_PER_FILE : (number + 1) * IMAGES_PER_FILE]

    def has(self, number: int) -> bool:
        """Whether a file is written."""
        return self._path(number).is_file()

    def __getitem__(self, name: str) -> Answers:
        """The answers to the prompts of an image, on the CPU."""
        number, index = self._places[name]
        with safe_open(self._path(number), framework="pt") as file:
            ids_A, counts_B, log_probabilities_AV = (file.get_tensor(f"{key}.{index}") for key in _KEYS)
        return Answers(list(ids_A.split(counts_B.tolist())), log_probabilities_AV)

    def write(self, number: int, answers: Sequence[Answers]) -> None:
        """Write the answers of a file's images, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for index, of_image in enumerate(answers):
            counts_B = torch.tensor([len(ids_A) for ids_A in of_image.ids])
            values = torch.cat(of_image.ids), counts_B, of_image.log_probabilities_AV
            tensors |= {f"{key}.{index}": value.cpu() for key, value in zip(_KEYS, values, strict=True)}
        with whole_file(self._path(number)) as temporary:
            save_file(tensors, temporary)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
