"""What an optimised XLA program sends between devices: read from its text, loops multiplied out."""

import dataclasses
import math
import re

import numpy as np

from duplex_jax.parallel import MeshSpec

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BETWEEN_SLICES = "between slices"
"""The kind of transfers between TPU slices, which a program leaves to the host (`send` to the megascale runtime)."""

_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}

# Of a ring over n devices, for a result of S bytes: bytes that each sends over S. A reduce-scatter's S is its small
# result.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

_SHAPE = re.compile(r"\b(pred|s8|u8|bf16|f16|s32|u32|f32|s64|f64)\[([\d,]*)\]")
_OPENING = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count["\s:{]+n["\s:]+"?(\d+)')
_ENDS_ASYNC = re.compile(r"-(?:update|done)\(")
_MEGASCALE = re.compile(r'\ssend\(.*_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
        kind: one of `KINDS`, or `BETWEEN_SLICES`.
        times: how often a step runs it.
        sent: bytes that a device sends each time.
        near: whether all of it stays within a GPU host or a TPU slice.
    """

    kind: str
    times: int
    sent: float
    near: bool


def read(hlo: str, spec: MeshSpec) -> list[Collective]:
    """The collectives of an optimised program."""
    lines: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        if opened := _OPENING.match(line.strip()):
            name = opened.group(1)
            lines[name] = []
            entry = name if line.strip().startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)
    found: list[Collective] = []

    def visit(computation: str, times: int) -> None:
        for line in lines.get(computation, []):
            trips = times * _trips(line, lines) if " while(" in line else times
            # An asynchronous operation names its computation at the start, at each update, and at the end.
            for called in [] if _ENDS_ASYNC.search(line) else _CALLED.findall(line):
                visit(called, trips)
            for branches in _BRANCHES.findall(line):
                for called in branches.split(","):
                    visit(called.strip().lstrip("%"), times)
            if collective := _collective(line, times, spec):
                found.append(collective)

    visit(entry, 1)
    return found


def by_kind(collectives: list[Collective]) -> dict[str, tuple[int, float]]:
    """Kind to (instructions, bytes that a device sends) in a step."""
    sums: dict[str, tuple[int, float]] = {}
    for c in collectives:
        n, total = sums.get(c.kind, (0, 0.0))
        sums[c.kind] = (n + c.times, total + c.times * c.sent)
    return sums


def seconds(collectives: list[Collective], spec: MeshSpec) -> float:
    """How long a step's transfers take at full link rates, one after the other."""
    rates = {True: spec.chip.link, False: spec.chip.network}
    return sum(c.times * c.sent / rates[c.near] for c in collectives)


def _collective(line: str, times: int, spec: MeshSpec) -> Collective | None:
    if found := _MEGASCALE.search(line):
        kind, dims = _SHAPE.findall(line)[0]
        share = (spec.slice - 1) / spec.slice * (2 if found.group(1) == "ALL_REDUCE" else 1)
        return Collective(BETWEEN_SLICES, times, share * _bytes(kind, dims), near=False)
    for kind in KINDS:
        if re.search(rf"\s{kind}(-start)?\(", line):
            groups = _groups(line, spec)
            if len(groups[0]) > 1:
                sent = _result_bytes(line, kind) * _SENT[kind](len(groups[0]))
                return Collective(kind, times, sent, all(_near(group, spec) for group in groups))
    return None


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA noted it, else by the constant that its condition compares with, else 1."""
    if noted := _TRIPS.search(line):
        return int(noted.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = lines.get(condition.group(1), []) if condition else []
    compared = next((re.search(r"compare\((.*)\), direction=LT", x) for x in body if "ROOT" in x), None)
    for name in re.findall(r"%([\w.\-]+)", compared.group(1)) if compared else []:
        for x in body:
            if constant := re.match(rf"\s*%{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)", x):
                return int(constant.group(1))
    return 1


def _bytes(kind: str, dims: str) -> float:
    return float(_DTYPE_BYTES[kind] * math.prod(_numbers(dims)))


def _result_bytes(line: str, kind: str) -> float:
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(line.split(f" {kind}", 1)[0])]
    # A started collective's type lists its operands before its results, but for an all-reduce.
    if f"{kind}-start(" in line and len(sizes) > 1 and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[:1]
    return sum(sizes)


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]


def _devices(sizes: str | None, order: str | None, count: int = 0) -> np.ndarray:
    """Places in the mesh as XLA writes them, `[8,8]T(1,0)`: counted in `sizes`, then transposed."""
    shape = _numbers(sizes) or [count]
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) or None)


def _groups(line: str, spec: MeshSpec) -> list[list[int]]:
    """The groups of devices that a collective joins, by their places in the mesh."""
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[\d+,(\d+)\]<={order}", line):
        return _devices(found.group(2), found.group(3)).reshape(-1, int(found.group(1))).tolist()
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]+\})\}", line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found.group(1))]
    # mesh['axis_0'=1,'axis_1'=16], device_ids=([4,4]T(1,0)) {'axis_1'}
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))? \{{([^}}]*)\}}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        joined = re.findall(r"'(\w+)'", found.group(4))
        devices = _devices(found.group(2), found.group(3), math.prod(axes.values())).reshape(list(axes.values()))
        devices = np.moveaxis(devices, [list(axes).index(name) for name in joined], range(-len(joined), 0))
        return devices.reshape(-1, math.prod(axes[name] for name in joined)).tolist()
    return [list(range(spec.size))]


def _near(group: list[int], spec: MeshSpec) -> bool:
    """Whether devices reach each other over the fast network: that of one TPU slice, or of one GPU host."""
    size = spec.size // (spec.slice if spec.platform == "tpu" else spec.hosts)
    return len({device // size for device in group}) == 1
