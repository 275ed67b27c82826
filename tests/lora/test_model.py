"""Each mode x mask x precision x architecture through the same checks, with and without checkpointing."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparse_ft.errors import UserError
from sparse_ft.lora import (
    LoraSettings,
    SparseLoRAConfig,
    SparseLoRALayer,
    apply_sparse_lora,
    load_sparse_lora,
    merge_all_lora_weights,
    remask,
    validate_sparsity_preserved,
)
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model, save_model
from sparse_ft.validation import validate_checkpoint

SETTINGS = LoraSettings(lora_r=4, lora_alpha=8)
KINDS = ("llama", "mixtral")  # matrices of their own, and experts in one parameter
DTYPES = (torch.float32, torch.bfloat16)
# Structured masks are trained in a form of their own. What checkpointing runs again is that form or the other one.
MASKS = (
    ("unstructured", None),
    ("unstructured", "reentrant"),
    ("unstructured", "non_reentrant"),
    ("structured", None),
    ("structured", "non_reentrant"),
    ("semi_structured", None),
)


def nonzero_masked(model, masks):
    """Masked weights that are not zero in a checkpoint saved from the model: counted without our own code."""
    state = model.state_dict()
    count = 0
    for name in masks:
        parts = name.split(".")
        if "block_sparse_moe" in name:
            block, expert, matrix = parts[2], int(parts[5]), parts[6]
            fused = "down_proj" if matrix == "w2" else "gate_up_proj"
            weight = state[f"model.layers.{block}.mlp.experts.{fused}"][expert]
            if matrix != "w2":
                weight = weight.chunk(2)[0 if matrix == "w1" else 1]
        else:
            weight = state[name]
        count += int((weight[~masks[name]] != 0).sum())
    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("method", "checkpointing"), MASKS)
@pytest.mark.parametrize("mode", ["sparse_to_dense", "sparse_to_sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_matrix(kind, mode, method, dtype, checkpointing, tiny, make_masks, work, tmp_path):
    """Train, save, reload, merge, count, save merged, validate."""
    base = tiny(kind, dtype)
    masks = make_masks(base, method)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = apply_sparse_lora(base, SETTINGS, mode, masks)
    untrained = work.logits(model)
    if checkpointing:
        model.enable_input_require_grads()
        kwargs = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    losses = work.steps(model)
    model.gradient_checkpointing_disable()
    assert all(torch.isfinite(torch.tensor(losses)))
    trained = work.logits(model)
    assert (trained - untrained).abs().max() > 0.01  # it did train

    model.save_pretrained(tmp_path / "adapter")
    again = load_sparse_lora(tiny(kind, dtype), tmp_path / "adapter", masks)
    assert (work.logits(again.eval()) - trained).abs().max() == 0

    if mode == "sparse_to_sparse":
        assert validate_sparsity_preserved(model, masks) == {}
    merged = merge_all_lora_weights(model)
    assert not isinstance(merged, PeftModel) and not any("lora" in n for n, _ in merged.named_modules())
    assert merge_all_lora_weights(merged) is merged  # idempotent
    difference = (work.logits(merged) - trained).abs()
    changed = [n for n, p in merged.named_parameters() if not torch.equal(p, before[n])]
    assert all("proj" in name for name in changed)  # head, embeddings, norms and router are as they were
    if mode == "sparse_to_dense":
        assert difference.mean() < (1e-5 if dtype == torch.float32 else 0.05)  # rounding; a token may change expert
        assert nonzero_masked(merged, masks) > 0.5 * masks.n_pruned  # the adapter filled the zeros
        assert sum(validate_sparsity_preserved(merged, masks).values()) == nonzero_masked(merged, masks)
        remask(merged, masks)
    else:
        assert difference.max() == 0.0
    assert nonzero_masked(merged, masks) == 0
    save_model(merged, None, tmp_path / "merged")
    folder = tiny.folder(kind)
    result = validate_checkpoint(tmp_path / "merged", masks, base=folder)
    assert result.ok, result.problems
    assert result.sparsity == masks.sparsity
    assert Checkpoint(tmp_path / "merged").names == Checkpoint(folder).names
    reloaded = load_model(tmp_path / "merged", dtype, "cpu")
    if kind == "mixtral" and dtype != torch.float32:
        reloaded.set_experts_implementation("eager")
    assert torch.equal(work.logits(reloaded), work.logits(merged))


@pytest.mark.parametrize("kind", KINDS)
def test_the_modes_compute_their_formulas(kind, tiny, make_masks, work):
    """Against a model whose weights were written by the formula of DESIGN, in float64."""
    masks = make_masks(tiny(kind))
    for mode in ("sparse_to_dense", "sparse_to_sparse"):
        model = apply_sparse_lora(tiny(kind, torch.float64), SETTINGS, mode, masks)
        work.steps(model)
        oracle = tiny(kind, torch.float64)
        apply_masks(oracle, masks)
        whole = tiny(kind, torch.float64)
        whole.requires_grad_(False)
        for parameter in whole.parameters():
            parameter.fill_(1)
        apply_masks(whole, masks)  # the masks, in the shape of the parameters
        kept = dict(whole.named_parameters())
        for path, layer in model.get_base_model().named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            name = path.replace(".base_layer", "") + "." + getattr(layer, "parameter_name", "weight")
            if hasattr(layer, "parameter_name"):  # rows of A: expert by expert; columns of B: rank by rank
                a = a.view(layer.num_experts, -1, a.shape[-1])
                delta = torch.einsum("ore,eri->eoi", b.view(b.shape[0], -1, layer.num_experts), a)
                rank = a.shape[1]
                assert rank == (8 if name.endswith("gate_up_proj") else 4)  # PEFT doubles fused pairs
            else:
                delta, rank = b @ a, 4
            update = (2 * rank if hasattr(layer, "parameter_name") else 8) / rank * delta
            weight = oracle.get_parameter(name)
            weight.data += update * (kept[name] if mode == "sparse_to_sparse" else 1)
        torch.testing.assert_close(work.logits(oracle), work.logits(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_stock_peft(kind, dtype, tiny, work):
    torch.manual_seed(3)
    ours = apply_sparse_lora(tiny(kind, dtype), SETTINGS, "dense")
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets += ["w1", "w2", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    stock = get_peft_model(
        tiny(kind, dtype), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    assert work.steps(ours) == work.steps(stock)
    assert torch.equal(work.logits(ours), work.logits(stock))
    merged = merge_all_lora_weights(ours, rounding="nearest")
    assert torch.equal(work.logits(merged), work.logits(stock.merge_and_unload()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_keeps_everything_is_plain_lora(kind, tiny, make_masks, work):
    from sparse_ft.masks.mask_set import MaskSet

    full = MaskSet.from_bool({n: torch.ones_like(m) for n, m in make_masks(tiny(kind)).items()})
    losses = {}
    for mode, masks in (("dense", None), ("sparse_to_sparse", full), ("sparse_to_dense", full)):
        torch.manual_seed(4)
        losses[mode] = work.steps(apply_sparse_lora(tiny(kind), SETTINGS, mode, masks), lr=1e-3)
    assert losses["sparse_to_dense"] == losses["dense"]
    torch.testing.assert_close(losses["sparse_to_sparse"], losses["dense"], rtol=1e-5, atol=1e-5)


def test_structured_training_takes_the_thin_form_and_evaluation_the_merged_weight(tiny, make_masks, work, monkeypatch):
    """While training no weight is materialised; the gradients are those of the masked weight."""
    masks = make_masks(tiny("llama"), "structured")
    model = apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks)
    work.steps(model)
    model.train()
    model(**work.batch(7)).loss.backward()
    thin = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for layer in model.modules():
        if isinstance(layer, SparseLoRALayer):
            assert layer.mask_out is not None
            layer.mask_out = layer.mask_in = None
    model(**work.batch(7)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(thin[name], parameter.grad, rtol=1e-3, atol=1e-5)

    model = apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks).train()
    monkeypatch.setattr("sparse_ft.lora.layer.masked_linear", None)
    model(**work.batch(7)).loss.backward()  # the general form is not called
    with pytest.raises(TypeError):
        model.eval()(**work.batch(7))


def test_dropout_drops_inputs_of_the_adapter_alone(tiny, make_masks, work):
    settings = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.5)
    for method in ("unstructured", "structured"):
        masks = make_masks(tiny("llama"), method)
        model = apply_sparse_lora(tiny("llama"), settings, "sparse_to_sparse", masks)
        base = work.logits(model)
        model.train()
        assert torch.equal(work.logits(model), base) or method == "structured"  # B = 0: dropout has no effect yet
        torch.testing.assert_close(work.logits(model), base, rtol=1e-4, atol=1e-4)
        work.steps(model)
        trained = work.logits(model)
        model.train()
        assert not torch.equal(work.logits(model), work.logits(model))
        model.eval()
        assert torch.equal(work.logits(merge_all_lora_weights(model)), trained)


def test_peft_alone_refuses_to_load_the_adapter(tiny, make_masks, work, tmp_path):
    """The trap: LORA maps to LoraConfig, unknown fields are dropped with a warning, and it loads as dense LoRA."""
    masks = make_masks(tiny("llama"))
    for mode in ("sparse_to_sparse", "sparse_to_dense"):
        model = apply_sparse_lora(tiny("llama"), SETTINGS, mode, masks)
        work.steps(model, 1)
        model.save_pretrained(tmp_path / mode)
        with pytest.warns(UserWarning, match="mask_checksum"), pytest.raises(ValueError, match=mode):
            PeftModel.from_pretrained(tiny("llama"), tmp_path / mode)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=mode):
            tiny("llama").load_adapter(str(tmp_path / mode))


def test_with_our_config_peft_loads_it_but_it_does_not_run_without_its_mask(tiny, make_masks, work, tmp_path):
    from sparse_ft.lora.model import attach_masks

    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks)
    work.steps(model)
    model.save_pretrained(tmp_path)
    config = SparseLoRAConfig.from_pretrained(tmp_path)
    assert (config.mask_checksum, config.sparse_mode) == (masks.checksum, "sparse_to_sparse")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path, config=config)
    with pytest.raises(UserError, match="no mask"):
        work.logits(again)
    with pytest.raises(UserError, match="no mask"):
        again.merge_and_unload()
    attach_masks(again, masks)
    attach_masks(again, masks)  # again is harmless
    assert torch.equal(work.logits(again), work.logits(model))


def test_wrong_masks_are_refused(tiny, make_masks, work, tmp_path):
    from sparse_ft.lora.model import attach_masks

    masks, other = make_masks(tiny("llama")), make_masks(tiny("llama"), seed=1)
    model = apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="belongs to the masks"):
        load_sparse_lora(tiny("llama"), tmp_path, other)
    with pytest.raises(UserError, match="belongs to the masks"):
        attach_masks(model, other)
    with pytest.raises(ValueError, match="another mask"):
        next(m for m in model.modules() if isinstance(m, SparseLoRALayer)).attach_mask(
            other.packed["model.layers.0.self_attn.q_proj.weight"], "model.layers.0.self_attn.q_proj.weight"
        )
    fresh = tiny("llama")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        apply_sparse_lora(fresh, SETTINGS, "sparse_to_sparse", make_masks(tiny("mistral")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_an_adapter_of_another_kind_or_a_newer_version_is_refused(tiny, make_masks, tmp_path):
    masks = make_masks(tiny("llama"))
    with pytest.raises(UserError, match="holds no adapter"):
        load_sparse_lora(tiny("llama"), tmp_path, masks)
    apply_sparse_lora(tiny("llama"), SETTINGS, "dense").save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="no sparse LoRA"):
        load_sparse_lora(tiny("llama"), tmp_path / "dense", masks)
    apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks).save_pretrained(tmp_path / "sparse")
    path = tmp_path / "sparse" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sparse_blocks": 4}))
    with pytest.raises(UserError, match="sparse_blocks"):
        load_sparse_lora(tiny("llama"), tmp_path / "sparse", masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sparse"}, "mode is 'sparse'"),
        ({"masks": None}, "needs masks"),
        ({"mode": "dense"}, "takes no masks"),
        ({"settings": LoraSettings(target_modules=("q_proj", "gate"))}, "target_modules gate"),
        ({"settings": SparseLoRAConfig(sparse_mode="sparse_to_dense")}, "sparse_to_dense, but mode"),
        ({"settings": SparseLoRAConfig(mask_checksum="0" * 64)}, "belongs to the masks 000000000000"),
    ],
)
def test_wrong_settings_are_one_line_and_leave_the_model_alone(change, message, tiny, make_masks):
    model = tiny("llama")
    arguments = {"settings": SETTINGS, "mode": "sparse_to_sparse", "masks": make_masks(model), **change}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        apply_sparse_lora(model, **arguments)
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_expert_settings_that_cannot_work_are_refused(tiny, make_masks):
    model = tiny("mixtral")
    masks = make_masks(model)
    with pytest.raises(UserError, match="lora_dropout must be 0"):
        apply_sparse_lora(model, LoraSettings(lora_dropout=0.1), "sparse_to_sparse", masks)
    with pytest.raises(UserError, match="w1 and w3 together"):
        apply_sparse_lora(model, LoraSettings(target_modules=("w1", "w2")), "sparse_to_sparse", masks)
    settings = LoraSettings(lora_dropout=0.1, target_modules=("q_proj",))
    model = apply_sparse_lora(model, settings, "sparse_to_sparse", masks)
    with pytest.raises(UserError, match="adapters already"):
        apply_sparse_lora(model, SETTINGS, "sparse_to_sparse", masks)
    with pytest.raises(UserError, match="adapters already"):
        apply_sparse_lora(model.get_base_model(), SETTINGS, "sparse_to_sparse", masks)


def test_projections_without_an_adapter_stay_pruned(tiny, make_masks, work, tmp_path):
    for kind in ("llama", "mixtral"):
        masks = make_masks(tiny(kind))
        settings = LoraSettings(lora_r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
        model = apply_sparse_lora(tiny(kind), settings, "sparse_to_sparse", masks)
        work.steps(model)
        save_model(merge_all_lora_weights(model), None, tmp_path / kind)
        targets = ("q_proj", "v_proj")
        assert validate_checkpoint(tmp_path / kind, masks, base=tiny.folder(kind), target_modules=targets).ok
        strict = validate_checkpoint(tmp_path / kind, masks, base=tiny.folder(kind), target_modules=("q_proj",))
        assert strict.violations == 0 and any("v_proj" in problem for problem in strict.problems)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_gives_back_the_base_to_the_bit(kind, tiny, make_masks, work):
    masks = make_masks(tiny(kind))
    model = apply_sparse_lora(tiny(kind), SETTINGS, "sparse_to_sparse", masks)
    pruned = work.logits(model)
    work.steps(model)
    trained = work.logits(model)
    with model.disable_adapter():
        assert torch.equal(work.logits(model), pruned)
    model.merge_adapter()
    assert torch.equal(work.logits(model), trained)
    assert validate_sparsity_preserved(model, masks) == {}
    model.unmerge_adapter()
    assert torch.equal(work.logits(model), trained)
    with model.disable_adapter():
        assert torch.equal(work.logits(model), pruned)


def test_a_broken_adapter_does_not_merge(tiny, make_masks):
    for mode in ("sparse_to_sparse", "sparse_to_dense"):
        model = apply_sparse_lora(tiny("llama"), SETTINGS, mode, make_masks(tiny("llama")))
        layer = next(m for m in model.modules() if isinstance(m, SparseLoRALayer))
        layer.lora_B["default"].weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            merge_all_lora_weights(model)


def test_two_active_adapters_are_refused(tiny, make_masks, work):
    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks)
    model.add_adapter("second", SparseLoRAConfig(r=4, target_modules=["q_proj"], mask_checksum=masks.checksum))
    work.logits(model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UserError, match="one active adapter"):
        work.logits(model)


def test_masks_travel_with_a_copy_and_stay_out_of_checkpoints(tiny, make_masks, work):
    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama"), SETTINGS, "sparse_to_sparse", masks)
    assert not any("mask" in name for name in model.state_dict())
    assert torch.equal(work.logits(copy.deepcopy(model)), work.logits(model))


def test_options_that_break_the_exact_merge_are_refused():
    for option in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"sparse_mode": "dense"}):
        with pytest.raises(UserError):
            SparseLoRAConfig(**option)
    for wrong in ({"lora_r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"rounding": "up"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            LoraSettings(**wrong).check()
