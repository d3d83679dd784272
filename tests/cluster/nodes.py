"""Several raylets on one machine as a cluster, in a process of their own: `python nodes.py`, then a command a line.

add CPUS -> the node's id; kill ID: at once, as when a machine is lost; drain ID: a cloud's notice, two minutes ahead.
The first line printed is the address.
"""

import os
import sys
import time

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

from ray._raylet import GcsClient  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # noqa: E402


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        what, subject = line.split()
        if what == "add":
            node = cluster.add_node(num_cpus=int(subject))
            nodes[node.node_id] = node
            print(node.node_id, flush=True)
        elif what == "kill":
            cluster.remove_node(nodes.pop(subject), allow_graceful=False)
            print("killed", flush=True)
        elif what == "drain":
            preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            ahead = int((time.time() + 120) * 1000)
            print(GcsClient(address=cluster.address).drain_node(subject, preempted, "preempted", ahead), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
