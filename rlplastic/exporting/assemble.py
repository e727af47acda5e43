"""The document of a policy: what its task says, and where the policy comes from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib import metadata

from rlplastic import __version__
from rlplastic.deploy.document import SCHEMA_VERSION, Document, EvaluationResult, Provenance
from rlplastic.evaluation import Evaluation
from rlplastic.exporting.task_facts import TaskFacts
from rlplastic.policy import Policy

LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "mujoco", "envpool", "gymnasium")


def document_of(policy: Policy, facts: TaskFacts, evaluation: Evaluation, seed: int) -> Document:
    """Everything that is known of a policy; ``evaluation`` is its own, with ``seed``."""
    manifest = policy.checkpoint / "manifest.json"
    return Document(
        schema_version=SCHEMA_VERSION,
        observation=facts.observation,
        action=facts.action,
        joints=facts.joints,
        timing=facts.timing,
        quaternion_order="wxyz" if facts.has_quaternions else None,
        commands=facts.commands,
        absent=facts.absent,
        provenance=Provenance(
            environment=policy.env.task,
            backend=facts.backend,
            training_steps=policy.step,
            checkpoint_sha256=hashlib.sha256(manifest.read_bytes()).hexdigest(),
            rlplastic=__version__,
            libraries=_versions(),
            configuration=asdict(policy.config),
            model_file=facts.model_file,
            model_sha256=facts.model_sha256,
            evaluation=EvaluationResult(evaluation.mean, evaluation.ci95, len(evaluation.returns), seed),
        ),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a simulator that this policy does not need
            continue
    return versions
