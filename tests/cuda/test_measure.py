"""2:4 masks in torch's semi-structured tensors: a form of its own, where the GPU has them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ft.cell.measure import measure_forms
from sparse_ft.models.loading import load_model, prunable_shapes
from sparse_ft.pruning import MaskGenerator, PruningSettings
from sparse_ft.settings.commands import MeasureSettings


def test_2_of_4_masks_have_a_form_of_half_the_bytes(tmp_path):
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    settings = PruningSettings(method="semi_structured", sparsities=(0.5,))
    masks = MaskGenerator(tmp_path / "model", settings).generate(tmp_path / "masks", figures="none")[0].load()
    quick = MeasureSettings(prompt_tokens=64, new_tokens=4, repeats=1, dtype="bfloat16", device="cuda")
    found = measure_forms(tmp_path / "model", masks, quick, tmp_path / "scratch")
    forms = {form.name: form for form in found.forms}
    assert "semi_structured" in forms, found.absent
    weights = 2 * sum(shape[0] * shape[1] for shape in prunable_shapes(load_model(tmp_path / "model")).values())
    saved = forms["masked"].memory - forms["semi_structured"].memory
    assert 0.3 * weights < saved < 0.5 * weights  # 9/16 of each is left
    assert all(speed.decoding > 0 for speed in forms["semi_structured"].speeds)
