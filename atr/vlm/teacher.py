"""The teacher of a distillation: the frozen model's greedy answers with all visual tokens, asked for once.

Answers and their log probabilities lie in files of a few images each, because with a large vocabulary they
would not fit in memory. Shapes: U images of a batch, B prompts of all of them, V words of the vocabulary.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from atr.core.files import whole_file
from atr.reduction.checkpoints import Checkpoints
from atr.vlm.prefix import PADDING, PrefixCache, SplitPrompts
from atr.vlm.prompted import Answers, PromptedBatch, PromptedImage, PromptReader
from atr.vlm.reduce import pad_id

IMAGES_PER_FILE = 32
"""Images that are answered together and lie in one file."""
_KEYS = "ids", "lengths", "log_probabilities"
_SUFFIX = ".answers"


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
    model, settings = reader.generator.model, reader.generator.settings
    prompted = reader.read(batch)
    split = _split(model, prompted)
    rows = split.prefix_B, split.branch_B
    cache, _ = PrefixCache.prefill(model, split.prefixes)
    logits_UXV = cache.extend(*split.pack(), keep=int(split.branch_B.max()) + 1)
    place_B = split.suffixes["position_ids"][:, -1]
    running_B = torch.ones_like(place_B, dtype=torch.bool)
    ids, log_probabilities, lengths_B = [], [], torch.zeros_like(place_B)
    for step in range(settings.max_new_tokens):
        log_probabilities_BV = logits_UXV[rows].float().log_softmax(-1)
        ids_B = log_probabilities_BV.argmax(-1)
        ids.append(ids_B)
        log_probabilities.append(log_probabilities_BV)
        lengths_B += running_B
        running_B = running_B & ~torch.isin(ids_B, _end_ids(model))
        if step == settings.max_new_tokens - 1 or not running_B.any():
            break
        place_B = place_B + 1
        branch_B = split.branch_B.where(running_B, PADDING)
        given = ((ids_B, 0), (place_B, 0), (branch_B, PADDING))
        logits_UXV = cache.extend(*(split.spread(values_B, fill) for values_B, fill in given))
    found = zip(torch.stack(ids, 1), torch.stack(log_probabilities, 1), lengths_B.tolist(), strict=True)
    cut = iter([(ids_A[:length], values_AV[:length]) for ids_A, values_AV, length in found])
    parts = ([next(cut) for _ in prompts] for prompts in prompted.prompts)
    return [
        Answers([ids_A for ids_A, _ in part], torch.cat([values for _, values in part])) for part in parts
    ]


def _split(model: Any, prompted: PromptedBatch) -> SplitPrompts:
    """All prompts of a batch, behind the prefixes with all visual tokens."""
    prefixes: dict[str, Any] = _padded(prompted.prefixes, [0] * len(prompted.prefixes), pad_id(model))
    tokens = [prompted.prepared.tokens[image] for image in prompted.prepared.image_of]
    prefixes["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
    pairs = [(image, branch) for image, part in enumerate(prompted.prompts) for branch in range(len(part))]
    suffixes = [prompted.prompts[image][branch] for image, branch in pairs]
    starts = [len(prompted.prefixes[image]) for image, _ in pairs]
    image_B, branch_B = torch.tensor(pairs, device=suffixes[0].device).unbind(1)
    return SplitPrompts(prefixes, _padded(suffixes, starts, pad_id(model)), image_B, branch_B)


def _padded(rows: Sequence[Tensor], starts: Sequence[int], fill: int) -> dict[str, Tensor]:
    """Left-padded ids, with positions that begin at `starts`."""

    def pad(values: Sequence[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(list(values), batch_first=True, padding_value=value, padding_side="left")

    positions = [
        start + torch.arange(len(row), device=row.device) for start, row in zip(starts, rows, strict=True)
    ]
    return {
        "input_ids": pad(rows, fill),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "position_ids": pad(positions),
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
        self.folder = folder
        self._places = {images[index][0]: divmod(index, IMAGES_PER_FILE) for index in range(len(images))}
        self._count = -(-len(images) // IMAGES_PER_FILE)

    def __getitem__(self, name: str) -> Answers:
        """The answers to the prompts of an image, on the CPU."""
        number, place = self._places[name]
        with safe_open(self._path(number), framework="pt") as file:
            ids_A, counts_B, log_probabilities_AV = (file.get_tensor(f"{key}.{place}") for key in _KEYS)
        return Answers(list(ids_A.split(counts_B.tolist())), log_probabilities_AV)

    def missing(self) -> list[int]:
        """Numbers of the files that are not written yet."""
        return [number for number in range(self._count) if not self._path(number).is_file()]

    def write(self, number: int, answers: Sequence[Answers]) -> None:
        """Write the answers of a file's images, whole or not at all."""
        tensors = {}
        for place, of_image in enumerate(answers):
            counts_B = torch.tensor([len(ids_A) for ids_A in of_image.ids])
            values = torch.cat(of_image.ids), counts_B, of_image.log_probabilities_AV
            tensors |= {f"{key}.{place}": value.cpu() for key, value in zip(_KEYS, values, strict=True)}
        with whole_file(self._path(number)) as temporary:
            save_file(tensors, temporary)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


class AskTeacher(Callback):
    """Before the first step has the teacher answer all prompts, and removes the answers after the last one.

    The images of a file are the same in every run, so that an interrupted training goes on with the same
    answers. Ranks answer a share each and read those of all.
    """

    def __init__(self, reader: PromptReader, images: PromptedImages, checkpoints: Checkpoints) -> None:
        self.reader, self.images, self.checkpoints = reader, images, checkpoints

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the answers that are missing, and hand all of them to the module.

        Raises SIGTERMException, as Lightning does between two steps.
        """
        folder = self.checkpoints.path(trainer).with_suffix(_SUFFIX)
        folder.mkdir(parents=True, exist_ok=True)
        stored = StoredAnswers(folder, self.images)
        for number in stored.missing()[trainer.global_rank :: trainer.world_size]:
            if trainer.received_sigterm:
                raise SIGTERMException
            first = number * IMAGES_PER_FILE
            batch = [self.images[i] for i in range(first, min(first + IMAGES_PER_FILE, len(self.images)))]
            with trainer.precision_plugin.forward_context():
                stored.write(number, answer(self.reader, batch))
        trainer.strategy.barrier("answers")
        module.answers = stored

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove the answers, and those of trainings that were given up."""
        for folder in self.checkpoints.folder.glob(f"*{_SUFFIX}") if trainer.is_global_zero else ():
            shutil.rmtree(folder)
