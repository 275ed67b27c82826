import numpy as np
import pytest
import torch

from sparse_ft.files import write_json
from sparse_ft.masks.figures import block_table, draw_levels, save_heatmap, save_histogram, save_summary
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.masks.statistics import mask_statistics
from sparse_ft.models.families import ARCHITECTURES


def masks(blocks, experts=0):
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        names = [f"{prefix}.self_attn.{p}.weight" for p in ("q_proj", "o_proj")]
        names += [f"{prefix}.block_sparse_moe.experts.{e}.{w}.weight" for e in range(experts) for w in ("w1", "w2")]
        for name in names:
            tensors[name] = torch.rand(4, 10, generator=generator) > (block + 1) / (blocks + 2)
    return MaskSet.from_bool(tensors, {"sparsity": 0.5, "model": "m", "method": "unstructured"})


def test_the_table_puts_blocks_in_order_and_experts_together():
    given = masks(12, experts=3)
    blocks, projections, table = block_table(mask_statistics(given))
    assert blocks == list(range(12))
    assert projections == ["q_proj", "o_proj", "w1", "w2"]
    part = [given[f"model.layers.10.block_sparse_moe.experts.{e}.w2.weight"] for e in range(3)]
    assert table[3, 10] == pytest.approx(1 - torch.stack(part).float().mean().item())


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_projections_are_in_the_order_of_the_forward_pass(row):
    names = [name for projection in row.linear_maps for name in projection.adapter_names]
    if row.experts is not None:
        names += [name for matrix in row.experts.matrices for name in matrix.adapter_names]
    tensors = {f"{row.block(0)}{name}.weight": {"weights": 1, "pruned": 0} for name in reversed(names)}
    assert block_table({"tensors": tensors})[1] == list(dict.fromkeys(names))


def test_a_missing_projection_is_empty():
    given = {
        n: e for n, e in mask_statistics(masks(2))["tensors"].items() if n != "model.layers.1.self_attn.q_proj.weight"
    }
    table = block_table({"tensors": given})[2]
    assert np.isnan(table[0, 1])
    assert np.isfinite(table[[0, 1, 1], [0, 0, 1]]).all()


@pytest.mark.parametrize("blocks", [1, 32, 80])
def test_pictures_are_drawn(tmp_path, blocks):
    for draw in (save_histogram, save_heatmap):
        path = draw(masks(blocks), tmp_path / f"{draw.__name__}.png")
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 2


def test_a_summary_has_a_line_for_every_level(tmp_path):
    path = save_summary([mask_statistics(masks(blocks=3))] * 2, tmp_path / "summary.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_processes_draw_beside_the_statistics(tmp_path):
    files = [write_json(tmp_path / f"stats_{level}.json", mask_statistics(masks(2))) for level in ("a", "b", "c")]
    draw_levels(files, processes=2)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{kind}_{level}.png" for kind in ("histogram", "heatmap") for level in ("a", "b", "c")
    }
    with pytest.raises(OSError, match="could not be drawn"):
        draw_levels([tmp_path / "stats_gone.json"])
