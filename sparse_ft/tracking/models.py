"""Merged checkpoints as mlflow models: logged file by file, registered, and found again by name."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow.artifacts
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from sqlalchemy.exc import SQLAlchemyError

from sparse_ft.errors import UserError
from sparse_ft.levels import level_label
from sparse_ft.models.folder import weight_files
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.cell import NAME_LENGTH
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import is_server, quiet_mlflow, reachable, store_lock, tracking_uri

__all__ = [
    "log_model",
    "model_card",
    "register_model",
    "registered_name",
    "resolve_model",
    "sparsity_alias",
]

_TASK = "text-generation"
_EXAMPLE = "Question: is water wet?\nAnswer:"
_WEIGHTS = "model"  # mlflow's name for the folder of the checkpoint inside a model
# What tells models of one name and level apart: an alias that goes from one kind to another leaves a second behind.
_KIND = ("method", "importance", "scope", "mode", "model")
_NOT_COPIED = (".bin", ".pt", ".pth", ".safetensors", ".gguf")


def registered_name(model: str, task: str) -> str:
    """The registry's name for the sparse models of a base model and a task: ``MODEL-TASK-sparse``.

    Of a hub id or a folder only the last part is used, for names with slashes cannot be addressed.
    """
    base = re.sub(r"[^\w.-]", "-", str(model).rstrip("/").rsplit("/", 1)[-1])
    return f"{base}-{task}-sparse"


def sparsity_alias(sparsity: float) -> str:
    """The alias of a sparsity: 0.7 -> ``sparse70``, 0.625 -> ``sparse62_5`` (a dot is not allowed)."""
    return "sparse" + level_label(sparsity).replace(".", "_")


def model_card(
    title: str,
    facts: Mapping[str, Mapping[str, Any] | str],
    *,
    base_model: str | None = None,
    licence: str | None = None,
    load_uri: str | None = None,
    hub: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """A model card in Markdown: what it is, how it was made and scored, how to load it.

    Args:
        title: the first heading.
        facts: heading -> a table of name and value, or a paragraph. None values are left out.
        base_model: hub id or name of the model it was made from.
        licence: identifier of the licence, which is the base model's.
        load_uri: ``models:/NAME@ALIAS``, for the example.
        hub: ``owner/name`` on the hub, for the example there.
        datasets: hub ids of what it was trained on.
    """
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _TASK,
        "tags": ["sparse", "pruned"],
    }
    if base_model:
        header["base_model"] = base_model
    if licence:
        header["license"] = licence
    if datasets:
        header["datasets"] = list(datasets)
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", f"# {title}", ""]
    for heading, content in facts.items():
        lines += [f"## {heading}", ""]
        if isinstance(content, str):
            lines += [content, ""]
            continue
        rows = [(name, value) for name, value in content.items() if value is not None]
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    if load_uri:
        lines += ["## Loading", "", "```python", "import mlflow", ""]
        lines += [f'parts = mlflow.transformers.load_model("{load_uri}", return_type="components")']
        lines += ['model, tokenizer = parts["model"], parts["tokenizer"]', "```", ""]
        lines += ["The zeros are stored as zeros: no mask and no adapter is needed.", ""]
    if hub:
        lines += ["## Loading", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{hub}")']
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{hub}")', "```", ""]
        lines += ["The zeros are stored as zeros: no mask and no adapter is needed. The masks are in `masks/`;", ""]
        lines += ["`sparse-ft validate --checkpoint FOLDER --masks FILE` proves them weight by weight.", ""]
    return "\n".join(lines)


def log_model(
    tracker: Tracker,
    run_id: str,
    folder: str | Path,
    name: str,
    *,
    card: str | None = None,
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    move: bool = False,
) -> str:
    """Logs a merged checkpoint as a model of mlflow's transformers flavour, with a pyfunc.

    The weights are never loaded: mlflow describes the folder without them, then the files are handed over
    one by one. Memory stays flat and the only copy on disk is the store's own, whatever the model's size.

    Args:
        tracker: where.
        run_id: the run it came from.
        folder: a plain Hugging Face checkpoint with its tokenizer.
        name: the model's name in the run.
        card: a model card; see `model_card`.
        tags: on the model.
        params: on the model.
        progress: told about the files.
        move: each file of weights leaves the folder when the store has it, so that there is no second copy of a
            checkpoint that can be made again.

    Returns:
        The model's address, ``models:/m-...``.

    Raises:
        UserError: the folder is no plain checkpoint; an adapter that was not merged is none.
    """
    # Absolute: mlflow asks the hub for the licence of a model named like the folder, and out/merged is a name there.
    folder = Path(folder).absolute()
    weights = _weights(folder)
    client, experiment_id = tracker.client, tracker.run(run_id).experiment_id
    logged = client.create_logged_model(experiment_id, name, run_id, _texts(tags), _texts(params))
    progress.start(f"logging {name}", sum(path.stat().st_size for path in weights), "B")
    try:
        with quiet_mlflow(), tempfile.TemporaryDirectory() as scratch:
            described = Path(scratch) / "described"
            _describe(
                folder,
                weights,
                described,
                Model(logged.artifact_location, run_id, model_id=logged.model_id),
                card,
            )
            client.log_model_artifacts(logged.model_id, str(described))
            for path in weights:
                client.log_model_artifact(logged.model_id, str(path), _WEIGHTS)
                progress.advance(path.stat().st_size)
                if move:
                    path.unlink()
        client.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        with suppress(MlflowException):  # a store that is gone must not hide why, nor that Ctrl-C was pressed
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    finally:
        progress.stop()
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return f"models:/{logged.model_id}"


def register_model(
    tracker: Tracker,
    model_uri: str,
    name: str,
    *,
    alias: str | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str | None = None,
    said: Callable[[str], None] = print,
) -> str:
    """Makes a logged model the newest version of a registered one, and points an alias at it.

    Where the alias belonged to a model of another kind (method, importance, scope, mode or base model), that
    version keeps a second alias, with its own kind in it (``sparse70_unstructured_magnitude``), and a tag
    ``alias_before``.

    Args:
        tracker: where.
        model_uri: what `log_model` returned.
        name: see `registered_name`; it is created if need be.
        alias: see `sparsity_alias`; it moves here if another version has it.
        tags: on the version; they tell its kind.
        description: Markdown on the version's page, such as the model card.
        said: told in one line about an alias that moved from another kind.

    Returns:
        The version's number.
    """
    client = tracker.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    logged = client.get_logged_model(model_uri.removeprefix("models:/"))
    texts = _texts(tags)
    # A server looks the model up itself. A database would do so in mlflow's global store, which need not be this
    # one, so there the place is named.
    source = model_uri if is_server(tracker.uri) else logged.artifact_location
    with quiet_mlflow():
        made = client.create_model_version(
            name, source, logged.source_run_id, texts, description=description, model_id=logged.model_id
        )
    # As `mlflow.register_model` does: by it a model's page, and the tab *Models*, know where it is registered.
    versions = json.loads(client.get_logged_model(logged.model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    entry = {"name": name, "version": int(made.version)}
    if entry not in versions:
        client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*versions, entry])})
    if alias:
        _keep_reachable(client, name, alias, texts, said)
        client.set_registered_model_alias(name, alias, made.version)
    return str(made.version)


def _keep_reachable(
    client: MlflowClient, name: str, alias: str, kind: Mapping[str, str], said: Callable[[str], None]
) -> None:
    """Gives the version that has the alias another one, if it is of another kind than the one that comes."""
    try:
        before = client.get_model_version_by_alias(name, alias)
    except MlflowException:  # nobody has it
        return
    differ = [key for key in _KIND if before.tags.get(key) != kind.get(key)]
    if not differ:
        return
    own = [before.tags[key] for key in _KIND if key in before.tags and (key in differ or key in _KIND[:2])]
    second = re.sub(r"[^\w-]+", "-", "_".join([alias, *own]))[:NAME_LENGTH]
    client.set_registered_model_alias(name, second, before.version)
    client.set_model_version_tag(name, before.version, "alias_before", alias)
    changes = ", ".join(f"{key} {before.tags.get(key, 'none')} -> {kind.get(key, 'none')}" for key in differ)
    said(
        f"the alias {alias} of {name} moves to another kind of model ({changes}); version {before.version}, which"
        f" had it, is models:/{name}@{second} from now on"
    )


def resolve_model(uri: str, store: str | None = None, folder: str | Path | None = None) -> Path:
    """The local folder of a model's plain Hugging Face checkpoint.

    A model in a local store is used where it lies; from a server it is downloaded.

    Args:
        uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, ``models:/m-ID``, ``runs:/RUN/NAME``.
        store: the tracking store; see `sparse_ft.tracking.stores.tracking_uri`.
        folder: where a download goes; by default a temporary folder, which is the caller's to remove.

    Raises:
        UserError: no such model, or one without a checkpoint.
    """
    address = tracking_uri(store)
    reachable(address)
    try:
        with quiet_mlflow():
            with store_lock(address):
                client = MlflowClient(address, registry_uri=address)
            location = _location(client, uri)
            into = str(folder) if folder else None
            found = Path(mlflow.artifacts.download_artifacts(location, dst_path=into, tracking_uri=address))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"there is no model {uri} in {address} ({error}); is MLFLOW_TRACKING_URI right?") from error
    for candidate in (found / _WEIGHTS, found):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"the model {uri} holds no Hugging Face checkpoint (no config.json in {found})")


def _location(client: MlflowClient, uri: str) -> str:
    """Where a model's files are. mlflow's own resolving looks in its global store, whatever store is named."""
    if match := re.fullmatch(r"models:/(m-[0-9a-f]+)", uri):
        return client.get_logged_model(match[1]).artifact_location
    if match := re.fullmatch(r"models:/([^/@]+)(?:@([\w-]+)|/(\d+))", uri):
        name, alias, number = match.groups()
        number = number or client.get_model_version_by_alias(name, alias).version
        source = client.get_model_version_download_uri(name, str(number))
        return _location(client, source) if source.startswith("models:/") else source
    if match := re.fullmatch(r"runs:/([^/]+)/(.+)", uri):
        run = client.get_run(match[1])
        logged = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
        newest = [model.artifact_location for model in logged if model.name == match[2]][-1:]
        return newest[0] if newest else f"{run.info.artifact_uri}/{match[2]}"
    raise UserError(f"'{uri}' is not models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-ID or runs:/RUN/NAME")


def _texts(values: Mapping[str, Any] | None) -> dict[str, str]:
    return {str(key): str(value) for key, value in (values or {}).items() if value is not None}


def _weights(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint to log: it has no config.json")
    return list(weight_files(folder).files)


def _describe(folder: Path, weights: list[Path], target: Path, model: Model, card: str | None) -> None:
    """Writes an mlflow model of the checkpoint to ``target``, complete but for the weights.

    mlflow writes its own format, of a model without weights, whose configuration then gives way to the
    checkpoint's files. That stand-in remains because mlflow 3.17, whose range of transformers ends at 5.17, takes a
    folder unloaded (``save_model(str(folder))``) only there: it asks a pipeline's class for its name, and transformers
    5.23 holds the name alone. It also copies the folder, weights and all.
    """
    import mlflow.transformers
    from huggingface_hub import ModelCard
    from transformers.utils import logging as transformers_logging

    stand_in, tokenizer, dtype = _stand_in(folder)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    mlflow.transformers.save_model(
        {"model": stand_in, "tokenizer": tokenizer},
        path=str(target),
        task=_TASK,
        mlflow_model=model,
        torch_dtype=dtype,
        # A card is always given: without one mlflow asks the hub for that of a model named like the folder.
        model_card=ModelCard(card or model_card(folder.name, {})),
        # Named, because mlflow's own guess asks for torchvision, which a text model does not need.
        pip_requirements=_requirements(),
        # Said outright: to guess them mlflow would run the model, which has no weights here.
        signature=ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string")])),
        input_example=[_EXAMPLE],
    )
    if bars:
        transformers_logging.enable_progress_bar()
    shutil.rmtree(target / _WEIGHTS)
    (target / _WEIGHTS).mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in _NOT_COPIED:
            shutil.copy2(path, target / _WEIGHTS / path.name)
    # mlflow looked for a licence in a hub repository of the folder's name; what it wrote then misleads.
    (target / "LICENSE.txt").unlink(missing_ok=True)
    for path in folder.glob("LICENSE*"):
        shutil.copy2(path, target / path.name)
    model.flavors["transformers"]["source_model_name"] = folder.name
    files = [path for path in target.rglob("*") if path.is_file()]
    model.model_size_bytes = sum(path.stat().st_size for path in [*files, *weights])
    model.save(str(target / "MLmodel"))


def _stand_in(folder: Path) -> tuple[Any, Any, Any]:
    """The checkpoint's model without weights, its tokenizer and its dtype: whatever it is, nothing is computed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.hf_device_map = {"": "meta"}  # else a pipeline moves it to a device, which needs weights
    model.save_pretrained = lambda save_directory, **_: config.save_pretrained(save_directory)
    return model, tokenizer, dtype


def _requirements() -> list[str]:
    found = []
    for package in ("torch", "transformers", "accelerate", "safetensors", "tokenizers"):
        try:
            found.append(f"{package}=={version(package).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return found
