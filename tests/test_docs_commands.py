"""Every command of the documentation was run: by the test named here, or by hand, and then it stands here how.

A new command without an entry fails, and so does an entry whose test is gone or that no command needs any more.
"""

import re

import pytest
from documents import PAGES, ROOT, commands

STEPS = "tests/entrypoints/test_commands.py::test_"
STARTED = "tests/test_docs.py::test_the_first_steps_run_as_they_are_written"
EXPERTS = "tests/entrypoints/test_experts.py::test_masks_a_smaller_checkpoint_training_from_the_file_and_its_proof"
PROJECT = STEPS + "mlflow_run_makes_one_run_and_keeps_what_was_typed"
HUB = "tests/study/test_hub_models.py::test_the_full_study_with_its_models_and_data_from_a_hub"
RESUMED = "tests/study/test_ledger.py::test_a_changed_configuration_says_what_changed_and_keeps_what_is_the_same"
MEASURED = "tests/cell/test_measure.py::test_the_command_logs_a_run_and_prints_every_form"
PACKED = "tests/models/test_packed.py::test_the_commands_say_the_bytes_of_the_files"
TEAM = "tests/study/test_postgresql.py::test_two_workers_fill_a_study_and_a_search"
WAFER = "tests/cerebras/modelzoo/test_"
ANSWER = "tests/test_answer.py::test_"
OWN_ROWS = "tests/cell/test_training_set.py::test_the_command_of_the_page"
CI = ".ci/run"
BY_HAND = "by hand: "
CLEAN = BY_HAND + "from a clean clone"
CONDA = BY_HAND + "conda 26.7.1-56, a channel of Python and pip alone"
SLURM = BY_HAND + "on a real SLURM, two of its nodes on one machine, with configs/tiny_full.yaml"

# The first pattern that fits the whole command counts.
RUN = {
    r"make (demo|ui)": CLEAN,
    r"make (test|test-slow|lint|docs|image|test-cerebras)": CI,
    r"make study-page": ANSWER + "the_page_is_made_of_the_numbers_to_the_byte",
    r"make test-modelzoo MODELZOO=\S+": BY_HAND + "against ModelZoo Release_2.10.0, as docs/cerebras.md says",
    r"\. \.venv/bin/activate": CLEAN,
    r"conda env create --file conda(\.cerebras)?\.yaml": CONDA,
    r"conda activate sparse_ft": CONDA,
    r"pip install git\+GIT_URL": BY_HAND + "of this package, from a clone's git+file address, without its dependencies",
    r"pip install \.": "tests/test_cli.py::test_an_install_into_an_empty_environment_gives_the_command",
    r"sparse-ft --help": "tests/test_cli.py::test_help_lists_every_command",
    r"pip install 'sparse_ft\[.*\]'": CLEAN,
    r"mlflow server .*": TEAM,
    r"export MLFLOW_TRACKING_URI=.*": TEAM,
    r"mlflow models serve( .*)?": "tests/tracking/test_models.py::test_a_model_is_served",
    r"mlflow runs delete": BY_HAND + "a failed cell deleted, its study resumed: the cell ran again",
    r"mlflow run \. -e analyze .*": STARTED,
    r"mlflow run \. -e sweep .* -P config=configs/full.yaml -P executor=process -P resume=PARENT_RUN_ID": RESUMED,
    r"mlflow run \. -e sweep .* -P config=configs/full.yaml -P trainer=cerebras -P cerebras=SETTINGS.yaml": BY_HAND
    + "tiny models under these names, one level, device: CPU",
    r"mlflow run \. -e sweep .* -P config=configs/tiny_full.yaml .*": BY_HAND + "its time stands in docs/benchmarks.md",
    r"mlflow run \. -e sweep .* -P config=configs/smoke.yaml": CI,
    r"mlflow run \. -e sweep .* -P config=configs/smollm2.yaml": BY_HAND + "its numbers are docs/answer.md",
    r"mlflow run \. -e train .* -P num_fewshot=10 .*": BY_HAND + "its scores stand in docs/design.md",
    r"mlflow run GIT_URL -e compute_masks .*": BY_HAND + "from a clone that git daemon serves",
    r"mlflow run \. -e compute_masks --env-manager uv .*": BY_HAND + "uv 0.13.9",
    r"mlflow run \. -e (compute_masks|train) .* -P model=tiny-llama .*": STARTED,
    r"mlflow run \. -e (compute_masks|train) .* -P model=tiny-mixtral -P method=experts .*": EXPERTS,
    r"mlflow run \. -e compute_masks .* -P model=smollm2-135m .* -P scope=global": BY_HAND + "for docs/pruning.md",
    r"mlflow run \. -e validate .*": STEPS + "validate_says_0_for_a_good_pair_1_for_a_broken_one_2_for_none",
    r"mlflow run( \.)?( --env-manager local)?": PROJECT,
    r"mlflow run --env-manager uv": BY_HAND + "uv 0.13.9",
    r"sparse-ft \w+ --help": "tests/test_cli.py::test_a_commands_own_help",
    r"sparse-ft sweep --config configs/full.yaml --dry-run": HUB,
    r"sparse-ft sweep --config configs/full.yaml --executor ray .*": SLURM,
    r"sparse-ft sweep --config configs/full.yaml --executor submitit .*": "tests/study/executors/test_submitit.py"
    "::test_the_workers_are_one_array_and_ctrl_c_takes_it_from_the_queue",
    r"sparse-ft sweep --config configs/tiny_full.yaml --dry_run true": STARTED,
    r"sparse-ft train --model tiny-llama .* --train_data rows.jsonl .*": OWN_ROWS,
    r"sparse-ft train --model tiny-llama .*": STARTED,
    r"sparse-ft train --task weather .*": "tests/test_contributing.py::test_a_task_of_ones_own",
    r"sparse-ft compute_masks --model MODEL .*": STARTED,
    r"sparse-ft validate --checkpoint outputs/.*": STARTED,
    r"sparse-ft validate --checkpoint merged.mdl .*": STEPS + "masks_and_validation_read_a_cerebras_checkpoint",
    r"sparse-ft rebuild .*": TEAM,
    r"sparse-ft (un)?pack( --checkpoint .*)?": PACKED,
    r"sparse-ft measure( --checkpoint .*)?": MEASURED,
    r"mlflow run \. -e measure .*": MEASURED,
    r"mlflow run \. -e pack .*": PACKED,
    r"sparse-ft push .*": "tests/cell/test_push.py::test_checkpoint_masks_and_card_are_pushed_once_they_are_proved",
    r"sparse-ft train --task boolq --score .*": "tests/study/test_scored_studies.py",
    r"sparse-ft cerebras_configs --config configs/full.yaml .*": HUB.split("::")[0]
    + "::test_the_full_studys_configurations_for_a_cerebras",
    r"sparse-ft (NAME|train|validate|analyze|sweep|compute_masks)": STARTED,
    r"python benchmarks/(commands|live|rounding|sparse_lora)\.py .*": BY_HAND + "its table stands beside it",
    r"python -m benchmarks\.\w+ .*": BY_HAND + "its table stands beside it",
    r"python convert_hf_to_gguf.py .*": BY_HAND + "what it gave stands beside it",
    r"python -m lm_eval run": BY_HAND + "its scores were ours; what it calls is compared in tests/evaluation",
    r"python -m sparse_ft\.cerebras\.modelzoo\.cszoo fit FIT.yaml --target_device CSX --validate_only": WAFER
    + "lowering.py::test_every_mode_lowers_with_the_sparsity_that_was_measured",
    r"python -m sparse_ft\.cerebras\.modelzoo\.cszoo fit FIT.yaml --target_device CSX --job_labels .*": WAFER
    + "lowering.py::test_a_job_gets_as_far_as_the_cluster",
    r"python -m sparse_ft\.cerebras\.modelzoo\.cszoo": WAFER + "lowering.py::test_a_job_gets_as_far_as_the_cluster",
    r"export (SPARSE_FT_CEREBRAS_PYTHON|PATH)=.*": BY_HAND + "as part of make test-modelzoo",
    r"(export RAY_AUTH_MODE|ray|head|others|srun|sleep|driver|trap|wait)\b.*": SLURM,
}
COMMANDS = [" ".join(re.sub(r"\s+#.*| &$", "", command.text).split()) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_was_run(command):
    assert how(command) is not None, f"{command!r}: no test runs it, and nobody says that it was run by hand"


def test_every_entry_is_needed_and_true():
    needed = {pattern for pattern in RUN if any(first(command) == pattern for command in COMMANDS)}
    assert set(RUN) == needed
    for command in (command for command in COMMANDS if how(command) == CI):
        assert command.split(" -P ")[-1] in (ROOT / CI).read_text(encoding="utf-8"), command
    for evidence in set(RUN.values()):
        if evidence.startswith(BY_HAND):
            continue
        path, _, name = evidence.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, evidence


def test_a_command_that_nobody_ran_would_be_seen():
    assert how("mlflow run . -e sweep -P config=configs/other.yaml") is None
    assert how("make moon") is None


def first(command: str) -> str | None:
    return next((pattern for pattern in RUN if re.fullmatch(pattern, command)), None)


def how(command: str) -> str | None:
    pattern = first(command)
    return None if pattern is None else RUN[pattern]
