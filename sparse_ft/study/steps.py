"""The single steps as runs of their own: masks, one cell, validation, analysis."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console

from sparse_ft.analysis.terminal import TERMINAL_WIDTH, terminal_table
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.masks.files import load_masks, read_header
from sparse_ft.progress import shown_progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.study.cell import run_cell
from sparse_ft.study.config import AnalyzeConfig, CellConfig, MaskConfig, ValidateConfig
from sparse_ft.study.failures import ValidationFailedError, classify
from sparse_ft.study.mask_sets import make_masks
from sparse_ft.study.recording import log_cell_inputs, log_cell_result, log_failure, log_mask_inputs, log_masks
from sparse_ft.study.reporting import analyze_rows, report_study, study_rows, ui_command
from sparse_ft.study.workbench import Workbench
from sparse_ft.tracking.runs import Tracker
from sparse_ft.validation import validate_checkpoint

__all__ = ["analyze", "compute_masks", "train", "validate"]
