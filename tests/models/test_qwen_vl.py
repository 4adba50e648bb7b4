from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from frugalpath.models import qwen_vl
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.image_view import ImageView
from frugalpath.models.performer import QwenPerformer
from frugalpath.models.processor import token_types
from frugalpath.models.qwen_vl import QwenProcessor, backbone, freeze_vision
from frugalpath.models.tokenizer import IMAGE_TOKEN
from frugalpath.models.vision_tower import is_frozen
from tests.conftest import noise
from tests.models.conftest import views_of

# Positions.

texts = st.integers(1, 6)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
layouts = st.tuples(st.integers(0, 4), st.lists(st.tuples(grids, texts), max_size=4), st.integers(0, 4))


@pytest.fixture(scope="module")
def plain(make_qwen) -> QwenPerformer:
    """One whose state no test changes."""
    return make_qwen()


def stock_positions(performer, ids: torch.Tensor, views) -> tuple[torch.Tensor, int]:
    """Positions (3, P) and the position after them, by the stock model."""
    typed = token_types(ids, performer.processor.image_token_id)[None]
    grid = torch.tensor([v.grid for v in views]) if views else None
    places, delta = performer.model.model.get_rope_index(ids[None], typed, grid)
    return places[:, 0], int(delta) + len(ids)


@given(layout=layouts)
def test_positions_are_those_of_the_stock_model(plain, layout):
    before, images, after = layout
    ids, views = [7] * before, []
    for (rows, columns), text in images:
        views.append(ImageView("", (1, 2 * rows, 2 * columns), 2, None))
        ids += [plain.processor.image_token_id] * len(views[-1]) + [7] * text
    ids += [8] * (after + (not ids))
    row = torch.tensor(ids)
    ours = plain.processor.sight.positions(row, views)
    expected, following = stock_positions(plain, row, views)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    assert int(ours.max()) + 1 == following or ids[-1] == plain.processor.image_token_id


def test_positions_of_rendered_prompts_are_those_of_the_stock_model(qwen, image_cases):
    for case, budget in zip(image_cases, (16, 12, 8, 10, 5, 12), strict=True):
        prompt = qwen.prompt(case, budget)
        expected, following = stock_positions(qwen, prompt.ids, prompt.views)
        assert torch.equal(prompt.positions, expected)
        assert prompt.next_position == following


def test_two_images_side_by_side_stay_two(qwen, image_cases):
    prompt = qwen.prompt(image_cases[3], 12)
    start, end, image = qwen.processor.tokenizer.convert_tokens_to_ids([*qwen_vl.VISION_MARKS, IMAGE_TOKEN])
    counts = [len(v) for v in prompt.views]
    assert len(counts) == 2 and min(counts) > 1
    marked = [t for n in counts for t in (start, *[image] * n, end)]
    ids = prompt.ids.tolist()
    at = ids.index(start)
    assert ids[at : at + len(marked)] == marked
    assert ids.count(start) == ids.count(end) == 2


# Wrappers, saving.


def test_the_backbone_is_found_within_wrappers(qwen):
    base = qwen.model.model
    wrapped = torch.nn.Module()
    wrapped.module = qwen.model
    adapted = get_peft_model(qwen.model, lora_config(PerformerConfig(family="qwen_vl", lora={"r": 2}), qwen.model))
    around = torch.nn.Module()
    around.module = adapted
    assert all(backbone(m) is base for m in (base, qwen.model, wrapped, adapted, around))


def test_freezing_leaves_the_language_model(make_qwen):
    performer = make_qwen(freeze_vision=False)
    base = performer.model.model
    assert not is_frozen(base.visual)
    freeze_vision(performer.model)
    assert is_frozen(base.visual)
    assert all(p.requires_grad for p in base.language_model.parameters())
    assert performer.model.lm_head.weight.requires_grad


def test_a_saved_performer_answers_alike(qwen, image_cases, tmp_path):
    budgets = (16, 8, 0, 12, 4, 9)
    qwen.processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 10 * 784}
    before = qwen.answer(image_cases, budgets, max_new_tokens=6)
    assert len({a.text for a in before}) > 2
    qwen.save(tmp_path)
    again = QwenPerformer.load(tmp_path, qwen.bank, show_options=False)
    again.model.eval()
    after = again.answer(image_cases, budgets, max_new_tokens=6)
    assert [(a.text, a.visual, a.prompt) for a in after] == [(a.text, a.visual, a.prompt) for a in before]
    assert again.processor.tokenizer.padding_side == "left"
    assert len(again.processor.sight.view(noise(500, 500, 0))) == 9, "the processor's limits were saved"
    assert is_frozen(again.model.model.visual)
    assert not is_frozen(QwenPerformer.load(tmp_path, qwen.bank, frozen=False).model.model.visual)


def test_stock_transformers_reads_a_saved_folder(qwen, image_cases, tmp_path):
    qwen.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = processor(images=[Image.open(image_cases[0].images[0])], return_tensors="pt")
    count = int(image["image_grid_thw"].prod()) // 4
    start, end = qwen_vl.VISION_MARKS
    question = image_cases[0].prompt
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": start + IMAGE_TOKEN * count + end + question}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    typed = token_types(ids["input_ids"], model.config.image_token_id)
    out = model.generate(**ids, **image, mm_token_type_ids=typed, max_new_tokens=6, do_sample=False)
    (ours,) = qwen.answer(image_cases[:1], [16], max_new_tokens=6)
    assert count == ours.visual == 16
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == ours.text


def test_the_processor_types_image_tokens_for_the_stock_forward(qwen, image_cases):
    views = views_of(qwen, image_cases[3], 12)
    messages = qwen.messages(image_cases[3], views)
    out = qwen.processor.apply_chat_template([messages], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert set(out) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    image = qwen.processor.image_token_id
    assert out["mm_token_type_ids"] == [[int(t == image) for t in out["input_ids"][0]]]
    assert sum(out["mm_token_type_ids"][0]) == sum(map(len, views))
    assert out["input_ids"][0] == qwen.prompt(image_cases[3], 24).ids.tolist()


BLOCKED = """
import sys
sys.modules["torchvision"] = None
from frugalpath.models.qwen_vl import QwenProcessor
from tests.conftest import noise
processor = QwenProcessor.load(sys.argv[1])
view = processor.sight.view(noise(112, 84, 0))
out = processor(images=[[view]], text=[processor.image_text], return_tensors="pt")
print(out["image_grid_thw"].tolist(), out["input_ids"].shape[1])
"""


@pytest.mark.slow
def test_images_are_processed_without_torchvision(qwen, tmp_path):
    qwen.save(tmp_path)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", BLOCKED, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[[1, 6, 8]] 14"


def test_an_image_in_a_text_stands_between_marks(qwen):
    again = QwenProcessor(Qwen2VLImageProcessorPil(), qwen.processor.tokenizer)
    assert again.image_token_id == qwen.model.config.image_token_id
    assert again.image_text == "<|vision_start|><|image_pad|><|vision_end|>"
