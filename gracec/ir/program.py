"""A captured model: a flat ATen graph with everything needed to change, run and re-export it.

A `torch.fx.GraphModule` alone is not enough: `ExportedProgram.module()` drops input names, dynamic
shapes and the names that parameters have in the model's state dict. `Program` keeps them.

What passes learn about a node lives in `node.meta["custom"]["gracec"]` as JSON-able values, because
`custom` is the only metadata that survives re-export, saving and `.module()`. Roles are queries
over that annotation, so no pass ever stores a reference to a node.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

import gracec.quant.ops
import gracec.quant.ops_delta_rule
import gracec.quant.ops_experts
import gracec.quant.ops_onnx
import gracec.quant.ops_positions
import gracec.quant.ops_scales  # noqa: F401  (registers the ops that a saved program may hold)
from gracec.directories import cannot_write, replace_file, room_beside
from gracec.errors import GracecError, first_line
from gracec.journal import Note
from gracec.json_files import parse_json

ANNOTATION = "gracec"
_NAMES = "gracec.json"
DynamicShapes = dict[str, dict[int, Any]]


def annotation(node: fx.Node) -> Mapping[str, Any]:
    """What passes have learnt about a node (read only; empty when nothing)."""
    custom: dict[str, Any] = node.meta.get("custom") or {}
    found: dict[str, Any] = custom.get(ANNOTATION) or {}
    return found


def annotate(node: fx.Node, **values: Any) -> bool:
    """Add JSON-able values to a node's annotation; None removes a key. True if it changed."""
    before = dict(annotation(node))
    after = {k: v for k, v in {**before, **values}.items() if v is not None}
    if after == before:
        return False
    # New dictionaries: node copies share the old ones.
    custom = dict(node.meta.get("custom") or {})
    if after:
        custom[ANNOTATION] = after
    else:
        custom.pop(ANNOTATION, None)
    node.meta["custom"] = custom
    return True


@dataclass
class Program:
    """A model captured as a flat graph over ATen ops plus the two `gracec::` ops.

    Attributes:
        graph_module: the graph; its parameters may share storage with the captured model.
        example_inputs: input name -> tensor, in the order of the graph's placeholders.
        dynamic_shapes: input name -> {dimension: torch.export.Dim}.
        output_names: names of the graph's outputs, in order; "logits" first.
        family: the adapter that captured it.
        fqns: attribute path in `graph_module` -> the names the tensor has in the model's state
            dict (more than one when it is tied). The first name is the key used everywhere.
        dtype, device: of the capture; both are baked into the graph.
        decoder_layers: how many blocks the configuration says that the decoder has; None where
            there is none that says.
        notes: what a user should know about how it was made.
    """

    graph_module: fx.GraphModule
    example_inputs: dict[str, Tensor]
    dynamic_shapes: DynamicShapes
    output_names: tuple[str, ...]
    family: str
    fqns: dict[str, tuple[str, ...]]
    dtype: torch.dtype
    device: torch.device
    decoder_layers: int | None = None
    notes: tuple[Note, ...] = field(default=())

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph. Takes the inputs by name, returns the outputs in `output_names` order."""
        missing = [name for name in self.example_inputs if name not in inputs]
        unknown = [name for name in inputs if name not in self.example_inputs]
        if missing or unknown:
            raise GracecError(
                f"inputs do not fit the graph: missing {missing}, unknown {unknown}",
                fix=f"pass {list(self.example_inputs)}",
            )
        # Placeholders are matched by position, whatever order the caller used.
        outputs = self.graph_module(**{name: inputs[name] for name in self.example_inputs})
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def copy(self) -> Program:
        """A program with its own graph and module tree that shares every tensor with this one."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, copied))
        graph.output_node().meta = dict(self.graph.output_node().meta)
        graph.set_codegen(copy.copy(self.graph._codegen))
        root = _share_tensors(self.graph_module)
        for node in graph.find_nodes(op="call_module"):  # observers
            _set_submodule(root, node.target, self.graph_module.get_submodule(node.target))
        owner = fx.GraphModule(root, graph)
        owner.meta.update(self.graph_module.meta)
        return replace(
            self,
            graph_module=owner,
            example_inputs=dict(self.example_inputs),
            dynamic_shapes=dict(self.dynamic_shapes),
            fqns=dict(self.fqns),
        )

    def recompile(self) -> None:
        """Check the graph and regenerate its code after a change."""
        self.graph.lint()
        self.graph_module.recompile()

    def tensor(self, target: str) -> Tensor:
        """The parameter or buffer behind a get_attr target."""
        owner, _, name = target.rpartition(".")
        found = getattr(self.graph_module.get_submodule(owner), name)
        assert isinstance(found, Tensor)
        return found

    def set_tensor(self, target: str, tensor: Tensor) -> None:
        """Register a parameter (nn.Parameter) or buffer at an attribute path, replacing any."""
        owner_path, _, name = target.rpartition(".")
        owner = self.graph_module.get_submodule(owner_path)
        if hasattr(owner, name):
            delattr(owner, name)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(name, tensor)
        else:
            owner.register_buffer(name, tensor)

    def delete_tensor(self, target: str) -> None:
        """Let go of a parameter or buffer."""
        owner_path, _, name = target.rpartition(".")
        delattr(self.graph_module.get_submodule(owner_path), name)

    def fqn(self, target: str) -> str:
        """The state-dict name of a get_attr target."""
        return self.fqns[target][0] if target in self.fqns else target

    def nodes(self, target: Any = None, **wanted: Any) -> Iterator[fx.Node]:
        """Nodes by op target and annotation: `program.nodes(torch.ops.aten.linear.default)`,
        `program.nodes(role="merge")`."""
        for node in self.graph.nodes:
            if target is not None and node.target != target:
                continue
            notes = annotation(node)
            if all(notes.get(key) == value for key, value in wanted.items()):
                yield node

    def node(self, **wanted: Any) -> fx.Node:
        """The one node with these annotations.

        Raises:
            GracecError: if there is none or more than one.
        """
        found = list(self.nodes(**wanted))
        if len(found) != 1:
            raise GracecError(
                f"{len(found)} nodes of the graph carry {wanted}, one is needed",
                fix="run analyze-modality first",
            )
        return found[0]

    @property
    def outputs(self) -> dict[str, fx.Node]:
        """Output name -> the node that computes it."""
        returned = self.graph.output_node().args[0]
        assert isinstance(returned, (tuple, list))
        nodes = [node for node in returned if isinstance(node, fx.Node)]
        return dict(zip(self.output_names, nodes, strict=True))

    def set_outputs(self, outputs: Mapping[str, fx.Node]) -> None:
        """Make the graph return these nodes under these names, in this order."""
        self.output_names = tuple(outputs)
        self.graph.output_node().args = (tuple(outputs.values()),)
        self.set_signature()

    def add_input(self, name: str, example: Tensor, dynamic: dict[int, Any]) -> fx.Node:
        """Append an input to the graph.

        Args:
            example: what it may look like; every dimension in `dynamic` becomes symbolic.
            dynamic: dimension -> torch.export.Dim.
        """
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        traced: Any = last.meta["val"]
        symbols = traced.fake_mode.shape_env
        sizes = [
            symbols.create_unbacked_symint() if dimension in dynamic else size
            for dimension, size in enumerate(example.shape)
        ]
        node.meta["val"] = traced.new_empty(sizes, dtype=example.dtype)
        self.example_inputs[name] = example
        self.dynamic_shapes[name] = dynamic
        self.set_signature()
        return node

    def set_signature(self) -> None:
        """One argument a placeholder, one result an output.

        Calling conventions live in the code generator, which knows nothing of graph changes.
        """
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        several = len(self.output_names) > 1
        info = _PyTreeInfo(
            orig_args=names,
            in_spec=pytree.tree_structure(((), dict.fromkeys(names, 0))),
            out_spec=pytree.tree_structure((0,) * len(self.output_names) if several else 0),
        )
        self.graph.set_codegen(_PyTreeCodeGen(info))

    def reexport(self) -> torch.export.ExportedProgram:
        """An ExportedProgram of the graph as it is now, annotations included."""
        with torch.no_grad():
            return torch.export.export(
                self.graph_module,
                (),
                kwargs=dict(self.example_inputs),
                dynamic_shapes=self.dynamic_shapes,
                strict=False,
            )

    def save(self, path: str | Path) -> None:
        """Write the program as one file (`.pt2`): graph, annotations, tensors and names.

        Raises:
            GracecError: if the program is lowered; its packed tensors belong to this machine. Or if
                the file cannot be written.
        """
        path = Path(path)
        plain = (Tensor, nn.Parameter)
        for target in self.fqns:
            if type(self.tensor(target)) not in plain:
                raise GracecError(
                    "a lowered program cannot be saved",
                    where=self.fqn(target),
                    fix="save the frozen program, or the compiled model with save_pretrained",
                )
        names = {
            "output_names": self.output_names,
            "family": self.family,
            "decoder_layers": self.decoder_layers,
            "fqns": self.fqns,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "dynamic": {name: list(shape) for name, shape in self.dynamic_shapes.items()},
            # torch saves the metadata of computed values, not that of inputs.
            "inputs": {n.target: annotation(n) for n in self.graph.find_nodes(op="placeholder")},
        }
        try:
            with room_beside(path) as new:
                extra = {_NAMES: json.dumps(names)}
                torch.export.save(self.reexport(), new / "program.pt2", extra_files=extra)
                replace_file(new / "program.pt2", path)
        except OSError as error:
            raise cannot_write(path, error) from error

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Read what `save` wrote.

        Raises:
            GracecError: if the file is no program or holds pickled objects, which are not loaded.
        """
        path = Path(path)
        _refuse_pickles(path)
        extra = {_NAMES: ""}
        try:
            exported = torch.export.load(path, extra_files=extra)
            return cls._from_exported(exported, parse_json(extra[_NAMES], where=str(path)))
        except GracecError:
            raise
        except Exception as error:  # whatever a broken archive leads torch to
            reason = first_line(error)
            raise GracecError(f"not readable as a program: {reason}", where=str(path)) from error

    @classmethod
    def _from_exported(cls, exported: ExportedProgram, names: Any) -> Program:
        graph_module = exported.module(check_guards=False)
        assert isinstance(graph_module, fx.GraphModule)
        drop_assertions(graph_module)
        for node in graph_module.graph.find_nodes(op="placeholder"):
            annotate(node, **names["inputs"].get(node.target, {}))
        _, inputs = exported.example_inputs or ((), {})
        return cls(
            graph_module=graph_module,
            example_inputs=dict(inputs),
            dynamic_shapes={
                name: dict.fromkeys(dimensions, Dim.DYNAMIC)
                for name, dimensions in names["dynamic"].items()
            },
            output_names=tuple(names["output_names"]),
            family=names["family"],
            fqns={target: tuple(found) for target, found in names["fqns"].items()},
            decoder_layers=names.get("decoder_layers"),
            dtype=getattr(torch, names["dtype"]),
            device=torch.device(names["device"]),
        )


def drop_assertions(graph_module: fx.GraphModule) -> int:
    """Remove the `_assert_*` nodes of a trace; their conditions are checked on the host.

    Returns:
        How many there were.
    """
    found = [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        and getattr(node.target, "__name__", str(node.target)).startswith("_assert_")
    ]
    for node in reversed(found):
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    return len(found)


def _refuse_pickles(path: Path) -> None:
    """torch would unpickle tensors of unusual types and custom objects; a program has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
            is_program = any(name.endswith(f"/{_NAMES}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise GracecError(f"not readable as a program: {error}", where=str(path)) from error
    if not is_program:
        raise GracecError("not a program saved by gracec", where=str(path))
    if any(_says_pickle(parse_json(text, where=str(path))) for text in texts):
        raise GracecError("the file holds pickled objects, which are never loaded", where=str(path))


def _says_pickle(value: Any) -> bool:
    """Whether a configuration of torch's archive says anywhere that something is pickled."""
    if isinstance(value, dict):
        return bool(value.get("use_pickle")) or any(map(_says_pickle, value.values()))
    return isinstance(value, list) and any(map(_says_pickle, value))


def _set_submodule(root: nn.Module, target: str, module: nn.Module) -> None:
    *owners, name = target.split(".")
    for owner in owners:
        if owner not in root._modules:
            root.add_module(owner, nn.Module())
        root = root.get_submodule(owner)
    root.add_module(name, module)


def _share_tensors(module: nn.Module) -> nn.Module:
    """A module tree with the same tensors under the same names and nothing else."""
    shared = nn.Module()
    for name, parameter in module._parameters.items():
        shared.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        shared.register_buffer(name, buffer, persistent=persistent)
    for name, value in vars(module).items():
        if isinstance(value, Tensor):  # constants that export lifted
            setattr(shared, name, value)
    for name, child in module._modules.items():
        shared.add_module(name, _share_tensors(child) if child is not None else None)
    return shared
