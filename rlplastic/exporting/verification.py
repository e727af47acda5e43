"""Whether the files of an export are the trained policy, and whether what they say is so.

Everything is asked of the files as they lie on the disk, against the training actor and the running task. The
yardstick is the actor evaluated in float64: the same parameters without the rounding of float32, of which the actor as
it trained has more than the folded graph (up to 5e-6 on Humanoid, whose bodies' inertia hardly varies).
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rlplastic import seeding
from rlplastic.benchmarking.timing import percentiles
from rlplastic.deploy.document import Document
from rlplastic.deploy.policy import INPUT, OnnxPolicy, check_golden
from rlplastic.errors import NonFiniteError
from rlplastic.evaluation import Evaluation
from rlplastic.exporting import proofs
from rlplastic.exporting.assemble import document_of
from rlplastic.exporting.fold import Doubles
from rlplastic.exporting.graph import MEAN, OPSET, metadata_of
from rlplastic.exporting.proofs import Finding
from rlplastic.exporting.task_facts import TaskFacts, task_facts
from rlplastic.policy import Policy

Rows = NDArray[np.float32]
ROWS = 4096
"""Rows of real and noisy observations that are compared, half of each."""
ERROR, PRE_TANH_ERROR, BATCH_ERROR = 1e-5, 1e-4, 1e-6
EXTREMES = (10.0, 1e3, 1e6)
TIMED_CALLS = 1000
MODEL, DOCUMENT, GOLDEN, TORCHSCRIPT = "policy.onnx", "policy.json", "golden.npz", "policy.pt"

_ALONE = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(name + " was asked for")
sys.meta_path.insert(0, Refuse())
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
document = json.loads(session.get_modelmeta().custom_metadata_map["rlplastic"])
golden = numpy.load(sys.argv[2])
actions, raw = session.run(["actions", "raw_actions"], {{"obs": golden["obs"]}})
assert golden["obs"].shape[1] == document["observation"]["width"]
half = numpy.array(document["action"]["box"]["scale"])
print(max((abs(actions - golden["actions"]) / half).max(), abs(raw - golden["raw_actions"]).max()))
"""
_REFUSED = ("torch", "rlplastic", "onnx", "mujoco", "envpool", "gymnasium", "dm_control", "hydra", "omegaconf", "scipy")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    measured: str
    bound: str
    passed: bool | None
    """None: nothing was there to judge."""


@dataclass(frozen=True)
class Original:
    """What the files are held against.

    policy: the trained one; facts: of its task; real: (R, D) observations of its episodes; evaluation: the
    trained policy's, with ``seed``.
    """

    policy: Policy
    facts: TaskFacts
    real: Rows
    evaluation: Evaluation
    seed: int


def verify(folder: Path, original: Original) -> list[Check]:
    """Every check on the export in ``folder``, each as a line; a check that breaks off has failed."""
    verification = _Verification(folder, original)
    checks = []
    for name, bound, look in verification.checks():
        try:
            measured, passed = look()
        except Exception as error:  # whatever a damaged file provokes is a finding
            measured, passed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", False
        checks.append(Check(name, measured, bound, passed))
    return checks


class _Verification:
    """The files, opened when they are asked for, and one method per check."""

    def __init__(self, folder: Path, original: Original) -> None:
        self.folder, self.original = folder, original
        self.exact = copy.deepcopy(original.policy.actor).cpu().double()
        """The trained actor without rounding."""

    def checks(self) -> Iterator[tuple[str, str, Callable[[], Finding]]]:
        yield "graph", f"onnx.checker, opset {OPSET}+, standard operators", self.graph
        yield "weights", "all finite", self.weights
        yield "real observations", f"<= {ERROR:g}", lambda: self.error(self.original.real)
        yield "noisy observations", f"<= {ERROR:g}", lambda: self.error(self.noisy)
        yield "zeros and one-hot rows", f"<= {ERROR:g}", lambda: self.error(self.one_hot)
        yield "extremes, before tanh", f"finite, <= {PRE_TANH_ERROR:g} relative", self.extremes
        yield "the float32 actor", f"<= {ERROR:g} beyond its own rounding", self.as_trained
        yield "batch 1 and 64", f"<= {BATCH_ERROR:g}", self.batches
        yield "repeatability", "equal bits", self.repeats
        yield "numbers not finite", "NaN in that row only, refused", self.not_finite
        yield "document", "as the task has it, every digit", self.document_is_true
        yield "flat keys", "follow from the document", self.flat_keys
        yield "observation terms", "numbers stand where it says", self.terms
        yield "moved outputs", "the joint that it names responds", self.moved
        yield "closed loop, each step", f"<= {ERROR:g}", self.loop_error
        yield "closed loop, return", "95 % intervals overlap", self.loop_return
        yield "golden.npz", f"<= {ERROR:g}", self.golden
        yield "numpy and onnxruntime alone", f"<= {ERROR:g}", self.alone
        if (self.folder / TORCHSCRIPT).exists():
            yield TORCHSCRIPT, f"<= {ERROR:g}", self.torchscript
        yield "latency, batch 1, 1 thread", "reported", self.latency

    # The files

    @cached_property
    def policy(self) -> OnnxPolicy:
        return OnnxPolicy.load(self.folder / MODEL)

    @cached_property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.folder / MODEL)

    @cached_property
    def document(self) -> Document:
        return Document.from_json((self.folder / DOCUMENT).read_text(encoding="utf-8"))

    # Rows to compare on

    @cached_property
    def noisy(self) -> Rows:
        """Real rows with noise of the real rows' own spread, as many as are missing from `ROWS`."""
        real = self.original.real
        rng = np.random.default_rng(seeding.key("export", "noise"))
        count = ROWS - len(real)
        noise = rng.standard_normal((count, real.shape[1])) * (real.std(0) + 1e-3)
        rows: Rows = (real[rng.integers(len(real), size=count)] + noise).astype(np.float32)
        return rows

    @cached_property
    def one_hot(self) -> Rows:
        width = self.original.real.shape[1]
        return np.concatenate((np.zeros((1, width)), np.eye(width), -np.eye(width))).astype(np.float32)

    # Numbers

    def mean(self, rows: Rows) -> Doubles:
        """What the actor says before tanh, in float64."""
        with torch.no_grad():
            mean: Doubles = self.exact(torch.from_numpy(rows).double())[0].numpy()
        return mean

    def error(self, rows: Rows) -> Finding:
        """Largest error of both outputs; that of ``actions`` in parts of half the Box."""
        box, found = self.original.facts.action.box, self.policy.run(rows)
        raw, half = np.tanh(self.mean(rows)), np.asarray(box.scale)
        actions = np.clip(raw * half + np.asarray(box.offset), box.low, box.high)
        worst = max(np.abs(found.raw_actions - raw).max(), (np.abs(found.actions - actions) / half).max())
        return f"{worst:.1e} on {len(rows):,} rows", bool(worst <= ERROR)

    def extremes(self) -> Finding:
        rng = np.random.default_rng(seeding.key("export", "extremes"))
        width = self.original.real.shape[1]
        rows = np.concatenate([scale * rng.choice((-1.0, 1.0), (128, width)) for scale in EXTREMES]).astype(np.float32)
        model = copy.deepcopy(self.model)
        shape: list[str | int | None] = ["N", self.original.facts.action.width]
        model.graph.output.append(helper.make_tensor_value_info(MEAN, TensorProto.FLOAT, shape))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found, actions = session.run([MEAN, "actions"], {INPUT: rows})
        expected = self.mean(rows)
        worst = (np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max()
        finite = bool(np.isfinite(found).all() and np.isfinite(actions).all())
        return f"{worst:.1e} up to {max(EXTREMES):.0e}" + (
            "" if finite else ", not finite"
        ), finite and worst <= PRE_TANH_ERROR

    @cached_property
    def own_rounding(self) -> float:
        """How far the actor as it trained is from itself in float64."""
        trained = self.original.policy.act({"policy": self.original.real})
        return float(np.abs(trained - np.tanh(self.mean(self.original.real))).max())

    def as_trained(self) -> Finding:
        real = self.original.real
        worst = np.abs(self.policy.run(real).raw_actions - self.original.policy.act({"policy": real})).max()
        return f"{worst:.1e}, of which its own {self.own_rounding:.1e}", bool(worst <= ERROR + self.own_rounding)

    def batches(self) -> Finding:
        rows = self.noisy[:64]
        together = self.policy.run(rows).raw_actions
        alone = np.concatenate([self.policy.run(rows[i : i + 1]).raw_actions for i in range(len(rows))])
        worst = np.abs(together - alone).max()
        return f"{worst:.1e}", bool(worst <= BATCH_ERROR)

    def repeats(self) -> Finding:
        first, again = (self.policy.run(self.noisy[:64]).actions for _ in range(2))
        fresh = OnnxPolicy.load(self.folder / MODEL).run(self.noisy[:64]).actions
        equal = first.tobytes() == again.tobytes() == fresh.tobytes()
        return "equal" if equal else "different", equal

    def not_finite(self) -> Finding:
        rows = np.repeat(self.noisy[:1], 4, axis=0)
        for row, value in enumerate((np.nan, np.inf, -np.inf)):
            rows[row, -1] = value
        found = self.policy.run(rows)
        outputs = np.concatenate((found.actions, found.raw_actions), 1)
        if not np.isnan(outputs[:3]).all() or not np.isfinite(outputs[3]).all():
            return f"rows with NaN: {np.isnan(outputs).all(1).tolist()}, expected the first three", False
        try:
            self.policy.act(rows)
        except NonFiniteError:
            return "NaN in that row only, refused", True
        return "acted upon", False

    # Files and document

    def graph(self) -> Finding:
        onnx.checker.check_model(self.model, full_check=True)
        opsets = {one.domain: one.version for one in self.model.opset_import}
        standard = (
            list(opsets) == [""] and opsets[""] >= OPSET and not any(node.domain for node in self.model.graph.node)
        )
        operators = sorted({node.op_type for node in self.model.graph.node})
        return f"opset {opsets.get('')}: {', '.join(operators)}", standard

    def weights(self) -> Finding:
        arrays = {one.name: onnx.numpy_helper.to_array(one) for one in self.model.graph.initializer}
        bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        count = sum(array.size for array in arrays.values())
        return f"not finite: {', '.join(bad)}" if bad else f"{count:,} numbers in {len(arrays)} tensors", not bad

    def document_is_true(self) -> Finding:
        """policy.json, the metadata's document and a fresh reading of run and task agree, floats bit for bit."""
        original = self.original
        fresh = task_facts(original.policy.env)
        wanted = document_of(original.policy, fresh, original.evaluation, original.seed)
        if wanted != self.document:
            return _difference(wanted, self.document), False
        if self.policy.document != self.document:
            return f"{DOCUMENT} is not the document in {MODEL}", False
        left_out = f", absent: {', '.join(self.document.absent)}" if self.document.absent else ""
        return f"{len(wanted.observation.terms)} terms, {len(wanted.joints)} joints{left_out}", True

    def flat_keys(self) -> Finding:
        expected, found = metadata_of(self.document), self.policy.metadata
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        return f"different: {', '.join(wrong)}" if wrong else f"{', '.join(sorted(expected))}", not wrong

    # The running task

    def terms(self) -> Finding:
        return proofs.observed_terms(self.document, self.original.policy.env)

    def moved(self) -> Finding:
        return proofs.moved_outputs(self.document, self.original.policy.env, self.original.facts.model)

    @cached_property
    def loop(self) -> proofs.ClosedLoop:
        original = self.original
        episodes = len(original.evaluation.returns)
        return proofs.closed_loop(
            self.policy, original.policy, lambda rows: np.tanh(self.mean(rows)), original.seed, episodes
        )

    def loop_error(self) -> Finding:
        steps = int(self.loop.evaluation.lengths.sum())
        told = f"{self.loop.error:.1e} in {steps:,} steps; the float32 actor's own {self.loop.rounding:.1e}"
        return told, self.loop.error <= ERROR

    def loop_return(self) -> Finding:
        ours, theirs = self.loop.evaluation, self.original.evaluation
        (low, high), mean = theirs.ci95, ours.mean
        return f"{mean:.5g}; trained {theirs.mean:.5g}, {low:.5g} to {high:.5g}", proofs.overlap(ours, theirs)

    # Consumers

    def golden(self) -> Finding:
        worst, rows = check_golden(self.policy, self.folder / GOLDEN)
        return f"{worst:.1e} on {rows} rows", worst <= ERROR

    def alone(self) -> Finding:
        script = _ALONE.format(refused=_REFUSED)
        command = [sys.executable, "-I", "-c", script, str(self.folder / MODEL), str(self.folder / GOLDEN)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason was given"])[-1][:160], False
        return f"{float(done.stdout):.1e}", float(done.stdout) <= ERROR

    def torchscript(self) -> Finding:
        module = torch.jit.load(str(self.folder / TORCHSCRIPT))  # type: ignore[no-untyped-call]
        actions = module(torch.from_numpy(self.noisy))[1].numpy()
        worst = np.abs(actions - np.tanh(self.mean(self.noisy))).max()
        return f"{worst:.1e}", bool(worst <= ERROR)

    def latency(self) -> Finding:
        row = self.original.real[:1]
        works: dict[str, Callable[[], object]] = {
            "onnxruntime": lambda: self.policy.act(row),
            "torch": lambda: self.original.policy.act({"policy": row}),
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            times = percentiles(works, TIMED_CALLS)
        finally:
            torch.set_num_threads(threads)
        return "; ".join(f"{name} p50 {p50:.0f}, p99 {p99:.0f} us" for name, (p50, p99) in times.items()), None


def _difference(wanted: Any, found: Any, place: str = "") -> str:  # noqa: ANN401 - any parts of a document
    """Where two parts of a document first differ, such as ``action.names[0] is 'a', expected 'b'``."""
    if hasattr(wanted, "__dataclass_fields__") and type(wanted) is type(found):
        pairs = [
            (f"{place}.{n}".lstrip("."), getattr(wanted, n), getattr(found, n)) for n in wanted.__dataclass_fields__
        ]
    elif isinstance(wanted, tuple) and isinstance(found, tuple) and len(wanted) == len(found):
        pairs = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(wanted, found, strict=True))]
    else:
        return (
            f"{place or 'it'} is {json.dumps(found, default=str)[:60]}, expected {json.dumps(wanted, default=str)[:60]}"
        )
    return next(_difference(a, b, at) for at, a, b in pairs if a != b)
