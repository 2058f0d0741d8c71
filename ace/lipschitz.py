"""How far a change of a layer's output can move the output of the model: by a bound, or by an estimate."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from ace.calls import map_tensors, tensors_in
from ace.errors import AceError
from ace.groups import jvp
from ace.probing import is_scripted
from ace.relaxation import relaxations
from ace.symmetry import Samples, by_sample

_CONSTANTS: dict[type[nn.Module], Callable[[Any], float | None]] = {
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh), lambda _: 1.0),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), lambda _: 1.0),  # in eval mode
    **dict.fromkeys((nn.Softsign, nn.LogSigmoid), lambda _: 1.0),
    nn.Sigmoid: lambda _: 0.25,
    nn.Softplus: lambda _: 1.0,
    nn.LeakyReLU: lambda layer: max(1.0, abs(layer.negative_slope)),
    nn.ELU: lambda layer: max(1.0, abs(layer.alpha)),
    nn.SiLU: lambda _: 1.1,  # its largest slope is 1.0998
    nn.GELU: lambda _: 1.13,  # 1.1289, and the same to four digits with approximate="tanh"
    nn.Linear: lambda layer: _norm(layer.weight),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda layer: _convolution(layer)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), lambda layer: _batch_norm(layer)),
}
"""Layer type -> Lipschitz constant (an upper bound of it) of a layer in eval mode, None where it has none."""

_FUNCTIONS: dict[Any, float] = {
    **dict.fromkeys((torch.relu, nn.functional.relu, "relu", torch.tanh, nn.functional.tanh, "tanh"), 1.0),
    **dict.fromkeys((torch.sigmoid, nn.functional.sigmoid, "sigmoid"), 0.25),
    **dict.fromkeys((nn.functional.silu,), 1.1),
    **dict.fromkeys((nn.functional.gelu,), 1.13),
    **dict.fromkeys((torch.abs, "abs", operator.neg, torch.neg, "neg"), 1.0),
    # the same entries in another order, or some of them
    **dict.fromkeys((torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.movedim), 1.0),
    **dict.fromkeys((torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.clone), 1.0),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze"), 1.0),
    **dict.fromkeys(("unsqueeze", "contiguous", "clone", "chunk", "split"), 1.0),
}
"""Function or method of one tensor -> its Lipschitz constant."""

_SUMS = (operator.add, operator.sub, torch.add, torch.sub, "add", "sub")
_JOINS = (torch.cat, torch.stack)
_MEANS = {torch.mean: -0.5, "mean": -0.5, torch.sum: 0.5, "sum": 0.5}
"""Reduction of n entries to one -> the power of n in its norm."""


class Unbounded(AceError):
    """No Lipschitz constant is known; the message says of what."""


def bound_after(model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    r"""Bound how far a change of a layer's output moves the output of the model.

    .. math:: \|F(y + \delta) - F(y)\| \le \Lambda \|\delta\|

    for every y and δ, where F is the model as a function of the output y of the layer, all else being fixed. The model
    is traced; the constant is carried from operation to operation: times the operator norm of a linear map, times the
    largest slope of an activation, summed where branches are added, root of the sum of squares where they are joined.

    Args:
        model: A model in eval mode, without relaxation terms.
        path: The layer, which is called once.
        args: Positional arguments of the model; their shapes tell what is broadcast.
        kwargs: Keyword arguments.

    Returns:
        The constant Λ.

    Raises:
        Unbounded: The model cannot be traced, or holds something of which no constant is known.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = nn.init.constant_(model[2].weight, 3.0)
        >>> round(bound_after(model, "0", (torch.ones(1, 2),), {}), 6)
        4.242641
    """
    if not path:
        return 1.0
    known = {name: constant for name, layer in model.named_modules() if (constant := _constant(layer)) is not None}
    graph = _trace(model, {path, *known}, args, kwargs)
    reach: dict[fx.Node, float] = {}
    met = False
    for node in graph.nodes:
        inside = [reach[parent] for parent in node.all_input_nodes]
        if node.op == "call_module" and node.target == path:
            if met or any(inside):
                raise Unbounded(f"{path} is called more than once")
            met, reach[node] = True, 1.0
        elif node.op == "output":
            return math.sqrt(sum(reach[parent] ** 2 for parent in node.all_input_nodes))
        else:
            reach[node] = _carry(model, node, reach, known) if any(inside) else 0.0
    raise AssertionError("a graph ends with its output")


def _trace(model: nn.Module, leaves: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """Return the graph of a model, with the shapes of its values."""
    where: list[str] = []

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return name in leaves or is_scripted(module)

        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            try:
                return super().call_module(m, forward, args, kwargs)
            except Exception:
                where.append(f"{self.path_of_module(m)} ({type(m).__name__})")  # the innermost comes first
                raise

    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        fixed = {name: value for name, value in bound.arguments.items() if not list(tensors_in(value))}
        graph = Tracer().trace(model, fixed)
        with torch.no_grad():
            found = ShapeProp(fx.GraphModule(model, graph)).propagate(*bound.arguments.values())
            expected = model(*args, **kwargs)
    except Exception as error:  # whatever a forward that is no graph leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = where[0] if where else f"the model itself ({type(model).__name__})"
        raise Unbounded(f"the forward of {place} cannot be traced: {reason}") from None
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    if not all(torch.allclose(here, there) for (_, here), (_, there) in pairs):
        raise Unbounded("the forward cannot be traced: it takes another branch when it is")
    return graph


def _carry(model: nn.Module, node: fx.Node, reach: dict[fx.Node, float], known: dict[str, float]) -> float:
    """Return the constant of a node from those of its inputs, one of which at least is not 0."""
    moved = [parent for parent in node.all_input_nodes if reach[parent]]
    only = reach[moved[0]] if len(moved) == 1 and node.args and node.args[0] is moved[0] else None
    if node.op == "call_module":
        name = str(node.target)
        if name not in known or only is None:
            raise Unbounded(f"no Lipschitz constant is known of {name} ({type(model.get_submodule(name)).__name__})")
        return known[name] * only
    target = node.target
    if (target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")) or target in ("size", "dim"):
        return 0.0
    if target in _SUMS and len(node.args) == 2 and not node.kwargs:
        if any(_shape(parent) != _shape(node) for parent in moved):
            raise Unbounded(f"{_name(node)} repeats a tensor that depends on the layer")
        return sum(reach[part] for part in node.args if isinstance(part, fx.Node))
    if target in _JOINS:
        parts = node.args[0] if isinstance(node.args[0], list | tuple) else []
        return math.sqrt(sum(reach[part] ** 2 for part in parts if isinstance(part, fx.Node)))
    numbers = [part for part in node.args if isinstance(part, int | float)]
    if target in (operator.mul, torch.mul, "mul") and len(moved) == len(numbers) == 1 and len(node.args) == 2:
        return abs(numbers[0]) * reach[moved[0]]
    if only is None:
        raise Unbounded(f"no Lipschitz constant is known of {_name(node)}, a product or the like")
    if target in _FUNCTIONS and not node.kwargs.get("inplace"):
        return _FUNCTIONS[target] * only
    if target in _MEANS and (before := _shape(moved[0])) and (after := _shape(node)) is not None:
        return float((math.prod(before) / max(1, math.prod(after))) ** _MEANS[target] * only)
    number = node.args[1] if len(node.args) == 2 else None
    if target in (operator.truediv, torch.div, "div") and numbers:
        return only / abs(numbers[0])
    keys = number if isinstance(number, tuple) else (number,)
    if target is operator.getitem and all(key in (None, ...) or isinstance(key, int | slice) for key in keys):
        return only
    raise Unbounded(f"no Lipschitz constant is known of {_name(node)}")


def _constant(layer: nn.Module) -> float | None:
    """Return an upper bound of the Lipschitz constant of a layer, None if its class is not known."""
    if type(layer).__module__ == "e3nn.o3._linear" and type(layer).__name__ == "Linear":
        return _e3nn_linear(layer)
    # in place, an activation changes what another branch may read
    changed = layer._forward_hooks or layer._forward_pre_hooks or getattr(layer, "inplace", False)
    constant = None if changed else _CONSTANTS.get(type(layer))
    return None if constant is None else constant(layer)


def _norm(matrix: Tensor) -> float:
    """Return the largest singular value; that of the last two axes over all others."""
    return float(torch.linalg.matrix_norm(matrix.detach().double(), ord=2).max())


def _convolution(layer: Any) -> float | None:
    """Bound the norm of a convolution on images of any size: the sum over the taps of the norm of their matrices."""
    taps = layer.weight.detach().flatten(2).movedim(-1, 0)  # (taps, out, in of a group)
    return (
        None
        if layer.padding_mode != "zeros"
        else sum(_norm(group) for tap in taps for group in [torch.stack(tap.chunk(layer.groups))])
    )


def _batch_norm(layer: Any) -> float | None:
    if layer.running_var is None:
        return None  # it measures its batch
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    return float((scale if layer.weight is None else scale * layer.weight.detach().double()).abs().max())


def _e3nn_linear(layer: Any) -> float | None:
    """Return the norm of the matrix, read off the rows of the identity."""
    if not layer.internal_weights or layer.instructions is None or getattr(layer, "f_in", None) is not None:
        return None
    eye = torch.eye(layer.irreps_in.dim).to(layer.weight)
    with torch.no_grad():
        return _norm(layer(eye) - layer(torch.zeros_like(eye)))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    found = node.meta.get("tensor_meta")
    return tuple(found.shape) if isinstance(found, TensorMetadata) else None


def _name(node: fx.Node) -> str:
    """Name an operation and the module whose forward it is in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = f" in {stack[-1][0]} ({stack[-1][1].__name__})" if stack else ""
    return f"the operation {getattr(node.target, '__name__', node.target)!r}{where}"


class TermSizes:
    """Measures what the relaxation terms of a model add to their layers, pass by pass, inside its context.

    Args:
        model: The model; may carry no terms.

    Attributes:
        order: Paths of the relaxed layers in the order in which the last pass ran them.
        problem: Why a pass could not be told apart by samples; empty if all could.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {path: model.get_submodule(path) for path in relaxations(model)}
        self.order: list[str] = []
        self.problem = ""
        self._calls: list[tuple[str, list[Tensor]]] = []
        self._before: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> TermSizes:
        for path, layer in self.layers.items():

            def before(layer: nn.Module, args: Any, output: Any, path: str = path) -> None:
                del layer, args
                self._before[path] = [tensor for _, tensor in tensors_in(output)]

            def after(layer: nn.Module, args: Any, output: Any, path: str = path) -> None:
                del layer, args
                pairs = zip((tensor for _, tensor in tensors_in(output)), self._before[path], strict=True)
                self._calls.append((path, [new.detach() - old.detach() for new, old in pairs if new is not old]))

            # a term is added by a hook of its layer: one hook sees the output before it, one after
            self._handles += [layer.register_forward_hook(before, prepend=True), layer.register_forward_hook(after)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, samples: Samples) -> Tensor | None:
        """Return ‖γ f_neq‖ of the pass since the last call, shape (layers, samples), or None: see ``problem``."""
        calls, self._calls = self._calls, []
        self.order = [path for path, _ in calls]
        if len(set(self.order)) < len(calls) or len(calls) < len(self.layers):
            wrong = next(path for path in self.layers if self.order.count(path) != 1)
            self.problem = f"{wrong or '(root)'} is called {self.order.count(wrong)} times"
            return None
        sizes = []
        for path, changes in calls:
            if samples.count > 1 and any(samples.index(change) is None for change in changes):
                self.problem = f"the rows of {path or '(root)'} cannot be told apart by sample: pass batches of one"
                return None
            squares = [by_sample(change.square(), samples.index(change), samples.count) for change in changes]
            none = torch.zeros(samples.count, dtype=torch.float64)  # a retired term changes nothing
            sizes.append(sum((square.cpu() for square in squares), none).sqrt())
        return torch.stack(sizes) if sizes else torch.zeros(0, samples.count)


def local_after(layer: nn.Module, run: Callable[[], Tensor], samples: Samples, iterations: int = 20) -> Tensor:
    r"""Estimate the local counterpart of `bound_after` at each sample: the norm of the Jacobian there.

    Power iteration on :math:`J^\top J`, with the output of the layer as input of J; samples do not act on each other,
    so all are iterated at once. It approaches the norm from below, and the norm at a point bounds nothing elsewhere.

    Args:
        layer: The layer, called once in a run.
        run: Runs the model and returns its output.
        samples: Which rows belong to which sample.
        iterations: Steps of the iteration.

    Returns:
        An estimate for each sample.

    Example:
        >>> from ace.inputs import Input
        >>> first, x = nn.Linear(2, 2), torch.ones(3, 1, 2)
        >>> samples = Samples([Input((0,), "x", x, "vector")], 1.0)
        >>> [round(float(value), 3) for value in local_after(first, lambda: 3 * first(x), samples)]
        [3.0, 3.0, 3.0]
    """
    shapes: list[Tensor] = []
    random = torch.Generator().manual_seed(0)

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        del layer, args
        shapes.extend(tensor for _, tensor in tensors_in(output) if tensor.is_floating_point())

    handle = layer.register_forward_hook(keep)
    run()
    handle.remove()

    def moved(*changes: Tensor) -> Tensor:
        waiting = list(changes)

        def add(layer: nn.Module, args: Any, output: Any) -> Any:
            del layer, args
            return map_tensors(lambda y: y + waiting.pop(0) if y.is_floating_point() else y, output)

        handle = layer.register_forward_hook(add)
        try:
            return run()
        finally:
            handle.remove()

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([by_sample(t.square(), samples.index(t), samples.count) for t in tensors]).sum(0).sqrt()

    def divided(tensors: Sequence[Tensor], by: Tensor) -> tuple[Tensor, ...]:
        by = by.clamp_min(torch.finfo(by.dtype).tiny)
        found = []
        for tensor in tensors:
            index = samples.index(tensor)
            rows = by if index is None else by[index]
            found.append(tensor / rows.reshape(-1, *[1] * (tensor.dim() - 1)))
        return tuple(found)

    with torch.enable_grad():
        start = tuple(torch.zeros_like(y).requires_grad_() for y in shapes)
        still = tuple(y.detach() for y in start)
        output = moved(*start)
        direction = tuple(torch.randn(y.shape, generator=random, dtype=y.dtype).to(y.device) for y in still)
        for _ in range(iterations):
            direction = divided(direction, norm(direction))
            image = jvp(moved, still, direction).detach()
            back = torch.autograd.grad(output, start, image, retain_graph=True, allow_unused=True)
            direction = tuple(torch.zeros_like(y) if g is None else g for y, g in zip(still, back, strict=True))
    return norm([image]).detach()
