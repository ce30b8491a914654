"""Training targets of a lesson: the answers' tokens, and the content of each image patch.

Shapes: B lessons, L text tokens, N patches in raster order.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atr.micro.drawing import Sample
from atr.micro.model import PATCH

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BLANK, OTHER = 0, 1
"""Classes of no character, and of a character not in CHARACTERS, whose classes start at 2."""
DIGITS, LONGEST_NUMBER = "0123456789", 4
IGNORE = -100
TURN_TOKENS = 36
"""Maximum number of text tokens of a lesson: six lines of a page with four digits each."""

LessonInput = tuple[Tensor, Sample]
"""An image as uint8 (H, W, 3) or its stored features (N, D), and its lesson."""


class Collator:
    """Collates lessons into a batch of inputs, text tokens with labels, and patch targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int, length: int) -> None:
        """`image_size` is the tower's, in pixels; lessons may have another. `length` is L."""
        self.tokenizer, self.length, self.grid = tokenizer, length, image_size // PATCH

    def __call__(self, batch: Sequence[LessonInput]) -> dict[str, Tensor]:
        """`inputs` (B, ...), `text`, `labels` (B, L), `characters`, `names` (B, N, 2), `digits` (B, N, 4)."""
        lessons = [lesson for _, lesson in batch]
        text_BL = torch.full((len(lessons), self.length), self.tokenizer.pad_token_id)
        labels_BL = torch.full_like(text_BL, IGNORE)
        for row, lesson in enumerate(lessons):
            ids, labels = self._tokenize(lesson)
            text_BL[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            labels_BL[row, : len(ids)] = torch.tensor(labels, dtype=torch.int64)
        return {
            "inputs": torch.stack([image for image, _ in batch]),
            "text": text_BL,
            "labels": labels_BL,
            "characters": torch.stack([self.label_characters(lesson) for lesson in lessons]),
            "names": torch.stack([self.label_names(lesson) for lesson in lessons]),
            "digits": torch.stack([self.label_digits(lesson) for lesson in lessons]),
        }

    def _tokenize(self, lesson: Sample) -> tuple[list[int], list[int]]:
        """Token ids of all turns, and their labels: IGNORE for questions."""
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in lesson.turns:
            question_ids = self.tokenizer(question, add_special_tokens=False).input_ids
            answer_ids = self.tokenizer(answer, add_special_tokens=False).input_ids
            answer_ids = [*answer_ids, self.tokenizer.eos_token_id]
            ids += question_ids + answer_ids
            labels += [IGNORE] * len(question_ids) + answer_ids
        assert len(ids) <= self.length, f"{len(ids)} tokens of turns, room for {self.length}"
        return ids, labels

    def label_characters(self, lesson: Sample) -> Tensor:
        """Classes of the first two characters, from the left, whose centres lie in each patch: (N, 2)."""
        classes_N2 = torch.full((self.grid * self.grid, 2), BLANK)
        for patch, character, _ in self._locate_characters(lesson):
            slot = int((classes_N2[patch] != BLANK).sum())
            if slot < 2:
                known = character in CHARACTERS
                classes_N2[patch, slot] = 2 + CHARACTERS.index(character) if known else OTHER
        return classes_N2

    def label_names(self, lesson: Sample) -> Tensor:
        """Token ids (N, 2) of the two names of each patch's content.

        Text takes precedence over regions; a patch with neither gets padding.
        """
        names_N2 = torch.full((self.grid, self.grid, 2), self.tokenizer.pad_token_id)
        patch_size = self._patch_size(lesson)
        for names, (left, top, right, bottom) in lesson.regions:
            # A patch belongs to the region that contains its centre.
            columns = slice(round(left / patch_size), round(right / patch_size))
            rows = slice(round(top / patch_size), round(bottom / patch_size))
            names_N2[rows, columns] = self._encode_names(names)
        names_N2 = names_N2.flatten(0, 1)
        for patch, _, names in self._locate_characters(lesson):
            names_N2[patch] = self._encode_names(names)
        return names_N2

    def label_digits(self, lesson: Sample) -> Tensor:
        """For each patch of text, the digits with its question up to the patch, in raster order: (N, 4).

        Digit d has class 1 + d and a missing digit class 0; patches without text are IGNORE.
        """
        classes_N4 = torch.full((self.grid * self.grid, LONGEST_NUMBER), IGNORE)
        numbers: dict[str, str] = defaultdict(str)
        for patch, character, (question, _) in sorted(self._locate_characters(lesson), key=lambda c: c[0]):
            if character in DIGITS:
                numbers[question] += character
            classes = [1 + DIGITS.index(digit) for digit in numbers[question][:LONGEST_NUMBER]]
            classes_N4[patch] = torch.tensor(classes + [0] * (LONGEST_NUMBER - len(classes)))
        return classes_N4

    def _encode_names(self, names: tuple[str, str]) -> Tensor:
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(names)))

    def _locate_characters(self, lesson: Sample) -> Iterator[tuple[int, str, tuple[str, str]]]:
        """Patch, character and names of each character inside the image, from left to right."""
        patch_size = self._patch_size(lesson)
        for character, x, y, names in sorted(lesson.characters, key=lambda written: written[1]):
            row, column = int(y // patch_size), int(x // patch_size)
            if 0 <= row < self.grid and 0 <= column < self.grid:
                yield row * self.grid + column, character, names

    def _patch_size(self, lesson: Sample) -> float:
        """Side of a patch in pixels of the lesson's image, before it is resized to the tower's size."""
        return lesson.image.width / self.grid
