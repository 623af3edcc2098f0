"""A module of tensors as one graph, in a file that is run without this package.

A :class:`Network` is a module that takes and returns nothing but tensors, with what a
graph of it needs to be told. Its graph holds for every batch and every length within
the bounds. It is written as ONNX, torch.export's file, or TorchScript. Facts (rate,
bounds, licence, hash of the weights, ...) travel inside: JSON under the key ``spear``
of ONNX's metadata, or of the extra files of the others.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import atomic_files
from espnet2_spear.torch_private import ASSERTIONS, ones_are_sizes

MAX_BATCH = 4096
KEY = "spear"
OPSET = 18
PACKAGES = "pip install -e '.[export]' in a checkout"
# Any of these multiplies 8-bit numbers faster than 32-bit ones.
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


@dataclass(frozen=True)
class Network:
    """A module of tensors, ready to become a graph.

    Attributes:
        module: in eval mode.
        inputs: examples by name, in the order of the arguments, of which those behind
            the second are ``*state``; the first dimension of each is the batch.
        outputs: names, in their order.
        lengths: name of an input -> fewest and most of its second dimension, which is
            dynamic; those that are not here have one shape.
        facts: what a user of the graph must know; JSON can hold it.
        single_frames: whether one frame, or one utterance, is no special case to the
            module; if it is, the graph is that of more.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    lengths: dict[str, tuple[int, int]]
    facts: dict[str, Any]
    single_frames: bool = True

    @functools.cached_property
    def program(self) -> ExportedProgram:
        """The graph, made when it is first asked for.

        Raises:
            UserError: the module holds what cannot be in a graph.
        """
        batch = Dim("batch", min=1, max=MAX_BATCH)
        shapes: list[dict[int, Dim]] = []
        for name in self.inputs:
            shape = {0: batch}
            if name in self.lengths:
                least, most = self.lengths[name]
                shape[1] = Dim("length", min=least, max=most)
            shapes.append(shape)
        dynamic: list[Any] = shapes[:2]
        if shapes[2:]:
            dynamic.append(tuple(shapes[2:]))
        sizes = ones_are_sizes(self.single_frames)
        with torch.no_grad(), sizes:
            try:
                program = torch.export.export(
                    self.module,
                    tuple(self.inputs.values()),
                    dynamic_shapes=dynamic,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                raise UserError(
                    f"{type(self.module).__name__}: torch.export cannot make a graph "
                    f"of it ({' '.join(str(error).split())[:300]}); leave out of its "
                    "configuration what the message names, or use it in torch"
                ) from error
        drop_assertions(program.graph_module)
        return program


def drop_assertions(graph_module: torch.fx.GraphModule) -> None:
    """Remove assertions that sizes are not 1, which the capture noted on its way.

    The operations do not need them: tests run the graphs on such sizes. The bounds of
    lengths are kept apart from the graph, and stay.
    """
    for part in graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in [*part.graph.nodes]:
                if node.target in ASSERTIONS:
                    part.graph.erase_node(node)
            part.graph.eliminate_dead_code()
            part.recompile()


# --- Files ----------------------------------------------------------------------------


def write_graph(
    network: Network,
    folder: Path,
    form: str,
    licence: str | None = None,
    int8: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write ``model.*`` into a folder, whole or not at all.

    Args:
        network: what the file computes.
        folder: made if need be.
        form: one of ``WRITERS``.
        licence: of the weights.
        int8: ONNX only: also write ``model.int8.onnx``. Weights of linear maps have 8
            bits there, and their inputs become 8 bits as they come (dynamic
            quantization).
        overwrite: replace the files of an earlier export.

    Returns:
        the files; weights beyond 2 GB of ONNX lie beside them, in ``*.data``.

    Raises:
        UserError: such files are there, packages are missing, or the network cannot
            be a graph.
    """
    if int8 and form != "onnx":
        raise UserError(
            f"--quantize int8 with --format {form}: torch keeps 8-bit weights in "
            "objects of its own, which these files cannot hold; use --format onnx"
        )
    suffix, write = WRITERS[form]
    names = [f"model{suffix}", *(["model.int8.onnx"] if int8 else [])]
    # Whatever is asked for now: files side by side are taken for the same weights.
    known = [f"model{suffix}", *(["model.int8.onnx"] if form == "onnx" else [])]
    known += [f"{name}.data" for name in known]
    there = [folder / name for name in known if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{there[0]}: exists; choose another folder, or --overwrite true"
        )
    facts = network.facts | {"licence": licence}
    if form == "onnx":
        _need_onnx()
        facts["opset"] = OPSET
    with atomic_files(folder) as work:
        files = [work / name for name in names]
        write(network, files[0], json.dumps(facts))
        if int8:
            _warn_of_slow_int8()
            _quantize(*files, json.dumps(facts | {"quantized": "int8"}))
        for file in there:
            file.unlink()
    return [folder / name for name in names]


# --- ONNX -----------------------------------------------------------------------------


def _need_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: {PACKAGES}") from None


def _write_onnx(network: Network, path: Path, facts: str) -> None:
    made = torch.onnx.export(
        network.program,
        dynamo=True,
        input_names=[*network.inputs],
        output_names=network.outputs,
        opset_version=OPSET,
        verbose=False,
    )
    made.model.metadata_props[KEY] = facts
    made.save(path)


def _quantize(source: Path, path: Path, facts: str) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source, load_external_data=False).graph
    # Linear maps alone: not the constant positions of a stream, which are no matrix,
    # nor values of a power spectrum, which are too far apart for 8 bits.
    others = {w.name for w in graph.initializer if len(w.dims) != 2}
    others |= {w.name for w in graph.initializer if w.name.endswith(".fbank.mel")}
    float32 = [node.name for node in graph.node if others & {*node.input}]
    large = source.stat().st_size > 2**30 or Path(f"{source}.data").exists()
    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_exclude=float32,
        # Both factors unsigned: products of signed weights saturate at 16 bits on CPUs
        # without VNNI, and results would differ from machine to machine.
        weight_type=QuantType.QUInt8,
        per_channel=True,
        use_external_data_format=large,
    )
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: facts})
    onnx.save(model, path)


def _warn_of_slow_int8() -> None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if not INT8_FLAGS & {*text.split()}:
        logging.warning(
            "--quantize int8: this CPU has no instructions for 8-bit products (VNNI, "
            "ARM's dot product); the file computes the same here but no faster than "
            "float32: leave --quantize out if it is to run on such machines"
        )


# --- Files of torch -------------------------------------------------------------------


def _write_torch_export(network: Network, path: Path, facts: str) -> None:
    torch.export.save(network.program, path, extra_files={KEY: facts})


def _write_torchscript(network: Network, path: Path, facts: str) -> None:
    script = torch.jit.freeze(torch.jit.script(_flat(network.program)).eval())
    torch.jit.save(script, path, _extra_files={KEY: facts})


def _flat(program: ExportedProgram) -> GraphModule:
    """Return the graph without what TorchScript does not read.

    That is names of weights with numbers in them, graphs within the graph (of
    autocast, which is off), and functions of sizes that Python has by other names.
    """
    source = program.module(check_guards=False)
    graph, weights = Graph(), nn.Module()
    outputs = _copy(source, [], graph, weights, {})
    graph.output(tuple(outputs))
    graph.eliminate_dead_code()
    return GraphModule(weights, graph)


SIZES = {torch.sym_max: max, torch.sym_min: min, torch.sym_not: operator.not_}


def _copy(
    source: GraphModule, args: list[Node], graph: Graph, weights: nn.Module, names: dict
) -> Any:
    """Copy the nodes of a graph; return the nodes of its outputs."""
    new: dict[Node, Any] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder":
            new[node] = args.pop(0) if args else graph.placeholder(node.name)
        elif node.op == "output":
            return map_arg(node.args[0], new.__getitem__)
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(source)
            if isinstance(value, GraphModule):
                new[node] = value
                continue
            name = names.setdefault(id(value), f"weight{len(names)}")
            weights.register_buffer(name, value.detach())
            new[node] = graph.get_attr(name)
        elif "wrap_with" in str(node.target):
            inside = [isinstance(new.get(a), GraphModule) for a in node.args]
            at = inside.index(True)
            inner = [new[a] for a in node.args[at + 1 :]]
            new[node] = _copy(new[node.args[at]], inner, graph, weights, names)
        elif node.target is operator.getitem and not isinstance(
            new[node.args[0]], Node
        ):
            new[node] = new[node.args[0]][node.args[1]]
        else:
            copied = graph.node_copy(node, new.__getitem__)
            target = getattr(node.target, "overloadpacket", node.target)
            copied.target = SIZES.get(target, target)
            copied.kwargs = {
                k: str(v) if isinstance(v, torch.device) else v
                for k, v in copied.kwargs.items()
            }
            new[node] = copied


WRITERS: dict[str, tuple[str, Callable[[Network, Path, str], None]]] = {
    "onnx": (".onnx", _write_onnx),
    "torch_export": (".pt2", _write_torch_export),
    "torchscript": (".ts", _write_torchscript),
}
