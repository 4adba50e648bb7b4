"""Messages about what is not installed."""

from __future__ import annotations

import sys

import pytest

from frugalpath.envs.pyramid import write_pyramid
from frugalpath.errors import InputError
from frugalpath.rewards.text import bleu4_score


def test_packages_of_an_extra_are_named_when_they_are_missing(monkeypatch, tmp_path):
    for name in ("imagecodecs", "tifffile", "nltk", "nltk.translate", "nltk.translate.bleu_score"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    with pytest.raises(InputError, match=r"needs the package imagecodecs: pip install 'frugalpath\[simulator\]'"):
        write_pyramid(tmp_path / "x.tif", lambda *a: None, width=8, height=8, mpp=1.0)
    with pytest.raises(InputError, match=r"bleu4.* needs the package nltk.*frugalpath\[text\]"):
        bleu4_score("one lymph node", "two lymph nodes")
