"""Where the scale of a slide comes from, and what is said when it comes from nowhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.slides.scale import MAX_MPP, MIN_MPP, SlideError, find_scale


def properties(mpp=None, power=None, **others) -> dict[str, str]:
    found = dict(others)
    if mpp is not None:
        found |= {"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp)}
    if power is not None:
        found["openslide.objective-power"] = str(power)
    return found


def test_order_of_sources():
    everything = {"manifest_mpp": 0.26, "flag_mpp": 0.27}
    assert find_scale(properties(0.25, 40), **everything).source == "openslide.mpp-x"
    power = find_scale(properties(None, 40), **everything)
    assert (power.mpp, power.source) == (0.25, "openslide.objective-power")
    assert find_scale(properties(), **everything).source == "the manifest's mpp"
    assert find_scale(properties(), flag_mpp=0.27).source == "--slide-mpp"


def test_override_wins_when_asked():
    found = find_scale(properties(0.25), flag_mpp=0.5, override=True)
    assert (found.mpp, found.source) == (0.5, "--slide-mpp")
    assert "openslide.mpp-x 0.25" in found.notes[0]


@given(st.floats(MIN_MPP, MAX_MPP))
def test_any_plausible_mpp_is_taken(mpp):
    assert find_scale(properties(mpp)).mpp == pytest.approx(mpp)


@given(st.one_of(st.floats(max_value=MIN_MPP, exclude_max=True), st.floats(min_value=MAX_MPP, exclude_min=True)))
def test_any_other_counts_as_missing(mpp):
    with pytest.raises(SlideError, match=r"openslide\.mpp-x = .* outside 0\.05 to 20"):
        find_scale(properties(mpp))
    fallback = find_scale(properties(mpp, 20))
    assert fallback.mpp == 0.5
    assert "counted as missing" in fallback.notes[0]


@pytest.mark.parametrize("text", ["nan", "inf", "unknown", ""])
def test_no_number(text):
    with pytest.raises(SlideError, match="outside"):
        find_scale({"openslide.mpp-x": text, "openslide.mpp-y": "0.25"})


def test_the_refusal_tells_what_was_read_and_the_remedy():
    found = properties(**{"tiff.XResolution": "1", "tiff.ResolutionUnit": "none"})
    with pytest.raises(SlideError) as caught:
        find_scale(found)
    message = str(caught.value)
    for part in ("openslide.mpp-x is absent", "tiff.XResolution = 1", "objective-power is absent", "--slide-mpp"):
        assert part in message


def test_axes_that_differ():
    with pytest.raises(SlideError, match="differ by more than 5%"):
        find_scale({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"})
    assert find_scale({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.252"}).mpp == pytest.approx(0.251)


def test_contradictions_are_noted():
    assert not find_scale(properties(0.23, 40), manifest_mpp=0.23).notes
    assert "objective-power 0.25" in find_scale(properties(0.9, 40)).notes[0]
    assert "manifest's mpp 0.5" in find_scale(properties(0.25), manifest_mpp=0.5).notes[0]
    assert not find_scale(properties(0.25), flag_mpp=2.0).notes  # meant for other slides


@pytest.mark.parametrize("power", ["0", "-40", "1000", "x"])
def test_odd_objective_powers(power):
    with pytest.raises(SlideError, match="not a valid magnification"):
        find_scale(properties(power=power))
