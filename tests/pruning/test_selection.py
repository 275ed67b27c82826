import pytest
import torch

from sparse_ft.pruning.patterns import layer_mask
from sparse_ft.pruning.selection import group_bounds, keep_largest, kth_smallest

GENERATOR = torch.Generator().manual_seed(0)
VALUES = {
    "normal": torch.randn(40, 25, generator=GENERATOR),
    "magnitudes": torch.randn(40, 25, generator=GENERATOR).abs(),
    "one far away": torch.cat([torch.rand(999, generator=GENERATOR) * 1e-6, torch.tensor([1e6])]),
    "many equal": torch.randint(0, 4, (40, 25), generator=GENERATOR).float(),
    "all equal": torch.full((1000,), 0.3),
    "mostly zero": torch.randn(1000, generator=GENERATOR).relu() * (torch.rand(1000, generator=GENERATOR) < 0.1),
    "float64": torch.randn(1000, generator=GENERATOR, dtype=torch.float64),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("bins", [None, 4, 2048])
def test_the_kth_smallest_is_what_a_sort_finds(values, bins):
    ordered = values.flatten().sort().values
    for k in (1, 2, 137, 500, 999, 1000):
        assert kth_smallest(values.clone(), k, bins) == float(ordered[k - 1])


@pytest.mark.parametrize("name", ["magnitudes", "many equal", "mostly zero"])
def test_masks_are_those_of_the_streaming_engine(name):
    values = VALUES[name].view(40, 25)
    before = None
    for k in (0, 1, 137, 500, 501, 950, 1000):
        kept = keep_largest(values, k, before)
        assert int((~kept).sum()) == k
        assert torch.equal(kept, layer_mask(values, k, before))
        before = ~kept


def test_bounds_of_groups_are_what_a_sort_finds():
    values = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(1))
    for count in range(1, 9):
        assert torch.equal(group_bounds(values, count), values.sort(1).values[:, count - 1 : count])
