"""What is missing before a job goes to the cluster, one line each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_ft.cerebras.runner import trainer_environment

__all__ = ["CLUSTER_CONFIG", "preflight"]

CLUSTER_CONFIG = Path("/opt/cerebras/config_v2")
_PROBE = (
    "import importlib.util as u\n"
    "def has(n):\n"
    "    try: return u.find_spec(n) is not None\n"
    "    except ModuleNotFoundError: return False\n"
    "print(','.join(n for n in ('cerebras.pytorch','cerebras.modelzoo','sparse_ft','h5py') if not has(n)))"
)
_MISSING = {
    "cerebras.pytorch": "cerebras-pytorch 2.10 (requirements/cerebras-modelzoo.txt)",
    "cerebras.modelzoo": "ModelZoo 2.10 (pip install --no-deps -e ~/R_2.10.0/modelzoo)",
    "sparse_ft": "this project (pip install --no-deps -e .)",
    "h5py": "h5py (requirements/cerebras-modelzoo.txt)",
}


def preflight(
    python: str,
    device: str,
    config: Mapping[str, Any] | None = None,
    cluster_config: Path = CLUSTER_CONFIG,
    mgmt_address: str | None = None,
) -> list[str]:
    """One line for each thing that would stop a job; empty where nothing would.

    Args:
        python: the interpreter of the environment with ModelZoo.
        device: ``CSX`` or ``CPU``.
        config: a trainer configuration (`create_sparse_config`): its files must exist and be seen by the cluster.
        cluster_config: where a login node keeps the cluster's address; None of it needs ``mgmt_address``.
    """
    problems = _environment(python)
    if device == "CSX":
        if shutil.which("torch-cirh-opt", path=trainer_environment(python)["PATH"]) is None:
            problems.append(
                f"torch-cirh-opt is not on PATH: put {Path(python).parent} first (it comes with cerebras-pytorch)."
            )
        if not cluster_config.exists() and not (
            mgmt_address or os.environ.get("CEREBRAS_WAFER_SCALE_CLUSTER_DEFAULTS")
        ):
            problems.append(
                f"No cluster is known here: {cluster_config} is missing. Use a login node, or give mgmt_address."
            )
    if config is not None:
        problems += _files(config, device)
    return problems


def _environment(python: str) -> list[str]:
    if shutil.which(python) is None:
        return [f"There is no Python at {python}: make test-modelzoo MODELZOO=PATH makes the environment."]
    probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return [f"{python} does not start: {probe.stderr.strip().splitlines()[-1]}"]
    return [f"{python} lacks {_MISSING[name]}." for name in probe.stdout.strip().split(",") if name]


def _files(config: Mapping[str, Any], device: str) -> list[str]:
    init, fit = config["trainer"]["init"], config["trainer"]["fit"]
    needed = {"data_dir": fit["train_dataloader"]["data_dir"], "ckpt_path": fit.get("ckpt_path")}
    for entry in init.get("callbacks", []):
        needed.update({key: value for key, value in (entry.get("SparseMask") or {}).items() if key != "mode"})
    problems = [f"{name} {path} does not exist." for name, path in needed.items() if path and not Path(path).exists()]
    mounts = init["backend"].get("cluster_config", {}).get("mount_dirs")
    if device == "CSX" and mounts:
        seen = {"data_dir": needed["data_dir"]}  # what the cluster's own processes read
        problems += [
            f"{name} {path} lies in no mount_dirs." for name, path in seen.items() if not _inside(path, mounts)
        ]
    return problems


def _inside(path: str, folders: Sequence[str]) -> bool:
    resolved = Path(path).resolve()
    return any(resolved.is_relative_to(Path(folder).resolve()) for folder in folders)
