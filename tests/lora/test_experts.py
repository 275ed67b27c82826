"""Fused experts: the values and gradients of a masked 3-D parameter, and PEFT's traps around it."""

import pytest
import torch
from torch.nn.utils import parametrize

from sparse_ft.errors import UserError
from sparse_ft.lora import LoraSettings, SparseLoRAConfig, apply_sparse_lora, validate_sparsity_preserved
from sparse_ft.lora.experts import ParamWrapper
from sparse_ft.models.names import parameter_masks

SETTINGS = LoraSettings(lora_r=4, lora_alpha=8)


def wrappers(model):
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def test_both_parameters_of_each_block_are_wrapped_once_with_the_doubled_rank_of_the_pair(tiny, make_masks):
    model = apply_sparse_lora(tiny("mixtral"), SETTINGS, "sparse_to_sparse", make_masks(tiny("mixtral")))
    layers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(layers) == 2 * model.config.num_hidden_layers
    assert all(type(layer).__name__ == "ParamWrapper" for layer in layers)  # PEFT compares this string
    ranks = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in wrappers(model).items()}
    assert ranks == {"gate_up_proj": (8, 2.0), "down_proj": (4, 2.0)}


def test_no_router_embedding_or_head_is_trained(tiny, make_masks):
    model = apply_sparse_lora(tiny("mixtral"), SETTINGS, "sparse_to_sparse", make_masks(tiny("mixtral")))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any(part in name for name in trained for part in (".gate.", "embed", "lm_head"))


def test_the_masks_of_single_experts_reach_their_place_in_the_fused_parameter(tiny, make_masks):
    masks = make_masks(tiny("mixtral"))
    model = apply_sparse_lora(tiny("mixtral"), SETTINGS, "sparse_to_sparse", masks)
    plain = model.get_base_model()
    expected = parameter_masks(plain.config.to_dict(), masks)
    for name, layer in wrappers(model).items():  # the last block's
        mask = expected[f"model.layers.1.mlp.experts.{name}"]
        weight = layer.get_param()
        assert torch.equal(weight != 0, mask & (weight != 0)) and not (weight[~mask] != 0).any()
        layer.lora_B["default"].weight.data.normal_()
        effective = layer.effective_weight("default")
        assert torch.equal(effective != 0, mask)


def test_gradients_of_the_experts_factors_equal_autograd_of_the_formula(tiny, make_masks, work):
    """The same loss, with each expert weight replaced by (W + s B A) * M in plain torch."""
    masks = make_masks(tiny("mixtral"))
    model = apply_sparse_lora(tiny("mixtral", torch.float64), SETTINGS, "sparse_to_sparse", masks)
    work.steps(model, 2)
    model.train()
    model(**work.batch(4)).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if ".experts." in name and p.requires_grad}
    model.zero_grad()

    class Formula(torch.nn.Module):
        def __init__(self, layer, mask):
            super().__init__()
            self.held = [(layer, mask)]  # a list, so that torch registers nothing

        def forward(self, weight):
            layer, mask = self.held[0]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a = a.view(layer.num_experts, -1, a.shape[-1])
            delta = torch.einsum("ore,eri->eoi", b.view(b.shape[0], -1, layer.num_experts), a)
            return (weight + layer.scaling["default"] * delta) * mask

    whole = parameter_masks(model.config.to_dict(), masks)
    plain = model.get_base_model()
    for block, decoder in enumerate(plain.model.layers):
        outer = decoder.mlp.experts
        experts = outer.get_base_layer()
        for layer in (outer, outer.base_layer):
            mask = whole[f"model.layers.{block}.mlp.experts.{layer.parameter_name}"]
            parametrize.register_parametrization(experts, layer.parameter_name, Formula(layer, mask))
            layer._active_adapter = []  # ours stands aside
    model(**work.batch(4)).loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if name in ours}
    assert len(ours) == 8
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12)


def test_an_error_inside_the_experts_leaves_no_proxy_behind(tiny, make_masks, work, monkeypatch):
    model = apply_sparse_lora(tiny("mixtral"), SETTINGS, "sparse_to_sparse", make_masks(tiny("mixtral")))
    experts = wrappers(model)["down_proj"].get_base_layer()
    before = work.logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(experts), "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            work.logits(model)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert torch.equal(work.logits(model), before)


def test_wrong_masks_and_second_merges_are_refused(tiny, make_masks):
    masks = make_masks(tiny("mixtral"))
    model = apply_sparse_lora(tiny("mixtral"), SETTINGS, "sparse_to_sparse", masks)
    layer = wrappers(model)["down_proj"]
    with pytest.raises(ValueError, match="another mask"):
        layer.attach_mask(~layer.sparse_mask, layer.noise_name)
    layer.sparse_mask = None
    with pytest.raises(UserError, match="no mask"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_a_config_of_peft_alone_also_reaches_the_experts(tiny, make_masks, work):
    masks = make_masks(tiny("mixtral"))
    config = SparseLoRAConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[])
    model = apply_sparse_lora(tiny("mixtral"), config, "sparse_to_sparse", masks)
    assert config.mask_checksum == masks.checksum
    assert set(wrappers(model)) == {"gate_up_proj", "down_proj"}
    work.steps(model)
    assert validate_sparsity_preserved(model, masks) == {}
