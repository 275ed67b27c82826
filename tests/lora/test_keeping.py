"""Effective weights that stay from forward to backward: the same bits, what they take, and who decides."""

import pytest
import torch

from sparse_ft.lora import LoraSettings, apply_sparse_lora, function, keeping, layer, merge_all_lora_weights
from sparse_ft.lora.function import masked_linear
from sparse_ft.lora.keeping import Keeping, kept_bytes, set_keeping
from sparse_ft.masks.mask_set import pack_bits

CHECKPOINTING = (None, "reentrant", "non_reentrant")


@pytest.fixture
def made(monkeypatch):
    """The effective weights that were made, by shape, one entry each."""
    shapes = []

    def counted(weight, *rest, **named):
        shapes.append(tuple(weight.shape))
        return effective_weight(weight, *rest, **named)

    effective_weight = function.effective_weight
    for module in (function, layer):
        monkeypatch.setattr(module, "effective_weight", counted)
    return shapes


def prepared(model, masks, keep, checkpointing=None, **settings):
    settings = LoraSettings(lora_r=4, lora_alpha=8, keep_effective=keep, **settings)
    model = apply_sparse_lora(model, settings, "sparse_to_sparse", masks)
    model.enable_input_require_grads()  # so that the first block's weights are needed in backward too
    if checkpointing:
        how = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return model.train()


def saved_bytes(model, batch):
    """Bytes of the tensors that autograd saves of one forward pass and that are no parameter's."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [True, False])
def test_the_map_keeps_one_tensor_more_where_backward_needs_it_and_gives_the_same_bits(dtype, bound):
    g = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=g) for s in ((24, 40), (4, 40), (24, 4)))
    packed, key = pack_bits(torch.rand(24, 40, generator=g) > 0.5), 7

    def run(keep):
        leaves = [torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype), a.clone(), b.clone()]
        leaves = [leaf.requires_grad_(bound or place > 0) for place, leaf in enumerate(leaves)]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = masked_linear(leaves[0], weight.to(dtype), *leaves[1:], packed, 0.5, None, key, keep)
        y.float().square().sum().backward()
        return len(saved), [y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    (few, remade), (more, kept) = run(False), run(True)
    assert more - few == bound
    assert all(torch.equal(one, other) for one, other in zip(remade, kept, strict=True))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_model_trains_to_the_same_bits_and_makes_each_weight_once_less(
    kind, dtype, checkpointing, tiny, make_masks, work, made
):
    masks = make_masks(tiny(kind))
    weights, losses, count = {}, {}, {}
    for keep in ("always", "never"):
        torch.manual_seed(0)
        model = prepared(tiny(kind, dtype), masks, keep, checkpointing)
        maps = sum(isinstance(module, layer.MaskedBase) for module in model.modules())
        made.clear()
        losses[keep] = work.steps(model, 3)
        count[keep] = len(made) / 3 / maps
        weights[keep] = merge_all_lora_weights(model).state_dict()
    assert losses["always"] == losses["never"]
    assert all(torch.equal(value, weights["never"][name]) for name, value in weights["always"].items())
    again = checkpointing is not None  # forward is run once more
    assert count == {"always": 1 + again, "never": 2 + again}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_is_kept_is_what_was_counted_and_nothing_of_a_weights_size_otherwise(kind, tiny, make_masks, work):
    masks, sizes = make_masks(tiny(kind)), {}
    for keep in ("always", "never"):
        torch.manual_seed(0)
        model = prepared(tiny(kind), masks, keep)
        sizes[keep] = saved_bytes(model, work.batch())
        counted = kept_bytes(model)
    assert sizes["always"] - sizes["never"] == counted == 4 * sum(masks[name].numel() for name in masks)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert kept_bytes(model) == counted / len(model.get_base_model().model.layers)  # one block at a time


def test_a_structured_mask_makes_no_weight_to_keep(tiny, make_masks, work, made):
    model = prepared(tiny("llama"), make_masks(tiny("llama"), "structured"), "always")
    model(**work.batch()).loss.backward()
    assert made == [] and kept_bytes(model) == 0 and Keeping(model, torch.device("cpu")).chosen is None


@pytest.mark.parametrize("mode", ["dense", "sparse_to_dense"])
def test_other_modes_keep_nothing_whatever_is_asked(mode, tiny, make_masks):
    masks = None if mode == "dense" else make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama"), LoraSettings(keep_effective="always"), mode, masks)
    assert kept_bytes(model) == 0 and Keeping(model, torch.device("cpu")).chosen is None


@pytest.mark.parametrize(("missing", "chosen"), [(0, "kept"), (1, "made again")])
def test_auto_asks_once_whether_kept_weights_fit_beside_a_batch(missing, chosen, tiny, make_masks, work, monkeypatch):
    model, lines = prepared(tiny("llama"), make_masks(tiny("llama")), "auto"), []
    monkeypatch.setattr(keeping, "peak_bytes", lambda device: 700)
    monkeypatch.setattr(keeping, "held_bytes", lambda device: 500)
    monkeypatch.setattr(keeping, "cores", torch.get_num_threads)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = kept_bytes(model) + 200 + 8 * trained
    monkeypatch.setattr(keeping, "free_bytes", lambda device: -(-10 * needed // 9) - missing)
    decision = Keeping(model, torch.device("cpu"), lines.append)
    assert decision.chosen == "made again"  # the first batch
    for _ in range(2):
        decision.after_batch()
        assert decision.chosen == chosen
    (line,) = lines
    assert "keep_effective auto" in line and ("kept for backward" in line) == (chosen == "kept")
    decision.end()
    assert decision.chosen == "made again"  # the next training asks again


def test_a_worker_beside_others_counts_on_its_share_of_the_machine(tiny, make_masks, monkeypatch):
    model, free = prepared(tiny("llama"), make_masks(tiny("llama")), "auto"), []
    monkeypatch.setattr(keeping, "free_bytes", lambda device: 8_000_000_000)
    for share in (1, 4):
        monkeypatch.setattr(keeping, "cores", lambda share=share: share * torch.get_num_threads())
        Keeping(model, torch.device("cpu"), free.append).after_batch()
    assert ["8.00 GB that are free" in free[0], "2.00 GB that are free" in free[1]] == [True, True]


def test_what_was_set_holds_for_whoever_writes_the_loop(tiny, make_masks, work, made):
    model = prepared(tiny("llama"), make_masks(tiny("llama")), "never")
    model(**work.batch()).loss.backward()
    without = len(made)
    set_keeping(model, "always")
    made.clear()
    model(**work.batch()).loss.backward()
    assert 2 * len(made) == without
