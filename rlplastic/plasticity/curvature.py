"""Curvature of a loss, and the empirical neural tangent kernel of an output.

A product with the Hessian differentiates twice. An autograd function that saves intermediate results is silently taken
as constant the second time, as that of `rlplastic.kernels.batch_norm` is where it was compiled: losses must be plain
here. What comes out otherwise is not symmetric, which is checked. Per-sample gradients are taken one by one and not by
``torch.func.vmap``, which custom autograd functions must be written for.

Random vectors come from a generator of their own, on the CPU, so the global one is left alone and a seed means the same
on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.gradients import flat_gradient

ASYMMETRY = 1e-2
"""Largest |u^T H v - v^T H u| beside |H u| + |H v| that rounding is trusted to make."""


class Hessian:
    """v -> H v on flat vectors (P,) of the parameters a loss reaches, after one forward pass.

    Args:
        loss: a scalar, still attached to its graph.
        parameters: what to differentiate by; those without influence are left out (their rows are zero).

    Raises:
        ConfigurationError: the loss reaches none of them.
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if loss.requires_grad and parameters:
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
        if not pairs:
            raise ConfigurationError("the loss reaches none of the parameters; expected a loss of this module")
        self._parameters = [p for _, p in pairs]
        self._gradient = torch.cat([g.reshape(-1) for g, _ in pairs])

    @property
    def size(self) -> int:
        """P, the number of parameters reached."""
        return self._gradient.numel()

    def times(self, vector: Tensor) -> Tensor:
        """H v, (P,)."""
        if not self._gradient.requires_grad:  # the loss is linear
            return torch.zeros_like(vector)
        parts = torch.autograd.grad(self._gradient, self._parameters, vector, retain_graph=True, allow_unused=True)
        pairs = zip(parts, self._parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if part is None else part).reshape(-1) for part, p in pairs])

    def check(self) -> Hessian:
        """This one, if u^T H v = v^T H u for two random vectors.

        Raises:
            ConfigurationError: it is not, so some operation of the loss has no second derivative.
        """
        rng = torch.Generator().manual_seed(0)
        u, v = (self.vector(torch.randn(self.size, generator=rng)) for _ in range(2))
        hu, hv = self.times(u), self.times(v)
        # For random u and any other matrix the difference is about as large as H v is long; rounding makes 1e-5 of it.
        scale = torch.linalg.vector_norm(hv) + torch.linalg.vector_norm(hu)
        if bool((u @ hv - v @ hu).abs() > ASYMMETRY * scale):
            raise ConfigurationError(
                "second derivatives of the loss are wrong (the Hessian is not symmetric); expected plain operations: "
                "neither compiled ones nor autograd functions of one's own"
            )
        return self

    def vector(self, sample: Tensor) -> Tensor:
        """``sample`` in the type and on the device of the parameters."""
        return sample.to(self._gradient)

    def largest_eigenvalue(self, iterations: int = 50, tolerance: float = 1e-4, seed: int = 0) -> float:
        """By power iteration; see `sharpness`."""
        rng = torch.Generator().manual_seed(seed)
        value = self._dominant(0.0, iterations, tolerance, rng)
        return value if not value < 0 else value + self._dominant(value, iterations, tolerance, rng)

    def _dominant(self, shift: float, iterations: int, tolerance: float, rng: torch.Generator) -> float:
        """The eigenvalue of H - shift that is largest in size."""
        vector = self.vector(torch.randn(self.size, generator=rng))
        vector = vector / torch.linalg.vector_norm(vector)
        value = 0.0
        for _ in range(iterations):
            image = self.times(vector) - shift * vector
            before, value = value, float(vector @ image)
            norm = torch.linalg.vector_norm(image)
            if not float(norm) > 0:  # a zero Hessian, or NaN
                return value
            vector = image / norm
            if abs(value - before) <= tolerance * abs(value):
                break
        return value

    def trace(self, samples: int = 16, seed: int = 0) -> tuple[float, float]:
        """An estimate and its standard error; see `hessian_trace`.

        Raises:
            ConfigurationError: fewer than 2 samples.
        """
        if samples < 2:
            raise ConfigurationError(f"samples={samples} give no standard error; expected at least 2")
        rng = torch.Generator().manual_seed(seed)
        values = torch.empty(samples, dtype=torch.float64)
        for index in range(samples):
            signs = self.vector(2.0 * torch.randint(2, (self.size,), generator=rng) - 1.0)
            values[index] = float(signs @ self.times(signs))
        return float(values.mean()), float(values.std() / samples**0.5)


def sharpness(
    loss: Tensor, parameters: Sequence[Tensor], iterations: int = 50, tolerance: float = 1e-4, seed: int = 0
) -> float:
    """Largest eigenvalue of the Hessian, by power iteration (Yao et al., "PyHessian", arXiv 1912.07145).

    Power iteration finds the eigenvalue of largest *size*. Where that one is negative, a second pass on H - lambda I
    finds the largest. The error shrinks with the ratio of the two leading eigenvalues to the power of twice the steps;
    it is an underestimate.

    Args:
        loss: a scalar of a forward pass with gradients enabled.
        parameters: of the module.
        iterations: most products per pass; each costs about two backward passes.
        tolerance: relative change from one step to the next that ends a pass.
        seed: of the start vector.

    Returns:
        Loss per squared unit of parameters; NaN for a loss with NaN.

    Raises:
        ConfigurationError: the loss reaches no parameter, or has no second derivatives.
    """
    return Hessian(loss, parameters).check().largest_eigenvalue(iterations, tolerance, seed)


def hessian_trace(loss: Tensor, parameters: Sequence[Tensor], samples: int = 16, seed: int = 0) -> tuple[float, float]:
    """tr H and its standard error: mean of z^T H z over random signs z (Hutchinson 1990; arXiv 1912.07145).

    Exact for a diagonal Hessian; else the variance per sample is twice the squared sum off the diagonal.

    Args:
        loss: a scalar of a forward pass with gradients enabled.
        parameters: of the module.
        samples: at least 2.
        seed: of the signs.

    Raises:
        ConfigurationError: fewer than 2 samples, or the loss reaches no parameter, or has no second derivatives.
    """
    return Hessian(loss, parameters).check().trace(samples, seed)


def output_gradients(output: Callable[[Any], Tensor], samples: Sequence[Any], parameters: Sequence[Tensor]) -> Tensor:
    """J, (N, P): the gradient of a scalar output for each of N samples, each in a forward pass of its own.

    Args:
        output: a sample to a tensor with one element. Batch norms must use running statistics: a batch of 1 has none.
        samples: 64 to 256 states, each as ``output`` takes it. Memory is 8 N P bytes.
        parameters: of the module.

    Raises:
        ConfigurationError: an output has more than one element.
    """
    rows = []
    with torch.enable_grad():
        for sample in samples:
            value = output(sample)
            if value.numel() != 1:
                raise ConfigurationError(f"an output has shape {tuple(value.shape)}; expected one number per sample")
            rows.append(flat_gradient(value.reshape(()), parameters))
    return torch.stack(rows)


def ntk(jacobian: Tensor) -> Tensor:
    """The empirical neural tangent kernel J J^T, (N, N) of (N, P) (Jacot et al., arXiv 1806.07572).

    Its `rlplastic.plasticity.ranks.effective_rank` is the eNTK rank (Lyle et al., arXiv 2402.18762). The
    kernel's eigenvalues are squares, so it is below the effective rank of J itself.
    """
    return jacobian @ jacobian.mT
