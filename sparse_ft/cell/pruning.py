"""From the flat parameters of the entry points to the settings of the parts."""

from __future__ import annotations

from sparse_ft.errors import UserError
from sparse_ft.pruning.settings import PruningSettings
from sparse_ft.settings.commands import MaskConfig

__all__ = ["pruning_settings"]


def pruning_settings(config: MaskConfig) -> PruningSettings:
    """The pruning engine's settings out of an entry point's parameters.

    Raises:
        UserError: a pattern that is not kept:group.
    """
    try:
        kept, group = (int(part) for part in config.pattern.split(":"))
    except ValueError:
        raise UserError(f"pattern is '{config.pattern}'; write kept:group, such as 2:4.") from None
    return PruningSettings(
        method=config.method,
        importance="magnitude" if config.method == "random" else config.importance,
        scope=config.scope,
        sparsities=config.levels,
        pattern_n=kept,
        pattern_m=group,
        allocation=config.allocation,
        calibration_samples=config.calibration_samples,
        calibration_seq_len=config.calibration_seq_len,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        force=config.force,
    )
