"""torch: hooks record inputs and outputs of every module in run order; one layer runs by itself; gradients and AdamW by name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import tree
from ..case import Case, Trajectory
from ..policy import Policy
from .base import Call, Gradients, Leaf, Node, Run, Trained, Unsupported, check_names, cotangent, digest, joined, target, within
from .torch_variants import Variations, untied

LAYERS = (
    (nn.Linear, "linear"), (nn.Conv1d, "conv1d"), (nn.Conv2d, "conv2d"), (nn.Embedding, "embedding"), (nn.LayerNorm, "layernorm"),
    (nn.RMSNorm, "rmsnorm"), (nn.GroupNorm, "groupnorm"), (nn.modules.batchnorm._BatchNorm, "batchnorm"), (nn.GELU, "gelu"),
    (nn.Dropout, "dropout"),
)
WATCHED = ("weights or buffers", "inputs", "states")
SETTINGS = ("eps", "momentum", "approximate", "p", "num_groups", "padding_mode")


@contextlib.contextmanager
def precision(policy: Policy) -> Iterator[None]:
    """Matmul precision, TF32, cuDNN and threads of torch as the policy says, and back."""
    before = (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
              torch.backends.cudnn.deterministic, torch.get_num_threads())
    torch.set_float32_matmul_precision("high" if policy.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = policy.tf32
    torch.backends.cudnn.deterministic = True
    if policy.threads is not None:
        torch.set_num_threads(policy.threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before[1:4]
        torch.set_num_threads(before[4])


def threads() -> int:
    """Threads that torch computes with."""
    return torch.get_num_threads()


def load_pt(path: Path) -> dict[str, np.ndarray]:
    """A `.pt` file of a flat state dict, opened with weights_only=True, as NumPy arrays. Raises ValueError for anything else in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError("it is no torch file, or holds more than tensors") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a flat dict of named tensors")
    return {str(name): _numpy(value) for name, value in content.items()}


def save_pt(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as a torch state dict."""
    torch.save({name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}, path)


def _numpy(value: Any) -> Any:
    """A leaf as an independent NumPy array; half precision becomes float32, which holds its values exactly."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return value.resolve_conj().numpy().copy()


class TorchAdapter:
    """A torch module in one precision."""

    kind = "torch"

    def __init__(self, module: nn.Module, dtype: str, case: Case, position: int) -> None:
        self.dtype, self.case, self.position = dtype, case, position
        self.floating = getattr(torch, dtype)
        self.module = copy.deepcopy(module).eval().to(self.floating)

    def modules(self) -> dict[str, Node]:
        """Every module by dotted path, the model itself under the empty path."""
        return {path: Node(path, _layer(module), {name: getattr(module, name) for name in SETTINGS if hasattr(module, name)}, type(module))
                for path, module in self.module.named_modules()}

    def leaves(self) -> dict[str, Leaf]:
        """Parameters and persistent buffers by state-dict name; of leaves that share memory the later one points to the first."""
        owners = dict(self.module.named_modules(remove_duplicate=False))
        trainable = {name for name, value in self.module.named_parameters(remove_duplicate=False) if value.requires_grad}
        first: dict[tuple, str] = {}
        found = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            place = (value.data_ptr(), tuple(value.shape), tuple(value.stride())) if value.numel() else (id(value),)
            shared = first.setdefault(place, name)
            layer = _layer(owners[name.rpartition(".")[0]])
            found[name] = Leaf(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), name in trainable, layer,
                               None if shared == name else shared)
        return found

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write every leaf in place, by value. Raises ValueError unless names and shapes are exactly those of the module."""
        leaves = self.leaves()
        check_names(arrays, leaves)
        with torch.no_grad():
            for name, target in self.module.state_dict(keep_vars=True).items():
                target.copy_(torch.from_numpy(np.array(arrays[name], order="C")))

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of every leaf, in the module's precision."""
        return {name: _numpy(value) for name, value in self.module.state_dict().items()}

    def run(self, inputs: Mapping[str, np.ndarray], states: Any = None, *, tap: bool = True, quick: bool = True) -> Run:
        """Run the model once, tapping every module, and report inputs, states or weights that the run wrote to (with `tap`)."""
        given, carried = self._tensors(dict(inputs)), self._tensors(states)
        held = (lambda: [_digests(value) for value in (dict(self.module.state_dict()), given, carried)]) if tap else list
        before = held()
        calls: list[Call] = []
        written: dict[str, str] = {}
        with torch.no_grad(), _tapped(self.module, calls if tap else None, written, self.case.tap_limit):
            outputs = self._invoke(self.module, given, carried)
        effects = []
        for what, left, right in zip(WATCHED, before, held(), strict=False):
            changed = [name for name in right if left.get(name) != right[name]]
            effects += [f"{what} changed during the call: {', '.join(changed)}"] if changed else []
        return Run(tree.map_leaves(_numpy, outputs), calls, effects, written=written)

    def call(self, path: str, args: tuple, kwargs: dict) -> Any:
        """Outputs of the module at `path` on the given arguments."""
        with torch.no_grad():
            outputs = self.module.get_submodule(path)(*self._tensors(args), **self._tensors(kwargs))
        return tree.map_leaves(_numpy, outputs)

    def gradients(self, inputs: Mapping[str, np.ndarray], states: Any, seed: int) -> Gradients:
        """Loss of the case and its gradients with respect to every trainable leaf, float input and state leaf."""
        given, carried = self._tensors(dict(inputs), True), self._tensors(states, True)
        outputs = self._invoke(self.module, *_handed((given, carried)))
        return self._backward(self.module, "", self._loss(outputs, given, seed), {"input": given, "state": carried})

    def call_gradients(self, path: str, args: tuple, kwargs: dict, seed: int) -> Gradients:
        """Gradients of a fixed random projection of one layer's outputs, by full leaf name and `args.N`."""
        module, given = self.module.get_submodule(path), self._tensors((args, kwargs), True)
        args, kwargs = _handed(given)
        outputs = module(*args, **kwargs)
        return self._backward(module, path, _projection(outputs, seed), {"args": given[0], "kwargs": given[1]})

    def variations(self, path: str, right: frozenset[str] = frozenset()) -> Variations:
        """What the module at `path` would compute with one setting or function in it changed; the modules at `right` are left as they are."""
        return Variations(self.module, path, right)

    def untied_gradients(self, inputs: Mapping[str, np.ndarray], states: Any, seed: int, ties: Mapping[str, str]) -> Gradients:
        """`gradients` with every tied leaf as a parameter of its own, so that each use of the shared memory has a gradient of its own."""
        other = copy.copy(self)
        other.module = untied(self.module, ties)
        return other.gradients(inputs, states, seed)

    def _loss(self, outputs: Any, given: dict, seed: int) -> torch.Tensor:
        return _distance(outputs, seed) if self.case.loss is None else self.case.loss[self.position](outputs, given)

    def _backward(self, module: nn.Module, path: str, loss: Any, sources: dict[str, Any]) -> Gradients:
        parameters = {joined(path, name): value for name, value in module.named_parameters() if value.requires_grad}
        inputs = {name: value for name, value in tree.named(sources).items() if _tracked(value)}
        wanted = [*parameters.values(), *inputs.values()]
        if isinstance(loss, torch.Tensor) and loss.requires_grad and wanted:
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        else:
            found = [None] * len(wanted)
        arrays = [_numpy(torch.zeros_like(value) if grad is None else grad) for value, grad in zip(wanted, found, strict=True)]
        return Gradients(float(loss.detach() if isinstance(loss, torch.Tensor) else loss), dict(zip(parameters, arrays, strict=False)),
                         dict(zip(inputs, arrays[len(parameters):], strict=True)))

    def train(self, batches: Sequence[Mapping[str, np.ndarray]], trajectory: Trajectory, seed: int) -> Trained:
        """AdamW over the batches on a copy of the module; `self.module` stays as it is."""
        module = copy.deepcopy(self.module)
        parameters = [value for value in module.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=trajectory.lr, betas=trajectory.betas, eps=trajectory.eps,
                                      weight_decay=trajectory.weight_decay)
        losses = []
        for batch in batches:
            given = self._tensors(dict(batch))
            optimiser.zero_grad(set_to_none=True)
            outputs = trajectory.call[self.position](module, given) if trajectory.call else self._invoke(module, given, None)
            loss = self._loss(outputs, given, seed)
            if not _tracked(loss):
                raise Unsupported("no output of the reference is a float that depends on a trained weight, and the case gives no loss")
            loss.backward()
            for value in parameters:  # AdamW skips what has no gradient and does not let it decay; optax knows no absent gradient
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            if trajectory.clip is not None:
                nn.utils.clip_grad_norm_(parameters, trajectory.clip)
            optimiser.step()
            if trajectory.after:
                with torch.no_grad():
                    trajectory.after[self.position](module, outputs)
            losses.append(float(loss.detach()))
        return Trained(np.asarray(losses), {name: _numpy(value) for name, value in module.state_dict().items()})

    def _invoke(self, module: nn.Module, given: dict, carried: Any) -> Any:
        if self.case.call is not None:
            return self.case.call[self.position](module, given, carried)
        return module(*given.values()) if carried is None else module(*given.values(), carried)

    def _tensors(self, value: Any, track: bool = False) -> Any:
        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, (np.ndarray, np.generic)):
                return leaf
            tensor = torch.from_numpy(np.array(leaf, order="C"))
            return tensor.to(self.floating).requires_grad_(track) if tensor.is_floating_point() else tensor

        return tree.map_leaves(convert, value)


def _digests(value: Any) -> dict[str, str]:
    return {name: digest(_numpy(leaf)) for name, leaf in tree.named(value).items()}


def _layer(module: nn.Module) -> str:
    return next((name for cls, name in LAYERS if isinstance(module, cls)), type(module).__name__)


def _same(left: np.ndarray, right: Any) -> bool:
    return isinstance(right, np.ndarray) and np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")


def _handed(value: Any) -> Any:
    """The same values, but no leaves of the gradient: a module may write to its arguments, and torch forbids that to a leaf."""
    return tree.map_leaves(lambda leaf: leaf.clone() if _tracked(leaf) else leaf, value)


def _tracked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _projection(outputs: Any, seed: int) -> Any:
    total: Any = 0.0
    for name, leaf in tree.named(outputs).items():
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            total = total + (leaf * torch.from_numpy(cotangent(name, tuple(leaf.shape), seed)).to(leaf.dtype)).sum()
    return total


def _distance(outputs: Any, seed: int) -> Any:
    total: Any = 0.0
    for name, leaf in tree.named(outputs).items():
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            total = total + 0.5 * (leaf - torch.from_numpy(target(name, tuple(leaf.shape), seed)).to(leaf.dtype)).square().mean()
    return total


@contextlib.contextmanager
def _tapped(module: nn.Module, calls: list[Call] | None, written: dict[str, str], limit: int) -> Iterator[None]:
    """Hooks on every module that append a Call when a call ends; arguments are copied before the call can write to them.

    `written` gets the first argument that a module changed, by path.
    Raises CaseError when the calls hold more than `limit` bytes.
    """
    if calls is None:
        yield
        return
    handles, pending, counts, held = [], {}, {}, 0

    def before(path: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal held
            held = within(limit, held, path, (args, kwargs))
            pending.setdefault(path, []).append(tree.map_leaves(_numpy, (args, kwargs)))

        return hook

    def after(path: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> None:
            nonlocal held
            held = within(limit, held, path, outputs)
            given = pending[path].pop()
            was, now = (tree.listed({"args": left, "kwargs": right}) for left, right in (given, (args, kwargs)))
            for (name, leaf), (_, before_it) in zip(now, was, strict=False):  # a container may have changed as well
                if isinstance(leaf, torch.Tensor) and not _same(_numpy(leaf), before_it):
                    written.setdefault(path, name)
            index = counts[path] = counts.get(path, -1) + 1
            calls.append(Call(path, index, given[0], given[1], tree.map_leaves(_numpy, outputs)))

        return hook

    for path, inner in module.named_modules():
        handles.append(inner.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(inner.register_forward_hook(after(path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
