"""Ray: the cluster that it finds, else this machine."""

import logging
import os

import ray

from uhd_export.runtime.errors import UhdError


def connect(devices: int, *, cpus: float, gpus: float) -> None:
    """Connect to the cluster at RAY_ADDRESS, else start one here for `devices` of `cpus` and `gpus` each.

    Raises UhdError where this machine has fewer: a cluster may grow, and is waited for.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UhdError(f"RAY_ADDRESS: no cluster is reached ({error}); start it, or unset it") from None
    if "RAY_ADDRESS" in os.environ:
        return
    for kind, needed in (("GPU", devices * gpus), ("CPU", devices * cpus)):
        there = ray.cluster_resources().get(kind, 0)  # type: ignore[no-untyped-call]
        if there < needed:
            ray.shutdown()
            raise UhdError(
                f"--cluster {devices}: {needed:g} {kind}s are needed, this machine has {there:g}; set "
                "RAY_ADDRESS to a cluster, or use fewer devices or --threads"
            )
