"""Short runs whose completions vLLM writes. A process each, since an engine stays in its process.

    python tests/rl/vllm_worker.py '{"mode": "colocate", "rows": "mixed"}'

Prints the logs of its steps as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB

import torch
from trl.generation.vllm_client import VLLMClient

from frugalpath.rl.trainer import GroupTrainer
from frugalpath.rl.vllm_rollouts import VLLMRollouts
from tests.rl.qwen import TEXT, make_model, make_processor, make_trainer, steps

PORT = 8437
WIDTH = 64
"""Of the language model: kernels of vLLM take heads of 32 and more."""


def exact() -> None:
    """Have vLLM compute in float32, and take new weights on a CPU."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32")
    if not torch.cuda.is_available():
        import vllm._custom_ops

        # It would pack the weights, forget those that came, and have nowhere to load others.
        vllm._custom_ops._supports_onednn = False


class Watched(GroupTrainer):
    """Asserts what the steps do not log."""

    def _generate_single_turn(self, *args: Any) -> tuple[list, Any]:
        completions, logps = super()._generate_single_turn(*args)
        token = self.processing_class.image_token_id
        assert not any(token in ids for ids in completions), "an image token has no image"
        assert len({tuple(ids) for ids in completions}) > len(completions) // 2, "they are samples"
        return completions, logps


@contextmanager
def served(folder: str, port: int) -> Iterator[str]:
    """Address of a server of the checkpoint, started as docs/training.md says.

    By its module, since the command `vllm` does not find the package under the name of its CPU build.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    command += ["--enable-scale-out", "--weight-transfer-config", '{"backend": "nccl"}']
    server = subprocess.Popen(command, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, stdout=sys.stderr)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def main(mode: str, rows: str, freeze: bool = True, reset: bool = True) -> list[dict[str, float]]:
    """Three steps in which all weights move, those of the vision tower too unless it is frozen.

    Without a GPU they stay, where a server writes: TRL hands them over by NCCL alone.

    Args:
        reset: False leaves out the reset of the encoder cache.
    """
    TEXT["hidden_size"] = WIDTH
    moves = mode == "colocate" or torch.cuda.is_available()
    if not reset:
        VLLMRollouts.sync_weights = lambda self: self.stock.sync_weights()
    if not moves:
        VLLMClient.init_communicator = VLLMClient.update_named_params = lambda *args, **kwargs: None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        processor = make_processor()
        processor.save_pretrained(folder)
        url = None
        if mode == "server":
            make_model(processor).save_pretrained(folder)
            url = stack.enter_context(served(folder, PORT))
        trainer = make_trainer(
            Watched,
            folder,
            use_vllm=True,
            vllm_mode=mode,
            vllm_server_base_url=url,
            vllm_max_model_length=512,
            beta=0.01,  # so that the model comes from the folder
            rows=rows,
            freeze=freeze,
            max_completion_length=24,
            max_steps=3,
            learning_rate=1e-2 if moves else 0.0,
        )
        trainer.train()
        return steps(trainer)


if __name__ == "__main__":
    exact()
    print("LOGS " + json.dumps(main(**json.loads(sys.argv[1]))))
