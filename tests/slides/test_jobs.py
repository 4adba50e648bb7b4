"""Which slides are found in folders and manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from frugalpath.errors import InputError
from frugalpath.slides.jobs import SlideJob, as_jobs, find_jobs, stain_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "b.tif", "sub/a.svs", "sub/c.NDPI", "notes.txt", "._a.svs", "table.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder(folder):
    assert [job.id for job in find_jobs(folder)] == ["a", "b", "sub/a", "sub/c"]


def test_one_slide(folder):
    assert find_jobs(folder / "b.tif") == [SlideJob(folder / "b.tif", "b")]


def test_a_folder_with_a_manifest(folder):
    (folder / "slides.csv").write_text("file,case,stain,mpp\nb.tif,P1,H&E,0.5\nabsent.svs,P2,IHC,\n")
    jobs = {job.id: job for job in find_jobs(folder)}
    assert jobs["b"] == SlideJob(folder / "b.tif", "b", "P1", "H&E", 0.5)
    assert jobs["a"].case == ""
    assert jobs["absent"].stain == "IHC"  # listed, so that it is reported


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_manifests(folder, kind):
    rows = [
        {"slide": "sub/a.svs", "case": "007", "stain": "HE", "mpp": 0.25},
        {"slide": str(folder / "b.tif"), "case": "8", "stain": "", "mpp": None},
    ]
    path = folder / f"m.{kind}"
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    first, second = find_jobs(path)
    assert first == SlideJob(folder / "sub/a.svs", "sub/a", "007", "HE", 0.25)
    assert second == SlideJob(folder / "b.tif", "b", "8")


def test_all_problems_of_a_manifest_at_once(folder):
    path = folder / "m.csv"
    path.write_text("file,mpp\na.svs,abc\nb.tif,72\n,1\n../secret.svs,\n")
    with pytest.raises(InputError) as caught:
        find_jobs(path)
    text = str(caught.value)
    for part in (
        "row 1: mpp 'abc'",
        "row 2: mpp 72 is outside",
        "row 3: file is empty",
        "row 4: ../secret.svs leaves",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na.svs\n", "no column `file`"),
        ("file\na.svs\na.svs\n", "id a belongs to"),
        ("", "cannot be read as csv"),
    ],
)
def test_bad_manifests(folder, text, message):
    (folder / "m.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        find_jobs(folder / "m.csv")


def test_one_id_twice(tmp_path):
    for name in ("a.svs", "a.tif"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"a\.svs.*a\.tif.*column id"):
        find_jobs(tmp_path)
    with pytest.raises(InputError, match="id a belongs"):
        as_jobs([tmp_path / "a.svs", "elsewhere/a.svs"])
    with pytest.raises(InputError, match="leaves the output folder"):
        as_jobs([SlideJob(tmp_path / "a.svs", "../a")])


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no slides there"):
        find_jobs(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        find_jobs(tmp_path / "absent")


def test_spellings_of_a_stain():
    assert {
        stain_key(name) for name in ("H&E", "HE", "h & e", "H/E", "Hematoxylin and Eosin", "haematoxylin-eosin")
    } == {"he"}
    assert stain_key("CK7-p40") == stain_key("ck7 P40") != "he"
