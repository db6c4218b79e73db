"""Several processes as one run: how they join, and how all end when one is lost.

JAX finds the other processes on Cloud TPUs (one slice or several), under Slurm, Open MPI 4 and in
Kubernetes jobs. Variables of its own, and those of torchrun, say it anywhere else.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from ogpsa_jax.errors import InputError
from ogpsa_jax.training.preemption import Terminated

logger = logging.getLogger(__name__)
PEER_LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command again may succeed
_HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as lost
_LEAVE_SECONDS = 10  # that a process which failed waits for the others to fail too
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
# What errors of collectives and of the coordination service say when the other end is gone.
_COMMUNICATION = re.compile(
    r"gloo|nccl|by peer|socket closed|coordination service|heartbeat|unhealthy", re.IGNORECASE
)
_OF_JAX = (jax.errors.JaxRuntimeError, ValueError, RuntimeError)
# As the command line ends on them.
_EXIT_CODES = (
    (InputError, 2),
    (ModuleNotFoundError, 2),
    (OSError, 2),
    (MemoryError, 2),
    (KeyboardInterrupt, 130),
)
_kept: list[Any] = []  # what C++ calls must not be collected


class PeerLost(SystemExit):
    """Another process of the run is gone; exit code 75. The same command resumes the run."""


def join_processes() -> None:
    """Make this process one of several, if the environment says that it is.

    Must come before anything asks for devices. Alone, it returns at once.

    Raises:
      InputError: the environment names a cluster, but not all that is needed to join it.
      PeerLost: the others did not come.
    """
    if jax.distributed.is_initialized():
        return
    try:
        arguments = _cluster_arguments()
        if arguments is not None:
            _initialize(**arguments)
    except InputError:
        raise
    except Exception as error:  # of JAX's detection, or of the cluster that it asks
        if isinstance(error, jax.errors.JaxRuntimeError) or "bad_cast" in str(error):
            _leave_at_exit(PEER_LOST)
            _say("the other processes of this run did not join in time")
            raise PeerLost(PEER_LOST) from None
        raise InputError(
            f"environment: the processes of this run cannot be joined ({_first_line(error)}); see "
            "docs/cluster.md, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error


def everywhere(here: bool) -> bool:
    """Whether `here` is true in every process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """While active, a failure of one of several processes ends all of them.

    A process that fails leaves without waiting for the others, so that they notice.

    Raises:
      PeerLost: what failed is the exchange with another process.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or isinstance(error, Terminated):
            raise  # alone, or all have agreed to end
        if type(error) in _OF_JAX and _COMMUNICATION.search(str(error)):
            _leave_at_exit(PEER_LOST)
            _say(f"another process of this run is lost ({_first_line(error)})")
            raise PeerLost(PEER_LOST) from None
        _leave_at_exit(next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1))
        raise


def _cluster_arguments() -> dict[str, Any] | None:
    """What to give to ``jax.distributed.initialize``; None for a process alone."""
    variables = os.environ
    cluster = _detected_cluster()
    if address := variables.get("JAX_COORDINATOR_ADDRESS"):
        if "JAX_NUM_PROCESSES" not in variables and "JAX_PROCESS_ID" not in variables:
            for count, index in _MPI:
                if count in variables and index in variables:
                    return _arguments(address, variables[count], variables[index])
            if cluster is not None:
                return {"cluster_detection_method": cluster.name or None}
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if name not in variables:
                raise InputError(
                    f"environment: JAX_COORDINATOR_ADDRESS is set, but {name} is not; set "
                    "JAX_NUM_PROCESSES and JAX_PROCESS_ID as well."
                )
        return _arguments(address, variables["JAX_NUM_PROCESSES"], variables["JAX_PROCESS_ID"])
    if all(name in variables for name in _TORCHRUN):
        return _torchrun_arguments()
    if cluster is not None:
        return {"cluster_detection_method": cluster.name or None}
    if any(int(variables.get(count, 1)) > 1 for count, _ in _MPI):
        if importlib.util.find_spec("mpi4py") is not None:
            return {"cluster_detection_method": "mpi4py"}
        raise InputError(
            "environment: mpirun has started several processes but does not say where the first "
            "one is; set JAX_COORDINATOR_ADDRESS to host:port of rank 0, or install mpi4py."
        )
    return None


def _arguments(address: str, count: str, index: str) -> dict[str, Any]:
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def _torchrun_arguments() -> dict[str, Any] | None:
    """Of the variables that torchrun, and whatever starts processes like it, sets."""
    host, master, count, index = (os.environ[name] for name in _TORCHRUN)
    if int(count) == 1:
        return None
    # torchrun itself listens at its port; the next one is then free on the same host.
    taken = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = os.environ.get("JAX_COORDINATOR_PORT") or str(int(master) + taken)
    arguments = _arguments(f"{host}:{port}", count, index)
    # Several processes on this host have one device each, as torch has it.
    if int(os.environ.get("LOCAL_WORLD_SIZE", 2)) > 1 and "LOCAL_RANK" in os.environ:
        arguments["local_device_ids"] = [int(os.environ["LOCAL_RANK"])]
    return arguments


def _detected_cluster() -> type[ClusterEnv] | None:
    """The cluster that JAX detects, if this job has several processes there."""
    skipped = set()
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        skipped.add("SlurmCluster")  # an interactive step, in a job that may have more tasks
    if "JOB_COMPLETION_INDEX" not in os.environ:
        skipped.add("K8sCluster")  # a pod that is not one of an indexed job
    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or cluster.__name__ in skipped:
            continue
        try:
            present = cluster.is_env_present()
        except Exception as error:  # of a service that it asks
            logger.warning("%s was not detected: %s", cluster.__name__, _first_line(error))
            continue
        if present:
            return cluster if cluster.get_process_count() > 1 else None
    return None


def _initialize(**arguments: Any) -> None:
    """Join, so that the loss of another process is said in one sentence, with exit code 75.

    By itself JAX aborts with the stack of a C++ thread. It takes a callback for this that its
    public function does not, and some versions fail to call it (std::bad_cast, which ends in
    std::terminate).
    """
    module = distributed._jax
    connect = module.get_distributed_runtime_client

    def connect_and_watch(*args: Any, **options: Any) -> Any:
        return connect(*args, **options, missed_heartbeat_callback=_on_lost_peer)

    if _catch_bad_cast():
        module.get_distributed_runtime_client = connect_and_watch
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **arguments)
    finally:
        module.get_distributed_runtime_client = connect


def _catch_bad_cast() -> bool:
    """Make std::terminate after a std::bad_cast call `_on_lost_peer`; whether this is possible."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current = (
            library._ZSt13set_terminatePFvvE,
            getattr(library, "__cxa_current_exception_type"),
        )
    except (OSError, AttributeError):
        return False
    handler_type = ctypes.CFUNCTYPE(None)
    set_terminate.restype = current.restype = ctypes.c_void_p

    def terminate() -> None:
        info = current()  # a std::type_info: a table of methods, then the name
        name = info and ctypes.c_char_p.from_address(info + ctypes.sizeof(ctypes.c_void_p)).value
        if name == b"St8bad_cast":
            _on_lost_peer()
        handler_type(before)()

    handler = handler_type(terminate)
    before = set_terminate(handler)
    _kept.append(handler)
    return True


def _on_lost_peer(*_: object) -> NoReturn:
    """End at once, from a thread of C++, while the main thread waits for an answer."""
    _say("another process of this run ended or does not answer")
    os._exit(PEER_LOST)


def _leave_at_exit(code: int) -> None:
    """When Python exits, do not wait minutes for processes that wait for this one."""

    def leave() -> None:
        if code != PEER_LOST:
            # Where all fail alike, all come here, and none must take another for lost.
            def shut_down() -> None:
                with contextlib.suppress(Exception):
                    jax.distributed.shutdown()  # type: ignore[no-untyped-call]

            thread = threading.Thread(target=shut_down, daemon=True)
            thread.start()
            thread.join(_LEAVE_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)


def _say(what: str) -> None:
    state = distributed.global_state
    sys.stderr.write(
        f"\nogpsa-jax: {what}, so this one (process {state.process_id} of {state.num_processes}) "
        f"ends with exit code {PEER_LOST}; start all of them again, and the run resumes from its "
        "newest checkpoint.\n"
    )
    sys.stderr.flush()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
