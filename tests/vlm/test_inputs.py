import pytest

from atr.vlm.inputs import Prompts


@pytest.mark.parametrize("opening", ["", "<s> "])
def test_a_prompt_has_one_bos_token_from_the_template_or_the_tokenizer(processor, model, opening):
    processor.chat_template = opening + processor.chat_template
    prompts = Prompts(processor)
    assert prompts.text("a b", 2).split()[-4:] == ["<image>", "<image>", "a", "b"]
    tokens = prompts.tokenize([prompts.text("a b", 0), prompts.text("c", 0)], model)
    assert tokens["input_ids"].tolist() == [[1, 5, 6], [0, 1, 7]]
    assert tokens["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert prompts.length("a b") == 3
