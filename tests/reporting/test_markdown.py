import re

from atr.reporting import markdown


def test_every_picture_that_the_file_shows_lies_beside_it(built):
    shown = re.findall(r"!\[[^]]*\]\((.*?)\)", markdown.render_markdown(built))
    written = {f"figures/{picture.name}.png" for picture in built.pictures}
    # The groups are shown as one picture of two panels, which are also files of their own.
    alone = {f"figures/{picture.name}.png" for picture in built.groups}
    assert set(shown) == written - alone
    assert len(shown) == len(set(shown))


def test_it_holds_headlines_and_tables(built):
    text = markdown.render_markdown(built)
    assert all(f"- {sentence}" in text for sentence in built.headlines)
    assert text.count("\n| --- |") == len(built.scores) + len(built.differences.tables) + 4
    assert all(f"- {sentence}" in text for sentence in built.differences.sentences)


def test_it_holds_all_sections_if_everything_was_measured(everything):
    text = markdown.render_markdown(everything)
    assert text.count("\n| --- |") == len(everything.scores) + len(everything.differences.tables) + 12
    assert all(f"![{name}](figures/{name}.png)" in text for name in ("overlap", "robustness"))
    headings = [line for line in text.split("\n") if line.startswith("## ")]
    assert headings == [
        "## Groups", "## Differences", "## Benchmarks", "## Kept patches", "## Answers", "## Scores",
        "## Without a language model", "## Latency", "## Robustness to deployment", "## Encoder",
        "## Pretraining", "## Provenance",
    ]  # fmt: skip
