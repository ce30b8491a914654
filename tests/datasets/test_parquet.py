import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atr.datasets import parquet


def test_rows_of_all_files_in_order_with_images_unread(hub, repository):
    paths = parquet.find(str(repository), "lmms-lab/textvqa", "data/validation-*.parquet")
    assert [path.name for path in paths] == [f"validation-0000{n}-of-00002.parquet" for n in range(2)]
    rows = list(parquet.rows(paths))
    own = hub.DATASETS["textvqa"][2]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in own]
    assert rows[0]["answers"] == own[0]["answers"]
    for number in (4, 0, 3, 1, 2):  # in any order, over files and row groups
        assert rows[number]["image"].read() == hub.png(number)
    assert pickle.loads(pickle.dumps(rows[3]["image"])).read() == hub.png(3)


def test_images_may_be_bytes_alone(hub, repository):
    rows = list(parquet.rows(parquet.find(str(repository), "Lin-Chen/MMStar", "mmstar.parquet")))
    assert [row["image"].read() for row in rows] == [hub.png(80 + n) for n in range(4)]


def test_only_the_columns_asked_for(repository):
    paths = parquet.find(str(repository), "detection-datasets/coco", "data/train-*.parquet")
    assert {tuple(row) for row in parquet.rows(paths, ("image_id", "image"))} == {("image_id", "image")}
    with pytest.raises(
        ValueError, match=r"train-00000-of-00002.parquet has no column caption, it has image_id"
    ):
        next(parquet.rows(paths, ("caption",)))


def test_rows_are_joined_with_their_images(hub, repository):
    questions, images = (
        parquet.find(str(repository), "lmms-lab/GQA", f"testdev_balanced_{table}/testdev-*.parquet")
        for table in ("instructions", "images")
    )
    rows = list(parquet.joined(parquet.rows(questions), images, "imageId"))
    assert [row["image"].read() for row in rows] == [hub.png(60 + n % 2) for n in range(4)]
    with pytest.raises(ValueError, match="no image has the id 'n9', which a row's imageId names"):
        list(parquet.joined(iter([{"imageId": "n9"}]), images, "imageId"))


@pytest.mark.parametrize(
    "cell", [None, {"bytes": None, "path": "somewhere.png"}, {"bytes": b"", "path": None}]
)
def test_an_empty_cell_is_named(hub, tmp_path, cell):
    [path] = hub.write(tmp_path, "chartqa", [{"question": "?", "image": cell}], files=1)
    [row] = parquet.rows([path])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet row 0 column image holds no image"):
        row["image"].read()


def test_missing_files_are_named(hub, tmp_path):
    with pytest.raises(ValueError, match=r"lmms-lab/ai2d/data/test-\*.parquet: no such parquet files"):
        parquet.find(str(tmp_path), "lmms-lab/ai2d", "data/test-*.parquet")
    hub.write(tmp_path, "ai2d", files=3)[1].unlink()
    with pytest.raises(ValueError, match=r"test-\*.parquet: 2 of 3 files are there"):
        parquet.find(str(tmp_path), "lmms-lab/ai2d", "data/test-*.parquet")


def test_what_is_no_parquet_is_named(hub, tmp_path):
    path = hub.write(tmp_path, "ai2d", files=1)[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet cannot be read as parquet"):
        list(parquet.rows([path]))


def test_a_hub_out_of_reach_says_what_else_to_do():
    with pytest.raises(ValueError, match=r"org/no-such cannot be read from the hub, download it to FOLDER"):
        parquet.find("hub", "org/no-such", "data/test-*.parquet")


def test_the_hubs_files_are_found_where_it_puts_them(hub, tmp_path, monkeypatch):
    asked = {}

    def snapshot(dataset, **options):
        asked.update(options, dataset=dataset)
        hub.write(tmp_path / "cache", "ai2d")
        return str(tmp_path / "cache" / dataset)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for dataset, revision in (("lmms-lab/ai2d", None), ("lmms-lab/ai2d@v2", "v2")):
        assert len(parquet.find("hub", dataset, "data/test-*.parquet")) == 2
        assert asked == {
            "dataset": "lmms-lab/ai2d", "repo_type": "dataset", "revision": revision,
            "allow_patterns": "data/test-*.parquet",
        }  # fmt: skip
    assert len(parquet.find(str(tmp_path / "cache"), "lmms-lab/ai2d@v2", "data/test-*.parquet")) == 2


def test_the_commit_is_that_of_the_hubs_cache(tmp_path, monkeypatch):
    commits = {"main": "1" * 40, "v2": "2" * 40}
    home = tmp_path / "datasets--org--data"
    for revision, commit in commits.items():
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert parquet.commits("hub", ["org/data", "org/data@v2"]) == {
        "org/data": commits["main"], "org/data@v2": commits["v2"],
    }  # fmt: skip
    assert parquet.commits("folder", ["org/data"]) == {}


def test_rows_of_one_group_are_read_together(tmp_path, monkeypatch):
    """A row group of photographs is megabytes: it must not be read once for each of its images."""
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array([bytes([n]) for n in range(64)], pa.binary())})
    pq.write_table(table, path, row_group_size=16)
    cells = [parquet.Cell(path, number, "image") for number in range(64)]
    parquet._cells.cache_clear()
    assert [cell.read() for cell in cells] == [bytes([n]) for n in range(64)]
    assert parquet._cells.cache_info().misses == 4
