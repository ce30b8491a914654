"""What the pages promise exists: links, paths, modules, commands, and tables that follow from code."""

import re
import runpy
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
pages = pytest.mark.parametrize("page", PAGES, ids=IDS)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
FOLDERS = ("atr", "benchmarks", "data", "docs", "experiments", "findings", "tests")
NO_MODULES = {"atr.families"}
"""Names with dots that are no modules: an entry point group."""


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def commands(page):
    """The lines of a page's shell blocks, continued lines joined, comments removed."""
    blocks = [body for language, body in FENCE.findall(page.read_text()) if language in ("", "sh", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if is_command(line)]


def is_command(line):
    return re.match(r"(make|atr|dvc|python|\S*/python|hf|pip|git) ", line.strip()) is not None


def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def dvc_stages():
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def outputs():
    """Paths that stages write, up to the first part that differs between cells."""
    for stage in dvc_stages().values():
        for out in (*stage.get("outs", []), *stage.get("metrics", [])):
            yield (out if isinstance(out, str) else next(iter(out))).partition("${")[0].rstrip("/")


@pages
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


@pages
def test_paths_exist_or_are_written_by_a_stage(page):
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./<>*-]*)`", prose(page))
    known = [*outputs(), "experiments/mlflow.db", "experiments/unfinished", "experiments/unlogged"]
    for path in map(str, paths):
        fixed = re.split(r"[<*]", path)[0].rstrip("/")
        written = any(
            out == fixed or out.startswith(f"{fixed}/") or fixed.startswith(f"{out}/") for out in known
        )
        assert (ROOT / fixed).exists() or written or page.name == "CHANGELOG.md", path


@pages
def test_modules_exist(page):
    for name in re.findall(r"`(?:python -m )?(atr(?:\.\w+)+)(?::\w+)?`", prose(page)):
        assert name in NO_MODULES or page.name == "CHANGELOG.md" or find_spec(name), name


def options_of(command):
    """The key=value settings of a command, of the option -S or --set."""
    settings = [command[place + 1] for place, word in enumerate(command) if word in ("-S", "--set")]
    return dict(setting.split("=", 1) for setting in settings)


@pages
def test_commands_name_what_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    from atr.cli.main import main

    for command in commands(page):
        match command:
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), command
            case ["atr", name, *_]:
                with pytest.raises(SystemExit, match=r"^0$"):
                    main([name, "--help"])
            case ["dvc", "repro", *stages]:
                assert set(stages) <= set(dvc_stages()), command
            case ["dvc", "exp", "run", *_]:
                check_settings(options_of(command), page)
            case [python, "-m", module, *_] if python.endswith("python"):
                assert find_spec(module), command
            case [python, path, *_] if python.endswith("python"):
                assert (ROOT / path).is_file(), command


def check_settings(settings, page):
    """Every key is one of params.yaml; the values are checked where no file of the reader's own is named."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key in settings:
        section, _, name = key.partition(".")
        assert section in params and (not name or name in params[section] or name == "own"), key


@pytest.mark.parametrize(
    "command",
    [command for page in PAGES for command in commands(page) if command[:3] == ["dvc", "exp", "run"]],
    ids=" ".join,
)
def test_experiments_have_values_that_are_accepted(command, tmp_path, monkeypatch):
    from atr import config

    settings = options_of(command)
    if any("own" in key or "my_" in value for key, value in settings.items()):
        pytest.skip("names a file of the reader's own; run with the code of extending.md")
    monkeypatch.chdir(ROOT)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in settings.items():
        section, _, name = key.partition(".")
        holder, name = (params[section], name) if name else (params, section)
        holder[name] = yaml.safe_load(value)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    config.load("evaluate", path)


OVERLAYS = sorted(
    {shlex.join(command[1:]) for page in PAGES for command in commands(page) if command[0] == "atr"}
    - {"plan"}
)


@pytest.mark.parametrize("line", [line for line in OVERLAYS if line.startswith("overlay")])
def test_an_overlay_is_laid_as_printed_and_planned(line, tmp_path, monkeypatch, capsys):
    from atr import config
    from atr.cli import main as command

    for name in ("experiments", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    command.main(shlex.split(line))
    assert "values changed" in capsys.readouterr().out
    flat = config.flat()
    assert flat["trainer.devices"] * flat["pretrain.batch_size"] == 32, (
        "as many images per step as on one GPU"
    )
    command.main(["plan"])
    printed = capsys.readouterr().out
    if line == "overlay experiments/llava-next.yaml":
        page = (ROOT / "docs" / "paper.md").read_text()
        for number in ("118.0 GB", "37,791,745", "118,720", "1,562,418"):
            assert number in page and number in printed, number
    if line == "overlay experiments/qwen2.5-vl.yaml":
        page = (ROOT / "docs" / "qwen.md").read_text()
        for number in ("280.3 GB", "424.0 GB", "698,054", "256 to 2,048", "391 tokens"):
            assert number in page and number in printed, number


def test_costs_of_a_selection_are_those_of_the_table():
    from atr.cli.model_sizes import decoder_of, prefill_saved
    from atr.cli.plan import Autoencoder
    from atr.config.presets import ENCODERS

    rows = re.findall(
        r"^\| (merged|patches)[^|]*\| (\d) \| ([\d.]+) \|(.*)\|$",
        (ROOT / "docs/qwen.md").read_text(),
        flags=re.M,
    )
    assert len(rows) == 5
    for features, layers, ratio, cells in rows:
        told = []
        for name, sizes in (("qwen2.5-vl-7b", (391, 2_048)), ("qwen3-vl-8b", (300, 1_568))):
            preset = ENCODERS[name]
            width = preset.width if features == "merged" else preset.patch_width
            selector = Autoencoder(width, int(layers), round(float(ratio) * width))
            for tokens in sizes:
                saved = prefill_saved(decoder_of(preset.path), tokens, round(tokens / 4))
                told.append(f"{100 * selector.forward_flops(tokens, 1) / saved:.1f}")
        assert [cell.strip() for cell in cells.split("|")] == told


def test_bounds_of_an_image_in_tokens_are_those_of_the_table():
    from atr.cli.image_tokens import TOKEN_SIDES, NativeResolution
    from atr.config.presets import ENCODERS

    rows = re.findall(
        r"^\| (\S+?)(?:'s own)? \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) to ([\d,]+) \| (\d+) \|$",
        (ROOT / "docs/qwen.md").read_text(),
        flags=re.M,
    )
    assert len(rows) == 4
    presets = {"Qwen2.5-VL": "qwen2.5-vl-7b", "Qwen3-VL": "qwen3-vl-8b"}
    for name, *numbers in rows:
        least, most, *told = (int(number.replace(",", "")) for number in numbers)
        if name in presets:
            preset = ENCODERS[presets[name]]
            bounds = preset.min_pixels, preset.max_pixels
        else:
            written = yaml.safe_load((ROOT / "experiments" / name.strip("`")).read_text())
            bounds, preset = (written["min_pixels"], written["max_pixels"]), written
        hub = preset["encoder"] if isinstance(preset, dict) else preset.path.partition("@")[0]
        resolution = NativeResolution(TOKEN_SIDES[hub], *bounds)
        assert bounds == (least, most)
        assert [resolution.fewest, resolution.largest, resolution.tokens(640, 480)] == told


def test_peers_and_trained_reducers_stand_in_the_tables():
    from atr.core import catalog

    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (yes|no) \|$", (ROOT / "docs/peers.md").read_text(), flags=re.MULTILINE
    )
    reducers = [*catalog.names(catalog.PEERS), *catalog.names(catalog.TRAINED)]
    assert dict(rows) == {name: "no" if catalog.reducer_traits(name).one_tile else "yes" for name in reducers}
    assert len(rows) == len(reducers), "each once"


def test_benchmarks_of_the_hub_stand_in_the_table():
    from atr.core import catalog

    rows = re.findall(
        r"^\| (text|general) \| (\w+) \| [\d,]+ ", (ROOT / "docs/paper.md").read_text(), flags=re.MULTILINE
    )
    overlays = ("llava-next", "qwen2.5-vl", "qwen3-vl")
    papers, *others = (
        yaml.safe_load((ROOT / f"experiments/{name}.yaml").read_text())["prepare"]["benchmarks"]
        for name in overlays
    )
    assert [name for _, name in rows if name != "ocrbench"] == papers
    assert all([name for _, name in rows] == benchmarks for benchmarks in others)
    for group, name in rows:
        assert catalog.constants(catalog.BENCHMARKS / f"{name}.py")["GROUP"] == group


def test_encoders_and_models_of_the_presets_stand_in_the_table():
    presets = ROOT / "atr/config/presets"
    page = (ROOT / "docs/pipeline.md").read_text()
    for folder in ("encoders", "vlms"):
        names = [path.stem for path in (presets / folder).glob("*.yaml")]
        assert names and all(f"`{name}`" in page for name in names)


@pytest.mark.parametrize(("table", "label"), [("micro", "micro"), ("dinov2-small", "dinov2-small")])
def test_counts_of_wins_are_those_of_the_tables(table, label):
    """docs/distilled.md counts what docs/tables lists."""
    rows = {
        (encoder, group): [cell.strip() for cell in cells.split("|")]
        for encoder, group, cells in re.findall(
            r"^\| ([\w-]+), (text|general) \| win / tie / loss \|(.*)\|$",
            (ROOT / "docs/distilled.md").read_text(),
            flags=re.MULTILINE,
        )
    }
    listed = (ROOT / "docs/tables" / f"{table}.md").read_text().split("group, distilled against")[1:]
    for group, text in zip(("text", "general"), listed, strict=True):
        outcomes = [line.split("|")[2:-1] for line in text.splitlines() if re.match(r"\| \w+ \|", line)]
        columns = [[cell.strip() for cell in column] for column in zip(*outcomes, strict=True)]
        counts = [
            " / ".join(str(column.count(what)) for what in ("win", "tie", "loss")) for column in columns
        ]
        assert rows[label, group] == counts


def test_the_citation_is_yaml_with_the_version_of_the_package():
    import atr

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == atr.__version__
    assert len(citation["preferred-citation"]["authors"]) == 3


def test_the_picture_of_kept_tokens_shows_what_the_shipped_selectors_keep(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/kept_tokens.py"))
    script["main"](str(tmp_path / "picture.png"))
    picture, grey = Image.open(tmp_path / "picture.png").convert("RGB"), script["GREY"]
    side, line, gap = script["SIDE"], script["LINE"], script["GAP"]
    patch = side // 12
    for column, keep in enumerate(script["COLUMNS"].values()):
        for row in range(len(script["BENCHMARKS"])):
            left, top = column * (side + gap) + patch // 2, line + row * (side + line + gap) + patch // 2
            centres = [
                picture.getpixel((left + x * patch, top + y * patch)) for y in range(12) for x in range(12)
            ]
            assert centres.count(grey) == 144 - round(144 * keep)
    with Image.open(ROOT / "docs/kept-tokens.png") as committed:
        assert committed.size == picture.size
