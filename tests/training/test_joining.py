"""Processes find each other wherever they are started, and one alone waits for nothing."""

import json
import os
import subprocess
import sys
import types

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster

from ogpsa_jax.errors import InputError
from ogpsa_jax.training.processes import join_processes

from .conftest import command, environment
from .test_processes import finish, free_port

# Variables of whatever machine the tests run on.
_FOREIGN = ("JAX_", "SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_", "MASTER_", "KUBERNETES_")
_TORCHRUN = {"MASTER_ADDR": "host0", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
_SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
_OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
_OPEN_MPI_4 = {**_OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.1.0.1:34"}
_GKE = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,other",
}
_GKE_ALONE = {**_GKE, "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
_SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "4",
    "MEGASCALE_SLICE_ID": "2",
}


@pytest.fixture
def joined(monkeypatch):
    """What the processes were joined by: address, their number, this one's index, its devices."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    found = []

    def initialize(
        coordinator_address=None,
        num_processes=None,
        process_id=None,
        local_device_ids=None,
        cluster_detection_method=None,
        heartbeat_timeout_seconds=100,
    ):
        assert heartbeat_timeout_seconds < 60
        address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        found.append(
            ClusterEnv.auto_detect_unset_distributed_params(
                *(address, num_processes, process_id, local_device_ids),
                *(cluster_detection_method, 1),
            )
        )

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return found


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))


def set_variables(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables, expected",
    [
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host0:99",
                "JAX_NUM_PROCESSES": "3",
                "JAX_PROCESS_ID": "2",
            },
            ("host0:99", 3, 2, None),
        ),
        (_SLURM, ("node07:61440", 16, 9, [1])),
        ({**_SLURM, "JAX_COORDINATOR_PORT": "77"}, ("node07:77", 16, 9, [1])),
        ({**_SLURM, "JAX_COORDINATOR_ADDRESS": "node07-ib:77"}, ("node07-ib:77", 16, 9, [1])),
        (_OPEN_MPI_4, ("10.96.0.1:64769", 4, 3, [1])),
        ({**_OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "host0:99"}, ("host0:99", 4, 3, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "host0:99", "PMI_SIZE": "2", "PMI_RANK": "1"},
            ("host0:99", 2, 1, None),
        ),
        (
            {**_TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            ("host0:29500", 8, 5, [1]),
        ),
        (
            {**_TORCHRUN, "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            ("host0:29501", 8, 5, [1]),
        ),
        # One process a host, as Kubeflow's PyTorchJob starts them: it has all devices.
        (_TORCHRUN, ("host0:29500", 8, 5, None)),
        ({**_TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, ("host0:29500", 8, 5, None)),
        # torchrun within a job step of one task per host: the process is torchrun's.
        ({**_SLURM, **_TORCHRUN, "LOCAL_RANK": "1"}, ("host0:29500", 8, 5, [1])),
    ],
)
def test_processes_are_joined_by_what_their_launcher_says(variables, expected, joined, monkeypatch):
    set_variables(monkeypatch, variables)
    join_processes()
    address, count, index, devices = joined[0]
    # Slurm and Open MPI: JAX derives the port from the job.
    if address != expected[0]:
        assert address.rpartition(":")[0] == expected[0].rpartition(":")[0]
    assert (count, index, devices) == expected[1:]


@pytest.mark.parametrize(
    "variables, expected",
    [
        (_GKE, ("localhost:8482", 2, 1)),
        ({**_GKE, **_SLICES}, ("localhost:8482", 8, 5)),
        ({**_GKE_ALONE, **_SLICES}, ("localhost:8482", 4, 2)),
    ],
)
def test_tpu_workers_in_kubernetes_are_joined(variables, expected, joined, on_tpu, monkeypatch):
    set_variables(monkeypatch, variables)
    join_processes()
    address, count, index, devices = joined[0]
    assert (address, count, index, devices) == (*expected, None)


def metadata_of(worker, hosts, slices):
    lines = "".join(f"{name}: '{value}'\n" for name, value in slices.items())
    entries = {
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(f"unknown:{n}:{host}" for n, host in enumerate(hosts)),
        "tpu-env": f"ACCELERATOR_TYPE: 'v5p-16'\n{lines}",
    }
    return lambda key: (entries[key], 200) if key in entries else ("", 404)


@pytest.mark.parametrize(
    "slices, expected", [({}, (4, 3)), (_SLICES, (16, 11))], ids=["one slice", "four slices"]
)
def test_tpu_virtual_machines_are_joined(slices, expected, joined, on_tpu, monkeypatch):
    hosts = ["127.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", metadata_of(3, hosts, slices))
    join_processes()
    host = "localhost" if slices else "127.0.0.1"
    assert joined == [(f"{host}:8482", *expected, None)]


def test_pods_of_a_kubernetes_job_are_joined(joined, monkeypatch):
    set_variables(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"})
    (cluster,) = (each for each in ClusterEnv._cluster_types if each.__name__ == "K8sCluster")
    monkeypatch.setattr(cluster, "is_env_present", classmethod(lambda cls: True))
    metadata = types.SimpleNamespace(
        name="run", labels={"jobset.sigs.k8s.io/jobset-name": "ours"}, owner_references=[]
    )
    job = types.SimpleNamespace(metadata=metadata, spec=types.SimpleNamespace(parallelism=4))
    for name, value in {
        "_job": job,
        "_pod": None,
        "_controller": types.SimpleNamespace(kind="Job"),
    }.items():
        monkeypatch.setattr(cluster, name, classmethod(lambda cls, value=value: value))
    monkeypatch.setattr("socket.gethostbyname", lambda host: "10.0.0.9")
    join_processes()
    assert joined == [("run-0.ours:55527", 4, 2, None)]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**_SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # an interactive step of a larger job
        {**_SLURM, "SLURM_NTASKS": "1"},
        {**_TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        {**_OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a notebook
        _GKE_ALONE,
    ],
)
def test_a_process_alone_joins_nothing(variables, joined, on_tpu, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", metadata_of(0, ["localhost"], {}))
    set_variables(monkeypatch, variables)
    join_processes()
    assert joined == []


@pytest.mark.parametrize(
    "variables, sentence",
    [
        (_OPEN_MPI, "set JAX_COORDINATOR_ADDRESS to host:port of rank 0, or install mpi4py"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES is not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"},
            "JAX_PROCESS_ID is not",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            r"cannot be joined \(invalid literal.*'two'",
        ),
        ({**_TORCHRUN, "MASTER_PORT": "x"}, r"cannot be joined \(invalid literal.*'x'"),
    ],
)
def test_an_environment_that_says_too_little_is_told(variables, sentence, joined, monkeypatch):
    set_variables(monkeypatch, variables)
    with pytest.raises(InputError, match=sentence):
        join_processes()
    assert joined == []


def test_two_processes_are_joined_by_the_variables_of_torchrun(
    ground, compilation_cache_dir, tmp_path
):
    settings = ("mesh.data=2", "mesh.fsdp=1", "train.steps=1", "data.eval={}")
    arguments = (ground / "run.yaml", f"output_dir={tmp_path / 'run'}", *settings)
    port = str(free_port())
    processes = [
        subprocess.Popen(
            command(*arguments),
            env=environment(
                compilation_cache_dir,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                WORLD_SIZE="2",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = finish(processes)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert json.loads((tmp_path / "run/summary.json").read_text())["devices"] == "2 x cpu"


def test_torchrun_starts_a_run(ground, compilation_cache_dir, tmp_path):
    pytest.importorskip("torch", reason="torchrun is a part of torch, which is absent")
    settings = ("mesh.data=2", "mesh.fsdp=1", "train.steps=1", "data.eval={}")
    port = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    end = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port),
            *("-m", "ogpsa_jax.cli", "train", str(ground / "run.yaml")),
            *(f"output_dir={tmp_path / 'run'}", *settings),
        ],
        env=environment(compilation_cache_dir),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert end.returncode == 0, end
    assert json.loads((tmp_path / "run/summary.json").read_text())["devices"] == "2 x cpu"
