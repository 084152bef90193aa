"""Find the layer and the line of the network's code at which an export failed."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

__all__ = ["Place", "layers_named_in", "listed", "place_of_error", "place_of_frame",
           "words_of_error"]  # fmt: skip

_OURS = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent
# As "aten.conv2d.default", "aten::conv2d" and "aten_conv2d_default" are written.
_OPERATOR = re.compile(
    r"\b(aten|quantized_decomposed|prims|torchvision|_?c10d|higher_order)(?:::|\.)([a-z_]\w*)"
    r"(?:\.(\w+))?"
)
_MOST = 3


@dataclass(frozen=True)
class Place:
    """A line of a network's code.

    Attributes:
        layer: Path of the module in the network, as in ``"layer1.0.conv2"``; empty for the network
            itself.
        kind: The module's class.
        line: File and line, as in ``"model.py:12"``; empty where it is torch's.
        code: What stands there.
    """

    layer: str
    kind: str
    line: str
    code: str

    def __str__(self) -> str:
        what = f"{self.layer!r} ({self.kind})" if self.layer else self.kind
        where = f"{self.line} ({self.code})" if self.code else self.line
        return f"{what}, {where}" if where else what


def place_of_error(error: BaseException, network: nn.Module) -> Place | None:
    """Where in the network's own code an error was raised; ``None`` where it was elsewhere.

    Args:
        error: With its traceback; the errors from which it was raised are looked at as well.
        network: Whose layers are meant.
    """
    for one in _chain(error):
        frames: list[tuple[FrameType, int]] = []
        trace = one.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame, trace.tb_lineno))
            trace = trace.tb_next
        found = _place(reversed(frames), network)
        if found is not None:
            return found
    return None


def place_of_frame(frame: FrameType | None, network: nn.Module) -> Place | None:
    """Where in the network's own code a frame was called from; ``None`` if it was not.

    Args:
        frame: The innermost frame.
        network: Whose layers are meant.
    """

    def outwards() -> Iterator[tuple[FrameType, int]]:
        current = frame
        while current is not None:
            yield current, current.f_lineno
            current = current.f_back

    return _place(outwards(), network)


def _place(frames: Any, network: nn.Module) -> Place | None:
    """The innermost module of the network among frames, and the line of the model's own code."""
    names = {id(module): name for name, module in network.named_modules()}
    line, code = "", ""
    inner: nn.Module | None = None
    for frame, number in frames:
        file = Path(frame.f_code.co_filename)
        own = not file.is_relative_to(_TORCH) and not _is_of_deployment(file)
        if own and not line:
            line, code = f"{file.name}:{number}", _code(file, number)
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
        module = frame.f_locals.get(first)
        if isinstance(module, nn.Module) and id(module) in names and not _is_call(frame):
            inner = inner or module
        if inner is not None and line:
            break
    if inner is None:
        return None
    return Place(names[id(inner)], type(inner).__name__, line, code)


def _is_of_deployment(file: Path) -> bool:
    return file.is_relative_to(_OURS / "deploy") or file.is_relative_to(_OURS / "compress")


def _is_call(frame: FrameType) -> bool:
    """Frames of ``nn.Module.__call__``, which are the module's as well."""
    return frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "__call__")


def _code(file: Path, number: int) -> str:
    try:
        return file.read_text(encoding="utf-8").splitlines()[number - 1].strip()[:120]
    except (OSError, IndexError, UnicodeDecodeError):
        return ""


def _chain(error: BaseException) -> list[BaseException]:
    """Errors from the first cause to the one that was raised last."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return found[::-1]


def words_of_error(error: BaseException) -> str:
    """The line of an error, or of those behind it, that says most: one that names an operator.

    Returns:
        The error's kind and the line, at most 500 characters.
    """
    chain = _chain(error)
    lines = [
        (one, line.strip())
        for one in chain
        for line in re.sub(r"\x1b\[\d*m", "", str(one)).splitlines()
        if line.strip()
    ]
    naming = [(one, line) for one, line in lines if _OPERATOR.search(line)]
    said = naming or [(one, line) for one, line in lines if one is chain[-1]] or lines
    if not said:
        return type(error).__name__
    one, line = said[0]
    return f"{type(one).__name__}: {line.rstrip('.')}"[:500]


def layers_named_in(error: BaseException, program: ExportedProgram) -> list[tuple[str, str]]:
    """Layers whose nodes an exporter's error names, by the node or by its operator.

    Args:
        error: The exporter's; the errors from which it was raised are looked at as well.
        program: The network's graph.

    Returns:
        Pairs of operator and path of the layer; all layers of an operator where only that is named.
        Empty where the error names nothing that the graph has.
    """
    text = "\n".join(re.sub(r"\x1b\[\d*m", "", str(one)) for one in _chain(error))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = set(re.findall(r"%(\w+)", text))
    kinds = {(space, kind) for space, kind, _ in _OPERATOR.findall(words_of_error(error))}
    of_kind = [node for node in calls if _kind(node) in kinds]
    # An error that names one node names its inputs as well.
    found = [node for node in of_kind if node.name in names] or of_kind
    if not kinds:
        found = [node for node in calls if node.name in names and "nn_module_stack" in node.meta]
    pairs = [(".".join(_kind(node)), layer_of_node(node)) for node in found]
    return list(dict.fromkeys(pairs))


def layer_of_node(node: fx.Node) -> str:
    """Path of the module in which a node was traced, without the wrappers of deployment.

    A node outside of modules has the empty path. What a quantized layer does with its weight is
    traced in the layer's parent: such a node belongs to the layer that takes its result.
    """
    current = node
    while current.users and (
        _kind(current)[0] == "quantized_decomposed" or current.target is operator.getitem
    ):
        current = next(iter(current.users))
        if current.op != "call_function":
            current = node
            break
    stack: Mapping[str, Any] = current.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    parts = path.split(".") if path else []
    while parts and parts[0] == "network":
        parts = parts[1:]
    return ".".join(parts)


def _kind(node: fx.Node) -> tuple[str, str]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return "", ""
    space, _, kind = schema.name.partition("::")
    return space, kind


def listed(layers: Sequence[str]) -> str:
    """The first few of several layers, in words."""
    shown = ", ".join(repr(layer) for layer in layers[:_MOST])
    more = len(layers) - _MOST
    return shown + (f" and {more} more" if more > 0 else "")
