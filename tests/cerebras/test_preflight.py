import sys

from sparse_ft.cerebras.preflight import preflight


def test_this_environment_has_everything_but_modelzoo_and_a_cluster(tmp_path, monkeypatch):
    monkeypatch.delenv("CEREBRAS_WAFER_SCALE_CLUSTER_DEFAULTS", raising=False)
    problems = preflight(sys.executable, "CSX", cluster_config=tmp_path / "config_v2")
    modelzoo = [line for line in problems if "ModelZoo 2.10" in line]
    assert [line for line in problems if line not in modelzoo] == [
        f"No cluster is known here: {tmp_path / 'config_v2'} is missing. Use a login node, or give mgmt_address."
    ]
    (tmp_path / "config_v2").write_text("{}")
    assert preflight(sys.executable, "CSX", cluster_config=tmp_path / "config_v2") == modelzoo
    assert preflight(sys.executable, "CPU") == modelzoo


def test_an_environment_without_cerebras(tmp_path):
    assert "no Python at" in preflight(str(tmp_path / "python"), "CPU")[0]
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # no site-packages
    bare.chmod(0o755)
    problems = preflight(str(bare), "CSX", mgmt_address="10.0.0.1")
    assert any("cerebras-pytorch 2.10" in line for line in problems)
    assert any("this project" in line for line in problems)


def test_files_and_mounts(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    config = {
        "trainer": {
            "init": {
                "backend": {"cluster_config": {"mount_dirs": [str(tmp_path / "elsewhere")]}},
                "callbacks": [
                    {"SparseMask": {"masks": str(tmp_path / "m.npz"), "hf_config": str(data), "mode": "full"}}
                ],
            },
            "fit": {"train_dataloader": {"data_dir": str(data)}, "ckpt_path": str(tmp_path / "start.mdl")},
        }
    }
    problems = preflight(sys.executable, "CSX", config, mgmt_address="10.0.0.1")
    assert f"ckpt_path {tmp_path / 'start.mdl'} does not exist." in problems
    assert f"masks {tmp_path / 'm.npz'} does not exist." in problems
    assert f"data_dir {data} lies in no mount_dirs." in problems
    assert not any("hf_config" in line for line in problems)
    config["trainer"]["init"]["backend"]["cluster_config"]["mount_dirs"] = [str(tmp_path)]
    assert not any("mount_dirs" in line for line in preflight(sys.executable, "CSX", config, mgmt_address="10.0.0.1"))
