"""Every family of the table, through everything that is done with a model, against plain transformers.

What hangs on a family's names, maps and blocks is tried with every one. What begins only after these were understood
(how rules rank and update, what else is trained, how questions are batched) is tried with one of every kind.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from blockwise import agreement, in_memory, layers_of_sparsegpt, rows_of_wanda
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft.evaluation.scorer import Scorer
from sparse_ft.lora import LoraSettings
from sparse_ft.lora.merge import adapted_layers, merge_all_lora_weights
from sparse_ft.lora.model import apply_sparse_lora
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import ARCHITECTURES, Architecture
from sparse_ft.models.loading import apply_masks, load_model, load_tokenizer, save_model
from sparse_ft.models.names import parameter_masks, slots
from sparse_ft.models.tiny import tiny_config, tiny_tokenizer
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.pruning.shrink import shrink_checkpoint
from sparse_ft.settings.modes import MODES, SPARSE_TO_SPARSE, TRAINED_MODES
from sparse_ft.validation import validate_checkpoint

TEXT = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(5))
# Attention that sdpa does not know, over windows; fused maps; a norm over all heads; experts under other names than the
# model's; experts beside shared ones and dense blocks.
KINDS = ("gemma2", "phi3", "olmo2", "mixtral", "qwen2_moe")
one_of_a_kind = pytest.mark.parametrize("family", KINDS, indirect=True, scope="module")


@dataclass
class Family:
    """A random model of a family as transformers writes it, and masks of it."""

    row: Architecture
    folder: Path
    home: Path

    def masks(self, name, text=None, **how):
        calibration = None if text is None else Calibration(text, {"task": "noise"})
        generator = MaskGenerator(self.folder, PruningSettings(dtype="float32", **how), calibration)
        return generator.generate(self.home / name, figures="none")[0]

    def load(self, dtype="float32"):
        return load_model(self.folder, dtype, "cpu")


def make(kind, folder):
    """Weights, norms and biases at random: those that a new model has at 0 or 1 would hide what becomes of them."""
    row, config = ARCHITECTURES[kind], tiny_config(f"tiny-{kind}")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=row.attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return save_model(model, tiny_tokenizer(), folder)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    return Family(ARCHITECTURES[request.param], make(request.param, home / "model"), home)


@pytest.fixture(scope="module")
def masks(family):
    """Seven of ten weights of every tensor, by magnitude."""
    return family.masks("magnitude", sparsities=(0.7,)).load()


@torch.no_grad()
def logits(model, text=TEXT):
    return model(input_ids=text).logits


def test_a_plain_load_and_ours_say_the_same(family):
    plain = AutoModelForCausalLM.from_pretrained(family.folder).eval()
    assert torch.equal(logits(plain), logits(family.load()))
    saved = save_model(family.load(), None, family.home / "again")
    before, after = load_file(family.folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_masks_are_exact_and_cover_every_linear_map_of_the_blocks(family, masks):
    model, config = family.load(), Checkpoint(family.folder).config
    experts = family.row.experts
    weigh = () if experts is None else (experts.router, *experts.weighers)  # not one of them is pruned
    linear = {
        f"{name}.weight": module.weight.numel()
        for name, module in model.get_submodule(family.row.blocks).named_modules(prefix=family.row.blocks)
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in weigh
    }
    stacks = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name}
    places = slots(config, masks)
    assert {slot.parameter for slot in places.values()} == linear.keys() | stacks.keys()
    assert masks.n_weights == sum(linear.values()) + sum(stacks.values())
    for name, mask in masks.items():
        weight = places[name].view(model.get_parameter(places[name].parameter)).detach().abs()
        assert int((~mask).sum()) == round(0.7 * mask.numel())
        assert weight[~mask].max() <= weight[mask].min()


def hits_the_level(family, how):
    made = family.masks("rule", TEXT, sparsities=(0.5,), **how)
    rounding = len(Checkpoint(family.folder).prunable) if "allocation" in how else 0
    assert abs(made.pruned - round(made.weights / 2)) <= rounding
    if made.checkpoint is not None:
        assert validate_checkpoint(made.checkpoint, made.load()).ok
    return made


def test_gradients_reach_every_weight(family):
    """One ranking over the model. A tensor without gradients is said; of experts, one may have had no token."""
    masks = hits_the_level(family, {"importance": "gradient", "scope": "global"}).load()
    silent = [note for note in masks.metadata.get("notes", ()) if "scores were all zero" in note]
    assert all(".experts." in note for note in silent)


@one_of_a_kind
@pytest.mark.parametrize(
    "how",
    [
        {"method": "random"},
        {"scope": "global"},
        {"method": "semi_structured"},
        {"importance": "taylor"},
        {"importance": "wanda", "scope": "row", "allocation": "owl"},
        {"importance": "alps"},
    ],
    ids=str,
)
def test_rules_and_patterns_hit_the_level(family, how):
    hits_the_level(family, how)


def test_wanda_is_the_formula_on_plain_hooks(family):
    made = family.masks("wanda", TEXT, importance="wanda", scope="row", sparsities=(0.5,)).load()
    _, oracle = in_memory(family.folder, TEXT, rows_of_wanda(0.5))
    assert set(made) == set(oracle)
    for name in oracle:
        assert (made[name] == oracle[name]).float().mean() > 0.995, name


def test_sparsegpt_is_the_formula_on_plain_hooks(family):
    made = family.masks("sparsegpt", TEXT, importance="sparsegpt", sparsities=(0.5,))
    whole, oracle = in_memory(family.folder, TEXT, layers_of_sparsegpt(0.5))
    assert agreement(made.load(), oracle) > 0.995
    ours, dense = logits(load_model(made.checkpoint, "float32", "cpu")), logits(family.load())
    wanted = logits(whole)
    assert (ours - wanted).norm() < 0.05 * (dense - wanted).norm()
    assert validate_checkpoint(made.checkpoint, made.load(), base=family.folder).ok


def test_structured_masks_make_a_smaller_model_that_says_the_same(family):
    masks = family.masks("structured", method="structured", sparsities=(0.5,)).load()
    small = shrink_checkpoint(family.folder, masks, family.home / "small")
    model = family.load()
    apply_masks(model, masks)
    plain, report = AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(plain.eval()), logits(model), rtol=1e-3, atol=1e-3)
    smaller = Checkpoint(small)
    left = sum(int(smaller.tensor(name).count_nonzero()) for name in smaller.prunable)
    written = sum(torch.Size(shape).numel() for shape in smaller.prunable_shapes().values())
    assert left == masks.n_weights - masks.n_pruned
    assert written == left if family.row.head_dim else left < written < masks.n_weights


def test_what_was_trained_is_what_is_merged(family, masks):
    trained_is_merged(family, masks, SPARSE_TO_SPARSE.name)


@one_of_a_kind
@pytest.mark.parametrize("mode", [mode for mode in TRAINED_MODES if mode != SPARSE_TO_SPARSE.name])
def test_what_was_trained_is_what_is_merged_in_other_modes(family, masks, mode):
    trained_is_merged(family, masks, mode)


def trained_is_merged(family, masks, mode):
    kind = MODES[mode]
    model = family.load("bfloat16")
    model = apply_sparse_lora(model, LoraSettings(lora_r=2), mode, masks if kind.masked_base else None)
    if kind.lora:
        adapted = {name for name, _ in adapted_layers(model)}
        assert adapted == set(parameter_masks(Checkpoint(family.folder).config, masks))
    before = logits(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0)
    for _ in range(2):
        model(input_ids=TEXT, labels=TEXT, logits_to_keep=TEXT.shape[1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model.eval())
    assert not torch.equal(trained, before)
    folder = save_model(merge_all_lora_weights(model), None, family.home / mode)
    merged = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
    if kind.lora and not kind.masked_update:
        assert (merged - trained).norm() < 0.1 * (trained - before).norm()  # the sum is rounded once more
    else:
        assert (merged - trained).abs().max() == 0.0
    if kind.keeps_zeros:
        assert validate_checkpoint(folder, masks, base=family.folder if kind.lora else None).ok


@one_of_a_kind
def test_scores_are_those_of_lm_eval(family):
    tokenizer = load_tokenizer(family.folder)
    question = "Question: is the water of the sea the same as that of a river?\nAnswer:"
    asked = [Instance("loglikelihood", {}, (question, answer), 0) for answer in (" yes", " no", " they are not")]
    ours, theirs = Scorer(family.load(), tokenizer, 2), HFLM(family.load(), tokenizer=tokenizer, batch_size=2)
    found, wanted = ours.loglikelihood(asked), theirs.loglikelihood(copy.deepcopy(asked), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-4)


@pytest.mark.parametrize("family", [name for name, row in ARCHITECTURES.items() if row.experts], indirect=True)
def test_checkpoints_named_in_the_other_way_have_the_same_masks(family, masks):
    """As the loaded model names its parameters: all experts in one tensor, where checkpoints of the hub list them."""
    other = family.home / "other"
    other.mkdir()
    (other / "config.json").write_text((family.folder / "config.json").read_text())
    save_file(family.load().state_dict(), other / "model.safetensors", metadata={"format": "pt"})
    again = Family(family.row, other, family.home / "other masks")
    made = again.masks("structured", method="structured", sparsities=(0.5,)).load()
    wanted = family.masks("structured", method="structured", sparsities=(0.5,)).load()
    assert made.checksum == wanted.checksum
