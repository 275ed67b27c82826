import cerebras.pytorch as cstorch
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_ft.cerebras.modelzoo.model import SparseModelWrapper, module_masks, open_backend, prepare_sparse_model
from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.families import ARCHITECTURES
from sparse_ft.models.names import slots
from sparse_ft.models.tiny import tiny_config

KINDS = [f"tiny-{family}" for family, row in ARCHITECTURES.items() if row.modelzoo]
STEPS = 5
# cerebras.pytorch adds eps before the bias correction, torch after it: a tiny eps makes the two the same.
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.01}


def build(kind, lora=False):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    if not lora:
        return model
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"])
    return peft.get_peft_model(model, config)


def batches():
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        ids = torch.randint(3, 500, (4, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def train_on_cerebras(model, masks):
    open_backend("CPU")
    wrapper = SparseModelWrapper(model)
    optimizer = cstorch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], **SETTINGS)
    prepared = prepare_sparse_model(wrapper, masks, optimizer)

    @cstorch.trace
    def step(batch):
        loss = prepared.compiled(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    loader = cstorch.utils.data.DataLoader(lambda: list(batches()))
    executor = cstorch.utils.data.DataExecutor(loader, num_steps=STEPS)
    return wrapper, optimizer, prepared, [step(batch).item() for batch in executor]


def train_in_plain_pytorch(model, masks):
    """The oracle: torch.optim.AdamW, weights and gradients multiplied by the masks by hand."""
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **SETTINGS)
    losses = []

    def prune():
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)

    prune()
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        for name, mask in masks.items():
            if parameters[name].grad is not None:
                parameters[name].grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        prune()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_full_training_keeps_the_zeros_and_equals_plain_pytorch(kind, random_masks):
    model = build(kind)
    masks = random_masks(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapper, optimizer, prepared, losses = train_on_cerebras(model, masks)

    state = wrapper.state_dict()
    assert set(prepared.masks) == {f"model.{name}" for name in masks}
    for name, mask in masks.items():
        assert torch.equal(state[f"model.{name}_mask"], mask)  # bit for bit
        weight = wrapper.get_parameter(f"model.{name}")
        assert not weight.detach()[~mask].any()
        moments = [s for s in optimizer.state[weight].values() if s.shape == weight.shape]
        assert len(moments) == 2
        for moment in moments:
            assert not moment[~mask].any()
            assert moment[mask].any()
        changed = weight.detach()[mask] != before[name][mask]
        assert changed.float().mean() > 0.9
    assert losses == pytest.approx(train_in_plain_pytorch(build(kind), masks), rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_sparse_base_leaves_the_base_alone_and_equals_plain_pytorch(kind, random_masks):
    masks = random_masks(build(kind))
    model = build(kind, lora=True)
    wrapper, _, prepared, losses = train_on_cerebras(model, masks)

    original = dict(build(kind).named_parameters())
    assert len(prepared.masks) == len(masks)
    for name, mask in prepared.masks.items():
        plain = name.removeprefix("model.base_model.model.").replace(".base_layer", "")
        assert torch.equal(wrapper.get_parameter(name).detach(), original[plain] * masks[plain])
        assert torch.equal(mask, masks[plain])
    assert any(p.detach().any() for n, p in wrapper.named_parameters() if "lora_B" in n)
    reference = build(kind, lora=True)
    plain_masks = {name.removeprefix("model."): mask for name, mask in prepared.masks.items()}
    assert losses == pytest.approx(train_in_plain_pytorch(reference, plain_masks), rel=2e-5)


def test_a_kept_weight_that_is_zero_is_still_trained(random_masks):
    model = build("tiny-llama")
    masks = random_masks(model)
    name = "model.layers.0.mlp.up_proj.weight"
    kept_zeros = masks[name] & (torch.rand(masks[name].shape) < 0.3)
    with torch.no_grad():
        model.get_parameter(name)[kept_zeros] = 0.0
    wrapper, _, _, _ = train_on_cerebras(model, masks)
    assert (wrapper.get_parameter(f"model.{name}").detach()[kept_zeros] != 0).all()


def test_pruned_weights_are_zero_before_the_first_step(random_masks):
    model = build("tiny-llama")
    masks = random_masks(model)
    wrapper = SparseModelWrapper(model)
    prepare_sparse_model(wrapper, masks)
    for name, mask in masks.items():
        assert not wrapper.get_parameter(f"model.{name}").detach()[~mask].any()


def test_each_tensor_is_announced_with_its_own_measured_sparsity(random_masks):
    model = build("tiny-llama")
    masks = random_masks(model)
    name = "model.layers.1.mlp.down_proj.weight"
    masks[name] = torch.ones_like(masks[name])
    masks[name][0] = False
    wrapper = SparseModelWrapper(model)
    prepared = prepare_sparse_model(wrapper, masks)
    for parameter, mask in prepared.masks.items():
        announced = [
            float(group.algorithm.sparsity_level)
            for group in prepared.sparsity._groups
            if group.filter(parameter, None)
        ]
        assert announced == [pytest.approx(1 - mask.float().mean().item(), abs=1e-6)]


def test_masks_of_single_experts_are_put_together():
    model = build("tiny-mixtral")
    config = model.config.to_dict()
    single = {}
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"{prefix}.self_attn.{projection}.weight"
            single[name] = torch.rand(model.get_parameter(name).shape) < 0.5
        for expert in range(config["num_local_experts"]):
            for matrix in ("w1", "w2", "w3"):
                shape = (config["intermediate_size"], config["hidden_size"])
                shape = shape[::-1] if matrix == "w2" else shape
                single[f"{prefix}.block_sparse_moe.experts.{expert}.{matrix}.weight"] = torch.rand(shape) < 0.5
    found = module_masks(SparseModelWrapper(model), MaskSet.from_bool(single))
    for name, slot in slots(config, single).items():
        assert torch.equal(slot.view(found[f"model.{slot.parameter}"]), single[name])


def test_wrong_use_is_one_clear_line(random_masks):
    model = build("tiny-llama")
    masks = random_masks(model)
    with pytest.raises(UserError, match="SparseModelWrapper"):
        prepare_sparse_model(model, masks)
    with pytest.raises(UserError, match="needs a process of its own"):
        open_backend("CSX")
    wrapper = SparseModelWrapper(model)
    missing = dict(masks)
    missing.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(UserError, match="only in the model"):
        prepare_sparse_model(wrapper, missing)
    empty = dict(masks)
    empty["model.layers.0.mlp.up_proj.weight"] = torch.zeros_like(masks["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(UserError, match="prunes every weight"):
        prepare_sparse_model(SparseModelWrapper(build("tiny-llama")), empty)
    wrapper = SparseModelWrapper(build("tiny-llama"))
    with pytest.raises(UserError, match=r"cerebras\.pytorch\.optim"):
        prepare_sparse_model(wrapper, masks, torch.optim.AdamW(wrapper.parameters()))
