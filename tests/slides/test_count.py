"""The count of tiles is that of an extraction, and names what it could not count."""

import json

import pytest

from frugalpath.errors import InputError
from frugalpath.slides.count import Setting, count_tiles, main, parse_setting
from frugalpath.slides.extraction import extract_slides
from frugalpath.slides.jobs import SlideJob
from frugalpath.slides.options import ExtractOptions


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["count", *map(str, words)])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("mpp", "tile_px"), [(1.0, 64), (2.0, 128), (4.0, 32)])
def test_the_count_is_that_of_an_extraction(make_slide, encoder, tmp_path, mpp, tile_px):
    slide = make_slide()
    options = ExtractOptions(mpp=mpp, tile_px=tile_px, qc=False)
    (status,) = extract_slides([slide], tmp_path / "out", options, encoder=encoder)
    found = count_tiles(SlideJob(slide), [Setting(mpp, tile_px)], options)
    assert found["tiles"] == {f"{mpp:g}:{tile_px}": status.tissue_tiles}
    assert 0 < found["area"][f"{mpp:g}:{tile_px}"] <= status.tissue_tiles + 1
    assert (found["mpp"], found["upsampled"]) == (1.0, [])


def test_tiles_of_an_eighth_of_the_side_are_64_times_as_many(make_slide, monkeypatch, capsys):
    slide = make_slide(height=2600, width=3000)
    # Half of a tile: what tiles at the edge of the tissue gain and lose is even.
    words = ("--slides", slide, "--setting", "1.0:256", "--setting", "1.0:32", "--min-tissue", 0.5)
    counted = run(monkeypatch, capsys, *words)
    assert counted["ratio"] == pytest.approx(64, rel=0.1)
    assert counted["area_ratio"] == pytest.approx(64, rel=0.02)
    assert counted["slides"]["slide"]["ratio"] == counted["ratio"]
    assert counted["total"] == counted["slides"]["slide"]["tiles"]


def test_a_setting_finer_than_the_slide_is_counted_and_said(make_slide, monkeypatch, capsys):
    slide = make_slide()
    found = run(monkeypatch, capsys, "--slides", slide, "--setting", "0.25:512", "--setting", "1:128")
    assert found["slides"]["slide"]["upsampled"] == ["0.25:512"]
    assert found["slides"]["slide"]["tiles"]["0.25:512"] == found["slides"]["slide"]["tiles"]["1:128"] > 0


def test_slides_that_cannot_be_counted_are_named(make_slide, monkeypatch, capsys):
    folder = make_slide().parent
    make_slide("unknown.tif", mpp=None)
    (folder / "broken.svs").write_bytes(b"no slide")
    counted = run(monkeypatch, capsys, "--slides", folder, "--setting", "2:64")
    assert set(counted["slides"]) == {"slide"} and set(counted["failed"]) == {"broken", "unknown"}
    assert "unknown scale" in counted["failed"]["unknown"]
    monkeypatch.setattr("sys.argv", ["count", "--slides", str(folder / "broken.svs"), "--setting", "2:64"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "none of 1 slides" in told.err and "not a slide" in told.out


@pytest.mark.parametrize("text", ["2", "2:", "x:64", "2:64.5", "99:64", "2:0"])
def test_a_setting_that_is_none(text):
    with pytest.raises(InputError, match=f"--setting {text}: "):
        parse_setting(text)
