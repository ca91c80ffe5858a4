"""What a step of experts over many ranks takes, on paper: from rates of the machine and the sizes of a layer.

The busiest rank decides: its rows are computed at the rate that is known for so many rows of an expert, and
travel over two levels of links, inside a node and between nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_impls.interface import GATED_ACTIVATIONS
from moe_impls.models import Model

SEED = 0


class Links(NamedTuple):
    """One direction of an exchange: a latency, and bytes a second of a rank inside its node and out of it."""

    latency_s: float
    inside: float
    outside: float

    def seconds(self, inside: float, outside: float) -> float:
        """Return the time in which a rank moves so many bytes; both levels work at once."""
        if inside + outside == 0:
            return 0.0
        return self.latency_s + max(inside / self.inside, outside / self.outside)


@dataclass(frozen=True)
class Cluster:
    """What ranks compute and send with.

    node: ranks in a node. bytes_out, bytes_back: of a value that is dispatched and that comes back, with what
    scales it. sync_s: counts that are exchanged and read by the host before rows move.
    flops: of products of so many rows with one expert's weights, by rows; see `rates`. memory: bytes a second
    at which weights are read. width: bytes of a weight.
    """

    name: str
    node: int
    dispatch: Links
    combine: Links
    bytes_out: float
    bytes_back: float
    flops: Callable[[float], float]
    memory: float
    width: float = 2.0
    sync_s: float = 0.0


# https://github.com/deepseek-ai/DeepEP/blob/main/docs/legacy.md: H800, 160 GB/s of NVLink and 50 of RDMA at
# most; low-latency kernels, 128 tokens a rank, 7168 features, 8 of 256 experts; microseconds by ranks.
DEEPEP = {
    "dispatch": {16: 118, 32: 155, 64: 173, 128: 192, 256: 194},
    "combine": {16: 195, 32: 273, 64: 314, 128: 369, 256: 360},
}
PUBLISHED_RANKS = 256  # beyond which nothing is published
FP8 = 1 + 4 / 128  # a byte, and a float32 scale for each 128
H800 = Cluster(
    "h800",
    node=8,
    dispatch=Links(35e-6, 160e9, 46.3e9),
    combine=Links(6e-6, 160e9, 39.9e9),
    bytes_out=FP8,
    bytes_back=2.0,
    flops=lambda rows: 989e12,  # dense, in bfloat16, on its data sheet
    memory=3.35e12,
    width=1.0,
)


class Predicted(NamedTuple):
    """A forward of one layer, or a step with its backward.

    busiest: rows of the busiest rank over the mean. memory_bytes: of its weights and the rows that it sends.
    """

    busiest: float
    local_s: float
    dispatch_s: float
    combine_s: float
    sync_s: float
    step_s: float
    memory_bytes: float


def predict(
    model: Model,
    ranks: int,
    tokens: int,
    cluster: Cluster,
    *,
    load: str = "uniform",
    merged: bool = False,
    backward: bool = False,
    overlap: bool = False,
) -> Predicted:
    """Predict a step of one layer with so many tokens on each rank.

    Args:
        load: uniform, or zipf_<exponent>. merged: one row for each rank that a token visits. overlap: half of
            the batch is computed while the other half travels.

    Raises:
        ValueError: there are more ranks than experts, or the load is another.
    """
    if not 1 <= ranks <= model.E:
        raise ValueError(f"ranks is {ranks}; it must be from 1 to E, {model.E} of {model.name}")
    rows = tokens * (
        visited(model.E, model.K, ranks) if merged else model.K
    )  # that a rank sends, its own too
    slots = busiest_slots(model.E, model.K, ranks, tokens, load)  # of the busiest rank, by expert
    busiest = float(slots.sum()) / (tokens * model.K)
    near, far = (n / ranks for n in (min(cluster.node, ranks) - 1, max(0, ranks - cluster.node)))

    def travel(links: Links, width: float) -> float:
        n_bytes = rows * busiest * model.D * width
        return links.seconds(n_bytes * near, n_bytes * far)

    values = model.D * model.H * (3 if model.activation in GATED_ACTIVATIONS else 2)  # of an expert's weights
    reading = values * cluster.width / cluster.memory
    of_experts = [max(2 * n * values / cluster.flops(n), reading) for n in slots.tolist() if n]
    times = 3 if backward else 1
    local = times * sum(of_experts)
    dispatch, combine = (travel(*way) for way in (
        (cluster.dispatch, cluster.bytes_out), (cluster.combine, cluster.bytes_back)
    ))  # fmt: skip
    if backward:  # dy goes the way of x, and dx that of y
        dispatch, combine = 2 * dispatch, 2 * combine
    sync = cluster.sync_s if ranks > 1 else 0.0
    moving = dispatch + combine
    step = sync + (max(local, moving) + min(local, moving) / 2 if overlap else local + moving)
    held = math.ceil(model.E / ranks) * values * cluster.width
    buffers = rows * busiest * model.D * (cluster.bytes_out + cluster.bytes_back)
    return Predicted(busiest, local, dispatch, combine, sync, step, held + buffers)


def visited(E: int, K: int, ranks: int) -> float:
    """Return how many ranks a token visits on average, if its K of E experts are any."""
    held = E / ranks
    none = math.exp(sum(math.log1p(-held / (E - k)) for k in range(K))) if held + K <= E else 0.0
    return ranks * (1 - none)


def busiest_slots(E: int, K: int, ranks: int, tokens: int, load: str) -> np.ndarray:
    """Draw the slots of each expert, and return those of the rank that has most.

    A token's slots are drawn one by one here, and no expert gets more than a share of 1 / K.
    """
    weight = np.ones(E)
    if load != "uniform":
        name, _, exponent = load.partition("_")
        if name != "zipf" or not exponent.replace(".", "", 1).isdigit():
            raise ValueError(f"load is {load!r}; valid are uniform and zipf_<exponent>")
        weight = np.arange(1, E + 1) ** -float(exponent)
    generator = np.random.default_rng(SEED)
    share = generator.permutation(weight / weight.sum())
    for _ in range(E):
        over = share > 1 / K
        if not over.any() or over.all():
            break
        share[~over] *= (1 - over.sum() / K) / share[~over].sum()
        share[over] = 1 / K
    slots = generator.multinomial(ranks * tokens * K, share / share.sum())
    held = -(-E // ranks)
    return max((slots[begin : begin + held] for begin in range(0, E, held)), key=np.sum)


def rates(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Make a rate by rows of an expert of measured ones: between them by logarithms, beyond them constant."""
    rows, found = zip(*sorted(points), strict=True)
    return lambda n: float(np.exp(np.interp(np.log(max(n, 1e-9)), np.log(rows), np.log(found))))


def against_deepep(model: Model) -> dict[tuple[str, int], tuple[float, float]]:
    """Pair what is published of DeepEP's kernels with what is predicted: seconds, by direction and ranks."""
    found = {}
    for way, width in (("dispatch", H800.bytes_out), ("combine", H800.bytes_back)):
        links: Links = getattr(H800, way)
        for ranks, microseconds in DEEPEP[way].items():
            n_bytes = 128 * model.K * model.D * width
            inside, outside = (n_bytes * n / ranks for n in (H800.node - 1, ranks - H800.node))
            found[way, ranks] = microseconds * 1e-6, links.seconds(inside, outside)
    return found


class OwnLinks(NamedTuple):
    """Of this machine: seconds of a collective, and bytes a second."""

    latency_s: float
    bandwidth: float


def fit(cells: Sequence[tuple[int, float, float]]) -> OwnLinks:
    """Fit links to (collectives, bytes, seconds beside the local ones), with what is negative as zero."""
    counts, n_bytes, seconds = (np.array(column, dtype=float) for column in zip(*cells, strict=True))
    matrix = np.stack([counts, n_bytes], axis=1)
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1
    solved = np.linalg.lstsq(matrix / scale, seconds, rcond=None)[0] / scale
    latency, per_byte = (max(0.0, float(value)) for value in solved)
    if per_byte == 0:
        latency = float((counts * seconds).sum() / (counts * counts).sum())
    return OwnLinks(max(0.0, latency), 1 / per_byte if per_byte else math.inf)
