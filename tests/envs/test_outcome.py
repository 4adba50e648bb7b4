"""What was found out about a manifest is used again as long as nothing has changed, and never after."""

import json
import os
import sqlite3
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from frugalpath.envs import manifest, outcome
from frugalpath.envs.manifest import build
from frugalpath.errors import InputError

CUT = {"val_fraction": 0.2, "test_fraction": 0.2}


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)  # of one size
    return path


def row(i):
    return {
        "id": f"c{i}",
        "patient": f"Anna-{i // 2}",
        "task": "choice",
        "prompt": "Which lesion?",
        "answer": ("adenoma", "carcinoma")[i % 2],
        "options": ["adenoma", "carcinoma"],
        "images": [f"set/{('x', 'y')[i % 2]}/{i}.png"],
        "split": ("train", "val", "test")[i // 4],
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Twelve images, manifests of them, a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "home"
    for i in range(12):
        save(home / row(i)["images"][0], i)
    rows = [row(i) for i in range(12)]
    write_rows(home / "cases.jsonl", rows)
    (home / "cases.json").write_text(json.dumps(rows))
    labels = [(each["images"][0], each["answer"], each["patient"]) for each in rows]
    (home / "labels.csv").write_text("file,label,patient\n" + "".join(",".join(each) + "\n" for each in labels))
    columns = {name: [each[i] for each in labels] for i, name in enumerate(("file", "label", "patient"))}
    pyarrow.parquet.write_table(pyarrow.table(columns), home / "labels.parquet")
    return home


MANIFESTS = {
    "cases.jsonl": {},
    "cases.json": {"limit": 3},
    "labels.csv": {"prompt": "?", **CUT},
    "labels.parquet": {"prompt": "?", "format": "labels", "limit": 2, **CUT},
    "set": {"prompt": "?", "patient_pattern": r"^(\d)", **CUT},
}


@pytest.fixture
def checks(monkeypatch):
    """How often a manifest was checked in full."""
    done = []
    check = manifest._check
    monkeypatch.setattr(manifest, "_check", lambda *args: done.append(1) or check(*args))
    return done


def read(home, name="cases.jsonl", **params):
    return build(path=str(home / name), **MANIFESTS[name] | params)


def anew(home, monkeypatch, name="cases.jsonl", **params):
    """Cases or problems without any cache."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home.parent / f"cache-{os.urandom(4).hex()}"))
        try:
            return read(home, name, **params)
        except InputError as error:
            return error.problems


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_checked_once(home, checks, name):
    first = read(home, name)
    assert len({case.split for case in first}) == 3
    assert read(home, name) == first and len(checks) == 1


def test_copies_left_out_are_left_out_again(home, checks, caplog):
    (home / row(11)["images"][0]).write_bytes((home / row(0)["images"][0]).read_bytes())
    first = read(home, duplicates="drop")
    assert len(first) == 11
    warned = [record.getMessage() for record in caplog.records]
    assert "removed 1 copies" in warned[0]
    assert read(home, duplicates="drop") == first and len(checks) == 1
    assert [record.getMessage() for record in caplog.records] == warned * 2


def test_slides_that_are_lost_are_warned_of_again(home, checks, caplog):
    for name, content in {"a.tif": b"a", "empty.tif": b""}.items():
        (home / name).write_bytes(content)
    rows = [row(i) | {"slides": ["a.tif", "gone.tif", "empty.tif"]} for i in range(4)]
    write_rows(home / "cases.jsonl", rows)
    first = read(home)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert warned.startswith("2 slides are left out, 4 cases")
    assert read(home) == first and len(checks) == 1
    assert [record.getMessage() for record in caplog.records] == [warned, warned]
    (home / "gone.tif").write_bytes(b"found")
    read(home)
    assert len(checks) == 2 and caplog.records[-1].getMessage().startswith("1 slides are left out")


def replace_image(home, monkeypatch):
    os.replace(save(home / "new.png", 99), home / row(3)["images"][0])


def replace_image_with_its_times(home, monkeypatch):
    old, new = home / row(3)["images"][0], save(home / "new.png", 99)
    times = old.stat()
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert new.stat().st_size == times.st_size
    os.replace(new, old)


def copy_of_a_test_image(home, monkeypatch):
    (home / row(3)["images"][0]).write_bytes((home / row(11)["images"][0]).read_bytes())


def remove_image(home, monkeypatch):
    (home / row(3)["images"][0]).unlink()


def break_image(home, monkeypatch):
    path = home / row(3)["images"][0]
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes(len(data) - 60))


def image_becomes_link_to_outside(home, monkeypatch):
    path = home / row(3)["images"][0]
    os.rename(path, home.parent / "moved.png")
    path.symlink_to(home.parent / "moved.png")


def folder_becomes_link_to_outside(home, monkeypatch):
    os.rename(home / "set" / "y", home.parent / "moved")
    (home / "set" / "y").symlink_to(home.parent / "moved")


def edit_row(home, monkeypatch):
    rows = [row(i) for i in range(12)]
    rows[2]["answer"] = "neither"
    write_rows(home / "cases.jsonl", rows)


def edit_row_to_another_patient(home, monkeypatch):
    text = (home / "cases.jsonl").read_text()
    (home / "cases.jsonl").write_text(text.replace("Anna-5", "Anna-0"))


CHANGES = [
    replace_image,
    replace_image_with_its_times,
    copy_of_a_test_image,
    remove_image,
    break_image,
    image_becomes_link_to_outside,
    folder_becomes_link_to_outside,
    edit_row,
    edit_row_to_another_patient,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_any_change_all_is_checked(home, checks, monkeypatch, change):
    first = read(home)
    change(home, monkeypatch)
    expected = anew(home, monkeypatch)
    wrong = change not in (replace_image, replace_image_with_its_times)
    assert (expected != first) == wrong, "the change matters"
    checks.clear()
    for _ in range(2):  # also when the outcome of before is there, and the file has been looked at
        try:
            found = read(home)
        except InputError as error:
            found = error.problems
        assert found == expected
    assert len(checks) == (2 if wrong else 1)


def test_a_link_that_is_turned(home, checks):
    link = home / row(3)["images"][0]
    os.rename(link, home / "first.png")
    link.symlink_to(home / "first.png")
    save(home / "second.png", 50)
    assert read(home)[3].images == (str(home / "first.png"),)
    read(home)
    assert len(checks) == 1
    link.unlink()
    link.symlink_to(home / "second.png")
    assert read(home)[3].images == (str(home / "second.png"),) and len(checks) == 2
    (home / "second.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be decoded"):
        read(home)


@pytest.mark.parametrize(
    "params",
    [
        {"seed": 1},
        {"val_fraction": 0.3},
        {"limit": 2},
        {"only": {"patient": ["Anna-0", "Anna-1", "Anna-2", "Anna-3"]}},
        {"labels": {"carcinoma": "b", "adenoma": "a"}},
        {"question": "lesion"},
        {"max_pixels": 50},
        {"need": ["val"]},
        {"duplicates": "drop"},
        {"allow_outside": True},
    ],
)
def test_another_parameter_is_another_outcome(home, checks, monkeypatch, params):
    read(home, "labels.csv")
    expected = anew(home, monkeypatch, "labels.csv", **params)
    checks.clear()
    try:
        found = read(home, "labels.csv", **params)
    except InputError as error:
        found = error.problems
    assert found == expected and len(checks) == 1


def test_the_order_of_labels_is_kept_apart(home):
    for labels in ({"carcinoma": "b", "adenoma": "a"}, {"adenoma": "a", "carcinoma": "b"}):
        assert {case.options for case in read(home, "labels.csv", labels=labels)} == {tuple(labels.values())}


def test_folders_are_read_anew(home, checks):
    assert len(read(home, "set")) == 12
    save(home / "set/x/12.png", 12)
    assert len(read(home, "set")) == 13 and len(checks) == 2
    (home / "set/z").mkdir()
    save(home / "set/z/13.png", 13)
    assert {case.options for case in read(home, "set")} == {("x", "y", "z")}


def test_a_manifest_written_to_while_it_is_read_is_not_remembered(home, checks, monkeypatch):
    read_rows = manifest.read_rows

    def slow(path, *args):
        found = read_rows(path, *args)
        path.write_text(path.read_text() + "\n")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "read_rows", slow)
        read(home)
        read(home)
    assert len(checks) == 2


def test_problems_are_never_remembered(home, checks):
    remove_image(home, None)
    for _ in range(2):
        with pytest.raises(InputError, match=r"cases.jsonl:4: no file"):
            read(home)
    assert len(checks) == 2


DAMAGE = {
    "cut": lambda value: value[:-9],
    "empty": lambda _: b"",
    "other": lambda value: value[:50] + bytes([value[50] ^ 1]) + value[51:],
    "text": str,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_outcome_is_ignored_with_a_warning(home, checks, caplog, damage):
    first = read(home)
    with sqlite3.connect(home.parent / "cache/frugalpath/contents.sqlite") as cache:
        ((value,),) = cache.execute("SELECT value FROM outcomes").fetchall()
        cache.execute("UPDATE outcomes SET value = ?", (DAMAGE[damage](value),))
    cache.close()
    assert read(home) == first and len(checks) == 2
    assert "damaged" in caplog.text
    caplog.clear()
    assert read(home) == first and len(checks) == 2 and not caplog.records, "it was written again"


def test_a_damaged_cache_costs_only_time(home, checks, caplog):
    first = read(home)
    (home.parent / "cache/frugalpath/contents.sqlite").write_bytes(b"half a database" * 999)
    assert read(home) == first and len(checks) == 2
    assert "everything is checked again" in caplog.text


def test_the_cache_names_nobody(home):
    read(home)
    read(home, "labels.csv")
    read(home, "set")
    content = b"".join(path.read_bytes() for path in (home.parent / "cache").rglob("*") if path.is_file())
    for text in (b"Anna", b"lesion", b"carcinoma", b".png", b"home"):
        assert text not in content


def test_only_the_last_outcomes_are_kept(home, monkeypatch):
    monkeypatch.setattr(outcome, "_KEPT", 2)
    for seed in range(4):
        read(home, seed=seed)
    with sqlite3.connect(home.parent / "cache/frugalpath/contents.sqlite") as cache:
        assert cache.execute("SELECT count(*) FROM outcomes").fetchone() == (2,)
    cache.close()


@pytest.mark.slow
def test_processes_may_read_at_once(home, checks):
    script = f"from frugalpath.envs.manifest import build; print(len(build(path={str(home / 'cases.jsonl')!r})))"
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [process.communicate() for process in running] == [(b"12\n", b"")] * 3
    assert len(read(home)) == 12 and not checks, "one of them has remembered it"


def test_the_limit_of_pixels_holds_for_the_process_again(home, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read(home, max_pixels=10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read(home, max_pixels=10_000)
    assert Image.MAX_IMAGE_PIXELS == 10_000
