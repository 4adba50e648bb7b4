"""FrugalPath: reinforcement learning for pathology vision-language models that spend few visual tokens."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():  # not installed from a wheel: the packages stand beside this folder
    __path__.append(str(_checkout))
