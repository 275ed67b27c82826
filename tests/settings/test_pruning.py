import pytest

from sparse_ft.errors import UserError
from sparse_ft.settings.pruning import PruningSettings
from sparse_ft.settings.rules import RULES


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "magic"}, "method 'magic' is none of"),
        ({"importance": "luck"}, "importance 'luck' is none of"),
        ({"scope": "block"}, "scope 'block' is none of"),
        ({"allocation": "fair"}, "allocation 'fair' is none of"),
        ({"dtype": "int8"}, "dtype 'int8' is none of"),
        ({"sparsities": ()}, "sparsities is empty"),
        ({"sparsities": (0.5, 50)}, "50 is not between 0 and 1"),
        ({"sparsities": (-0.1,)}, "not between 0 and 1"),
        ({"sparsities": (float("nan"),)}, "not between 0 and 1"),
        ({"sparsities": (0.5, 0.5)}, "one level twice"),
        ({"threads": 0}, "threads is 0"),
        ({"importance": "taylor", "calibration_samples": 0}, "calibration_samples"),
        ({"owl_range": 0.7}, "owl_range is 0.7; it must lie between 0 and 0.5"),
        ({"dlp_range": -0.1}, "dlp_range is -0.1"),
        ({"owl_outlier": 0}, "owl_outlier is 0; it must be above 0"),
        ({"method": "random", "importance": "wanda"}, "looks at no weight"),
        ({"importance": "wanda", "scope": "global"}, "known to collapse"),
        ({"importance": "sparsegpt", "method": "structured"}, "SparseGPT prunes"),
        ({"importance": "sparsegpt", "scope": "row"}, "Take scope layer"),
        ({"importance": "alps", "method": "structured"}, "ALPS prunes unstructured or semi_structured"),
        ({"importance": "alps", "scope": "global"}, "ALPS chooses within scope layer"),
        ({"reconstruct": "layer"}, "reconstruct 'layer' is none of none, block"),
        ({"reconstruct_learning_rate": 0.0}, "reconstruct_learning_rate is 0.0; it must be above 0"),
        ({"reconstruct_epochs": -1}, "reconstruct_epochs is -1"),
        ({"reconstruct_batch": 0}, "reconstruct_batch is 0"),
        ({"reconstruct": "block", "calibration_samples": 0}, "calibration_samples must be at least 1"),
        ({"refine": "luck"}, "refine 'luck' is none of none, swaps"),
        ({"refine": "swaps", "method": "structured"}, "refine swaps, method structured: whole channels and heads"),
        ({"refine": "swaps", "method": "random"}, "refine swaps, method random: random masks are the control"),
        ({"refine": "swaps", "scope": "global"}, "refine swaps, scope global: one ranking over the model"),
        ({"refine": "swaps", "importance": "alps"}, "ALPS chooses its mask for weights that are updated"),
        ({"refine": "swaps", "importance": "sparsegpt", "update": "refit"}, "SparseGPT chooses its mask for weights"),
        ({"method": "structured", "scope": "row"}, "whole channels and heads"),
        ({"method": "semi_structured", "scope": "global"}, "N of every M neighbours"),
        ({"method": "semi_structured", "pattern": "4:4"}, "4:4 is none"),
        ({"method": "semi_structured", "pattern": "0:0"}, "0:0 is none"),
        ({"method": "semi_structured", "sparsities": (0.7,)}, "2:4 has sparsity 0.5 and no other"),
        ({"allocation": "owl", "scope": "global"}, "OWL gives every block"),
        ({"allocation": "owl", "method": "structured"}, "OWL gives every block"),
        ({"allocation": "dlp", "method": "semi_structured"}, "DLP gives every block .* it needs method unstructured"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(how, says):
    with pytest.raises(UserError, match=says) as error:
        PruningSettings(**how).check()
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as error:
        PruningSettings(method="magic", scope="block", sparsities=(0.5, 7, float("nan")), threads=0).check()
    for part in ("method 'magic'", "scope 'block'", "sparsities: 7, nan is not", "threads is 0"):
        assert part in str(error.value)
    with pytest.raises(UserError) as error:
        PruningSettings(method="structured", scope="row", importance="sparsegpt").check()
    for part in ("SparseGPT prunes unstructured", "scope row is not its own", "structured pruning removes whole"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sparsities": (0, 1)},
        {"importance": "wanda", "scope": "global", "force": True},
        {"method": "semi_structured", "pattern": "1:4", "sparsities": (0.75,)},
        {"method": "semi_structured", "pattern": "2:3", "sparsities": (1 - 2 / 3,)},
        {"method": "structured", "scope": "global", "importance": "taylor"},
        {"importance": lambda w, s: w, "statistics": "gradients"},
        {"importance": "sparsegpt", "update": "none", "refine": "swaps"},
        {"importance": "wanda", "update": "refit", "refine": "swaps"},
        {"method": "semi_structured", "refine": "swaps"},
    ],
)
def test_what_makes_sense_passes(how):
    PruningSettings(**how).check()


def test_what_needs_text():
    assert not PruningSettings().needs_calibration
    assert not PruningSettings(method="random").needs_calibration
    assert PruningSettings(allocation="owl").needs_calibration
    assert PruningSettings(allocation="dlp").needs_calibration
    assert PruningSettings(refine="swaps").needs_calibration
    assert PruningSettings(method="random", reconstruct="block").needs_calibration
    needs = {name: PruningSettings(importance=name).rule.needs for name in RULES}
    assert needs == {
        "magnitude": "none", "gradient": "gradients", "taylor": "gradients", "wanda": "activations",
        "sparsegpt": "hessians", "alps": "hessians", "reap": "activations",
    }  # fmt: skip
    assert PruningSettings(importance=lambda w, s: w).rule.needs == "none"
