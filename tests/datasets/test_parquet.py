import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atr.datasets import parquet


def test_rows_of_all_files_in_order_with_images_unread(hub, repository):
    paths = parquet.find_files(str(repository), "lmms-lab/textvqa", "data/validation-*.parquet")
    assert [path.name for path in paths] == [f"validation-0000{n}-of-00002.parquet" for n in range(2)]
    rows = list(parquet.read_rows(paths))
    own = hub.DATASETS["textvqa"][2]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in own]
    assert rows[0]["answers"] == own[0]["answers"]
    for number in (4, 0, 3, 1, 2):  # in any order, over files and row groups
        assert rows[number]["image"].read() == hub.png(number)
    assert pickle.loads(pickle.dumps(rows[3]["image"])).read() == hub.png(3)


def test_images_may_be_bytes_alone(hub, repository):
    rows = list(parquet.read_rows(parquet.find_files(str(repository), "Lin-Chen/MMStar", "mmstar.parquet")))
    assert [row["image"].read() for row in rows] == [hub.png(80 + n) for n in range(4)]


def test_only_the_columns_asked_for(repository):
    paths = parquet.find_files(str(repository), "detection-datasets/coco", "data/train-*.parquet")
    assert {tuple(row) for row in parquet.read_rows(paths, ("image_id", "image"))} == {("image_id", "image")}
    with pytest.raises(
        ValueError, match=r"train-00000-of-00002.parquet has no column caption, it has image_id"
    ):
        next(parquet.read_rows(paths, ("caption",)))


def test_rows_are_joined_with_their_images(hub, repository):
    questions, images = (
        parquet.find_files(str(repository), "lmms-lab/GQA", f"testdev_balanced_{table}/testdev-*.parquet")
        for table in ("instructions", "images")
    )
    rows = list(parquet.join_images(parquet.read_rows(questions), images, "imageId"))
    assert [row["image"].read() for row in rows] == [hub.png(60 + n % 2) for n in range(4)]
    with pytest.raises(ValueError, match="no image has the id 'n9', the imageId of a row"):
        list(parquet.join_images(iter([{"imageId": "n9"}]), images, "imageId"))


@pytest.mark.parametrize(
    "cell", [None, {"bytes": None, "path": "somewhere.png"}, {"bytes": b"", "path": None}]
)
def test_an_empty_cell_is_named(hub, tmp_path, cell):
    [path] = hub.write(tmp_path, "chartqa", [{"question": "?", "image": cell}], files=1)
    [row] = parquet.read_rows([path])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet row 0 column image holds no image"):
        row["image"].read()


def test_missing_files_are_named(hub, tmp_path):
    with pytest.raises(ValueError, match=r"lmms-lab/ai2d/data/test-\*.parquet: no such parquet files"):
        parquet.find_files(str(tmp_path), "lmms-lab/ai2d", "data/test-*.parquet")
    hub.write(tmp_path, "ai2d", files=3)[1].unlink()
    with pytest.raises(ValueError, match=r"test-\*.parquet: 2 of 3 files are present"):
        parquet.find_files(str(tmp_path), "lmms-lab/ai2d", "data/test-*.parquet")


def test_what_is_no_parquet_is_named(hub, tmp_path):
    path = hub.write(tmp_path, "ai2d", files=1)[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet cannot be read as parquet"):
        list(parquet.read_rows([path]))


def test_a_hub_out_of_reach_says_what_else_to_do():
    with pytest.raises(ValueError, match=r"org/no-such cannot be read from the hub, download it to FOLDER"):
        parquet.find_files("hub", "org/no-such", "data/test-*.parquet")


def test_the_hubs_files_are_found_where_it_puts_them(hub, tmp_path, monkeypatch):
    asked = {}

    def snapshot(dataset, **options):
        asked.update(options, dataset=dataset)
        hub.write(tmp_path / "cache", "ai2d")
        return str(tmp_path / "cache" / dataset)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for dataset, revision in (("lmms-lab/ai2d", None), ("lmms-lab/ai2d@v2", "v2")):
        assert len(parquet.find_files("hub", dataset, "data/test-*.parquet")) == 2
        assert asked == {
            "dataset": "lmms-lab/ai2d", "repo_type": "dataset", "revision": revision,
            "allow_patterns": "data/test-*.parquet",
        }  # fmt: skip
    assert len(parquet.find_files(str(tmp_path / "cache"), "lmms-lab/ai2d@v2", "data/test-*.parquet")) == 2


def test_the_commit_is_that_of_the_hubs_cache(tmp_path, monkeypatch):
    commits = {"main": "1" * 40, "v2": "2" * 40}
    home = tmp_path / "datasets--org--data"
    for revision, commit in commits.items():
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert parquet.resolve_commits("hub", ["org/data", "org/data@v2"]) == {
        "org/data": commits["main"], "org/data@v2": commits["v2"],
    }  # fmt: skip
    assert parquet.resolve_commits("folder", ["org/data"]) == {}


def test_rows_of_one_group_are_read_together(tmp_path, monkeypatch):
    """A row group of photographs is megabytes: it must not be read once for each of its images."""
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array([bytes([n]) for n in range(64)], pa.binary())})
    pq.write_table(table, path, row_group_size=16)
    cells = [parquet.ImageCell(path, number, "image") for number in range(64)]
    parquet._cells.cache_clear()
    assert [cell.read() for cell in cells] == [bytes([n]) for n in range(64)]
    assert parquet._cells.cache_info().misses == 4


STRUCT = [("bytes", pa.binary()), ("path", pa.string())]
PNG = b"\x89PNG and more"
READ = {
    "binary": pa.array([PNG, None], pa.binary()),
    "large_binary": pa.array([PNG, None], pa.large_binary()),
    "binary_view": pa.array([PNG, None], pa.binary_view()),
    "fixed_size_binary": pa.array([PNG, None], pa.binary(len(PNG))),
    "dictionary": pa.array([PNG, None], pa.binary()).dictionary_encode(),
    "struct": pa.array([{"bytes": PNG, "path": "a.png"}, None], pa.struct(STRUCT)),
    "struct of large": pa.array([{"bytes": PNG}, None], pa.struct([("bytes", pa.large_binary())])),
    "struct of views": pa.array([{"bytes": PNG}, None], pa.struct([("bytes", pa.binary_view())])),
    "struct of fixed": pa.array([{"bytes": PNG}, None], pa.struct([("bytes", pa.binary(len(PNG)))])),
}
REFUSED = {
    "string": pa.array(["a.png"]),
    "dictionary of strings": pa.array(["a.png"]).dictionary_encode(),
    "list of structs": pa.array([[{"bytes": PNG, "path": "a.png"}]], pa.list_(pa.struct(STRUCT))),
    "list of bytes": pa.array([[PNG]], pa.list_(pa.binary())),
    "struct of a path": pa.array([{"path": "a.png"}], pa.struct([("path", pa.string())])),
    "struct of text": pa.array([{"bytes": "a"}], pa.struct([("bytes", pa.string())])),
    "pixels": pa.array([[[0, 255]]], pa.list_(pa.list_(pa.uint8()))),
    "number": pa.array([7]),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("column", ["image", "scan"])
def test_bytes_of_every_kind_are_read(tmp_path, kind, column):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [0, 1], column: READ[kind]}), path)
    one, none = parquet.read_rows([path])
    assert (one["n"], one[column].read()) == (0, PNG)
    with pytest.raises(ValueError, match=rf"a\.parquet row 1 column {column} holds no image"):
        none[column].read()


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("column", ["image", "image_3"])
def test_an_image_column_of_another_kind_is_refused_by_type(tmp_path, kind, column):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [0], column: REFUSED[kind]}), path)
    with pytest.raises(
        ValueError, match=rf"a\.parquet: column {column} is .*, allowed: one image a row"
    ) as caught:
        next(parquet.read_rows([path]))
    assert str(pq.read_schema(path).field(column).type) in str(caught.value)
    assert [row["n"] for row in parquet.read_rows([path], ["n"])] == [0]


def test_other_columns_are_of_any_kind(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"images": REFUSED["list of structs"], "image_id": [7]}), path)
    assert [dict(row) for row in parquet.read_rows([path])] == [
        {"images": [{"bytes": PNG, "path": "a.png"}], "image_id": 7}
    ]


def test_a_column_of_no_type_is_one_of_empty_cells(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image_2": pa.nulls(1)}), path)
    [row] = parquet.read_rows([path])
    with pytest.raises(ValueError, match="row 0 column image_2 holds no image"):
        row["image_2"].read()


def test_a_null_and_a_column_that_is_not_there_are_named_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["what?", None], "hint": pa.nulls(2, pa.string())}), path)
    whole, null = parquet.read_rows([path])
    assert (whole["question"], whole["hint"], whole.get("B")) == ("what?", None, None)
    with pytest.raises(ValueError, match=r"a\.parquet row 1: question is null, allowed: a value"):
        null["question"]
    with pytest.raises(
        ValueError, match=r"a\.parquet row 0: there is no column answer, there are question, hint"
    ):
        whole["answer"]
